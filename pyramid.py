"""Photos at other sizes: MTCNN's image pyramid on one canvas, and crops of any size, by area.

    for canvas in plan_canvases(height, width, 20, 0.709, "cpu"):
        pixels = canvas.draw(photo, table)    # float32 (H, W, 3)
    crops = crop_boxes(table, start, stride, boxes, 24)

Resampling is adaptive average pooling (F.interpolate's mode="area"), which MTCNN was trained with:
a pixel is the mean of the whole pixels that it touches. A mean over a rectangle is the difference
of four entries of a summed-area table (Crow 1984). An entry is four sums of 32 bits, R, G, B and
one unused, so that one gather of 128-bit numbers moves a pixel: 20 times as fast as a gather of
rows of three.

Legend of shapes: H height, W width, B boxes, P pixels of a canvas, K pieces on it.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch

from mtcnn import CELL, STRIDE

_TABLE_PIXELS = 1 << 20  # a larger photo gets no table of its own: it would take 16 bytes a pixel
_KEPT_PIXELS = 1 << 18  # the plan of a photo of at most so many is kept: 32 bytes a pixel
_BAND_PIXELS = 1 << 18  # of such a photo, read at once
_CANVAS_PIXELS = {"cpu": 1 << 16, "cuda": 1 << 22}  # 10 to 32 floats a pixel: must fit in a cache
_PAST_END = CELL - STRIDE  # rows that a piece shares with the next one: PNet's border
_ROUND = 8  # canvases have few sizes, as each costs a millisecond of preparation in oneDNN


def is_large(height: int, width: int) -> bool:
    """Whether a photo of this size is read in bands instead of through one table."""
    return height * width > _TABLE_PIXELS


def sum_table(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> ((H+1) * (W+1),): sums of all pixels above and to the left of each.

    128-bit numbers, to be looked at as int32 (..., 4). In a large photo the sums wrap around, which
    the differences undo: exact as long as a rectangle has fewer than 8 million pixels.
    """
    sums = cv2.integral(cv2.cvtColor(image, cv2.COLOR_RGB2RGBA), sdepth=cv2.CV_32S)
    return torch.from_numpy(sums.reshape(-1).view(np.complex128))


def crop_boxes(table: torch.Tensor, first: np.ndarray, stride: np.ndarray, boxes, size: int):
    """Integer boxes (B, 4) -> float32 (B, size, size, 3) of their mean pixels.

    Args:
        table: tables of one or several photos, one after the other.
        first: (B,) where in it the table of the box's photo begins; `stride` its row's length.
    """
    left, right = _edges(boxes[:, 2] - boxes[:, 0], size)  # (B, size)
    top, bottom = _edges(boxes[:, 3] - boxes[:, 1], size)
    high, wide = (np.float32(1) / (bottom - top)), (np.float32(1) / (right - left))
    first = (first + boxes[:, 1] * stride + boxes[:, 0])[:, None]
    rows = np.stack([first + bottom * stride[:, None], first + top * stride[:, None]])
    y = torch.from_numpy(rows.astype(np.int32)[..., None]).to(table.device)  # (2, B, size, 1)
    x = torch.from_numpy(np.stack([right, left]).astype(np.int32)[:, :, None]).to(table.device)
    sums = _difference(table, y[0] + x[0], y[1] + x[0], y[0] + x[1], y[1] + x[1])
    mean = sums.float().flatten(2)  # (B, size, 4 size)
    mean *= torch.from_numpy(high.astype(np.float32)[:, :, None]).to(table.device)
    mean *= torch.from_numpy(wide.astype(np.float32).repeat(4, 1)[:, None]).to(table.device)
    return _rgb(mean.unflatten(2, (size, 4)))


def shrink(image: np.ndarray, size: tuple[int, int], first: int, last: int) -> torch.Tensor:
    """Rows first..last of the image at another size: uint8 (H, W, 3) -> float32 (rows, w, 3).

    In bands, so that memory does not grow with the image.
    """
    height, width = image.shape[:2]
    (top,), (bottom,) = _edges(np.array([height]), size[0])
    (left,), (right,) = _edges(np.array([width]), size[1])
    step = max(1, _BAND_PIXELS * size[0] // (height * width))
    rows = []
    for start in range(first, last, step):
        band = slice(start, min(start + step, last))
        low, high = top[band][0], bottom[band][-1]
        table = sum_table(image[low:high])
        y = torch.from_numpy(np.stack([bottom[band] - low, top[band] - low])[..., None])
        y, x = y * (width + 1), torch.from_numpy(np.stack([right, left]))
        sums = _difference(table, y[0] + x[0], y[1] + x[0], y[0] + x[1], y[1] + x[1])
        area = (bottom - top)[band, None] * (right - left)  # (rows, w)
        rows.append(sums[..., :3] / torch.from_numpy(area)[..., None])
    return torch.cat(rows)


def _edges(length: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of area resampling: (B,) lengths -> first and past-the-end pixel (B, size) of each."""
    cell = np.arange(size) * length[:, None]  # (B, size)
    return cell // size, (cell + length[:, None] + (size - 1)) // size


def _difference(table: torch.Tensor, *corners: torch.Tensor) -> torch.Tensor:
    """Indices of bottom right, top right, bottom left, top left -> int32 (..., 4) sums between."""

    def at(corner: torch.Tensor) -> torch.Tensor:
        return table.index_select(0, corner.reshape(-1)).view(torch.int32)

    # One after the other: the same memory, still in the cache, takes them all.
    total = at(corners[0]).sub_(at(corners[1])).sub_(at(corners[2])).add_(at(corners[3]))
    return total.view(*corners[0].shape, 4)


def _rgb(pixels: torch.Tensor) -> torch.Tensor:
    """float32 (..., H, W, 4) -> (..., H, W, 3)."""
    if pixels.device.type != "cpu":
        return pixels[..., :3].contiguous()
    flat = pixels.numpy().reshape(-1, pixels.shape[-2], 4)
    return torch.from_numpy(cv2.cvtColor(flat, cv2.COLOR_RGBA2RGB)).view(*pixels.shape[:-1], 3)


# --------------------------------------------------------------------------------------------------
# the canvas


@dataclass(frozen=True)
class Piece:
    """A level of the pyramid on a canvas, or, of a large one, some of its rows."""

    level: int
    scale: float
    size: tuple[int, int]  # height and width of the whole level
    first: int  # its rows, of the level
    last: int
    y: int = 0  # where it lies on the canvas: even numbers
    x: int = 0

    @property
    def height(self) -> int:
        return self.last - self.first

    @property
    def cells(self) -> tuple[slice, slice]:
        """Rows and columns of PNet's output that belong to it."""
        y, x = self.y // STRIDE, self.x // STRIDE
        return (
            slice(y, y + (self.height - _PAST_END + 1) // STRIDE),
            slice(x, x + (self.size[1] - _PAST_END + 1) // STRIDE),
        )


@dataclass(frozen=True)
class Canvas:
    """Where the pieces of a photo's pyramid go. All that depends on the photo's size only."""

    height: int
    width: int
    pieces: list[Piece]
    holes: torch.Tensor  # see mtcnn.propose
    piece: np.ndarray  # (H', W') which piece a cell of PNet's belongs to; -1: none
    origin: np.ndarray  # (K, 2) float32 x, y of a piece's level on the canvas
    scale: np.ndarray  # (K,) float32
    level: np.ndarray  # (K,)
    # Of a photo that has a table, else empty: four times (P,), indices into the table, and (P, 4),
    # 1 / pixels that a pixel of the canvas is the mean of.
    corners: tuple[torch.Tensor, ...]
    share: torch.Tensor

    def draw(self, photo: np.ndarray, table: torch.Tensor | None) -> torch.Tensor:
        """-> float32 (H, W, 3)."""
        if table is not None:
            mean = _difference(table, *self.corners).float()
            mean *= self.share
            return _rgb(mean.view(self.height, self.width, 4))
        canvas = torch.zeros(self.height, self.width, 3)
        for piece in self.pieces:
            pixels = shrink(photo, piece.size, piece.first, piece.last)
            canvas[piece.y : piece.y + len(pixels), piece.x : piece.x + piece.size[1]] = pixels
        return canvas.to(self.share.device)


def plan_canvases(
    height: int, width: int, min_face_size: int, factor: float, device: str
) -> Iterable[Canvas]:
    """The canvases of a photo of this size: one, or for a large photo several. May be none."""
    plan = _planned if height * width <= _KEPT_PIXELS else _plan
    return plan(height, width, min_face_size, factor, device)


@functools.lru_cache(maxsize=4096)
def canvas_sizes(
    height: int, width: int, min_face_size: int, factor: float, kind: str
) -> tuple[tuple[int, int], ...]:
    """Heights and widths of the canvases alone: what photos must share to be taken together."""
    most = _CANVAS_PIXELS[kind]
    pieces = _batches(_cut(height, width, min_face_size, factor, most), most)
    return tuple(_pack(mine)[:2] for mine in pieces)


def _plan(
    height: int, width: int, min_face_size: int, factor: float, device: str
) -> Iterator[Canvas]:
    most = _CANVAS_PIXELS[torch.device(device).type]
    with_table = height * width <= _TABLE_PIXELS
    for pieces in _batches(_cut(height, width, min_face_size, factor, most), most):
        yield _canvas(*_pack(pieces), (height, width) if with_table else None, device)


@functools.lru_cache(maxsize=16)
def _planned(*arguments) -> list[Canvas]:
    return list(_plan(*arguments))


def _cut(height, width, min_face_size: int, factor: float, most: int) -> Iterator[Piece]:
    """The levels of the pyramid, facenet-pytorch's, those of more than `most` pixels in pieces."""
    scale, level = CELL / min_face_size, 0
    while min(height, width) * scale >= CELL:
        size = int(height * scale + 1), int(width * scale + 1)
        rows = max(STRIDE, (most // size[1] - _PAST_END) // STRIDE * STRIDE)  # of a piece's own
        for first in range(0, size[0] - _PAST_END, rows):
            yield Piece(level, scale, size, first, min(first + rows + _PAST_END, size[0]))
        scale, level = scale * factor, level + 1


def _batches(pieces: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    batch, pixels = [], 0
    for piece in pieces:
        pixels += piece.height * piece.size[1]
        if batch and pixels > most:
            yield batch
            batch, pixels = [], piece.height * piece.size[1]
        batch.append(piece)
    if batch:
        yield batch


def _pack(pieces: list[Piece]) -> tuple[int, int, list[Piece]]:
    """Height and width of a canvas that holds the pieces, and where: about a tenth stays empty.

    The first is the largest and sets the width. Each goes to the lowest free rectangle that takes
    it, and leaves one to its right and one below (Lodi et al. 2002, guillotine cuts).
    """
    total = max(piece.size[1] for piece in pieces)
    total += total % STRIDE
    free = [(0, 0, 1 << 30, total)]  # y, x, height, width
    placed, bottom = [], 0
    for piece in pieces:
        height, width = (side + side % STRIDE for side in (piece.height, piece.size[1]))
        fits = [space for space in free if space[2] >= height and space[3] >= width]
        y, x, high, wide = min(fits, key=lambda space: space[2])
        free.remove((y, x, high, wide))
        free += [(y, x + width, height, wide - width), (y + height, x, high - height, wide)]
        placed.append(replace(piece, y=y, x=x))
        bottom = max(bottom, y + height)
    return -(-bottom // _ROUND) * _ROUND, -(-total // _ROUND) * _ROUND, placed


def _canvas(
    height: int, width: int, pieces: list[Piece], photo: tuple[int, int] | None, device: str
) -> Canvas:
    shape = (height - _PAST_END) // STRIDE, (width - _PAST_END) // STRIDE
    owner = np.full(shape, -1, dtype=np.int16)
    hole = torch.zeros(height - 2, width - 2, dtype=torch.bool)
    sides = (0, 0) if photo is None else (height, width)
    corners = torch.zeros(4, *sides, dtype=torch.int32)
    share = torch.zeros(sides)
    for number, piece in enumerate(pieces):
        owner[piece.cells] = number
        # The first convolution has 2 rows less. Where that leaves an odd number, the last pool
        # would see a row that is not the level's.
        rows, columns = piece.height - 2, piece.size[1] - 2
        if rows % 2:
            hole[piece.y + rows, piece.x : piece.x + columns + 1] = True
        if columns % 2:
            hole[piece.y : piece.y + rows + 1, piece.x + columns] = True
        if photo is None:
            continue
        part = slice(piece.y, piece.y + piece.height), slice(piece.x, piece.x + piece.size[1])
        (top,), (bottom,) = _edges(np.array([photo[0]]), piece.size[0])
        (left,), (right,) = _edges(np.array([photo[1]]), piece.size[1])
        top, bottom = (edge[piece.first : piece.last, None] for edge in (top, bottom))
        for corner, (y, x) in zip(
            corners, ((bottom, right), (top, right), (bottom, left), (top, left)), strict=True
        ):
            corner[part] = torch.from_numpy(y * (photo[1] + 1) + x)
        share[part] = torch.from_numpy(1 / ((bottom - top) * (right - left)))
    origin = [(piece.x, piece.y - piece.first) for piece in pieces]
    return Canvas(
        height,
        width,
        pieces,
        hole.flatten().nonzero()[:, 0].to(device),
        owner,
        np.array(origin, dtype=np.float32),
        np.array([piece.scale for piece in pieces], dtype=np.float32),
        np.array([piece.level for piece in pieces]),
        tuple(corners.flatten(1).to(device)),
        share.flatten()[:, None].repeat(1, 4).to(device),
    )
