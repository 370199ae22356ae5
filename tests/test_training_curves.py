"""The picture at a run's end. Run: python -m pytest tests/test_training_curves.py"""

import dataclasses
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import config
import train
import training_curves
from config import InputError, TrainOptions
from test_train import TINY, scalars, skip_result


@pytest.fixture
def options(prepared, tmp_path) -> TrainOptions:
    return TrainOptions(data=prepared, runs=tmp_path / "runs", name="r", **{**TINY, "epochs": 1})


def write_events(run, steps: range, purge: int | None = None, shift: float = 0.0) -> None:
    writer = SummaryWriter(str(run), purge_step=purge)
    for step in steps:
        writer.add_scalar("train/loss", 20 - step + shift, step)
        writer.add_scalar("train/accuracy", step / 100, step)
        writer.add_histogram("theta/own", torch.tensor([40.0, 50.0]) + step + shift, step)
    writer.close()


def test_the_curves_are_the_values_of_the_event_files(tmp_path):
    write_events(tmp_path, range(1, 11))
    curves = training_curves.read(tmp_path)
    assert curves.keys() == {"train/loss", "train/accuracy", "theta/own"}
    assert curves["train/loss"].steps.tolist() == list(range(1, 11))
    assert curves["train/loss"].values.tolist() == [20 - step for step in range(1, 11)]
    assert curves["theta/own"].values == pytest.approx([45 + step for step in range(1, 11)])


def test_a_resumed_run_is_one_curve(tmp_path):
    write_events(tmp_path, range(1, 9))
    write_events(tmp_path, range(6, 13), purge=6, shift=0.5)  # killed after 8, resumed from 5
    loss = training_curves.read(tmp_path)["train/loss"]
    assert loss.steps.tolist() == list(range(1, 13))
    assert loss.values.tolist() == [20 - s + (0.5 if s >= 6 else 0) for s in range(1, 13)]


def test_all_of_a_long_run_is_read(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for step in range(1, 12_001):
        writer.add_scalar("train/loss", 1.0, step)
    writer.close()
    assert len(training_curves.read(tmp_path)["train/loss"].steps) == 12_000


def test_what_is_drawn_is_what_was_read(tmp_path):
    write_events(tmp_path, range(1, 11))
    panels = training_curves.figure(training_curves.read(tmp_path)).axes
    lines = {axes.get_title(loc="left"): axes.get_lines() for axes in panels}
    (loss,), (accuracy,) = lines["loss"], lines["accuracy"]
    assert loss.get_xydata().tolist() == [[step, 20 - step] for step in range(1, 11)]
    assert accuracy.get_ydata() == pytest.approx(np.arange(1, 11))  # per cent
    assert lines["learning rate"] == [] or not list(lines["learning rate"])


def test_a_value_that_is_no_number_leaves_a_gap(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for step, value in enumerate((1.0, math.nan, math.inf, 2.0), 1):
        writer.add_scalar("train/loss", value, step)
    writer.close()
    assert training_curves.write(tmp_path).exists()


def test_a_run_ends_with_the_picture_of_itself(options, capsys):
    assert train.main(options) == 0
    run = options.runs / "r"
    curves = training_curves.read(run)
    assert curves.keys() == {tag for _, _, tags in training_curves.PANELS for tag in tags}
    assert curves["train/loss"].values.tolist() == [e.value for e in scalars(run, "train/loss")]
    with Image.open(run / "curves.png") as image:
        assert image.size == (1920, 1280)
    told = capsys.readouterr()
    assert "WARNING" not in told.err
    before = (run / "curves.png").read_bytes()
    training_curves.write(run)
    assert (run / "curves.png").read_bytes() == before


def test_a_resumed_run_shows_all_of_its_steps(options, monkeypatch):
    long = dataclasses.replace(options, epochs=2, log_every=1)
    with monkeypatch.context() as patch:  # as if killed after the last checkpoint
        patch.setattr(train.checkpoint, "write_json", skip_result(train.checkpoint.write_json))
        train.main(long)
    run = options.runs / "r"
    os.replace(run / "previous.pt", run / "last.pt")
    (run / "checksums.json").unlink()
    (run / "curves.png").unlink()
    assert train.main(dataclasses.replace(long, resume=True)) == 0
    assert training_curves.read(run)["train/loss"].steps.tolist() == list(range(1, 21))
    assert (run / "curves.png").exists()


def test_a_picture_that_cannot_be_drawn_does_not_fail_the_run(options, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_curves.plots, "save_png", fail)
    assert train.main(options) == 0
    told = capsys.readouterr()
    assert told.err.count("WARNING") == 1 and "curves.png can't be drawn" in told.err
    assert (options.runs / "r/result.json").exists() and "is finished" in told.out


def test_without_tensorboard_there_is_no_picture_and_no_word(options, capsys):
    assert train.main(dataclasses.replace(options, tensorboard=False)) == 0
    assert not (options.runs / "r/curves.png").exists()
    assert capsys.readouterr().err == ""


def test_a_folder_without_curves_is_named(tmp_path, script):
    for run in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="holds no curves"):
            training_curves.write(run)
    done = script("training_curves.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_damaged_event_files_have_a_message_of_their_own(tmp_path):
    write_events(tmp_path, range(1, 11))
    for file in tmp_path.glob(training_curves.EVENTS):
        file.write_bytes(b"<html>not found</html>" + file.read_bytes())
    with pytest.raises(InputError, match="damaged or of a run that has only begun"):
        training_curves.write(tmp_path)


def test_a_run_that_has_step_0_alone_is_drawn(tmp_path):
    write_events(tmp_path, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, of an axis without length
        assert training_curves.write(tmp_path).exists()


def test_the_axis_begins_at_0_and_holds_the_last_point(tmp_path):
    write_events(tmp_path, range(500, 1001, 100))
    for axes in training_curves.figure(training_curves.read(tmp_path)).axes:
        assert axes.get_xlim() == (0, pytest.approx(1010))


def test_help_tells_the_command_and_training_needs_no_matplotlib(script):
    done = script("training_curves.py", "--help")
    assert done.returncode == 0 and "python training_curves.py runs/first" in done.stdout
    code = "import sys, train; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=config.ROOT).returncode == 0
