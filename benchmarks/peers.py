"""Train by the recipe of somebody else on the same crops, through the same loop as train.py.

    python benchmarks/peers.py --recipe reference --data data/faces --epochs 10
    python benchmarks/peers.py --recipe official --data data/faces --epochs 10
    python benchmarks/peers.py --recipe straight-through --data data/faces --epochs 10

reference         the early PyTorch repo that this one follows in layout: a scalar PReLU shared
                  within a block and applied again after the sum, an unpadded stem and a max-pool,
                  sqrt(1 - cos^2) in the margin, the learning rate divided by 10 at each fifth of
                  the run, gradients clipped by value, weight decay on everything, s = 64, m = 0.5,
                  ImageNet's normalisation
official          arcface_torch: its r18 without squeeze-and-excitation, polynomial schedule,
                  s = 64, m = 0.5, a margin whose gradient is the one of the plain cosine
                  (straight-through), no augmentation but the flip
straight-through  our recipe `cpu`, but for that gradient

All other options are those of train.py and may be named, too. Data, order of the photos, batch
size, held-out identities and precision are the same for all, so that recipes are compared, not
loaders. Writes what train.py writes; of `reference` also reference.onnx, for lfw_eval.py.

Legend of shapes: N photos, C identities, E embedding size.
"""

import math
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

import torch
from torch import Tensor, nn

import checkpoint
import config
import export_onnx
import models
import train
import training_step
from arcface import ArcMarginHead
from config import RECIPES, TrainOptions

PEERS: dict[str, dict[str, object]] = {
    "reference": {
        "network": "se-r18", "width": 0.5, "s": 64.0, "m": 0.5, "dropout": 0.5, "schedule": "step",
        "milestones": (0.2, 0.4, 0.6, 0.8), "warmup": 0.0, "lr": 0.1, "clip_norm": 0.0,
        "augment": "flip", "amp": "bf16", "compile": True,
    },
    "official": {
        "network": "r18", "width": 0.5, "s": 64.0, "m": 0.5, "schedule": "poly", "warmup": 0.0,
        "lr": 0.1, "augment": "flip", "amp": "bf16", "compile": True,
    },
    "straight-through": RECIPES["cpu"],
}  # fmt: skip
CLIP = 5.0  # of the reference system: each entry of the gradient


def main(options: TrainOptions) -> int:
    with ExitStack() as stack:

        def replace(module, name, value):
            stack.enter_context(mock.patch.object(module, name, value))

        if options.recipe == "reference":
            replace(training_step, "new_backbone", ReferenceNet)
            replace(training_step, "make_head", ReferenceHead.of)
            replace(training_step, "make_optimizer", decay_everything)
            replace(train, "update", clip_by_value)
        else:
            replace(training_step, "make_head", StraightThroughHead.of)
        code = train.main(options)
    run = options.runs / (options.name or options.recipe)
    if code == 0 and options.recipe == "reference":
        export(options, run)
    return code


# --------------------------------------------------------------------------------------------------
# heads


class StraightThroughHead(ArcMarginHead):
    """The same logits; backward takes phi for the cosine itself (d phi / d cos = 1)."""

    @classmethod
    def of(cls, options: TrainOptions, num_identities: int) -> ArcMarginHead:
        return cls(options.embedding_size, num_identities, options.s, options.m)

    def forward(self, embeddings, labels, return_angles=False):
        cosines = self.cosines(embeddings)  # (N, C)
        own = cosines.gather(1, labels[:, None])  # (N, 1)
        logits = cosines.scatter(1, labels[:, None], self.with_margin(own)) * self.s
        if not return_angles:
            return logits
        others = cosines.detach().scatter(1, labels[:, None], -1.0)
        angles = (own.detach()[:, 0], others.amax(dim=1))  # cosines (N,)
        return logits, *(angle.clamp(-1, 1).acos().rad2deg() for angle in angles)

    def with_margin(self, own: Tensor) -> Tensor:
        with torch.no_grad():
            phi, _ = self._phi(own.clamp(-1, 1).acos())
        return own + (phi - own).detach()


class ReferenceHead(StraightThroughHead):
    """phi by the addition theorem, its gradient by autograd through the square root."""

    def with_margin(self, own: Tensor) -> Tensor:
        phi = own * math.cos(self.m) - torch.sqrt(1 - own**2) * math.sin(self.m)
        past = own <= math.cos(math.pi - self.m)
        return torch.where(past, own - math.sin(math.pi - self.m) * self.m, phi)


# --------------------------------------------------------------------------------------------------
# the reference system's network and update


class ReferenceNet(nn.Module):
    """float (N, 3, 112, 112) RGB in [-1, 1] -> float32 (N, E)."""

    def __init__(self, options: TrainOptions):
        super().__init__()
        blocks = models.BLOCKS[options.network.removeprefix("se-")]
        with_se = options.network.startswith("se-")
        channels = [models._scaled(c, options.width) for c in (64, 64, 128, 256, 512)]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, bias=False), nn.BatchNorm2d(channels[0]), nn.PReLU(),
            nn.MaxPool2d(2),
        )  # fmt: skip
        parts = []
        for stage, depth in enumerate(blocks):
            c_in, c_out = channels[stage], channels[stage + 1]
            parts.append(ReferenceBlock(c_in, c_out, 1 if stage == 0 else 2, with_se))
            parts += [ReferenceBlock(c_out, c_out, 1, with_se) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*parts)
        self.bn = nn.BatchNorm2d(channels[-1])
        self.dropout = nn.Dropout(options.dropout)
        self.fc = nn.Linear(channels[-1] * 7 * 7, options.embedding_size)
        self.features = nn.BatchNorm1d(options.embedding_size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = ((x + 1) / 2 - self.mean) / self.std
        x = self.blocks(self.stem(x))  # (N, 512, 7, 7) at width 1
        return self.features(self.fc(self.dropout(self.bn(x)).flatten(1))).float()  # (N, E)


class ReferenceBlock(nn.Module):
    """BN, conv, BN, PReLU, strided conv, BN, [SE]; the sum; the same PReLU again."""

    def __init__(self, c_in: int, c_out: int, stride: int, with_se: bool):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(c_in), models._conv(c_in, c_in), nn.BatchNorm2d(c_in), nn.PReLU(),
            models._conv(c_in, c_out, stride=stride), nn.BatchNorm2d(c_out),
            models.SqueezeExcite(c_out) if with_se else nn.Identity(),
        )  # fmt: skip
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                models._conv(c_in, c_out, kernel=1, stride=stride), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        prelu = self.body[3]  # one slope for all channels, in both places
        return prelu(self.body(x) + self.shortcut(x))  # (N, c_out, H / stride, W / stride)


def decay_everything(backbone: nn.Module, head: nn.Module, options: TrainOptions):
    parameters = [*backbone.parameters(), head.weight]
    return torch.optim.SGD(
        parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )


def clip_by_value(net: training_step.Net, norm, norm_ok, rate: float, limit: float) -> None:
    for module in (net.backbone, net.head):
        nn.utils.clip_grad_value_(module.parameters(), CLIP)
    training_step.update(net, norm, norm_ok, rate, 0.0)


def export(options: TrainOptions, run: Path) -> None:
    """The best weights as a graph that takes what our networks take."""
    state, metadata = checkpoint.load_weights(run / checkpoint.BEST)
    network = ReferenceNet(options).eval()
    checkpoint.load_state(network, state, run / checkpoint.BEST)
    graph = export_onnx.to_onnx(network, export_onnx.complete(metadata))
    checkpoint.write_atomic(run / "reference.onnx", graph)


if __name__ == "__main__":
    RECIPES |= PEERS
    chosen = config.parse(TrainOptions, __doc__)
    if chosen.recipe not in PEERS:
        sys.exit(f"error: name a peer: --recipe {' or '.join(PEERS)}")
    config.run(main, chosen)
