"""MTCNN over many photos: photos in, boxes and landmarks out.

    from detect_faces import FaceDetector
    faces = FaceDetector().detect([photo])[0]  # uint8 (H, W, 3) RGB -> boxes, scores, landmarks

The three networks and their weights are facenet-pytorch's (Zhang et al. 2016, "Joint Face
Detection and Alignment using Multi-task Cascaded Convolutional Networks"), and so are the rules by
which boxes are proposed, dropped and refined. The driver around them is ours: all levels of a
photo's pyramid lie side by side on a canvas that PNet sees at once (pyramid.py). A CPU takes photo
after photo: what it works on stays in its cache, and what it finds can't depend on the photos
beside. A GPU takes photos of any sizes together.

Legend of shapes: N photos taken together, H height, W width, B boxes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import nms

import mtcnn
import pyramid
from pyramid import Canvas

_BATCH_PIXELS = 1 << 24  # of the canvases that a GPU takes together
_CHUNK = {24: 64, 48: 16}  # crops of a side that a network takes at once
_GPU_FACTOR = 128  # so many times as many on a GPU
_MATRIX = 512  # boxes up to which all overlaps at once are quicker than a call of nms
WINDOW = 8  # photos that a CPU takes through a stage before the next stage


@dataclass(frozen=True)
class Faces:
    """The faces of one photo, the best score first; coordinates in its pixels."""

    boxes: np.ndarray  # (B, 4) x1, y1, x2, y2
    scores: np.ndarray  # (B,)
    landmarks: np.ndarray  # (B, 5, 2) float64 x, y, in MTCNN's own order

    def __len__(self) -> int:
        return len(self.boxes)


def central_face(faces: Faces, width: int, height: int) -> int:
    """Index of the face that the photo is of: large, and near the middle in x and in y.

    The measure is area minus twice the squared distance of the centres, as in FaceNet's alignment
    of LFW: a tiny false find nearer to the middle does not win over the face around it.
    Raises ValueError where there is no face.
    """
    if not len(faces):
        raise ValueError("no face to choose from")
    sides = faces.boxes[:, 2:] - faces.boxes[:, :2]  # (B, 2)
    centres = (faces.boxes[:, 2:] + faces.boxes[:, :2]) / 2  # (B, 2)
    offsets = centres - np.array([width, height]) / 2
    return int(np.argmax(sides.prod(axis=1) - 2.0 * (offsets**2).sum(axis=1)))


class FaceDetector:
    """MTCNN's cascade at facenet-pytorch's defaults."""

    def __init__(
        self,
        min_face_size: int = 20,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        factor: float = 0.709,
        device: torch.device | str = "cpu",
    ):
        self.min_face_size, self.thresholds, self.factor = min_face_size, thresholds, factor
        self.device = torch.device(device)
        self.batched = self.device.type != "cpu"
        if self.batched:  # TF32's 10 bits moved a tenth of the faces by more than a pixel
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.pnet, self.rnet, self.onet = mtcnn.load(self.device)
        # glibc gives freed memory back to the kernel at once, and gets it again page by page, which
        # took a third of the time, until it has seen a large block go: then it keeps twice as much.
        torch.empty(31 << 20, dtype=torch.uint8)

    @torch.inference_mode()
    def detect(self, photos: list[np.ndarray]) -> list[Faces]:
        """uint8 (H, W, 3) RGB photos of any sizes -> the faces of each, in the same order."""
        found: list[Faces | None] = [None] * len(photos)
        for parts in self._windows(photos):
            batches = [_Photos([photos[index] for index in part], self.device) for part in parts]
            faces = self._detect(batches)
            for index, mine in zip(itertools.chain(*parts), faces, strict=True):
                found[index] = mine
        return found

    def _windows(self, photos: list[np.ndarray]) -> Iterator[list[list[int]]]:
        """Indices of the photos whose stages go on together, in lists of those in one batch."""
        large = [pyramid.is_large(*photo.shape[:2]) for photo in photos]
        small = [index for index, alone in enumerate(large) if not alone]
        yield from ([[index]] for index, alone in enumerate(large) if alone)
        if not self.batched:
            windows = (small[start : start + WINDOW] for start in range(0, len(small), WINDOW))
            yield from ([[index] for index in window] for window in windows)
            return
        by_canvas: dict[tuple, list[int]] = {}
        for index in small:
            by_canvas.setdefault(self._canvas_sizes(*photos[index].shape[:2]), []).append(index)
        for sizes, same in by_canvas.items():
            largest = max((height * width for height, width in sizes), default=1)
            step = max(1, _BATCH_PIXELS // largest)
            yield from ([same[start : start + step]] for start in range(0, len(same), step))

    def _canvas_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        kind = self.device.type
        return pyramid.canvas_sizes(height, width, self.min_face_size, self.factor, kind)

    def _plans(self, photos: list[np.ndarray]) -> Iterator[tuple[Canvas, ...]]:
        """A canvas of each photo, then their next ones; photos of a size have theirs in common."""
        first = {photo.shape[:2]: photo for photo in photos}
        if len(first) == 1:
            return ((canvas,) * len(photos) for canvas in self._canvases(photos[0]))
        plans = {size: list(self._canvases(photo)) for size, photo in first.items()}
        return zip(*(plans[photo.shape[:2]] for photo in photos), strict=True)

    def _canvases(self, photo: np.ndarray) -> Iterator[Canvas]:
        height, width = photo.shape[:2]
        return iter(
            pyramid.plan_canvases(height, width, self.min_face_size, self.factor, str(self.device))
        )

    def _detect(self, batches: list["_Photos"]) -> list[Faces]:
        """The cascade, each stage for all batches before the next: its code stays in the cache.

        In between, what a photo has (B, ...) is an item of a list of NumPy arrays.
        """
        cells = [mine for batch in batches for mine in self._propose(batch)]
        boxes = [_merge(mine) for mine in cells]
        boxes, seen = self._look(self.rnet, batches, boxes, 24, self.thresholds[1])
        boxes = [_refine(*mine) for mine in zip(boxes, seen, strict=True)]
        boxes, seen = self._look(self.onet, batches, boxes, 48, self.thresholds[2])
        return [_faces(*mine) for mine in zip(boxes, seen, strict=True)]

    def _propose(self, batch: "_Photos") -> list[list[tuple]]:
        """First stage: PNet over the pyramids -> what passes, of each photo and canvas."""
        found: list[list[tuple]] = [[] for _ in batch.photos]
        for canvases in self._plans(batch.photos):
            outputs = (canvases[0].height - 2) * (canvases[0].width - 2)  # of the first convolution
            holes = [canvas.holes + number * outputs for number, canvas in enumerate(canvases)]
            score, features = mtcnn.propose(self.pnet, batch.draw(canvases), torch.cat(holes))
            where = (score >= self.thresholds[0]).nonzero()  # (B, 3) photo, y, x
            shift = mtcnn.shifts(self.pnet, features[where.unbind(1)]).cpu().numpy()  # (B, 4)
            score, where = score[where.unbind(1)].cpu().numpy(), where.cpu().numpy()
            for number, canvas in enumerate(canvases):
                mine = where[:, 0] == number
                found[number].append((canvas, where[mine, 1:], score[mine], shift[mine]))
        return found

    def _look(self, net, batches, boxes: list[np.ndarray], size: int, threshold: float):
        """A later stage's view of the boxes -> those of each photo that pass, and what it said.

        Lists of (B, 4) and of (B, C), the columns of `mtcnn.refine`.
        """
        sides = [(photo.shape[1], photo.shape[0]) for batch in batches for photo in batch.photos]
        boxes, cuts = zip(*map(_clip, boxes, sides), strict=True)
        cuts, seen = iter(cuts), []
        for batch in batches:
            mine = list(itertools.islice(cuts, len(batch.photos)))
            said = [mtcnn.refine(net, crops) for crops in batch.crops(mine, size)]
            said = torch.cat(said).cpu().numpy() if said else np.zeros((0, 15), np.float32)
            seen += np.split(said, np.cumsum([len(part) for part in mine])[:-1])
        passed = [said[:, 0] > threshold for said in seen]
        return (
            [part[keep] for part, keep in zip(boxes, passed, strict=True)],
            [said[keep] for said, keep in zip(seen, passed, strict=True)],
        )


class _Photos:
    """Photos that are in one batch, and their tables of sums. A large photo is alone."""

    def __init__(self, photos: list[np.ndarray], device: torch.device):
        self.photos, self.device = photos, device
        self.large = pyramid.is_large(*photos[0].shape[:2])
        self.tables: list[torch.Tensor | None] = [None]
        if not self.large:
            self.tables = [pyramid.sum_table(photo).to(device) for photo in photos]
            self.table = torch.cat(self.tables) if len(photos) > 1 else self.tables[0]
            self.first = np.cumsum([0] + [len(table) for table in self.tables[:-1]])  # (N,)
            self.stride = np.array([photo.shape[1] + 1 for photo in photos])  # (N,)

    def draw(self, canvases: tuple[Canvas, ...]) -> torch.Tensor:
        """A canvas of each photo -> float32 (N, H, W, 3)."""
        drawn = [
            canvas.draw(photo, table)
            for canvas, photo, table in zip(canvases, self.photos, self.tables, strict=True)
        ]
        return torch.stack(drawn) if len(drawn) > 1 else drawn[0][None]

    def crops(self, cuts: list[np.ndarray], size: int) -> Iterator[torch.Tensor]:
        """Integer boxes (B, 4) of each photo -> float32 (some, size, size, 3), in order."""
        owner = np.repeat(np.arange(len(cuts)), [len(mine) for mine in cuts])
        every = np.concatenate(cuts)
        chunk = _CHUNK[size] * (1 if self.device.type == "cpu" else _GPU_FACTOR)
        for start in range(0, len(every), chunk):
            part, photo = every[start : start + chunk], owner[start : start + chunk]
            if not self.large:
                first, stride = self.first[photo], self.stride[photo]
                yield pyramid.crop_boxes(self.table, first, stride, part, size)
                continue
            cut = (self.photos[0][y1:y2, x1:x2] for x1, y1, x2, y2 in part)
            crops = [pyramid.shrink(crop, (size, size), 0, size) for crop in cut]
            yield torch.stack(crops).to(self.device)


# --------------------------------------------------------------------------------------------------
# boxes of one photo


def _cells(canvas: Canvas, where: np.ndarray, score: np.ndarray, shift: np.ndarray) -> tuple:
    """PNet's cells (B, 2) y, x that passed -> levels (B,), boxes (B, 4), scores and shifts."""
    piece = canvas.piece[where[:, 0], where[:, 1]]
    inside = piece >= 0
    where, score, shift, piece = where[inside], score[inside], shift[inside], piece[inside]
    corner = mtcnn.STRIDE * where[:, ::-1].astype(np.float32) - canvas.origin[piece]  # (B, 2) x, y
    scale = canvas.scale[piece, None]
    boxes = np.concatenate([(corner + 1) / scale, (corner + mtcnn.CELL) / scale], 1)
    return canvas.level[piece], np.floor(boxes), score, shift


def _merge(parts: list[tuple]) -> np.ndarray:
    """What passed PNet on the photo's canvases -> square boxes (B, 4), without duplicates."""
    if not parts:  # the photo is smaller than the smallest face
        return np.zeros((0, 4), np.float32)
    level, boxes, score, shift = map(
        np.concatenate, zip(*itertools.starmap(_cells, parts), strict=True)
    )
    # Levels are suppressed one by one: far apart from each other, in numbers that stay exact.
    apart = level[:, None].astype(np.float32) * (boxes.max(initial=0) + 1)
    keep = _suppress(boxes + apart, score, 0.5)
    keep = keep[np.argsort(level[keep], kind="stable")]  # among equal scores the first wins
    keep = keep[_suppress(boxes[keep], score[keep], 0.7)]
    boxes, sides = boxes[keep], boxes[keep, 2:] - boxes[keep, :2]
    return _square(boxes + shift[keep] * np.tile(sides, 2))


def _refine(boxes: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """What RNet said (B, 5) of the boxes (B, 4) -> square boxes, without duplicates."""
    keep = _suppress(boxes, seen[:, 0], 0.7)
    return _square(_move(boxes[keep], seen[keep, 1:5]))


def _suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Greedy suppression by intersection over union -> indices, the best score first."""
    if len(boxes) > _MATRIX:
        return nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).numpy()
    x1, y1, x2, y2 = boxes.T
    area = (x2 - x1) * (y2 - y1)  # (B,)
    width = np.minimum.outer(x2, x2) - np.maximum.outer(x1, x1)  # (B, B)
    height = np.minimum.outer(y2, y2) - np.maximum.outer(y1, y1)
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    same = shared / (np.add.outer(area, area) - shared) > threshold
    rows = np.packbits(same, axis=1, bitorder="little")
    keep, dropped = [], 0  # a bit a box
    for index in np.argsort(-scores, kind="stable").tolist():
        if not dropped >> index & 1:
            keep.append(index)
            dropped |= int.from_bytes(rows[index].tobytes(), "little")
    return np.array(keep, dtype=np.int64)


def _move(boxes: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(B, 4) moved by shares (B, 4) of their sides, counted as the later stages do."""
    return boxes + shift * np.tile(boxes[:, 2:] - boxes[:, :2] + 1, 2)


def _square(boxes: np.ndarray) -> np.ndarray:
    """(B, 4) -> squares of the longer side around the same centres."""
    sides = boxes[:, 2:] - boxes[:, :2]  # (B, 2)
    longer = sides.max(1, keepdims=True)
    corner = boxes[:, :2] + sides * np.float32(0.5) - longer * np.float32(0.5)
    return np.concatenate([corner, corner + longer], 1)


def _clip(boxes: np.ndarray, sides: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (B, 4), counted from 1, that see a pixel -> they, and (B, 4) first and past-the-end."""
    whole = np.trunc(boxes).astype(np.int64)
    cuts = np.concatenate([np.maximum(whole[:, :2], 1) - 1, np.minimum(whole[:, 2:], sides)], 1)
    seen = (cuts[:, 2:] > cuts[:, :2]).all(1)
    return boxes[seen], cuts[seen]


def _faces(boxes: np.ndarray, seen: np.ndarray) -> Faces:
    """What ONet said (B, 15) of a photo's boxes (B, 4) -> its faces, after the last suppression."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1  # (B, 2)
    points = seen[:, 5:].reshape(-1, 2, 5).transpose(0, 2, 1)  # (B, 5, 2)
    points = points * sides[:, None] + boxes[:, None, :2] - 1
    boxes, scores = _move(boxes, seen[:, 1:5]), seen[:, 0]
    keep = _suppress_contained(boxes, scores, 0.7)
    return Faces(boxes[keep], scores[keep], points[keep].astype(np.float64))


def _suppress_contained(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Greedy suppression by intersection over the smaller area -> indices, the best score first."""
    corners = boxes.astype(np.float64)
    area = (corners[:, 2] - corners[:, 0] + 1) * (corners[:, 3] - corners[:, 1] + 1)
    # Scores saturate at 1.0: among equals the later box wins, as in facenet-pytorch.
    order = np.argsort(scores, kind="stable")[::-1]
    keep = []
    while len(order):
        best, order = order[0], order[1:]
        keep.append(int(best))
        low = np.maximum(corners[best, :2], corners[order, :2])
        high = np.minimum(corners[best, 2:], corners[order, 2:])
        shared = np.maximum(0, high - low + 1).prod(axis=1)
        order = order[shared / np.minimum(area[best], area[order]) <= threshold]
    return keep
