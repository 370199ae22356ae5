"""The curves of the runs of experiments.py, from results/curves/*.csv -> images/runs.png.

    python benchmarks/curves.py

A panel a group of runs, a line a change: accuracy on people held out of training, after each epoch,
over the photos seen so far. All lines are of seed 0, which every change has: another seed holds out
other people, on whom all changes read higher or lower. (The parts of "scaling" hold out different
people, too, 39 each: there a line's course can be read, and not which of two is higher.)
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

import config
import plots
from benchmarks.experiments import GROUPS, Run, planned, read
from config import ROOT, InputError

OUT = ROOT / "images" / "runs.png"


@dataclass(frozen=True)
class Options:
    pass


def main(_: Options) -> None:
    groups = {what: of_seed_0(planned(what)) for what in GROUPS}
    groups = {what: runs for what, runs in groups.items() if runs}
    if not groups:
        raise InputError("results/curves holds no curve of a run: python benchmarks/experiments.py")
    plots.save_png(figure(groups), OUT, "Accuracy on held-out people along each run")
    print(f"wrote {OUT}")


def of_seed_0(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.seed == 0 and run.curves.exists()]


def figure(groups: dict[str, list[Run]]) -> Figure:
    drawn = Figure(figsize=(9.6, 2.6 * len(groups)), layout="constrained")
    for place, (what, runs) in enumerate(groups.items()):
        axes = drawn.add_subplot(len(groups), 1, place + 1)
        plots.dress(axes)
        for number, run in enumerate(runs):
            rows = read(run.curves)
            axes.plot(
                [float(row["photos_seen"]) for row in rows],
                [float(row["validation"]) for row in rows],
                color=plots.PAPER[plots.CURVES[number % len(plots.CURVES)]],
                linestyle=plots.DASHES[number // len(plots.CURVES) % len(plots.DASHES)],
                linewidth=1.1,
                label=run.change,
            )
        axes.set_title(what, loc="left", fontsize=10)
        axes.set_xlabel("photos seen")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.0f} k"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.grid(color=plots.PAPER["line"], linewidth=0.6)
        plots.legend(axes, "center left", bbox_to_anchor=(1.01, 0.5))
    return drawn


if __name__ == "__main__":
    config.run(main, config.parse(Options, __doc__))
