"""Raw photos to crops and manifest. Run: python -m pytest tests/test_pre_process.py"""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import align_faces
import crop_faces
import manifest
import pre_process
from checkpoint import sha256
from config import InputError, PreProcessOptions
from data_gen import load_faces
from detect_faces import Faces
from images import read_image, write_jpeg
from orphans import move_orphans
from synthetic_faces import draw_face

OPTIONS = PreProcessOptions(workers=0)
PEOPLE = {"ann": 3, "bob": 2, "eve": 1}


def draw_raw(folder: Path) -> Path:
    """Drawn faces of three people, one of them in deeper folders."""
    for identity, (name, photos) in enumerate(PEOPLE.items()):
        for photo in range(photos):
            sub = f"{'frontal' if photo else 'profile'}/01" if name == "bob" else f"{photo:02d}"
            path = folder / name / f"{sub}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jpeg(path, draw_face(0, identity, photo)[0])
    return folder


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    return draw_raw(tmp_path_factory.mktemp("raw") / "photos")


@pytest.fixture
def spoiled(raw, tmp_path) -> Path:
    """The same with what is no photo, and a photo without a face."""
    folder = shutil.copytree(raw, tmp_path / "photos")
    write_jpeg(folder / "ann/wall.jpg", np.full((176, 176, 3), 90, np.uint8))
    (folder / "ann/half.jpg").write_bytes((folder / "ann/00.jpg").read_bytes()[:1500])
    (folder / "ann/notes.txt").write_text("not a photo")
    (folder / "nobody").mkdir()
    write_jpeg(folder / "stray.jpg", np.zeros((50, 50, 3), np.uint8))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Everything a run leaves, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def rows(out: Path) -> dict[str, manifest.Row]:
    return {row.source: row for row in manifest.read_manifest(out)}


def test_every_photo_becomes_a_crop_under_its_own_path(raw, tmp_path):
    pre_process.prepare(raw, tmp_path / "out", OPTIONS)
    found = rows(tmp_path / "out")
    assert sorted(found) == [
        *("ann/00.jpg", "ann/01.jpg", "ann/02.jpg"),
        *("bob/frontal/01.jpg", "bob/profile/01.jpg", "eve/00.jpg"),
    ]
    for source, row in found.items():
        assert row.status == "aligned" and row.reason == "" and row.faces >= 1
        assert row.identity == source.split("/")[0]
        assert row.image == f"images/{source}"
        assert read_image(tmp_path / "out" / row.image).shape == (112, 112, 3)
        assert 0.7 < row.score <= 1 and (row.width, row.height) == (176, 176)


def test_the_crop_is_the_template_over_the_true_landmarks(raw, tmp_path):
    pre_process.prepare(raw, tmp_path / "out", OPTIONS)
    row = rows(tmp_path / "out")["ann/01.jpg"]
    _, truth = draw_face(0, 0, 1)
    eyes = np.linalg.norm(truth[0] - truth[1])
    assert np.linalg.norm(row.landmarks - truth, axis=1).mean() < 0.15 * eyes
    crop = read_image(tmp_path / "out" / row.image).astype(int)
    again = align_faces.align(read_image(raw / row.source), row.landmarks).astype(int)
    assert np.abs(crop - again).mean() < 3  # but for JPEG
    assert row.box[0] < truth[:, 0].min() and row.box[2] > truth[:, 0].max()


def test_row2_row13_what_cannot_be_used_is_told_with_a_reason(spoiled, tmp_path, capsys):
    pre_process.prepare(spoiled, tmp_path / "out", OPTIONS)
    found = rows(tmp_path / "out")
    assert found["ann/wall.jpg"].status == "rejected"
    assert found["ann/wall.jpg"].reason == "no face"
    assert found["ann/half.jpg"].reason == "truncated"
    assert not found["ann/wall.jpg"].image
    said = capsys.readouterr().out
    for line in (
        *("8 photos of 3 identities", "1  no face", "1  truncated", "1 other files were left"),
        *("1 photos outside any", "1 identities have no photo", "WARNING: 2"),
    ):
        assert " ".join(line.split()) in " ".join(said.split()), line


def test_keep_undetected_crops_by_the_medians_of_the_set(spoiled, tmp_path, capsys):
    options = dataclasses.replace(OPTIONS, keep_undetected=True)
    pre_process.prepare(spoiled, tmp_path / "out", options)
    found = rows(tmp_path / "out")
    wall = found["ann/wall.jpg"]
    assert wall.status == "undetected" and wall.image == "images/ann/wall.jpg"
    shares = [r.landmarks / (r.width, r.height) for r in found.values() if r.status == "aligned"]
    expected = np.median(shares, axis=0) * (wall.width, wall.height)
    assert np.abs(wall.landmarks - expected).max() < 1e-3
    assert read_image(tmp_path / "out" / wall.image).shape == (112, 112, 3)
    assert found["ann/half.jpg"].status == "rejected"  # there is nothing to crop
    assert "wall.jpg" in capsys.readouterr().out


def test_the_flag_may_be_added_later(spoiled, tmp_path):
    keep = dataclasses.replace(OPTIONS, keep_undetected=True)
    pre_process.prepare(spoiled, tmp_path / "once", keep)
    pre_process.prepare(spoiled, tmp_path / "later", OPTIONS)
    pre_process.prepare(spoiled, tmp_path / "later", keep)
    assert tree(tmp_path / "later") == tree(tmp_path / "once")


@pytest.mark.parametrize("keep", [False, True])
def test_a_second_run_has_nothing_to_do(raw, spoiled, tmp_path, capsys, monkeypatch, keep):
    folder = shutil.copytree(raw, tmp_path / "faces")  # `spoiled` is photos
    shutil.copy(spoiled / "ann/wall.jpg", folder / "ann/wall.jpg")
    options = dataclasses.replace(OPTIONS, keep_undetected=keep)
    pre_process.prepare(folder, tmp_path / "out", options)
    before = tree(tmp_path / "out")
    assert rows(tmp_path / "out")["ann/wall.jpg"].status == ("undetected" if keep else "rejected")
    capsys.readouterr()
    monkeypatch.setattr(crop_faces, "Worker", None)  # a detector would fail
    pre_process.prepare(folder, tmp_path / "out", options)
    assert tree(tmp_path / "out") == before
    assert "nothing was left to do" in capsys.readouterr().out


def test_new_photos_are_added_and_lost_crops_made_again(raw, tmp_path):
    folder = shutil.copytree(raw, tmp_path / "photos")
    os.remove(folder / "eve/00.jpg")
    pre_process.prepare(folder, tmp_path / "out", OPTIONS)
    shutil.copy(raw / "eve/00.jpg", folder / "eve/00.jpg")
    os.remove(tmp_path / "out/images/ann/00.jpg")
    (tmp_path / "out/images/ann/01.jpg").write_bytes(b"")  # as after a power cut
    crop = tmp_path / "out/images/ann/02.jpg"
    crop.write_bytes(crop.read_bytes()[:500])
    pre_process.prepare(folder, tmp_path / "out", OPTIONS)
    pre_process.prepare(folder, tmp_path / "fresh", OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_cut_off_journal_is_used_up_to_the_cut(raw, tmp_path):
    pre_process.prepare(raw, tmp_path / "whole", OPTIONS)
    out = shutil.copytree(tmp_path / "whole", tmp_path / "out")
    lines = (out / "manifest.csv").read_text().splitlines(keepends=True)
    os.remove(out / "manifest.csv")
    (out / pre_process.JOURNAL).write_text("".join(lines[1:4]) + lines[4][:30])
    assert len(pre_process.read_journal(out, raw, pre_process.list_photos(raw).photos)) == 3
    pre_process.prepare(raw, out, OPTIONS)
    assert tree(out) == tree(tmp_path / "whole")


def test_several_processes_give_the_same_bytes(raw, tmp_path):
    one = dataclasses.replace(OPTIONS, batch_size=2)
    pre_process.prepare(raw, tmp_path / "one", one)
    pre_process.prepare(raw, tmp_path / "two", dataclasses.replace(one, workers=2))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_an_archive_gives_the_same_as_its_folder(raw, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for path in raw.rglob("*.jpg"):
            file.write(path, "wrapper" / path.relative_to(raw))
    pre_process.prepare(raw, tmp_path / "folder", OPTIONS)
    pre_process.prepare(tmp_path / "a.zip", tmp_path / "zip", OPTIONS)
    first, second = tree(tmp_path / "folder"), tree(tmp_path / "zip")
    assert first["manifest.csv"] == second["manifest.csv"]
    assert all(second[name] == data for name, data in first.items() if name.endswith(".jpg"))


def test_crops_never_share_a_name():
    names = dict(pre_process.name_crops(["id/1.jpg", "id/1.png", "id/1.JPG", "id/sub/1.png"]))
    assert names["id/1.jpg"] == "images/id/1.jpg"
    assert names["id/sub/1.png"] == "images/id/sub/1.jpg"
    assert len({name.casefold() for name in names.values()}) == 4


def test_row11_file_names_of_every_kind(tmp_path):
    photo = draw_face(0, 0, 0)[0]
    strange = [b"a b.jpg", "é顔.jpg".encode(), b"new\nline.jpg", b'quote",.jpg', b"bad\xff.jpg",
               "line\u2028sep.jpg".encode(), b"return\r.jpg", b"l" * 251 + b".jpg",
               b"l" * 251 + b".png"]  # fmt: skip
    folder = tmp_path / "photos/id"
    folder.mkdir(parents=True)
    for name in strange:
        write_jpeg(folder / os.fsdecode(name), photo)
    pre_process.prepare(tmp_path / "photos", tmp_path / "out", OPTIONS)
    found = rows(tmp_path / "out")
    assert sorted(found) == sorted(f"id/{os.fsdecode(name)}" for name in strange)
    assert all((tmp_path / "out" / row.image).exists() for row in found.values())
    pre_process.prepare(tmp_path / "photos", tmp_path / "out", OPTIONS)


def test_row11_a_name_that_is_no_text_is_printed(script, raw, tmp_path):
    folder = shutil.copytree(raw, tmp_path / "photos\udcff")
    write_jpeg(folder / "ann/wall\udcff.jpg", np.full((176, 176, 3), 90, np.uint8))
    done = script(
        "pre_process.py", "--src", folder, "--out", tmp_path / "out", "--keep-undetected",
        env={"PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert r"ann/wall\udcff.jpg" in done.stdout
    assert manifest.read_settings(tmp_path / "out")["source"] == str(folder)


def test_row3_links_that_lead_to_themselves_are_no_photos(raw, tmp_path):
    folder = shutil.copytree(raw, tmp_path / "photos")
    for name in ("loop", "ann/loop", "ann/loop.jpg"):
        (folder / name).symlink_to(folder / name)
    pre_process.prepare(folder, tmp_path / "out", OPTIONS)
    found = rows(tmp_path / "out")
    assert len(found) == 7 and found["ann/loop.jpg"].status == "rejected"


def test_folders_that_link_to_each_other_are_listed_once(tmp_path):
    folders = [tmp_path / "photos/id" / str(number) for number in range(7)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "1.jpg").touch()
    for folder in folders:
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other)
    assert len(pre_process.list_photos(tmp_path / "photos").photos) == 7


def test_links_to_folders_are_followed_but_not_in_a_circle(raw, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "ann").symlink_to(raw / "ann")
    (folder / "me").mkdir()
    shutil.copy(raw / "eve/00.jpg", folder / "me/1.jpg")
    (folder / "me/again").symlink_to(folder / "me")
    listing = pre_process.list_photos(folder)
    assert [photo.source for photo in listing.photos] == [
        *("ann/00.jpg", "ann/01.jpg", "ann/02.jpg", "me/1.jpg")
    ]


class StubDetector:
    """Two faces in each photo: landmarks by the photo's brightness, the central face second."""

    def __init__(self, *_):
        pass

    def detect(self, images):
        return [
            Faces(
                np.array([[0, 0, 30, 40], [60, 60, 120, 130]], dtype=float),
                np.array([0.99, 0.9]),
                np.stack([align_faces.TEMPLATE / 4, LANDMARKS[int(image.mean()) // 10]]),
            )
            for image in images
        ]


LANDMARKS = {
    1: align_faces.TEMPLATE / 2 + 60,
    2: np.full((5, 2), np.nan),
    3: np.full((5, 2), 90.0),
    4: np.linspace((60, 60), (120, 130), 5),  # on a line
    5: align_faces.TEMPLATE[[1, 0, 2, 4, 3]] / 2 + 60,  # mirrored
    6: np.full((5, 2), 1e12),
}


def test_row12_row13_landmarks_that_are_no_face_and_several_faces(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos/id").mkdir(parents=True)
    for kind in LANDMARKS:
        image = Image.new("RGB", (180, 180), (10 * kind + 5,) * 3)
        image.save(tmp_path / f"photos/id/{kind}.png")
    monkeypatch.setattr(crop_faces, "FaceDetector", StubDetector)
    for _ in range(2):
        pre_process.prepare(tmp_path / "photos", tmp_path / "out", OPTIONS)
    found = rows(tmp_path / "out")
    assert [row.faces for row in found.values()] == [2] * 6
    assert found["id/1.png"].status == "aligned" and found["id/1.png"].score == 0.9
    assert np.array_equal(found["id/1.png"].landmarks, LANDMARKS[1].round(4))
    for kind in range(2, 7):
        row = found[f"id/{kind}.png"]
        assert (row.status, row.reason) == ("rejected", pre_process.NO_SHAPE), kind
    said = " ".join(capsys.readouterr().out.split())
    assert "6 photos have several faces" in said and f"5 {pre_process.NO_SHAPE}" in said


def test_row17_identities_of_one_photo_or_none_are_told(raw, tmp_path, capsys):
    folder = shutil.copytree(raw, tmp_path / "photos")
    (folder / "nobody").mkdir()
    pre_process.prepare(folder, tmp_path / "out", OPTIONS)
    said = capsys.readouterr().out
    assert "1 identities have one aligned photo" in said and "1 identities have no photo" in said


def test_row19_a_full_disk_names_the_file_and_loses_nothing(raw, tmp_path):
    """A child may write 2,500 bytes a file: enough for the index, not for a crop."""
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv.pop(1));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500));"
        "import config, pre_process;"
        "config.run(pre_process.main, config.parse(config.PreProcessOptions, ''))"
    )
    folder, out = shutil.copytree(raw, tmp_path / "photos"), tmp_path / "out"
    os.remove(folder / "eve/00.jpg")
    pre_process.prepare(folder, out, OPTIONS)
    before = tree(out)
    shutil.copy(raw / "eve/00.jpg", folder / "eve/00.jpg")
    done = subprocess.run(
        [sys.executable, "-c", code, str(pre_process.config.ROOT), "--src", str(folder),
         "--out", str(out), "--workers", "0"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    said = r"error: \S*images/eve/00\.jpg: File too large \([\d,]+ bytes free\): make .*\n"
    assert re.fullmatch(said, done.stderr), done.stderr
    after = tree(out)
    after.pop(pre_process.JOURNAL)
    assert after == before
    pre_process.prepare(folder, out, OPTIONS)
    pre_process.prepare(folder, tmp_path / "fresh", OPTIONS)
    assert tree(out) == tree(tmp_path / "fresh")


def test_row4_row9_what_is_unusual_is_told_once(raw, tmp_path, capsys):
    folder = shutil.copytree(raw, tmp_path / "photos")
    face = Image.fromarray(draw_face(0, 0, 1)[0])
    face.save(folder / "ann/png.jpg", "PNG")
    for name in ("a", "b"):
        face.save(folder / f"ann/{name}.gif", save_all=True, append_images=[face.rotate(90)])
    for _ in range(2):  # also where nothing is left to do
        pre_process.prepare(folder, tmp_path / "out", OPTIONS)
        said = " ".join(capsys.readouterr().out.split())
        assert "2 of them: animated, first frame taken" in said
        assert "1 of them: PNG inside, named otherwise" in said
    found = rows(tmp_path / "out")
    assert found["ann/png.jpg"].status == "aligned" and found["ann/01.jpg"].reason == ""


def test_what_an_archive_held_besides_is_told_each_time(raw, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(raw / "eve/00.jpg", "eve/1.jpg")
        file.writestr("eve/notes.txt", "x")
    for _ in range(2):
        pre_process.prepare(tmp_path / "a.zip", tmp_path / "out", OPTIONS)
        assert "1 other files in the archive were left" in capsys.readouterr().out


def test_crops_of_photos_that_are_gone_are_moved_aside(raw, tmp_path, capsys):
    folder, out = shutil.copytree(raw, tmp_path / "photos"), tmp_path / "out"
    pre_process.prepare(folder, out, OPTIONS)
    crop = (out / "images/eve/00.jpg").read_bytes()
    (out / "images/ann/mine.txt").write_text("not a crop")
    shutil.rmtree(folder / "eve")
    os.remove(folder / "bob/frontal/01.jpg")
    pre_process.prepare(folder, out, OPTIONS)
    assert "2 crops of photos that are gone or left out were moved" in capsys.readouterr().out
    assert not (out / "images/eve").exists() and not (out / "images/bob/frontal").exists()
    assert (out / "removed/eve/00.jpg").read_bytes() == crop
    assert (out / "images/ann/mine.txt").exists()
    pre_process.prepare(folder, tmp_path / "fresh", OPTIONS)
    left = {name: data for name, data in tree(out).items()
            if not name.startswith("removed") and name != "images/ann/mine.txt"}  # fmt: skip
    assert left == tree(tmp_path / "fresh")


def test_crops_of_an_unfinished_run_are_moved_aside_too(raw, tmp_path):
    folder, out = shutil.copytree(raw, tmp_path / "photos"), tmp_path / "out"
    pre_process.prepare(folder, out, OPTIONS)
    lines = (out / "manifest.csv").read_text().splitlines(keepends=True)
    os.remove(out / "manifest.csv")
    (out / pre_process.JOURNAL).write_text("".join(lines[1:]))
    os.remove(folder / "ann/02.jpg")
    pre_process.prepare(folder, out, OPTIONS)
    assert (out / "removed/ann/02.jpg").exists() and not (out / "images/ann/02.jpg").exists()


def test_only_crops_are_moved(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    (out / "manifest.csv").write_bytes(b"x")
    (out / "images/link.jpg").symlink_to(tmp_path / "photo.jpg")
    names = ["../photo.jpg", "images/../../photo.jpg", "manifest.csv", "images/link.jpg", "images",
             str(tmp_path / "photo.jpg"), "images/none.jpg"]  # fmt: skip
    before = tree(tmp_path)
    assert move_orphans(out, names) == 0 and tree(tmp_path) == before


def test_a_list_of_names_without_a_match_is_told(raw, tmp_path, capsys):
    (tmp_path / "people.txt").write_text("Zoe\n")
    options = dataclasses.replace(OPTIONS, exclude_names=tmp_path / "people.txt")
    pre_process.prepare(raw, tmp_path / "out", options)
    assert "none of its names is an identity of" in capsys.readouterr().out


def test_identities_of_a_test_list_are_left_out(raw, tmp_path, capsys):
    (tmp_path / "people.txt").write_text("1\n2\nANN\t3\nEve_Online\t1\n")
    out, options = tmp_path / "out", dataclasses.replace(
        OPTIONS, exclude_names=tmp_path / "people.txt"
    )  # fmt: skip
    pre_process.prepare(raw, out, options)
    found = rows(out)
    assert {name: row.status for name, row in found.items()} == {
        name: "excluded" if name.startswith("ann") else "aligned" for name in found
    }
    assert found["ann/00.jpg"].reason == "named like ANN in people.txt"
    assert "excluded 3 photos of 1 identities" in " ".join(capsys.readouterr().out.split())
    assert not (out / "images/ann").exists() and list(found) == sorted(found)
    pre_process.prepare(raw, out, options)  # again: nothing changes
    assert rows(out)["ann/00.jpg"].status == "excluded"
    # Without the list they come back, and with it they go again: as if it had been so at first.
    pre_process.prepare(raw, out, OPTIONS)
    pre_process.prepare(raw, tmp_path / "plain", OPTIONS)
    assert tree(out) == tree(tmp_path / "plain")
    pre_process.prepare(raw, out, options)
    pre_process.prepare(raw, tmp_path / "excluded", options)
    assert (out / "removed/ann/00.jpg").exists()
    shutil.rmtree(out / "removed")
    assert tree(out) == tree(tmp_path / "excluded")


def test_lists_of_names_that_cannot_be_used(raw, tmp_path):
    names = tmp_path / "people.txt"
    for options, said in (
        ({"exclude_names": names}, "can't be read"),
        ({"test_names": names, "report": True}, "can't be read"),
        ({"test_names": names}, "can't be read"),
    ):
        with pytest.raises(InputError, match=said):
            pre_process.main(PreProcessOptions(src=raw, out=tmp_path / "out", **options))
    names.write_text("ann\nbob\neve\n")
    with pytest.raises(InputError, match="add --report"):
        pre_process.main(PreProcessOptions(src=raw, out=tmp_path / "out", test_names=names))
    options = dataclasses.replace(OPTIONS, exclude_names=names)
    assert "names every identity" in refused(raw, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_pack_and_report_of_a_set_that_is_prepared(script, raw, tmp_path):
    out = tmp_path / "out"
    pre_process.prepare(raw, out, OPTIONS)
    before = tree(out)
    done = script("pre_process.py", "--out", out, "--pack", "--report")
    assert done.returncode == 0, done.stderr
    assert "6 crops" in done.stdout and str(out / "report.html") in done.stdout
    after = tree(out)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        *("train.rec", "train.idx", "property", "train.pack.json", "report.html")
    }
    faces = load_faces(out)
    assert faces.records is not None and len(faces) == 6
    both = dataclasses.replace(OPTIONS, pack=True, report=True)
    pre_process.prepare(raw, tmp_path / "once", both)
    once = tree(tmp_path / "once")
    assert {**once, "report.html": after["report.html"]} == after  # its title is the folder's name


def test_a_lost_crop_refuses_the_pack_and_loses_nothing(raw, tmp_path):
    out = tmp_path / "out"
    pre_process.prepare(raw, out, OPTIONS)
    os.remove(out / "images/ann/00.jpg")
    before = tree(out)
    with pytest.raises(InputError, match=r"ann/00\.jpg is lost or cut off"):
        pre_process.main(PreProcessOptions(out=out, pack=True))
    assert {name: data for name, data in tree(out).items() if ".tmp" not in name} == before


def test_invented_people_are_drawn_and_prepared_and_none_of_them_twice(tmp_path, capsys):
    options = PreProcessOptions(draw=2, out=tmp_path / "drawn", workers=0)
    pre_process.main(options)
    assert "Drew 16 photos." in capsys.readouterr().out
    rows = manifest.read_manifest(tmp_path / "drawn")
    assert len(rows) == 16 and {row.status for row in rows} == {manifest.ALIGNED}
    drawn = read_image(tmp_path / "drawn/raw/s5000/s5000_0001.jpg").astype(int)
    ours, other = (np.abs(drawn - draw_face(seed, 5000, 1)[0]).mean() for seed in (1, 0))
    assert ours < 3 and other > 10  # but for JPEG, and of another seed than the demo's
    pre_process.main(dataclasses.replace(options, draw=3))
    assert "Drew 8 photos." in capsys.readouterr().out
    assert len(manifest.read_manifest(tmp_path / "drawn")) == 24
    with pytest.raises(InputError, match="leave one out"):
        pre_process.main(dataclasses.replace(options, src=tmp_path))


def test_row15_download_prepares_a_test_set(raw, tmp_path, monkeypatch):
    """The published archive and lists, but from localhost and small."""
    with zipfile.ZipFile(tmp_path / "lfw.zip", "w") as file:
        for path in raw.rglob("*.jpg"):
            file.write(path, "lfw_funneled" / path.relative_to(raw))
    (tmp_path / "pairs.txt").write_text("1\t1\n")
    monkeypatch.setattr(pre_process.config, "DATA", tmp_path / "data")
    for name, files in (("LFW", ["lfw.zip"]), ("LFW_PAIRS", ["pairs.txt"])):
        made = [
            pre_process.download.File(file, (tmp_path / file).as_uri(), sha256(tmp_path / file))
            for file in files
        ]
        monkeypatch.setattr(pre_process.download, name, made[0] if name == "LFW" else made)
    pre_process.main(PreProcessOptions(download="lfw", workers=0))
    assert len(rows(tmp_path / "data/lfw")) == 6
    assert (tmp_path / "data/lfw/pairs.txt").read_text() == "1\t1\n"
    with pytest.raises(InputError, match="leave one out"):
        pre_process.main(PreProcessOptions(download="lfw", src=raw))


def refused(src: Path, out: Path, options: PreProcessOptions = OPTIONS) -> str:
    with pytest.raises(InputError) as error:
        pre_process.prepare(src, out, options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_sources_are_refused_and_leave_nothing(tmp_path, raw):
    out = tmp_path / "out"
    (tmp_path / "a.zip").write_bytes(b"<html>404</html>")
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    shutil.copy(raw / "eve/00.jpg", tmp_path / "flat/1.jpg")
    assert "missing.tgz is not there" in refused(tmp_path / "missing.tgz", out)
    assert "a.zip is damaged or not an archive" in refused(tmp_path / "a.zip", out)
    assert "a.txt is no folder and no archive" in refused(tmp_path / "a.txt", out)
    assert "holds no photo" in refused(tmp_path / "empty", out)
    assert "1 photos lie outside any folder" in refused(tmp_path / "flat", out)
    assert not out.exists()
    assert "crops would be taken for photos" in refused(raw, raw / "out")


def test_crops_are_never_written_over_the_photos(raw, tmp_path):
    folder = shutil.copytree(raw, tmp_path / "set/images")
    before = tree(tmp_path)
    assert "name another --out" in refused(folder, tmp_path / "set")
    assert tree(tmp_path) == before


def test_a_good_archive_after_a_refused_one(raw, tmp_path):
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as file:
        file.write(raw / "eve/00.jpg", "1.jpg")
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as file:
        file.write(raw / "eve/00.jpg", "eve/1.jpg")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "good.zip").read_bytes()[:500])
    out = tmp_path / "out"
    assert "1 photos lie outside" in refused(tmp_path / "flat.zip", out)
    out.mkdir()  # one that was there before is left there
    assert "is damaged" in refused(tmp_path / "cut.zip", out)
    pre_process.prepare(tmp_path / "good.zip", out, OPTIONS)
    assert sorted(rows(out)) == ["eve/1.jpg"]


def test_an_unreadable_photo_is_tried_again(raw, tmp_path):
    folder = shutil.copytree(raw, tmp_path / "photos")
    whole = (folder / "ann/00.jpg").read_bytes()
    (folder / "ann/00.jpg").write_bytes(whole[:1500])
    pre_process.prepare(folder, tmp_path / "out", OPTIONS)
    assert rows(tmp_path / "out")["ann/00.jpg"].reason == "truncated"
    (folder / "ann/00.jpg").write_bytes(whole)
    pre_process.prepare(folder, tmp_path / "out", OPTIONS)
    assert rows(tmp_path / "out")["ann/00.jpg"].status == "aligned"


def test_out_alone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pre_process.config, "RAW", tmp_path / "raw")
    with pytest.raises(InputError, match="needs --src"):
        pre_process.main(PreProcessOptions(out=tmp_path / "out"))


def test_row17_twins_by_case_are_refused(tmp_path, raw):
    shutil.copytree(raw / "eve", tmp_path / "photos/eve")
    shutil.copytree(raw / "eve", tmp_path / "photos/EVE")
    assert "EVE and eve" in refused(tmp_path / "photos", tmp_path / "out")


def test_no_usable_photo_is_refused(tmp_path):
    (tmp_path / "photos/id").mkdir(parents=True)
    write_jpeg(tmp_path / "photos/id/1.jpg", np.zeros((50, 50, 3), np.uint8))
    assert "no usable photo among 1 (1 no face)" in refused(tmp_path / "photos", tmp_path / "out")
    assert not (tmp_path / "out/manifest.csv").exists()


def test_a_damaged_manifest_is_made_anew(raw, tmp_path):
    pre_process.prepare(raw, tmp_path / "out", OPTIONS)
    before, path = tree(tmp_path / "out"), tmp_path / "out/manifest.csv"
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        whole[:700] + bytes(300) + whole[1000:],
        whole[:700] + b'"' + whole[700:],
        whole[:700] + b'"' + b"x" * 200_000 + whole[700:],
        whole.replace(b"images/ann", b"images/../../ann"),
        b"source,image\n",
        b"",
    ):
        path.write_bytes(damaged)
        pre_process.prepare(raw, tmp_path / "out", OPTIONS)
        assert tree(tmp_path / "out") == before


def test_a_photo_that_has_changed_is_done_again(raw, tmp_path):
    folder = shutil.copytree(raw, tmp_path / "photos")
    wall = folder / "ann/wall.jpg"
    write_jpeg(wall, np.full((176, 176, 3), 90, np.uint8))
    pre_process.prepare(folder, tmp_path / "out", OPTIONS)
    later = time.time() - 1
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (later - 100, later - 100))
    for photo, source in (("ann/00.jpg", "eve/00.jpg"), ("ann/wall.jpg", "ann/01.jpg")):
        shutil.copyfile(raw / source, folder / photo)
        os.utime(folder / photo, (later, later))
    os.utime(folder / "ann/02.jpg", (later + 1e6, later + 1e6))  # a wrong clock
    pre_process.prepare(folder, tmp_path / "out", OPTIONS)
    assert rows(tmp_path / "out")["ann/wall.jpg"].status == "aligned"
    pre_process.prepare(folder, tmp_path / "fresh", OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert (tmp_path / "out/images/ann/02.jpg").stat().st_mtime < later


def test_a_card_without_room_is_told_and_nothing_is_lost(raw, tmp_path, monkeypatch, capsys):
    run = crop_faces.run

    def short(photos, *more):
        yield from run(photos[:2], *more)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(crop_faces, "run", short)
    with pytest.raises(SystemExit) as stop:
        pre_process.prepare(raw, tmp_path / "out", OPTIONS)
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "lower --batch-size" in said and "allocate 2 GiB" in said
    monkeypatch.undo()
    pre_process.prepare(raw, tmp_path / "out", OPTIONS)
    assert "2 of 6 photos are done already" in capsys.readouterr().out


def test_damaged_settings_are_named(raw, tmp_path):
    pre_process.prepare(raw, tmp_path / "out", OPTIONS)
    for damaged in (b'{"source": ', b"[1]", b"\xff"):
        (tmp_path / "out/pre_process.json").write_bytes(damaged)
        with pytest.raises(InputError, match=r"pre_process\.json is damaged"):
            pre_process.prepare(raw, tmp_path / "out", OPTIONS)


def test_other_settings_or_another_source_are_refused(raw, tmp_path):
    out = tmp_path / "out"
    pre_process.prepare(raw, out, OPTIONS)
    before = tree(out)
    said = refused(raw, out, dataclasses.replace(OPTIONS, min_face_size=40))
    assert "min_face_size 20, now 40" in said
    other = shutil.copytree(raw, tmp_path / "other")
    assert "name another --out" in refused(other, out)
    assert tree(out) == before


def test_row20_two_runs_at_once_the_second_is_refused(raw, tmp_path):
    (tmp_path / "out").mkdir()
    with pre_process.lock(tmp_path / "out"):
        assert f"process {os.getpid()}" in refused(raw, tmp_path / "out")
    pre_process.prepare(raw, tmp_path / "out", OPTIONS)  # the lock is gone with its holder


def test_bad_input_from_the_shell(script, tmp_path):
    done = script("pre_process.py", "--src", tmp_path / "no.tgz", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "no.tgz" in done.stderr and not (tmp_path / "out").exists()


def test_threads_around_one_detector_give_the_same_bytes(spoiled, tmp_path, monkeypatch):
    """What a GPU is fed by, here with the detector on the CPU; one photo counts as large."""
    pre_process.prepare(spoiled, tmp_path / "one", OPTIONS)
    whole = tree(tmp_path / "one")
    photos = pre_process.list_photos(spoiled).photos
    read, size_of = [], crop_faces.size_of
    monkeypatch.setattr(
        crop_faces, "size_of",
        lambda path: (9999, 9999) if path == spoiled / photos[0].source else size_of(path),
    )  # fmt: skip
    monkeypatch.setattr(
        crop_faces, "read_image", lambda path, *more: read.append(path) or read_image(path, *more)
    )
    out = tmp_path / "two"
    (out / crop_faces.PARTS).mkdir(parents=True)
    worker = crop_faces.Worker(spoiled, out, OPTIONS, "cpu")
    chunks = list(crop_faces.chunked(photos, 2, 1))
    found = [row for rows in crop_faces.feed(worker, chunks, 3) for row in rows]
    lines = {row.source: row.line() for row in found}
    assert whole["manifest.csv"].decode().split("\n", 1)[1] == "".join(
        lines[photo.source] for photo in photos
    )
    crops = {name: data for name, data in whole.items() if name.startswith("images/")}
    assert tree(out) == crops
    assert sorted(read) == sorted(spoiled / photo.source for photo in photos)  # each once


def test_chunks_hold_every_photo_once_and_end_small():
    photos = [crop_faces.Photo(str(number), "", "") for number in range(1000)]
    chunks = list(crop_faces.chunked(photos, 32, 4))
    assert [photo for chunk in chunks for photo in chunk] == photos
    assert len(chunks[0]) == 32 and len(chunks[-1]) == 1


def start(*words: object, ranks: int = 0, cwd: Path | None = None) -> subprocess.Popen:
    """pre_process.py in a process group of its own, or several ranks of it under torchrun."""
    job = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command = [sys.executable, *(job if ranks else []), pre_process.config.ROOT / "pre_process.py"]
    return subprocess.Popen(
        [str(word) for word in (*command, *words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_ranks_give_the_same_bytes(spoiled, tmp_path):
    pre_process.prepare(spoiled, tmp_path / "one", OPTIONS)
    job = start("--src", spoiled, "--out", tmp_path / "two", ranks=2)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert said.count("8 photos of 3 identities") == 1


def test_ranks_read_what_there_is_to_do_before_it_goes(tmp_path, monkeypatch):
    """The first rank may be done at once, and then removes the list."""
    waits = []
    monkeypatch.setattr(pre_process.job, "ranks", lambda: 2)
    monkeypatch.setattr(pre_process.job, "wait", lambda: waits.append(listed.exists()))
    listed = tmp_path / pre_process.PARTS / pre_process.TODO
    pre_process.give_out([], tmp_path, tmp_path)
    assert waits == [True, True]
    pre_process.assist(tmp_path, OPTIONS)  # waits for the list, and says that it has read it
    assert len(waits) == 4


def test_ranks_share_what_is_left_and_the_first_one_derives(raw, tmp_path):
    names, out = tmp_path / "names.txt", tmp_path / "out"
    names.write_text("Ann\n")
    words = ["--src", raw, "--out", out, "--exclude-names", names]
    for more in (["--pack"], ["--out", out, "--report"]):  # the second: of a set that is prepared
        job = start(*(words if more == ["--pack"] else []), *more, ranks=2)
        said, _ = job.communicate(timeout=120)
        assert job.returncode == 0, said
    status = {row.identity: row.status for row in rows(out).values()}
    assert status.pop("ann") == "excluded" and set(status.values()) == {"aligned"}
    assert not (out / "images/ann").exists() and (out / "report.html").exists()
    assert said.count("report.html") == 1 and (out / "train.rec").exists()


def test_a_refusal_ends_all_ranks(tmp_path):
    job = start("--src", tmp_path / "no.tgz", "--out", tmp_path / "out", ranks=2)
    said, _ = job.communicate(timeout=60)
    assert job.returncode != 0 and "error: " in said and "no.tgz is not there" in said
    assert not (tmp_path / "out").exists()


def ranks_of(job: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id, of those that torchrun has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == job.pid:
                variables = (folder / "environ").read_bytes().split(b"\0")
                ranks = [int(one[5:]) for one in variables if one.startswith(b"RANK=")]
                found.update({rank: int(folder.name) for rank in ranks})
    return found


def draw_many(src: Path, identities: int, photos: int, enlarged: int = 1) -> Path:
    for identity in range(identities):
        (src / f"id{identity}").mkdir(parents=True)
        for photo in range(photos):
            image = draw_face(0, identity, photo)[0].repeat(enlarged, 0).repeat(enlarged, 1)
            write_jpeg(src / f"id{identity}/{photo}.jpg", image)
    return src


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_fails_the_job_and_a_rerun_goes_on(victim, tmp_path):
    src = draw_many(tmp_path / "photos", 10, 10, enlarged=5)
    job = start("--src", src, "--out", tmp_path / "out", "--batch-size", 2, ranks=2)
    part = tmp_path / "out" / pre_process.PART.format(1)
    while not (part.exists() and part.stat().st_size):
        assert job.poll() is None
        time.sleep(0.02)
    os.kill(ranks_of(job)[victim], signal.SIGKILL)
    said, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert not (tmp_path / "out/manifest.csv").exists()
    rerun = start("--src", src, "--out", tmp_path / "out", ranks=2)
    said, _ = rerun.communicate(timeout=200)
    assert rerun.returncode == 0 and "photos are done already" in said, said
    pre_process.prepare(src, tmp_path / "whole", dataclasses.replace(OPTIONS, workers=2))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_within_seconds(workers, tmp_path):
    src = draw_many(tmp_path / "photos", 2, 4)
    big = draw_face(0, 0, 0)[0].repeat(20, 0).repeat(20, 1)  # seconds each
    for number in range(2 * workers + 2):
        write_jpeg(src / f"id1/big{number}.jpg", big)
    words = ["--src", src, "--out", tmp_path / "out", "--batch-size", 2, "--workers", workers]
    process = start(*words)
    journal = tmp_path / "out" / pre_process.JOURNAL
    while not (journal.exists() and journal.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(1)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert time.monotonic() - begun < 15  # 1 s on a quiet machine
    assert process.returncode == 130 and "what was done is kept" in said, said
    assert "Traceback" not in said
    time.sleep(1)
    assert not running(process.pid)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_write_that_fails_is_told_and_nothing_is_lost(raw, tmp_path, workers):
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500)); "
    limit += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    script = pre_process.config.ROOT / "pre_process.py"
    words = [script, "--src", raw, "--out", tmp_path / "out", "--workers", workers]
    done = subprocess.run(
        [sys.executable, "-c", limit, *map(str, words)],
        capture_output=True, text=True, timeout=100, cwd=script.parent,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ") and "what was finished is kept" in done.stderr
    assert f"{tmp_path}/out/images" in done.stderr and "bytes free" in done.stderr
    assert not (tmp_path / "out/manifest.csv").exists()
    assert not list((tmp_path / "out").rglob("*.jpg"))  # none is half there
    pre_process.prepare(raw, tmp_path / "out", OPTIONS)
    pre_process.prepare(raw, tmp_path / "whole", OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def running(group: int) -> list[str]:
    """Command lines of the processes of a group that are not over."""
    done = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    return [line[2] for line in lines if line[0] == str(group) and line[1][0] != "Z"]


@pytest.mark.slow
def test_row18_kills_lose_nothing(tmp_path):
    """SIGKILL at 20 random moments, then to the end: the same bytes as without a kill."""
    rng = np.random.default_rng(0)
    src = draw_many(tmp_path / "photos", 12, 10)
    write_jpeg(src / "id0/wall.jpg", np.full((176, 176, 3), 90, np.uint8))
    words = ["--batch-size", "4", "--workers", "2", "--keep-undetected"]

    def begin(out: Path) -> subprocess.Popen:
        return start(*words, "--src", src, "--out", out)

    begun = time.monotonic()
    whole = begin(tmp_path / "whole")
    assert whole.wait(timeout=120) == 0
    length = time.monotonic() - begun
    unfinished = 0
    for _ in range(20):
        process = begin(tmp_path / "out")
        time.sleep(rng.uniform(0.3, 0.95) * length)
        unfinished += process.poll() is None
        with contextlib.suppress(ProcessLookupError):  # at its end already
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "out/manifest.csv").exists():
            shutil.rmtree(tmp_path / "out")  # it got to the end: once more from the start
    assert unfinished >= 10
    last = begin(tmp_path / "out")
    assert last.wait(timeout=120) == 0, last.stdout.read()
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
