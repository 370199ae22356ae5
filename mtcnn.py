"""MTCNN's three networks with facenet-pytorch's weights, laid out so that they run fast.

    pnet, rnet, onet = load("cpu")
    seen = refine(rnet, crops)  # float32 (B, 24, 24, 3), pixels from 0 to 255

They compute what facenet_pytorch's PNet, RNet and ONet compute, but for rounding:
- everything is channels-last: convolutions run at the processor's peak, and pooling is a maximum of
  slices (F.max_pool2d took a third of the time in NCHW, a tenth in NHWC);
- (x - 127.5) / 128 is folded into the first convolution: exact, as none of them is padded;
- of two logits only the difference is computed, and PNet's shifts only where the score passes.

Legend of shapes: N canvases, H height, W width, B crops, C channels.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torch import nn

CELL, STRIDE = 12, 2  # PNet sees 12 x 12 pixels, every second one
_MEAN, _STD = 127.5, 128.0
_NOTHING = -1e9  # never the largest of a pool


class Layer(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor
    slopes: torch.Tensor | None = None  # of the PReLU behind it


def load(device: torch.device | str) -> tuple[list[Layer], list[Layer], list[Layer]]:
    """The layers of PNet, RNet and ONet, for `propose` and `refine`."""
    return tuple(_layers(net().eval(), device) for net in (PNet, RNet, ONet))


@torch.no_grad()
def _layers(net: nn.Module, device: torch.device | str) -> list[Layer]:
    """Convolutions, then the dense layer if there is one, then all heads in one."""
    slopes = [layer.weight for layer in net.modules() if isinstance(layer, nn.PReLU)]
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    pairs = [(layer.weight, layer.bias) for layer in convolutions[: len(slopes)]]
    weight, bias = pairs[0]
    pairs[0] = weight / _STD, bias - weight.sum((1, 2, 3)) * (_MEAN / _STD)
    pairs = [(weight.contiguous(memory_format=torch.channels_last), bias) for weight, bias in pairs]
    if isinstance(net, PNet):
        scores, heads = net.conv4_1, [net.conv4_2]
    else:
        dense, scores, *heads = (layer for layer in net.modules() if isinstance(layer, nn.Linear))
        # Flattened as width, height, channels there, as height, width, channels here.
        weight = dense.weight.unflatten(1, (3, 3, -1)).transpose(1, 2).flatten(1)
        pairs.append((weight.contiguous(), dense.bias))
    weights = [scores.weight[1:] - scores.weight[:1]]  # face less no face
    biases = [scores.bias[1:] - scores.bias[:1]]
    for head in heads:
        weights.append(head.weight)
        biases.append(head.bias)
    pairs.append((torch.cat(weights).flatten(1), torch.cat(biases)))
    return [
        Layer(*(tensor.detach().to(device) for tensor in (*pair, *slopes[number : number + 1])))
        for number, pair in enumerate(pairs)
    ]


def propose(net: list[Layer], canvas: torch.Tensor, holes: torch.Tensor):
    """PNet over canvases -> scores (N, H', W') and features (N, H', W', 32) for `shifts`.

    Args:
        canvas: float32 (N, H, W, 3), H and W even: photos at several sizes, side by side, each at
            even coordinates.
        holes: indices into the flattened (N, H-2, W-2): outputs of the first convolution that
            belong to no photo, although a photo of odd size has them in its last pools.
    """
    x = _conv(canvas, net[0])
    x.view(-1, x.shape[3]).index_fill_(0, holes, _NOTHING)
    x = _conv(_conv(_pool(x, 2), net[1]), net[2])
    head = net[3]
    score = torch.addmv(head.bias[:1], x.view(-1, x.shape[3]), head.weight[0]).sigmoid_()
    return score.view(x.shape[:3]), x


def shifts(net: list[Layer], features: torch.Tensor) -> torch.Tensor:
    """Features of the cells that passed, (B, 32) -> how their boxes move (B, 4)."""
    return F.linear(features, net[3].weight[1:], net[3].bias[1:])


def refine(net: list[Layer], crops: torch.Tensor) -> torch.Tensor:
    """Crops, (B, 24, 24, 3) for RNet, (B, 48, 48, 3) for ONet -> (B, 5) or (B, 15).

    The columns: score, four shifts, and from ONet five x, then five y, as shares of the box.
    """
    *convolutions, dense, heads = net
    x = _conv(_pool(_conv(_pool(_conv(crops, net[0]), 3), net[1]), 3), net[2])
    if len(convolutions) == 4:
        x = _conv(_pool(x, 2), net[3])
    x = F.prelu(F.linear(x.flatten(1), dense.weight, dense.bias), dense.slopes)
    x = F.linear(x, heads.weight, heads.bias)
    x[:, 0].sigmoid_()
    return x


def _conv(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """(N, H, W, C) -> (N, H', W', C')."""
    x = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias).permute(0, 2, 3, 1)
    count, height, width, channels = x.shape
    # A row's pixels as channels: with PNet's 10 eight times as fast as pixel by pixel.
    rows = x.reshape(count * height, width * channels)
    return F.prelu(rows, _repeat(layer.slopes, width)).view(x.shape)


@functools.lru_cache(maxsize=256)
def _repeat(slopes: torch.Tensor, count: int) -> torch.Tensor:
    return slopes.repeat(count)


def _pool(x: torch.Tensor, size: int) -> torch.Tensor:
    """Max-pool of 2 or 3 and stride 2; at size 3 the last window may lack its last pixel."""
    height, width = (x.shape[1] - size + 1) // 2 + 1, (x.shape[2] - size + 1) // 2 + 1
    out = torch.maximum(x[:, : 2 * height : 2], x[:, 1::2])
    if size == 3:
        rows = (x.shape[1] - 1) // 2
        torch.maximum(out[:, :rows], x[:, 2::2], out=out[:, :rows])
    x, out = out, torch.maximum(out[:, :, : 2 * width : 2], out[:, :, 1::2])
    if size == 3:
        columns = (x.shape[2] - 1) // 2
        torch.maximum(out[:, :, :columns], x[:, :, 2::2], out=out[:, :, :columns])
    return out
