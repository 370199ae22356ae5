"""The driver of the long runs, without the runs. Run: python -m pytest tests/test_experiments.py"""

import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import checkpoint
import config
import data_gen
import train
from benchmarks import experiments, peers, trials
from benchmarks.experiments import Options, Run
from config import InputError


@pytest.fixture
def options(prepared, tmp_path, monkeypatch):
    """The tiny set in the place of both; nothing is trained, and what would be run is recorded."""
    lfw = tmp_path / "lfw"
    lfw.mkdir()
    for name in ("manifest.csv", experiments.VIEW_1, experiments.VIEW_2):
        (lfw / name).touch()
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    return Options(what="final", data=prepared, lfw=lfw)


def test_each_run_has_a_name_and_a_place_of_its_own():
    runs = list(experiments.planned("all"))
    assert (
        len({run.name for run in runs})
        == len(runs)
        == len({(run.group, run.change, run.seed) for run in runs})
    )
    assert {run.group for run in runs} == set(experiments.GROUPS)
    assert [run for what in experiments.GROUPS for run in experiments.planned(what)] == runs


def test_their_commands_are_understood(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "RECIPES", experiments.KNOWN)
    for run in experiments.planned("all"):
        script, *words = run.words
        assert (config.ROOT / script).exists()
        options = config.parse(config.TrainOptions, "", words)
        if script == "benchmarks/peers.py":
            peers.check(dataclasses.replace(options, runs=tmp_path))
        else:
            train.check_options(dataclasses.replace(options, name=run.name), ranks=1)
            ours = options.recipe == "cpu" and script == "train.py"
            assert ours or (options.recipe in trials.TRIALS and script == "benchmarks/trials.py")
        shaped = dict(word.split("=") for word in experiments.settings(run).split())
        assert shaped.get("s", "32.0") == f"{options.s}" and "seed" not in shaped


def test_what_has_a_row_is_not_run_again(options, monkeypatch, capsys):
    run = Run("final", "the recipe", 0, experiments.OURS)
    row = dict.fromkeys(experiments.HEAD, "") | {"change": run.change, "seed": "0"}
    row["options"] = experiments.settings(run)
    assert "resolution=64" in row["options"].split()
    table = experiments.RESULTS / "final.csv"
    experiments.append(table, experiments.HEAD, [row])
    performed = []
    monkeypatch.setattr(experiments, "perform", lambda run, _: performed.append(run.name))
    experiments.main(options)
    assert run.name not in performed and "final-the-recipe-1" in performed
    out = capsys.readouterr().out
    assert f"done   {run.name}" in out and "to do  final-the-recipe-1" in out
    row["options"] = row["options"].replace("epochs=60", "epochs=50")
    experiments.write(table, experiments.HEAD, [row])
    with pytest.raises(InputError, match=r"of other options \(epochs=50 epochs=60\)"):
        experiments.main(options)


def test_a_run_writes_its_row_last(options, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    run = Run("final", "the recipe", 1, ("train.py", "--epochs", "1"))
    folder = tmp_path / "experiments" / run.name
    called = []

    def call(words):
        called.append(words)
        folder.mkdir(parents=True, exist_ok=True)
        if words[0] == "train.py":
            checkpoint.write_json(folder / "result.json", {"steps": 10, "validation": 0.875})
            told = {"identities": 3, "photos": 9, "options": {"batch_size": 64}}
            told |= {"hardware": "a card", "torch": "3.0", "commit": "abc"}
            checkpoint.write_json(folder / "config.json", told)
        else:
            assert not (tmp_path / f"{folder.name.split('-')[0]}.csv").exists()
            out = folder / ("pairsDevTest" if "pairsDevTest.txt" in words[4] else "pairs")
            out.mkdir(exist_ok=True)
            figure = {"accuracy": {"mean": 0.9 if out.name == "pairs" else 0.91, "std": 0.01}}
            (out / "eval.json").write_text(json.dumps(figure))
            judged = [{"fold": str(n // 2), "judged_right": str(n % 3 % 2)} for n in range(6)]
            experiments.write(out / "pairs.csv", ("fold", "judged_right"), judged)

    monkeypatch.setattr(experiments, "call", call)
    monkeypatch.setattr(experiments, "write_curves", lambda *_: None)
    experiments.perform(run, options)
    assert [words[0] for words in called] == ["train.py", "lfw_eval.py", "lfw_eval.py"]
    assert "--resume" not in called[0] and called[0][-1] == run.name
    (row,) = experiments.read(tmp_path / "final.csv")
    assert row["view1"] == "91.00" and row["view2"] == "90.00" and row["view2_std"] == "1.00"
    assert row["photos_seen"] == "640" and row["validation"] == "87.50" and row["seed"] == "1"
    assert (row["hardware"], row["commit"]) == ("a card, torch 3.0", "abc")
    assert row["command"].startswith("python train.py --epochs 1 --data ")
    assert "epochs=1" in row["options"].split() and not (tmp_path / "right").exists()
    run = dataclasses.replace(run, group="peers")
    folder = tmp_path / "experiments" / run.name
    experiments.perform(run, options)
    assert run.right.read_text() == "01\n00\n10\n"  # a line a fold
    np.testing.assert_array_equal(experiments.read_right(run), [0, 1, 0, 0, 1, 0])


def test_a_stopped_run_goes_on_and_one_of_other_options_is_refused(tmp_path, options, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    run = Run("final", "the recipe", 1, ("train.py", "--epochs", "3"))
    folder = tmp_path / "experiments" / run.name
    folder.mkdir(parents=True)
    (folder / "last.pt").touch()
    monkeypatch.chdir(tmp_path)  # a command's paths are meant from the repo
    words = ["--epochs", "3", "--data", str(options.data), "--seed", "1"]
    begun = config.plain(config.parse(config.TrainOptions, "", words))
    (folder / "config.json").write_text(json.dumps({"options": begun}))
    called = []

    def call(words):
        called.append(words)
        raise SystemExit(143)

    monkeypatch.setattr(experiments, "call", call)
    with pytest.raises(SystemExit):
        experiments.perform(run, options)
    assert called[0][-1] == "--resume"
    (folder / "config.json").write_text(json.dumps({"options": {**begun, "epochs": 4, "lr": 0.2}}))
    with pytest.raises(InputError, match="was begun with another epochs, lr"):
        experiments.perform(run, options)
    assert len(called) == 1


def test_a_trial_begins_anew(tmp_path, options, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    run = next(
        run for run in experiments.planned("ablations") if run.words[0] == "benchmarks/trials.py"
    )
    folder = tmp_path / "experiments" / run.name
    folder.mkdir(parents=True)
    (folder / "last.pt").touch()
    called = []

    def call(words):
        called.append(words)
        assert not folder.exists()
        raise SystemExit(143)

    monkeypatch.setattr(experiments, "call", call)
    with pytest.raises(SystemExit):
        experiments.perform(run, options)
    assert called[0][:3] == ["benchmarks/trials.py", "--recipe", "smoothed"]
    assert "--resume" not in called[0]


def test_a_trial_that_has_been_trained_is_only_scored(tmp_path, options, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    run = Run("ablations", "smoothed", 0, (*experiments.TRIED, "smoothed"))
    folder = tmp_path / "experiments" / run.name
    folder.mkdir(parents=True)
    for name in ("last.pt", "result.json"):
        (folder / name).touch()
    begun = {**config.plain(experiments.parsed(run.words[1:])), "data": str(options.data)}
    (folder / "config.json").write_text(json.dumps({"options": begun}))
    called = []

    def call(words):
        called.append(words[0])
        raise SystemExit(143)

    monkeypatch.setattr(experiments, "call", call)
    with pytest.raises(SystemExit):
        experiments.perform(run, options)
    assert called == ["lfw_eval.py"] and (folder / "result.json").exists()
    (folder / "config.json").write_text(json.dumps({"options": {**begun, "lr": 0.2}}))
    with pytest.raises(InputError, match="was begun with another lr"):
        experiments.perform(run, options)


def test_the_drawn_faces_come_first_where_a_run_starts_from_them(tmp_path, options, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    monkeypatch.setattr(config, "DRAWN", options.data)
    run = next(run for run in experiments.planned("final") if run.change == "from drawn faces")
    assert "init=runs/experiments/drawn" in experiments.settings(run).split()
    folder = tmp_path / "experiments" / "drawn"
    folder.mkdir(parents=True)
    called = []

    def call(words):
        called.append(words)
        if words[words.index("--name") + 1] != "drawn":
            raise SystemExit(143)
        (folder / "result.json").touch()

    monkeypatch.setattr(experiments, "call", call)
    for begun in (False, True, False):
        if begun:
            (folder / "result.json").unlink()
            (folder / checkpoint.LAST).touch()
        with pytest.raises(SystemExit):
            experiments.perform(run, options)
    firsts, runs = called[0:3:2], called[1::2] + called[4:]
    assert [words[:5] for words in firsts] == 2 * [
        ["train.py", "--data", str(options.data), "--recipe", "drawn"]
    ]
    assert "--resume" not in firsts[0] and firsts[1][-1] == "--resume"
    assert len(called) == 5 and all("runs/experiments/drawn" in words for words in runs)
    monkeypatch.setattr(config, "DRAWN", tmp_path / "missing")
    with pytest.raises(
        InputError, match=r"missing is not there: python pre_process\.py --draw 4500"
    ):
        experiments.perform(run, options)


def test_the_options_tell_all_changes_of_a_group_apart():
    """By them alone a row is known to be of this run, and not of an older recipe."""
    for group in experiments.GROUPS:
        runs = [run for run in experiments.planned(group) if run.seed == 0]
        told = {(experiments.settings(run), run.part) for run in runs}
        assert len(told) == len({run.change for run in runs})


def test_a_script_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("raise SystemExit(2)")
    with pytest.raises(InputError, match=r"train\.py ended with 2, see above"):
        experiments.call(["train.py"])


def test_a_signal_reaches_the_script_and_is_waited_for(tmp_path):
    """SIGTERM to the driver alone: the training saves, and ends before the driver does."""
    (tmp_path / "train.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(0.5)\n"
        "    pathlib.Path('saved').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    driver = (
        "from pathlib import Path\n"
        "from benchmarks import experiments\n"
        f"experiments.ROOT = Path({str(tmp_path)!r})\n"
        "experiments.call(['train.py'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver], cwd=config.ROOT, stdout=subprocess.PIPE, text=True
    )
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "saved").exists()


def test_a_scoring_that_is_stopped_ends_as_a_signal_does(tmp_path, monkeypatch):
    """lfw_eval.py has nothing to save: it dies of it."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    (tmp_path / "lfw_eval.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    with pytest.raises(SystemExit) as stopped:
        experiments.call(["lfw_eval.py"])
    assert stopped.value.code == 143


def test_a_stop_is_heeded_though_the_script_ended_well(tmp_path, monkeypatch):
    """It came in the last step, say: no other run is begun after it."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(0.5)\n"
    )
    with pytest.raises(SystemExit) as stopped:
        experiments.call(["train.py"])
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ours_is_compared_with_each_of_the_others(options, tmp_path, monkeypatch):
    runs = list(experiments.planned("peers"))
    with pytest.raises(InputError, match=r"peers-ours-0\.txt is not there: take the run's row out"):
        experiments.compare(runs)
    (tmp_path / "right").mkdir()
    for number, run in enumerate(runs):  # the first is right about all 40, each next about 4 less
        run.right.write_text("1" * (40 - 4 * number) + "\n" + "0" * 4 * number + "\n")
    performed = []
    monkeypatch.setattr(experiments, "perform", lambda run, _: performed.append(run))
    experiments.main(dataclasses.replace(options, what="peers", list=True))
    assert not performed and not (tmp_path / "mcnemar.csv").exists()
    experiments.main(dataclasses.replace(options, what="peers"))
    assert performed == runs
    rows = experiments.read(tmp_path / "mcnemar.csv")
    pairs = [(row["model A"], row["model B"]) for row in rows]
    others = [run.change for run in runs]
    assert pairs == [*((others[0], other) for other in others[1:]),
                     *((others[1], other) for other in others[2:])]  # fmt: skip
    assert [int(row["only A right"]) for row in rows] == [4, 8, 12, 16, 20, 4, 8, 12, 16]
    assert {row["only B right"] for row in rows} == {"0"}
    # Exact, two-sided: 2 / 2^20 for the pair of twenty, times nine tests, not the fifteen.
    assert float(rows[4]["p (Holm)"]) == pytest.approx(9 * 2 / 2**20, rel=1e-2)


def test_the_peers_figures_follow_from_the_pairs(tmp_path, monkeypatch):
    """What results/ keeps of each pair gives View 2's column of peers.csv, and mcnemar.csv."""
    results = experiments.RESULTS
    shown = {row["change"]: row for row in experiments.read(results / "peers.csv")}
    runs = [run for run in experiments.planned("peers") if run.change in shown]
    assert len(runs) == len(shown) > 0
    for run in runs:
        folds = 100 * experiments.read_right(run).reshape(10, 600).mean(axis=1)
        figures = (f"{folds.mean():.2f}", f"{folds.std(ddof=1):.2f}")
        assert figures == (shown[run.change]["view2"], shown[run.change]["view2_std"])
    if (results / "mcnemar.csv").exists():
        shutil.copytree(results / "right", tmp_path / "right")
        monkeypatch.setattr(experiments, "RESULTS", tmp_path)
        experiments.compare(list(experiments.planned("peers")))
        assert (tmp_path / "mcnemar.csv").read_bytes() == (results / "mcnemar.csv").read_bytes()


def test_the_minutes_of_a_stopped_run_count(tmp_path):
    assert experiments.minutes(tmp_path) == 0
    began = time.time() - 600
    (tmp_path / f"events.out.tfevents.{began:.0f}.host.1.0").write_bytes(b"x")
    assert experiments.minutes(tmp_path) == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("part", [2, 4])
def test_a_part_of_the_identities(prepared, tmp_path, part):
    data = tmp_path / "faces"
    shutil.copytree(prepared, data)
    whole = data_gen.load_faces(data)
    faces = data_gen.load_faces(experiments.part_of(data, part))
    assert len(faces.identities) == len(whole.identities) // part
    assert set(faces.identities) < set(whole.identities)
    place = whole.images.index(faces.images[0])
    np.testing.assert_array_equal(faces.read(0), whole.read(place))
    (data.with_name(f"faces-1of{part}") / "images").unlink()
    (data.with_name(f"faces-1of{part}") / "images").symlink_to(tmp_path / "moved")
    again = data_gen.load_faces(experiments.part_of(data, part))
    assert again.identities == faces.identities
    assert experiments.part_of(data, 1) == data


def test_sets_that_are_not_prepared_are_told(options, tmp_path):
    (options.lfw / experiments.VIEW_1).unlink()
    with pytest.raises(InputError, match=r"pairsDevTest\.txt is not there"):
        experiments.main(options)
    (options.lfw / "manifest.csv").unlink()
    with pytest.raises(InputError, match="prepare the set first"):
        experiments.main(options)


def test_rows_are_plain_csv(tmp_path):
    head = ("a", "b")
    experiments.append(tmp_path / "x.csv", head, [{"a": "1, 2", "b": "x"}])
    experiments.append(tmp_path / "x.csv", head, [{"a": "3", "b": "y"}])
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1, 2", "x"], ["3", "y"]]
