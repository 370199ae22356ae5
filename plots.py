"""The pictures of a report: the two kinds of angles, and ROC curves.

    figure = theta_figure(angles, same, thresholds)
    save_png(figure, path, title)
    svg(figure, label)                # for report.html: in the page's own font and colours

One drawing serves both: its colours are those of PAPER, which `svg` replaces by the CSS variables
of the page, so that the picture follows light and dark.
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import FuncFormatter

import protocol
from checkpoint import write_atomic
from scores import FARS, Scores, percent

# CSS variable -> colour in the PNG. Told apart by the colour-blind too (Okabe-Ito, darkened).
PAPER = {
    "ink": "#1b1d21",
    "muted": "#6a6f78",
    "line": "#d9dce1",
    "genuine": "#1f6fb4",
    "impostor": "#d95f02",
    "curve3": "#12855f",
    "curve4": "#b0508f",
    "curve5": "#8a6d00",
    "curve6": "#5b4fc4",
}
CURVES = ("genuine", "impostor", "curve3", "curve4", "curve5", "curve6")
DASHES = ("-", "--", "-.", ":")
SIZE = (4.8, 3.4)  # inches: 346 pt, so that on a phone a point is about a pixel
_LEGEND_ROW = 0.17  # inches; SIZE has room for three


def theta_figure(angles: np.ndarray, same: np.ndarray, thresholds: np.ndarray) -> Figure:
    """Histograms of both kinds of angles, the normals fitted to them, and the threshold."""
    figure, axes = _blank()
    low = np.floor(angles.min())
    high = max(np.ceil(angles.max()), low + 1)  # all angles may be equal
    bins = np.linspace(low, high, max(int(high - low), 30) + 1)  # of one degree, or finer
    grid = np.linspace(low, high, 200)
    for name, kind in (("genuine", same), ("impostor", ~same)):
        mean, sigma = angles[kind].mean(), angles[kind].std()
        label = f"{name}: {mean:.1f}° ± {sigma:.1f}° (n = {kind.sum():,})"
        axes.hist(angles[kind], bins, density=True, color=PAPER[name], alpha=0.35, label=label,
                  histtype="stepfilled")  # fmt: skip
        if sigma > 0:
            normal = np.exp(-0.5 * ((grid - mean) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
            axes.plot(grid, normal, color=PAPER[name], linewidth=1.6)
    cut, least, most = thresholds.mean(), thresholds.min(), thresholds.max()
    label = f"threshold {cut:.1f}° ({least:.1f}° to {most:.1f}°)"
    axes.axvline(cut, color=PAPER["ink"], linestyle="--", linewidth=1.1, label=label)
    axes.set_xlabel("angle between the two embeddings (degrees)")
    axes.set_ylabel("density")
    _legend_above(figure, axes)
    return figure


def roc_figure(models: Iterable[Scores], same: np.ndarray) -> Figure:
    """TAR over FAR on a log axis, from half of one impostor pair to all; one curve a model."""
    models = list(models)
    figure, axes = _blank()
    left = 0.5 / (~same).sum()
    bottom = 1.0
    for number, scores in enumerate(models):
        far, tar = _corners(*protocol.roc(scores.angles, same))
        result = scores.result
        colour = PAPER[CURVES[number % len(CURVES)]]
        label = f"AUC {percent(result['auc'], 3)}, EER {percent(result['eer'])}"
        if len(models) > 1:
            name = f" {scores.name}" if scores.name.startswith("_") else scores.name  # else hidden
            label = f"{name}: {label}"
        axes.plot(np.maximum(far, left), tar, color=colour, label=label, linewidth=1.6,
                  linestyle=DASHES[number // len(CURVES) % len(DASHES)])  # fmt: skip
        if len(models) == 1:
            _mark_rates(axes, result)
        start = tar[far <= 0][-1]  # TAR where no impostor is let in
        bottom = min(bottom, start)
    axes.set_xscale("log")
    axes.set_xlim(left, 1)
    axes.set_ylim(max(0.0, bottom - 0.1 * (1 - bottom) - 0.005), 1.002)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_xlabel("FAR, share of impostor pairs accepted (log)")
    axes.set_ylabel("TAR, share of genuine pairs accepted")
    axes.grid(color=PAPER["line"], linewidth=0.6)
    _legend_above(figure, axes)
    return figure


def _mark_rates(axes: Axes, result: dict) -> None:
    for name, value in result["tar_at_far"].items():
        if value is not None:
            label = f"TAR@FAR={name}: {percent(value)}"
            axes.plot(FARS[name], value, "o", color=PAPER["impostor"], markersize=4, label=label)


def _corners(far: np.ndarray, tar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve without the points on a straight line between their neighbours."""
    turn = np.ones(len(far), dtype=bool)
    turn[1:-1] = np.diff(far[:-1]) * np.diff(tar[1:]) != np.diff(far[1:]) * np.diff(tar[:-1])
    return far[turn], tar[turn]


def _blank() -> tuple[Figure, Axes]:
    # A Figure of its own, without pyplot: nothing global, and Agg draws it without a display.
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    return figure, axes


def dress(axes: Axes) -> None:
    """The look of all our plots: two lines, small figures, no box."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(PAPER["muted"])
    axes.tick_params(which="both", color=PAPER["muted"], labelcolor=PAPER["muted"], labelsize=8)
    axes.xaxis.label.set(color=PAPER["ink"], fontsize=9)
    axes.yaxis.label.set(color=PAPER["ink"], fontsize=9)


def _legend_above(figure: Figure, axes: Axes) -> None:
    """Where no line runs through it: a row an entry, for which the figure grows."""
    drawn = legend(axes, "lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    figure.set_figheight(SIZE[1] + _LEGEND_ROW * (len(drawn.get_texts()) - 3))


def legend(axes: Axes, place: str, **more: object) -> Legend:
    drawn = axes.legend(loc=place, frameon=False, fontsize=8, labelcolor=PAPER["ink"], **more)
    for text in drawn.get_texts():
        text.set_parse_math(False)  # a $ in a model's name is a $
    return drawn


# --- out ------------------------------------------------------------------------------------------


def save_png(figure: Figure, path: Path, title: str) -> None:
    buffer = io.BytesIO()
    heading = figure.suptitle(title, fontsize=10, color=PAPER["ink"])
    heading.set_parse_math(False)
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    heading.remove()
    figure._suptitle = None  # else the layout keeps room for it
    write_atomic(path, buffer.getvalue())


def svg(figure: Figure, label: str) -> str:
    """An <svg> to stand in a page, `label` being what a screen reader says."""
    buffer = io.StringIO()
    # The salt makes the ids inside a function of the drawing, not of chance.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "arcface"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    for name, colour in PAPER.items():
        text = text.replace(colour, f"var(--{name})")
    view = re.search(r'viewBox="[^"]*"', text)[0]
    label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    opening = f'<svg {view} role="img" aria-label="{label}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)  # backslashes stay
