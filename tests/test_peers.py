"""The recipes of others that we are held against. Run: python -m pytest tests/test_peers.py"""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import utils
from arcface import ArcMarginHead
from benchmarks import peers
from config import InputError, TrainOptions
from conftest import patterned_crop

SMALL = {"epochs": 1, "width": 0.125, "embedding_size": 32, "batch_size": 16, "workers": 0,
         "threads": 1, "compile": False, "amp": "off", "tensorboard": False}  # fmt: skip


@pytest.fixture
def heads():
    """Ours, ours straight-through, the official one and the reference system's; same centres."""
    torch.manual_seed(0)
    options = TrainOptions(embedding_size=8, s=64.0, m=0.5)
    ours = ArcMarginHead(8, 5, 64.0, 0.5)
    kinds = (peers.StraightThroughHead, peers.OfficialHead, peers.ReferenceHead)
    found = [ours, *(kind.of(options, 5) for kind in kinds)]
    for head in found:
        head.load_state_dict(ours.state_dict())
    return found


def test_all_heads_give_the_same_logits_and_angles(heads):
    embeddings, labels = torch.randn(20, 8), torch.arange(20) % 5
    (logits, own, other), *others = (head(embeddings, labels, return_angles=True) for head in heads)
    for theirs, own_too, other_too in others:
        torch.testing.assert_close(theirs, logits, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(own_too, own, rtol=0, atol=0.05)
        torch.testing.assert_close(other_too, other, rtol=0, atol=0.05)


def test_the_straight_through_gradient_is_the_one_of_the_plain_cosine(heads):
    ours = heads[0]
    labels = torch.arange(20) % 5
    gradients = {}
    for name, head in zip(("ours", "straight", "official", "reference"), heads, strict=True):
        embeddings = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        head(embeddings, labels)[torch.arange(20), labels].sum().backward()
        gradients[name] = embeddings.grad
    plain = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (64 * ours.cosines(plain)[torch.arange(20), labels].sum()).backward()
    torch.testing.assert_close(gradients["straight"], plain.grad)
    torch.testing.assert_close(gradients["official"], plain.grad)
    assert not torch.allclose(gradients["ours"], plain.grad, rtol=0.05)
    torch.testing.assert_close(gradients["reference"], gradients["ours"], rtol=1e-3, atol=1e-3)


def test_past_180_degrees_the_official_margin_turns_back(heads):
    """Ours, and the reference system's, go on falling there (ArcFace paper, easy margin off)."""
    labels = torch.tensor([0])
    logits = []
    for head in heads:
        away = -F.normalize(head.weight[:1].detach()) + 0.001 * torch.randn(1, 8)
        logits.append(head(away, labels)[0, 0].item() / 64)
    ours, straight, official, reference = logits
    assert ours < -1 and straight == pytest.approx(ours, abs=1e-4)
    assert reference == pytest.approx(ours, abs=1e-3)
    assert -0.9 < official < -0.8  # cos(180 degrees + 0.5)


def test_the_reference_network_is_the_described_one():
    options = TrainOptions(network="se-r18", width=1.0, dropout=0.5)
    with torch.device("meta"):
        net = peers.ReferenceNet(options)
        assert net(torch.zeros(2, 3, 112, 112)).shape == (2, 512)
    stem = net.stem[0]
    assert stem.padding == (0, 0) and isinstance(net.stem[3], torch.nn.MaxPool2d)
    slopes = [net.stem[2], *(block.body[3] for block in net.blocks)]
    slopes += [block.body[6].layers[1] for block in net.blocks]
    assert len(slopes) == 17 and all(slope.weight.numel() == 1 for slope in slopes)
    assert all(block.body[6].layers[0].bias.numel() for block in net.blocks)
    small = peers.ReferenceNet(dataclasses.replace(options, width=0.25))
    linear = [module for module in small.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2 * 8 + 1 and not any(layer.bias.any() for layer in linear)
    with torch.device("meta"):
        deep = peers.ReferenceNet(dataclasses.replace(options, network="r50"))
    assert len(deep.blocks) == 3 + 4 + 6 + 3
    assert isinstance(deep.blocks[0].body[6], torch.nn.Identity)


def test_the_reference_block_applies_its_slope_after_the_sum_again():
    torch.manual_seed(0)
    block = peers.ReferenceBlock(16, 16, 1, with_se=True).eval()
    x = torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        torch.nn.init.constant_(block.body[3].weight, 0.25)
        out = block(x)
        torch.nn.init.zeros_(block.body[3].weight)
        assert (out < 0).any() and (block(x) >= 0).all()


def test_gradients_are_clipped_by_value(monkeypatch):
    layer, head = torch.nn.Linear(2, 1), torch.nn.Linear(1, 1, bias=False)
    layer.weight.grad, layer.bias.grad = torch.tensor([[9.0, -0.5]]), torch.tensor([-30.0])
    head.weight.grad = torch.tensor([[7.0]])
    net = type("Net", (), {"backbone": layer, "head": head})
    monkeypatch.setattr(peers.training_step, "update", lambda *_: None)
    peers.clip_by_value(net, None, True, 0.1, 5.0)
    assert layer.weight.grad.tolist() == [[5.0, -0.5]] and layer.bias.grad.tolist() == [-5.0]
    assert head.weight.grad.tolist() == [[5.0]]
    peers.clip_backbone(net, None, True, 0.1, 5.0)
    assert math.hypot(*layer.weight.grad[0], layer.bias.grad[0]) == pytest.approx(5, rel=1e-4)
    assert head.weight.grad.tolist() == [[5.0]]  # not clipped


@pytest.mark.parametrize(
    ("recipe", "backbone", "head", "groups", "update"),
    [
        ("straight-through", "IResNet", "StraightThroughHead", 3, "update"),
        ("official", "IResNet", "OfficialHead", 1, "clip_backbone"),
        ("reference", "ReferenceNet", "ReferenceHead", 1, "clip_by_value"),
    ],
)
def test_its_parts_are_in_the_training_loop(
    tmp_path, monkeypatch, recipe, backbone, head, groups, update
):
    seen = []

    def stub(options):
        net = peers.training_step.build(options, 5, torch.device("cpu"), None)
        optimizer = len(net.optimizer.param_groups)
        names = (type(net.backbone).__name__, type(net.head).__name__, optimizer)
        seen.append((*names, peers.train.update.__name__))
        return 143  # stopped: nothing to export

    monkeypatch.setattr(peers.train, "main", stub)
    options = TrainOptions(runs=tmp_path, recipe=recipe)
    changes = {**peers.PEERS[recipe], "compile": False, "width": 0.125}
    assert peers.main(dataclasses.replace(options, **changes)) == 143
    assert seen == [(backbone, head, groups, update)]
    assert peers.train.update is peers.training_step.update  # put back


@pytest.mark.parametrize(
    ("recipe", "change", "said"),
    [
        ("official", {"head": "sharded"}, "--head is fixed in --recipe official"),
        ("straight-through", {"m1": 1.5}, "--m1 is fixed"),
        ("reference", {"resolution": 64}, "--resolution is fixed"),
        ("reference", {"clip_norm": 1.0}, "--clip-norm is fixed"),
        ("official", {"clip_norm": 1.0}, "--clip-norm is fixed"),
        ("reference", {"network": "mbf"}, "not mbf"),
        ("reference", {"network": "se-r100"}, "not se-r100"),
    ],
)
def test_options_that_would_go_unheeded_are_refused(tmp_path, recipe, change, said):
    options = TrainOptions(runs=tmp_path, recipe=recipe)
    with pytest.raises(InputError, match=said):
        peers.main(dataclasses.replace(options, **{**peers.PEERS[recipe], **change}))


def test_a_run_of_another_recipe_is_not_taken_up(tmp_path):
    (tmp_path / "r").mkdir()
    ours = {"options": {**config.plain(TrainOptions()), "recipe": "cpu"}}
    (tmp_path / "r/config.json").write_text(json.dumps(ours))
    options = TrainOptions(runs=tmp_path, name="r", recipe="straight-through")
    with pytest.raises(InputError, match="was begun with --recipe cpu"):
        peers.main(dataclasses.replace(options, **peers.PEERS["straight-through"]))


@pytest.mark.parametrize("recipe", sorted(peers.PEERS))
def test_a_peer_trains_and_its_model_can_be_evaluated(prepared, tmp_path, recipe, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(config, "RECIPES", {**config.RECIPES, **peers.PEERS})
    options = TrainOptions(data=prepared, runs=tmp_path, name="r", recipe=recipe)
    options = dataclasses.replace(options, **{**peers.PEERS[recipe], **SMALL})
    assert peers.main(options) == 0
    model = tmp_path / "r" / "reference.onnx" if recipe == "reference" else tmp_path / "r"
    crops = np.stack([patterned_crop(identity, 0) for identity in range(3)])
    embeddings = utils.embed(utils.load_backbone(model), crops)
    assert embeddings.shape == (3, 32) and np.isfinite(embeddings).all()
    assert math.isfinite(F.cosine_similarity(*torch.from_numpy(embeddings[:2]), dim=0).item())


def test_no_recipe_of_theirs_is_an_error():
    script = config.ROOT / "benchmarks" / "peers.py"
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ended.returncode == 2 and "name a peer" in ended.stderr
    assert "Traceback" not in ended.stderr
