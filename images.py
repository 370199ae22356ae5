"""Reading an image safely and writing one whole: the one decoder of every script.

from images import read_image
photo = read_image("me.jpg")  # uint8 (H, W, 3), RGB, turned as EXIF says
"""

import base64
import contextlib
import ctypes
import functools
import io
import os
import stat
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, WebPImagePlugin  # noqa: F401 (registers them)

from config import naming

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# What a photo may be inside, whatever its name says. No EPS or PDF: they run an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_NAMED = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "GIF": (".gif",)}
_BACKGROUND = (255, 255, 255)  # what shows through a transparent pixel
_MIN_SIDE = 16
_MAX_ASPECT = 20.0
MAX_PIXELS = 50_000_000


class UnreadableImage(Exception):
    """A photo that can't be used; the text is the reason, without the file's name."""


def kind_of(reason: str) -> str:
    """A reason without what differs from photo to photo: `too small (9x12)` -> `too small`."""
    return reason.split(" (")[0].split(": ")[0]


def read_image(
    path: str | os.PathLike, max_pixels: int = MAX_PIXELS, notes: Counter | None = None
) -> np.ndarray:
    """Decode the whole image -> uint8 (H, W, 3) RGB, turned upright by its EXIF orientation.

    Grey, palette, CMYK and 16-bit images are converted, transparent ones laid on white, of an
    animation the first frame is taken. `notes` counts what was unusual but usable.
    Raises UnreadableImage with the reason: not an image, truncated, over `max_pixels` (told by the
    header, before decoding), under 16 px, or more than 20 times as long as wide.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait forever
            raise UnreadableImage("not a regular file")
        if not os.path.getsize(path):
            raise UnreadableImage("empty file")
    except OSError as error:
        raise UnreadableImage(_reason(error)) from error
    return _decode(path, max_pixels, notes)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The same for an image that is in memory, as in a .rec or .bin."""
    if not data:
        raise UnreadableImage("empty file")
    return _decode(io.BytesIO(data), max_pixels, None)


def _decode(
    source: str | os.PathLike | io.BytesIO, max_pixels: int, notes: Counter | None
) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # Pillow's warnings about sizes and damaged EXIF: both are dealt with here.
            warnings.simplefilter("ignore")
            with Image.open(source, formats=_FORMATS) as image:
                _check_size(*image.size, max_pixels)
                if image.format == "TIFF":
                    _quieten_libtiff()
                if notes is not None:
                    _note(image, Path(source), notes)
                image.load()  # the whole of it: a truncated file raises here, never at verify()
                return _to_rgb(_upright(image))
    except Image.DecompressionBombError as error:
        raise UnreadableImage("too many pixels") from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("not an image") from error
    except OSError as error:
        raise UnreadableImage(_reason(error)) from error
    except (SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        raise UnreadableImage(f"damaged: {error}") from error  # what Pillow's parsers raise


def size_of(path: Path) -> tuple[int, int]:
    """Height and width by the header, before EXIF turns it; 0, 0 where that can't be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_FORMATS) as image:
                return image.height, image.width
    except Exception:  # what is wrong is told when it is decoded
        return 0, 0


def jpeg_bytes(image: np.ndarray, quality: int = 95) -> bytes:
    """uint8 (H, W, 3) RGB -> the bytes of a JPEG file.

    Colour at full resolution (4:4:4): the usual halving, meant for photos and not for crops of 112
    pixels, cost the reference network 0.15 points on LFW.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def data_uri(jpeg: bytes) -> str:
    """A JPEG inside a page."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def write_jpeg(path: Path, image: np.ndarray, quality: int = 95) -> None:
    """Write uint8 (H, W, 3) RGB under a temporary name, then rename: never half a file.

    Not synced to disk one by one (1 to 10 ms each): who needs that syncs a batch.
    """
    temporary = path.with_name(f".{os.getpid()}.tmp")  # short: the name may be of full length
    try:
        with naming(path):
            temporary.write_bytes(jpeg_bytes(image, quality))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UnreadableImage(f"too many pixels ({width}x{height}, --max-pixels {max_pixels})")
    if min(width, height) < _MIN_SIDE:
        raise UnreadableImage(f"too small ({width}x{height})")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise UnreadableImage(f"extreme aspect ({width}x{height})")


def _note(image: Image.Image, path: Path, notes: Counter) -> None:
    named = _NAMED.get(image.format or "")
    if named and path.suffix.lower() not in named:
        notes[f"{image.format} inside, named otherwise"] += 1
    if getattr(image, "is_animated", False) and image.format != "MPO":
        notes["animated, first frame taken"] += 1


@functools.cache
def _quieten_libtiff() -> None:
    """libtiff writes on stderr what it finds in a damaged file, without its name: no more of it.

    What can't be decoded still raises. Pillow has no setting for it, so the library that it is
    linked with is told itself, for the whole process.
    """
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with contextlib.suppress(OSError, AttributeError):  # built without it, or statically
            getattr(ctypes.CDLL(Image.core.__file__), name)(None)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF is written by anyone: what can't be parsed turns nothing
        return image


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits to white
        values = np.asarray(image).astype(np.int64)  # (H, W)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UnreadableImage("more than 16 bits a pixel")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)  # (H, W, 3)
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
        image = Image.alpha_composite(ground, image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # (H, W, 3)


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return "truncated" if "truncated" in text.lower() else text.lower()
