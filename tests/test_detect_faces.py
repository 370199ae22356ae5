"""The detector against facenet-pytorch's own. Run: python -m pytest tests/test_detect_faces.py"""

import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from facenet_pytorch import MTCNN

import detect_faces
from detect_faces import FaceDetector, Faces, central_face
from images import read_image
from synthetic_faces import draw_face


def test_the_same_faces_as_facenet_pytorch():
    photos = [draw_face(0, identity, photo)[0] for identity in range(8) for photo in range(3)]
    wide = np.pad(photos[0], ((0, 0), (0, 60), (0, 0)), mode="edge")  # of another size
    compare([*photos, wide])


def test_the_same_faces_on_real_photos(shared, tmp_path):
    with tarfile.open(shared / "data/lfw-deepfunneled.tgz") as file:
        photos = []
        for member in file:
            if member.isfile():
                (tmp_path / "a.jpg").write_bytes(file.extractfile(member).read())
                photos.append(read_image(tmp_path / "a.jpg"))
            if len(photos) == 40:
                break
    compare(photos)


def compare(photos: list[np.ndarray]) -> None:
    """At least 99 % of the boxes of the plain loop, within half a pixel; landmarks within one."""
    plain = MTCNN(keep_all=True)
    ours = FaceDetector().detect(photos)
    total = found = 0
    for photo, faces in zip(photos, ours, strict=True):
        boxes, scores, landmarks = plain.detect(photo, landmarks=True)
        for index in range(0 if boxes is None else len(boxes)):
            total += 1
            if not len(faces):
                continue
            near = np.abs(faces.boxes - boxes[index]).max(axis=1).argmin()
            found += (
                np.abs(faces.boxes[near] - boxes[index]).max() < 0.5
                and np.abs(faces.landmarks[near] - landmarks[index]).max() < 1
                and abs(faces.scores[near] - scores[index]) < 1e-3
            )
    assert total >= len(photos) * 0.9
    assert found >= 0.99 * total


def test_summed_area_resampling_is_area_interpolation():
    stack = torch.randint(0, 256, (2, 37, 53, 3), dtype=torch.uint8)
    sums = detect_faces._summed_area(stack)
    plain = (stack.permute(0, 3, 1, 2).float() - 127.5) * 0.0078125
    for size in ((37, 53), (20, 11), (12, 12), (60, 70)):  # smaller, and larger too
        level = detect_faces._resample_all(sums, *size)
        assert torch.allclose(level, F.interpolate(plain, size, mode="area"), atol=1e-5)
    boxes = torch.tensor([[0, 0, 53, 37], [5, 3, 6, 4], [10, 8, 43, 30]])
    owner = torch.tensor([0, 1, 1])
    crops = detect_faces._resample_boxes(sums, boxes, owner, 24)
    for crop, (x1, y1, x2, y2), photo in zip(crops, boxes, owner, strict=True):
        expected = F.interpolate(plain[photo : photo + 1, :, y1:y2, x1:x2], (24, 24), mode="area")
        assert torch.allclose(crop, expected[0], atol=1e-5)


def test_sums_that_wrap_around_are_still_right():
    stack = torch.full((1, 3000, 3000, 3), 255, dtype=torch.uint8)  # 2.3e9 is above 2^31
    level = detect_faces._resample_all(detect_faces._summed_area(stack), 30, 30)
    assert torch.allclose(level, torch.full_like(level, 127.5 * 0.0078125))


@pytest.mark.parametrize("shape", [(16, 16), (20, 20), (19, 300), (200, 200)])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_picture_without_a_face(shape, value):
    blank = np.full((*shape, 3), value, np.uint8)
    for faces in FaceDetector().detect([blank, blank]):
        assert len(faces) == 0
        assert faces.boxes.shape == (0, 4) and faces.landmarks.shape == (0, 5, 2)


def test_no_photos():
    assert FaceDetector().detect([]) == []


def faces_at(*boxes) -> Faces:
    boxes = np.array(boxes, dtype=float)
    return Faces(boxes, np.ones(len(boxes)), np.zeros((len(boxes), 5, 2)))


def test_the_central_face_is_central_in_x_and_in_y():
    # Three equal faces on a cross: only the middle one is central in both.
    in_x, in_y, middle = (110, 10, 140, 40), (10, 110, 40, 140), (110, 110, 140, 140)
    assert central_face(faces_at(in_x, in_y, middle), 250, 250) == 2
    assert central_face(faces_at(middle, in_x, in_y), 250, 250) == 0


def test_a_small_false_find_does_not_win_over_the_face_around_it():
    assert central_face(faces_at((75, 70, 165, 190), (118, 118, 138, 138)), 250, 250) == 0


def test_no_face_to_choose_from():
    nobody = Faces(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2)))
    with pytest.raises(ValueError):
        central_face(nobody, 250, 250)
