"""What is compared: a prepared folder and a list of pairs, or an InsightFace verification set.

    tests = load(data, pairs)          # data/lfw and pairs.txt
    tests = load(None, "agedb_30.bin") # aligned crops and labels in one file
    crop = tests.photos[tests.left[0]].decode(tests.photos[tests.left[0]].read())

Legend of shapes: N pairs, P photos, each once.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import archives
import config
import data_gen
import manifest
import protocol
from config import InputError
from images import UnreadableImage, decode_image

SIDE = data_gen.SIDE
ERRATA = config.ROOT / "lfw_errata.txt"
PACKED = ".bin"


@dataclass(frozen=True, eq=False)
class Photo:
    """A crop, and the photo that it was cut from where that is known."""

    name: str  # path below the raw folder, or the place in a .bin
    label: str  # what people are shown: without suffix and repeated folder
    crop: Path | bytes  # the file, or its content
    undetected: bool = False  # no face was found, cropped by median landmarks
    original: Path | None = None
    box: np.ndarray | None = field(default=None, repr=False)  # (4,) x1, y1, x2, y2 in the original

    def read(self) -> bytes:
        """The crop's file. Raises InputError: gone."""
        if isinstance(self.crop, bytes):
            return self.crop
        try:
            return self.crop.read_bytes()
        except OSError as error:
            raise InputError(
                f"{self.crop} cannot be read ({error.strerror}): run pre_process.py again"
            ) from None

    def decode(self, content: bytes) -> np.ndarray:
        """What `read` gave -> uint8 (112, 112, 3) RGB. Raises InputError: no picture of that size.

        Apart from `read`, so that what is hashed is what is embedded.
        """
        packed = isinstance(self.crop, bytes)
        where = self.name if packed else str(self.crop)
        fix = "fetch the file again" if packed else "run pre_process.py on its folder again"
        try:
            crop = decode_image(content)
        except UnreadableImage as error:
            raise InputError(f"{where}: {error}; {fix}") from error
        if crop.shape != (SIDE, SIDE, 3):
            size = f"{crop.shape[1]}x{crop.shape[0]}"
            raise InputError(f"{where} is {size}, not {SIDE}x{SIDE}; {fix}")
        return crop


@dataclass(frozen=True, eq=False)
class VerificationSet:
    """N pairs of P photos, in the order of their list."""

    name: str
    pairs_file: Path
    photos: list[Photo]  # P
    hashes: list[str]  # P sha256 of the crops
    left: np.ndarray  # (N,) into photos
    right: np.ndarray  # (N,)
    same: np.ndarray  # (N,) bool
    fold: np.ndarray  # (N,) 0 .. K-1
    folds_from: str  # in words
    mislabelled: np.ndarray  # (N,) bool: LFW's authors list the label as wrong
    no_originals: str = ""  # why the photos can't be shown

    def __len__(self) -> int:
        return len(self.left)


def printable(name: str) -> str:
    """A file name as UTF-8 can hold it: bytes that are none are shown by their number."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def is_packed(pairs_file: Path) -> bool:
    """Whether it is a .bin, which holds its crops itself."""
    return pairs_file.suffix.lower() == PACKED


def load(data: Path | None, pairs_file: Path) -> VerificationSet:
    """Raises InputError for a pair that can't be scored: never fewer than the protocol has."""
    pairs_file = Path(pairs_file)
    if is_packed(pairs_file):
        return _load_packed(pairs_file)
    assert data is not None  # the script's defaults name one
    return _load_prepared(data, pairs_file)


# --- a prepared folder and a list -----------------------------------------------------------------


def _load_prepared(data: Path, pairs_file: Path) -> VerificationSet:
    pairs = protocol.read_pairs(pairs_file)
    found, left, right = data_gen.find_photos(pairs, data)
    root, no_originals = originals(data)
    photos = [
        Photo(
            photo.source, photo.label, photo.crop, photo.undetected,
            None if root is None else root / photo.source, photo.box,
        )
        for photo in found
    ]  # fmt: skip
    listed = read_errata(ERRATA)
    mislabelled = [
        same and frozenset(map(data_gen.without_suffix, (photos[i].name, photos[j].name))) in listed
        for i, j, same in zip(left, right, pairs.same, strict=True)
    ]
    return VerificationSet(
        data.resolve().name, pairs_file, photos, _hashes(photos), left, right, pairs.same,
        pairs.fold, pairs.folds_from, np.array(mislabelled, dtype=bool), no_originals,
    )  # fmt: skip


def originals(data: Path) -> tuple[Path | None, str]:
    """The folder that a set was prepared from, or why there is none (in words, for the report)."""
    try:
        known = manifest.read_settings(data)
        source, packed = Path(known["source"]), known["bytes"] is not None
    except (InputError, KeyError, TypeError):
        return None, f"{manifest.SETTINGS} does not say where the photos are"
    root = data / "source" if packed else config.ROOT / source  # an absolute path stays as it is
    if "\0" in str(root) or not root.is_dir():
        return None, f"the photos are gone from {config.canonical(root)}"
    return (archives.strip_wrapper(root) if packed else root), ""


def read_errata(path: Path) -> set[frozenset[str]]:
    """The pairs of lfw_errata.txt, each as its two photos without suffix."""
    listed = set()
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            _, name, *photos = line.split("\t")
            listed.add(frozenset(f"{name}/{name}_{int(photo):04d}" for photo in photos))
    return listed


def _hashes(photos: list[Photo]) -> list[str]:
    return [hashlib.sha256(photo.read()).hexdigest() for photo in photos]


# --- InsightFace's .bin ---------------------------------------------------------------------------


def _load_packed(path: Path) -> VerificationSet:
    import recordio  # only here: most evaluations need none of it

    images, same = recordio.read_bin(path)
    if same.all() or not same.any():
        kind = "impostor" if same.all() else "genuine"
        raise InputError(f"{path}: no {kind} pair in this file, so nothing to tell apart")
    where: dict[str, int] = {}  # hash -> into photos: each picture is embedded once
    photos, index = [], np.empty(len(images), dtype=int)
    for place, content in enumerate(images):
        key = hashlib.sha256(content).hexdigest()
        if key not in where:
            where[key] = len(photos)
            label = f"pair {place // 2 + 1}, {'right' if place % 2 else 'left'}"
            photos.append(Photo(f"{path}: {label}", label, content))
        index[place] = where[key]
    return VerificationSet(
        path.stem, path, photos, list(where), index[0::2], index[1::2], same,
        *contiguous_folds(len(same)), np.zeros(len(same), dtype=bool),
        "a .bin holds aligned crops only",
    )  # fmt: skip


def contiguous_folds(pairs: int) -> tuple[np.ndarray, str]:
    """Ten equal contiguous parts as InsightFace's KFold(n_splits=10, shuffle=False) cuts them."""
    folds = min(protocol.FOLDS, pairs)
    parts = np.array_split(np.arange(pairs), folds)
    fold = np.concatenate([np.full(len(part), k) for k, part in enumerate(parts)])  # (N,)
    return fold, f"{folds} contiguous folds, as InsightFace cuts a .bin"
