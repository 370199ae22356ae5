"""From pairs to report, on drawn crops. Run: python -m pytest tests/test_lfw_eval.py"""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import config
import embeddings
import lfw_eval
import manifest
import protocol
import utils
from config import InputError
from conftest import manifest_row, write_manifest
from images import read_image

ROOT = Path(lfw_eval.__file__).resolve().parent
FOLDS, PER_FOLD = 10, 4


@pytest.fixture(scope="module")
def prepared(lfw_like) -> Path:
    return lfw_like


def options(data: Path, /, **changes: object) -> config.EvalOptions:
    base = config.EvalOptions(
        data=data, pairs=data / "pairs.txt", model=(data.parent / "run",), device="cpu", threads=1,
        bootstrap=50,
    )  # fmt: skip
    if isinstance(changes.get("model"), Path):
        changes["model"] = (changes["model"],)
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def report(prepared) -> Path:
    """The report of a first run, in its default place."""
    lfw_eval.main(options(prepared))
    return prepared.parent / "run" / prepared.name


def linked(data: Path, folder: Path) -> Path:
    """A copy of the set whose photos are shared, for a test that changes manifest or pairs."""
    copy = folder / "copy"
    copy.mkdir()
    (copy / "images").symlink_to(data / "images")
    for name in ("manifest.csv", "pairs.txt"):
        (copy / name).write_bytes((data / name).read_bytes())
    return copy


# --- the report -----------------------------------------------------------------------------------


def test_the_report_is_complete(report):
    assert {path.name for path in report.iterdir()} == {
        "embeddings.safetensors", "eval.json", "run.json", "theta_dist.png", "roc.png",
        "report.html", "pairs.csv",
    }  # fmt: skip
    run = json.loads((report / "run.json").read_text())
    assert {"date", "commit", "hardware", "options", "photos_per_second"} <= set(run)
    for picture in report.glob("*.png"):
        with Image.open(picture) as image:
            image.load()
            assert min(image.size) > 400


def test_the_numbers_are_those_of_a_loop_over_the_pairs(prepared, report):
    """Embeds photo by photo, and scores by hand."""
    model = utils.load_backbone(prepared.parent / "run")

    def embedding(source: str) -> np.ndarray:
        pixels = read_image(prepared / "images" / source).astype(np.float32)
        batch = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
        with torch.no_grad():
            return (model(batch) + model(batch.flip(3)))[0].double().numpy()

    angles, same = [], []
    for line in (prepared / "pairs.txt").read_text().splitlines()[1:]:
        cells = line.split("\t")
        same.append(len(cells) == 3)
        people = (cells[0], cells[0 if same[-1] else 2])
        u, v = (
            embedding(f"{person}/{person}_{int(number):04d}.jpg")
            for person, number in zip(people, (cells[1], cells[-1]), strict=True)
        )
        angles.append(np.degrees(np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v))))
    angles, same = np.array(angles), np.array(same)
    folds = protocol.kfold_accuracy(angles, same, np.arange(len(same)) // (2 * PER_FOLD))

    result = json.loads((report / "eval.json").read_text())
    assert result["pairs"]["scored"] == result["pairs"]["listed"] == 2 * FOLDS * PER_FOLD
    assert result["accuracy"]["mean"] == pytest.approx(folds.mean, abs=1e-6)
    assert 0.6 < result["accuracy"]["mean"] < 1  # the pattern is seen, and there is a gallery
    assert result["accuracy"]["threshold_degrees_per_fold"] == pytest.approx(
        folds.threshold, abs=1e-3
    )
    assert result["auc"] == pytest.approx(protocol.auc(angles, same), abs=1e-6)
    assert result["theta_degrees"]["genuine"]["mean"] == pytest.approx(
        angles[same].mean(), abs=1e-3
    )
    assert result["tar_at_far"]["1e-2"] is None  # 40 impostor pairs cannot tell

    with open(report / "pairs.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["same"] == "1" for row in listed] == same.tolist()
    assert [float(row["theta_degrees"]) for row in listed] == pytest.approx(angles, abs=1e-3)
    limits = folds.threshold[np.arange(len(same)) // (2 * PER_FOLD)]
    assert [float(row["threshold_degrees"]) for row in listed] == pytest.approx(limits, abs=1e-3)
    right = [row["judged_right"] == "1" for row in listed]
    assert right == ((angles < limits) == same).tolist()
    assert np.mean(right) == pytest.approx(result["accuracy"]["mean"])
    cells = (prepared / "pairs.txt").read_text().splitlines()[1].split("\t")
    assert [listed[0][side] for side in ("left", "right")] == [
        f"{cells[0]}/{cells[0]}_{int(number):04d}.jpg" for number in cells[1:]
    ]


def test_row_40_a_second_run_is_byte_identical_and_embeds_nothing(
    prepared, report, tmp_path, monkeypatch, capsys
):
    first = {path.name: path.read_bytes() for path in report.iterdir()}
    for dated in ("run.json", "report.html"):  # date, speed
        del first[dated]
    lfw_eval.main(options(prepared, out=tmp_path / "anew"))
    anew = {path.name: path.read_bytes() for path in (tmp_path / "anew").iterdir()}
    assert {name: anew[name] for name in first} == first

    monkeypatch.setattr(utils, "load_backbone", None)  # calling it would fail
    lfw_eval.main(options(prepared))
    assert {name: (report / name).read_bytes() for name in first} == first
    assert json.loads((report / "run.json").read_text())["photos_embedded"] == 0


def test_the_console_says_what_was_scored(prepared, report, capsys):
    lfw_eval.main(options(prepared))
    said = capsys.readouterr().out
    assert "80 of 80 pairs scored (40 genuine, 40 impostor; 10 folds as listed)" in said
    assert "24 of faces, 1 with fixed landmarks (undetected): Person_0/Person_0_0001" in said
    assert str(report) in said and "n/a" in said and "°" in said
    assert json.loads((report / "eval.json").read_text())["data"]["undetected"] == [
        "Person_0/Person_0_0001.jpg"
    ]


def test_only_new_photos_are_embedded_and_a_changed_setting_embeds_all(prepared, report, tmp_path):
    out = tmp_path / "out"
    few = tmp_path / "few.tsv"
    names = [f"Person_{i}/Person_{i}_000{n}" for i in range(2) for n in (1, 2)]
    few.write_text(
        f"{names[0]}\t{names[1]}.jpg\t1\n{names[2]}\t{names[3]}\t1\n"
        f"{names[0]}\t{names[2]}\t0\n{names[1]}\t{names[3]}\t0\n"
    )

    def embedded(**changes: object) -> int:
        lfw_eval.main(options(prepared, out=out, **changes))
        return json.loads((out / "run.json").read_text())["photos_embedded"]

    assert embedded(pairs=few) == 4  # with and without suffix are one photo
    photos = json.loads((report / "eval.json").read_text())["data"]["photos"]
    assert embedded() == photos - 4
    assert (out / "eval.json").read_bytes() == (report / "eval.json").read_bytes()
    assert embedded(pairs=few) == 0
    assert embedded(pairs=few, flip=False) == 4
    (out / embeddings.NAME).write_bytes(b"\0" * 100)
    assert embedded(pairs=few, flip=False) == 4


def test_what_was_embedded_before_a_stop_is_kept(prepared, tmp_path, monkeypatch):
    embed, calls = utils.embed, []

    def stop_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(*arguments)

    monkeypatch.setattr(utils, "embed", stop_at_the_third)
    stopped = options(prepared, out=tmp_path / "out", batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        lfw_eval.main(stopped)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [embeddings.NAME]
    lfw_eval.main(stopped)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    photos = json.loads((tmp_path / "out" / "eval.json").read_text())["data"]["photos"]
    assert run["photos_embedded"] == photos - 6


# --- bad input ------------------------------------------------------------------------------------


def refuse(evaluated: config.EvalOptions) -> str:
    with pytest.raises(InputError) as refusal:
        lfw_eval.main(evaluated)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_row_38_a_pair_that_cannot_be_scored_is_refused_with_its_line(prepared, tmp_path):
    data = linked(prepared, tmp_path)
    out, model = tmp_path / "out", prepared.parent / "run"
    rows = manifest.read_manifest(data)
    lines = (data / "pairs.txt").read_text().splitlines()
    cells = lines[1].split("\t")
    source = f"{cells[0]}/{cells[0]}_{int(cells[1]):04d}.jpg"
    others = [other for other in rows if other.source != source]

    write_manifest(data, others)
    said = refuse(options(data, out=out, model=model))
    assert "pairs.txt:2:" in said and source.removesuffix(".jpg") in said and "is not in" in said

    write_manifest(data, [*others, manifest_row(source, manifest.REJECTED)])
    said = refuse(options(data, out=out, model=model))
    assert "pairs.txt:2:" in said and "no crop" in said and "--keep-undetected" in said

    write_manifest(data, [*rows, manifest_row(source.replace(".jpg", ".png"))])
    said = refuse(options(data, out=out, model=model))
    assert "pairs.txt:2:" in said and ".png" in said and "suffix" in said

    extra = Image.new("RGB", (50, 50))
    for name, write, word in (
        ("small.jpg", lambda path: extra.save(path), "50x50"),
        ("text.jpg", lambda path: path.write_text("no image"), "not an image"),
        ("absent.jpg", lambda path: None, "cannot be read"),
    ):
        write(data / name)
        write_manifest(data, [*others, manifest_row(source, image=name)])
        said = refuse(options(data, out=out, model=model))
        assert name in said and word in said and "pre_process.py" in said

    for outside in (str(tmp_path / "small.jpg"), "images/../../small.jpg"):
        write_manifest(data, [*others, manifest_row(source, image=outside)])
        said = refuse(options(data, out=out, model=model))
        assert "manifest.csv:" in said and f"names a crop outside of {data}" in said
    assert not out.exists() or {p.name for p in out.iterdir()} <= {embeddings.NAME}


def test_row_38_the_same_photo_twice_is_refused_under_two_names_too(prepared, tmp_path):
    a, b = "Person_0/Person_0_0001", "Person_1/Person_1_0001"
    lines = [f"{a}\t{b}\t0", f"{a}\t{a}.jpg\t1"] * 2
    (tmp_path / "p.tsv").write_text("\n".join(lines))
    said = refuse(options(prepared, pairs=tmp_path / "p.tsv", out=tmp_path / "out"))
    assert "p.tsv:2:" in said and "the same photo" in said


def test_bad_folders_and_models_are_refused_before_anything_is_written(prepared, tmp_path):
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.csv").write_text("name,age\nx,3\n")
    for name in ("text.safetensors", "text.onnx", "text.pt"):
        (tmp_path / name).write_text("not a model")
    for changes, words in (
        ({"data": tmp_path / "absent"}, ("absent", "pre_process.py")),
        ({"data": empty}, ("manifest.csv", "pre_process.py")),
        ({"data": other}, ("manifest.csv", "pre_process.py")),
        ({"pairs": tmp_path / "absent.txt"}, ("absent.txt", "--pairs")),
        ({"pairs": tmp_path / "text.pt"}, ("text.pt:1", "label")),
        ({"model": tmp_path / "absent"}, ("absent",)),
        ({"model": empty}, ("empty", checkpoint.BEST)),
        ({"model": tmp_path / "text.safetensors"}, ("text.safetensors",)),
        ({"model": tmp_path / "text.onnx"}, ("text.onnx",)),
        ({"model": tmp_path / "text.pt"}, ("text.pt",)),
        ({"device": "tpu"}, ("tpu",)),
    ):
        said = refuse(options(prepared, **{"out": out, **changes}))
        assert all(word in said for word in words), said
        assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "--out" in refuse(options(prepared, out=tmp_path / "file" / "out"))


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_row_39_a_network_without_usable_embeddings_gets_no_score(
    prepared, tmp_path, monkeypatch, value
):
    class Broken(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.full((len(batch), 8), value)

    monkeypatch.setattr(utils, "load_backbone", lambda *_, **__: Broken())
    assert "no usable embedding" in refuse(options(prepared, out=tmp_path))
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.filterwarnings("error")
def test_row_39_a_network_that_sees_no_difference_is_at_chance(prepared, tmp_path, monkeypatch):
    class Constant(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(batch), 8)

    monkeypatch.setattr(utils, "load_backbone", lambda *_, **__: Constant())
    lfw_eval.main(options(prepared, out=tmp_path))
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["accuracy"]["mean"] == result["auc"] == result["eer"] == 0.5
    assert result["d_prime"] is None and (tmp_path / "theta_dist.png").exists()


def test_weights_of_others_are_evaluated_and_a_wrong_name_is_refused(prepared, report, tmp_path):
    state, _ = checkpoint.load_weights(prepared.parent / "run" / checkpoint.BEST)
    model = tmp_path / "backbone.pth"
    torch.save({f"module.{key}": value for key, value in state.items()}, model)
    named = options(prepared, model=model, network="r18", out=tmp_path / "out")
    lfw_eval.main(named)
    expected, found = (
        json.loads((folder / "eval.json").read_text()) for folder in (report, tmp_path / "out")
    )
    assert {key: found[key] for key in found if key != "model"} == {
        key: expected[key] for key in expected if key != "model"
    }
    # Not from the embeddings that are kept of the right name either.
    assert "holds another network" in refuse(dataclasses.replace(named, network="r34"))
    assert "--network is for a .pth" in refuse(options(prepared, network="r18"))


# --- the command line -----------------------------------------------------------------------------


def test_the_report_goes_beside_the_run_or_to_a_folder_of_the_files_name(tmp_path):
    def place(options: config.EvalOptions, file: Path, tests: str = "lfw") -> Path:
        return lfw_eval.report_folder(options, file.name, file, tests)

    named = config.EvalOptions(out=tmp_path, model=(Path("x.onnx"),))
    assert place(named, Path("x.onnx")) == tmp_path
    two = dataclasses.replace(named, model=(Path("x.onnx"), Path("y.onnx")))
    assert place(two, Path("x.onnx")) == tmp_path / "x.onnx"
    free = config.EvalOptions()
    assert place(free, tmp_path / "r" / checkpoint.BEST) == tmp_path / "r" / "lfw"
    assert place(free, Path("a/net.onnx")) == config.RUNS / "net" / "lfw"
    assert place(free, Path("a/net.onnx"), "agedb_30") == config.RUNS / "net" / "agedb_30"


def test_without_arguments_the_synthetic_faces_are_taken_and_said(tmp_path, monkeypatch, capsys):
    for name in ("DATA", "RUNS", "RAW", "SYNTHETIC"):
        monkeypatch.setattr(config, name, tmp_path / name.lower())
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/result.json").touch()
    assert "pre_process.py" in refuse(config.EvalOptions())  # not prepared yet
    (tmp_path / "synthetic" / "test").mkdir(parents=True)
    capsys.readouterr()
    filled = lfw_eval.with_defaults(config.EvalOptions())
    assert filled.data == tmp_path / "synthetic" / "test"
    assert filled.pairs == filled.data / "pairs.txt" and filled.model == (
        tmp_path / "runs" / "demo",
    )
    assert "synthetic" in capsys.readouterr().out.splitlines()[1]


def test_the_default_model_is_the_own_one_or_the_one_that_ships(tmp_path, monkeypatch):
    for name in ("DATA", "RUNS", "RAW"):
        monkeypatch.setattr(config, name, tmp_path / name.lower())
    runs, lfw = tmp_path / "runs", tmp_path / "lfw"
    lfw.mkdir()

    def model(**named) -> Path:
        return lfw_eval.with_defaults(config.EvalOptions(pairs=tmp_path / "p.tsv", **named)).model

    (tmp_path / "data/lfw").mkdir(parents=True)
    assert model() == model(data=lfw) == (config.WEIGHTS,)
    (runs / "demo").mkdir(parents=True)
    (runs / "demo/result.json").touch()
    assert model(data=lfw) == (config.WEIGHTS,)  # drawn faces say nothing about photos
    (runs / "faces").mkdir()
    (runs / "faces" / checkpoint.BEST).touch()
    assert model(data=lfw) == (config.WEIGHTS,)  # not finished yet
    (runs / "cpu").mkdir()
    (runs / "cpu/result.json").touch()
    assert model(data=lfw) == (runs / "cpu",)
    (runs / "faces/result.json").touch()
    assert model(data=lfw) == (runs / "faces",)
    drawn = config.plain(config.TrainOptions(data=config.SYNTHETIC / "train"))
    for name, left in (("faces", runs / "cpu"), ("cpu", config.WEIGHTS)):
        (runs / name / "config.json").write_text(json.dumps({"options": drawn}))
        assert model(data=lfw) == (left,)  # drawn faces, by whatever name


def test_the_default_set_is_what_the_run_was_trained_for(tmp_path, monkeypatch):
    for name in ("DATA", "RUNS", "RAW", "SYNTHETIC"):
        monkeypatch.setattr(config, name, tmp_path / name.lower())
    monkeypatch.setattr(config, "ROOT", tmp_path)  # paths below it are kept relative to it
    for place in ("data/lfw", "synthetic/test", "runs/first", "runs/drawn"):
        (tmp_path / place).mkdir(parents=True)
    for name, data in (("first", tmp_path / "data/faces"), ("drawn", tmp_path / "synthetic/train")):
        run = config.plain(config.TrainOptions(data=data))
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps({"options": run}))
    for name, data in (("first", "data/lfw"), ("drawn", "synthetic/test"), ("x.onnx", "data/lfw")):
        filled = lfw_eval.with_defaults(config.EvalOptions(model=(tmp_path / "runs" / name,)))
        assert filled.data == tmp_path / data


def command(*words: object) -> subprocess.CompletedProcess:
    """Run the script from another folder, without a display."""
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    return subprocess.run(
        [sys.executable, ROOT / "lfw_eval.py", *map(str, words)],
        capture_output=True, text=True, cwd="/", env=environment, timeout=120,
    )  # fmt: skip


def test_row_40_the_command_works_headless_and_a_bad_input_is_one_line(prepared, report, tmp_path):
    model = prepared.parent / "run" / checkpoint.BEST
    done = command(
        "--data", prepared, "--model", model, "--out", tmp_path, "--threads", 1, "--bootstrap", 50
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "eval.json").read_bytes() == (report / "eval.json").read_bytes()

    bad = command("--data", prepared, "--model", prepared / "pairs.txt", "--out", tmp_path / "no")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "pairs.txt" in bad.stderr
    assert "Traceback" not in bad.stderr and not (tmp_path / "no").exists()

    helped = command("--help")
    assert helped.returncode == 0 and "--no-flip" in helped.stdout
