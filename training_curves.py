"""The curves of a run as one picture, read back from TensorBoard's event files.

    python training_curves.py runs/first    # -> runs/first/curves.png

train.py does it by itself at a run's end; this is for one under way. The files of a run that was
stopped and resumed are read together, one value a step.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import config
import plots
from config import InputError

NAME, EVENTS = "curves.png", "events.out.tfevents.*"
SIZE = (9.6, 6.4)  # inches
_FEW = 40  # points that are drawn as points, too


class Curve(NamedTuple):
    steps: np.ndarray  # int64 (K,)
    values: np.ndarray  # float64 (K,)


# Of each panel: its title, its unit, and tag -> (label, colour of plots.PAPER).
PANELS = (
    ("loss", "", {"train/loss": ("", "genuine")}),
    ("accuracy", "%", {
        "train/accuracy": ("training photos, plain cosines", "genuine"),
        "validation/accuracy": ("validation pairs", "impostor"),
    }),
    ("theta, mean of the training photos", "°", {
        "theta/own": ("to their own centre", "genuine"),
        "theta/nearest_other": ("to the nearest other one", "impostor"),
    }),
    ("learning rate", "", {"train/learning_rate": ("", "genuine")}),
)  # fmt: skip


def draw_at_end(run: Path) -> None:
    """For train.py: whatever goes wrong with a picture, the run that it shows is not lost by it."""
    try:
        if any(run.glob(EVENTS)):
            write(run)
    except Exception as error:
        print(
            f"WARNING: {run / NAME} can't be drawn ({type(error).__name__}: {error}); the run "
            "itself is whole",
            file=sys.stderr,
        )


def write(run: Path) -> Path:
    """Draw what the run's event files hold -> the picture's path.

    Raises InputError: they hold no curve.
    """
    if not any(run.glob(EVENTS)):
        raise InputError(f"{run} holds no curves of TensorBoard: nothing to draw")
    curves = read(run)
    if not curves:
        raise InputError(
            f"{run}: nothing can be read from {EVENTS}, which are damaged or of a run that has "
            "only begun: restore them, or wait for the run's first line"
        )
    plots.save_png(figure(curves), run / NAME, run.resolve().name)
    return run / NAME


def read(run: Path) -> dict[str, Curve]:
    """Tag -> its curve, of the scalars and of the histograms' means; none where nothing is."""
    every = {"scalars": 0, "histograms": 0, "images": 1, "tensors": 1, "compressedHistograms": 1}
    events = EventAccumulator(str(run), size_guidance=every)
    events.Reload()
    wanted = {tag for _, _, tags in PANELS for tag in tags}
    curves = {}
    for tag in wanted.intersection(events.Tags()["scalars"]):
        found = events.Scalars(tag)
        curves[tag] = _curve([event.step for event in found], [event.value for event in found])
    for tag in wanted.intersection(events.Tags()["histograms"]):
        found = [event for event in events.Histograms(tag) if event.histogram_value.num]
        means = [event.histogram_value.sum / event.histogram_value.num for event in found]
        curves[tag] = _curve([event.step for event in found], means)
    return {tag: curve for tag, curve in curves.items() if len(curve.steps)}


def _curve(steps: list[int], values: list[float]) -> Curve:
    """In the order of the steps; where a step was written twice, the last value counts."""
    unique = dict(zip(steps, values, strict=True))
    order = sorted(unique)
    return Curve(np.array(order), np.array([unique[step] for step in order], np.float64))


def figure(curves: dict[str, Curve]) -> Figure:
    """Four panels over the steps."""
    drawn = Figure(figsize=SIZE, layout="constrained")
    last = max(int(curve.steps[-1]) for curve in curves.values())
    for axes, (title, unit, tags) in zip(drawn.subplots(2, 2).flat, PANELS, strict=True):
        plots.dress(axes)
        axes.set_title(title, fontsize=9, color=plots.PAPER["ink"], loc="left")
        axes.grid(color=plots.PAPER["line"], linewidth=0.6)
        axes.set_xlim(0, 1.01 * max(last, 1))  # the last point is whole; step 0 alone has room
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        factor = 100 if unit == "%" else 1
        for tag, (label, colour) in tags.items():
            if tag in curves:
                steps, values = curves[tag]
                axes.plot(steps, factor * values, color=plots.PAPER[colour], label=label,
                          linewidth=1.4, marker="o" if len(steps) <= _FEW else None,
                          markersize=3)  # fmt: skip
        if unit:
            suffix = " %" if unit == "%" else unit
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _, s=suffix: f"{v:g}{s}"))
        if title in ("loss", "learning rate", "accuracy"):
            axes.set_ylim(bottom=0)
        if len(tags) > 1 and axes.lines:
            plots.legend(axes, "best")
    for axes in drawn.axes[2:]:
        axes.set_xlabel("step")
        axes.xaxis.label.set(color=plots.PAPER["ink"], fontsize=9)
    return drawn


def main(run: Path) -> None:
    print(f"wrote {write(run)}")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(print(__doc__))
    if len(sys.argv) != 2:
        sys.exit(config.complain("name one run folder: python training_curves.py runs/first", 2))
    config.run(main, Path(sys.argv[1]))
