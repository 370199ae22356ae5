"""The pictures of a report. Run: python -m pytest tests/test_plots.py"""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import plots
import protocol
import scores


def made(seed: int = 0, n: int = 400, name: str = "net") -> tuple[scores.Scores, np.ndarray]:
    rng = np.random.default_rng(seed)
    same, fold = np.arange(n) % 2 == 0, np.arange(n) * 4 // n
    angles = np.where(same, rng.normal(55, 10, n), rng.normal(80, 8, n))
    folds = protocol.kfold_accuracy(angles, same, fold)
    result = {"model": {"name": name}, **scores.measure(angles, same, fold, folds, 0)}
    cuts = folds.threshold[fold]
    return scores.Scores(name, Path(), angles, cuts, (angles < cuts) == same, result), same


def figures():
    judged, same = made()
    return (
        plots.theta_figure(judged.angles, same, judged.thresholds),
        plots.roc_figure([judged], same),
        plots.roc_figure([judged, made(1, name="a & <b>")[0]], same),
    )


@pytest.mark.parametrize("number", [0, 1, 2])
def test_in_a_page_the_picture_takes_the_pages_colours_and_font(number):
    text = plots.svg(figures()[number], 'about "it" & <that>')
    root = ElementTree.fromstring(text.replace("xlink:href", "href"))
    assert root.attrib["aria-label"] == 'about "it" & <that>' and root.attrib["role"] == "img"
    assert "var(--genuine)" in text and "var(--ink)" in text and "system-ui" in text
    assert "DejaVu" not in text and "http" not in re.sub(r"xmlns[^ ]*", "", text)
    left = {c for c in re.findall(r"#[0-9a-f]{6}", text) if c not in ("#000000", "#ffffff")}
    assert not left  # no colour of its own, which light or dark would not change
    assert len(text) < 120_000


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for figure, again in zip(figures(), figures(), strict=True):
        assert plots.svg(figure, "x") == plots.svg(again, "x")
        plots.save_png(figure, tmp_path / "a.png", "title")
        plots.save_png(again, tmp_path / "b.png", "title")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        with Image.open(tmp_path / "a.png") as image:
            assert min(image.size) > 600


def test_the_curve_keeps_its_corners_and_nothing_else():
    judged, same = made()
    far, tar = protocol.roc(judged.angles, same)
    few = plots._corners(far, tar)
    assert len(few[0]) < len(far) / 2
    points = set(zip(*few, strict=True))
    assert points <= set(zip(far, tar, strict=True))
    assert (few[0][0], few[1][0], few[0][-1], few[1][-1]) == (0, 0, 1, 1)
    assert np.trapezoid(few[1], few[0]) == pytest.approx(np.trapezoid(tar, far), abs=1e-12)


def test_as_many_models_as_one_likes_have_lines_of_their_own():
    models = [made(seed, name=f"net{seed}")[0] for seed in range(8)]
    figure = plots.roc_figure(models, made()[1])
    lines = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()]
    assert len(set(lines)) == len(lines) == 8
