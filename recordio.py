"""RecordIO as InsightFace lays it out, without mxnet, and its .bin verification sets.

    records = RecordFile(Path("ms1m/train.rec"))        # train.idx lies beside it
    numbers = records.images()                          # int32 (N,): which records are photos
    labels, faults = records.scan(numbers)              # int32 (N,), and what is damaged
    image = records.read(numbers[0]).payload            # an encoded JPEG
    images, same = read_bin(Path("ms1m/lfw.bin"))       # 2P encoded images, bool (P,)

A record is magic, kind << 29 | length, content, zeros up to a multiple of 4 bytes. Where the
content holds the magic word at such a multiple, the word is left out and the record split there
into parts of kind 1, 2 ..., 3 (dmlc-core's recordio). The content is flag, label, id, id2, then
`flag` labels (if flag is 0, `label` is the only one), then the image. In a training set record 0 is
a header, whose labels are the numbers of the first identity record and of the last one + 1; photos
are 1, 2, ...; after them stands one record an identity, whose labels are its first photo and its
last + 1. train.idx has a line `number<TAB>offset` for each record; property is
`identities,height,width`.
"""

import os
import pickle
import pickletools
import struct
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import InputError

REC, IDX, PROPERTY = "train.rec", "train.idx", "property"
MAGIC = struct.pack("<I", 0xCED7230A)
_FRAME = struct.Struct("<4sI")  # magic, kind << 29 | length
_HEADER = struct.Struct("<IfQQ")  # flag, label, id, id2
_LENGTH = (1 << 29) - 1
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)  # kinds of a part
_BLOCK = 8 << 20  # bytes read at once where all headers are read
_EXACT = 1 << 24  # whole numbers up to this one are exact in the float32 of a label
_HEADS = 36  # bytes of a record up to its first label of several


class BadRecord(InputError):
    """A record that can't be used: its number, its offset, and what is wrong."""


class Record(NamedTuple):
    labels: tuple[float, ...]  # one, or `flag` of them
    payload: bytes  # the encoded image; empty in header and identity records


# --------------------------------------------------------------------------------------------------
# reading


class RecordFile:
    """A .rec with its .idx. Each process opens it for itself, once, and reads by position."""

    def __init__(self, path: Path):
        """Raises InputError: not there, or an index that does not belong to the records."""
        self.path = Path(path)
        self._handle, self._process = -1, -1
        try:
            self.size = os.stat(self.path).st_size
            self.starts = _read_index(self.path.with_suffix(".idx"))  # int64 (R,)
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename} is not there: {self.path.name} and its .idx belong together"
            ) from error
        if (np.diff(self.starts) > 0).all():
            bounds = np.append(self.starts, self.size)
            self.starts, self.ends = bounds[:-1], bounds[1:]  # two views of one array
        else:
            order = np.argsort(self.starts)
            self.ends = np.empty_like(self.starts)
            self.ends[order] = np.append(self.starts[order][1:], self.size)
        outside = np.flatnonzero((self.starts % 4 != 0) | (self.starts + 32 > self.size))
        if len(outside):
            raise self._bad(
                int(outside[0]), f"does not fit into the {self.size:,} bytes of the file"
            )
        self.read(int(np.argmax(self.starts)))  # ends where the file ends, or the index is another

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict:
        """For a loader process that is spawned: it opens the file itself."""
        return {**self.__dict__, "_handle": -1, "_process": -1}

    def __del__(self) -> None:
        if getattr(self, "_process", -1) == os.getpid():
            os.close(self._handle)

    def read(self, number: int) -> Record:
        """Raises BadRecord: outside the file, or damaged."""
        if not 0 <= number < len(self.starts):
            raise BadRecord(f"{self.path}: record {number} is not one of {len(self.starts):,}")
        start, end = int(self.starts[number]), int(self.ends[number])
        content = self._join(number, self._pread(start, end - start))
        if len(content) < _HEADER.size:
            raise self._bad(number, f"has {len(content)} bytes, fewer than its header")
        flag, label, _, _ = _HEADER.unpack_from(content)
        if _HEADER.size + 4 * flag > len(content):
            raise self._bad(number, f"is said to have {flag} labels, more than its bytes hold")
        if not flag:
            return Record((label,), content[_HEADER.size :])
        labels = struct.unpack_from(f"<{flag}f", content, _HEADER.size)
        return Record(labels, content[_HEADER.size + 4 * flag :])

    def label(self, number: int) -> int:
        """Class of a photo. Raises BadRecord: damaged, or no whole number."""
        return self._class(number, self.read(number))

    def images(self) -> np.ndarray:
        """int32 (N,) numbers of the photos. Raises InputError: header and index disagree."""
        header = self.read(0)
        if len(header.labels) < 2 or header.payload:
            return np.arange(len(self), dtype=np.int32)  # without header: all are photos
        first, last = header.labels[:2]
        if last > _EXACT:  # rounded by the float32: told by the records themselves, at the end
            first = len(self)
            while first > 1 and not self.read(first - 1).payload:
                first -= 1
        elif last != len(self) or not 1 <= first <= last or first % 1:
            raise InputError(
                f"{self.path}: its header counts {last:g} records ({first:g} before the "
                f"identities), its index {len(self)}: index and records are of different "
                "sets, or the index is cut off; fetch both again"
            )
        return np.arange(1, int(first), dtype=np.int32)

    def scan(self, numbers: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Look at the header of each record -> int32 (N,) classes, and what is wrong by number.

        Reads the file once from start to end, at the speed of the disk.
        """
        labels = np.full(len(numbers), -1, dtype=np.int32)
        faults: dict[int, str] = {}
        starts, ends = self.starts[numbers], self.ends[numbers]
        order = np.argsort(starts, kind="stable")
        at = 0
        while at < len(order):
            base = int(starts[order[at]])
            stop = max(at + 1, int(np.searchsorted(starts, base + _BLOCK, sorter=order)))
            part = order[at:stop]
            labels[part], good = self._heads(base, starts[part], ends[part])
            for index in part[~good]:  # split, or damaged: rare, so one by one
                try:
                    labels[index] = self.label(int(numbers[index]))
                except BadRecord as error:
                    faults[int(numbers[index])] = str(error)
            at = stop
        return labels, faults

    def _heads(
        self, base: int, starts: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Classes of the records in one block, and which are whole and have a whole label."""
        data = self._pread(base, int(starts[-1]) - base + _HEADS)
        block = np.frombuffer(data, dtype="<u4", count=len(data) // 4)
        words = (starts - base) // 4
        good = words + _HEADS // 4 <= len(block)  # of a file that was cut off meanwhile, not all
        words = np.where(good, words, 0)
        if not good.any():
            return np.full(len(starts), -1, dtype=np.int32), good
        kind_length, flag = block[words + 1], block[words + 2].astype(np.int64)
        length = (kind_length & _LENGTH).astype(np.int64)
        good &= (block[words] == np.frombuffer(MAGIC, dtype="<u4")) & (kind_length >> 29 == _WHOLE)
        good &= (starts + 8 + (length + 3) // 4 * 4 == ends) & (length > _HEADER.size + 4 * flag)
        label = np.where(flag == 0, block[words + 3], block[words + 8]).view("<f4")
        good &= (label >= 0) & (label < _EXACT) & (label == np.floor(label))
        return np.where(good, label, -1).astype(np.int32), good

    def labels_by_range(self, photos: int) -> np.ndarray | None:
        """int32 (N,) classes of photos 1 to N by the identity records, in a moment.

        None where there are none, or where the photos at the ends of a range say otherwise: above
        16,777,216 photos the ranges' float32 are rounded. Then `scan` gives them.
        """
        if photos in (0, len(self), len(self) - 1):
            return None
        labels = np.empty(photos, dtype=np.int32)
        expected = 1
        for number in range(photos + 1, len(self)):
            first, last = (self.read(number).labels + (0.0,))[:2]
            if first != expected or not first < last <= photos + 1 or last % 1:
                return None
            first, expected = int(first), int(last)
            label = self.label(first)
            if self.label(expected - 1) != label:
                return None
            labels[first - 1 : expected - 1] = label
        return labels if expected == photos + 1 else None

    def _class(self, number: int, record: Record) -> int:
        label = record.labels[0]
        if not 0 <= label < _EXACT or label % 1:
            raise self._bad(number, f"has the label {label:g}, no whole number from 0 on")
        if not record.payload:
            raise self._bad(number, "holds no image")
        return int(label)

    def _join(self, number: int, data: bytes) -> bytes:
        """The content of a record of one part or several. `data` ends where the next one starts."""
        parts: list[bytes] = []
        at = 0
        while True:
            if at + _FRAME.size > len(data):
                raise self._bad(number, "is cut off")
            magic, kind_length = _FRAME.unpack_from(data, at)
            kind, length = kind_length >> 29, kind_length & _LENGTH
            if magic != MAGIC:
                raise self._bad(number, f"starts with {magic.hex()}, not with {MAGIC.hex()}")
            if (kind in (_WHOLE, _FIRST)) != (not parts) or kind > _LAST:
                raise self._bad(number, f"has a part of kind {kind} in the wrong place")
            at += _FRAME.size
            if at + length > len(data):
                raise self._bad(number, f"is cut off: {length:,} bytes, {len(data) - at:,} there")
            parts.append(data[at : at + length])
            at += (length + 3) // 4 * 4
            if kind in (_WHOLE, _LAST):
                break
        if at != len(data):
            raise self._bad(number, f"ends {abs(len(data) - at):,} bytes from where the index says")
        return MAGIC.join(parts)

    def _bad(self, number: int, what: str) -> BadRecord:
        return BadRecord(
            f"{self.path}: record {number} at offset {self.starts[number]} {what}: "
            "fetch .rec and .idx again"
        )

    def _pread(self, offset: int, length: int) -> bytes:
        """Read by position: processes that share a handle after a fork do not share a place."""
        if self._process != os.getpid():
            self._handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._process = os.getpid()
        parts = []
        while length > 0:  # Linux reads 2 GB at most in one call
            part = os.pread(self._handle, length, offset)
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_index(path: Path) -> np.ndarray:
    """int64 (R,) offsets by number. Raises InputError: a number is missing, twice, or no number.

    In blocks: for 17 million lines a Python list would take gigabytes.
    """
    blocks = []
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            block += file.readline()
            if block.translate(None, b"0123456789\t\r\n "):
                raise InputError(
                    f"{path} is not an index (lines of number<TAB>offset): fetch it again"
                )
            numbers = np.fromstring(block, dtype=np.int64, sep=" ")
            if len(numbers) != 2 * len(block.splitlines()):
                raise InputError(
                    f"{path} has a line without number and offset after record "
                    f"{sum(map(len, blocks)) + len(numbers) // 2 - 1}: fetch it again"
                )
            blocks.append(numbers.reshape(-1, 2))
    table = np.concatenate(blocks) if blocks else np.empty((0, 2), dtype=np.int64)  # (R, 2)
    if not len(table):
        raise InputError(f"{path} is empty: fetch it again")
    order = None if (np.diff(table[:, 0]) > 0).all() else np.argsort(table[:, 0], kind="stable")
    table = table if order is None else table[order]
    wrong = np.flatnonzero(table[:, 0] != np.arange(len(table)))
    if len(wrong):
        raise InputError(
            f"{path}: record {wrong[0]} is missing or stands twice: the index is damaged; "
            "fetch it again"
        )
    return np.ascontiguousarray(table[:, 1])


# --------------------------------------------------------------------------------------------------
# writing


def encode(content: bytes) -> bytes:
    """The content of a record -> its bytes in the file; split where it holds the magic word."""
    if len(content) > _LENGTH:
        raise ValueError(f"a record of {len(content):,} bytes: {_LENGTH:,} at most")
    cuts, at = [], content.find(MAGIC)
    while at >= 0:
        if at % 4 == 0:
            cuts.append(at)
        at = content.find(MAGIC, at + (4 if at % 4 == 0 else 1))
    parts, start = [], 0
    for cut in cuts:
        parts.append(content[start:cut])
        start = cut + 4
    parts.append(content[start:])
    kinds = [_FIRST, *[_MIDDLE] * (len(parts) - 2), _LAST] if len(parts) > 1 else [_WHOLE]
    framed = [
        _FRAME.pack(MAGIC, kind << 29 | len(part)) + part
        for kind, part in zip(kinds, parts, strict=True)
    ]
    return b"".join(framed) + b"\0" * (-len(content) % 4)


def content(labels: float | Sequence[float], number: int, payload: bytes = b"") -> bytes:
    """Header, labels and image, as mxnet packs them: one label in the header, several behind it."""
    if isinstance(labels, (int, float)):
        return _HEADER.pack(0, labels, number, 0) + payload
    return (
        _HEADER.pack(len(labels), 0, number, 0) + struct.pack(f"<{len(labels)}f", *labels) + payload
    )


def framing(counts: Sequence[int]) -> tuple[tuple[int, int], Iterator[tuple[int, int]]]:
    """Photos of each identity -> labels of the header, and of each identity's record."""
    ends = np.cumsum(counts, dtype=np.int64) + 1
    photos = int(ends[-1])
    ranges = zip((ends - np.asarray(counts)).tolist(), ends.tolist(), strict=True)
    return (photos, photos + len(counts)), ranges


# --------------------------------------------------------------------------------------------------
# .bin verification sets

# Pickles that hold lists, tuples, bytes, ints and booleans need no other operations. Python 2's
# `str` is taken for bytes. Text is let through as far as the check of the result, since the name of
# a global is pushed as text: so the refusal can say which.
_ALLOWED = frozenset(
    ["PROTO", "FRAME", "STOP", "MARK", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"]
    + ["EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NEWTRUE", "NEWFALSE"]
    + ["BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING"]
    + ["UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "INT", "BININT", "BININT1", "BININT2", "LONG1"]
    + ["MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"]
)
_GLOBALS = ("GLOBAL", "STACK_GLOBAL", "INST")  # find_class is called, and raises
_CONTAINERS = 16  # a set has three: the images, the answers, and both together
_MOST = 4 << 30  # bytes of a .bin; the largest published one has 0.1 GB


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and code is never loaded")


def read_bin(path: Path) -> tuple[list[bytes], np.ndarray]:
    """A verification set -> 2P encoded images (pair i is 2i and 2i+1), and bool (P,) same or not.

    Raises InputError: not there, or anything else than lists, tuples, bytes, ints and booleans.
    """
    try:
        if not os.path.isfile(path):
            raise InputError(f"{path} is not a file: name a .bin verification set")
        if os.path.getsize(path) > _MOST:
            raise InputError(f"{path} has over {_MOST >> 30} GB: no verification set is that large")
        data = Path(path).read_bytes()
        _check_operations(data)
        value = _Unpickler(BytesIO(data), encoding="bytes").load()
    except (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, TypeError,
            AttributeError, OverflowError, UnicodeError) as error:  # fmt: skip
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path} is not a .bin verification set ({said}): fetch another"
        ) from error
    fault = _fault(value)
    if fault:
        raise InputError(f"{path} is not a .bin verification set ({fault}): fetch another")
    images, same = value
    return list(images), np.array([bool(answer) for answer in same], dtype=bool)  # 2P, (P,)


def _check_operations(data: bytes) -> None:
    """Refuse, before anything is built, what can run code or take memory beyond the file's size."""
    containers = 0
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name in _GLOBALS:
            return
        containers += "LIST" in operation.name or "TUPLE" in operation.name
        if containers > _CONTAINERS:  # a byte in the file, eighty in memory
            raise pickle.UnpicklingError(f"it has more than {_CONTAINERS} lists and tuples")
        if operation.name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it uses the operation {operation.name}")
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            # The unpickler's table of what was seen is as long as the largest number asked for.
            raise pickle.UnpicklingError(f"it numbers an object {argument}")


def _fault(value: object) -> str | None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return "not a pair of images and answers"
    images, same = value
    for part, name, kinds in ((images, "image", bytes), (same, "answer", (bool, int))):
        if not isinstance(part, (list, tuple)):
            return f"the {name}s are no list"
        for index, item in enumerate(part):
            if not isinstance(item, kinds):
                return f"{name} {index} is of type {type(item).__name__}"
    if any(answer not in (0, 1) for answer in same):
        return "an answer is neither true nor false"
    if not same or len(images) != 2 * len(same):
        return f"{len(images)} images for {len(same)} pairs"
    return None
