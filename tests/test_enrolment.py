"""Enrolling a gallery and searching it. Run: python -m pytest tests/test_enrolment.py"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from PIL import Image

import checkpoint
import enrolment
from config import InputError
from enrolment import Gallery, load, refresh
from face_reader import Face, Read

SETTINGS = {"model": "abc", "min_face_size": 20}


class Reader:
    """Instead of detector and network: a photo's embedding is its mean colour, grey has no face."""

    def __init__(self, seconds: float = 0.0):
        self.seen, self.seconds = 0, seconds

    def read(self, photos: list[np.ndarray], every: bool = False) -> list[Read]:
        self.seen += len(photos)
        time.sleep(self.seconds)
        return [self._one(photo) for photo in photos]

    def _one(self, photo: np.ndarray) -> Read:
        mean = photo.reshape(-1, 3).mean(axis=0)
        if np.ptp(mean) == 0:
            return Read([], 0, "no face")
        box, points = np.arange(4, dtype=np.float32), np.arange(10.0).reshape(5, 2)
        embedding = (mean / np.linalg.norm(mean)).astype(np.float32)
        return Read([Face(box, 1.0, points, photo, embedding)], 1)


def draw(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(path)
    return path


@pytest.fixture
def people(tmp_path) -> Path:
    """Ann twice, once in a deeper folder, Bob once, and once without a face."""
    gallery = tmp_path / "people"
    draw(gallery / "Ann/1.png", (200, 10, 10))
    draw(gallery / "Ann/2024/2.png", (190, 30, 10))
    draw(gallery / "Bob/1.png", (10, 200, 10))
    draw(gallery / "Bob/none.png", (90, 90, 90))
    return gallery


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "kept/people.safetensors"


def enrol(people: Path, file: Path, reader=None, settings=None) -> enrolment.Enrolled:
    reader = reader or Reader()
    return refresh(people, file, reader, settings or SETTINGS, 1_000_000)


def looked_at(people: Path, file: Path, settings=None) -> int:
    reader = Reader()
    enrol(people, file, reader, settings)
    return reader.seen


def plain(entries: dict) -> dict:
    return {
        photo: (e.size, e.mtime_ns, e.sha256, e.reason, *(
            None if a is None else a.tolist() for a in (e.box, e.landmarks, e.embedding)
        ))
        for photo, e in entries.items()
    }  # fmt: skip


def test_each_photo_is_looked_at_once_and_what_has_no_face_is_counted(people, file):
    enrolled = enrol(people, file)
    assert (enrolled.new, enrolled.removed, enrolled.outside) == (4, 0, [])
    assert list(enrolled.entries) == ["Ann/1.png", "Ann/2024/2.png", "Bob/1.png", "Bob/none.png"]
    assert {p: e.reason for p, e in enrolled.entries.items() if e.reason} == {
        "Bob/none.png": "no face"
    }
    before = file.read_bytes()
    again = Reader()
    assert plain(enrol(people, file, again).entries) == plain(enrolled.entries)
    assert again.seen == 0 and file.read_bytes() == before


def test_only_what_changed_is_looked_at_again(people, file):
    enrol(people, file)
    os.utime(people / "Ann/1.png")  # touched
    (people / "Bob/1.png").rename(people / "Bob/other name.png")
    shutil.copytree(people / "Ann", people / "Ann's twin")  # the same bytes
    assert looked_at(people, file) == 0
    old = (people / "Ann/1.png").stat()
    draw(people / "Ann/1.png", (10, 10, 200))
    os.utime(people / "Ann/1.png", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    draw(people / "Cy/1.png", (1, 2, 3))
    (people / "Bob/none.png").unlink()
    reader = Reader()
    enrolled = enrol(people, file, reader)
    assert (reader.seen, enrolled.new, enrolled.removed) == (2, 2, 1)
    fresh = enrol(people, file.with_name("fresh.safetensors"))
    assert plain(enrolled.entries) == plain(fresh.entries)
    assert file.read_bytes() == file.with_name("fresh.safetensors").read_bytes()


def test_another_model_starts_anew_and_says_so(people, file, capsys):
    enrol(people, file)
    assert looked_at(people, file, {**SETTINGS, "model": "def"}) == 4
    assert "another model" in capsys.readouterr().err
    assert looked_at(people, file, {**SETTINGS, "model": "def"}) == 0
    assert looked_at(people, file, {**SETTINGS, "min_face_size": 40}) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "page"])
def test_a_damaged_file_is_the_same_as_none(people, file, damage, capsys):
    enrol(people, file)
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes({
        "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "cut": whole[:-10],
        "empty": b"",
        "page": b"<html>not found</html>",
    }[damage])  # fmt: skip
    assert looked_at(people, file) == 4
    assert "WARNING" in capsys.readouterr().err
    assert file.read_bytes() == whole


def test_every_flipped_byte_is_seen_or_changes_nothing(people, file, capsys):
    expected = plain(enrol(people, file).entries)
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            found = load(file, SETTINGS)
        except InputError:  # the name of its one entry of metadata was hit
            continue
        assert found == {} or plain(found) == expected


def test_a_file_of_another_kind_is_left_alone(people, tmp_path):
    weights = tmp_path / "best.safetensors"
    weights.write_bytes(safetensors.numpy.save({"x": np.zeros(3)}, {"network": "r18"}))
    before = weights.read_bytes()
    with pytest.raises(InputError, match="is no enrolment"):
        enrol(people, weights)
    assert weights.read_bytes() == before


def test_what_cannot_be_read_is_counted_and_tried_again(people, file, tmp_path):
    good = (people / "Ann/1.png").read_bytes()
    (people / "Ann/cut.png").write_bytes(good[: len(good) // 2])
    (people / "Ann/page.jpg").write_text("<html>")
    (people / "Ann/void.jpg").touch()
    (people / "Ann/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (people / "Ann/folder.jpg").mkdir()
    os.mkfifo(people / "Ann/pipe.jpg")
    (people / "Ann/notes.txt").write_text("no photo")
    (people / "stray.png").write_bytes(good)
    (people / ".hidden").mkdir()
    elsewhere = draw(tmp_path / "elsewhere/1.png", (3, 2, 1))
    (people / "Cy").symlink_to(elsewhere.parent)  # a folder elsewhere
    (people / "Ann/link.png").symlink_to(elsewhere)
    (people / "Ann/circle").symlink_to(people / "Ann")
    enrolled = enrol(people, file)
    reasons = {p: e.reason for p, e in enrolled.entries.items() if e.reason}
    assert reasons == {
        "Ann/cut.png": "truncated",
        "Ann/page.jpg": "not an image",
        "Ann/void.jpg": "empty file",
        "Ann/gone.jpg": "no such file or directory",
        "Ann/folder.jpg": "not a regular file",
        "Ann/pipe.jpg": "not a regular file",
        "Bob/none.png": "no face",
    }
    assert enrolled.outside == ["stray.png"]
    assert {"Cy/1.png", "Ann/link.png"} <= enrolled.entries.keys()
    (people / "Ann/cut.png").write_bytes(good)  # mended
    assert enrol(people, file).entries["Ann/cut.png"].reason == ""


def test_a_gallery_without_any_face_is_remembered_too(tmp_path, file):
    draw(tmp_path / "grey/Ann/1.png", (9, 9, 9))
    assert looked_at(tmp_path / "grey", file) == 1
    assert looked_at(tmp_path / "grey", file) == 0
    draw(tmp_path / "grey/Ann/2.png", (9, 9, 10))
    assert looked_at(tmp_path / "grey", file) == 1


def test_names_of_any_kind_come_back(people, file):
    names = ["Zoë 王", "two\nlines", '"quoted" \\ <b>', os.fsdecode(b"latin-\xe9")]
    for number, name in enumerate(names):
        draw(people / name / "x.png", (5, 100 + number, 7))
    enrolled = enrol(people, file)
    assert {f"{name}/x.png" for name in names} <= enrolled.entries.keys()
    assert looked_at(people, file) == 0
    assert set(names) <= set(Gallery.of(load(file, SETTINGS)).identities)


def test_a_folder_that_is_no_gallery(tmp_path, file):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    draw(tmp_path / "flat/1.png", (1, 2, 3))
    for gallery, said in (
        (tmp_path / "missing", "is not there"),
        (tmp_path / "flat/1.png", "is not a folder"),
        (tmp_path / "empty", "holds no photo"),
        (tmp_path / "flat", "1 photos lie outside any folder"),
    ):
        with pytest.raises(InputError, match=said):
            enrol(gallery, file)
    assert not file.parent.exists()


def test_an_unreadable_photo_is_no_work_for_every_call(people, file):
    """Neither lock nor write, where what could not be read can't be for the same reason."""
    (people / "Ann/page.jpg").write_text("<html>")
    (people / "Ann/gone.jpg").symlink_to(people / "nowhere.jpg")
    os.mkfifo(people / "Ann/pipe.jpg")
    Image.new("RGB", (1200, 900)).save(people / "Ann/large.png")  # over 1 million pixels
    known = enrol(people, file).entries
    unhashed = {photo for photo, entry in known.items() if not entry.sha256}
    assert unhashed == {"Ann/gone.jpg", "Ann/pipe.jpg", "Ann/large.png"}
    before = file.stat()
    pid = os.fork()
    if pid == 0:  # another process is writing, for all that this one knows
        with checkpoint.lock(file.parent, f".{file.name}.lock"):
            (people.parent / "held").touch()
            while not (people.parent / "done").exists():
                time.sleep(0.01)
        os._exit(0)
    while not (people.parent / "held").exists():
        time.sleep(0.01)
    try:
        assert plain(enrol(people, file).entries) == plain(known)
    finally:
        (people.parent / "done").touch()
        os.waitpid(pid, 0)
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    reader = Reader()  # with a higher limit, the large one is looked at
    assert refresh(people, file, reader, SETTINGS, 2_000_000).entries["Ann/large.png"].sha256
    assert reader.seen == 1


def test_a_copy_is_looked_at_once_in_one_run_too(people, file, monkeypatch):
    monkeypatch.setattr(enrolment, "_WINDOW", 1)
    shutil.copytree(people / "Ann", people / "Zoe")
    reader = Reader()
    enrolled = enrol(people, file, reader)
    assert reader.seen == 4 and len(Gallery.of(enrolled.entries).photos) == 5


def test_a_batch_holds_no_more_pixels_than_its_bound(people, file, monkeypatch):
    sizes = []

    class Watched(Reader):
        def read(self, photos, every=False):
            sizes.append(len(photos))
            return super().read(photos)

    monkeypatch.setattr(enrolment, "_PIXELS", 700)  # of photos with 400 each
    enrol(people, file, Watched())
    assert sizes == [2, 2]


@pytest.mark.parametrize("key", ["embeddings", "boxes", "landmarks"])
def test_a_crafted_file_is_a_damaged_one(people, file, capsys, key):
    """Its sha256 is right, and it has fewer faces than it lists."""
    enrol(people, file)
    with safetensors.safe_open(file, framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        about = json.loads(opened.metadata()["enrolment"])
    for crafted in ({**tensors, key: tensors[key][:-1]},
                    {name: array if name == "photos" else array[:1]
                     for name, array in tensors.items()}):  # fmt: skip
        about["sha256"] = enrolment._digest(crafted)
        file.write_bytes(safetensors.numpy.save(crafted, {"enrolment": json.dumps(about)}))
        assert load(file, SETTINGS) == {}
        assert "is damaged" in capsys.readouterr().err


@pytest.fixture
def many(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(enrolment, "_WINDOW", 4)
    for number in range(40):
        draw(tmp_path / f"many/{number // 4}/{number}.png", (number, 100, 7))
    return tmp_path / "many"


def test_a_killed_enrolment_goes_on(many, file, monkeypatch):
    monkeypatch.setattr(enrolment, "SAVE_EVERY", 0)
    pid = os.fork()
    if pid == 0:
        enrol(many, file, Reader(0.05))
        os._exit(0)
    while not file.exists():
        time.sleep(0.01)
    time.sleep(0.12)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    done = len(load(file, SETTINGS))
    assert 4 <= done < 40
    assert looked_at(many, file) == 40 - done
    enrol(many, file.with_name("whole.safetensors"))
    assert file.read_bytes() == file.with_name("whole.safetensors").read_bytes()
    assert not list(file.parent.glob("*.tmp"))


def test_what_was_done_before_ctrl_c_is_kept(many, file):
    class Stopped(Reader):
        def read(self, photos, every=False):
            if self.seen >= 12:
                raise KeyboardInterrupt
            return super().read(photos)

    with pytest.raises(KeyboardInterrupt):
        enrol(many, file, Stopped())
    assert len(load(file, SETTINGS)) == 12
    assert looked_at(many, file) == 28


def test_two_at_once_wait_for_each_other_only_where_there_is_something_to_do(people, file):
    enrol(people, file)
    with checkpoint.lock(file.parent, f".{file.name}.lock"):
        assert looked_at(people, file) == 0
        draw(people / "Cy/1.png", (1, 2, 3))
        pid = os.fork()
        if pid == 0:  # another process: a lock of this one's own would let it in
            try:
                enrol(people, file)
            except InputError as error:
                os._exit(7 if "in use by process" in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert looked_at(people, file) == 1


# --- the search


def made(count: int, identities: int, size: int = 512) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((count, size)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    photos = [f"p{rng.integers(identities)}/{number}.jpg" for number in range(count)]
    return photos, rows


def test_the_nearest_photo_of_each_identity_by_a_plain_loop():
    photos, rows = made(300, 20, 16)
    faces = made(3, 1, 16)[1][::-1] + 0.1
    faces = (faces / np.linalg.norm(faces, axis=1, keepdims=True)).astype(np.float32)
    found = Gallery(photos, rows).search(faces, 5)
    assert len(found) == 3
    for face, matches in zip(faces, found, strict=True):
        nearest: dict[str, tuple[float, str]] = {}
        for photo, row in zip(photos, rows, strict=True):
            angle = float(np.degrees(np.arccos(np.float64(row) @ np.float64(face))))
            name = photo.split("/")[0]
            nearest[name] = min(nearest.get(name, (999.0, "")), (angle, photo))
        expected = sorted((angle, name, photo) for name, (angle, photo) in nearest.items())[:5]
        assert [(m.identity, m.photo) for m in matches] == [(n, p) for _, n, p in expected]
        assert [m.angle for m in matches] == pytest.approx([a for a, _, _ in expected], abs=1e-3)


def test_fewer_identities_than_asked_for():
    photos, rows = made(6, 2)
    matches = Gallery(photos, rows).search(rows[:1], 10)[0]
    assert len(matches) == len({photo.split("/")[0] for photo in photos})
    assert matches[0].photo == photos[0] and matches[0].angle == pytest.approx(0, abs=1e-3)


def test_ten_thousand_faces_in_under_50_ms():
    """On 2 cores; best of 5, since other work may be on the machine."""
    gallery = Gallery(*made(10_000, 3_000))
    face = made(1, 1)[1]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matches = gallery.search(face, 5)[0]
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    assert len(matches) == 5
    assert min(seconds) < 0.05, seconds
