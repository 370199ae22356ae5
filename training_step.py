"""All that is trained, and one step of it: build, learning rate, gradients, checks, update.

    net = build(options, num_identities, device, amp)
    entropy, own, other = backward(net, batch, step, options)
    norm = gradient_norm(net)
    code, loss_ok, norm_ok = agree(stop.code, entropy, norm)             # over all ranks
    check_finite(net, loss_ok, norm_ok, ...)                             # before the update
    update(net, norm, norm_ok, rate, options.clip_norm)

Legend of shapes: N photos of a rank and pass, C identities, E embedding size.
"""

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data_gen
import distributed
import models
import utils
from arcface import ArcMarginHead, focal
from config import InputError, TrainOptions
from sharded_head import LazySGD, ShardedHead


@dataclass
class Net:
    """All that is trained, and how it runs. Checkpoints are of the plain modules: no prefixes."""

    backbone: nn.Module
    head: ArcMarginHead
    run_backbone: nn.Module  # the same backbone, compiled and under DDP where wanted
    run_head: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    amp: torch.dtype | None
    overflows: int = 0  # updates left out for an overflow of fp16: in a row, and together
    all_overflows: int = 0
    origin: str = ""  # what the backbone started from, where that was no random weights

    @property
    def sharded(self) -> bool:
        return isinstance(self.head, ShardedHead)


def build(
    options: TrainOptions, num_identities: int, device: torch.device, amp: torch.dtype | None
) -> Net:
    torch.manual_seed(options.seed)  # the same weights on every rank
    backbone = new_backbone(options)
    backbone.checkpointing = options.checkpointing
    head = make_head(options, num_identities).to(device)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    backbone = backbone.to(device, memory_format=memory_format)
    if distributed.rank():
        torch.manual_seed(seed_of_rank(options.seed))
    run_backbone = torch.compile(backbone) if options.compile else backbone
    return Net(
        backbone,
        head,
        distributed.wrap(run_backbone, device),
        head if options.head == "sharded" else distributed.wrap(head, device),
        make_optimizer(backbone, head, options),
        torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        device,
        amp,
    )


def new_backbone(options: TrainOptions) -> nn.Module:
    return models.create(
        options.network,
        options.embedding_size,
        options.dropout,
        options.width,
        options.resolution,
    )


def seed_of_rank(seed: int) -> int:
    """Dropout of the ranks must differ."""
    return int(np.random.SeedSequence((seed, distributed.rank())).generate_state(1)[0])


def make_head(options: TrainOptions, num_identities: int) -> ArcMarginHead:
    margins = {
        "arcface": {"m": options.m, "easy_margin": options.easy_margin},
        "cosface": {"m": 0.0, "m3": options.m3},
        "combined": {
            "m": options.m, "m1": options.m1, "m3": options.m3, "easy_margin": options.easy_margin,
        },
    }[options.margin]  # fmt: skip
    size = options.embedding_size
    if options.head == "dense":
        return ArcMarginHead(size, num_identities, options.s, **margins)
    return ShardedHead(
        size, num_identities, options.sample_rate, options.seed, s=options.s, **margins
    )


def make_optimizer(
    backbone: nn.Module, head: nn.Module, options: TrainOptions
) -> torch.optim.Optimizer:
    """SGD; weight decay on matrices and kernels alone, not on BN, biases and PReLU slopes."""
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    decay = options.weight_decay
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [head.weight], "weight_decay": decay},  # last: `save` looks for it there
    ]
    return LazySGD(groups, lr=options.lr, momentum=options.momentum)


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """The rate of step 0 .. steps-1: linear warm-up, then the schedule over what is left.

    Scaled with the batch (Goyal et al. 2017): `lr` is meant for `lr_batch` photos.
    """
    peak = options.lr * (options.batch_size / options.lr_batch if options.lr_batch else 1.0)
    warmup = round(options.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)  # 0 .. 1
    if options.schedule == "step":
        return peak * 0.1 ** sum(step / steps >= milestone for milestone in options.milestones)
    if options.schedule in ("poly", "linear"):  # the official trainer's of once, and of now
        return peak * (1 - done) ** (2 if options.schedule == "poly" else 1)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def head_memory(options: TrainOptions, num_identities: int, ranks: int) -> dict[str, int]:
    """Bytes that the head takes on a rank, float32: what grows with the number of identities."""
    sharded = options.head == "sharded"
    rows = -(-num_identities // ranks) if sharded else num_identities
    active = math.ceil(rows * options.sample_rate)
    photos = options.batch_size // options.accumulate // (1 if sharded else ranks)
    centres = 4 * rows * options.embedding_size
    sampled = 4 * active * options.embedding_size
    return {
        "weights": centres,
        "gradient": sampled if active == rows else 2 * sampled,  # and the sampled centres
        "momentum": centres if options.momentum else 0,
        "logits": 4 * photos * active * (3 if sharded else 4),  # and what backward makes of them
    }


# --------------------------------------------------------------------------------------------------
# one step


def backward(
    net: Net, batch: data_gen.Batch, step: int, options: TrainOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the mean loss of the batch, in `accumulate` passes.

    -> cross-entropy, angle to the own centre and to the nearest other one in degrees, of this
    rank's photos.
    """
    net.optimizer.zero_grad(set_to_none=True)
    found = []
    passes = options.accumulate
    parts = zip(batch.crops.chunk(passes), batch.labels.chunk(passes), strict=True)
    for number, (crops, labels) in enumerate(parts):
        labels = labels.to(net.device, non_blocking=True)  # (N,)
        inputs = utils.to_batch(crops, net.device)  # (N, 3, 112, 112)
        with ExitStack() as stack:
            if number < passes - 1:  # the ranks exchange gradients once a step
                for module in (net.run_backbone, net.run_head):
                    if hasattr(module, "no_sync"):
                        stack.enter_context(module.no_sync())
            with torch.autocast(net.device.type, dtype=net.amp, enabled=net.amp is not None):
                embeddings = net.run_backbone(inputs)  # (N, E)
            if net.sharded:
                entropy, own, other = net.run_head(embeddings, labels, step * passes + number)
            else:
                logits, own, other = net.run_head(embeddings, labels, return_angles=True)  # (N, C)
                entropy = F.cross_entropy(logits, labels, reduction="none")  # (N,)
            loss = focal(entropy, options.focal_gamma).mean() / passes
            net.scaler.scale(loss).backward()
        # A sharded head gives the figures of all ranks' photos.
        first = distributed.rank() * len(labels) if net.sharded else 0
        mine = slice(first, first + len(labels))
        found.append((entropy.detach()[mine], own[mine], other[mine]))
    if net.head.weight.grad.is_sparse:
        net.head.weight.grad = net.head.weight.grad.coalesce()
    net.scaler.unscale_(net.optimizer)
    entropy, own, other = (torch.cat(values) for values in zip(*found, strict=True))
    return entropy, own, other


def gradients(module: nn.Module) -> list[Tensor]:
    """Those that there are; of a sparse one the rows that it has."""
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return [grad.values() if grad.is_sparse else grad for grad in found]


def gradient_norm(net: Net) -> Tensor:
    """The norm over backbone and head, the parts of a sharded head on other ranks included."""
    norm = torch.nn.utils.get_total_norm
    head = norm(gradients(net.head)).square()
    if net.sharded:
        head = distributed.sum_(head)
    return (norm(gradients(net.backbone)).square() + head).sqrt()


def agree(code: int, entropy: Tensor, norm: Tensor) -> tuple[int, bool, bool]:
    """What any rank has met counts for all: a signal, a loss or a norm that is not finite.

    -> exit code or 0, loss is fine, norm is fine. note: a CPU-GPU sync point.
    """
    bad = torch.stack([~entropy.isfinite().all(), ~norm.isfinite()]).to(torch.int64)
    flags = torch.cat([bad.new_tensor([code]), bad])
    code, bad_loss, bad_norm = distributed.max_(flags).tolist()
    return code, not bad_loss, not bad_norm


def check_finite(
    net: Net,
    loss_ok: bool,
    norm_ok: bool,
    step: int,
    rate: float,
    norm: Tensor,
    entropy: Tensor,
    batch: data_gen.Batch,
    faces: data_gen.FaceSet,
) -> None:
    """Stop all ranks before an update that would ruin the weights; the rank that met it tells.

    An overflow of fp16's gradients is no error: `update` leaves that step out, up to 50 in a row.
    """
    net.overflows = 0 if norm_ok else net.overflows + 1
    net.all_overflows += not norm_ok
    if loss_ok and (norm_ok or (net.scaler.is_enabled() and net.overflows <= 50)):
        return
    bad = (~entropy.isfinite()).nonzero()[:, 0].tolist()
    if not bad and (not loss_ok or distributed.rank()):
        raise SystemExit(2)  # another rank tells
    named = [faces.name(int(batch.indices[row])) for row in (bad or range(len(entropy)))[:4]]
    said = f"loss {entropy.mean().item():g} and gradient norm {norm.item():g}"
    if net.scaler.is_enabled() and loss_ok:
        said = f"{net.overflows} updates in a row overflowed in fp16"
    raise InputError(
        f"{said} at step {step}, learning rate {rate:g}, photos {', '.join(named)}, ...: the "
        "update was not made and the last checkpoint is kept; train with a lower --lr under "
        "another --name",
        local=True,
    )


def update(net: Net, norm: Tensor, norm_ok: bool, rate: float, limit: float) -> None:
    """One step of SGD, the gradient scaled down to the norm `limit` (0: left as it is)."""
    if not norm_ok:  # of fp16, on all ranks: the step is left out, the next one scaled lower
        net.scaler.update(net.scaler.get_scale() * net.scaler.get_backoff_factor())
        net.scaler.load_state_dict({**net.scaler.state_dict(), "_growth_tracker": 0})
        return
    for group in net.optimizer.param_groups:
        group["lr"] = rate
    if limit:
        nn.utils.clip_grads_with_norm_(net.backbone.parameters(), limit, norm)
        for grad in gradients(net.head):  # may be sparse, which torch's does not take
            grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    net.scaler.step(net.optimizer)
    net.scaler.update()


def explained(error: Exception, options: TrainOptions, device: torch.device) -> Exception:
    """What a person can do about it, where that is known; else the error itself."""
    lines = str(error).splitlines() or [type(error).__name__]
    said = next((line for line in lines if line.startswith("Last error")), lines[0])  # NCCL's
    kept = "what was saved is kept, --resume goes on"
    if "DataLoader" in said:
        return data_gen.lost_worker(error) or error
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return InputError(
            f"--compile failed ({said[:150]}): it needs a C++ compiler and Python's headers (on "
            "Debian g++ and python3-dev); go on with --no-compile, which is slower",
            local=True,
        )
    if isinstance(error, torch.OutOfMemoryError):
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
        photos = options.batch_size // distributed.ranks() // options.accumulate
        return InputError(
            f"out of memory at {photos} photos a pass, {peak:.1f} GB at the peak ({said[:100]}): "
            f"go on with --resume --checkpointing{' --no-compile' * options.compile}; or choose "
            "another --name with twice the --accumulate or a smaller --batch-size; what was saved "
            "is kept",
            local=True,
        )
    if distributed.lost(error):
        said = re.sub(r"\[[^]]*\]:?\d*:?", "", said).strip()  # gloo's source file and address
        return InputError(
            f"rank {distributed.rank()} lost another rank ({said[:200]}); {kept}", local=True
        )
    return error
