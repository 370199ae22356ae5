"""Canvases and area resampling. Run: python -m pytest tests/test_pyramid.py"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pyramid


def area(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """By torch: uint8 (H, W, 3) -> (h, w, 3)."""
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return F.interpolate(planes, size, mode="area")[0].permute(1, 2, 0)


def draw_noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(250, 250), (101, 77), (37, 303), (20, 20)])
@pytest.mark.parametrize("most", [1 << 16, 3000])
@pytest.mark.parametrize("with_table", [True, False])
def test_every_level_lies_on_a_canvas(shape, most, with_table, monkeypatch):
    monkeypatch.setitem(pyramid._CANVAS_PIXELS, "cpu", most)
    monkeypatch.setattr(pyramid, "_BAND_PIXELS", 700)
    if not with_table:
        monkeypatch.setattr(pyramid, "_TABLE_PIXELS", 0)
    pyramid._planned.cache_clear()
    image = draw_noise(*shape)
    table = pyramid.sum_table(image) if with_table else None
    cells: dict[int, int] = {}  # of each level's PNet output, how many are on a canvas
    for canvas in pyramid.plan_canvases(*shape, 20, 0.709, "cpu"):
        assert canvas.height % 2 == 0 and canvas.width % 2 == 0
        pixels = canvas.draw(image, table)
        taken = torch.zeros(canvas.height, canvas.width)
        for number, piece in enumerate(canvas.pieces):
            assert piece.x % 2 == 0 and piece.y % 2 == 0
            part = np.s_[piece.y : piece.y + piece.height, piece.x : piece.x + piece.size[1]]
            expected = area(image, piece.size)[piece.first : piece.last]
            assert torch.allclose(pixels[part], expected, atol=1e-3)
            taken[part] += 1
            cells[piece.level] = cells.get(piece.level, 0) + (canvas.piece == number).sum()
        assert taken.max() == 1  # no two overlap
    pyramid._planned.cache_clear()
    scale, level = 0.6, 0
    while min(shape) * scale >= 12:
        height, width = (int(side * scale + 1) for side in shape)
        # PNet: 3x3, pool of 2 rounded up, 3x3, 3x3
        assert cells[level] == ((height - 1) // 2 - 4) * ((width - 1) // 2 - 4)
        scale, level = scale * 0.709, level + 1
    assert len(cells) == level


def test_crops_are_area_interpolation():
    images = [draw_noise(37, 53), draw_noise(60, 41)]
    tables = [pyramid.sum_table(image) for image in images]
    boxes = np.array([[0, 0, 53, 37], [5, 3, 6, 4], [10, 8, 37, 30], [0, 10, 41, 59]])
    owner = np.array([0, 1, 1, 1])
    first, stride = np.array([0, len(tables[0])])[owner], np.array([54, 42])[owner]
    crops = pyramid.crop_boxes(torch.cat(tables), first, stride, boxes, 24)
    for crop, (x1, y1, x2, y2), photo in zip(crops, boxes, owner, strict=True):
        part = images[photo][y1:y2, x1:x2]
        assert torch.allclose(crop, area(part, (24, 24)), atol=1e-3)
        assert torch.allclose(pyramid.shrink(part, (24, 24), 0, 24), crop, atol=1e-3)


def test_sums_that_wrap_around_are_still_right():
    white = np.full((3000, 3000, 3), 255, np.uint8)  # 2.3e9 is above 2^31
    box = np.array([[0, 0, 3000, 3000]])
    table = pyramid.sum_table(white)
    crop = pyramid.crop_boxes(table, np.array([0]), np.array([3001]), box, 30)
    assert torch.allclose(crop, torch.full_like(crop, 255))
