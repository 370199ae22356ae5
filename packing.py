"""A prepared set as RecordIO: train.rec, train.idx and property, in InsightFace's layout.

    python pre_process.py --out data/faces --pack

One large file instead of millions of small ones. The crops' own bytes are packed, in the order of
data_gen.load_faces: photo i of the set is record i + 1, and its label is its identity's class
number. train.pack.json says which photos are inside, so that a stale pack is never trained on; it
is written last. A pack that was stopped goes on where its parts on disk end.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

import manifest
from checkpoint import sha256, write_atomic, write_json
from config import InputError, naming
from recordio import IDX, PROPERTY, REC, content, encode, framing

MARK = "train.pack.json"
SIDE = 112
_SYNC = 64 << 20  # bytes between two syncs

Pairs = list[tuple[str, str]]  # identity and path of the crop below the folder, sorted


def digest(pairs: Pairs) -> str:
    """Of the photos and the order that a pack holds."""
    text = "\n".join(f"{identity}\t{image}" for identity, image in pairs)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def is_packed(folder: Path, pairs: Pairs) -> bool:
    """Whether train.rec of the folder holds these photos, in this order."""
    mark = _read_json(folder / MARK)
    try:
        size = os.stat(folder / REC).st_size
        os.stat(folder / IDX)
    except OSError:
        return False
    return mark.get("bytes") == size and mark.get("photos") == digest(pairs)


def pack(folder: Path, pairs: Pairs, progress: Callable[[int], object]) -> int:
    """Write train.rec, train.idx and property of a set -> bytes that were written, 0 for none.

    `progress` is told of photos as they are done. Raises InputError: a crop is lost or cut off.
    """
    counts = list(Counter(identity for identity, _ in pairs).values())  # in sorted order
    mark = {"photos": digest(pairs), "manifest": sha256(folder / manifest.NAME)}
    known = _read_json(folder / MARK)
    if mark.items() <= known.items() and is_packed(folder, pairs):
        return 0
    parts = _Parts(folder, mark)
    header, ranges = framing(counts)
    labels = np.repeat(np.arange(len(counts)), counts)  # (N,)
    if parts.number == 0:
        parts.add(content(header, 0))
    progress(parts.number - 1)
    for number in range(parts.number, len(pairs) + 1):
        crop = _read_crop(folder / pairs[number - 1][1])
        parts.add(content(float(labels[number - 1]), number, crop))
        progress(1)
    for number, pair in enumerate(ranges, start=len(pairs) + 1):
        if number >= parts.number:
            parts.add(content(pair, number))
    size = parts.close()
    (folder / MARK).unlink(missing_ok=True)  # between the old pack and the new one there is none
    parts.publish()
    write_atomic(folder / PROPERTY, f"{len(counts)},{SIDE},{SIDE}\n".encode())
    write_json(folder / MARK, {**mark, "bytes": size})
    return size


class _Parts:
    """train.rec and train.idx under temporary names; the index lists what is on disk for certain.

    `number` is that of the next record: above 0 where a run that was stopped left such files.
    """

    def __init__(self, folder: Path, mark: dict):
        self.folder = folder
        self.rec, self.idx, self.mark = (folder / f".{name}.tmp" for name in (REC, IDX, MARK))
        self.number, self.offset = 0, 0
        lines: list[str] = []
        if _read_json(self.mark) == mark and self.rec.exists() and self.idx.exists():
            text = self.idx.read_text()
            lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        if lines:  # the record of the last line is written anew
            number, offset = lines.pop().split("\t")
            if int(offset) <= self.rec.stat().st_size:
                self.number, self.offset = int(number), int(offset)
        write_json(self.mark, mark)
        self.rec_file: BinaryIO = open(self.rec, "r+b" if self.number else "wb")  # noqa: SIM115
        self.rec_file.truncate(self.offset)
        self.rec_file.seek(self.offset)
        self.idx_file = open(self.idx, "w")  # noqa: SIM115
        self.idx_file.writelines(lines if self.number else [])
        self.lines: list[str] = []
        self.synced = self.offset

    def add(self, record: bytes) -> None:
        data = encode(record)
        self.lines.append(f"{self.number}\t{self.offset}\n")
        with naming(self.rec):
            self.rec_file.write(data)
        self.number, self.offset = self.number + 1, self.offset + len(data)
        if self.offset - self.synced > _SYNC:
            self.sync()

    def sync(self) -> None:
        with naming(self.rec):
            self.rec_file.flush()
            os.fsync(self.rec_file.fileno())
        with naming(self.idx):
            self.idx_file.writelines(self.lines)
            self.idx_file.flush()
        self.lines, self.synced = [], self.offset

    def close(self) -> int:
        self.sync()
        os.fsync(self.idx_file.fileno())
        self.rec_file.close()
        self.idx_file.close()
        return self.offset

    def publish(self) -> None:
        os.replace(self.rec, self.folder / REC)
        os.replace(self.idx, self.folder / IDX)
        self.mark.unlink()


def _read_crop(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    if not data.startswith(b"\xff\xd8") or not data.endswith(b"\xff\xd9"):  # of a JPEG
        raise InputError(f"{path} is lost or cut off: run pre_process.py on its folder again")
    return data


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
