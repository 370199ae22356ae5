"""Face geometry: five landmarks -> similarity transform -> upright square crop, and points back.

Pure functions on arrays: no file, no detector, no network.

    matrix = face_transform(landmarks)                  # photo -> 112x112 crop; None: no face
    if matrix is not None:
        crop = warp(photo, matrix)                      # uint8 (112, 112, 3)
    eyes_in_photo = map_points(invert(matrix), eyes_in_crop)

Landmarks are float64 (5, 2), x,y in pixels of the photo, in MTCNN's order (left eye, right eye,
nose, left and right mouth corner as they lie in an upright image). They are never re-sorted. An
integer coordinate is the centre of a pixel, as in OpenCV and scikit-image.
"""

import cv2
import numpy as np

CROP = 112

# Where the five landmarks lie in a 112x112 crop: the template that ArcFace and its successors use.
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],  # left eye
        [73.5318, 51.5014],  # right eye
        [56.0252, 71.7366],  # nose
        [41.5493, 92.3655],  # left mouth corner
        [70.7299, 92.2041],  # right mouth corner
    ]
)

# The largest RMS fit error, in pixels of a 112x112 crop, of landmarks that can be a face. Measured
# with MTCNN: 7 px in 95 % of photos of all kinds, at most 13.87 px in 1,032 photos in profile. Five
# points on a line fit no better than 14.47 px (the template's smaller spread). Swapped eyes or
# mouth corners left at least 14.43 px in those profiles, 19.6 and 16.9 px in a frontal face.
MAX_RESIDUAL = 14.2

_MAX_COORDINATE = 1e7  # px; no photo has it, and below it no square or quotient overflows
_FLAT = 1e-6  # points closer together than this part of their coordinates have no direction left


def similarity_transform(landmarks: np.ndarray, target: np.ndarray = TEMPLATE) -> np.ndarray | None:
    """The rotation, scale and shift that bring ``landmarks`` closest to ``target``.

    Least squares in closed form (Umeyama 1991). In the plane and without reflection the problem is
    linear in complex numbers: z -> a z + b with a = sum(conj(z) q) / sum(|z|^2) on centred points,
    so there is no SVD that could fail, and the determinant |a|^2 is positive.

    Args:
        landmarks: (K, 2) x,y in pixels of the photo.
        target: (K, 2) x,y in pixels of the crop.

    Returns:
        float64 (2, 3), photo -> crop; None where there is no answer: NaN, infinite or absurdly
        large coordinates, points that (nearly) coincide, or points that no rotation matches.
    """
    points = np.asarray(landmarks, dtype=np.float64)  # (K, 2)
    goal = np.asarray(target, dtype=np.float64)  # (K, 2)
    if not np.all(np.abs(points) <= _MAX_COORDINATE):  # also true where there is a NaN
        return None
    centre, goal_centre = points.mean(axis=0), goal.mean(axis=0)
    z = (points - centre) @ [1, 1j]  # (K,)
    q = (goal - goal_centre) @ [1, 1j]  # (K,)
    spread, goal_spread = np.linalg.norm(z), np.linalg.norm(q)
    product = np.vdot(z, q)  # sum(conj(z) q)
    if spread <= _FLAT * max(1.0, np.abs(points).max()):
        return None
    if abs(product) <= _FLAT * spread * goal_spread:  # every rotation fits equally badly
        return None
    a = product / spread**2
    linear = np.array([[a.real, -a.imag], [a.imag, a.real]])
    return np.column_stack([linear, goal_centre - linear @ centre])  # (2, 3)


def fit_residual(landmarks: np.ndarray, matrix: np.ndarray, target: np.ndarray = TEMPLATE) -> float:
    """RMS distance, in pixels of the crop, between the mapped landmarks and the target.

    Above ``MAX_RESIDUAL`` the landmarks are no face: swapped, on one line, or of something else.
    """
    error = map_points(matrix, landmarks) - target  # (K, 2)
    return float(np.sqrt((error**2).sum(axis=1).mean()))


def face_transform(landmarks: np.ndarray) -> np.ndarray | None:
    """``similarity_transform``, or None also where the landmarks fit no face (MAX_RESIDUAL)."""
    matrix = similarity_transform(landmarks)
    if matrix is None or fit_residual(landmarks, matrix) > MAX_RESIDUAL:
        return None
    return matrix


def map_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) through a (2, 3) matrix: photo -> crop, or back with ``invert(matrix)``."""
    return np.asarray(points, dtype=np.float64) @ matrix[:, :2].T + matrix[:, 2]  # (..., 2)


def invert(matrix: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix of the opposite direction: crop -> photo.

    Raises:
        ValueError: the matrix flattens the plane (determinant 0), so nothing leads back.
    """
    (a, b), (c, d) = matrix[:, :2]
    det = a * d - b * c
    if det == 0:
        raise ValueError("a matrix of determinant 0 has no inverse")
    linear = np.array([[d, -b], [-c, a]]) / det
    return np.column_stack([linear, -linear @ matrix[:, 2]])  # (2, 3)


def warp(image: np.ndarray, matrix: np.ndarray, size: int = CROP) -> np.ndarray:
    """The crop that ``matrix`` (photo -> crop) cuts out of a photo; black outside the photo.

    Bilinear. Where the photo shrinks to less than half, bilinear would skip pixels (aliasing), so
    blocks of f x f pixels are averaged first, with the whole number f that leaves a scale in
    (2/3, 1]. Only the region that the crop shows is read: the cost does not grow with the photo.

    Args:
        image: uint8 (H, W, 3).
        matrix: (2, 3) with a positive determinant, from ``similarity_transform``.
        size: side of the crop that the matrix was made for.

    Returns:
        uint8 (size, size, 3).
    """
    corners = np.array([[-1, -1], [size, -1], [-1, size], [size, size]])
    seen = map_points(invert(matrix), corners)  # (4, 2)
    height, width = image.shape[:2]
    x0, y0 = np.clip(np.floor(seen.min(axis=0)) - 1, 0, (width, height)).astype(int)
    x1, y1 = np.clip(np.ceil(seen.max(axis=0)) + 2, 0, (width, height)).astype(int)
    if x0 >= x1 or y0 >= y1:
        return np.zeros((size, size, 3), np.uint8)
    region = image[y0:y1, x0:x1]
    linear, shift = matrix[:, :2], matrix[:, 2] + matrix[:, :2] @ (x0, y0)

    scale = np.sqrt(np.linalg.det(linear))
    if scale < 0.5:
        factor = int(min(1 / scale, max(region.shape[:2])))
        region = _block_mean(region, factor)
        # Block i covers the pixels f*i .. f*i + f-1, so its centre lies at f*i + (f-1)/2.
        shift = shift + linear @ np.full(2, (factor - 1) / 2)
        linear = linear * factor
    return cv2.warpAffine(
        np.ascontiguousarray(region), np.column_stack([linear, shift]), (size, size)
    )


def _block_mean(image: np.ndarray, factor: int) -> np.ndarray:
    """Mean of each factor x factor block; the last blocks are filled up with black."""
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(
        image, 0, -height % factor, 0, -width % factor, cv2.BORDER_CONSTANT, value=(0, 0, 0)
    )
    blocks = padded.shape[1] // factor, padded.shape[0] // factor
    return cv2.resize(padded, blocks, interpolation=cv2.INTER_AREA)


def align(image: np.ndarray, landmarks: np.ndarray, size: int = CROP) -> np.ndarray | None:
    """Photo, uint8 (H, W, 3), and landmarks (5, 2) -> upright crop, uint8 (size, size, 3), or None.

    At another size than 112 the template is scaled as a whole, so the crop shows the same part of
    the face. None only where there is no transform; judge the fit with ``fit_residual``.
    """
    matrix = similarity_transform(landmarks, TEMPLATE * (size / CROP))
    return None if matrix is None else warp(image, matrix, size)
