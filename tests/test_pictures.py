"""README's pictures. Run: python -m pytest tests/test_pictures.py"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import checkpoint
import config
import download
import models
import pictures
from conftest import make_prepared
from synthetic_faces import draw_face

ALL = ["curves.png", "faces.png", "pair.jpg", "theta_lfw.png", "theta_recipe.png"]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A fresh one: old pictures, no data, no runs."""
    monkeypatch.setattr(config, "SYNTHETIC", tmp_path / "synthetic")
    monkeypatch.setattr(config, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(pictures, "IMAGES", tmp_path / "images")
    (tmp_path / "images").mkdir()
    for name in ALL:
        (tmp_path / "images" / name).write_text("old")
    return tmp_path


def contents(clone) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (clone / "images").iterdir()}


def demo(clone) -> None:
    """What `make demo` leaves, as far as the pictures need it."""
    train = make_prepared(clone / "synthetic/train", 3, 1)
    for crop in train.glob("images/*/*.jpg"):
        (train / "raw" / crop.parent.name).mkdir(parents=True)
        shutil.copyfile(crop, train / "raw" / crop.parent.name / crop.name)
    for number, name in enumerate(pictures.PAIR):
        photo = clone / "synthetic/test/raw" / name
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_face(0, 3, number)[0]).save(photo)
    run = clone / "runs/demo"
    run.mkdir(parents=True)
    kind = {"network": "r18", "width": 0.125, "embedding_size": 32}
    torch.manual_seed(0)
    about = {key: str(value) for key, value in kind.items()}
    checkpoint.save_weights(run / checkpoint.BEST, models.create(**kind).state_dict(), about)
    writer = SummaryWriter(str(run))
    writer.add_scalar("train/loss", 1.0, 5)
    writer.close()
    (run / "result.json").write_text("{}")


def test_on_a_fresh_clone_each_picture_stays_and_what_to_do_is_said(clone, capsys):
    before = contents(clone)
    pictures.main(None)
    said = capsys.readouterr().out.splitlines()
    assert contents(clone) == before and len(said) == 5
    assert sum("run make demo first" in line for line in said) == 3
    assert sum(line.startswith("theta_") and "lfw_eval.py" in line for line in said) == 2


@pytest.mark.parametrize(
    ("name", "model"), [("theta_lfw.png", "face_embedder"), ("theta_recipe.png", "recipe-cpu")]
)
def test_after_the_demo_they_are_made(clone, capsys, monkeypatch, name, model):
    demo(clone)
    monkeypatch.setattr(config, "WEIGHTS", clone / "recipe-cpu.safetensors")
    config.WEIGHTS.write_text("weights")
    pictures.main(None)
    for drawn in ALL[:3]:
        with Image.open(clone / "images" / drawn) as image:
            assert np.asarray(image.convert("RGB")).std() > 10
    assert contents(clone)[name] == b"old"
    report = clone / "runs" / model / "lfw"
    report.mkdir(parents=True)
    (report / "theta_dist.png").write_text("new")
    view_2 = {"data": {"pairs_sha256": download.LFW_PAIRS[0].sha256}}
    view_2["model"] = {"sha256": checkpoint.sha256(config.WEIGHTS)}
    (report / "run.json").write_text('{"options": {"flip": "False"}}')
    (report / "eval.json").write_text(json.dumps(view_2))
    pictures.main(None)
    assert f"{name} is left as it is" in capsys.readouterr().out
    if model == "recipe-cpu":  # a report of others of that name
        (report / "run.json").write_text('{"options": {"flip": "True"}}')
        (report / "eval.json").write_text(json.dumps({**view_2, "model": {"sha256": "0"}}))
        pictures.main(None)
        assert f"{name} is left as it is" in capsys.readouterr().out
        (report / "eval.json").write_text(json.dumps(view_2))
    (report / "run.json").write_text('{"options": {"flip": "True"}}')
    (clone / "synthetic/test/raw" / pictures.PAIR[1]).unlink()
    before = contents(clone)
    pictures.main(None)
    assert contents(clone) == {**before, name: b"new"}
    assert f"pair.jpg is left as it is: {clone}" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_leaves_the_old_one(clone, monkeypatch):
    demo(clone)
    before = contents(clone)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        pictures.main(None)
    assert contents(clone) == before
