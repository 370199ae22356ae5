"""Run: python -m pytest tests/test_models.py

The backbones, against the official PyTorch networks (fixture in ../shared, skipped where absent)
and against published parameter and operation counts. Large networks are built on the meta device,
which holds shapes and no numbers.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from models import NETWORKS, IRBlock, SqueezeExcite, count_parameters, create

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "iresnet_parity.json"
SMALL = ("r18", "se-r18", "mbf")  # one of each kind, run for real
SIDE = 48  # of the crops where the size does not matter: quick


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _on_meta(network, **options):
    with torch.device("meta"):
        return create(network, **options)


# ---------------------------------------------------------------- parity with the official networks


def fixture_weights(shapes):
    """The weights as ../shared/README.md defines them."""
    rng = np.random.default_rng(0)
    weights = {}
    for key in sorted(shapes):
        shape = shapes[key]
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
            continue
        a = rng.standard_normal(shape)
        if key.endswith("running_var"):
            a = 1 + 0.1 * np.abs(a)
        elif len(shape) >= 2:
            a = a * np.sqrt(1 / np.prod(shape[1:]))
        elif key.endswith(("running_mean", "bias")):
            a = 0.1 * a
        elif "prelu" in key:
            a = 0.25 + 0.05 * a
        else:
            a = 1 + 0.1 * a
        weights[key] = torch.from_numpy(a.astype(np.float32))
    return weights


@pytest.mark.skipif(not FIXTURE.exists(), reason="needs ../shared/fixtures")
@pytest.mark.parametrize(
    ("depth", "memory_format"), [(18, torch.channels_last), (50, torch.contiguous_format)]
)
def test_reproduces_the_official_network(depth, memory_format):
    expected = json.loads(FIXTURE.read_text())[f"iresnet{depth}"]
    net = create(f"r{depth}").eval()
    assert {key: list(t.shape) for key, t in net.state_dict().items()} == expected["keys"]
    assert count_parameters(net) == expected["params"]

    net.load_state_dict(fixture_weights(expected["keys"]))
    batch = np.random.default_rng(1).random((2, 3, 112, 112)) * 2 - 1
    batch = torch.from_numpy(batch.astype(np.float32))
    with torch.inference_mode():
        got = net.to(memory_format=memory_format)(batch.to(memory_format=memory_format))  # (2, 512)
    first, norm = torch.tensor(expected["first16"]), torch.tensor(expected["norm"])
    assert ((got[:, :16] - first).norm() / first.norm()) < 1e-4
    torch.testing.assert_close(got.norm(dim=1), norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("network", "millions"), [("r18", 24.03), ("r34", 34.14), ("r50", 43.59), ("r100", 65.16)]
)
def test_parameter_counts_are_the_published_ones(network, millions):
    assert round(count_parameters(_on_meta(network)) / 1e6, 2) == millions


def _multiply_adds(net, size=112):
    """Multiply-adds of the convolutions and linear layers for one picture."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        fan_in = module.weight[0].numel()  # multiply-adds for one output number
        total += fan_in * output[0].numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    net.eval()(torch.zeros(1, 3, size, size, device="meta"))
    return total


@pytest.mark.parametrize(
    ("network", "giga"),
    [("r18", 2.61), ("r34", 4.46), ("r50", 6.31), ("r100", 12.09)],
)
def test_operation_counts_are_the_published_ones(network, giga):
    assert round(_multiply_adds(_on_meta(network)) / 1e9, 2) == giga


# Official `get_mbf` weights, by key: one of each kind of layer.
MBF_KEYS = {
    "layers.0.layers.0.weight": (128, 3, 3, 3),
    "layers.0.layers.2.weight": (128,),
    "layers.1.layers.0.weight": (128, 2, 3, 3),
    "layers.2.layers.0.layers.0.weight": (128, 128, 1, 1),
    "layers.2.layers.1.layers.0.weight": (128, 1, 3, 3),
    "layers.2.layers.2.layers.1.running_var": (128,),
    "layers.3.layers.3.layers.2.layers.0.weight": (128, 128, 1, 1),
    "layers.4.layers.2.layers.0.weight": (256, 256, 1, 1),
    "layers.5.layers.5.layers.1.layers.2.weight": (256,),
    "layers.6.layers.1.layers.0.weight": (512, 1, 3, 3),
    "layers.6.layers.2.layers.0.weight": (256, 512, 1, 1),
    "layers.7.layers.1.layers.0.layers.0.weight": (256, 256, 1, 1),
    "conv_sep.layers.0.weight": (512, 256, 1, 1),
    "conv_sep.layers.2.weight": (512,),
    "features.layers.0.layers.0.weight": (512, 1, 7, 7),
    "features.layers.0.layers.1.weight": (512,),
    "features.layers.2.weight": (512, 512),
    "features.layers.3.weight": (512,),
}


def test_mbf_has_the_official_keys():
    state = _on_meta("mbf", dropout=0.4).state_dict()
    assert {key: tuple(state[key].shape) for key in MBF_KEYS} == MBF_KEYS
    # The residual and linear parts hold no PReLU, so nothing lies beyond these counts.
    assert sum(key.endswith("running_mean") for key in state) == 2 + 3 * (3 + 12) + 1 + 2
    assert len([key for key in state if state[key].ndim == 4]) == 2 + 3 * (3 + 12) + 1 + 1
    assert not [key for key in state if key.startswith("features") and key.endswith("2.bias")]


# ---------------------------------------------------------------- all names


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_builds_and_gives_embeddings(network):
    net = _on_meta(network, embedding_size=128)
    embeddings = net(torch.zeros(2, 3, 112, 112, device="meta"))
    assert embeddings.shape == (2, 128) and embeddings.dtype == torch.float32
    assert not [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]


def test_the_names():
    depths = (18, 34, 50, 100, 101, 152, 200)
    names = [f"r{d}" for d in depths] + [f"se-r{d}" for d in depths] + ["mbf"]
    assert list(NETWORKS) == names


@pytest.mark.parametrize("network", SMALL)
def test_trains_on_a_batch(network):
    net = create(network, embedding_size=64, width=0.25, resolution=SIDE)
    target = torch.randn(4, 64)
    embeddings = net(torch.rand(4, 3, SIDE, SIDE) * 2 - 1)
    F.mse_loss(embeddings, target).backward()
    for name, parameter in net.named_parameters():
        if name == "features.weight":
            assert not parameter.requires_grad and (parameter == 1).all()
            continue
        assert parameter.requires_grad, name
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("network", SMALL)
def test_eval_is_deterministic_and_independent_of_the_batch(network):
    net = create(network, width=0.25, resolution=SIDE, dropout=0.5).eval()
    batch = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    with torch.inference_mode():
        whole = net(batch)
        torch.testing.assert_close(net(batch), whole, rtol=0, atol=0)
        alone = torch.cat([net(picture[None]) for picture in batch])
    assert ((alone - whole).norm(dim=1) / whole.norm(dim=1)).max() < 1e-5


@pytest.mark.parametrize("network", SMALL)
def test_dropout_acts_in_training_only(network):
    net = create(network, width=0.25, resolution=SIDE, dropout=0.5)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)):
        norm.eval()  # so that only dropout can make two passes differ
    batch = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert not torch.equal(net(batch), net(batch))
        net.eval()
        assert torch.equal(net(batch), net(batch))


@pytest.mark.parametrize("network", SMALL)
def test_embeddings_are_float32_under_autocast(network):
    net = create(network, width=0.25, resolution=SIDE).eval()
    tail = net.features if network != "mbf" else net.features.layers[3]
    linear = net.fc if network != "mbf" else net.features.layers[2]
    seen = []
    for module in (net.conv1 if network != "mbf" else net.layers[0], linear, tail):
        module.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    batch = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(batch)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
    assert half.dtype == torch.float32
    with torch.no_grad():
        full = net(batch)
    assert F.cosine_similarity(half, full).min() > 0.99


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("width", "channels"),
    [(0.25, [16, 16, 32, 64, 128]), (0.3, [16, 16, 40, 80, 152]), (0.01, [16] * 5), (2.0, None)],
)
def test_width_scales_channels_to_multiples_of_8(width, channels):
    channels = channels or [128, 128, 256, 512, 1024]
    net = _on_meta("r18", width=width)
    stages = [getattr(net, f"layer{k}")[-1].conv2.out_channels for k in (1, 2, 3, 4)]
    assert [net.conv1.out_channels, *stages] == channels
    assert net.fc.weight.shape == (512, channels[-1] * 49)


@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize("width", [0.01, 0.125, 0.3, 1.7])
def test_odd_widths_run(network, width):
    net = _on_meta(network, width=width)
    assert net(torch.zeros(2, 3, 112, 112, device="meta")).shape == (2, 512)


@pytest.mark.parametrize("network", SMALL)
def test_crops_are_shrunk_to_the_resolution(network):
    net = create(network, width=0.125, resolution=64).eval()
    crops = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        assert net(crops).shape == (2, 512)
        assert F.cosine_similarity(net(crops), net(net.shrink(crops))).min() > 0.99999
    assert not any("share" in key for key in net.state_dict())
    with pytest.raises(ValueError, match=r"\(N, 3, 112, 112\), got \(2, 3, 80, 80\)"):
        net(torch.rand(2, 3, 80, 80))
    with pytest.raises(ValueError, match=r"got \(3, 64, 64\)"):
        net(torch.rand(3, 64, 64))


@pytest.mark.parametrize("side", [16, 48, 56, 64, 80, 96])
def test_shrinking_is_opencv_s_mean_over_areas(side):
    crop = np.random.default_rng(side).integers(0, 256, (112, 112, 3)).astype(np.float32)
    wanted = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)
    got = models.Shrink(side)(torch.from_numpy(crop).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-3)  # OpenCV rounds its weights


def test_a_picture_of_one_colour_keeps_it_when_it_is_shrunk():
    crops = torch.full((1, 3, 112, 112), -0.75)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(models.Shrink(64)(crops), torch.full((1, 3, 64, 64), -0.75))


@pytest.mark.parametrize(("name", "hint"), [("r51", "r50"), ("SE-R50", "se-r50"), ("mbfn", "mbf")])
def test_unknown_name_is_refused_with_a_suggestion(name, hint):
    with pytest.raises(
        ValueError, match=f"unknown network '{name}': did you mean '{hint}'"
    ) as info:
        create(name)
    assert "\n" not in str(info.value) and all(known in str(info.value) for known in NETWORKS)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0},
        {"width": -1},
        {"embedding_size": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"resolution": 100},
        {"resolution": 0},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        create("r18", **options)


# ---------------------------------------------------------------- the pieces


def test_se_only_adds_keys():
    plain, with_se = _on_meta("r50").state_dict(), _on_meta("se-r50").state_dict()
    assert all(with_se[key].shape == tensor.shape for key, tensor in plain.items())
    extra = {key.split(".", 2)[2] for key in with_se.keys() - plain.keys()}
    assert extra == {"se.fc1.weight", "se.prelu.weight", "se.fc2.weight"}
    assert with_se["layer4.0.se.fc1.weight"].shape == (32, 512, 1, 1)
    assert with_se["layer4.0.se.fc2.weight"].shape == (512, 32, 1, 1)


def test_se_by_hand():
    se = SqueezeExcite(32)
    x = torch.randn(2, 32, 5, 4)
    with torch.no_grad():
        for n in range(2):
            mean = x[n].flatten(1).mean(1)  # (32,)
            hidden = se.fc1.weight[:, :, 0, 0] @ mean  # (2,)
            hidden = torch.where(hidden > 0, hidden, se.prelu.weight * hidden)
            gate = 1 / (1 + torch.exp(-se.fc2.weight[:, :, 0, 0] @ hidden))  # (32,)
            torch.testing.assert_close(se(x)[n], x[n] * gate[:, None, None])


def test_a_block_without_weights_is_its_shortcut():
    # Nothing (no activation) follows the addition: negative values pass unchanged.
    block = IRBlock(8, 8, 1, with_se=True).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(block(x), x, rtol=0, atol=0)


@pytest.mark.parametrize(("c_in", "stride", "changes"), [(8, 1, False), (8, 2, True), (4, 1, True)])
def test_shortcut_has_weights_only_where_the_shape_changes(c_in, stride, changes):
    block = IRBlock(c_in, 8, stride, with_se=False)
    assert any(key.startswith("downsample") for key in block.state_dict()) == changes
    assert block(torch.randn(2, c_in, 6, 6)).shape == (2, 8, 6 // stride, 6 // stride)


def test_initialisation():
    net = create("se-r18")
    assert net.layer3[1].conv1.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert net.layer3[1].se.fc1.weight.std().item() == pytest.approx(1 / (3 * 256) ** 0.5, rel=0.1)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)):
        assert (norm.weight == 1).all() and (norm.bias == 0).all() and norm.eps == 1e-5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_prelu_is_torchs(memory_format):
    x = torch.randn(3, 5, 9, 7).to(memory_format=memory_format)
    x[0, 0, 0, :3] = 0.0  # the slope counts there
    ours, torchs = models.PReLU(5), torch.nn.PReLU(5)
    for layer in (ours, torchs):
        layer.weight.data.copy_(torch.tensor([0.25, 0.0, -0.5, 1.5, 0.1]))
    grad = torch.randn_like(x)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    results = [layer(one) for layer, one in zip((ours, torchs), inputs, strict=True)]
    for result in results:
        result.backward(grad)
    assert type(results[0].grad_fn).__name__ == "_PReLUBackward"  # ours, not torch's
    assert torch.equal(*results) and torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.allclose(ours.weight.grad, torchs.weight.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(ours(x), torchs(x))
    assert ours.state_dict().keys() == torchs.state_dict().keys()
