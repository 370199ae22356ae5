"""Candidates for the recipe `cpu` that are no options of train.py, through its own loop.

    python benchmarks/trials.py --recipe averaged --data data/faces --epochs 30

averaged       validation and best weights are a running average, over a twentieth of the run
smoothed       label smoothing of 0.1
subcentres     three centres an identity, the nearest counts (Deng et al. 2020)
balanced       identities drawn by the root of their number of photos
annealed       the margin rises from 0 in the first half of the run
grown          crops are shrunk to 64 px but for the last quarter of the run, with --resolution 112

All other options are those of train.py. What paid is an option there; results/trials.csv (the
average) and results/ablations.csv (the others) say what did not. Such a run can't go on after a
stop: the parts here are in no checkpoint.

Legend of shapes: N photos, C identities, E embedding size, K centres an identity.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import config
import data_gen
import job
import models
import train
import training_step
from arcface import ArcMarginHead
from benchmarks.peers import StraightThroughHead
from config import RECIPES, InputError, TrainOptions

SHARE = 0.05  # of the run: the time constant of the average
SMOOTHING = 0.1
CENTRES = 3
SMALL = 64  # pixels
TRIALS = dict.fromkeys(
    ("averaged", "smoothed", "subcentres", "balanced", "annealed", "grown"), RECIPES["cpu"]
)


def main(options: TrainOptions) -> int:
    if options.resume or options.head != "dense" or options.margin != "arcface":
        raise InputError("a trial takes no --resume, --head sharded or other --margin")
    if options.easy_margin or job.ranks() > 1:
        raise InputError("a trial takes no --easy-margin and runs as one process, without torchrun")
    if options.recipe == "grown" and (options.resolution <= SMALL or options.network == "mbf"):
        raise InputError(f"this trial takes a --resolution above {SMALL}, and no --network mbf")
    with ExitStack() as stack:
        for module, name, part in parts(options):
            stack.enter_context(mock.patch.object(module, name, part))
        return train.main(options)


def parts(options: TrainOptions) -> list[tuple[ModuleType, str, object]]:
    """What takes the place of what in the training loop."""
    loop = Loop(options)
    found = {
        "grown": [
            (training_step, "new_backbone", stretching_backbone),
            (train, "backward", loop.backward_grown),
            (train, "validate", loop.validate_whole),
        ],
        "averaged": [(train, "update", loop.update), (train, "validate", loop.validate)],
        "smoothed": [(training_step.F, "cross_entropy", smoothed)],
        "subcentres": [(training_step, "make_head", SubCentres.of)],
        "balanced": [(train.data_gen, "make_loader", balanced_loader)],
        "annealed": [(train, "backward", loop.backward)],
    }[options.recipe]
    return [*found, (train, "train", loop.train)]


# The parts that are replaced, and still called.
TRAIN, UPDATE, VALIDATE, BACKWARD = train.train, train.update, train.validate, train.backward
MAKE_LOADER, CROSS_ENTROPY = data_gen.make_loader, F.cross_entropy
NEW_BACKBONE = training_step.new_backbone


def smoothed(*inputs, **options) -> Tensor:  # no partial: --compile asks for a __name__
    return CROSS_ENTROPY(*inputs, **options, label_smoothing=SMOOTHING)


class Loop:
    """Steps of the loop that must know how long the run is, or keep something from step to step."""

    def __init__(self, options: TrainOptions):
        self.options, self.steps = options, 0
        self.average: AveragedModel | None = None

    def train(self, run: Path, options: TrainOptions, faces: data_gen.FaceSet, *rest) -> int:
        self.steps = options.epochs * (len(faces) // options.batch_size)
        return TRAIN(run, options, faces, *rest)

    def update(self, net: training_step.Net, *rest) -> None:
        UPDATE(net, *rest)
        if self.average is None:
            decay = 1 - 1 / max(2.0, SHARE * self.steps)
            self.average = AveragedModel(
                net.backbone, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
            )
        self.average.update_parameters(net.backbone)

    def validate(self, run: Path, net: training_step.Net, *rest) -> float:
        return VALIDATE(run, replace(net, backbone=self.average.module), *rest)

    def backward(self, net: training_step.Net, batch: data_gen.Batch, step: int, *rest):
        net.head.m = self.options.m * min(1.0, 2 * step / self.steps)
        return BACKWARD(net, batch, step, *rest)

    def backward_grown(self, net: training_step.Net, batch: data_gen.Batch, step: int, *rest):
        whole = 4 * step >= 3 * self.steps
        see(net, self.options.resolution if whole else SMALL)
        return BACKWARD(net, batch, step, *rest)

    def validate_whole(self, run: Path, net: training_step.Net, *rest) -> float:
        see(net, self.options.resolution)
        return VALIDATE(run, net, *rest)


def see(net: training_step.Net, side: int) -> None:
    """Let it shrink the crops to this side from now on."""
    if net.backbone.shrink.resolution != side:
        net.backbone.shrink = models.Shrink(side).to(net.device)


def stretching_backbone(options: TrainOptions) -> torch.nn.Module:
    """The network of --resolution, whose last map is stretched to its size where it is smaller."""
    backbone, side = NEW_BACKBONE(options), options.resolution // 16

    def stretch(_, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs  # (N, 256, 4, 4) of a small crop
        if x.shape[-1] == side:
            return inputs
        return (F.interpolate(x, (side, side), mode="bilinear"),)  # (N, 256, 7, 7)

    backbone.bn2.register_forward_pre_hook(stretch)
    return backbone


class SubCentres(StraightThroughHead):
    """The cosine to an identity is the one to the nearest of its K centres; the true gradient."""

    @classmethod
    def of(cls, options: TrainOptions, num_identities: int) -> ArcMarginHead:
        return super().of(options, num_identities * CENTRES)

    def cosines(self, embeddings: Tensor) -> Tensor:
        every = super().cosines(embeddings)  # (N, C * K)
        return every.view(len(embeddings), -1, CENTRES).amax(dim=2)  # (N, C)

    def with_margin(self, own: Tensor) -> Tensor:
        return _Phi.apply(own.clamp(-1 + 1e-6, 1 - 1e-6).acos(), self._phi)  # (N, 1)


class _Phi(torch.autograd.Function):
    """The head's own phi and its slope, as a function of theta."""

    @staticmethod
    def forward(ctx, theta: Tensor, phi) -> Tensor:
        value, slope = phi(theta)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return -grad * slope, None


class Balanced(data_gen.RunSampler):
    """Photos of an identity with n of them are drawn n^0.5 times as often as one of a single."""

    labels: np.ndarray  # (N,)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        weight = np.bincount(self.labels)[self.labels] ** -0.5  # (N,) of a photo
        ends = np.cumsum(weight / weight.sum())
        for epoch in range(self.epochs):
            rng = np.random.default_rng((self.seed, epoch))
            # One draw in each of N equal parts of (0, 1): every epoch has its share of each.
            places = (np.arange(self.photos) + rng.random(self.photos)) / self.photos
            order = rng.permutation(np.searchsorted(ends, places).clip(max=self.photos - 1))
            for step in range(self.steps_per_epoch):
                batch = order[step * self.batch_size :][: self.batch_size]
                yield [(epoch, int(index)) for index in batch]


def balanced_loader(faces: data_gen.FaceSet, sampler: data_gen.RunSampler, *rest):
    drawn = Balanced(len(faces), sampler.batch_size, sampler.epochs, sampler.seed)
    drawn.labels = faces.labels
    return MAKE_LOADER(faces, drawn, *rest)


if __name__ == "__main__":
    RECIPES |= TRIALS
    chosen = config.parse(TrainOptions, __doc__)
    if chosen.recipe not in TRIALS:
        sys.exit(config.complain(f"name a trial: --recipe {' or '.join(TRIALS)}", 2))
    config.run(main, chosen)
