"""What more people would give: a power law through results/scaling.csv, and how uncertain it is.

    python benchmarks/experiments.py --what scaling      # the runs: hours
    python benchmarks/scaling.py                         # -> images/scaling.png, and what it says

LFW's error is fitted as a * identities^-b, a straight line in logarithms, each point weighed by
its own uncertainty: chance in 6,000 pairs (binomial; pairs count as independent), and chance in
training (the spread over seeds of "the recipe" in results/ablations.csv). The band comes from fits
to points drawn anew within these. It does not say whether the law goes on beyond the points.

Legend of shapes: K points, D draws.
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
MS_CELEB = 85_164  # identities of the reference system's training set
TARGET = 99.43  # percent, its best figure
OUT = ROOT / "images" / "scaling.png"


@dataclass(frozen=True)
class Fit:
    a: np.ndarray  # (D,) of each draw
    b: np.ndarray

    def error(self, identities: float | np.ndarray) -> np.ndarray:
        """Quantiles 2.5, 50 and 97.5 % of the error at so many identities -> (3,) or (3, G)."""
        grid = np.atleast_1d(np.asarray(identities, float))
        errors = self.a[:, None] * grid ** -self.b[:, None]  # (D, G)
        found = np.quantile(errors, [0.025, 0.5, 0.975], axis=0)
        return found[:, 0] if np.ndim(identities) == 0 else found

    def identities(self, error: float) -> np.ndarray:
        """Quantiles of the number of identities at which the error is reached; inf: never."""
        falling = self.b > 0
        needed = np.full(len(self.b), np.inf)
        with np.errstate(over="ignore"):  # it falls so slowly that no number is large enough
            needed[falling] = (self.a[falling] / error) ** (1 / self.b[falling])
        return np.quantile(needed, [0.025, 0.5, 0.975], method="nearest")


def fit(identities: np.ndarray, error: np.ndarray, spread: float, seed: int = 0) -> Fit:
    """Identities and errors (K,) -> the law. `spread` is one standard deviation by training."""
    sigma = np.sqrt(error * (1 - error) / PAIRS + spread**2)  # (K,)
    drawn = np.random.default_rng(seed).normal(error, sigma, (DRAWS, len(error)))  # (D, K)
    drawn = np.log(drawn.clip(1e-4))
    weight = (error / sigma) ** 2  # of log(error)
    x = np.log(identities)
    middle = np.average(x, weights=weight)
    slope = (weight * (x - middle) * drawn).sum(1) / (weight * (x - middle) ** 2).sum()  # (D,)
    height = np.average(drawn, weights=weight, axis=1)
    return Fit(np.exp(height - slope * middle), -slope)


def figure(identities: np.ndarray, error: np.ndarray, law: Fit) -> Figure:
    drawn = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = drawn.add_subplot()
    plots.dress(axes)
    grid = np.geomspace(identities.min() / 1.3, MS_CELEB * 1.3, 100)
    low, middle, high = 100 * law.error(grid)
    ink = plots.PAPER
    axes.fill_between(grid, low, high, color=ink["genuine"], alpha=0.2, linewidth=0,
                      label="95 % of the fits")  # fmt: skip
    exponent = np.quantile(law.b, [0.025, 0.5, 0.975])
    axes.plot(grid, middle, color=ink["genuine"], linewidth=1.4,
              label=f"identities to the power -{exponent[1]:.2f} "
              f"({exponent[0]:.2f} to {exponent[2]:.2f})")  # fmt: skip
    axes.plot(identities, 100 * error, "o", color=ink["genuine"], label="measured, View 2")
    axes.plot(MS_CELEB, 100 - TARGET, "s", color=ink["impostor"],
              label=f"reference system, {TARGET} %")  # fmt: skip
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
    rows = read(ROOT / "results" / "scaling.csv")
    if len(rows) < 3:
        raise InputError(
            f"results/scaling.csv holds {len(rows)} runs, and a law takes three or more: "
            "python benchmarks/experiments.py --what scaling"
        )
    seeds = [float(row["view2"]) for row in read(ROOT / "results" / "ablations.csv")
             if row["change"] == "the recipe"]  # fmt: skip
    spread = float(np.std(seeds, ddof=1)) / 100 if len(seeds) > 1 else 0.0
    identities = np.array([float(row["identities"]) for row in rows])
    error = 1 - np.array([float(row["view2"]) for row in rows]) / 100
    law = fit(identities, error, spread)
    print(said(law))
    plots.save_png(figure(identities, error, law), OUT, "LFW error over the number of people")
    print(f"wrote {OUT}")


def said(law: Fit) -> str:
    low, middle, high = 100 * (1 - law.error(MS_CELEB)[::-1])
    fewest, about, most = law.identities(1 - TARGET / 100)
    return (
        f"exponent {np.median(law.b):.2f} ({np.quantile(law.b, 0.025):.2f} to "
        f"{np.quantile(law.b, 0.975):.2f}); at {MS_CELEB:,} identities the law gives "
        f"{middle:.2f} % ({low:.2f} to {high:.2f}); {TARGET} % is reached with {about:,.0f} "
        f"identities ({fewest:,.0f} to {most:,.0f})"
    )


if __name__ == "__main__":
    config.run(main, config.parse(Options, __doc__))
