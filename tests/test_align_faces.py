"""Run: python -m pytest tests/test_align_faces.py

Face geometry, against scikit-image and against pictures whose every pixel is known by a formula.
"""

import warnings

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from skimage.transform import SimilarityTransform

from align_faces import (
    CROP,
    MAX_RESIDUAL,
    TEMPLATE,
    align,
    fit_residual,
    invert,
    map_points,
    similarity_transform,
    warp,
)


def _matrix(scale, degrees, centre):
    """Photo -> crop with ``centre`` of the photo in the middle of the crop."""
    turn = np.deg2rad(degrees)
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.column_stack([linear, (CROP - 1) / 2 - linear @ centre])


def _smooth(x, y):
    """A slow pattern, defined at every real position: float (..., 3) in 0..255."""
    return np.stack(
        [
            127 + 100 * np.sin(x / 90 + y / 70),
            127 + 100 * np.cos(x / 60 - y / 150),
            127 + 100 * np.sin(y / 80),
        ],
        axis=-1,
    )


def _photo(height, width):
    y, x = np.mgrid[:height, :width]
    return _smooth(x, y).round().astype(np.uint8)


def _expected(matrix, size=CROP):
    """What the crop of the smooth pattern is, without any resampling."""
    y, x = np.mgrid[:size, :size]
    source = map_points(invert(matrix), np.stack([x, y], axis=-1))
    return _smooth(source[..., 0], source[..., 1])


# ---------------------------------------------------------------- the transform


def _faces(rng, count):
    """Turned, scaled, shifted templates with noise from none to more than a face can have."""
    for _ in range(count):
        matrix = _matrix(rng.uniform(0.05, 20), rng.uniform(-180, 180), rng.uniform(-500, 500, 2))
        yield map_points(matrix, TEMPLATE + rng.normal(0, rng.uniform(0, 15), (5, 2)))


def test_equals_skimage_on_1000_faces():
    for points in _faces(np.random.default_rng(0), 1000):
        expected = SimilarityTransform.from_estimate(points, TEMPLATE)
        assert expected
        np.testing.assert_allclose(
            similarity_transform(points), expected.params[:2], rtol=1e-6, atol=1e-6
        )


def test_equals_skimage_on_1000_shapeless_point_sets():
    # Half of these fit a mirrored template better than the template: no reflection all the same.
    rng = np.random.default_rng(1)
    mirrored = 0
    for _ in range(1000):
        points, target = rng.uniform(0, 250, (2, 5, 2))
        expected = SimilarityTransform.from_estimate(points, target).params[:2]
        got = similarity_transform(points, target)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
        assert np.linalg.det(got[:, :2]) > 0
        covariance = (target - target.mean(0)).T @ (points - points.mean(0))
        mirrored += np.linalg.det(covariance) < 0
    assert 300 < mirrored < 700


def test_is_the_least_squares_optimum():
    rng = np.random.default_rng(2)
    for points in _faces(rng, 20):
        matrix = similarity_transform(points)
        best = fit_residual(points, matrix)
        (a, b), shift = matrix[:, 0], matrix[:, 2]
        for _ in range(20):
            da, db, *d_shift = rng.normal(0, 1e-3, 4) * (abs(a) + abs(b), abs(a) + abs(b), 100, 100)
            other = np.array([[a + da, -b - db], [b + db, a + da]])
            assert best <= fit_residual(points, np.column_stack([other, shift + d_shift]))


@pytest.mark.parametrize(
    "points",
    [
        np.full((5, 2), np.nan),
        np.where(np.arange(10).reshape(5, 2) == 3, np.nan, TEMPLATE),
        np.where(np.arange(10).reshape(5, 2) == 3, np.inf, TEMPLATE),
        np.where(np.arange(10).reshape(5, 2) == 3, -np.inf, TEMPLATE),
        np.where(np.arange(10).reshape(5, 2) == 3, 1e200, TEMPLATE),
        np.zeros((5, 2)),
        np.full((5, 2), 100.0),
        100 + TEMPLATE * 1e-9,
        TEMPLATE * 1e-200,
    ],
    ids=["nan", "one nan", "inf", "-inf", "huge", "zero", "equal", "nearly equal", "tiny"],
)
def test_row12_degenerate_landmarks_give_none(points):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert similarity_transform(points) is None
        assert align(np.zeros((50, 50, 3), np.uint8), points) is None


def test_points_that_no_rotation_matches_give_none():
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * 50.0
    assert similarity_transform(square, square[:, ::-1]) is None  # a mirror image of itself


def _is_similarity_or_none(points):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = similarity_transform(points)
    if matrix is None:
        return
    assert matrix.shape == (2, 3) and matrix.dtype == np.float64
    assert np.isfinite(matrix).all() and np.isfinite(fit_residual(points, matrix))
    (a, minus_b), (b, d) = matrix[:, :2]
    assert a == d and minus_b == -b and a * d - b * minus_b > 0
    assert warp(np.full((9, 7, 3), 255, np.uint8), matrix).shape == (CROP, CROP, 3)


@settings(max_examples=300, deadline=None)
@given(st_numpy.arrays(np.float64, (5, 2), elements=st.floats(allow_nan=True, allow_infinity=True)))
def test_row12_any_floats_give_a_similarity_or_none(points):
    _is_similarity_or_none(points)


@settings(max_examples=300, deadline=None)
@given(
    st_numpy.arrays(np.float64, (5, 2), elements=st.floats(-1e4, 1e4) | st.sampled_from([0.0, 50]))
)
def test_any_pixels_give_a_similarity_or_none(points):
    _is_similarity_or_none(points)


# ---------------------------------------------------------------- the residual


def test_residual_of_a_perfect_fit_and_of_a_known_shift():
    points = map_points(_matrix(3, 40, (20, 30)), TEMPLATE)
    assert fit_residual(points, similarity_transform(points)) < 1e-9
    identity = np.eye(2, 3)
    assert fit_residual(TEMPLATE + (3, 4), identity) == pytest.approx(5)


@pytest.mark.parametrize("turn", [0, 30, 180])
@pytest.mark.parametrize(
    "order", [[1, 0, 2, 3, 4], [0, 1, 2, 4, 3], [1, 0, 2, 4, 3]], ids=["eyes", "mouth", "both"]
)
def test_row12_swapped_landmarks_exceed_the_bound(order, turn):
    for squeeze in (1.0, 0.7, 0.4):  # frontal to nearly in profile
        points = map_points(_matrix(0.7, turn, (60, 60)), TEMPLATE * (squeeze, 1))
        assert fit_residual(points, similarity_transform(points)) < MAX_RESIDUAL
        swapped = points[order]
        assert fit_residual(swapped, similarity_transform(swapped)) > MAX_RESIDUAL


@settings(max_examples=200, deadline=None)
@given(
    st_numpy.arrays(np.float64, 5, elements=st.floats(-100, 100)),
    st.floats(0, 180),
    st.tuples(st.floats(0, 250), st.floats(0, 250)),
)
def test_row12_points_on_a_line_exceed_the_bound(along, degrees, start):
    turn = np.deg2rad(degrees)
    points = start + along[:, None] * [np.cos(turn), np.sin(turn)]
    matrix = similarity_transform(points)
    assert matrix is None or fit_residual(points, matrix) > MAX_RESIDUAL


@pytest.mark.parametrize(
    "profile",
    [
        [[25.3, 32.4], [35.7, 29.8], [5.9, 69.1], [37.0, 106.3], [43.3, 101.8]],
        [[142.8, 88.1], [153.6, 84.8], [167.6, 109.2], [142.8, 129.2], [149.1, 129.2]],
    ],
)
def test_faces_in_profile_are_within_the_bound(profile):
    # What MTCNN said of the two real photos that fit worst, of 2,378: the nose beyond the eyes.
    profile = np.array(profile)
    assert 13 < fit_residual(profile, similarity_transform(profile)) < MAX_RESIDUAL


# ---------------------------------------------------------------- points there and back


def test_points_there_and_back():
    rng = np.random.default_rng(4)
    for landmarks in _faces(rng, 50):
        matrix = similarity_transform(landmarks)
        points = rng.uniform(-100, 300, (3, 7, 2))
        there = map_points(matrix, points)
        assert there.shape == points.shape
        np.testing.assert_allclose(map_points(invert(matrix), there), points, atol=1e-8)
        np.testing.assert_allclose(invert(matrix), cv2.invertAffineTransform(matrix), rtol=1e-9)
        x, y = points[0, 0]
        by_hand = [row[0] * x + row[1] * y + row[2] for row in matrix]
        np.testing.assert_allclose(there[0, 0], by_hand)


def test_invert_refuses_a_flat_matrix():
    with pytest.raises(ValueError, match="determinant 0"):
        invert(np.array([[1.0, 2, 0], [2, 4, 0]]))


# ---------------------------------------------------------------- the warp


@pytest.mark.parametrize("scale", [3.0, 1.0, 0.7, 0.51, 0.49, 0.34, 0.3, 0.26, 0.2, 0.135])
@pytest.mark.parametrize("degrees", [0, 25, -110])
def test_warp_matches_the_formula(scale, degrees):
    matrix = _matrix(scale, degrees, (600, 580))
    error = warp(_photo(1201, 1190), matrix) - _expected(matrix)
    # Three roundings to whole grey levels (OpenCV's mean of 2 x 2 rounds halves up, which brightens
    # by up to 0.25), and places rounded to 1/32 px at up to 2 levels a px.
    assert np.abs(error).max() < 2
    assert np.abs(error.mean(axis=(0, 1))).max() < 0.5


def test_warp_agrees_with_and_without_preshrink():
    photo = _photo(1201, 1190)
    for scale in (0.49, 0.3, 0.2):
        matrix = _matrix(scale, 20, (600, 580))
        plain = cv2.warpAffine(photo, matrix, (CROP, CROP)).astype(int)
        difference = warp(photo, matrix) - plain
        assert np.abs(difference).max() <= 2 and abs(difference.mean()) < 0.3


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 8])
def test_landmarks_do_not_move(factor):
    # A bright disc on each landmark of a large photo: its centroid in the crop is the template's.
    landmarks = map_points(_matrix(1.1 * factor, 12, (56, 56)), TEMPLATE) + 50 * factor + (0.3, 0.6)
    size = 220 * factor
    y, x = np.mgrid[:size, :size]
    matrix = similarity_transform(landmarks)
    for point, goal in zip(landmarks, map_points(matrix, landmarks), strict=True):
        distance = np.hypot(x - point[0], y - point[1])
        disc = np.clip(6 * factor - distance, 0, 1)[..., None] * np.full(3, 255)
        weight = warp(disc.round().astype(np.uint8), matrix)[..., 0].astype(float)
        yy, xx = np.mgrid[:CROP, :CROP]
        centroid = np.array([(xx * weight).sum(), (yy * weight).sum()]) / weight.sum()
        np.testing.assert_allclose(centroid, goal, atol=0.03)


def test_strong_shrinking_does_not_alias():
    photo = np.zeros((1000, 1000, 3), np.uint8)
    photo[::2, ::2] = photo[1::2, 1::2] = 255  # a chessboard of single pixels: its mean is grey
    for scale in (0.45, 0.3, 0.13):
        crop = warp(photo, _matrix(scale, 7, (500, 500))).astype(float)
        assert np.abs(crop - 127.5).max() < 45
        assert np.abs(crop - 127.5).mean() < 12


def test_outside_the_photo_is_black():
    white = np.full((40, 40, 3), 255, np.uint8)
    crop = warp(white, _matrix(1, 0, (19.5, 19.5)))
    assert (crop[36:76, 36:76] == 255).all()
    assert crop.sum() == 255 * 3 * 40 * 40
    assert not warp(white, _matrix(1, 0, (5000, 5000))).any()
    assert not warp(white, _matrix(1, 0, (-5000, 20))).any()


def test_the_edge_of_the_photo_does_not_depend_on_the_region_read():
    photo = _photo(300, 300)
    for centre in ((0, 0), (299, 150), (150, 299)):
        matrix = _matrix(0.8, 30, centre)
        plain = cv2.warpAffine(photo, matrix, (CROP, CROP)).astype(int)
        difference = np.abs(warp(photo, matrix) - plain)
        assert (difference > 8).mean() < 0.002  # OpenCV places pixels on a grid of 1/32 px


def test_a_photo_wider_than_opencv_warps():
    wide = np.full((60, 40_000, 3), 200, np.uint8)  # cv2.warpAffine itself stops at 32,767
    crop = warp(wide, _matrix(1, 0, (39_000, 29.5)))
    assert (crop[30:80] == 200).all()


def test_a_tiny_scale_needs_no_memory():
    crop = warp(_photo(200, 100), _matrix(1e-6, 0, (50, 100)))
    assert crop.shape == (CROP, CROP, 3)


# ---------------------------------------------------------------- align


@pytest.mark.parametrize("size", [112, 56, 128, 224])
def test_align_puts_landmarks_on_the_scaled_template(size):
    landmarks = map_points(_matrix(1.5, -15, (56, 56)), TEMPLATE) + (100, 90)
    crop = align(_photo(400, 420), landmarks, size)
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8
    expected = SimilarityTransform.from_estimate(landmarks, TEMPLATE * size / 112).params[:2]
    np.testing.assert_allclose(crop, _expected(expected, size), atol=2)


def test_align_of_template_is_identity():
    photo = np.random.default_rng(5).integers(0, 256, (CROP, CROP, 3), dtype=np.uint8)
    np.testing.assert_array_equal(align(photo, TEMPLATE), photo)


def test_align_accepts_a_view():
    photo = _photo(300, 300)
    landmarks = TEMPLATE + 70
    flipped = np.ascontiguousarray(photo[:, ::-1])
    np.testing.assert_array_equal(align(photo[:, ::-1], landmarks), align(flipped, landmarks))
