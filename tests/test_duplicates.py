"""Photos under two identities. Run: python -m pytest tests/test_duplicates.py"""

import numpy as np
from PIL import Image

from duplicates import BYTES, PIXELS, find_duplicates
from images import write_jpeg
from manifest import ALIGNED, REJECTED, Row


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


def test_only_likely_photos_are_opened(tmp_path):
    rows = [row(f"p{n}/1.jpg", float(n)) for n in range(20)] + [row("q/1.jpg", 3.0, (51, 40))]
    assert told(rows, tmp_path) == []  # none of the files is there
