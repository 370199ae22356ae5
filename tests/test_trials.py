"""Candidates that did not become options. Run: python -m pytest tests/test_trials.py"""

import dataclasses
import json

import numpy as np
import pytest
import torch

import checkpoint
import config
from arcface import ArcMarginHead
from benchmarks import trials
from config import InputError, TrainOptions
from test_peers import SMALL


@pytest.fixture
def options(prepared, tmp_path) -> TrainOptions:
    return TrainOptions(data=prepared, runs=tmp_path, name="r", network="mbf", **SMALL)


@pytest.fixture
def of_trial(options):
    """The options of a trial."""

    def make(recipe: str, **changes) -> TrainOptions:
        larger = {"network": "r18", "resolution": 80} if recipe == "grown" else {}
        return dataclasses.replace(options, recipe=recipe, **larger, **changes)

    return make


@pytest.mark.parametrize("recipe", trials.TRIALS)
def test_a_trial_trains_and_leaves_the_loop_as_it_was(of_trial, tmp_path, recipe):
    options = of_trial(recipe)
    places = [place[:2] for place in trials.parts(options)]
    before = [getattr(module, name) for module, name in places]
    assert trials.main(options) == 0
    assert [getattr(module, name) for module, name in places] == before
    run = tmp_path / "r"
    assert json.loads((run / "result.json").read_text())["steps"] == 10
    best, _ = checkpoint.load_weights(run / checkpoint.BEST)
    last = torch.load(run / "last.pt", weights_only=True)["backbone"]
    same = all(torch.equal(best[key], last[key]) for key in best)
    assert same == (recipe != "averaged")


@pytest.mark.parametrize("recipe", trials.TRIALS)
def test_what_a_trial_replaces_can_be_compiled(of_trial, recipe):
    """torch.compile reads the names of what it calls, and a partial has none."""
    for _, _, part in trials.parts(of_trial(recipe)):
        assert part.__name__


def test_of_one_centre_each_the_sub_centres_are_the_plain_head(monkeypatch):
    monkeypatch.setattr(trials, "CENTRES", 1)
    torch.manual_seed(0)
    plain = ArcMarginHead(8, 5, 32.0, 0.3)
    sub = trials.SubCentres.of(TrainOptions(embedding_size=8), 5)
    sub.load_state_dict(plain.state_dict())
    labels = torch.arange(20) % 5
    found = []
    for head in (plain, sub):
        embeddings = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logits, own, other = head(embeddings, labels, return_angles=True)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        found.append((logits.detach(), own, other, embeddings.grad, head.weight.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


def test_the_nearest_of_three_centres_counts():
    head = trials.SubCentres.of(TrainOptions(embedding_size=2, m=0.0, s=1.0), 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [0, -1], [0, -1]]))
    logits = head(torch.tensor([[-2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1]))
    torch.testing.assert_close(logits, torch.tensor([[1.0, 0.0], [1.0, -1.0]]), atol=1e-3, rtol=0)


def test_the_balanced_order_draws_people_by_the_root_of_their_photos():
    sampler = trials.Balanced(90, 10, 200, 0)
    sampler.labels = np.repeat([0, 1], [81, 9])
    drawn = np.array([index for batch in sampler for _, index in batch])
    of_first = (sampler.labels[drawn] == 0).mean()
    assert of_first == pytest.approx(9 / (9 + 3), abs=0.01)  # 81 and 9 photos, 9 : 3
    assert len(set(drawn.tolist())) == 90 and len(drawn) == 200 * 90


def test_the_margin_rises_in_the_first_half(options, monkeypatch):
    seen = []
    plain = trials.BACKWARD

    def record(net, batch, step, options):
        seen.append(net.head.m)
        return plain(net, batch, step, options)

    monkeypatch.setattr(trials, "BACKWARD", record)
    trials.main(dataclasses.replace(options, recipe="annealed", m=0.3))
    assert seen == pytest.approx([0.06 * step for step in range(5)] + 5 * [0.3])


def test_crops_are_small_but_in_the_last_quarter_and_where_it_is_validated(of_trial, monkeypatch):
    seen = []
    plain = {name: getattr(trials, name) for name in ("BACKWARD", "VALIDATE")}

    def recorded(name):
        def record(*inputs):
            net = inputs[0] if name == "BACKWARD" else inputs[1]
            seen.append((name, net.backbone.shrink.resolution))
            return plain[name](*inputs)

        return record

    for name in plain:
        monkeypatch.setattr(trials, name, recorded(name))
    trials.main(of_trial("grown", epochs=2, dropout=0.0))  # of ten steps each
    assert [side for name, side in seen if name == "BACKWARD"] == 15 * [64] + 5 * [80]
    assert [side for name, side in seen if name == "VALIDATE"] == [80, 80]


def test_a_smaller_map_is_stretched_and_the_networks_own_is_left(of_trial):
    options = of_trial("grown")
    torch.manual_seed(0)
    backbone = trials.stretching_backbone(options).eval()
    torch.manual_seed(0)
    usual = trials.NEW_BACKBONE(options).eval()
    crops = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(backbone(crops), usual(crops), rtol=0, atol=0)
    small = backbone(torch.randn(2, 3, 80, 80))
    backbone.shrink = trials.models.Shrink(64)
    assert backbone(crops).shape == small.shape == (2, options.embedding_size)


@pytest.mark.parametrize("changes", [{"resolution": 64}, {"network": "mbf"}])
def test_what_can_not_grow_is_refused(of_trial, changes):
    with pytest.raises(InputError, match="--resolution above 64, and no --network mbf"):
        trials.main(dataclasses.replace(of_trial("grown"), **changes))


def test_a_trial_does_not_go_on(options):
    with pytest.raises(InputError, match="takes no --resume"):
        trials.main(dataclasses.replace(options, recipe="averaged", resume=True))


def test_every_trial_is_told_about():
    assert all(f"\n{name} " in trials.__doc__ for name in trials.TRIALS)
    assert not set(trials.TRIALS) & set(config.RECIPES)
