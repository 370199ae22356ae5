"""What more people would give: a power law through results/scaling.csv, and how uncertain it is.

    python benchmarks/experiments.py --what scaling      # the runs: hours
    python benchmarks/scaling.py                         # -> images/scaling.png, and what it says

LFW's error is fitted as a * identities^-b + c, each point weighed by its own uncertainty: chance
in 6,000 pairs (binomial), and chance in training (the spread over seeds of "the recipe" in
results/ablations.csv, itself uncertain for few seeds). It is fitted without a floor (c = 0: the
best that can be hoped for) and with any floor from 0 up; the bands come from fits to points drawn
anew. In simulations of such runs, with and without a floor, both together hold the truth in nine
of ten (tests/test_scaling.py). It is fitted without the smallest set, too, to tell how much hangs
on that one.

What no band holds: that fewer people may mean more chance in training than "the recipe" shows,
which people were drawn, that the same pairs measure all points, and all that is kept as it is: the
network, the photos a person. All points are of the same number of photos seen, so that a law beyond
them supposes a training that grows with the number of people; and the small sets have by then been
seen so often that they are past their best on the people held out, which may make the law steeper
than it is.

Legend of shapes: K points, D draws, G numbers of identities.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

import config
import plots
from benchmarks.experiments import read
from config import ROOT, InputError

PAIRS = 6000
DRAWS = 4000
FLOORS = np.linspace(0.0, 0.95, 39)  # shares of the smallest error that are tried for c
MS_CELEB = 85_164  # identities of the reference system's training set
TARGET = 99.43  # percent, its best figure
BAND = (0.025, 0.5, 0.975)
OUT = ROOT / "images" / "scaling.png"


@dataclass(frozen=True)
class Fit:
    a: np.ndarray  # (D,) of each draw
    b: np.ndarray
    c: np.ndarray

    def error(self, identities: float | np.ndarray) -> np.ndarray:
        """Quantiles 2.5, 50 and 97.5 % of the error at so many identities -> (3,) or (3, G)."""
        grid = np.atleast_1d(np.asarray(identities, float))
        errors = self.a[:, None] * grid ** -self.b[:, None] + self.c[:, None]  # (D, G)
        found = np.quantile(errors, BAND, axis=0)
        return found[:, 0] if np.ndim(identities) == 0 else found

    def identities(self, error: float) -> np.ndarray:
        """The number of identities at which each draw reaches the error; inf: never. (D,)"""
        needed = np.full(len(self.b), np.inf)
        falling = (self.b > 0) & (self.c < error)
        a, b, c = (value[falling] for value in (self.a, self.b, self.c))
        with np.errstate(over="ignore"):  # it falls so slowly that no number is large enough
            needed[falling] = (a / (error - c)) ** (1 / b)
        return needed


def fit(
    identities: np.ndarray,
    error: np.ndarray,
    spread: float,
    seeds: int,
    floors: np.ndarray = FLOORS[:1],
    seed: int = 0,
) -> Fit:
    """Identities and errors (K,) -> the law of each draw; of the floors, the one that fits best.

    `spread` is one standard deviation by training, as found over so many `seeds`.
    """
    rng = np.random.default_rng(seed)
    # What the true spread may be, given that of a few seeds.
    spreads = spread * np.sqrt((seeds - 1) / rng.chisquare(seeds - 1, (DRAWS, 1)))  # (D, 1)
    chance = error * (1 - error) / PAIRS  # (K,) variances
    drawn = error + np.sqrt(chance + spreads**2) * rng.standard_normal((DRAWS, len(error)))
    drawn = drawn.clip(1e-4, 0.5)  # (D, K); coins are right in half of the pairs
    sigma = np.sqrt(chance + spread**2)  # (K,)
    best, least = None, np.full(DRAWS, np.inf)
    for share in floors:
        law = _line(identities, drawn, share * drawn.min(axis=1), sigma)  # (3, D)
        a, b, c = law[:, :, None]  # (D, 1) each
        misfit = (((a * identities**-b + c - drawn) / sigma) ** 2).sum(axis=1)  # (D,)
        best = law if best is None else np.where(misfit < least, law, best)
        least = np.minimum(least, misfit)
    return Fit(*best)


def _line(
    identities: np.ndarray, drawn: np.ndarray, floor: np.ndarray, sigma: np.ndarray
) -> np.ndarray:
    """Errors (D, K) less their floor (D,), as a line in logarithms -> a, b and c, (3, D)."""
    above = drawn - floor[:, None]  # (D, K)
    weight = (above / sigma) ** 2  # of log(above)
    weight /= weight.sum(axis=1, keepdims=True)
    x, y = np.log(identities), np.log(above)
    middle = (weight * x).sum(axis=1, keepdims=True)  # (D, 1)
    slope = (weight * (x - middle) * y).sum(axis=1) / (weight * (x - middle) ** 2).sum(axis=1)
    height = (weight * y).sum(axis=1)  # (D,)
    return np.stack([np.exp(height - slope * middle[:, 0]), -slope, floor])


def figure(identities: np.ndarray, error: np.ndarray, law: Fit, floored: Fit) -> Figure:
    drawn = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = drawn.add_subplot()
    plots.dress(axes)
    grid = np.geomspace(identities.min() / 1.3, MS_CELEB * 1.3, 100)
    ink = plots.PAPER
    low, _, high = 100 * floored.error(grid)
    axes.fill_between(grid, low, high, color=ink["line"], linewidth=0,
                      label="95 % of the fits, a floor allowed")  # fmt: skip
    low, middle, high = 100 * law.error(grid)
    axes.fill_between(grid, low, high, color=ink["genuine"], alpha=0.25, linewidth=0,
                      label="95 % of the fits without a floor")  # fmt: skip
    exponent = np.quantile(law.b, BAND)
    axes.plot(grid, middle, color=ink["genuine"], linewidth=1.4,
              label=f"identities to the power -{exponent[1]:.2f} "
              f"({exponent[0]:.2f} to {exponent[2]:.2f})")  # fmt: skip
    axes.plot(identities, 100 * error, "o", color=ink["genuine"], label="measured, View 2")
    axes.plot(MS_CELEB, 100 - TARGET, "s", color=ink["impostor"],
              label=f"reference system, {TARGET} %: 8 times the photos a person")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("identities trained on (log)")
    axes.set_ylabel("LFW error (log)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 40])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=ink["line"], linewidth=0.6)
    plots.legend(axes, "lower left")
    return drawn


@dataclass(frozen=True)
class Options:
    pass


def main(_: Options) -> None:
    table = ROOT / "results" / "scaling.csv"
    rows = read(table)
    if len(rows) < 3:
        raise InputError(
            f"results/scaling.csv holds {len(rows)} runs, and a law takes three or more: "
            "python benchmarks/experiments.py --what scaling"
        )
    again = ROOT / "results" / "ablations.csv"
    seeds = numbers(again, [row for row in read(again) if row["change"] == "the recipe"], "view2")
    if len(seeds) < 3:
        raise InputError(
            f"results/ablations.csv holds {len(seeds)} runs of the recipe, and chance in training "
            "takes three or more: python benchmarks/experiments.py --what ablations"
        )
    spread = float(np.std(seeds, ddof=1)) / 100
    identities, error = numbers(table, rows, "identities"), 1 - numbers(table, rows, "view2") / 100
    law = fit(identities, error, spread, len(seeds))
    floored = fit(identities, error, spread, len(seeds), FLOORS)
    larger = identities > identities.min()
    without = fit(identities[larger], error[larger], spread, len(seeds))
    laws = {"no floor": law, "a floor allowed": floored, "no floor, no smallest set": without}
    print("\n".join(said(name, one) for name, one in laws.items()))
    drawn = figure(identities, error, law, floored)
    plots.save_png(drawn, OUT, "LFW error over the number of people")
    print(f"wrote {OUT}")


def numbers(path: Path, rows: list[dict[str, str]], column: str) -> np.ndarray:
    """Of one column. Raises InputError: there is something else in it."""
    try:
        return np.array([float(row[column]) for row in rows])
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: no number in column {column}: mend the row") from error


def said(name: str, law: Fit) -> str:
    """What a law gives."""
    low, middle, high = 100 * (1 - law.error(MS_CELEB)[::-1])
    b, c = np.quantile(law.b, BAND), 100 * np.quantile(law.c, BAND)
    needed = law.identities(1 - TARGET / 100)
    fewest, about, most = (rounded(n) for n in np.quantile(needed, BAND, method="nearest"))
    floor = f", floor {c[1]:.1f} % ({c[0]:.1f} to {c[2]:.1f})" if c.any() else ""
    return (
        f"{name}: exponent {b[1]:.2f} ({b[0]:.2f} to {b[2]:.2f}){floor}; {middle:.1f} % "
        f"({low:.1f} to {high:.1f}) at {MS_CELEB:,} identities; {TARGET} %: {about} "
        f"({fewest} to {most}), never in {100 * np.isinf(needed).mean():.0f} % of the fits"
    )


def rounded(identities: float) -> str:
    """To one digit: more is not known."""
    if identities > 1e9:
        return "never" if np.isinf(identities) else "over a thousand million"
    return f"{float(f'{identities:.0e}'):,.0f}"


if __name__ == "__main__":
    config.run(main, config.parse(Options, __doc__))
