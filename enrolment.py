"""A gallery: who is in a folder of photos, kept as embeddings, and the search in it.

    entries = refresh(Path("people"), file, reader, settings)   # only what is new or changed
    gallery = Gallery.of(entries)
    for match in gallery.search(embeddings, top=5)[0]: ...      # the nearest identities of a face

The folder holds one folder an identity. What is kept lies elsewhere, in a .safetensors: of each
photo its path, size, time and sha256, and of those with a face its place and embedding. The file
belongs to a model and to settings of the detector; with another one, all photos are done again.

Legend of shapes: P enrolled photos, F faces looked for, E embedding size.
"""

import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

import protocol
import utils
from checkpoint import lock, sha256, write_atomic
from config import InputError
from face_reader import Face, FaceReader, Read
from images import UnreadableImage, read_image
from photo_folders import is_folder, is_photo, one_line, walk

VERSION = 1  # of what an entry is
SAVE_EVERY = 30  # seconds of enrolling that a kill may cost
_WINDOW = 32  # photos detected together
_PIXELS = 1 << 26  # and at most so many pixels, where photos are large


@dataclass(frozen=True, eq=False)
class Entry:
    """What is known of one photo."""

    size: int
    mtime_ns: int
    sha256: str
    reason: str = ""  # why it is not enrolled
    box: np.ndarray | None = None  # float32 (4,)
    landmarks: np.ndarray | None = None  # float64 (5, 2)
    embedding: np.ndarray | None = None  # float32 (E,), of length 1


@dataclass(frozen=True)
class Enrolled:
    """The gallery's photos, path below the gallery -> entry, and what this run did to them."""

    entries: dict[str, Entry]
    new: int  # looked at in this run
    removed: int
    outside: list[str]  # photos that lie in no identity's folder


# --------------------------------------------------------------------------------------------------
# enrolling


def refresh(
    gallery: Path, file: Path, reader: FaceReader, settings: dict, max_pixels: int
) -> Enrolled:
    """Look at what is new or changed in the gallery since the file was written, and write it.

    Raises InputError: no photo there, the file is something else, or another process writes it.
    """
    photos, outside = list_gallery(gallery)
    known = load(file, settings)
    todo = _plan(gallery, photos, known)
    if known.keys() == set(photos) and all(
        _as_before(gallery / photo, known[photo], max_pixels) for photo in todo
    ):
        return Enrolled(known, 0, 0, outside)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{file.parent} is a file: name another place with --enrolled") from None
    with lock(file.parent, f".{file.name}.lock"):
        known = load(file, settings, warn=False)  # another process may have written it meanwhile
        removed = known.keys() - set(photos)
        todo = _plan(gallery, photos, known)
        entries = {photo: known[photo] for photo in photos if photo in known}
        by_hash = {entry.sha256: entry for entry in known.values() if entry.sha256}
        new = _enrol(gallery, todo, entries, by_hash, file, reader, settings, max_pixels)
        save(file, entries, settings)
    return Enrolled({photo: entries[photo] for photo in photos}, new, len(removed), outside)


def list_gallery(gallery: Path) -> tuple[list[str], list[str]]:
    """-> photos in the identities' folders, and those outside any, as sorted paths with /."""
    if not gallery.is_dir():
        said = "is not a folder" if gallery.exists() else "is not there"
        raise InputError(f"{gallery} {said}: --gallery names one with a folder an identity")
    photos: list[str] = []
    outside: list[str] = []
    for entry in sorted(os.scandir(gallery), key=lambda entry: entry.name):
        if is_folder(entry) and not entry.name.startswith("."):
            photos += sorted(filter(is_photo, walk(gallery / entry.name, entry.name)))
        elif is_photo(entry.name):
            outside.append(entry.name)
    if not photos:
        where = f"; {len(outside)} photos lie outside any folder" if outside else ""
        raise InputError(f"{gallery} holds no photo in a folder of its identity{where}")
    return photos, outside


def _plan(gallery: Path, photos: list[str], known: dict[str, Entry]) -> list[str]:
    """Photos that are new, changed, or could not be read the last time."""
    todo = []
    for photo in photos:
        entry = known.get(photo)
        if entry is None or not entry.sha256 or _stamp(gallery / photo) != (
            entry.size, entry.mtime_ns,
        ):  # fmt: skip
            todo.append(photo)
    return todo


def _as_before(path: Path, entry: Entry, max_pixels: int) -> bool:
    """Whether a photo that could not be read the last time can't be for the same reason."""
    if entry.sha256:
        return False
    found, pixels = _open(path, {}, max_pixels)
    return pixels is None and _plainly(found) == _plainly(entry)


def _plainly(entry: Entry) -> tuple[int, int, str, str]:
    return entry.size, entry.mtime_ns, entry.sha256, entry.reason


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # a link to nowhere
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _enrol(
    gallery: Path,
    todo: list[str],
    entries: dict[str, Entry],
    by_hash: dict[str, Entry],
    file: Path,
    reader: FaceReader,
    settings: dict,
    max_pixels: int,
) -> int:
    """Add the entries of `todo` -> how many photos were looked at. What is done is kept."""
    progress = utils.Progress(len(todo), "enrolling")
    new, saved = 0, time.monotonic()
    try:
        for batch in _batches(gallery, todo, by_hash, max_pixels):
            seen = {photo: pixels for photo, _, pixels in batch if pixels is not None}
            read = dict(zip(seen, reader.read(list(seen.values())), strict=True))
            for photo, entry, _ in batch:
                entry = _with_face(entry, read[photo]) if photo in read else entry
                entries[photo] = entry
                if entry.sha256:
                    by_hash[entry.sha256] = entry  # a copy further on needs no second look
            new += len(read)
            progress.update(len(batch))
            if time.monotonic() - saved > SAVE_EVERY:
                save(file, entries, settings)
                saved = time.monotonic()
    except BaseException:  # Ctrl-C; a full disk is told by itself
        save(file, entries, settings)
        raise
    finally:
        progress.close()
    return new


def _batches(
    gallery: Path, todo: list[str], by_hash: dict[str, Entry], max_pixels: int
) -> Iterator[list[tuple[str, Entry, np.ndarray | None]]]:
    """Some photos at a time: path, entry without a face, and pixels where there is to be looked."""
    batch: list[tuple[str, Entry, np.ndarray | None]] = []
    held = pixels = 0
    for photo in todo:
        entry, image = _open(gallery / photo, by_hash, max_pixels)
        batch.append((photo, entry, image))
        if image is not None:
            held, pixels = held + 1, pixels + image.shape[0] * image.shape[1]
        if held == _WINDOW or pixels >= _PIXELS or len(batch) == 1000:
            yield batch
            batch, held, pixels = [], 0, 0
    if batch:
        yield batch


def _open(
    path: Path, by_hash: dict[str, Entry], max_pixels: int
) -> tuple[Entry, np.ndarray | None]:
    """-> the entry so far and the pixels; none where it can't be read, or is known by its hash."""
    size, mtime_ns = _stamp(path)  # before reading: a change meanwhile is seen the next time
    key = ""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait forever
            return Entry(size, mtime_ns, "", "not a regular file"), None
        key = sha256(path)
        if key in by_hash:  # touched, moved, or a copy
            return replace(by_hash[key], size=size, mtime_ns=mtime_ns), None
        return Entry(size, mtime_ns, key), read_image(path, max_pixels)
    except UnreadableImage as error:
        again = str(error).startswith("too many pixels") or getattr(error.__cause__, "errno", None)
        # No hash: it is tried again, with another --max-pixels or a disk that reads.
        return Entry(size, mtime_ns, "" if again else key, str(error)), None
    except OSError as error:
        return Entry(size, mtime_ns, "", (error.strerror or str(error)).lower()), None


def _with_face(entry: Entry, read: Read) -> Entry:
    if read.reason:
        return replace(entry, reason=read.reason)
    face: Face = read.faces[0]
    return replace(entry, box=face.box, landmarks=face.landmarks, embedding=face.embedding)


# --------------------------------------------------------------------------------------------------
# the file


def load(file: Path, settings: dict, warn: bool = True) -> dict[str, Entry]:
    """The entries of an earlier run; none where there is no file, or one of another model.

    A damaged file is the same as none, with a warning. Raises InputError: it is another kind of
    file, which must not be overwritten.
    """
    if not file.exists():
        return {}
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if "enrolment" not in metadata:
                raise InputError(f"{file} is no enrolment: name another file with --enrolled")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        kept = json.loads(metadata["enrolment"])
        if kept["sha256"] != _digest(tensors):
            raise ValueError("its sha256 is another")
        entries = _unpack(tensors) if kept["settings"] == _key(settings) else None
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        if isinstance(error, PermissionError):
            raise
        if warn:
            said = one_line(str(error).splitlines()[0][:120]) if str(error) else "empty"
            print(f"WARNING: {file} is damaged ({said}): enrolling anew", file=sys.stderr)
        return {}
    if entries is None and warn:
        print(f"{file} belongs to another model or other settings: enrolling anew", file=sys.stderr)
    return entries or {}


def save(file: Path, entries: dict[str, Entry], settings: dict) -> None:
    """Atomically: a kill leaves the old file or the new one."""
    listed = [
        [photo, entry.size, entry.mtime_ns, entry.sha256, entry.reason]
        for photo, entry in sorted(entries.items())
    ]
    faces = [entry for _, entry in sorted(entries.items()) if entry.embedding is not None]
    width = faces[0].embedding.shape[0] if faces else 0
    tensors = {
        # As bytes: a header is bounded, and metadata of millions of photos are not.
        "photos": np.frombuffer(json.dumps(listed).encode(), dtype=np.uint8),
        "embeddings": np.array([f.embedding for f in faces], np.float32).reshape(len(faces), width),
        "boxes": np.array([f.box for f in faces], np.float32).reshape(-1, 4),
        "landmarks": np.array([f.landmarks for f in faces], np.float64).reshape(-1, 5, 2),
    }
    # One entry: safetensors writes several in any order, and the bytes would differ.
    about = {"settings": _key(settings), "sha256": _digest(tensors)}
    metadata = {"enrolment": json.dumps(about, sort_keys=True)}
    write_atomic(file, safetensors.numpy.save(tensors, metadata))


def _unpack(tensors: dict[str, np.ndarray]) -> dict[str, Entry]:
    listed = json.loads(tensors["photos"].tobytes())
    count = sum(not reason for *_, reason in listed)
    shapes = [tensors[key].shape for key in ("boxes", "landmarks", "embeddings")]
    if shapes != [(count, 4), (count, 5, 2), (count, *shapes[2][1:2])]:
        raise ValueError(f"{count} faces in arrays of {shapes}")
    faces = zip(tensors["boxes"], tensors["landmarks"], tensors["embeddings"], strict=True)
    entries = {}
    for photo, size, mtime_ns, key, reason in listed:
        entry = Entry(size, mtime_ns, key, reason)
        entries[photo] = entry if reason else Entry(size, mtime_ns, key, reason, *next(faces))
    return entries


def _key(settings: dict) -> dict:
    return {"version": VERSION, **settings}


def _digest(tensors: dict[str, np.ndarray]) -> str:
    parts = b"".join(hashlib.sha256(tensors[key].tobytes()).digest() for key in sorted(tensors))
    return hashlib.sha256(parts).hexdigest()


# --------------------------------------------------------------------------------------------------
# searching


class Match(NamedTuple):
    identity: str
    angle: float  # degrees, to its nearest photo
    photo: str  # that photo, below the gallery


class Gallery:
    """Enrolled photos as one matrix. The score of an identity is its nearest photo."""

    def __init__(self, photos: list[str], embeddings: np.ndarray):
        """`photos` are paths that begin with their identity, in any order; float32 (P, E)."""
        order = sorted(range(len(photos)), key=lambda index: (photos[index].split("/")[0], index))
        self.photos = [photos[index] for index in order]
        self.embeddings = np.ascontiguousarray(embeddings[order])  # (P, E)
        owners = [photo.split("/")[0] for photo in self.photos]
        changes = (i for i in range(len(owners)) if not i or owners[i] != owners[i - 1])
        self.first = np.fromiter(changes, dtype=np.int64)  # row at which each identity begins
        self.identities = [owners[index] for index in self.first]

    @classmethod
    def of(cls, entries: dict[str, Entry]) -> "Gallery":
        faces = {photo: e.embedding for photo, e in entries.items() if e.embedding is not None}
        return cls(list(faces), np.array(list(faces.values()), np.float32))

    def search(self, faces: np.ndarray, top: int) -> list[list[Match]]:
        """float32 (F, E) of length 1 -> the `top` nearest identities of each, the nearest first."""
        cosines = faces @ self.embeddings.T  # (F, P)
        best = np.maximum.reduceat(cosines, self.first, axis=1)  # (F, identities)
        ends = np.append(self.first[1:], len(self.photos))
        found = []
        for face, all_, mine in zip(faces, cosines, best, strict=True):
            nearest = np.argsort(-mine, kind="stable")[:top]
            rows = [self.first[i] + int(all_[self.first[i] : ends[i]].argmax()) for i in nearest]
            angles = protocol.theta(np.repeat(face[None], len(rows), 0), self.embeddings[rows])
            found.append([
                Match(self.identities[i], float(angle), self.photos[row])
                for i, row, angle in zip(nearest, rows, angles, strict=True)
            ])  # fmt: skip
        return found
