"""Drawn faces: deterministic, quick, found by MTCNN where they are, and not trivial to tell apart.

python -m pytest tests/test_synthetic_faces.py
"""

import time

import cv2
import numpy as np
import pytest

from align_faces import align
from synthetic_faces import (
    DEMO_FOLDS,
    DEMO_PAIRS,
    DEMO_TEST,
    DEMO_TRAIN,
    SIZE,
    draw_face,
    lfw_pairs,
    write_demo,
    write_set,
)

IDENTITIES, PHOTOS = 24, 4


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """96 photos, 4 an identity, and their landmarks."""
    tasks = [(k, p) for k in range(500, 500 + IDENTITIES) for p in range(1, PHOTOS + 1)]
    photos, landmarks = zip(*[draw_face(11, *task) for task in tasks], strict=True)
    return np.stack(photos), np.stack(landmarks)


def test_a_photo_is_a_function_of_its_key():
    photo, landmarks = draw_face(3, 7, 2)
    again, same_landmarks = draw_face(3, 7, 2)
    assert np.array_equal(photo, again) and np.array_equal(landmarks, same_landmarks)
    assert photo.shape == (SIZE, SIZE, 3) and photo.dtype == np.uint8
    assert landmarks.shape == (5, 2) and landmarks.dtype == np.float64
    for other in ((4, 7, 2), (3, 8, 2), (3, 7, 3), (3, 7, 0)):
        assert not np.array_equal(photo, draw_face(*other)[0])


def test_size_scales_the_landmarks():
    small, large = draw_face(3, 7, 2, size=160), draw_face(3, 7, 2, size=320)
    assert small[0].shape == (160, 160, 3) and large[0].shape == (320, 320, 3)
    assert np.allclose(large[1], 2 * small[1])


def test_at_least_ten_photos_a_second_on_one_core():
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        draw_face(0, 0, 0)
        seconds = []
        for k in range(20):
            start = time.thread_time()  # not the wall's clock: other work here is not ours
            draw_face(0, k, 1)
            seconds.append(time.thread_time() - start)
        rate = 1 / np.median(seconds)
    finally:
        cv2.setNumThreads(threads)
    assert rate >= 10, f"{rate:.1f} photos/s"


def test_landmarks_lie_in_the_photo_and_in_order(drawn):
    landmarks = drawn[1]
    assert landmarks.min() > 0 and landmarks.max() < SIZE - 1
    axis = landmarks[:, 1] - landmarks[:, 0]  # from the left eye to the right one
    assert (axis[:, 0] > 0).all()
    down = np.stack([-axis[:, 1], axis[:, 0]], axis=1)
    eyes, mouth = landmarks[:, :2].mean(axis=1), landmarks[:, 3:].mean(axis=1)
    nose = landmarks[:, 2]
    assert ((landmarks[:, 4] - landmarks[:, 3]) * axis).sum(axis=1).min() > 0
    assert ((nose - eyes) * down).sum(axis=1).min() > 0
    assert ((mouth - nose) * down).sum(axis=1).min() > 0


def test_landmarks_are_where_the_features_are():
    """Independent of MTCNN: a pupil is darker than the white of the eye beside it."""
    darker = []
    for identity in range(30):
        photo, landmarks = draw_face(2, identity, 1)
        grey = photo.mean(axis=2)
        for x, y in np.rint(landmarks[:2]).astype(int):
            around = grey[y - 12 : y + 13, x - 12 : x + 13]
            darker.append(grey[y - 2 : y + 3, x - 2 : x + 3].min() < np.quantile(around, 0.15))
    assert np.mean(darker) > 0.9


def test_mtcnn_finds_the_faces_and_their_landmarks(drawn):
    mtcnn = pytest.importorskip("facenet_pytorch").MTCNN()
    photos, truth = drawn
    errors = []
    for k in range(0, len(photos), 32):
        _, _, found = mtcnn.detect(photos[k : k + 32], landmarks=True)
        for points, true in zip(found, truth[k : k + 32], strict=True):
            if points is not None:
                eye_distance = np.linalg.norm(true[1] - true[0])
                apart = np.linalg.norm(np.asarray(points[0], float) - true, axis=1)
                errors.append(apart.mean() / eye_distance)
    assert len(errors) >= 0.97 * len(photos), f"{len(errors)} of {len(photos)} found"
    assert np.mean(errors) < 0.10, f"landmarks off by {np.mean(errors):.3f} eye distances"


def test_pixels_do_not_tell_identities_apart(drawn):
    """Nor does the mean colour: the demo's network has to be far better than these."""
    crops = np.stack([align(*one) for one in zip(*drawn, strict=True)]).astype(np.float32)
    pixels = crops.reshape(len(crops), -1)
    centre = crops[:, 30:85, 30:85].mean(axis=(1, 2))
    features = {
        "pixels": pixels,
        "pixels less their mean": pixels - pixels.mean(axis=1, keepdims=True),
        "pixels less the mean face": pixels - pixels.mean(axis=0),
        "mean colour": centre - centre.mean(axis=0),
    }
    accuracy = {name: _best_accuracy(feature) for name, feature in features.items()}
    assert max(accuracy.values()) < 0.76, accuracy


def _best_accuracy(feature: np.ndarray) -> float:
    """Balanced accuracy over all pairs, at the best threshold there is (an upper bound)."""
    feature = feature / np.linalg.norm(feature, axis=1, keepdims=True)
    left, right = np.triu_indices(len(feature), 1)
    same = left // PHOTOS == right // PHOTOS
    cosine = (feature[left] * feature[right]).sum(axis=1)
    thresholds = np.quantile(cosine, np.linspace(0, 1, 401))
    return max(((cosine[same] >= t).mean() + (cosine[~same] < t).mean()) / 2 for t in thresholds)


def test_pairs_file_is_lfws_format():
    lines = lfw_pairs(range(40, 70), photos=5, folds=5, pairs=12, seed=1).splitlines()
    assert lines[0] == "5\t12" and len(lines) == 1 + 5 * 2 * 12
    seen: list[set[str]] = []
    for fold in range(5):
        rows = [line.split("\t") for line in lines[1 + 24 * fold : 25 + 24 * fold]]
        genuine, impostor = rows[:12], rows[12:]
        assert all(len(row) == 3 and row[1] != row[2] for row in genuine)
        assert all(len(row) == 4 and row[0] != row[2] for row in impostor)
        numbers = [n for row in genuine for n in row[1:]] + [n for r in impostor for n in r[1::2]]
        assert {int(n) for n in numbers} <= set(range(1, 6))
        assert len({tuple(row) for row in rows}) == 24
        seen.append({row[0] for row in rows} | {row[2] for row in impostor})
    names = set.union(*seen)
    assert sum(map(len, seen)) == len(names), "an identity is in two folds"
    assert names <= {f"s{k:04d}" for k in range(40, 70)}


def test_pairs_are_deterministic_and_refuse_too_small_a_set():
    assert lfw_pairs(range(20), 4, 2, 10, seed=1) == lfw_pairs(range(20), 4, 2, 10, seed=1)
    assert lfw_pairs(range(20), 4, 2, 10, seed=1) != lfw_pairs(range(20), 4, 2, 10, seed=2)
    with pytest.raises(ValueError, match="under 50 pairs"):
        lfw_pairs(range(8), 2, 4, 50, seed=1)


def test_write_set_does_only_what_is_left(tmp_path):
    ticks: list[int] = []
    assert write_set(tmp_path / "a", range(5, 7), 2, seed=9, workers=1) == 4
    assert write_set(tmp_path / "b", range(5, 7), 2, seed=9, workers=2, progress=ticks.append) == 4
    assert ticks == [1, 1, 1, 1]
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert [str(f) for f in files][:2] == ["s0005/s0005_0001.jpg", "s0005/s0005_0002.jpg"]
    content = {f: (tmp_path / "a" / f).read_bytes() for f in files}
    assert all((tmp_path / "b" / f).read_bytes() == content[f] for f in files), "workers matter"

    kept, lost = tmp_path / "a" / files[0], tmp_path / "a" / files[3]
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    lost.with_name(lost.name + ".tmp").write_bytes(b"half a photo")  # what a killed run leaves
    assert write_set(tmp_path / "a", range(5, 7), 2, seed=9) == 1
    assert lost.read_bytes() == content[files[3]] and kept.stat().st_mtime_ns == stamp
    assert not list(tmp_path.rglob("*.tmp"))
    assert write_set(tmp_path / "a", range(5, 7), 2, seed=9) == 0

    expected, _ = draw_face(9, 5, 1)
    decoded = cv2.imread(str(kept))[..., ::-1]
    assert np.abs(decoded.astype(int) - expected).mean() < 3, "not RGB, or not this photo"


def test_write_demo_lays_out_both_sets(tmp_path, monkeypatch):
    assert not set(DEMO_TRAIN[0]) & set(DEMO_TEST[0])
    lfw_pairs(*DEMO_TEST, DEMO_FOLDS, DEMO_PAIRS, seed=0)  # the real sizes give enough pairs
    monkeypatch.setattr("synthetic_faces.DEMO_TRAIN", (range(2), 1))
    monkeypatch.setattr("synthetic_faces.DEMO_TEST", (range(10, 14), 2))
    monkeypatch.setattr("synthetic_faces.DEMO_FOLDS", 2)
    monkeypatch.setattr("synthetic_faces.DEMO_PAIRS", 2)
    assert write_demo(tmp_path) == 10
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files[:2] == ["test/pairs.txt", "test/raw/s0010/s0010_0001.jpg"]
    assert files[-1] == "train/raw/s0001/s0001_0001.jpg" and len(files) == 11
    assert write_demo(tmp_path) == 0
