"""Photos under two identities. Run: python -m pytest tests/test_duplicates.py"""

import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import duplicates
from duplicates import BYTES, PIXELS, find_duplicates
from images import write_jpeg
from manifest import ALIGNED, EXCLUDED, REJECTED, Row


def photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def row(source: str, landmarks=None, size=(50, 40)) -> Row:
    found = landmarks is not None
    status = ALIGNED if found else REJECTED
    points = np.arange(10.0).reshape(5, 2) + landmarks if found else None
    return Row(source, source.split("/")[0], "", status, "", *size, int(found), landmarks=points)


def told(rows, root):
    return [
        (group.kind, [row.source for row in group.rows]) for group in find_duplicates(rows, root)
    ]


def test_same_bytes_and_same_pixels(tmp_path):
    for name in ("ann", "bob", "eve"):
        (tmp_path / name).mkdir()
    write_jpeg(tmp_path / "ann/1.jpg", photo(0))
    (tmp_path / "bob/1.jpg").write_bytes((tmp_path / "ann/1.jpg").read_bytes())
    Image.fromarray(photo(1)).save(tmp_path / "ann/2.png")
    Image.fromarray(photo(1)).save(tmp_path / "eve/2.webp", lossless=True)
    (tmp_path / "bob/2.png").write_bytes((tmp_path / "ann/2.png").read_bytes())
    write_jpeg(tmp_path / "ann/3.jpg", photo(2))  # its own twin, which is no fault
    write_jpeg(tmp_path / "ann/4.jpg", photo(2))
    write_jpeg(tmp_path / "eve/3.jpg", photo(3))  # alike in size and landmarks only
    rows = [
        *(row("ann/1.jpg", 5.0), row("ann/2.png", 9.0), row("ann/3.jpg", 3.0)),
        *(row("ann/4.jpg", 3.0), row("bob/1.jpg", 5.004), row("bob/2.png", 9.0)),
        *(row("eve/2.webp", 8.999), row("eve/3.jpg", 3.0), row("eve/lost.jpg", 9.0)),
    ]
    assert told(rows, tmp_path) == [
        (BYTES, ["ann/1.jpg", "bob/1.jpg"]),
        (PIXELS, ["ann/2.png", "bob/2.png", "eve/2.webp"]),
    ]


def test_photos_without_a_face_or_not_readable(tmp_path):
    (tmp_path / "ann").mkdir()
    (tmp_path / "bob").mkdir()
    Image.fromarray(photo(0)).save(tmp_path / "ann/1.png")
    Image.fromarray(photo(0)).save(tmp_path / "bob/1.png", compress_level=1)
    for name in ("ann", "bob"):
        (tmp_path / name / "half.jpg").write_bytes(b"\xff\xd8 cut off")
    rows = [row("ann/1.png"), row("ann/half.jpg", size=(0, 0))]
    rows += [row("bob/1.png"), row("bob/half.jpg", size=(0, 0))]
    assert told(rows, tmp_path) == [
        (PIXELS, ["ann/1.png", "bob/1.png"]), (BYTES, ["ann/half.jpg", "bob/half.jpg"])
    ]  # fmt: skip


def test_an_excluded_persons_photo_under_another_identity_is_found(tmp_path):
    for name in ("ann", "bob", "eve"):
        (tmp_path / name).mkdir()
    write_jpeg(tmp_path / "ann/1.jpg", photo(0))
    Image.fromarray(photo(1)).save(tmp_path / "ann/2.png")
    for source, twin in (("bob/1.jpg", "ann/1.jpg"), ("bob/2.png", "ann/2.png")):
        (tmp_path / source).write_bytes((tmp_path / twin).read_bytes())
    Image.fromarray(photo(1)).save(tmp_path / "eve/3.png", compress_level=1)  # bob's, packed anew
    ann = [replace(row(f"ann/{name}", size=(0, 0)), status=EXCLUDED) for name in ("1.jpg", "2.png")]
    rows = [*ann, row("bob/1.jpg", 5.0), row("bob/2.png", 9.0), row("eve/3.png", 9.0)]
    assert told(rows, tmp_path) == [
        (BYTES, ["ann/1.jpg", "bob/1.jpg"]), (PIXELS, ["ann/2.png", "bob/2.png", "eve/3.png"])
    ]  # fmt: skip


def test_photos_without_a_size_are_not_all_read(tmp_path, monkeypatch):
    """Excluded and unreadable ones: only what agrees in the file's size and end is read whole."""
    read, pixels = [], duplicates._pixels
    monkeypatch.setattr(
        duplicates, "_pixels", lambda *words: (read.append(words), pixels(*words))[1]
    )
    whole = type(tmp_path).read_bytes
    opened = []
    monkeypatch.setattr(
        type(tmp_path), "read_bytes", lambda path: (opened.append(path.name), whole(path))[1]
    )
    rows = []
    for name in ("ann", "bob"):
        (tmp_path / name).mkdir()
        for number in range(4):
            same_size = f"{name} {number}".encode() * 2000
            (tmp_path / name / f"{number}.jpg").write_bytes(same_size)
            rows.append(row(f"{name}/{number}.jpg", size=(0, 0)))
        (tmp_path / name / "empty.jpg").touch()  # the same bytes, but nothing
        os.mkfifo(tmp_path / name / "pipe.jpg")  # reading it would wait forever
        (tmp_path / name / "twin.jpg").write_bytes(b"\xff\xd8 cut off")
        rows += [
            row(f"{name}/{what}.jpg", size=(0, 0)) for what in ("empty", "pipe", "twin", "lost")
        ]
    assert told(rows, tmp_path) == [(BYTES, ["ann/twin.jpg", "bob/twin.jpg"])]
    assert opened == ["twin.jpg", "twin.jpg"] and not read


@pytest.mark.parametrize(("most", "found"), [(2000, 1), (1999, 0)])
def test_the_limit_of_pixels_is_the_options(tmp_path, most, found):
    for name, level in (("ann", 0), ("bob", 6)):
        (tmp_path / name).mkdir()
        Image.fromarray(photo(0)).save(tmp_path / name / "1.png", compress_level=level)
    rows = [row("ann/1.png"), row("bob/1.png")]
    assert len(find_duplicates(rows, tmp_path, most)) == found


def test_only_likely_photos_are_opened(tmp_path):
    rows = [row(f"p{n}/1.jpg", float(n)) for n in range(20)] + [row("q/1.jpg", 3.0, (51, 40))]
    assert told(rows, tmp_path) == []  # none of the files is there
