"""A picture of a comparison: both photos with the face that was taken, both crops, the angle.

save(Path("pair.png"), left, right, "62.31°", ["the same person", "threshold 68.12°"])
"""

import io
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from checkpoint import write_atomic
from config import InputError
from face_reader import Photo
from photo_folders import one_line
from plots import PAPER

KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
SIDE, GAP, LINE = 480, 16, 22  # pixels: largest side of a photo, space between, a line of text
WIDTH = 2 * SIDE + 3 * GAP
TEXT = 44  # from the top of the crops to the middle of the first small line


class Shown(NamedTuple):
    name: str
    photo: np.ndarray  # uint8 (H, W, 3)
    boxes: list[np.ndarray]  # (4,) each
    taken: int  # which of the boxes
    crop: np.ndarray  # uint8 (112, 112, 3)


class Pair(NamedTuple):
    """What --save draws."""

    left: Shown
    right: Shown
    angle: float


def shown(photo: Photo, index: int) -> Shown:
    crop = photo.read.faces[index].crop
    return Shown(one_line(photo.path.name), photo.pixels, photo.boxes, index, crop)


def check(path: Path, photos: list[Path]) -> None:
    """Before any work is done: the picture can be written there, and overwrites no photo."""
    if path.suffix.lower() not in KINDS:
        raise InputError(f"--save {path}: name a .png or a .jpg")
    if not path.parent.is_dir():
        raise InputError(f"--save {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"--save {path} is a folder: name a file")
    for photo in photos:
        if path.exists() and photo.exists() and path.samefile(photo):
            raise InputError(f"--save {path} would overwrite the photo: name another file")


def save(path: Path, left: Shown, right: Shown, large: str, lines: list[str]) -> None:
    """Write the picture. `large` and `lines` are the text between the two crops."""
    image = draw(left, right, large, lines)
    buffer = io.BytesIO()
    image.save(buffer, KINDS[path.suffix.lower()], quality=95, subsampling=0, optimize=True)
    write_atomic(path, buffer.getvalue())


def draw(left: Shown, right: Shown, large: str, lines: list[str]) -> Image.Image:
    photos = [_framed(shown) for shown in (left, right)]
    high = max(photo.height for photo in photos)
    crop = left.crop.shape[0]
    top = GAP + high + LINE + GAP  # of the crops
    written = TEXT + LINE * (len(lines) - 1) + LINE // 2
    canvas = Image.new("RGB", (WIDTH, top + max(crop, written) + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for place, (shown, photo) in enumerate(zip((left, right), photos, strict=True)):
        x = GAP + place * (SIDE + GAP)
        canvas.paste(photo, (x + (SIDE - photo.width) // 2, GAP + (high - photo.height) // 2))
        middle = x + SIDE // 2, GAP + high + LINE // 2
        pen.text(middle, _fitted(shown.name, 14, SIDE), PAPER["muted"], _font(14), anchor="mm")
        canvas.paste(Image.fromarray(shown.crop), (GAP if not place else WIDTH - GAP - crop, top))
    room = WIDTH - 2 * crop - 4 * GAP
    pen.text((WIDTH // 2, top + 12), large, PAPER["ink"], _font(28), anchor="mm")
    for number, line in enumerate(lines):
        place = WIDTH // 2, top + TEXT + LINE * number
        pen.text(place, _fitted(line, 14, room), PAPER["ink"], _font(14), anchor="mm")
    return canvas


def _framed(shown: Shown) -> Image.Image:
    """The photo at most SIDE long, with the boxes: the taken one's thick, numbered if several."""
    image = Image.fromarray(shown.photo)
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    image = image.resize(size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(image)
    for number, box in enumerate(shown.boxes):
        taken = number == shown.taken
        frame = (np.asarray(box) * scale).tolist()
        pen.rectangle(
            frame, outline=PAPER["impostor" if taken else "genuine"], width=3 - 2 * (not taken)
        )
        if len(shown.boxes) > 1:
            pen.text((frame[0] + 5, frame[1] + 2), str(number + 1), "white", _font(16),
                     stroke_width=2, stroke_fill=PAPER["ink"])  # fmt: skip
    return image


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib brings this font along: the picture is the same on every machine.
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _fitted(text: str, size: int, room: int) -> str:
    """Cut at its middle where it is wider than `room` pixels."""
    keep = len(text)
    shown = text
    while _font(size).getlength(shown) > room and keep > 2:
        keep -= 1
        shown = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
    return shown
