"""The backbones: face crops in, embeddings out. Nothing of the margin, the data or the training.

    net = create("se-r50", embedding_size=512)     # names: NETWORKS
    net(batch)   # float (N, 3, 112, 112) RGB in [-1, 1] -> float32 (N, 512), not normalised

`r18` ... `r200` are LResNet-E-IR of the ArcFace paper (Deng et al. 2019), `se-r...` the same with
squeeze-and-excitation (Hu et al. 2018), `mbf` is MobileFaceNet (Chen et al. 2018) in the wider form
of InsightFace. State-dict keys and shapes of `r...` and `mbf` are those of InsightFace's PyTorch
backbones, so published weights load; SE adds the keys `layerK.N.se.*`.

Precision: under torch.autocast the convolutions follow it; the last linear layer and its BN always
run in float32, since the loss needs angles finer than 16 bits can tell.
"""

import difflib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

BLOCKS = {
    "r18": (2, 2, 2, 2),
    "r34": (3, 4, 6, 3),
    "r50": (3, 4, 14, 3),
    "r100": (3, 13, 30, 3),
    "r101": (3, 4, 23, 3),
    "r152": (3, 8, 36, 3),
    "r200": (6, 26, 60, 6),
}
NETWORKS = (*BLOCKS, *(f"se-{name}" for name in BLOCKS), "mbf")
CROP = 112  # side of a crop, in pixels


def create(
    network: str,
    embedding_size: int = 512,
    dropout: float = 0.0,
    width: float = 1.0,
    resolution: int = 112,
) -> nn.Module:
    """A freshly initialised backbone (torch's global generator).

    Args:
        network: one of ``NETWORKS``.
        embedding_size: E, the length of an embedding.
        dropout: probability, before the last linear layer (the paper: 0.4).
        width: multiplies every channel count, rounded to a multiple of 8 and at least 16; 1.0 is
            the published net.
        resolution: side in pixels of what the first convolution sees, a multiple of 16; 112 is the
            published one. Crops of 112 are shrunk to it by the network itself.

    Returns:
        A module: float (N, 3, 112, 112) RGB in [-1, 1] -> float32 (N, E). It also takes pictures
        that have its resolution already.

    Raises:
        ValueError: an unknown name, or a size that no network can have.
    """
    if network not in NETWORKS:
        near = difflib.get_close_matches(network.lower(), NETWORKS, n=1, cutoff=0.3)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ValueError(f"unknown network '{network}': {hint}known are {', '.join(NETWORKS)}")
    if resolution < 16 or resolution % 16:
        raise ValueError(f"resolution {resolution} is not a positive multiple of 16")
    if width <= 0 or embedding_size < 1 or not 0 <= dropout < 1:
        raise ValueError(
            f"width must be > 0, embedding_size >= 1 and dropout in [0, 1), not "
            f"{width}, {embedding_size} and {dropout}"
        )
    if network == "mbf":
        return MobileFaceNet(embedding_size, dropout, width, resolution)
    with_se, name = network.startswith("se-"), network.removeprefix("se-")
    return IResNet(BLOCKS[name], with_se, embedding_size, dropout, width, resolution)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, those that are not trained included, as published counts do."""
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- LResNet-E-IR


class IResNet(nn.Module):
    """Stem, four stages that each halve the picture, and the 'E' output of the ArcFace paper."""

    checkpointing = False  # keep only what enters a block, and compute it again in backward

    def __init__(
        self,
        blocks: tuple[int, ...],
        with_se: bool,
        embedding_size: int,
        dropout: float,
        width: float,
        resolution: int,
    ):
        super().__init__()
        self.shrink = Shrink(resolution)
        channels = [_scaled(c, width) for c in (64, 64, 128, 256, 512)]  # stem, then the stages
        self.conv1 = _conv(3, channels[0])
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.prelu = PReLU(channels[0])
        for k, depth in enumerate(blocks):
            stage = [IRBlock(channels[k], channels[k + 1], 2, with_se)]
            stage += [
                IRBlock(channels[k + 1], channels[k + 1], 1, with_se) for _ in range(depth - 1)
            ]
            self.add_module(f"layer{k + 1}", nn.Sequential(*stage))
        self.bn2 = nn.BatchNorm2d(channels[-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels[-1] * (resolution // 16) ** 2, embedding_size)
        # Weight fixed at 1: the head normalises, so a trained weight could only hurt the scale.
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)
        self._initialise()

    def _initialise(self) -> None:
        # std 0.1 as in the official trainer. A BN follows each of these convolutions, so the size
        # of the weights does not change the output, only how far a step of the learning rate turns
        # them: the published learning rates belong to this value. No BN follows the convolutions
        # of SE, which keep torch's own initialisation, as the linear layer does.
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and ".se." not in name:
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(x)
        x = self.prelu(self.bn1(self.conv1(x)))  # (N, 64, 112, 112) at the published size
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = _again(block, x) if self.checkpointing else block(x)  # (N, 512, 7, 7) at last
        x = self.dropout(self.bn2(x)).flatten(1)  # (N, 25088)
        with _full_precision(x):
            return self.features(self.fc(_at_least_float32(x)))  # (N, E)


class IRBlock(nn.Module):
    """BN, conv, BN, PReLU, strided conv, BN, [SE]; then the shortcut, and nothing after it."""

    def __init__(self, c_in: int, c_out: int, stride: int, with_se: bool):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = _conv(c_in, c_out)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.prelu = PReLU(c_out)
        self.conv2 = _conv(c_out, c_out, stride=stride)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.se = SqueezeExcite(c_out) if with_se else nn.Identity()
        self.downsample = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                _conv(c_in, c_out, kernel=1, stride=stride), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        out = self.se(self.bn3(self.conv2(out)))
        return out + self.downsample(x)  # (N, c_out, H / stride, W / stride)


class PReLU(nn.PReLU):
    """nn.PReLU with a backward pass that takes half the time on a CPU.

    Output and gradient of the input are torch's to the bit; that of the slopes is to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        ours = x.device.type == "cpu" and x.dtype == torch.float32 == self.weight.dtype
        if ours and x.ndim == 4 and torch.is_grad_enabled() and self.weight.requires_grad:
            return _PReLU.apply(x, self.weight)
        return super().forward(x)


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return nn.functional.prelu(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # torch's own writes both gradients in full size before it sums one; here the parts on
        # either side of 0 are split once, in loops that run over whole vectors.
        x, weight = ctx.saved_tensors
        right = torch.ops.aten.threshold_backward(grad, x, 0)  # (N, C, H, W), 0 where x <= 0
        left = grad - right
        grad_x = right.addcmul_(left, weight.view(-1, 1, 1))
        by_channel = left.mul_(x).permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # (N * H * W, C)
        return grad_x, by_channel.sum(dim=0)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from all channels' means."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 16)
        self.fc1 = _conv(channels, hidden, kernel=1)
        self.prelu = nn.PReLU(hidden)
        self.fc2 = _conv(hidden, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
        return x * torch.sigmoid(self.fc2(self.prelu(self.fc1(mean))))  # (N, C, H, W)


# ---------------------------------------------------------------- MobileFaceNet


class MobileFaceNet(nn.Module):
    """InsightFace's `get_mbf`: twice the published channels, 512 before the global convolution."""

    checkpointing = False  # as in IResNet

    def __init__(self, embedding_size: int, dropout: float, width: float, resolution: int):
        super().__init__()
        self.shrink = Shrink(resolution)
        c128, c256, c512 = (_scaled(c, width) for c in (128, 256, 512))
        self.layers = nn.ModuleList(
            [
                ConvUnit(3, c128, 3, stride=2),
                # Two channels a group, as in the official weights (not a depthwise convolution).
                ConvUnit(c128, c128, 3, groups=c128 // 2),
                Bottleneck(c128, c128, c128, stride=2),
                BottleneckStack(4, c128, c128),
                Bottleneck(c128, c256, c256, stride=2),
                BottleneckStack(6, c256, c256),
                Bottleneck(c256, c256, c512, stride=2),
                BottleneckStack(2, c256, c256),
            ]
        )
        self.conv_sep = ConvUnit(c256, c512, 1)
        self.features = GlobalDepthwise(c512, embedding_size, dropout, resolution // 16)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # as the official code
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(x)
        for layer in self.layers:
            x = _again(layer, x) if self.checkpointing else layer(x)
        return self.features(self.conv_sep(x))  # (N, E)


class ConvUnit(nn.Module):
    """Convolution, BN and, unless ``linear``, PReLU; held in `layers` as the official keys want."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
        linear: bool = False,
    ):
        super().__init__()
        conv = _conv(c_in, c_out, kernel, stride, groups, padding)
        tail = [] if linear else [PReLU(c_out)]
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(c_out), *tail)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Bottleneck(nn.Module):
    """1x1 up to ``hidden``, 3x3 depthwise with the stride, 1x1 down without activation."""

    def __init__(self, c_in: int, c_out: int, hidden: int, stride: int = 1, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            ConvUnit(c_in, hidden, 1),
            ConvUnit(hidden, hidden, 3, stride=stride, groups=hidden),
            ConvUnit(hidden, c_out, 1, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class BottleneckStack(nn.Module):
    """``depth`` residual bottlenecks of one size."""

    def __init__(self, depth: int, channels: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            *(Bottleneck(channels, channels, hidden, residual=True) for _ in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class GlobalDepthwise(nn.Module):
    """A learned mean over the whole map, channel by channel, then linear and BN."""

    def __init__(self, channels: int, embedding_size: int, dropout: float, side: int):
        super().__init__()
        self.layers = nn.Sequential(
            ConvUnit(channels, channels, side, groups=channels, padding=0, linear=True),
            nn.Sequential(nn.Flatten(), nn.Dropout(dropout)),  # one entry: the keys count them
            nn.Linear(channels, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        pool, flatten, linear, norm = self.layers
        x = flatten(pool(x))  # (N, C)
        with _full_precision(x):
            return norm(linear(_at_least_float32(x)))  # (N, E)


# ---------------------------------------------------------------- shared pieces


class Shrink(nn.Module):
    """Crops of 112 px to a smaller side: each pixel the mean of the area that it covers.

    As two products with a fixed matrix, which every exporter and device knows. A picture that has
    the smaller side already is left as it is.
    """

    def __init__(self, resolution: int):
        super().__init__()
        self.resolution = resolution
        edges = torch.arange(resolution + 1) * (CROP / resolution)  # of the new pixels, in old ones
        left, right = edges[:-1, None], edges[1:, None]
        pixels = torch.arange(CROP)
        covered = (torch.minimum(right, pixels + 1) - torch.maximum(left, pixels)).clamp_min(0)
        share = covered * (resolution / CROP)  # (resolution, 112)
        self.register_buffer("share", share, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        side = self.resolution
        if x.ndim != 4 or x.shape[1:] not in ((3, side, side), (3, CROP, CROP)):
            raise ValueError(f"expected a batch (N, 3, {CROP}, {CROP}), got {tuple(x.shape)}")
        if x.shape[3] == side:
            return x
        with _full_precision(x):
            return (self.share @ _at_least_float32(x) @ self.share.T).to(x.dtype)  # (N, 3, R, R)


def _conv(
    c_in: int,
    c_out: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    padding: int | None = None,
) -> nn.Conv2d:
    """A convolution without bias that, unless told otherwise, keeps the size at stride 1."""
    padding = kernel // 2 if padding is None else padding
    return nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)


def _again(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), whose inner activations are not kept but computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return block(x)
    return checkpoint(
        block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _same_statistics(block))
    )


@contextmanager
def _same_statistics(block: nn.Module) -> Iterator[None]:
    """The second forward pass must not count in BN's running statistics again."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # momentum 0 keeps the old statistics; to switch them off would save less
        norm.momentum, norm.num_batches_tracked = 0.0, None  # than the first pass, which is refused
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _scaled(channels: int, width: float) -> int:
    """``channels * width`` to the nearest multiple of 8, at least 16.

    Below 16 channels in channels-last, the backward pass of a strided 1x1 convolution crashes the
    process on a CPU with AVX-512 (torch 2.14.1, oneDNN).
    """
    return max(16, int(channels * width / 8 + 0.5) * 8)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast off, where it is on (the meta device knows no autocast at all)."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
