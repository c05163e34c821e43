"""Ranks: how the processes of a run find each other, share what they know, and fail together.

torchrun starts one process a GPU, a rank; without torchrun there is one.
"""

import ctypes
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support.base import first_line
from support.words import RunError, UserError, last_words

DRIVER = Path("/proc/driver/nvidia/version")


def join_ranks(timeout_minutes):
    """Join the other ranks if torchrun started us; returns this rank's device.

    Tensors of a GPU travel by NCCL, all else by gloo: there a dead peer is an exception, hence a
    sentence. UserError where a GPU is there and cannot be used, or where the ranks do not meet.
    """
    try:
        rank, local, ranks, here = (int(os.environ.get(name, default)) for name, default in (
            ("RANK", -1), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    except ValueError as error:
        raise UserError("RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are numbers, set by "
                        f"torchrun; one of them is no number here ({error})") from error
    cuda = usable_gpu()
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"{local + 1} processes were started, but there are "
                        f"{torch.cuda.device_count()} GPUs: one each")
    if cuda:
        torch.cuda.set_device(local)
    if rank >= 0 and not dist.is_initialized():
        end_with_launcher(signal.SIGKILL)  # the others would never come
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                    timeout=timedelta(minutes=timeout_minutes),  # device_id: NCCL connects now
                                    device_id=torch.device("cuda", local) if cuda else None)
        except (RuntimeError, ValueError) as error:
            address, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise RunError(
                f"rank {rank} of {ranks} has not met the others at {address}:{port} "
                f"({first_line(error)}): were all of them started, and can they reach it?" + (
                    " Over several nodes, set GLOO_SOCKET_IFNAME to the interface of the network "
                    "between them (ip addr lists it): a host's name often resolves to the host "
                    "itself" if ranks > here else "")) from error
    end_with_launcher(signal.SIGTERM)  # from here on there is something to save; nohup ignores SIGHUP
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def end_with_launcher(number):
    """Get this signal when torchrun dies; at once if it has died already. (Linux alone; see support/launch.py.)"""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.environ.get("LAUNCHER", str(os.getppid())) != str(os.getppid()):
            os.kill(os.getpid(), number)


def usable_gpu():
    """Whether torch can use a GPU; UserError if it cannot use the one there is: no run on a CPU."""
    if torch.version.cuda and torch.cuda.device_count() and not torch.cuda.is_available():
        found = re.search("[0-9]{3,}[.][0-9.]+", DRIVER.read_text()) if DRIVER.exists() else None
        raise UserError(
            "there is a GPU that torch cannot use: most likely its driver"
            f"{f' {found[0]}' if found else ''} is too old for torch {torch.__version__}, which is "
            f"built for CUDA {torch.version.cuda}. Update it; or, if it is 525 or newer, install "
            "torch for CUDA 12: pip install torch --index-url "
            "https://download.pytorch.org/whl/cu126. To run on the CPU in spite of the GPU, set "
            "CUDA_VISIBLE_DEVICES to nothing")
    return torch.cuda.is_available()


def world():
    """(rank, number of ranks); (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """A list of every rank's value, in rank order, on every rank; [value] on one. A barrier."""
    if world()[1] == 1:
        return [value]
    values = [None] * world()[1]
    with collective():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def collective():
    """Turns the failure of a collective operation into a sentence: no rank waits for ever."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            "another rank died, or kept the others waiting for longer than --timeout_minutes "
            f"({first_line(error)}). Continue with --resume") from error


def leave(sentence, code):
    """Say why and end this process at once: tidying up would wait for ranks that wait for it."""
    rank = os.environ.get("RANK", "0")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # whoever ends the others may end this one now
    if rank != "0":
        time.sleep(1)  # rank 0 says what all of them found; another speaks if it outlives rank 0
    who = "currreft" if rank == "0" else f"currreft (rank {rank})"
    last_words(f"{who}: {sentence}")
    if dist.is_initialized() and world()[1] > 1:
        os._exit(code)
    sys.exit(code)
