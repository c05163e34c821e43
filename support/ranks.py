"""Ranks: how the processes of a run find each other, share what they know, and fail together.

torchrun starts one process a GPU, a rank; without torchrun there is one.
"""

import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from support.words import RunError, UserError


def join_ranks(timeout_minutes):
    """Join the other ranks if torchrun started us; returns this rank's device.

    Tensors of a GPU travel by NCCL, everything else by gloo: there a dead peer is an exception, hence a sentence.
    """
    local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"{local + 1} processes were started, but there are {torch.cuda.device_count()} GPUs: one each")
    if cuda:
        torch.cuda.set_device(local)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=timeout_minutes))
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def world():
    """(rank, number of ranks); (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """A list of every rank's value, in rank order, on every rank: [value] on one. Also a barrier."""
    if world()[1] == 1:
        return [value]
    values = [None] * world()[1]
    with collective():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def collective():
    """Turns the failure of a collective operation into a sentence: no rank waits for ever for another."""
    try:
        yield
    except RuntimeError as error:
        raise RunError("another rank died, or kept the others waiting for longer than --timeout_minutes "
                       f"({str(error).splitlines()[0]}). Continue with --resume") from error


def leave(sentence, code):
    """Say why and end this process at once: a rank that tidied up first would wait for ranks that wait for it."""
    rank = int(os.environ.get("RANK", 0))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # whoever ends the others may end this one now
    if rank:
        time.sleep(1)  # rank 0 says what all of them found; another speaks only if it outlives rank 0
    print(f"currreft{f' (rank {rank})' if rank else ''}: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized() and world()[1] > 1:
        os._exit(code)
    sys.exit(code)
