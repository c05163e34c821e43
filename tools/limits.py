"""Bounds on what a file from elsewhere may cost: a chat template is a program, and may never end or fill the memory."""

import resource
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from distributed import UserError


@contextmanager
def limits(what, seconds=5.0, memory=2**30):
    """UserError, which begins with `what`, if the body takes longer, or `memory` bytes more than the process has."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return

    def late(*_):
        raise TimeoutError
    before, (soft, hard) = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    pages, statm = resource.getpagesize(), Path("/proc/self/statm")  # Linux; elsewhere time alone is bounded
    bound = int(statm.read_text().split()[0]) * pages + memory if statm.exists() else soft
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (bound if hard < 0 else min(bound, hard), hard))
    try:
        yield
    except (TimeoutError, MemoryError) as error:
        limit = f"{seconds:g} seconds" if isinstance(error, TimeoutError) else f"{memory / 2**20:.0f} MiB of memory"
        raise UserError(f"{what} takes more than {limit}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
