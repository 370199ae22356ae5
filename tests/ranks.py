"""What the ranks of a job check, each for itself. Started by test_distributed.py under torchrun:

torchrun --nproc-per-node 2 tests/ranks.py heads
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
import data_gen
import distributed
import models
import train
import training_step
import utils
from arcface import ArcMarginHead
from sharded_head import LazySGD, ShardedHead
from validation import Validation

E, C, B = 16, 37, 6  # embedding size, identities (no multiple of the ranks), photos a rank
MARGINS = (
    {"s": 32.0, "m": 0.5},
    {"s": 64.0, "m": 0.0, "m3": 0.35},
    {"s": 16.0, "m": 0.3, "m1": 1.2, "m3": 0.1},
    {"s": 32.0, "m": 0.5, "easy_margin": True},
)


def draw(rows: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same on every rank: embeddings and labels of all ranks, and all centres."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows * ranks, E, generator=generator)
    labels = torch.randint(C, (rows * ranks,), generator=generator)
    weight = torch.randn(C, E, generator=generator)
    x[0] = 3 * weight[labels[0]]  # on its centre
    return x, labels, weight


def close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    error = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)
    assert error < 1e-5, f"{what}: off by {error:.2e}"


def heads() -> None:
    """The sharded head is the dense one: loss, angles, gradients; also with sampled centres."""
    rank, ranks = distributed.rank(), distributed.ranks()
    mine = slice(rank * B, (rank + 1) * B)
    x_all, labels, weight = draw(B, ranks)
    for margins in MARGINS:
        dense = ArcMarginHead(E, C, **margins)
        dense.weight.data.copy_(weight)
        x = x_all.clone().requires_grad_()
        logits, own, other = dense(x, labels, return_angles=True)
        F.cross_entropy(logits, labels).backward()
        wanted = F.cross_entropy(logits.detach(), labels, reduction="none")

        head = ShardedHead(E, C, **margins)
        shard = slice(head.start, head.stop)
        assert (
            head.weight.shape == (head.stop - head.start, E) and len(head.weight) <= 37 // ranks + 1
        )
        head.weight.data.copy_(weight[shard])
        part = x_all[mine].clone().requires_grad_()
        entropy, own_here, other_here = head(part, labels[mine])
        entropy.mean().backward()
        close(entropy.detach(), wanted, "loss")
        close(own_here, own, "own angle")
        close(other_here, other, "nearest other")
        close(part.grad / ranks, x.grad[mine], "gradient of the embeddings")  # DDP divides
        close(head.weight.grad, dense.weight.grad[shard], "gradient of the centres")

    # A part of the centres: as a dense head that has only those of all ranks together.
    head = ShardedHead(E, C, sample_rate=0.4, s=32.0, m=0.5)
    head.weight.data.copy_(weight[shard])
    part = x_all[mine].clone().requires_grad_()
    entropy, _, _ = head(part, labels[mine], step=3)
    entropy.mean().backward()
    local = labels - head.start
    here = local[(local >= 0) & (local < len(head.weight))]
    sampled = head.sample(here, 3)
    assert torch.equal(head.weight.grad.coalesce().indices()[0], sampled)
    taken = torch.zeros(C)
    taken[sampled + head.start] = 1
    taken = distributed.sum_(taken).nonzero()[:, 0]  # of all ranks
    assert torch.isin(labels, taken).all() and len(taken) < C
    dense = ArcMarginHead(E, len(taken), s=32.0, m=0.5)
    dense.weight.data.copy_(weight[taken])
    x = x_all.clone().requires_grad_()
    F.cross_entropy(
        dense(x, torch.searchsorted(taken, labels)), torch.searchsorted(taken, labels)
    ).backward()
    close(part.grad / ranks, x.grad[mine], "gradient of the embeddings, sampled")
    rows = torch.searchsorted(taken, sampled + head.start)
    close(head.weight.grad.coalesce().values(), dense.weight.grad[rows], "of the sampled centres")


def gradients() -> None:
    """B photos on each of R ranks give the gradients of one process with R * B; BN in eval mode."""
    rank, ranks = distributed.rank(), distributed.ranks()
    torch.set_default_dtype(torch.float64)  # the gates of SE lose four digits of float32's seven
    real = utils.to_batch
    utils.to_batch = lambda crops, device="cpu": real(crops, device).double()
    generator = torch.Generator().manual_seed(1)
    crops = torch.randint(256, (8, 112, 112, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(C, (8,), generator=generator)
    share = 8 // ranks
    batch = data_gen.Batch(
        crops[rank * share :][:share], labels[rank * share :][:share], torch.arange(share)
    )
    cpu = torch.device("cpu")
    options = config.TrainOptions(
        network="se-r18", width=0.125, embedding_size=E, batch_size=8, s=16.0
    )
    reference = training_step.build(dataclasses.replace(options, seed=7), C, cpu, None)
    whole, weight = (
        models.create("se-r18", E, width=0.125).eval(),
        torch.randn(C, E, generator=generator),
    )
    whole.load_state_dict(reference.backbone.state_dict())
    head = ArcMarginHead(E, C, s=16.0, m=options.m)
    head.weight.data.copy_(weight)
    F.cross_entropy(head(whole(utils.to_batch(crops)), labels), labels).backward()
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm([*wanted.values(), head.weight.grad])

    for kind in ("dense", "sharded"):
        for passes in (1, 2):
            changed = dataclasses.replace(options, seed=7, head=kind, accumulate=passes)
            net = training_step.build(changed, C, cpu, None)
            net.backbone.eval()
            shard = slice(*distributed.share(C, rank, ranks)) if kind == "sharded" else slice(0, C)
            net.head.weight.data.copy_(weight[shard])
            training_step.backward(net, batch, 0, changed)
            for name, parameter in net.backbone.named_parameters():
                if parameter.grad is not None:
                    close(parameter.grad, wanted[name], f"{kind}, {passes} passes: {name}")
            close(
                net.head.weight.grad, head.weight.grad[shard], f"{kind}, {passes} passes: centres"
            )
            close(training_step.gradient_norm(net), norm, f"{kind}, {passes} passes: norm")


def lazy_sgd() -> None:
    """On all rows LazySGD is SGD; rows without a gradient stay, with their momentum."""
    rows = torch.tensor([1, 4, 5])
    weight = torch.randn(8, 3)
    lazy, dense = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    optimizers = [
        kind([parameter], lr=0.1, momentum=0.9, weight_decay=0.01)
        for kind, parameter in ((LazySGD, lazy), (torch.optim.SGD, dense))
    ]
    for _ in range(3):
        values = torch.randn(3, 3)
        lazy.grad = torch.sparse_coo_tensor(rows[None], values, (8, 3), check_invariants=True)
        dense.grad = torch.zeros(8, 3).index_copy_(0, rows, values)
        for optimizer in optimizers:
            optimizer.step()
    close(lazy[rows].detach(), dense[rows].detach(), "rows with a gradient")
    others = torch.tensor([0, 2, 3, 6, 7])
    assert torch.equal(lazy[others], weight[others]) and not torch.equal(
        dense[others], weight[others]
    )


def few_photos() -> None:
    """More ranks than a validation has photos for: those without any wait for the others."""
    rng = np.random.default_rng(0)
    crops = rng.integers(256, size=(4, 112, 112, 3), dtype=np.uint8)
    pairs, same = np.array([[0, 1], [2, 3], [0, 2], [1, 3]]), np.array([True, True, False, False])
    fold = np.array([0, 1, 0, 1])
    found = Validation(4, E, crops.__getitem__, pairs, same, fold, "")
    torch.manual_seed(0)
    backbone = models.create("mbf", E, width=0.125)
    accuracy = found.score(backbone, torch.device("cpu")).accuracy
    table = distributed.gather(torch.tensor([accuracy]))
    assert len(table) == distributed.ranks() and (table == table[0]).all()


def run(options_file: str, stop_at: str, spoil_at: str) -> None:
    """train.py, stopped as if by a signal to one rank, or with a NaN among one rank's pixels."""
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    class StopAt(train.Stop):
        reads = 0

        @property
        def code(self):
            type(self).reads += 1
            return 143 if last and int(stop_at) and self.reads >= int(stop_at) else 0

        @code.setter
        def code(self, value):
            pass

    real, calls = utils.to_batch, []

    def spoiled(crops, device):
        calls.append(1)
        batch = real(crops, device)
        if last and len(calls) == int(spoil_at):
            batch[1, 0, 50, 50] = float("nan")
        return batch

    train.Stop = StopAt
    training_step.utils.to_batch = spoiled
    words = json.loads(Path(options_file).read_text())
    for key in ("data", "runs", "init"):
        words[key] = Path(words[key]) if key in words else None
    config.run(train.main, config.TrainOptions(**words))


CHECKS = {
    "heads": heads,
    "gradients": gradients,
    "lazy_sgd": lazy_sgd,
    "few_photos": few_photos,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "run":
        run(*sys.argv[2:])
    else:
        distributed.join("cpu")
        for name in sys.argv[1:]:
            CHECKS[name]()
        if distributed.rank() == 0:
            print("all equal on", distributed.ranks(), "ranks")
        dist.destroy_process_group()
