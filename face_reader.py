"""A photo's faces and their embeddings: detection, alignment and network, one after the other.

    reader = FaceReader(load_backbone("runs/first"))
    faces = reader.read([read_image("me.jpg")])[0]     # the central face, or why there is none
    faces[0].embedding                                 # float32 (E,), of length 1

Legend of shapes: F faces, E embedding size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import align_faces
import utils
from config import InputError
from crop_faces import NO_FACE, NO_SHAPE
from detect_faces import FaceDetector, Faces, central_face
from images import UnreadableImage, read_image
from photo_folders import one_line

BATCH = 32  # crops embedded together


@dataclass(frozen=True, eq=False)
class Face:
    box: np.ndarray  # float32 (4,) x1, y1, x2, y2 in pixels of the photo
    score: float
    landmarks: np.ndarray  # float64 (5, 2)
    crop: np.ndarray  # uint8 (112, 112, 3)
    embedding: np.ndarray  # float32 (E,), of length 1


@dataclass(frozen=True)
class Read:
    """What was seen in a photo: the faces taken, or the reason why none was."""

    faces: list[Face]
    found: int  # faces that the detector sees
    reason: str = ""


class Photo(NamedTuple):
    path: Path
    pixels: np.ndarray  # uint8 (H, W, 3)
    read: Read

    @property
    def boxes(self) -> list[np.ndarray]:
        return [face.box for face in self.read.faces]

    @property
    def embeddings(self) -> np.ndarray:
        return np.stack([face.embedding for face in self.read.faces])  # (F, E)

    @property
    def plain_boxes(self) -> list[list[float]]:
        return [[round(float(value), 2) for value in box] for box in self.boxes]


class FaceReader:
    """Detector and network, together."""

    def __init__(
        self,
        network: torch.nn.Module,
        min_face_size: int = 20,
        device: torch.device | str = "cpu",
    ):
        self.network = network
        self.detector = FaceDetector(min_face_size, device=device)

    def read(self, photos: list[np.ndarray], every: bool = False) -> list[Read]:
        """uint8 (H, W, 3) RGB photos of any sizes -> what each shows, in the same order.

        The central face, or `every` one, from left to right.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the detector's layers are small: threads wait for each other
        try:
            found = self.detector.detect(photos)
        finally:
            torch.set_num_threads(threads)
        chosen = [choose(*one, every) for one in zip(photos, found, strict=True)]
        crops = [crop for _, mine in chosen for _, crop in mine]
        rows = iter(embed_crops(self.network, crops))
        read = []
        for faces, (reason, mine) in zip(found, chosen, strict=True):
            taken = [
                Face(faces.boxes[i], float(faces.scores[i]), faces.landmarks[i], crop, next(rows))
                for i, crop in mine
            ]
            read.append(Read(taken, len(faces), reason))
        return read


def choose(
    photo: np.ndarray, faces: Faces, every: bool
) -> tuple[str, list[tuple[int, np.ndarray]]]:
    """-> why there is no face to take, or those to take as (index, crop)."""
    if not len(faces):
        return NO_FACE, []
    indices = np.argsort(faces.boxes[:, 0], kind="stable").tolist()
    if not every:
        indices = [central_face(faces, photo.shape[1], photo.shape[0])]
    crops = ((index, upright(photo, faces.landmarks[index])) for index in indices)
    taken = [(index, crop) for index, crop in crops if crop is not None]
    return ("", taken) if taken else (NO_SHAPE, [])


def upright(photo: np.ndarray, landmarks: np.ndarray) -> np.ndarray | None:
    """The crop, or None where the landmarks are no face: the rule of pre_process.py."""
    matrix = align_faces.face_transform(landmarks)
    return None if matrix is None else align_faces.warp(photo, matrix)


def embed_crops(network: torch.nn.Module, crops: list[np.ndarray]) -> np.ndarray:
    """uint8 (112, 112, 3) each -> float32 (F, E) of length 1, crop and mirror image together.

    Raises InputError: an embedding without a direction.
    """
    if not crops:
        return np.zeros((0, 1), np.float32)
    batches = (crops[start : start + BATCH] for start in range(0, len(crops), BATCH))
    rows = np.concatenate([utils.embed(network, np.stack(batch)) for batch in batches])  # (F, E)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)  # (F, 1)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise InputError(
            "the model gives an embedding that is zero or not finite, which has no angle: "
            "it is broken, name another --model"
        )
    return (rows / lengths).astype(np.float32)


def look(
    paths: Iterable[Path], reader: FaceReader, max_pixels: int, every: bool = False
) -> list[Photo]:
    """Read the photos that a person names.

    Raises InputError: one can't be read, or shows no face.
    """
    photos = []
    for path in paths:
        try:
            pixels = read_image(path, max_pixels)
        except UnreadableImage as error:
            hint = "name a photo" if path.exists() else "check its name"
            hint = "a folder of people goes with --gallery" if path.is_dir() else hint
            raise InputError(f"{path}: {error}: {hint}") from error
        read = reader.read([pixels], every)[0]
        if read.reason:
            raise InputError(f"{path}: {read.reason}: name another photo, or try --min-face-size")
        photos.append(Photo(path, pixels, read))
    return photos


def several_lines(*photos: Photo) -> list[str]:
    return [
        f"{one_line(str(photo.path))}: {photo.read.found} faces, the central one is taken "
        "(--all for every one)"
        for photo in photos
        if photo.read.found > 1
    ]
