"""The detector against facenet-pytorch's own. Run: python -m pytest tests/test_detect_faces.py"""

import tarfile

import numpy as np
import pytest
from facenet_pytorch import MTCNN

import detect_faces
import pyramid
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


@pytest.mark.parametrize("shape", [(16, 16), (20, 20), (19, 300), (200, 200)])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_picture_without_a_face(shape, value):
    blank = np.full((*shape, 3), value, np.uint8)
    for faces in FaceDetector().detect([blank, blank]):
        assert len(faces) == 0
        assert faces.boxes.shape == (0, 4) and faces.landmarks.shape == (0, 5, 2)


def noisy(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A drawn face on a noisy ground of any size."""
    photo = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    face = draw_face(0, 0, 0)[0][: shape[0], : shape[1]]
    photo[: face.shape[0], : face.shape[1]] = face
    return photo


SHAPES = [(176, 176), (177, 240), (301, 199), (160, 160), (89, 109), (13, 200)]


def test_faces_do_not_depend_on_the_photos_beside():
    rng = np.random.default_rng(0)
    photos = [noisy(rng, shape) for shape in SHAPES for _ in range(2)]
    detector = FaceDetector()
    together = detector.detect(photos)
    alone = [detector.detect([photo])[0] for photo in photos]
    backwards = detector.detect(photos[::-1])[::-1]
    assert sum(map(len, alone)) >= 8
    for first, *others in zip(alone, together, backwards, strict=True):
        for other in others:  # not nearly equal: the same bits
            assert np.array_equal(first.boxes, other.boxes)
            assert np.array_equal(first.scores, other.scores)
            assert np.array_equal(first.landmarks, other.landmarks)


def test_batches_as_a_gpu_takes_them_find_the_same():
    rng = np.random.default_rng(1)
    photos = [noisy(rng, shape) for shape in SHAPES for _ in range(3)]
    alone = FaceDetector().detect(photos)
    detector = FaceDetector()
    detector.batched = True
    assert max(len(part) for (part,) in detector._windows(photos)) >= 3
    planned, canvases = [], detector._canvases
    detector._canvases = lambda photo: planned.append(photo.shape) or canvases(photo)
    for first, second in zip(alone, detector.detect(photos), strict=True):
        assert np.allclose(first.boxes, second.boxes, atol=1e-2)
        assert np.allclose(first.landmarks, second.landmarks, atol=1e-2)
    assert len(planned) == len(SHAPES)  # once a size


def test_photos_of_other_sizes_on_canvases_of_one_size_are_taken_together():
    rng = np.random.default_rng(1)
    photos = [noisy(rng, (176 + number % 2, 176)) for number in range(4)]
    detector = FaceDetector()
    alone = detector.detect(photos)
    detector.batched = True
    assert list(detector._windows(photos)) == [[[0, 1, 2, 3]]]
    for first, second in zip(alone, detector.detect(photos), strict=True):
        assert np.allclose(first.boxes, second.boxes, atol=1e-2)


def test_a_large_photo_is_read_in_bands_and_nothing_changes(monkeypatch):
    rng = np.random.default_rng(2)
    photos = [noisy(rng, shape) for shape in SHAPES]
    whole = FaceDetector().detect(photos)
    monkeypatch.setattr(pyramid, "_TABLE_PIXELS", 1000)
    monkeypatch.setattr(pyramid, "_BAND_PIXELS", 3000)
    monkeypatch.setattr(pyramid, "_CANVAS_PIXELS", {"cpu": 4000})
    monkeypatch.setattr(detect_faces, "_MATRIX", 10)
    pyramid._planned.cache_clear()
    in_bands = FaceDetector().detect(photos)
    pyramid._planned.cache_clear()
    for first, second in zip(whole, in_bands, strict=True):
        assert np.allclose(first.boxes, second.boxes, atol=1e-2)
        assert np.allclose(first.landmarks, second.landmarks, atol=1e-2)


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
