"""The curves of the runs of experiments.py, from results/curves/*.csv -> images/runs.png.

    python benchmarks/curves.py

A panel a group of runs: accuracy on people held out of training, after each epoch, over the photos
seen so far. Runs that differ by their seed alone have one colour.
"""

import sys
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
    groups = {what: [run for run in planned(what) if run.curves.exists()] for what in GROUPS}
    groups = {what: runs for what, runs in groups.items() if runs}
    if not groups:
        raise InputError("results/curves holds no curve of a run: python benchmarks/experiments.py")
    plots.save_png(figure(groups), OUT, "Accuracy on held-out people along each run")
    print(f"wrote {OUT}")


def figure(groups: dict[str, list[Run]]) -> Figure:
    rows = -(-len(groups) // 2)
    drawn = Figure(figsize=(9.6, 3.4 * rows), layout="constrained")
    for place, (what, runs) in enumerate(groups.items()):
        axes = drawn.add_subplot(rows, min(2, len(groups)), place + 1)
        plots.dress(axes)
        first = {run.change: run for run in reversed(runs)}  # the one that the legend shows
        changes = list(dict.fromkeys(run.change for run in runs))
        for run in runs:
            curve, number = read(run.curves), changes.index(run.change)
            axes.plot(
                [int(row["photos_seen"]) for row in curve],
                [float(row["validation"]) for row in curve],
                color=plots.PAPER[plots.CURVES[number % len(plots.CURVES)]],
                linestyle=plots.DASHES[number // len(plots.CURVES) % len(plots.DASHES)],
                linewidth=1.1,
                label=run.change if run is first[run.change] else None,
            )
        axes.set_title(what, loc="left", fontsize=10)
        axes.set_xlabel("photos seen")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.0f} k"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.grid(color=plots.PAPER["line"], linewidth=0.6)
        plots.legend(axes, "lower right")
    return drawn


if __name__ == "__main__":
    config.run(main, config.parse(Options, __doc__))
