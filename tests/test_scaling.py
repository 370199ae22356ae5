"""The scaling law of results/scaling.csv. Run: python -m pytest tests/test_scaling.py"""

import numpy as np
import pytest

from benchmarks import scaling
from config import InputError

PEOPLE = np.array([375.0, 750, 1500, 3000])


def test_a_true_power_law_is_found_again():
    law = scaling.fit(PEOPLE, 2.0 * PEOPLE**-0.4, spread=0.0)
    assert np.median(law.b) == pytest.approx(0.4, abs=0.01)
    low, middle, high = law.error(20_000.0)
    assert low < middle < high and middle == pytest.approx(2.0 * 20_000**-0.4, rel=0.05)
    low, middle, high = law.identities(0.02)
    assert low < middle < high and middle == pytest.approx(100**2.5, rel=0.1)


def test_the_band_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = 2.0 * PEOPLE**-0.4
    sigma = np.sqrt(truth * (1 - truth) / scaling.PAIRS + 0.005**2)
    inside = 0
    for seed in range(200):
        law = scaling.fit(PEOPLE, rng.normal(truth, sigma), 0.005, seed)
        low, high = np.quantile(law.b, [0.025, 0.975])
        inside += low < 0.4 < high
    assert 180 <= inside <= 198  # 95 % of 200, less or more by chance


def test_more_chance_in_training_makes_it_wider():
    error = 2.0 * PEOPLE**-0.4
    narrow, wide = (np.ptp(np.quantile(scaling.fit(PEOPLE, error, s).b, [0.025, 0.975]))
                    for s in (0.0, 0.02))  # fmt: skip
    assert wide > 2 * narrow


def test_an_error_that_does_not_fall_never_reaches_the_target():
    law = scaling.fit(PEOPLE, np.array([0.2, 0.21, 0.2, 0.205]), 0.0)
    assert np.isinf(law.identities(0.0057)[2]) and "inf" in scaling.said(law)


def test_the_picture_is_drawn_from_the_rows(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(scaling, "ROOT", tmp_path)
    monkeypatch.setattr(scaling, "OUT", tmp_path / "scaling.png")
    lines = [f"{n:.0f},{100 - 200 * n**-0.4:.2f}\n" for n in PEOPLE]
    (tmp_path / "results/scaling.csv").write_text("identities,view2\n" + "".join(lines[:2]))
    with pytest.raises(InputError, match="holds 2 runs"):
        scaling.main(scaling.Options())
    (tmp_path / "results/scaling.csv").write_text("identities,view2\n" + "".join(lines))
    scaling.main(scaling.Options())
    assert "exponent 0.40" in capsys.readouterr().out
    assert (tmp_path / "scaling.png").stat().st_size > 20_000
