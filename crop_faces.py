"""Photos in; crops on disk and a row of the manifest each: in one process, several, or on a GPU.

    for rows in run(photos, root, out, options, device):  # in no fixed order, some photos at a time
        ...

On a CPU every process takes photo after photo, with one thread. On a GPU one process feeds the card
with batches, while threads decode the next photos and write the crops of the last ones.

What becomes of a photo depends on nothing but the photo (on a GPU, where it is taken together with
others, up to rounding), so that any number of processes gives the same files.
"""

import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

import align_faces
import job
import pyramid
import worker_pool
from config import PreProcessOptions, naming
from detect_faces import WINDOW, FaceDetector, Faces, central_face
from images import UnreadableImage, jpeg_bytes, read_image, size_of
from manifest import ALIGNED, REJECTED, Row

PARTS = ".part"  # folder of crops that are being written: what a kill leaves is in there
NO_FACE = "no face"
NO_SHAPE = "landmarks are no face"


class Photo(NamedTuple):
    source: str  # path below the root, with /
    identity: str
    image: str  # path of the crop below --out


def run(
    photos: list[Photo],
    root: Path,
    out: Path,
    options: PreProcessOptions,
    device: torch.device,
) -> Iterator[list[Row]]:
    """Find, align and write the face of each photo -> rows as they come."""
    workers, arguments = worker_pool.workers(options.workers), (root, out, options, str(device))
    (out / PARTS).mkdir(exist_ok=True)
    if device.type == "cuda":
        chunks = chunked(photos, options.batch_size, 1)
        yield from feed(Worker(*arguments), chunks, max(1, workers))
    elif workers <= 1 or len(photos) < 2:
        yield from map(Worker(*arguments).process, chunked(photos, options.batch_size, 1))
    else:
        chunks = chunked(photos, options.batch_size, workers)
        yield from worker_pool.spread(process_chunk, chunks, workers, start_worker, arguments)


def chunked(photos: list[Photo], most: int, workers: int) -> Iterator[list[Photo]]:
    """Chunks that become smaller towards the end, so that all workers end at about one time."""
    start = 0
    while start < len(photos):
        fair = (len(photos) - start) // (3 * workers)
        stop = start + max(1, min(most, fair) if workers > 1 else most)
        yield photos[start:stop]
        start = stop


class Worker:
    """Detector and folders of one process."""

    def __init__(self, root: Path, out: Path, options: PreProcessOptions, device: str):
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.root, self.out, self.options = root, out, options
        self.detector = FaceDetector(
            options.min_face_size, options.thresholds, options.factor, device
        )

    def process(self, chunk: list[Photo]) -> list[Row]:
        """Read, detect, align and write a chunk of photos, a few at a time -> their rows."""
        rows: list[Row] = []
        held: list[tuple[Photo, np.ndarray, str]] = []
        for photo in chunk:
            one = self.read(photo)
            if isinstance(one, Row):
                rows.append(one)
                continue
            held.append((photo, *one))
            if len(held) == WINDOW or pyramid.is_large(*one[0].shape[:2]):
                rows += self._crop(held)
                held = []
        return rows + self._crop(held)

    def _crop(self, held: list[tuple[Photo, np.ndarray, str]]) -> list[Row]:
        found = self.detector.detect([image for _, image, _ in held])
        return [self.write(*one, faces) for one, faces in zip(held, found, strict=True)]

    def read(self, photo: Photo) -> tuple[np.ndarray, str] | Row:
        """-> uint8 (H, W, 3) and what was unusual about it, or the row that says why not."""
        notes: Counter = Counter()
        try:
            image = read_image(self.root / photo.source, self.options.max_pixels, notes)
        except UnreadableImage as error:
            return Row(photo.source, photo.identity, "", REJECTED, str(error))
        return image, ", ".join(notes)

    def write(self, photo: Photo, image: np.ndarray, note: str, faces: Faces) -> Row:
        """Align the central face and write the crop."""
        height, width = image.shape[:2]
        row = Row(photo.source, photo.identity, "", REJECTED, NO_FACE, width, height, len(faces))
        if not len(faces):
            return row
        index = central_face(faces, width, height)
        # As the manifest will hold them, so that the crop can be made again from it.
        landmarks = faces.landmarks[index].round(4)
        row = replace(
            row,
            score=float(faces.scores[index]),
            box=faces.boxes[index],
            landmarks=landmarks,
        )
        matrix = align_faces.face_transform(landmarks)
        if matrix is None:
            return replace(row, reason=NO_SHAPE)
        write_crop(self.out, photo.image, align_faces.warp(image, matrix))
        return replace(row, image=photo.image, status=ALIGNED, reason=note)


def write_crop(out: Path, image: str, crop: np.ndarray) -> None:
    """Written elsewhere under a name of this thread alone, then moved: never half a crop."""
    name = f"{job.rank()}-{os.getpid()}-{threading.get_ident()}"
    temporary, path = out / PARTS / name, out / image
    try:
        with naming(path):
            temporary.write_bytes(jpeg_bytes(crop))
    except BaseException:  # a full disk: the part of it that went in takes no room
        temporary.unlink(missing_ok=True)
        raise
    try:
        os.replace(temporary, path)
    except FileNotFoundError:  # the first of its folder
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


# --------------------------------------------------------------------------------------------------
# a GPU: threads around one detector


def feed(worker: Worker, chunks: Iterable[list[Photo]], threads: int) -> Iterator[list[Row]]:
    """Detect chunk after chunk; the next two are decoded and the last two written meanwhile."""
    reading: deque[tuple[list[Photo], list[Future]]] = deque()
    writing: deque[list[Future]] = deque()

    def read(photo: Photo) -> tuple[np.ndarray, str] | Row | None:
        # A large photo is decoded when it is its turn: some of them would fill the memory.
        large = pyramid.is_large(*size_of(worker.root / photo.source))
        return None if large else worker.read(photo)

    def detect() -> list[Future]:
        chunk, reads = reading.popleft()
        ones = [future.result() for future in reads]
        found = iter(worker.detector.detect([one[0] for one in ones if isinstance(one, tuple)]))
        written = []
        for photo, one in zip(chunk, ones, strict=True):
            if isinstance(one, tuple):
                written.append(pool.submit(worker.write, photo, *one, next(found)))
            else:
                row = one or worker.process([photo])[0]
                written.append(pool.submit(lambda row=row: row))
        return written

    with ThreadPoolExecutor(threads) as pool:
        try:
            for chunk in chunks:
                reading.append((chunk, [pool.submit(read, photo) for photo in chunk]))
                if len(reading) > 2:
                    writing.append(detect())
                if len(writing) > 2:
                    yield [future.result() for future in writing.popleft()]
            while reading:
                writing.append(detect())
            while writing:
                yield [future.result() for future in writing.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# a CPU: several processes

_worker: Worker  # of this process, where it is one of several


def start_worker(*arguments) -> None:
    global _worker
    _worker = Worker(*arguments)


def process_chunk(chunk: list[Photo]) -> list[Row]:
    return _worker.process(chunk)
