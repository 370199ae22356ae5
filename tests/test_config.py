"""Options, recipes, a wrong command line. Run: python -m pytest tests/test_config.py"""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import config
import models
from config import (
    EvalOptions,
    ExportOptions,
    PreProcessOptions,
    TrainOptions,
    VerifyOptions,
    parse,
)

KINDS = (PreProcessOptions, TrainOptions, EvalOptions, ExportOptions, VerifyOptions)
SCRIPTS = ["pre_process.py", "train.py", "lfw_eval.py", "export_onnx.py", "verify.py"]


def refused(capsys, kind, *words: str) -> str:
    """The one line on stderr with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        parse(kind, "", list(words))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_the_networks_are_those_of_models():
    assert config.NETWORKS == models.NETWORKS


def test_defaults_and_named_values():
    options = parse(
        TrainOptions, "", ["--data", "x", "--lr", "0.2", "--milestones", "0.5", "0.9", "--resume"]
    )
    assert options == dataclasses.replace(
        TrainOptions(), data=Path("x"), lr=0.2, milestones=(0.5, 0.9), resume=True
    )
    assert parse(TrainOptions, "", ["--no-channels-last"]).channels_last is False
    assert parse(EvalOptions, "", ["--no-flip"]).flip is False


@pytest.mark.parametrize("recipe", config.RECIPES)
def test_a_recipe_sets_what_it_says_and_the_command_line_wins(recipe):
    for key, value in config.RECIPES[recipe].items():
        assert getattr(parse(TrainOptions, "", ["--recipe", recipe]), key) == value
    assert parse(TrainOptions, "", ["--recipe", recipe, "--s", "7"]).s == 7.0
    assert parse(TrainOptions, "", ["--s", "7", "--recipe", recipe]).s == 7.0


def test_without_data_the_demo_recipe_but_for_what_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "RAW", tmp_path / "raw")
    assert parse(TrainOptions, "", []).recipe == "demo"
    epochs = TrainOptions().epochs  # named, though it is the default
    assert parse(TrainOptions, "", ["--epochs", str(epochs)]).epochs == epochs
    assert parse(TrainOptions, "", ["--data", "x"]).recipe is None
    assert parse(TrainOptions, "", ["--recipe", "cpu"]).recipe == "cpu"
    (tmp_path / "raw").mkdir()
    assert parse(TrainOptions, "", []).recipe is None


def test_published_recipes_have_the_batch_and_rate_of_the_paper():
    for recipe in ("casia-r50", "ms1m-r50", "ms1m-r100"):
        options = parse(TrainOptions, "", ["--recipe", recipe])
        assert (options.batch_size, options.lr, options.lr_batch) == (512, 0.1, 512)
        assert (options.s, options.m, options.weight_decay) == (64.0, 0.5, 5e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bogus"], "--bogus is unknown"),
        (["--networ", "r18"], "did you mean --network?"),  # no abbreviations
        (["--network", "r51"], "did you mean r50?"),
        (["--resume", "False"], "--flag or --no-flag"),
        (["--lr", "-1"], "--lr -1.0 must be above 0"),
        (["--lr", "0"], "must be above 0"),
        (["--lr", "nan"], "not a finite number"),
        (["--lr", "fast"], "'fast'"),
        (["--batch-size", "1"], "below 2"),
        (["--epochs", "0"], "below 1"),
        (["--seed", "99999999999"], "above"),
        (["--dropout", "1.5"], "above 0.95"),
        (["--schedule", "cosin"], "did you mean cosine?"),
        (["--recipe", "casia"], "casia-r50"),
        (["--milestones", "0.5", "1.5"], "above 1"),
        (["--data", ""], "an empty path"),
    ],
)
def test_row37_a_wrong_word_is_refused_in_one_line(capsys, words, said):
    assert said in refused(capsys, TrainOptions, *words)


def test_the_right_number_of_thresholds(capsys):
    assert "takes 3 numbers" in refused(capsys, PreProcessOptions, "--thresholds", "0.6", "0.7")


def test_every_option_has_help_and_is_listed(capsys):
    for kind in KINDS:
        with pytest.raises(SystemExit) as stop:
            parse(kind, "what it does", ["--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for field in dataclasses.fields(kind):
            flag = "--" + field.name.replace("_", "-")
            assert ("PHOTO" if "positional" in field.metadata else flag) in text
            assert field.metadata["help"]


def test_the_number_of_options_stays_small():
    assert all(len(dataclasses.fields(kind)) <= 50 for kind in KINDS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_row37_help_and_a_wrong_option_answer_at_once(name):
    for words, code in ((["--help"], 0), (["--bogus"], 2)):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(config.ROOT / name), *words], capture_output=True, text=True
        )
        assert time.perf_counter() - start < 3
        assert done.returncode == code
        assert "Traceback" not in done.stderr


def test_photos_stand_anywhere_among_the_options(capsys):
    a, b = Path("a.jpg"), Path("b.jpg")
    for words in (["a.jpg", "b.jpg", "--json"], ["--json", "a.jpg", "b.jpg"],
                  ["a.jpg", "--json", "b.jpg"]):  # fmt: skip
        assert parse(VerifyOptions, "", words) == VerifyOptions(photos=(a, b), json=True)
    assert parse(VerifyOptions, "", []).photos == ()
    assert "--jsn is unknown" in refused(capsys, VerifyOptions, "a.jpg", "--jsn", "b.jpg")
    assert "--top 0 is below 1" in refused(capsys, VerifyOptions, "a.jpg", "--top", "0")
    assert "stands alone" in refused(capsys, EvalOptions, "a.jpg")


def test_run_turns_a_bad_input_into_one_line(capsys):
    def main(options):
        raise config.InputError("a.zip is\nmissing: fetch it")

    with pytest.raises(SystemExit) as stop:
        config.run(main, None)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a.zip is missing: fetch it\n"


def test_run_names_a_full_disk_but_does_not_hide_a_defect(capsys):
    def full(options):
        raise OSError(28, "No space left on device", "runs/x/last.pt")

    with pytest.raises(SystemExit) as stop:
        config.run(full, None)
    assert stop.value.code == 1
    assert "runs/x/last.pt: No space left on device" in capsys.readouterr().err

    def defect(options):
        raise KeyError("oops")

    with pytest.raises(KeyError):
        config.run(defect, None)


def test_a_run_of_a_recipe_that_is_gone_goes_on(tmp_path, capsys):
    options = {**config.plain(TrainOptions()), "recipe": "small-cpu", "epochs": 10}
    (tmp_path / "r").mkdir()
    (tmp_path / "r/config.json").write_text(json.dumps({"options": options}))
    words = ["--resume", "--runs", str(tmp_path), "--name", "r"]
    assert parse(TrainOptions, "", words).epochs == 10
    said = refused(capsys, TrainOptions, *words, "--recipe", "small-cpu")
    assert "'small-cpu' is unknown" in said


def test_resume_takes_the_options_of_the_run(tmp_path, capsys):
    started = parse(
        TrainOptions,
        "",
        [
            "--data",
            "x",
            "--lr",
            "0.3",
            "--milestones",
            "0.2",
            "--no-channels-last",
            "--epochs",
            "7",
        ],
    )
    (tmp_path / "r").mkdir()
    (tmp_path / "r/config.json").write_text(json.dumps({"options": config.plain(started)}))
    words = ["--resume", "--runs", str(tmp_path), "--name", "r"]
    options = parse(TrainOptions, "", words)
    assert (options.lr, options.milestones, options.channels_last) == (0.3, (0.2,), False)
    assert options.epochs == 7 and options.data == Path("x").resolve()
    assert options.resume and options.runs == tmp_path and options.recipe is None
    assert parse(TrainOptions, "", [*words, "--lr", "0.5"]).lr == 0.5  # train.py refuses it then
    gone = {"options": {**config.plain(started), "augment": "heavy"}}
    (tmp_path / "r/config.json").write_text(json.dumps(gone))
    assert "--augment heavy is unknown (one of: none" in refused(capsys, TrainOptions, *words)
    (tmp_path / "r/config.json").write_text("{")
    assert "config.json is lost or damaged" in refused(capsys, TrainOptions, *words)
    for key, value in (("batch_size", "x"), ("milestones", 5), ("data", 5), ("bogus", 1)):
        changed = {**config.plain(started), key: value}
        (tmp_path / "r/config.json").write_text(json.dumps({"options": changed}))
        assert f"damaged ({key} in it)" in refused(capsys, TrainOptions, *words)


def test_second_names_for_what_torchrun_takes_for_its_own():
    assert parse(TrainOptions, "", ["--scale", "48", "--m2", "0.4"]) == parse(
        TrainOptions, "", ["--s", "48", "--m", "0.4"]
    )
