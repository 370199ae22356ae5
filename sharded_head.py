"""The margin head for identities by the million: each rank holds and scores a part of them.

    head = ShardedHead(512, 2_000_000, sample_rate=0.1, s=64, m=0.5)
    entropy, own, other = head(embeddings, labels, step)     # of the photos of all ranks

Embeddings are gathered from all ranks, each rank computes the logits to its own centres, and the
softmax runs across the ranks: no rank ever holds all logits. With a sample rate below 1, each rank
scores the centres of the identities in the batch and a random part of the others (Partial FC, An
et al. 2022), and only those rows get a gradient, momentum and weight decay.

Legend: R ranks, B photos a rank, N = R * B, C identities of this rank, S sampled ones, E embedding
size.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import distributed
from arcface import ArcMarginHead


class ShardedHead(ArcMarginHead):
    """ArcMarginHead over the identities [start, stop) of this rank, with its cross-entropy.

    Args:
        embedding_size: E.
        num_identities: of all ranks together, at least one a rank.
        sample_rate: share of the centres that take part in a step, in (0, 1]. Identities of the
            batch always do, if need be beyond this share.
        seed: of the first weights and of the sampling.
        margins: s, m, m1, m3, easy_margin as ArcMarginHead takes them.
    """

    def __init__(
        self,
        embedding_size: int,
        num_identities: int,
        sample_rate: float = 1.0,
        seed: int = 0,
        **margins: float,
    ):
        if not 0 < sample_rate <= 1:
            raise ValueError(f"need 0 < sample_rate <= 1, not {sample_rate}")
        rank, ranks = distributed.rank(), distributed.ranks()
        if num_identities < ranks:
            raise ValueError(f"{num_identities} identities are fewer than the {ranks} ranks")
        self.start, self.stop = distributed.share(num_identities, rank, ranks)
        super().__init__(embedding_size, self.stop - self.start, **margins)
        self.sample_rate, self.seed = sample_rate, seed
        generator = torch.Generator().manual_seed(seed + self.start)
        torch.nn.init.normal_(self.weight, std=0.01, generator=generator)

    def forward(
        self, embeddings: Tensor, labels: Tensor, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy and plain angles of the photos of all ranks, the same on each rank.

        Their mean is the loss on every rank; its backward is to run on every rank.

        Args:
            embeddings: (B, E) of this rank; B is the same on all.
            labels: int64 (B,) among all identities.
            step: decides, with the seed, which centres are sampled.

        Returns:
            Cross-entropy float32 (N,); and in degrees, detached, the angle to the own centre and
            to the nearest other one that took part, (N,).
        """
        everyone = distributed.gather_with_gradient(embeddings)  # (N, E)
        local = distributed.gather(labels) - self.start  # (N,)
        # note: nonzero is a CPU-GPU sync point
        rows = ((local >= 0) & (local < self.stop - self.start)).nonzero()[:, 0]  # (K,)
        local = local[rows]  # (K,)
        sampled = None
        if self.sample_rate < 1:
            sampled = self.sample(local, step)  # (S,)
            local = torch.searchsorted(sampled, local)  # place among the sampled
        logits, angle, other = self.margin_logits(everyone, rows, local, sampled, True)  # (N, S)
        entropy = _ShardedCrossEntropy.apply(logits, rows, local)  # (N,)
        own = torch.zeros_like(other)
        own[rows] = angle.rad2deg()
        nearest = distributed.max_(other).clamp(-1, 1).acos().rad2deg()
        return entropy, distributed.sum_(own), nearest

    @torch.no_grad()
    def sample(self, labels: Tensor, step: int) -> Tensor:
        """The centres that take part: those of `labels`, and others at random -> (S,), ascending.

        A function of (seed, step, rank): a resumed run draws the same.
        """
        seed = int(np.random.SeedSequence((self.seed, step, self.start)).generate_state(1)[0])
        generator = torch.Generator(labels.device).manual_seed(seed)
        count = len(self.weight)
        lot = torch.rand(count, generator=generator, device=labels.device)  # (C,)
        lot[labels] = 2.0  # always among the largest
        # note: reading how many there are is a CPU-GPU sync point
        size = max(math.ceil(self.sample_rate * count), int((lot == 2.0).sum()))
        return lot.topk(size).indices.sort().values  # (S,)

    def extra_repr(self) -> str:
        place = f"identities {self.start}..{self.stop - 1}, sample_rate={self.sample_rate}"
        return f"{super().extra_repr()}, {place}"


class _ShardedCrossEntropy(torch.autograd.Function):
    """-log softmax at the own class, the sum of exponentials taken over all ranks' logits."""

    @staticmethod
    def forward(ctx, logits, rows, labels):
        peak = distributed.max_(logits.amax(dim=1))  # (N,)
        exponentials = (logits - peak[:, None]).exp_()  # (N, S)
        total = distributed.sum_(exponentials.sum(dim=1))  # (N,)
        target = torch.zeros_like(peak)
        target[rows] = logits[rows, labels]
        ctx.save_for_backward(exponentials, total, rows, labels)
        return total.log() + peak - distributed.sum_(target)  # (N,)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        exponentials, total, rows, labels = ctx.saved_tensors
        grad_logits = exponentials.mul_((grad / total)[:, None])  # (N, S); nobody reads them again
        grad_logits[rows, labels] -= grad[rows]
        return grad_logits, None, None


class LazySGD(torch.optim.SGD):
    """SGD that leaves alone the rows which a sparse gradient lacks: their momentum and decay wait.

    For dense gradients it is torch's SGD.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._step_rows(parameter, group)
                    parameter.grad = None
        return super().step(closure)

    def _step_rows(self, parameter: Tensor, group: dict) -> None:
        gradient = parameter.grad.coalesce()
        rows = gradient.indices()[0]  # (S,)
        change = gradient.values().add(parameter[rows], alpha=group["weight_decay"])  # (S, E)
        if group["momentum"]:
            state = self.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            change += group["momentum"] * state["momentum_buffer"][rows]
            state["momentum_buffer"][rows] = change
        parameter.index_add_(0, rows, change, alpha=-group["lr"])
