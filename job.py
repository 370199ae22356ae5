"""The ranks of a `torchrun` job that share a folder: which one this is, and waiting for the others.

    if job.rank() == 0: ...
    job.wait()              # until all ranks have come here; without torchrun there is one

What they have to say to each other lies in the folder; waiting goes by the job's key-value store,
without a time limit, since shares may end hours apart. A rank that dies makes torchrun end the
others and fail: nobody waits in vain.
"""

import functools
import itertools
import os
import time

import torch
import torch.distributed as dist

from config import InputError

_LOOK_SECONDS = 0.1
_numbers = itertools.count()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Which of the ranks on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_ranks() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def own_card(device: torch.device) -> torch.device:
    """Of `cuda`, the card of this rank's number; others stay. Raises InputError: there is none."""
    if device != torch.device("cuda"):
        return device
    cards = torch.cuda.device_count()
    if local_rank() >= cards:
        raise InputError(
            f"rank {local_rank()} has no card: --nproc-per-node may be {cards} at most", local=True
        )
    return torch.device("cuda", local_rank())


def wait() -> None:
    """Until all ranks have called it as often as this one."""
    if ranks() == 1:
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a restart
    key = f"pre_process/{attempt}/{next(_numbers)}"
    here = _store().add(key, 1)
    while here < ranks():
        time.sleep(_LOOK_SECONDS)
        here = _store().add(key, 0)


@functools.cache
def _store() -> dist.Store:
    return next(dist.rendezvous("env://", rank(), ranks()))[0]
