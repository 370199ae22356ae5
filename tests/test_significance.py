"""Bootstrap and McNemar against slow copies. Run: python -m pytest tests/test_significance.py"""

import time
from fractions import Fraction
from math import comb

import numpy as np
import pytest
import scipy.stats

import protocol
import scores
import significance


def pairs(seed: int, n: int = 240, ties: bool = False):
    """Angles, labels and folds of overlapping kinds, half and half in each fold."""
    rng = np.random.default_rng(seed)
    same, fold = np.arange(n) % 2 == 0, np.arange(n) * 6 // n
    angles = np.where(same, rng.normal(55, 12, n), rng.normal(75, 9, n))
    return (angles.round(-1) if ties else angles), same, fold


# --- bootstrap ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_resample_scores_as_the_protocol_does_on_its_pairs(seed, ties):
    angles, same, fold = pairs(seed, ties=ties)
    order = np.argsort(angles, kind="stable")
    angles, same, fold = angles[order], same[order], fold[order]
    ends = np.flatnonzero(np.append(np.diff(angles) > 0, True))
    accepted = np.concatenate([[0], ends + 1])
    folds = significance._folds(angles, same, fold, accepted)
    for counts in significance.resampled(same, fold, 5, np.random.default_rng(seed)):
        drawn = [np.repeat(values, counts) for values in (angles, same, fold)]
        expected = protocol.kfold_accuracy(*drawn).mean
        got = significance._accuracy(counts, same, angles[ends], accepted, folds)
        assert got == pytest.approx(expected, abs=1e-12)
        far, tar = significance._roc(counts, same, ends)
        assert np.trapezoid(tar, far) == pytest.approx(protocol.auc(*drawn[:2]), abs=1e-12)
        assert protocol.eer_of_curve(far, tar) == pytest.approx(protocol.eer(*drawn[:2]), abs=1e-12)
        for rate in (0.01, 0.1):
            one = protocol.tar_at_far(*drawn[:2], rate)
            assert np.interp(rate, far, tar) == pytest.approx(one, abs=1e-12)


def test_each_resample_has_the_make_up_of_the_protocol(monkeypatch):
    _, same, fold = pairs(0)
    monkeypatch.setattr(significance, "CHUNK", 3 * len(same))  # three at once, and a rest of one
    rows = list(significance.resampled(same, fold, 7, np.random.default_rng(0)))
    assert len(rows) == 7 and len({row.tobytes() for row in rows}) == 7
    for row in rows:
        for k in range(6):
            for kind in (same, ~same):
                assert row[(fold == k) & kind].sum() == ((fold == k) & kind).sum()


def test_the_seed_makes_the_interval():
    data = pairs(1)
    one = significance.bootstrap(*data, resamples=50)
    assert one == significance.bootstrap(*data, resamples=50)
    assert one != significance.bootstrap(*data, resamples=50, seed=1)
    assert significance.bootstrap(*data, resamples=0) == {}


def test_the_interval_of_the_accuracy_is_as_wide_as_a_binomial_one():
    """Thresholds chosen anew and folds of fixed size change it a little, not by a fifth."""
    angles, same, fold = pairs(2, 3000)
    low, high = significance.bootstrap(angles, same, fold, resamples=600)["accuracy"]
    accuracy = protocol.kfold_accuracy(angles, same, fold).mean
    width = 2 * 1.96 * (accuracy * (1 - accuracy) / len(angles)) ** 0.5
    assert low < accuracy < high
    assert high - low == pytest.approx(width, rel=0.2)


def test_tar_has_an_interval_only_where_it_was_measured():
    assert "tar" not in significance.bootstrap(*pairs(0), resamples=5)
    found = significance.bootstrap(*pairs(0, 2000), resamples=20)
    assert set(found) == {"accuracy", "auc", "eer", "tar"}
    assert all(0 <= low <= high <= 1 for low, high in found.values())


def test_all_numbers_of_six_thousand_pairs_take_less_than_a_second_with_the_bootstrap():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 6000, 512)).astype(np.float32)
    same, fold = np.arange(6000) % 600 < 300, np.arange(6000) // 600
    right[same] += 0.15 * left[same]
    start = time.process_time()  # of this process: others may keep the machine busy
    angles = protocol.theta(left, right)
    folds = protocol.kfold_accuracy(angles, same, fold)
    result = scores.measure(angles, same, fold, folds, resamples=1000)
    assert time.process_time() - start < 1
    assert result["confidence_95"]["accuracy"][0] < result["accuracy"]["mean"]


# --- McNemar --------------------------------------------------------------------------------------


def judged(only_a: int, only_b: int, both: int = 5, neither: int = 3):
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    return np.array(a), np.array(b)


@pytest.mark.parametrize(("only_a", "only_b"), [(1, 9), (9, 1), (5, 5), (0, 24), (3, 0), (10, 14)])
def test_few_discordant_pairs_get_the_exact_binomial(only_a, only_b):
    test = significance.mcnemar(*judged(only_a, only_b))
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(Fraction(comb(n, i), 2**n) for i in range(k + 1))
    assert (test.only_a, test.only_b, test.method) == (only_a, only_b, "exact")
    assert test.p == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


@pytest.mark.parametrize(("only_a", "only_b"), [(5, 20), (40, 60), (30, 30), (0, 25)])
def test_many_get_chi_squared_with_its_correction(only_a, only_b):
    test = significance.mcnemar(*judged(only_a, only_b))
    statistic = max(0, abs(only_a - only_b) - 1) ** 2 / (only_a + only_b)
    assert test.method == "chi2"
    # chi-squared with one degree of freedom is a squared normal
    assert test.p == pytest.approx(2 * scipy.stats.norm.sf(statistic**0.5), rel=1e-9)


def test_row_39_models_that_judge_alike_do_not_differ():
    assert significance.mcnemar(*judged(0, 0)).p == 1


def test_holm_by_hand():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([0.2]) == [0.2] and significance.holm([]) == []
