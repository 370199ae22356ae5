"""MTCNN's three networks with facenet-pytorch's weights, laid out so that they run fast.

    pnet, rnet, onet = load("cpu")
    score, shift = refine(rnet, crops)        # float32 (B, 24, 24, 4), pixels from 0 to 255

They compute what facenet_pytorch's PNet, RNet and ONet compute, but for rounding:
- everything is channels-last: convolutions run at the processor's peak, and pooling is a maximum of
  slices (of 250x250 photos, F.max_pool2d took a third of the time in NCHW, a tenth in NHWC);
- (x - 127.5) / 128 is folded into the first convolution: exact, as none of them is padded. It takes
  four channels, the fourth with zero weights, since four sums of 32 bits are gathered in one move;
- of two logits only the difference is computed, and PNet's shifts only where the score passes.

Legend of shapes: N canvases, H height, W width, B crops, C channels.
"""

import torch
import torch.nn.functional as F
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torch import nn

CELL, STRIDE = 12, 2  # PNet sees 12 x 12 pixels, every second one
_MEAN, _STD = 127.5, 128.0
_NOTHING = -1e9  # never the largest of a pool


def load(device: torch.device | str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """PNet, RNet and ONet for `propose` and `refine`; they are not callable as they were."""
    return tuple(_lay_out(net().eval()).to(device) for net in (PNet, RNet, ONet))


@torch.no_grad()
def _lay_out(net: nn.Module) -> nn.Module:
    first = net.conv1
    first.bias -= first.weight.sum((1, 2, 3)) * (_MEAN / _STD)
    first.weight = nn.Parameter(F.pad(first.weight / _STD, (0, 0, 0, 0, 0, 1)))  # (C, 4, 3, 3)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    if isinstance(net, PNet):
        heads = [net.conv4_2]
        scores = net.conv4_1
    elif isinstance(net, RNet):
        dense, scores, heads = net.dense4, net.dense5_1, [net.dense5_2]
    else:
        dense, scores, heads = net.dense5, net.dense6_1, [net.dense6_2, net.dense6_3]
    if not isinstance(net, PNet):
        # Flattened as width, height, channels there, as height, width, channels here.
        weight = dense.weight.unflatten(1, (3, 3, -1))
        dense.weight.data = weight.transpose(1, 2).flatten(1).contiguous()
    face = scores.weight[1:] - scores.weight[:1]  # (1, C): face less no face
    net.head_weight = nn.Parameter(torch.cat([face, *(head.weight for head in heads)]).flatten(1))
    face = scores.bias[1:] - scores.bias[:1]
    net.head_bias = nn.Parameter(torch.cat([face, *(head.bias for head in heads)]))
    return net.requires_grad_(False)


def propose(net: nn.Module, canvas: torch.Tensor, holes: torch.Tensor):
    """PNet over canvases -> scores (N, H', W') and features (N, H', W', 32) for `shifts`.

    Args:
        canvas: float32 (N, H, W, 4), H and W even: photos at several sizes, side by side, each at
            even coordinates.
        holes: indices into the flattened (N, H-2, W-2): outputs of the first convolution that
            belong to no photo, although a photo of odd size has them in its last pools.
    """
    x = _conv(canvas, net.conv1, net.prelu1)
    x.view(-1, x.shape[3]).index_fill_(0, holes, _NOTHING)
    x = _conv(_pool(x, 2), net.conv2, net.prelu2)
    x = _conv(x, net.conv3, net.prelu3)
    return F.linear(x, net.head_weight[:1], net.head_bias[:1]).sigmoid_()[..., 0], x


def shifts(net: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Features of the cells that passed, (B, 32) -> how their boxes move (B, 4)."""
    return F.linear(features, net.head_weight[1:], net.head_bias[1:])


def refine(net: nn.Module, crops: torch.Tensor) -> torch.Tensor:
    """Crops, (B, 24, 24, 4) for RNet, (B, 48, 48, 4) for ONet -> (B, 5) or (B, 15).

    The columns: score, four shifts, and from ONet five x, then five y, as shares of the box.
    """
    x = _pool(_conv(crops, net.conv1, net.prelu1), 3)
    x = _pool(_conv(x, net.conv2, net.prelu2), 3)
    x = _conv(x, net.conv3, net.prelu3)
    if isinstance(net, RNet):
        dense, prelu = net.dense4, net.prelu4
    else:
        x = _conv(_pool(x, 2), net.conv4, net.prelu4)
        dense, prelu = net.dense5, net.prelu5
    x = F.prelu(F.linear(x.flatten(1), dense.weight, dense.bias), prelu.weight)
    x = F.linear(x, net.head_weight, net.head_bias)
    x[:, 0].sigmoid_()
    return x


def _conv(x: torch.Tensor, layer: nn.Module, prelu: nn.Module) -> torch.Tensor:
    """(N, H, W, C) -> (N, H-2, W-2, C')."""
    x = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias).permute(0, 2, 3, 1)
    count, height, width, channels = x.shape
    # A row's pixels as channels: with PNet's 10 eight times as fast as pixel by pixel.
    rows = x.reshape(count * height, width * channels)
    return F.prelu(rows, prelu.weight.expand(width, -1).flatten()).view(x.shape)


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
