"""Comparing two photos, finding a face. Run: python -m pytest tests/test_verify.py"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import config
import enrolment
import face_reader
import identify
import models
import pair_picture
import protocol
import utils
import verify
from align_faces import align
from config import InputError, VerifyOptions
from conftest import ROOT
from detect_faces import FaceDetector, central_face
from images import read_image
from synthetic_faces import draw_face

FAR = (
    "accepts 1 in 1,000 impostor pairs and 62 in 100 genuine ones; "
    "taken on 78,000 impostor pairs of 27 held-out people"
)


def photo_of(path: Path, identity: int, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_face(0, identity, number)[0]).save(path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """a.png and b.png, `two.png` with both faces, `none.png`, and runs/first, a random network."""
    place = tmp_path_factory.mktemp("verify")
    a, b = (photo_of(place / f"{name}.png", identity, 1) for name, identity in (("a", 3), ("b", 4)))
    Image.fromarray(np.concatenate([read_image(a), read_image(b)], axis=1)).save(place / "two.png")
    Image.new("RGB", (200, 200), (90, 90, 90)).save(place / "none.png")
    torch.manual_seed(0)
    kind = {"network": "r18", "width": 0.125, "embedding_size": 32}
    about = {key: str(value) for key, value in kind.items()}
    state = models.create(**kind).state_dict()
    for name, more in (
        ("first", {"threshold_degrees": "68.1234", "threshold_far": "0.001",
                   "threshold_impostor_pairs": "78000",
                   "threshold_tar": "0.6150", "threshold_from": "27 held-out people"}),
        ("bare", {}),
        ("odd", {"threshold_degrees": "nan", "threshold_far": "0.001"}),
    ):  # fmt: skip
        (place / "runs" / name).mkdir(parents=True)
        checkpoint.save_weights(place / "runs" / name / checkpoint.BEST, state, about | more)
    return place


@pytest.fixture
def people(place, tmp_path) -> Path:
    """Four people with two photos each, and a photo without a face."""
    gallery = tmp_path / "people"
    for identity in range(3, 7):
        for number in (1, 2):
            photo_of(gallery / f"p{identity}" / f"{number}.png", identity, number)
    Image.new("RGB", (200, 200), (90, 90, 90)).save(gallery / "p3/none.png")
    return gallery


def ask(place: Path, *photos: str | Path, model: str = "first", **options) -> VerifyOptions:
    paths = tuple(place / photo for photo in photos)
    return VerifyOptions(photos=paths, model=place / "runs" / model, device="cpu", **options)


def say(capsys, options: VerifyOptions) -> str:
    verify.main(options)
    return capsys.readouterr().out


def told(capsys, options: VerifyOptions) -> dict:
    return json.loads(say(capsys, options))


def refused(options: VerifyOptions) -> str:
    with pytest.raises(InputError) as error:
        verify.main(options)
    return str(error.value)


def by_hand(place: Path, *names: str) -> float:
    """The angle of two photos' central faces, from the steps as README names them."""
    model = utils.load_backbone(place / "runs/first")
    rows = []
    for name in names:
        photo = read_image(place / name)
        faces = FaceDetector().detect([photo])[0]
        index = central_face(faces, photo.shape[1], photo.shape[0])
        rows.append(utils.embed(model, align(photo, faces.landmarks[index])[None]))
    return float(protocol.theta(*rows)[0])


# --- two photos


def test_the_angle_and_the_decision(place, capsys):
    angle = by_hand(place, "a.png", "b.png")
    said = say(capsys, ask(place, "a.png", "b.png"))
    assert 0 < angle < 68.12
    assert said == f"theta {angle:.2f}°: the same person (threshold 68.12° {FAR})\n"
    said = say(capsys, ask(place, "a.png", "b.png", threshold=angle - 0.01))
    assert "different people" in said and "as named" in said and "1 in" not in said
    assert "the same person" in say(capsys, ask(place, "a.png", "b.png", threshold=angle + 0.01))
    assert "theta 0.00°: the same person" in say(capsys, ask(place, "a.png", "a.png"))


def test_a_model_without_a_threshold_says_how_to_get_one(place, capsys):
    lines = say(capsys, ask(place, "a.png", "b.png", model="bare")).splitlines()
    assert re.fullmatch(r"theta [\d.]+°", lines[0]) and len(lines) == 2
    assert "--threshold" in lines[1] and "train.py" in lines[1]
    found = told(capsys, ask(place, "a.png", "b.png", model="bare", json=True))
    assert found["same"] is found["threshold"] is found["far"] is None
    assert "name one with --threshold" in refused(ask(place, "a.png", "b.png", model="odd"))


def test_json_is_one_object_and_nothing_else(place, script):
    words = ("verify.py", place / "a.png", "--json", place / "two.png")
    done = script(*words, "--model", place / "runs/first")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert found["photos"] == [str(place / "a.png"), str(place / "two.png")]
    assert found["model_sha256"] == checkpoint.sha256(place / "runs/first" / checkpoint.BEST)
    assert found["faces_found"] == [1, 2]
    assert (found["threshold"], found["far"], found["tar"]) == (68.1234, 0.001, 0.615)
    assert found["impostor_pairs"] == 78000
    assert found["same"] is (found["angle"] < 68.1234)
    assert [len(box) for box in found["boxes"]] == [4, 4]
    assert all(0.7 < score <= 1 for score in found["scores"])


def test_of_several_faces_the_central_one_and_it_is_said(place, capsys):
    said = say(capsys, ask(place, "a.png", "two.png"))
    assert "two.png: 2 faces, the central one is taken" in said
    assert f"theta {by_hand(place, 'a.png', 'two.png'):.2f}°" in said


def test_all_is_the_matrix_of_angles_from_left_to_right(place, capsys):
    found = told(capsys, ask(place, "two.png", "a.png", all=True, json=True))
    angles = np.array(found["angles"])
    assert angles.shape == (2, 1) and np.array(found["same"]).shape == (2, 1)
    boxes = np.array(found["boxes"][0])
    assert boxes[0, 0] < boxes[1, 0]
    assert angles[0, 0] < angles[1, 0]  # the left one is a's face
    central = by_hand(place, "two.png", "a.png")
    assert np.abs(angles - central).min() < 1e-3
    said = say(capsys, ask(place, "two.png", "a.png", all=True, threshold=angles.mean()))
    assert f"{angles[0, 0]:.2f}°*" in said and f"{angles[1, 0]:.2f}°*" not in said
    assert "a: " in said and "2 of 2 faces" in said


def test_a_photo_that_shows_no_face_is_named(place, script):
    done = script("verify.py", place / "a.png", place / "none.png", "--model", place / "runs/first")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {place / 'none.png'}: no face")


def test_photos_that_cannot_be_used(place, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "cut.png").write_bytes((place / "a.png").read_bytes()[:5000])
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (
        ("page.jpg", "not an image"),
        ("cut.png", "truncated"),
        ("pipe.jpg", "not a regular file"),
        ("missing.jpg", "no such file"),
        (".", "not a regular file"),
    ):
        said = refused(ask(place, tmp_path / name, "a.png"))
        assert str(tmp_path / name) in said and reason in said


def test_landmarks_that_are_no_face_are_told(place, monkeypatch):
    monkeypatch.setattr(face_reader.align_faces, "MAX_RESIDUAL", 0.0)
    for every in (False, True):
        assert "landmarks are no face" in refused(ask(place, "a.png", "b.png", all=every))


def test_what_cannot_be_asked(place, people, tmp_path):
    both = ("a.png", "b.png")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    for photos, options, said in (
        ((), {}, "name two photos: there are 0"),
        (("a.png",), {}, "or one with --gallery: there are 1"),
        ((*both, "two.png"), {}, "there are 3"),
        (both, {"gallery": people}, "takes one photo"),
        (both, {"top": 3}, "for a --gallery"),
        (both, {"enrolled": tmp_path / "x.safetensors"}, "for a --gallery"),
        (("a.png",), {"gallery": people, "enrolled": tmp_path / "x.bin"}, "ends in .safetensors"),
        (("a.png",), {"gallery": people, "enrolled": folder}, "is a folder: name a file"),
        (both, {"network": "r18"}, "--network is for a .pth or .pt"),
        (both, {"input_mean": 127.0}, "--input-mean and --input-std are for an .onnx"),
        (both, {"save": tmp_path / "x.gif"}, ".png or a .jpg"),
        (both, {"save": tmp_path / "no/x.png"}, "there is no folder"),
        (both, {"save": place / "a.png"}, "would overwrite"),
        (("a.png",), {"gallery": people, "save": people / "x.png"}, "lies in the gallery"),
    ):
        assert said in refused(ask(place, *photos, **options))
    assert "is not there" in refused(ask(place, *both, model="none"))
    if not torch.cuda.is_available():
        options = VerifyOptions(photos=(place / "a.png",) * 2, device="cuda")
        assert "cuda is not there" in refused(options)


def test_the_default_model_is_the_own_run_or_what_ships(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "RUNS", tmp_path)
    monkeypatch.setattr(config, "WEIGHTS", place / "runs/first" / checkpoint.BEST)
    options = VerifyOptions(photos=(place / "a.png", place / "b.png"))
    assert f"no --model named: using {config.WEIGHTS}\n" in say(capsys, options)
    shutil.copytree(place / "runs/bare", tmp_path / "faces")
    (tmp_path / "faces/result.json").unlink(missing_ok=True)
    assert f"using {config.WEIGHTS}\n" in say(capsys, options)  # it is not finished
    (tmp_path / "faces/result.json").touch()
    assert f"no --model named: using {tmp_path / 'faces'}\n" in say(capsys, options)


@pytest.mark.parametrize("number", [1, 4, 5, 7])
def test_the_picture_has_room_for_all_that_is_said(number):
    crop = np.zeros((112, 112, 3), np.uint8)
    shown = pair_picture.Shown("a.png", np.zeros((90, 60, 3), np.uint8), [], 0, crop)
    image = np.asarray(pair_picture.draw(shown, shown, "35.44°", ["MMM"] * number))
    middle = image[:, 400:-400].min(axis=(1, 2))  # (H,), of the text alone
    assert (middle[-pair_picture.GAP :] == 255).all()
    starts = np.flatnonzero((middle[1:] < 200) & (middle[:-1] >= 200))
    assert len(starts) >= number + 1
    assert image.shape[0] - starts[-1] < 112 + pair_picture.GAP  # below the photos


def test_the_threshold_says_whose_pairs_it_was_taken_on(place, tmp_path, capsys):
    """Not "held-out people", where they came from --val-pairs or from a fine-tuned network."""
    state, told_ = checkpoint.load_weights(place / "runs/first" / checkpoint.BEST)
    told_ |= {"threshold_from": "pairsDevTest.txt", "init": "others/r50.pth"}
    checkpoint.save_weights(tmp_path / "tuned.safetensors", state, told_)
    photos = (place / "a.png", place / "b.png")
    options = VerifyOptions(photos=photos, model=tmp_path / "tuned.safetensors", device="cpu")
    said = say(capsys, options)
    assert "78,000 impostor pairs of pairsDevTest.txt" in said and "held-out" not in said
    assert "started from (others/r50.pth) may have seen these people" in said
    found = told(capsys, dataclasses.replace(options, json=True))
    assert found["threshold_from"] == "pairsDevTest.txt"
    assert found["started_from"] == "others/r50.pth"
    told_["init"] = config.of_drawn_faces("drawn/best.safetensors")
    checkpoint.save_weights(tmp_path / "tuned.safetensors", state, told_)
    assert "may have seen" not in say(capsys, options)  # they are nobody
    assert told(capsys, ask(place, "a.png", "b.png", json=True))["started_from"] is None


def replaced_meanwhile(monkeypatch, run: Path, other: Path) -> None:
    """As train.py does it to a run that is under way, just after its weights were read."""
    real = utils.load_backbone

    def load(*arguments, **words):
        network = real(*arguments, **words)
        for name in (checkpoint.BEST, checkpoint.CHECKSUMS):
            shutil.copyfile(other / name, run / name)
        return network

    monkeypatch.setattr(utils, "load_backbone", load)


def test_weights_that_change_while_they_are_read_are_refused(place, people, tmp_path, monkeypatch):
    shutil.copytree(place / "runs/first", tmp_path / "runs/first")
    replaced_meanwhile(monkeypatch, tmp_path / "runs/first", place / "runs/bare")
    kept = tmp_path / "kept.safetensors"
    options = ask(tmp_path, place / "a.png", gallery=people, enrolled=kept)
    assert "changed while it was read: run again" in refused(options)
    assert not kept.exists()


def test_a_card_computes_in_full_float32(place):
    for settings in (torch.backends.cudnn, torch.backends.cuda.matmul):
        settings.allow_tf32 = True
    verify.main(ask(place, "a.png", "b.png"))
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_max_pixels_holds_for_the_photos_named(place):
    assert "too many pixels" in refused(ask(place, "a.png", "b.png", max_pixels=1000))


# --- the picture


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_the_picture_shows_photos_frames_and_crops(place, tmp_path, capsys, suffix):
    path = tmp_path / f"pair{suffix}"
    found = told(capsys, ask(place, "a.png", "b.png", save=path, json=True))
    with Image.open(path) as image:
        picture = np.asarray(image.convert("RGB")).astype(int)
    photo = read_image(place / "a.png")
    crop = face_reader.FaceReader(utils.load_backbone(place / "runs/first")).read([photo])[0]
    height = len(picture)
    shown = picture[height - 16 - 112 : height - 16, 16 : 16 + 112]
    assert np.abs(shown - crop.faces[0].crop).mean() < 3
    x1, y1, x2, _ = 16 + np.array(found["boxes"][0]) * 480 / 176
    frame = picture[round(y1), round(x1) + 10 : round(x2) - 10]  # its upper edge
    assert np.abs(frame - (0xD9, 0x5F, 0x02)).mean() < 40
    assert np.abs(picture[round(y1) + 10, round(x1) + 10] - (0xD9, 0x5F, 0x02)).sum() > 60
    before = path.read_bytes()
    verify.main(ask(place, "a.png", "b.png", save=path))
    assert path.read_bytes() == before


def test_the_picture_of_all_faces_and_of_names_of_any_kind(place, tmp_path, capsys):
    name = "two\nlines $x^2$ Zoë " + "long" * 40 + ".png"
    (tmp_path / name).write_bytes((place / "two.png").read_bytes())
    said = say(capsys, ask(place, tmp_path / name, "b.png", all=True, save=tmp_path / "x.png"))
    assert "two\\nlines" in said and "wrote" in said
    with Image.open(tmp_path / "x.png") as image:
        assert image.width == 1008


def test_a_picture_that_cannot_be_written_does_not_cost_the_answer(
    place, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(verify.pair_picture, "write_atomic", full)
    with pytest.raises(OSError):
        verify.main(ask(place, "a.png", "b.png", save=tmp_path / "x.png"))
    assert capsys.readouterr().out.startswith("theta ")


# --- a gallery


def test_a_face_is_found_among_people(place, people, tmp_path, capsys):
    kept = tmp_path / "kept.safetensors"
    (people / "p3/1.png").unlink()  # the photo asked for
    options = ask(place, "a.png", gallery=people, enrolled=kept, top=2, json=True)
    found = told(capsys, options)
    assert (found["enrolled"], found["identities"], found["new"]) == (7, 4, 8)
    assert found["not_enrolled"] == {"p3/none.png": "no face"}
    assert found["expected_false_hits"] == pytest.approx(0.007)
    assert found["search_ms"] < 1000 and len(found["matches"][0]) == 2
    for match in found["matches"][0]:
        assert match["photo"].startswith(match["identity"] + "/")
        angle = by_hand(place, "a.png", people / match["photo"])
        assert match["angle"] == pytest.approx(angle, abs=1e-2)
    nearest = min(by_hand(place, "a.png", path) for path in people.glob("*/[12].png"))
    assert found["matches"][0][0]["angle"] == pytest.approx(nearest, abs=1e-2)

    lines = say(capsys, ask(place, "a.png", gallery=people, enrolled=kept, top=2)).splitlines()
    assert "7 photos of 4 people enrolled (0 looked at now, 0 removed); 1 are not:" in lines[0]
    assert lines[1] == "  p3/none.png: no face"
    assert sum(line.startswith("    ") for line in lines) == 2
    assert any("a stranger's face" in line and "0.007 of the 7" in line for line in lines)
    assert lines[-1].startswith("searched 7 photos in ")


def test_all_faces_are_looked_for_and_the_nearest_one_is_drawn(place, people, tmp_path, capsys):
    kept, save = tmp_path / "kept.safetensors", tmp_path / "found.png"
    options = ask(place, "two.png", gallery=people, enrolled=kept, all=True, save=save, top=1)
    said = say(capsys, options)
    assert "face 1 of 2" in said and "face 2 of 2" in said and save.exists()


def test_the_gallery_is_kept_in_the_models_run_and_its_folder_left_alone(place, people, capsys):
    before = sorted(people.rglob("*"))
    found = told(capsys, ask(place, "a.png", gallery=people, json=True))
    kept = Path(found["enrolled_file"])
    assert kept.parent == place / "runs/first/enrolled" and kept.name.startswith("people-")
    assert sorted(people.rglob("*")) == before
    again = told(capsys, ask(place, "a.png", gallery=people, json=True))
    assert again["new"] == 0 and again["matches"] == found["matches"]
    other = told(capsys, ask(place, "a.png", gallery=people, json=True, model="bare"))
    assert other["new"] == 9 and other["expected_false_hits"] is None


def test_names_of_the_gallery_are_text(place, tmp_path, capsys):
    photo_of(tmp_path / "g/two\nlines \x1b[31m/1.png", 3, 2)
    said = say(capsys, ask(place, "a.png", gallery=tmp_path / "g"))
    assert "two\\nlines \\x1b[31m" in said and "\x1b" not in said
    found = told(capsys, ask(place, "a.png", gallery=tmp_path / "g", json=True))
    assert found["matches"][0][0]["identity"] == "two\nlines \x1b[31m"


def test_a_gallery_in_which_nobody_has_a_face(place, tmp_path):
    (tmp_path / "g/Ann").mkdir(parents=True)
    Image.new("RGB", (50, 50)).save(tmp_path / "g/Ann/1.png")
    said = refused(ask(place, "a.png", gallery=tmp_path / "g"))
    assert "no photo with a face" in said and "Ann/1.png: no face" in said


def test_a_photo_without_a_face_is_told_before_the_gallery_is_enrolled(place, people, monkeypatch):
    monkeypatch.setattr(enrolment, "refresh", None)
    assert "none.png: no face" in refused(ask(place, "none.png", gallery=people))


def test_other_settings_do_not_throw_the_enrolment_away(place, people, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    shutil.copytree(place / "runs/first", tmp_path / "runs/first")
    photo = place / "a.png"
    first = told(capsys, ask(tmp_path, photo, gallery=people, json=True))
    other = told(capsys, ask(tmp_path, photo, gallery=people, json=True, min_face_size=40))
    assert other["new"] == 9 and other["enrolled_file"] != first["enrolled_file"]
    for options in ({}, {"min_face_size": 40}):
        assert told(capsys, ask(tmp_path, photo, gallery=people, json=True, **options))["new"] == 0


def test_the_enrolments_name_and_key_hold_all_that_enters_an_embedding(place, people, monkeypatch):
    """Model, size of faces, network, input and kind of device; the model's content in the key."""
    seen = []

    def refresh(gallery, file, reader, settings, max_pixels):
        seen.append((file, settings))
        raise InputError("enough")

    monkeypatch.setattr(enrolment, "refresh", refresh)
    monkeypatch.setattr(utils, "check_foreign", lambda *_: None)
    for options in ({}, {"min_face_size": 40}, {"input_mean": 127.0}, {"input_std": 128.0},
                    {"model": "bare"}):  # fmt: skip
        assert refused(ask(place, "a.png", gallery=people, **options)) == "enough"
    settings = [setting for _, setting in seen]
    assert len({file for file, _ in seen}) == len(seen)
    assert len({json.dumps(setting) for setting in settings}) == len(seen)
    best = place / "runs/first" / checkpoint.BEST
    assert settings[0] == {
        "min_face_size": 20, "input": [127.5, 127.5], "network": None, "device": "cpu",
        "model": checkpoint.sha256(best),
    }  # fmt: skip
    del settings[0]["model"]
    name = identify.enrolled_file(best, people, settings[0])
    for key, value in (("network", "r18"), ("device", "cuda")):
        assert identify.enrolled_file(best, people, {**settings[0], key: value}) != name
    assert identify.enrolled_file(place / "runs/first/../first" / checkpoint.BEST, people,
                                settings[0]).name == name.name  # fmt: skip


def test_a_gallery_photo_that_is_gone_costs_the_picture_and_not_the_answer(
    place, people, tmp_path, capsys, monkeypatch
):
    real = enrolment.refresh

    def refresh(*arguments):
        enrolled = real(*arguments)
        for photo in people.glob("*/[12].png"):
            photo.unlink()
        return enrolled

    monkeypatch.setattr(enrolment, "refresh", refresh)
    kept = tmp_path / "kept.safetensors"
    said = refused(ask(place, "a.png", gallery=people, enrolled=kept, save=tmp_path / "x.png"))
    assert "just now: run again" in said
    assert "searched 8 photos" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_a_network_whose_embeddings_have_no_angle_is_refused(place, monkeypatch, broken):
    def embed(network, crops):
        return np.full((len(crops), 8), broken, np.float32)

    monkeypatch.setattr(face_reader.utils, "embed", embed)
    assert "zero or not finite" in refused(ask(place, "a.png", "b.png"))


def test_names_that_are_not_utf8_are_printed(place, tmp_path, capsys, monkeypatch):
    odd, run = tmp_path / os.fsdecode(b"latin-\xe9"), tmp_path / "two\nlines"
    odd.mkdir()
    shutil.copytree(place / "runs/first", run)
    monkeypatch.setattr(config, "default_model", lambda: run)
    photos = (place / "a.png", place / "b.png")
    said = say(capsys, VerifyOptions(photos=photos, save=odd / "x.png", device="cpu"))
    assert f"using {tmp_path}/two\\nlines\n" in said
    assert f"wrote {tmp_path}/latin-\\udce9/x.png\n" in said


# --- from a notebook


def test_the_lines_of_readme_run_as_they_stand(place, tmp_path):
    text = (ROOT / "README.md").read_text()
    block = re.search(r"In Python[^\n]*\n\n((?:    [^\n]*\n|\n)+)", text)[1]
    lines = [line.removeprefix("    ") for line in block.splitlines()]
    assert "from face_reader import FaceReader" in lines
    for name in "ab":
        Image.fromarray(read_image(place / f"{name}.png")).save(tmp_path / f"{name}.jpg")
    code = "\n".join([*lines, "print(a.faces[0].embedding.shape)"])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    angle, shape = done.stdout.splitlines()
    assert 0 < float(angle.strip("[]")) < 180 and shape == "(256,)" and done.stderr == ""
