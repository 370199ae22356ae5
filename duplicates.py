"""Photos that stand under two identities: the same bytes, or the same pixels.

    for group in find_duplicates(rows, root):
        print(group.kind, [row.source for row in group.rows])

Only likely pairs are opened. The same pixels give the same size and, but for the noise of the batch
that they were detected in, the same landmarks; photos without a face are compared by their size
alone. Of an unreadable photo the bytes are compared.
"""

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images import UnreadableImage, read_image
from manifest import Row

BYTES, PIXELS = "same bytes", "same pixels"
# Landmarks are rounded to whole pixels after three shifts. Two that differ by 0.01 px in each
# coordinate are parted by one rounding with a chance of 10 %, by all three with 0.1 %.
_SHIFTS = (0.0, 1 / 3, 2 / 3)


class Group(NamedTuple):
    kind: str
    rows: list[Row]


def find_duplicates(rows: list[Row], root: Path) -> list[Group]:
    """Groups of photos of different identities, in the order of their first photo."""
    hashes: dict[int, str] = {}  # of the bytes, by place in `rows`
    for index in sorted(_likely(rows)):
        try:
            data = (root / rows[index].source).read_bytes()
        except OSError:  # lost, or never was a file
            continue
        hashes[index] = hashlib.sha256(data).hexdigest()
    keys: dict[str, str] = {}  # bytes -> pixels: each file is decoded once
    groups: dict[str, list[int]] = defaultdict(list)
    for index, name in hashes.items():
        if name not in keys:
            keys[name] = (_pixels(root / rows[index].source) if rows[index].width else "") or name
        groups[keys[name]].append(index)
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
            found = row.faces and row.landmarks is not None
            points = np.floor(row.landmarks + shift).astype(int).tobytes() if found else b""
            alike[row.width, row.height, points].append(index)
        for same in alike.values():
            if len(same) > 1 and len({rows[index].identity for index in same}) > 1:
                likely.update(same)
    return likely


def _pixels(path: Path) -> str:
    try:
        image = read_image(path)
    except UnreadableImage:
        return ""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
