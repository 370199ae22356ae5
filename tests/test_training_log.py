"""Curves and signals of a run. Run: python -m pytest tests/test_training_log.py"""

import dataclasses
import os
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import config
import train
import training_log
from config import InputError, TrainOptions
from test_train import TINY, scalars, skip_result
from training_log import Curves, Stop


@pytest.fixture
def options(prepared, tmp_path) -> TrainOptions:
    return TrainOptions(data=prepared, runs=tmp_path / "runs", name="r", **{**TINY, "epochs": 1})


def test_row35_a_run_goes_on_without_curves_that_cannot_be_written(options, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "runs/r/events")

    monkeypatch.setattr(training_log, "SummaryWriter", refuse)
    assert train.main(options) == 0
    told = capsys.readouterr()
    assert told.err.count("WARNING") == 1 and "can't be written" in told.err
    assert "is finished" in told.out and (options.runs / "r/best.safetensors").exists()


def test_row35_a_disk_that_fills_up_ends_the_curves_and_not_the_run(tmp_path, capsys):
    curves = Curves(tmp_path, True, 0)
    curves.write("scalar", "a", 1.0, 1)
    curves.flush()

    def full(*_):
        raise OSError(28, "No space left on device")

    curves.writer.add_scalar = full
    curves.write("scalar", "a", 2.0, 2)
    curves.write("scalar", "a", 3.0, 3)
    curves.flush()
    curves.close()
    assert capsys.readouterr().err.count("WARNING") == 1
    assert [event.value for event in scalars(tmp_path, "a")] == [1.0]


def test_row35_no_tensorboard_writes_none(options):
    assert train.main(dataclasses.replace(options, tensorboard=False)) == 0
    assert not list((options.runs / "r").glob("events*"))


def test_row35_a_truncated_event_file_and_a_resume_give_one_value_a_step(options, monkeypatch):
    long = dataclasses.replace(options, epochs=2, log_every=1)
    with monkeypatch.context() as patch:  # as if killed after the last checkpoint
        patch.setattr(train.checkpoint, "write_json", skip_result(train.checkpoint.write_json))
        train.main(long)
    run = options.runs / "r"
    os.replace(run / "previous.pt", run / "last.pt")  # the one of step 10; 20 are in the curves
    (run / "checksums.json").unlink()
    events = next(run.glob("events*"))
    events.write_bytes(events.read_bytes()[:-7])
    assert train.main(dataclasses.replace(long, resume=True)) == 0
    assert [event.step for event in scalars(run, "train/loss")] == list(range(1, 21))
    loaded = EventAccumulator(str(run))
    loaded.Reload()
    assert [event.step for event in loaded.Scalars("validation/accuracy")] == [10, 20]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_row23_the_first_signal_asks_and_the_second_ends(number, code):
    pid = os.fork()
    if pid == 0:  # the child: one signal sets the code, the next one ends it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with Stop() as stop:
            os.kill(os.getpid(), number)
            if stop.code != code:
                os._exit(1)
            os.kill(os.getpid(), number)
        os._exit(2)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Stop():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_grid_of_faces():
    grid = training_log.face_grid(torch.zeros(40, 112, 112, 3, dtype=torch.uint8))
    assert grid.shape == (3, 4 * 114 + 2, 8 * 114 + 2)


def test_an_error_is_told_by_the_first_rank_or_by_the_one_that_met_it(capsys, monkeypatch):
    def everywhere(_):
        raise InputError("no data")

    def here(_):
        raise InputError("a NaN", local=True)

    for rank, main, told in (("0", everywhere, 1), ("1", everywhere, 0), ("1", here, 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stop:
            config.run(main, None)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("error: ") == told


def test_row23_under_torchrun_the_same_signal_comes_twice(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the agent's, at once
        assert stop.code == 143
        stop.asked -= Stop.SAME
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT


def test_any_second_signal_ends_at_once():
    pid = os.fork()
    if pid == 0:
        with Stop():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT
