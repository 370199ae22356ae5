"""Photos that stand under two identities: the same bytes, or the same pixels.

    for group in find_duplicates(rows, root):
        print(group.kind, [row.source for row in group.rows])

Only likely pairs are opened. The same pixels give the same size and, but for the noise of the batch
that they were detected in, the same landmarks; photos without a face are compared by their size
alone. Of an unreadable photo, and of one that was left out by name, the bytes are compared with
those of all photos: the files' sizes first, then their ends.
"""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images import MAX_PIXELS, UnreadableImage, read_image
from manifest import Row

BYTES, PIXELS = "same bytes", "same pixels"
# Landmarks are rounded to whole pixels after three shifts. Two that differ by 0.01 px in each
# coordinate are parted by one rounding with a chance of 10 %, by all three with 0.1 %.
_SHIFTS = (0.0, 1 / 3, 2 / 3)
_TAIL = 4096  # bytes at the end of a file: of the same size, hardly two photos share them


class Group(NamedTuple):
    kind: str
    rows: list[Row]


def find_duplicates(rows: list[Row], root: Path, max_pixels: int = MAX_PIXELS) -> list[Group]:
    """Groups of photos of different identities, in the order of their first photo."""
    hashes: dict[int, str] = {}  # of the bytes, by place in `rows`
    for index in sorted(_likely(rows) | _same_ends(rows, root)):
        try:
            data = (root / rows[index].source).read_bytes()
        except OSError:  # lost, or never was a file
            continue
        hashes[index] = hashlib.sha256(data).hexdigest()
    keys: dict[str, str] = {}  # bytes -> pixels: each file is decoded once
    groups: dict[str, list[int]] = defaultdict(list)
    for index, name in hashes.items():
        if rows[index].width and name not in keys:
            keys[name] = _pixels(root / rows[index].source, max_pixels) or name
    for index, name in hashes.items():
        groups[keys.get(name, name)].append(index)
    return [
        Group(
            BYTES if len({hashes[index] for index in same}) == 1 else PIXELS,
            [rows[index] for index in same],
        )
        for same in groups.values()
        if len({rows[index].identity for index in same}) > 1
    ]


def _likely(rows: list[Row]) -> set[int]:
    """Indices of the photos that agree with one of another identity in size and landmarks."""
    likely: set[int] = set()
    for shift in _SHIFTS:
        alike: dict[tuple, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            if not row.width:
                continue
            found = row.faces and row.landmarks is not None
            points = np.floor(row.landmarks + shift).astype(int).tobytes() if found else b""
            alike[row.width, row.height, points].append(index)
        for same in alike.values():
            if _people(rows, same) > 1:
                likely.update(same)
    return likely


def _same_ends(rows: list[Row], root: Path) -> set[int]:
    """Indices of the photos that were not measured, and of all that may hold the same bytes."""
    unknown = {index for index, row in enumerate(rows) if not row.width}
    if not unknown:
        return set()
    likely = set(range(len(rows)))
    for key in (_file_size, _end):
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for index in sorted(likely):
            found = key(root / rows[index].source)
            if found is not None:
                alike[found].append(index)
        groups: Iterable[list[int]] = alike.values()
        likely = {
            index
            for same in groups
            if _people(rows, same) > 1 and not unknown.isdisjoint(same)
            for index in same
        }
    return likely


def _people(rows: list[Row], indices: list[int]) -> int:
    return len({rows[index].identity for index in indices})


def _file_size(path: Path) -> int | None:
    """None: lost, empty, or no file; reading a FIFO would wait forever."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size or None if stat.S_ISREG(found.st_mode) else None


def _end(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
            return hashlib.sha256(file.read()).digest()
    except OSError:
        return None


def _pixels(path: Path, max_pixels: int) -> str:
    try:
        image = read_image(path, max_pixels)
    except UnreadableImage:
        return ""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
