"""What is scored after each epoch. Run: python -m pytest tests/test_validation.py"""

import numpy as np
import pytest
import torch

import protocol
import validation
from validation import Validation


class Lookup(torch.nn.Module):
    """Embeds a crop by the number in its first pixel."""

    def __init__(self, table: np.ndarray):
        super().__init__()
        self.table = torch.nn.Parameter(torch.from_numpy(table), requires_grad=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        pixels = ((batch + 1) * 127.5).round().long()
        return self.table[pixels[:, 0, 0, 0] * 256 + pixels[:, 1, 0, 0]]


def crop(index: int) -> np.ndarray:
    pixels = np.zeros((112, 112, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = divmod(index, 256)
    return pixels


def scored(people: int, photos: int, labels: bool = True) -> tuple:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(people), photos)
    centres = rng.normal(size=(people, 16))
    table = (centres[owner] + 0.5 * rng.normal(size=(len(owner), 16))).astype(np.float32)
    pairs = np.stack([np.arange(0, len(owner), 2), np.arange(1, len(owner), 2)], 1)
    pairs = np.concatenate([pairs, (pairs + [0, photos]) % len(owner)])
    same = owner[pairs[:, 0]] == owner[pairs[:, 1]]
    one = Validation(
        len(owner), 16, crop, pairs, same, np.arange(len(pairs)) % 10, "",
        owner if labels else None,
    )  # fmt: skip
    return one.score(Lookup(table), torch.device("cpu")), table, owner, pairs, same


def test_the_threshold_is_taken_on_all_pairs_of_held_out_people():
    score, table, owner, pairs, same = scored(40, 10)
    every = [(a, b) for a in range(400) for b in range(a) if owner[a] != owner[b]]
    first, second = np.array(every).T
    angles = protocol.theta(table[first], table[second])
    assert score.impostors == len(angles) == 78_000
    assert score.far == 1e-3  # 78 pairs
    assert score.threshold == pytest.approx(np.sort(angles)[78], abs=1e-3)
    angles = protocol.theta(table[pairs[:, 0]], table[pairs[:, 1]])
    fold = np.arange(len(pairs)) % 10
    assert score.accuracy == protocol.kfold_accuracy(angles, same, fold).mean > 0.9


def test_of_given_pairs_only_they_count():
    score, table, _, pairs, same = scored(100, 20, labels=False)
    angles = protocol.theta(table[pairs[:, 0]], table[pairs[:, 1]])[~same]
    assert (score.far, score.impostors) == (1e-2, 1000)
    assert score.threshold == pytest.approx(np.sort(angles)[10], abs=1e-9)
    genuine = protocol.theta(table[pairs[:, 0]], table[pairs[:, 1]])[same]
    assert score.tar == (genuine < score.threshold).mean() and 0 < score.tar < 1


def test_few_pairs_give_no_threshold():
    score, *_ = scored(20, 4, labels=False)
    assert score.threshold is score.far is score.tar is None and score.accuracy > 0.5


def test_of_a_crowd_some_are_taken_from_all_over_it(monkeypatch):
    monkeypatch.setattr(validation, "_CROWD", 50)
    table = np.random.default_rng(1).normal(size=(1000, 8)).astype(np.float32)
    angles = validation.crowd(table, np.arange(1000) // 10)
    assert 1150 < len(angles) <= 50 * 49 // 2
