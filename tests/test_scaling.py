"""The scaling law of results/scaling.csv. Run: python -m pytest tests/test_scaling.py"""

import itertools

import numpy as np
import pytest

import config
from benchmarks import scaling
from benchmarks.experiments import read
from config import InputError

PEOPLE = np.array([375.0, 750, 1500, 3000])
MANY = 1000  # seeds: the spread is known


def test_a_true_power_law_is_found_again():
    law = scaling.fit(PEOPLE, 2.0 * PEOPLE**-0.4, 0.0, MANY)
    assert np.median(law.b) == pytest.approx(0.4, abs=0.01) and not law.c.any()
    low, middle, high = law.error(20_000.0)
    assert low < middle < high and middle == pytest.approx(2.0 * 20_000**-0.4, rel=0.05)
    low, middle, high = np.quantile(law.identities(0.02), scaling.BAND)
    assert low < middle < high and middle == pytest.approx(100**2.5, rel=0.1)


def test_a_floor_is_found_again(monkeypatch):
    monkeypatch.setattr(scaling, "PAIRS", 10**8)  # hardly any chance
    truth = 9.0 * PEOPLE**-0.7 + 0.05
    law = scaling.fit(PEOPLE, truth, 0.0, MANY, scaling.FLOORS)
    assert np.median(law.c) == pytest.approx(0.05, abs=0.003)
    assert np.median(law.b) == pytest.approx(0.7, abs=0.05)
    assert np.isinf(law.identities(0.02)).all() and np.isfinite(law.identities(0.06)).all()


@pytest.mark.parametrize(("scale", "exponent"), [(2.0, 0.4), (0.8, 0.25), (9.0, 0.6)])
@pytest.mark.parametrize("floor", [0.0, 0.03, 0.06])
def test_the_bands_at_many_people_hold_the_truth(scale, exponent, floor):
    """Both together, whether there is a floor or not, though the spread is known of three seeds."""
    rng = np.random.default_rng(0)
    truth = scale * PEOPLE**-exponent + floor
    sigma = np.sqrt(truth * (1 - truth) / scaling.PAIRS + 0.004**2)
    there = scale * scaling.MS_CELEB**-exponent + floor
    inside = 0
    for seed in range(100):
        drawn, spread = rng.normal(truth, sigma), np.std(rng.normal(0, 0.004, 3), ddof=1)
        lows, _, highs = np.transpose(
            [
                scaling.fit(PEOPLE, drawn, spread, 3, floors, seed).error(scaling.MS_CELEB)
                for floors in (scaling.FLOORS[:1], scaling.FLOORS)
            ]
        )
        inside += min(lows) < there < max(highs)
    assert inside >= 90


def test_without_a_floor_in_the_law_a_true_one_is_missed():
    """Why a floor is allowed."""
    rng, inside = np.random.default_rng(0), 0
    truth = 2.0 * PEOPLE**-0.4 + 0.06
    for seed in range(50):
        drawn = rng.normal(truth, 0.004)
        low, _, high = scaling.fit(PEOPLE, drawn, 0.004, MANY, seed=seed).error(scaling.MS_CELEB)
        inside += low < 2.0 * scaling.MS_CELEB**-0.4 + 0.06 < high
    assert inside < 30


def test_more_chance_in_training_makes_it_wider():
    error = 2.0 * PEOPLE**-0.4
    none, known, guessed = (
        np.ptp(np.quantile(scaling.fit(PEOPLE, error, spread, seeds).b, [0.025, 0.975]))
        for spread, seeds in ((0.0, MANY), (0.02, MANY), (0.02, 3))
    )
    assert known > 2 * none and guessed > 1.3 * known


def test_an_error_that_does_not_fall_never_reaches_the_target():
    for floors in (scaling.FLOORS[:1], scaling.FLOORS):
        law = scaling.fit(PEOPLE, np.array([0.2, 0.21, 0.2, 0.205]), 0.0, MANY, floors)
        assert "to never)" in scaling.said("a name", law)


def test_the_runs_saw_as_many_photos_and_other_numbers_of_people():
    rows = read(config.ROOT / "results/scaling.csv")
    seen = [int(row["photos_seen"]) for row in rows]
    assert max(seen) < 1.02 * min(seen)
    people = [int(row["identities"]) for row in rows]
    assert all(more > 1.9 * fewer for fewer, more in itertools.pairwise(sorted(people)))


def test_numbers_of_people_are_given_to_one_digit():
    assert scaling.rounded(53_532_633) == "50,000,000"
    assert scaling.rounded(7.2e8) == "700,000,000"
    assert scaling.rounded(2e12) == "over a thousand million"
    assert scaling.rounded(np.inf) == "never"


def test_the_picture_is_drawn_from_the_rows(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(scaling, "ROOT", tmp_path)
    monkeypatch.setattr(scaling, "OUT", tmp_path / "scaling.png")
    table, again = (tmp_path / "results" / f"{name}.csv" for name in ("scaling", "ablations"))
    lines = [f"{n:.0f},{100 - 200 * n**-0.4:.2f}\n" for n in PEOPLE]
    table.write_text("identities,view2\n" + "".join(lines[:2]))
    with pytest.raises(InputError, match="holds 2 runs"):
        scaling.main(scaling.Options())
    table.write_text("identities,view2\n" + "".join(lines))
    seeds = "change,view2\nthe recipe,86.35\nthe recipe,86.75\n"
    again.write_text(seeds + "augment strong,87.05\n")
    with pytest.raises(InputError, match="holds 2 runs of the recipe"):
        scaling.main(scaling.Options())
    again.write_text(seeds + "the recipe,86.55\n")
    scaling.main(scaling.Options())
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("no floor: exponent 0.40") and "floor allowed: exponent" in told[1]
    assert told[2].startswith("no floor, no smallest set: exponent 0.4")
    assert (tmp_path / "scaling.png").stat().st_size > 20_000
    table.write_text("identities,view2\n" + "".join(lines) + "6000,\n")
    with pytest.raises(InputError, match=r"scaling\.csv: no number in column view2"):
        scaling.main(scaling.Options())
