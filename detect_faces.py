"""MTCNN over many photos: photos in, boxes and landmarks out.

    from detect_faces import FaceDetector
    faces = FaceDetector().detect([photo])[0]  # uint8 (H, W, 3) RGB -> boxes, scores, landmarks

The three networks and their weights are facenet-pytorch's (Zhang et al. 2016, "Joint Face
Detection and Alignment using Multi-task Cascaded Convolutional Networks"), and so are the rules by
which boxes are proposed, dropped and refined. The driver around them is ours: photos of one size go
through together, and every resampling, of a pyramid level or of all crops at once, is a few reads
from one summed-area table (Crow 1984) instead of one call a crop.

Legend of shapes: N photos of one size, H height, W width, B boxes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torchvision.ops import batched_nms

_CELL, _STRIDE = 12, 2  # PNet sees 12 x 12 pixels, every second one
_STACK_PIXELS = 1 << 22  # photos detected together: bounds the memory of PNet's first layer
_CHUNK = 512  # crops a call of RNet or ONet


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
    """MTCNN's cascade at facenet-pytorch's defaults. Photos of one size are detected together."""

    def __init__(
        self,
        min_face_size: int = 20,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        factor: float = 0.709,
        device: torch.device | str = "cpu",
    ):
        self.min_face_size, self.thresholds, self.factor = min_face_size, thresholds, factor
        self.device = torch.device(device)
        self.pnet, self.rnet, self.onet = (
            net().eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)
            for net in (PNet, RNet, ONet)
        )

    def detect(self, photos: list[np.ndarray]) -> list[Faces]:
        """uint8 (H, W, 3) RGB photos of any sizes -> the faces of each, in the same order."""
        found: list[Faces | None] = [None] * len(photos)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, photo in enumerate(photos):
            by_size.setdefault(photo.shape, []).append(index)
        for (height, width, _), indices in by_size.items():
            step = max(1, _STACK_PIXELS // (height * width))
            for start in range(0, len(indices), step):
                part = indices[start : start + step]
                stack = torch.from_numpy(np.stack([photos[index] for index in part]))
                for index, faces in zip(part, self._detect_stack(stack), strict=True):
                    found[index] = faces
        return found

    @torch.inference_mode()
    def _detect_stack(self, stack: torch.Tensor) -> list[Faces]:
        """uint8 (N, H, W, 3) -> N Faces."""
        count, height, width, _ = stack.shape
        sums = _summed_area(stack.to(self.device))  # (N, H+1, W+1, 3)
        boxes, owner = self._propose(sums, height, width)  # (B, 4), (B,) which photo
        boxes, owner, _, _ = self._refine(self.rnet, sums, boxes, owner, 24, self.thresholds[1])
        boxes, owner, scores, points = self._refine(
            self.onet, sums, boxes, owner, 48, self.thresholds[2]
        )
        return _split(boxes, owner, scores, points, count)

    def _propose(self, sums: torch.Tensor, height: int, width: int):
        """First stage: PNet over the image pyramid -> square boxes (B, 4) and their photos (B,)."""
        boxes, owner = [], []
        for scale in self._scales(height, width):
            size = int(height * scale + 1), int(width * scale + 1)
            level = _resample_all(sums, *size)  # (N, 3, h, w)
            shift, probability = self.pnet(level)  # (N, 4, h', w'), (N, 2, h', w')
            level_boxes, level_owner = _cells(shift, probability[:, 1], scale, self.thresholds[0])
            keep = batched_nms(level_boxes[:, :4], level_boxes[:, 4], level_owner, 0.5)
            boxes.append(level_boxes[keep])
            owner.append(level_owner[keep])
        if not boxes:  # the photo is smaller than the smallest face
            empty = torch.zeros((0, 4), device=self.device)
            return empty, torch.zeros(0, dtype=torch.long, device=self.device)
        boxes, owner = torch.cat(boxes), torch.cat(owner)  # (B, 9): corners, score, shifts
        keep = batched_nms(boxes[:, :4], boxes[:, 4], owner, 0.7)
        boxes, owner = boxes[keep], owner[keep]
        sides = (boxes[:, 2:4] - boxes[:, :2]).repeat(1, 2)  # (B, 4)
        return _square(boxes[:, :4] + boxes[:, 5:] * sides), owner

    def _scales(self, height: int, width: int) -> list[float]:
        scale = _CELL / self.min_face_size
        scales = []
        while min(height, width) * scale >= _CELL:
            scales.append(scale)
            scale *= self.factor
        return scales

    def _refine(self, net, sums, boxes, owner, size: int, threshold: float):
        """A later stage: look at each box again -> the boxes, photos, scores, points that pass."""
        crops = _clip(boxes, sums.shape[1] - 1, sums.shape[2] - 1)  # (B, 4) integers
        inside = (crops[:, 2] > crops[:, 0]) & (crops[:, 3] > crops[:, 1])
        boxes, owner, crops = boxes[inside], owner[inside], crops[inside]
        if not len(boxes):  # the networks can't take an empty batch
            return boxes, owner, boxes.new_zeros(0), boxes.new_zeros((0, 5, 2))
        outputs = [
            net(_resample_boxes(sums, part, photo, size))
            for part, photo in zip(crops.split(_CHUNK), owner.split(_CHUNK), strict=True)
        ]
        shift, *points, probability = (torch.cat(part) for part in zip(*outputs, strict=True))
        score = probability[:, 1]  # (B,)
        passed = score > threshold
        boxes, owner, score, shift = boxes[passed], owner[passed], score[passed], shift[passed]
        sides = boxes[:, 2:] - boxes[:, :2] + 1  # (B, 2)
        moved = boxes + shift * sides.repeat(1, 2)
        if not points:  # RNet
            keep = batched_nms(boxes, score, owner, 0.7)
            return _square(moved[keep]), owner[keep], score[keep], None
        # ONet gives five x, then five y, as shares of the box
        landmarks = points[0][passed].unflatten(1, (2, 5)).transpose(1, 2)  # (B, 5, 2)
        landmarks = landmarks * sides[:, None] + boxes[:, None, :2] - 1
        return moved, owner, score, landmarks


def _summed_area(stack: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> int32 (N, H+1, W+1, 3): sums of all pixels above and to the left.

    In a large photo they wrap around, which the differences taken of them undo: exact as long as
    one cell that is averaged has fewer than 8 million pixels.
    """
    sums = stack.new_zeros(
        (stack.shape[0], stack.shape[1] + 1, stack.shape[2] + 1, 3), dtype=torch.int32
    )
    sums[:, 1:, 1:] = stack.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    return sums


def _edges(length: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells of area resampling: (B,) lengths -> first and past-the-end pixel (B, size) of each."""
    cell = torch.arange(size, device=length.device)
    low = cell * length[:, None] // size
    high = -((-(cell + 1) * length[:, None]) // size)  # rounded up
    return low, high


def _resample_all(sums: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The whole photos by area -> float32 (N, 3, height, width), channels last, normalised."""
    full = torch.tensor([sums.shape[1] - 1, sums.shape[2] - 1], device=sums.device)
    top, bottom = (edge[0] for edge in _edges(full[:1], height))
    left, right = (edge[0] for edge in _edges(full[1:], width))
    rows = sums[:, bottom] - sums[:, top]  # (N, height, W+1, 3)
    total = rows[:, :, right] - rows[:, :, left]  # (N, height, width, 3)
    area = (bottom - top)[:, None] * (right - left)  # (height, width)
    return _normalise(total, area[None, :, :, None])


def _resample_boxes(
    sums: torch.Tensor, boxes: torch.Tensor, owner: torch.Tensor, size: int
) -> torch.Tensor:
    """Integer boxes (B, 4) of photos (B,) by area -> float32 (B, 3, size, size), normalised."""
    left, right = _edges(boxes[:, 2] - boxes[:, 0], size)  # (B, size)
    top, bottom = _edges(boxes[:, 3] - boxes[:, 1], size)
    area = (bottom - top)[:, :, None] * (right - left)[:, None]  # (B, size, size)
    left, right = left + boxes[:, :1], right + boxes[:, :1]
    top, bottom = top + boxes[:, 1:2], bottom + boxes[:, 1:2]
    photo, row = owner[:, None, None], sums.shape[2]
    flat = sums.flatten(0, 2)  # (N (H+1) (W+1), 3)

    def at(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return flat[
            (photo * sums.shape[1] + y[:, :, None]) * row + x[:, None]
        ]  # (B, size, size, 3)

    total = at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left)
    return _normalise(total, area[..., None])


def _normalise(total: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Sums (N, h, w, 3) over areas -> (N, 3, h, w) as the networks take them: (x - 127.5) / 128."""
    return ((total / area - 127.5) * 0.0078125).permute(0, 3, 1, 2)


def _cells(shift, probability, scale: float, threshold: float):
    """Cells of PNet that pass -> (B, 9) corners, score, shifts, and the photo (B,) of each."""
    where = (probability >= threshold).nonzero()  # (B, 3) photo, y, x
    photo, y, x = where.unbind(1)
    corner = torch.stack([x, y], 1).float() * _STRIDE  # (B, 2)
    first = ((corner + 1) / scale).floor()
    last = ((corner + _CELL) / scale).floor()
    score = probability[photo, y, x]
    return torch.cat([first, last, score[:, None], shift[photo, :, y, x]], 1), photo


def _square(boxes: torch.Tensor) -> torch.Tensor:
    """(B, 4) -> squares of the longer side around the same centres."""
    sides = boxes[:, 2:] - boxes[:, :2]  # (B, 2)
    longer = sides.max(1, keepdim=True).values
    corner = boxes[:, :2] + sides * 0.5 - longer * 0.5
    return torch.cat([corner, corner + longer], 1)


def _clip(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 4), counted from 1 -> integer (B, 4) within the photo: first and past-the-end pixel."""
    boxes = boxes.trunc().long()
    first = boxes[:, :2].clamp(min=1) - 1
    limit = torch.tensor([width, height], device=boxes.device)
    return torch.cat([first, torch.minimum(boxes[:, 2:], limit)], 1)


def _split(boxes, owner, scores, points, count: int) -> list[Faces]:
    """The cascade's survivors -> one Faces a photo, after the last suppression."""
    boxes, owner, scores = boxes.cpu().numpy(), owner.cpu().numpy(), scores.cpu().numpy()
    points = points.cpu().numpy().astype(np.float64).reshape(-1, 5, 2)
    result = []
    for photo in range(count):
        mine = np.flatnonzero(owner == photo)
        mine = mine[_suppress(boxes[mine], scores[mine], 0.7)]
        result.append(Faces(boxes[mine], scores[mine], points[mine]))
    return result


def _suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
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
