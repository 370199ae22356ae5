"""The whole pipeline as a person runs it. Run: python -m pytest -m slow tests/test_end_to_end.py"""

import csv
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import config
import data_gen
import protocol
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def clone(tmp_path):
    """A copy of the checkout, so that its own demo stays; the environment is shared."""
    left = shutil.ignore_patterns(".git", ".venv", "synthetic", "raw", "faces", "lfw", "runs")
    copy = shutil.copytree(ROOT, tmp_path / "clone", ignore=left)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    return copy


def make_demo(folder: Path) -> tuple[str, float]:
    start = time.monotonic()
    done = subprocess.run(
        ["make", "demo"], cwd=folder, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "warning" not in (done.stdout + done.stderr).lower()
    return done.stdout, time.monotonic() - start


@pytest.mark.timeout(1800)
def test_make_demo_learns_identity_and_a_second_run_has_nothing_to_do(clone):
    said, seconds = make_demo(clone)
    accuracy = float(re.search(r"accuracy +([\d.]+) %", said)[1]) / 100
    assert accuracy >= 0.88
    assert "runs/demo/test" in said
    assert seconds < 480  # six minutes on a quiet machine, and this one may not be

    # No trivial cue: the raw aligned pixels of the same pairs stay ten points below.
    folder = clone / "data/synthetic/test"
    pairs = protocol.read_pairs(folder / "pairs.txt")
    photos, left, right = data_gen.find_photos(pairs, folder)
    crops = np.stack([data_gen.read_crop(photo.crop).ravel() for photo in photos]) / 127.5 - 1
    angles = protocol.theta(crops[left], crops[right])
    pixels = protocol.kfold_accuracy(angles, pairs.same, pairs.fold).mean
    assert pixels <= accuracy - 0.10

    before = {path: path.stat().st_mtime_ns for path in (clone / "runs/demo").glob("*.pt")}
    again, seconds = make_demo(clone)
    assert seconds < 60
    assert "nothing was left to do" in again and "is finished" in again
    assert before == {path: path.stat().st_mtime_ns for path in (clone / "runs/demo").glob("*.pt")}
    assert f"{100 * accuracy:.2f} %" in again


@pytest.fixture(scope="module")
def lfw(shared, script, tmp_path_factory):
    """The whole of it, prepared."""
    out = tmp_path_factory.mktemp("lfw") / "lfw"
    archive = shared / "data/lfw-deepfunneled.tgz"
    done = script("pre_process.py", "--src", archive, "--out", out, "--keep-undetected",
                  timeout=1500)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"aligned +8,1\d\d ", done.stdout)
    return out


@pytest.fixture
def evaluate(shared, script, lfw, tmp_path):
    """On View 2, with these further words -> eval.json."""

    def run(*words: object) -> dict:
        done = script("lfw_eval.py", "--data", lfw, "--pairs", shared / "data/pairs.txt",
                      "--out", tmp_path, *words, timeout=1500)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "6000 of 6000 pairs scored" in done.stdout
        return json.loads((tmp_path / "eval.json").read_text())

    return run


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("flip", "floor"), [("--no-flip", 0.9900), ("--flip", 0.9915)])
def test_alignment_and_protocol_on_the_whole_of_lfw(shared, evaluate, flip, floor):
    """The reference network loses percents on a wrong crop or protocol; floors from its README."""
    model = shared / "reference/face_embedder.onnx"
    result = evaluate("--model", model, "--input-mean", 127, "--input-std", 128, flip)
    assert result["accuracy"]["mean"] >= floor
    assert len(result["data"]["undetected"]) <= 3


@pytest.mark.timeout(2400)
def test_the_weights_that_ship_have_the_figure_in_readme(evaluate):
    result = evaluate("--model", config.WEIGHTS)
    with open(ROOT / "results/lfw.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if "--recipe cpu" in row["backbone"])
    assert abs(100 * result["accuracy"]["mean"] - float(row["accuracy"])) <= 0.1
