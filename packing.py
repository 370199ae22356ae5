"""A prepared set as RecordIO: train.rec, train.idx and property, in InsightFace's layout.

    python pre_process.py --out data/faces --pack

One large file instead of millions of small ones. The crops' own bytes are packed, in the order of
data_gen.load_faces: photo i of the set is record i + 1, and its label is its identity's class
number. train.pack.json says which photos are inside and of which manifest, so that a stale pack is
never trained on; it is written last. A pack that was stopped goes on where its parts on disk end.
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
from recordio import IDX, MAGIC, PROPERTY, REC, content, encode, framing

MARK = "train.pack.json"
SIDE = 112
_SYNC = 64 << 20  # bytes between two syncs

Pairs = list[tuple[str, str]]  # identity and path of the crop below the folder, sorted


def digest(pairs: Pairs) -> str:
    """Of the photos and the order that a pack holds."""
    text = "\n".join(f"{identity}\t{image}" for identity, image in pairs)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def is_packed(folder: Path, pairs: Pairs) -> bool:
    """Whether train.rec of the folder holds these photos, in this order, as the manifest has them.

    A crop that was made anew has another row in the manifest, whose sha256 takes about a second a
    gigabyte (5 million rows): less than reading its rows did.
    """
    mark = _read_json(folder / MARK)
    try:
        size = os.stat(folder / REC).st_size
        os.stat(folder / IDX)
        return (
            mark.get("bytes") == size
            and mark.get("photos") == digest(pairs)
            and mark.get("manifest") == sha256(folder / manifest.NAME)
        )
    except OSError:
        return False


def pack(folder: Path, pairs: Pairs, progress: Callable[[int], object]) -> int:
    """Write train.rec, train.idx and property of a set -> bytes that were written, 0 for none.

    `progress` is told of photos as they are done. Raises InputError: a crop is lost or cut off.
    """
    counts = list(Counter(identity for identity, _ in pairs).values())  # in sorted order
    if is_packed(folder, pairs):
        return 0
    mark = {"photos": digest(pairs), "manifest": sha256(folder / manifest.NAME)}
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
        known = self._known() if _read_json(self.mark) == mark else []
        self.number, self.offset = max(len(known) - 1, 0), known[-1] if known else 0
        if not self.number:  # of another set, or damaged: gone before the mark says they are ours
            self.rec.unlink(missing_ok=True)
            self.idx.unlink(missing_ok=True)
            write_json(self.mark, mark)
        self.rec_file = _open_at(self.rec, self.offset)
        self.idx_file = _open_at(self.idx, len(_index(known[:-1])))
        self.lines: list[bytes] = []
        self.synced = self.offset

    def _known(self) -> list[int]:
        """Offsets of the records that the index lists; none where either file is damaged.

        The record of the last one is to be written anew: nothing says where it ends.
        """
        try:
            data = self.idx.read_bytes()
            data = data[: data.rfind(b"\n") + 1]  # the last line may be half there
            offsets = [int(line.split(b"\t")[1]) for line in data.splitlines()]
            if _index(offsets) != data:
                return []
            places = np.array(offsets, dtype=np.int64)
            words = np.memmap(self.rec, "<u4", "r", shape=(self.rec.stat().st_size // 4,))
            whole = (
                places[0] == 0
                and (np.diff(places) > 0).all()
                and (places % 4 == 0).all()
                and (words[places // 4] == np.frombuffer(MAGIC, "<u4")).all()
                and (words[places // 4 + 4] == np.arange(len(places))).all()  # the record's id
            )
        except (OSError, ValueError, IndexError, OverflowError):  # NULs of a power cut; cut off
            return []
        return offsets if whole else []

    def add(self, record: bytes) -> None:
        data = encode(record)
        self.lines.append(f"{self.number}\t{self.offset}\n".encode())
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
            os.fsync(self.idx_file.fileno())
        self.lines, self.synced = [], self.offset

    def close(self) -> int:
        self.sync()
        self.rec_file.close()
        self.idx_file.close()
        return self.offset

    def publish(self) -> None:
        os.replace(self.rec, self.folder / REC)
        os.replace(self.idx, self.folder / IDX)
        self.mark.unlink()


def _index(offsets: list[int]) -> bytes:
    return "".join(f"{number}\t{offset}\n" for number, offset in enumerate(offsets)).encode()


def _open_at(path: Path, size: int) -> BinaryIO:
    """To go on writing behind the first `size` bytes; what comes after them is dropped."""
    file = open(path, "r+b" if path.exists() else "wb")  # noqa: SIM115
    file.truncate(size)
    file.seek(size)
    return file


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
