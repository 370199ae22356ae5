"""A network for inference: each BN that can be is folded into the layer before it.

from folding import fold
fast = fold(models.create("r50").eval())   # a copy; the same embeddings to 1e-5, not trainable

In eval mode a BN is y = a x + b per channel. After a convolution or a linear layer, a and b go into
its weights and bias, exactly. Before one they do only where no padding is in between: a padded
convolution pads the normalised map with zeros, which are not a zero of the map before the BN. So
each block's first BN (before a padded 3x3) stays, and the last BN -> linear -> BN becomes one.
"""

import copy

import torch
from torch import Tensor, nn

import models


def fold(model: nn.Module) -> nn.Module:
    """A folded copy of one of our backbones, in eval mode and without gradients.

    float (N, 3, 112, 112) -> float32 (N, E), as the model itself. Raises TypeError for a network
    that `models.create` did not make.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if not isinstance(model, models.IResNet | models.MobileFaceNet):
        raise TypeError(f"{type(model).__name__} is no backbone of models.py")
    for module in model.modules():
        if isinstance(module, models.IRBlock):
            module.conv1, module.bn2 = after(module.conv1, module.bn2), nn.Identity()
            module.conv2, module.bn3 = after(module.conv2, module.bn3), nn.Identity()
            if isinstance(module.downsample, nn.Sequential):
                module.downsample = after(*module.downsample)
        elif isinstance(module, models.ConvUnit):
            conv, norm, *activation = module.layers
            module.layers = nn.Sequential(after(conv, norm), *activation)
    if isinstance(model, models.IResNet):
        model.conv1, model.bn1 = after(model.conv1, model.bn1), nn.Identity()
        # (N, C, H, W) is flattened channel by channel: a and b of each are repeated H * W times.
        area = model.fc.in_features // model.bn2.num_features
        model.fc = before(model.bn2, after(model.fc, model.features), area)
        model.bn2, model.features = nn.Identity(), nn.Identity()
    else:
        pool, flatten, linear, norm = model.features.layers
        model.features.layers = nn.Sequential(pool, flatten, after(linear, norm), nn.Identity())
    return model


def after(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | nn.BatchNorm1d) -> nn.Module:
    """layer -> norm as one layer: a (W x + c) + b = (a W) x + (a c + b)."""
    a, b = scale_and_shift(norm)  # (C_out,)
    weight = layer.weight.double() * a.view(-1, *[1] * (layer.weight.ndim - 1))
    bias = b if layer.bias is None else a * layer.bias.double() + b
    return with_weights(layer, weight, bias)


def before(norm: nn.BatchNorm2d, linear: nn.Linear, area: int) -> nn.Linear:
    """norm -> flatten -> linear as one layer: W (a x + b) + c = (W a) x + (W b + c)."""
    a, b = (vector.repeat_interleave(area) for vector in scale_and_shift(norm))  # (C_in area,)
    weight = linear.weight.double()
    return with_weights(linear, weight * a, weight @ b + linear.bias.double())


def scale_and_shift(norm: nn.BatchNorm2d | nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """a and b of y = a x + b, float64 (C,): what is rounded once is rounded at the end."""
    a = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return a, norm.bias.double() - norm.running_mean.double() * a


def with_weights(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of the layer with other weights, rounded to its own precision."""
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)  # copy.copy shares the dict
    kind = layer.weight.dtype
    new.weight = nn.Parameter(weight.to(kind), requires_grad=False)
    new.bias = nn.Parameter(bias.to(kind), requires_grad=False)
    return new
