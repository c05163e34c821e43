"""How a run ends: what a signal does, and the sentence and exit code of every end.

SIGINT (Ctrl-C), SIGHUP (the terminal was closed), SIGTERM (a scheduler, torchrun) and the warnings of batch
systems are one thing: what cannot be cut is finished (a step, a checkpoint), everything is saved, one
sentence is said, and the exit code is 128 + the signal's number, on all ranks, whichever of them it reached.
A second one ends the process at once. A rank whose torchrun is gone gets SIGTERM.
"""

import os
import signal
import threading
import time
import traceback
from contextlib import contextmanager

import torch

from support.words import RunError, UserError

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
PATIENCE = 2.0  # seconds in which further signals are the first one's echo: torchrun passes on what all were sent


class Stopped(BaseException):
    """A signal has arrived on some rank, Stopped(its number), and everything worth keeping is saved.

    No `except Exception` on the way may swallow it.
    """


class Signals:
    """Which signal has arrived, if any: `with signals:` around a whole run and its last words.

    `with signals.held():` is around what is finished first. Elsewhere the first signal raises Stopped where
    the program stands, which loses nothing: whatever is written is complete or absent.
    """

    def __init__(self):
        self.number, self.since, self.holding, self.before = 0, 0.0, False, {}

    def __enter__(self):
        self.__init__()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and the background of a script want it
                    self.before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _arrived(self, number, _):
        if self.number:
            if time.monotonic() - self.since > PATIENCE:
                os._exit(128 + number)
            return
        self.number, self.since = number, time.monotonic()
        if not self.holding:
            raise Stopped(number)

    @contextmanager
    def held(self):
        """What is done in here is finished first; then Stopped is raised if a signal has arrived meanwhile."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        self.check()

    def arrived(self):
        """Number of the signal that has arrived, 0 if none has."""
        return self.number

    def check(self, *_):
        """Raise Stopped if a signal has arrived: asked now and then in long work."""
        if self.arrived():
            raise Stopped(self.number)


signals = Signals()  # of this process


def ending(error, begun):
    """(sentence, exit code) for what has ended a run: 2 a mistake of the user, 1 a run that cannot go on.

    begun: whether there is a run directory to continue.
    """
    kept = "what was finished is kept, continue with --resume" if begun else "no run was begun"
    number = error.args[0] if isinstance(error, Stopped) else signals.number
    if number:  # also if it has ended another rank first, and so a collective operation here
        saved = "everything is saved, continue with --resume" if begun else kept
        saved = str(error) if isinstance(error, RunError) else saved  # which may be that nothing could be saved
        return f"stopped by {signal.Signals(number).name}; {saved}", 128 + number
    if isinstance(error, UserError):
        return str(error), 1 if isinstance(error, RunError) else 2
    if isinstance(error, OSError):
        return f"{error}; {kept}", 1
    if isinstance(error, torch.OutOfMemoryError):
        return (f"out of GPU memory ({str(error).splitlines()[0]}). Lower --micro_batch or --max_rows, or add "
                f"--checkpoint_activations; {kept}"), 1
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's own words on a CPU
        return f"out of memory. Lower --micro_batch, --max_rows or --max_pixels; {kept}", 1
    return "".join(traceback.format_exception(error)), 1  # a defect of this program
