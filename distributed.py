"""The ranks of a `torchrun` job and what they say to each other. Without torchrun: one rank.

    device = distributed.join("auto")                   # NCCL on CUDA, gloo on CPUs
    everyone = distributed.gather(embeddings)           # (B, E) -> (R * B, E)

Every function here works at one rank too, where it costs nothing.
Legend: R ranks, B rows a rank, E embedding size.
"""

import inspect
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import job
import utils
from config import InputError

_PATIENCE = timedelta(minutes=10)  # with a rank that says nothing; torchrun sees one that died


def join(name: str) -> torch.device:
    """Join the job that torchrun has started, if any -> this rank's device.

    `name` is auto, cpu, cuda or cuda:N; under torchrun each rank takes the card of its local rank.
    """
    device = utils.pick_device(name)
    if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "cuda":
        if device.index is not None:
            raise InputError(f"--device {name} under torchrun: name cuda, each rank takes its card")
        device = job.own_card(device)
        torch.cuda.set_device(device)
    store, own, count = next(dist.rendezvous("env://", timeout=_PATIENCE))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_of_this_start(store),
        rank=own,
        world_size=count,
        timeout=_PATIENCE,
        device_id=device if device.type == "cuda" else None,
    )
    return device


def _of_this_start(store: dist.Store) -> dist.Store:
    """torchrun of torch 2.14 keeps one store over its restarts, with the addresses of dead ranks.

    Whoever reads one of those before its successor has written waits in vain. Several nodes may
    count their restarts differently, so their store stays as torch has it.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return store
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def leave() -> None:
    """The end of a job that went well; after a failure torchrun ends the ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Where a tensor must lie that the ranks exchange."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def say(line: str) -> None:
    """Print on the first rank alone."""
    if rank() == 0:
        print(line, flush=True)


def restarted() -> bool:
    """Whether torchrun has started this job again after a rank was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def share(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """The part [start, stop) of `count` things that is this rank's; sizes differ by one at most."""
    return rank * count // ranks, (rank + 1) * count // ranks


def lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, or silent."""
    said = str(error).lower()
    signs = ("connection", "timed out", "timeout", "read error", "broken pipe", "remote process")
    ours = isinstance(error, dist.DistError) or "gloo" in said
    return ranks() > 1 and ours and any(sign in said for sign in signs)


def barrier() -> None:
    if ranks() > 1:
        dist.barrier()


def sum_(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_(tensor: Tensor) -> Tensor:
    """Largest over the ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """(B, ...) of each rank, the same B -> (R * B, ...) in the order of the ranks; no gradient."""
    if ranks() == 1:
        return tensor
    tensor = tensor.contiguous()
    everyone = tensor.new_empty((ranks() * len(tensor), *tensor.shape[1:]))
    dist.all_gather(list(everyone.chunk(ranks())), tensor)
    return everyone


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """(B, E) of each rank -> (R * B, E). Backward: R times the sum of what the ranks found for B.

    R times, because DDP then takes the mean over the ranks of the backbone's gradients, while the
    loss here is already a mean over all R * B rows.
    """
    return _Gather.apply(tensor) if ranks() > 1 else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return gather(tensor)

    @staticmethod
    def backward(ctx, grad):
        size = len(grad) // ranks()
        if dist.get_backend() == "gloo":  # has no reduce_scatter
            own = sum_(grad.clone())[rank() * size : (rank() + 1) * size]
        else:
            own = grad.new_empty((size, *grad.shape[1:]))
            dist.reduce_scatter(own, list(grad.contiguous().chunk(ranks())))
        return own * ranks()  # (B, E)


def copy_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of the first: its running statistics are the ones that count."""
    if ranks() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DDP, where there are several ranks: gradients become the mean over them.

    Buffers are left alone: each rank's batch norm uses its own photos, as on one card. Running
    statistics drift apart, and those of the first rank are saved and validated (`copy_buffers`).
    """
    if ranks() == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        module, device_ids=ids, gradient_as_bucket_view=True, **{name: False}
    )  # the name changed with torch 2.14
