"""The ranks of a `torchrun` job that share a folder: who this one is, and waiting for the others.

    with job.joined():                 # without torchrun: one rank, and nothing happens
        if job.rank() == 0: ...
        job.wait()                     # until all ranks have come here

A rank that dies makes torchrun end the others and fail: nobody waits for it in vain.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

_PATIENCE = timedelta(days=30)  # ranks end their shares hours apart


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Which of the ranks on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def joined() -> Iterator[None]:
    if ranks() == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    yield  # not left after an error: the others may wait for this rank
    dist.destroy_process_group()


def wait() -> None:
    """Until all ranks are here."""
    if ranks() > 1:
        dist.barrier()
