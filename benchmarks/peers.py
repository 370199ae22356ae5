"""Train by the recipe of somebody else on the same crops, through the same loop as train.py.

    python benchmarks/peers.py --recipe reference --data data/faces --epochs 10
    python benchmarks/peers.py --recipe official --data data/faces --epochs 10
    python benchmarks/peers.py --recipe straight-through --data data/faces --epochs 10

reference         the early PyTorch repo that this one follows in layout: a scalar PReLU shared
                  within a block and applied again after the sum, gates with biases and a scalar
                  PReLU, r50 of (3, 4, 6, 3) blocks, an unpadded stem and a max-pool,
                  sqrt(1 - cos^2) in the margin, the learning rate divided by 10 at each fifth of
                  the run from 0.1 at batch 512 (here in proportion), gradients clipped by value,
                  weight decay on everything, centres that start as Xavier's rule says, s = 64,
                  m = 0.5, ImageNet's normalisation
official          arcface_torch (insightface, commit 0ea3845): its r18 without
                  squeeze-and-excitation, its polynomial schedule, whose power is 1 (linear), the
                  learning rate of its configuration for one GPU (0.02 at batch 128, here in
                  proportion), s = 64, m = 0.5, cos(theta + m) also past 180 degrees, with the
                  gradient of the plain cosine (straight-through), weight decay on everything, the
                  backbone's gradient clipped by its norm, no augmentation but the flip
straight-through  our recipe `cpu`, but for that gradient

All other options are those of train.py and may be named, too, but for those of the parts above.
Data, order of the photos, batch size, held-out identities and precision are the same for all, so
that recipes are compared, not loaders; so are depth and width. The size of the crops and of the
embedding are part of a recipe: 112 pixels and 512 numbers for both peers, 64 and 256 for ours
(experiments.py runs ours with theirs, too). Writes what train.py writes; of `reference` also
reference.onnx, for lfw_eval.py.

Legend of shapes: N photos, C identities, E embedding size.
"""

import importlib.util
import math
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

import torch
from torch import Tensor, nn

import checkpoint
import config
import export_onnx
import job
import models
import train
import training_step
from arcface import ArcMarginHead
from config import RECIPES, InputError, TrainOptions

PEERS: dict[str, dict[str, object]] = {
    "reference": {
        "network": "se-r18", "width": 0.5, "s": 64.0, "m": 0.5, "dropout": 0.5, "schedule": "step",
        "milestones": (0.2, 0.4, 0.6, 0.8), "warmup": 0.0, "lr": 0.1, "lr_batch": 512,
        "augment": "flip", "compile": True,
    },
    "official": {
        "network": "r18", "width": 0.5, "s": 64.0, "m": 0.5, "schedule": "linear", "warmup": 0.0,
        "lr": 0.02, "lr_batch": 128, "augment": "flip", "compile": True,
    },
    "straight-through": RECIPES["cpu"],
}  # fmt: skip
CLIP = 5.0  # the reference system: each entry of the gradient; arcface_torch: the backbone's norm
# Options that the replaced parts do not heed.
FIXED = ("head", "sample_rate", "margin", "m1", "m3", "easy_margin", "init")
FIXED_BY = {
    "straight-through": FIXED,
    "official": (*FIXED, "clip_norm"),
    "reference": (*FIXED, "clip_norm", "resolution", "checkpointing"),
}


def main(options: TrainOptions) -> int:
    check(options)
    with ExitStack() as stack:
        for module, name, part in parts(options.recipe):
            stack.enter_context(mock.patch.object(module, name, part))
        code = train.main(options)
    run = options.runs / (options.name or options.recipe)
    if code == 0 and options.recipe == "reference" and not job.rank():
        export(options, run)
    return code


def parts(recipe: str) -> list[tuple[ModuleType, str, object]]:
    """What takes the place of what in the training loop."""
    return {
        "straight-through": [(training_step, "make_head", StraightThroughHead.of)],
        "official": [
            (training_step, "make_head", OfficialHead.of),
            (training_step, "make_optimizer", decay_everything),
            (train, "update", clip_backbone),
        ],
        "reference": [
            (training_step, "new_backbone", ReferenceNet),
            (training_step, "make_head", ReferenceHead.of),
            (training_step, "make_optimizer", decay_everything),
            (train, "update", clip_by_value),
        ],
    }[recipe]


def check(options: TrainOptions) -> None:
    """Raises InputError: an option that would go unheeded, or a run of another recipe."""
    usual = replace(TrainOptions(), **PEERS[options.recipe])
    for name in FIXED_BY[options.recipe]:
        if getattr(options, name) != getattr(usual, name):
            raise InputError(f"--{name.replace('_', '-')} is fixed in --recipe {options.recipe}")
    if options.recipe == "reference":
        network = options.network
        if network.removeprefix("se-") not in BLOCKS:
            raise InputError(f"--recipe reference has {', '.join(BLOCKS)} and se-, not {network}")
        if (
            importlib.util.find_spec("onnx") is None
            or importlib.util.find_spec("onnxruntime") is None
        ):
            raise InputError(
                "--recipe reference ends with an ONNX file: pip install onnx onnxruntime"
            )
    run = options.runs / (options.name or options.recipe)
    if (run / "config.json").exists():
        begun = config.read_run(run).get("recipe")
        if begun != options.recipe:
            raise InputError(f"{run} was begun with --recipe {begun}: choose another --name")


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


class OfficialHead(StraightThroughHead):
    """No other line past 180 degrees: there, more margin raises the logit."""

    def with_margin(self, own: Tensor) -> Tensor:
        with torch.no_grad():
            phi = torch.cos(own.clamp(-1, 1).acos() + self.m)
        return own + (phi - own).detach()


class ReferenceHead(StraightThroughHead):
    """phi by the addition theorem, its gradient by autograd through the square root."""

    @classmethod
    def of(cls, options: TrainOptions, num_identities: int) -> ArcMarginHead:
        head = super().of(options, num_identities)
        nn.init.xavier_uniform_(head.weight)
        return head

    def with_margin(self, own: Tensor) -> Tensor:
        phi = own * math.cos(self.m) - torch.sqrt(1 - own**2) * math.sin(self.m)
        past = own <= math.cos(math.pi - self.m)
        return torch.where(past, own - math.sin(math.pi - self.m) * self.m, phi)


# --------------------------------------------------------------------------------------------------
# the reference system's network

BLOCKS = {
    "r18": (2, 2, 2, 2),
    "r34": (3, 4, 6, 3),
    "r50": (3, 4, 6, 3),
    "r101": (3, 4, 23, 3),
    "r152": (3, 8, 36, 3),
}


class ReferenceNet(nn.Module):
    """float (N, 3, 112, 112) RGB in [-1, 1] -> float32 (N, E)."""

    def __init__(self, options: TrainOptions):
        super().__init__()
        blocks = BLOCKS[options.network.removeprefix("se-")]
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
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = ((x + 1) / 2 - self.mean) / self.std
        x = self.dropout(self.bn(self.blocks(self.stem(x)))).flatten(1)  # (N, 512 * 7 * 7)
        with models._full_precision(x):  # as our networks do
            return self.features(self.fc(x.float()))  # (N, E)


class ReferenceBlock(nn.Module):
    """BN, conv, BN, PReLU, strided conv, BN, [SE]; the sum; the same PReLU again."""

    def __init__(self, c_in: int, c_out: int, stride: int, with_se: bool):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(c_in), models._conv(c_in, c_in), nn.BatchNorm2d(c_in), nn.PReLU(),
            models._conv(c_in, c_out, stride=stride), nn.BatchNorm2d(c_out),
            ReferenceGate(c_out) if with_se else nn.Identity(),
        )  # fmt: skip
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                models._conv(c_in, c_out, kernel=1, stride=stride), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        prelu = self.body[3]  # one slope for all channels, in both places
        return prelu(self.body(x) + self.shortcut(x))  # (N, c_out, H / stride, W / stride)


class ReferenceGate(nn.Module):
    """Squeeze-and-excitation with biases, and one slope for all channels."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 16)
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden), nn.PReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.layers(x.mean(dim=(2, 3)))  # (N, C)
        return x * gate[:, :, None, None]  # (N, C, H, W)


def export(options: TrainOptions, run: Path) -> None:
    """The best weights as a graph that takes what our networks take, held against PyTorch."""
    state, metadata = checkpoint.load_weights(run / checkpoint.BEST)
    network = ReferenceNet(options).eval()
    checkpoint.load_state(network, state, run / checkpoint.BEST)
    metadata = {**export_onnx.complete(metadata), "network": "reference system's SE-LResNet-E-IR"}
    graph = export_onnx.to_onnx(network, metadata)
    export_onnx.check(export_onnx.read_back(graph), network, run)
    checkpoint.write_atomic(run / "reference.onnx", graph)
    print(f"of another kind than ours: python lfw_eval.py --model {run / 'reference.onnx'}")


# --------------------------------------------------------------------------------------------------
# updates


def decay_everything(
    backbone: nn.Module, head: nn.Module, options: TrainOptions
) -> torch.optim.Optimizer:
    """Weight decay on BN, biases and slopes, too."""
    parameters = [p for p in (*backbone.parameters(), head.weight) if p.requires_grad]
    return torch.optim.SGD(
        parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )


def clip_backbone(net: training_step.Net, norm, norm_ok, rate: float, limit: float) -> None:
    nn.utils.clip_grad_norm_(net.backbone.parameters(), CLIP)
    training_step.update(net, norm, norm_ok, rate, 0.0)


def clip_by_value(net: training_step.Net, norm, norm_ok, rate: float, limit: float) -> None:
    for module in (net.backbone, net.head):
        nn.utils.clip_grad_value_(module.parameters(), CLIP)
    training_step.update(net, norm, norm_ok, rate, 0.0)


if __name__ == "__main__":
    RECIPES |= PEERS
    chosen = config.parse(TrainOptions, __doc__)
    if chosen.recipe not in PEERS:
        sys.exit(config.complain(f"name a peer: --recipe {' or '.join(PEERS)}", 2))
    config.run(main, chosen)
