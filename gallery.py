"""The pairs that a report shows: which, in which order, and their pictures as data URIs.

Every picture is a JPEG inside the page. 24 kB a pair at the usual size; where more than MANY pairs
are shown, smaller ones at 12 kB, so that even a bad network's thousand errors are 14 MB.
"""

import base64
import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from images import UnreadableImage, read_image
from scores import Scores
from verification_set import Photo, VerificationSet, printable

NEAREST = 24  # pairs shown as close decisions
MANY = 250
BOX = (255, 176, 0)  # colour of the detected face's frame


@dataclass(frozen=True)
class Picture:
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Shown:
    """One photo: its crop, the original (None where it is gone) and what is to be said."""

    label: str
    undetected: bool
    crop: Picture
    original: Picture | None


@dataclass(frozen=True)
class ShownPair:
    number: int  # place in the list, from 1
    left: Shown
    right: Shown
    same: bool
    right_answer: bool
    angle: float
    threshold: float
    fold: int  # from 1
    mislabelled: bool

    @property
    def distance(self) -> float:
        return abs(self.angle - self.threshold)

    @property
    def side(self) -> str:
        return "above" if self.angle >= self.threshold else "below"


class Gallery:
    """The pairs of one report. Each photo is read and shrunk once, however often it is shown."""

    def __init__(self, tests: VerificationSet, scores: Scores):
        self.tests, self.scores = tests, scores
        self.distance = np.abs(scores.angles - scores.thresholds)  # (N,) degrees
        small = int((~scores.right).sum()) > MANY
        # side of the original and of the crop in pixels, and JPEG quality
        self.sizes = (96, 96, 70) if small else (160, 112, 80)
        self._shown: dict[int, Shown] = {}

    @cached_property
    def false_positives(self) -> list[ShownPair]:
        return self._pairs(self._wrong(~self.tests.same))

    @cached_property
    def false_negatives(self) -> list[ShownPair]:
        return self._pairs(self._wrong(self.tests.same))

    @cached_property
    def nearest(self) -> list[ShownPair]:
        return self._pairs(np.argsort(self.distance, kind="stable")[:NEAREST])

    @cached_property
    def undetected(self) -> list[Shown]:
        return [self._photo(i) for i, photo in enumerate(self.tests.photos) if photo.undetected]

    def _wrong(self, kind: np.ndarray) -> np.ndarray:
        """Wrongly judged pairs of one kind, the worst first."""
        shown = np.flatnonzero(~self.scores.right & kind)
        return shown[np.argsort(-self.distance[shown], kind="stable")]

    def _pairs(self, numbers: np.ndarray) -> list[ShownPair]:
        tests, scores = self.tests, self.scores
        return [
            ShownPair(
                int(n) + 1, self._photo(tests.left[n]), self._photo(tests.right[n]),
                bool(tests.same[n]), bool(scores.right[n]), float(scores.angles[n]),
                float(scores.thresholds[n]), int(tests.fold[n]) + 1, bool(tests.mislabelled[n]),
            )
            for n in numbers
        ]  # fmt: skip

    def _photo(self, index: int) -> Shown:
        if index not in self._shown:
            photo = self.tests.photos[index]
            crop = _picture(photo.decode(photo.read()), self.sizes[1], self.sizes[2])
            self._shown[index] = Shown(
                printable(photo.label),
                photo.undetected,
                crop,
                self._original(photo),
            )
        return self._shown[index]

    def _original(self, photo: Photo) -> Picture | None:
        if photo.original is None:
            return None
        try:
            pixels = read_image(photo.original)
        except UnreadableImage:
            return None
        return _picture(pixels, self.sizes[0], self.sizes[2], photo.box)


def _picture(pixels: np.ndarray, side: int, quality: int, box: np.ndarray | None = None) -> Picture:
    """uint8 (H, W, 3) -> a JPEG of at most `side`, with the face's frame drawn where one is."""
    image = Image.fromarray(pixels)
    scale = min(1.0, side / max(image.size))
    size = tuple(max(1, round(length * scale)) for length in image.size)
    image = image.resize(size, Image.Resampling.LANCZOS)
    if box is not None:
        ImageDraw.Draw(image).rectangle((np.asarray(box) * scale).tolist(), outline=BOX)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    content = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/jpeg;base64,{content}", *size)
