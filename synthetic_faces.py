"""Drawn faces of invented identities, so that the whole pipeline runs with no data at all.

    from synthetic_faces import draw_face, write_demo
    photo, landmarks = draw_face(seed=0, identity=7, photo=3)   # uint8 (176, 176, 3) RGB, (5, 2)
    write_demo(Path("data/synthetic"))                          # train/raw, test/raw, test/pairs.txt

A photo is a function of (seed, identity, photo number): same bytes on any number of workers.
An identity is a set of TRAITS (face geometry, eyes, brows, nose, mouth, marks). What changes from
photo to photo (CONDITIONS: pose, light, expression, hair, glasses, background, noise) is chosen to
be louder than the traits in the pixels, so that an identity has to be learned.

How it is drawn: the head is a height map z = H(x, y) with a painted albedo in the frontal frame.
Each pixel of the photo is a ray that is marched to the height map (relief mapping), or that hits
one of a few ellipsoids (hair, ears, neck, shoulders); the nearest hit is shaded by its normal.

Head frame: x to the viewer's right, y down, z towards the viewer; the unit is half the width of an
average face (68 mm); the origin is in the middle of the head at the height of the eyes.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

SIZE = 176  # pixels of a photo's side: one size, so that detection can batch
UNIT = 80  # texels of the face texture to a unit
GRID_X = np.arange(-1.30, 1.30, 1 / UNIT, dtype=np.float32)
GRID_Y = np.arange(-1.70, 1.80, 1 / UNIT, dtype=np.float32)
OVERSAMPLE = 1.5  # rays to a pixel, along each side

# What an identity is: name -> lowest and highest value, drawn uniformly. Lengths in units.
TRAITS = {
    "eye_x": (0.41, 0.51),  # half the distance between the eyes
    "eye_width": (0.16, 0.235),  # half the length of an eye's opening
    "eye_height": (0.070, 0.125),
    "eye_tilt": (-0.035, 0.06),  # how much the outer corner lies above the inner one
    "lid": (0.03, 0.11),  # height of the crease above the eye
    "iris_hue": (0.0, 1.0),  # a place in IRIS_COLOURS
    "brow_height": (0.22, 0.38),  # above the eye's centre
    "brow_thickness": (0.025, 0.095),
    "brow_arch": (0.0, 0.11),
    "brow_tilt": (-0.07, 0.07),
    "brow_length": (0.20, 0.30),
    "brow_dark": (0.35, 0.95),
    "nose_y": (0.46, 0.62),
    "nose_width": (0.10, 0.21),
    "nose_height": (0.26, 0.42),
    "nose_tip": (0.05, 0.13),
    "bridge": (0.06, 0.12),
    "mouth_gap": (0.38, 0.54),  # from the nose tip down to the mouth
    "mouth_width": (0.27, 0.42),
    "lip_upper": (0.045, 0.11),
    "lip_lower": (0.06, 0.15),
    "lip_red": (0.1, 1.0),
    "chin_gap": (0.50, 0.70),  # from the mouth down to the chin
    "face_width": (0.88, 1.05),
    "jaw_taper": (0.05, 0.40),
    "jaw_square": (2.8, 5.0),  # exponent of the outline
    "cheek": (-0.02, 0.12),
    "hairline": (-1.08, -0.74),
    "melanin": (0.0, 1.0),
    "fold": (0.0, 1.0),  # lines from the nose to the mouth
    "bags": (0.0, 1.0),  # below the eyes
    "freckles": (-1.0, 1.0),  # below 0: none
    "dimple": (-1.0, 1.0),
    "bald": (0.0, 1.0),  # above 0.9: hair cut to the skin
}
# What a photo is: name -> lowest and highest value, drawn uniformly.
CONDITIONS = {
    "yaw": (-30.0, 30.0),  # degrees
    "pitch": (-14.0, 14.0),
    "roll": (-18.0, 18.0),
    "camera": (7.0, 25.0),  # distance in units: perspective
    "eye_distance": (33.0, 47.0),  # pixels at SIZE
    "shift_x": (-0.07, 0.07),  # share of the photo's side
    "shift_y": (-0.06, 0.06),
    "light_x": (-1.3, 1.3),  # direction of the key light; z is 1
    "light_y": (-1.2, 0.35),
    "key": (0.45, 1.25),
    "fill": (0.22, 0.55),
    "warmth": (-1.0, 1.0),
    "fill_warmth": (-1.0, 1.0),
    "smile": (-0.3, 1.0),
    "jaw_drop": (-1.2, 1.0),  # below 0: the mouth is closed
    "brow_raise": (-0.03, 0.05),
    "eye_open": (0.62, 1.1),
    "gaze_x": (-0.05, 0.05),
    "gaze_y": (-0.02, 0.02),
    "hair_tone": (0.0, 1.0),
    "hair_light": (0.0, 1.0),
    "hair_volume": (0.02, 0.24),
    "hair_length": (-1.0, 1.0),  # below 0: nothing hangs beside the face
    "hairline_shift": (-0.10, 0.16),
    "parting": (-0.35, 0.35),  # slope of the hairline
    "beard": (-2.0, 1.0),  # below 0: none
    "glasses": (-4.0, 1.0),  # below 0: none
    "cap": (-6.0, 1.0),  # below 0: none
    "blur": (0.0, 0.9),
    "noise": (0.5, 7.0),
    "gamma": (0.8, 1.3),
    "saturation": (0.55, 1.15),
}
# The demo: identities and photos of each; train and test share no identity.
DEMO = {
    "train": (range(150), 9),
    "test": (range(1000, 1050), 6),
    "pairs": {"folds": 10, "pairs": 30},
}
IRIS_COLOURS = ((52, 30, 18), (96, 58, 28), (122, 96, 48), (88, 112, 72), (92, 132, 168), (128, 140, 148))
SKIN_COLOURS = ((244, 208, 186), (224, 176, 146), (190, 136, 102), (140, 92, 64), (98, 64, 46))
HAIR_COLOURS = ((26, 20, 18), (70, 44, 26), (128, 84, 44), (196, 156, 96), (150, 66, 34), (170, 168, 166))


def draw_face(
    seed: int, identity: int, photo: int, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Draw photo number `photo` of an invented identity.

    Returns the photo, uint8 (size, size, 3) RGB, and its true landmarks in pixels, float64 (5, 2)
    x,y: left eye, right eye, nose tip, left and right mouth corner as they lie in the image.
    """
    face_rng = np.random.default_rng((seed, identity))
    face = _draw(TRAITS, face_rng)
    face.marks = face_rng
    rng = np.random.default_rng((seed, identity, photo + 1))  # (s, i, 0) would equal (s, i)
    shot = _draw(CONDITIONS, rng)
    face.mouth_y = face.nose_y + face.mouth_gap - 0.02 * shot.smile
    face.mouth_half = face.mouth_width + 0.07 * shot.smile
    face.corner_y = face.mouth_y - 0.015 - 0.07 * shot.smile
    face.chin_y = face.mouth_y + face.chin_gap + 0.10 * max(shot.jaw_drop, 0)

    height = _height_map(face, shot)
    albedo = _paint(face, shot, rng)
    rotation = _rotation(shot.yaw, shot.pitch, shot.roll)
    scale = shot.eye_distance / (2 * face.eye_x) * size / SIZE  # pixels to a unit
    centre = size * (np.array([0.5, 0.46]) + [shot.shift_x, shot.shift_y])

    landmarks = _project(_landmarks(face, height), rotation, shot.camera, scale, centre)
    pixels = _render(face, shot, rng, height, albedo, rotation, scale, centre, size)
    return pixels, landmarks


def _draw(table: dict[str, tuple[float, float]], rng: np.random.Generator) -> SimpleNamespace:
    low, high = np.array(list(table.values())).T
    values = low + (high - low) * rng.random(len(table))
    return SimpleNamespace(**dict(zip(table, values.tolist(), strict=True)))


def _mix(colours: tuple, place: float) -> np.ndarray:
    """The colour at `place` (0 to 1) of a list of colours."""
    at = place * (len(colours) - 1)
    k = min(int(at), len(colours) - 2)
    return np.array(colours[k]) * (k + 1 - at) + np.array(colours[k + 1]) * (at - k)


# ---- shape ---------------------------------------------------------------------------------------


def _bump(x: float, y: float, sigma_x: float, sigma_y: float) -> np.ndarray:
    """A Gaussian hill at (x, y) and its mirror image at (-x, y), as one hill where x is 0."""
    row = np.exp(-0.5 * ((GRID_X - x) / sigma_x) ** 2)
    if x:
        row = row + np.exp(-0.5 * ((GRID_X + x) / sigma_x) ** 2)
    return np.outer(np.exp(-0.5 * ((GRID_Y - y) / sigma_y) ** 2), row).astype(np.float32)


def _height_map(face: SimpleNamespace, shot: SimpleNamespace) -> np.ndarray:
    """z of the head's surface over the grid, float32 (len(GRID_Y), len(GRID_X))."""
    down = np.clip(GRID_Y / face.chin_y, 0, None)
    half_width = face.face_width * (1 - face.jaw_taper * np.clip(down, 0, 1) ** 1.6)
    across = np.abs(GRID_X[None] / half_width[:, None]) ** 2.3
    along = np.where(GRID_Y > 0, down**face.jaw_square, (np.abs(GRID_Y) / 1.62) ** 2.2)
    inside = 1 - across - along[:, None]
    # below 0 the surface goes on steeply backwards: the side of the head
    z = 1.25 * np.sign(inside) * np.abs(inside) ** 0.45

    nose_y, mouth_y = face.nose_y, face.mouth_y
    z -= _bump(face.eye_x, -0.03, 0.24, 0.17) * 0.17
    z += _bump(face.eye_x, 0.0, 0.13, 0.09) * 0.09
    z += _bump(0.30, -face.brow_height, 0.28, 0.10) * 0.07
    z += _bump(0.62, nose_y - 0.1, 0.20, 0.22) * face.cheek
    z += _bump(0.0, mouth_y, 0.36, 0.22) * 0.07
    z += _bump(0.0, face.chin_y - 0.20, 0.24, 0.15) * 0.13
    z += _nose(face)
    upper, lower = face.lip_upper, face.lip_lower
    z += _bump(0.0, mouth_y - 0.55 * upper, face.mouth_half * 0.55, upper * 0.55) * upper * 0.8
    z += _bump(0.0, mouth_y + 0.60 * lower, face.mouth_half * 0.50, lower * 0.55) * lower * 0.9
    z -= _bump(0.0, mouth_y, face.mouth_half * 0.8, 0.022) * 0.045
    z -= _bump(face.mouth_half + 0.03, face.corner_y, 0.05, 0.05) * 0.03
    z -= _bump(0.0, mouth_y + lower + 0.10, 0.22, 0.06) * 0.05
    if face.dimple > 0:
        z -= _bump(0.0, face.chin_y - 0.20, 0.025, 0.06) * 0.05 * face.dimple
    return z


def _nose(face: SimpleNamespace) -> np.ndarray:
    rise = np.clip((GRID_Y + 0.18) / (face.nose_y + 0.18), 0, 1) ** 1.2
    fall = 1 / (1 + np.exp((GRID_Y - face.nose_y - 0.07) / 0.035))
    sigma = face.bridge + 0.35 * face.nose_width * rise**3
    ridge = np.exp(-0.5 * (GRID_X[None] / sigma[:, None]) ** 2)
    z = (face.nose_height * rise * fall)[:, None] * ridge
    z = z + _bump(0.0, face.nose_y, face.nose_tip, 0.075) * 0.09
    return z + _bump(face.nose_width, face.nose_y + 0.035, 0.055, 0.065) * 0.11


def _landmarks(face: SimpleNamespace, height: np.ndarray) -> np.ndarray:
    """The five points in the head frame, (5, 3)."""
    mouth = 0.97 * face.mouth_half
    points = np.array(
        [
            (-face.eye_x, 0.0),
            (face.eye_x, 0.0),
            (0.0, face.nose_y),
            (-mouth, face.corner_y),
            (mouth, face.corner_y),
        ]
    )
    column = np.rint((points[:, 0] - GRID_X[0]) * UNIT).astype(int)
    row = np.rint((points[:, 1] - GRID_Y[0]) * UNIT).astype(int)
    return np.column_stack([points, height[row, column]])


# ---- paint ---------------------------------------------------------------------------------------


class _Canvas:
    """The frontal albedo, uint8 RGB, drawn in units with anti-aliased polygons."""

    def __init__(self, colour: np.ndarray):
        self.image = np.empty((len(GRID_Y), len(GRID_X), 3), np.float32)
        self.image[:] = colour

    def tint(self, weight: np.ndarray, colour) -> None:
        """Blend a colour in, where the weight (a map of the grid) is high."""
        rows = np.flatnonzero(weight.max(axis=1) > 0.004)
        columns = np.flatnonzero(weight.max(axis=0) > 0.004)
        if len(rows) == 0:
            return
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # most tints are small
        colour = np.asarray(colour, np.float32)
        self.image[part] += np.clip(weight[part], 0, 1)[..., None] * (colour - self.image[part])

    def mask(self, points: np.ndarray, thickness: float = 0.0, soft: float = 0.0) -> np.ndarray:
        """A polygon (thickness 0) or a line as weights in 0..1; soft is a blur in units."""
        weight = np.zeros(self.image.shape[:2], np.uint8)
        at = np.rint(((points - (GRID_X[0], GRID_Y[0])) * UNIT) * 16).astype(np.int32)
        if thickness:
            width = max(1, round(thickness * UNIT))
            cv2.polylines(weight, [at], False, 255, width, cv2.LINE_AA, shift=4)
        else:
            cv2.fillPoly(weight, [at], 255, cv2.LINE_AA, shift=4)
        if soft:
            weight = cv2.GaussianBlur(weight, (0, 0), soft * UNIT)
        return weight.astype(np.float32) / 255


def _paint(face: SimpleNamespace, shot: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    skin = _mix(SKIN_COLOURS, face.melanin)
    hair = _hair_colour(shot)
    canvas = _Canvas(skin)
    red = skin * (1.0, 0.72, 0.68)
    canvas.tint(_bump(0.58, face.nose_y - 0.02, 0.22, 0.2) * 0.35, red)
    canvas.tint(_bump(0.0, face.nose_y, 0.12, 0.10) * 0.35, red)
    canvas.tint(_bump(face.eye_x, 0.0, 0.22, 0.14) * 0.35, skin * (0.72, 0.66, 0.68))
    canvas.tint(_bump(face.eye_x, 0.17, 0.15, 0.035) * 0.5 * face.bags, skin * 0.6)
    _paint_marks(canvas, face, skin)
    if shot.beard > 0:
        below = 1 / (1 + np.exp(-(GRID_Y - face.nose_y - 0.14 + 0.5 * 0) / 0.05))
        beard = below[:, None] * (1 - 0.6 * _bump(0.0, face.mouth_y, face.mouth_half, 0.14))
        beard = beard + _bump(0.9, face.mouth_y - 0.3, 0.12, 0.4)
        canvas.tint(np.clip(beard, 0, 1) * (0.25 + 0.5 * shot.beard), 0.7 * hair + 0.15 * skin)
    _paint_mouth(canvas, face, shot, skin)
    _paint_nose(canvas, face, skin)
    for side in (-1, 1):
        _paint_eye(canvas, face, shot, skin, side)
        _paint_brow(canvas, face, shot, hair, skin, side)
    if shot.glasses > 0:
        _paint_glasses(canvas, face, shot)
    return canvas.image


def _paint_marks(canvas: _Canvas, face: SimpleNamespace, skin: np.ndarray) -> None:
    """Freckles and moles: where they are belongs to the identity."""
    rng = face.marks
    spots = rng.uniform((-0.75, -0.7), (0.75, 1.4), (5, 2))
    for (x, y), radius in zip(spots[: rng.integers(0, 6)], rng.uniform(0.02, 0.045, 5), strict=False):
        turn = np.linspace(0, 2 * np.pi, 12)
        circle = np.column_stack([x + radius * np.cos(turn), y + radius * np.sin(turn)])
        canvas.tint(canvas.mask(circle, soft=0.01), skin * (0.36, 0.27, 0.25))
    if face.freckles > 0:
        noise = rng.standard_normal((len(GRID_Y), len(GRID_X))).astype(np.float32)
        noise = cv2.GaussianBlur(noise, (0, 0), 1.1) * 4
        where = _bump(0.36, face.nose_y - 0.18, 0.26, 0.17) + _bump(0.0, face.nose_y - 0.2, 0.2, 0.2)
        canvas.tint(np.clip(noise - 0.9, 0, 1) * where * face.freckles, skin * (0.55, 0.42, 0.36))
    for side in (-1, 1):
        line = [(0.20, 0.02), (0.30, 0.12), (0.40, 0.27), (0.43, 0.40)]
        line = (np.array(line) + (face.nose_width - 0.12, face.nose_y)) * (side, 1)
        canvas.tint(canvas.mask(line, 0.02, soft=0.018) * face.fold, skin * 0.6)


def _paint_nose(canvas: _Canvas, face: SimpleNamespace, skin: np.ndarray) -> None:
    nostril = _bump(0.62 * face.nose_width, face.nose_y + 0.075, 0.035, 0.020)
    canvas.tint(nostril * 0.95, skin * (0.25, 0.17, 0.16))
    wing = _bump(face.nose_width + 0.06, face.nose_y + 0.04, 0.018, 0.06)
    canvas.tint(wing * 0.35, skin * (0.5, 0.4, 0.4))


def _paint_mouth(
    canvas: _Canvas, face: SimpleNamespace, shot: SimpleNamespace, skin: np.ndarray
) -> None:
    u = np.linspace(-1, 1, 25)
    x = u * face.mouth_half
    arch = 1 - u**2
    line = face.corner_y + (face.mouth_y - face.corner_y) * arch**0.8
    gap = 0.13 * max(shot.jaw_drop, 0) * arch
    bow = face.lip_upper * (arch**0.7) * (1 - 0.28 * np.exp(-((u / 0.16) ** 2)))
    top, bottom = line - 0.35 * gap, line + 0.65 * gap
    red = skin * (0.90, 0.80 - 0.36 * face.lip_red, 0.80 - 0.30 * face.lip_red)

    def lens(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        return np.concatenate([np.column_stack([x, upper]), np.column_stack([x, lower])[::-1]])

    canvas.tint(canvas.mask(lens(top - bow, top), soft=0.008) * 0.9, red * 0.88)
    canvas.tint(canvas.mask(lens(bottom, bottom + face.lip_lower * arch**0.6), soft=0.008) * 0.9, red)
    if shot.jaw_drop > 0.05:
        hole = canvas.mask(lens(top, bottom), soft=0.005)
        teeth = np.clip(1.2 - (GRID_Y - face.mouth_y + 0.02) / 0.07, 0, 1)[:, None]
        canvas.tint(hole, (58, 24, 24))
        canvas.tint(hole * teeth * 0.9, (214, 206, 194))
    canvas.tint(canvas.mask(np.column_stack([x, top]), 0.014, soft=0.006), red * 0.35)


def _paint_eye(
    canvas: _Canvas, face: SimpleNamespace, shot: SimpleNamespace, skin: np.ndarray, side: int
) -> None:
    u = np.linspace(-1, 1, 21)
    # u runs from the inner corner to the outer one; the upper lid is highest before the middle
    tilt = -face.eye_tilt * u
    upper = tilt - face.eye_height * shot.eye_open * (1 - np.abs(u + 0.1 * (1 - u**2)) ** 2.2)
    lower = tilt + 0.62 * face.eye_height * (1 - np.abs(u - 0.12 * (1 - u**2)) ** 2.2)
    x = side * (face.eye_x + u * face.eye_width)

    def line(y: np.ndarray) -> np.ndarray:
        return np.column_stack([x, y])

    opening = canvas.mask(np.concatenate([line(upper), line(lower)[::-1]]))
    canvas.tint(canvas.mask(line(upper - face.lid * (1 - 0.3 * u**2)), 0.02, soft=0.012), skin * 0.45)
    canvas.tint(opening, (226, 220, 214))
    centre_x, centre_y = side * face.eye_x + shot.gaze_x, -0.012 + shot.gaze_y
    distance = np.hypot(GRID_X[None] - centre_x, GRID_Y[:, None] - centre_y)
    iris = _mix(IRIS_COLOURS, face.iris_hue)
    for radius, colour in ((0.098, iris * 0.45), (0.086, iris), (0.042, (12, 10, 10))):
        canvas.tint(opening * np.clip((radius - distance) * UNIT + 0.5, 0, 1), colour)
    shine = np.hypot(GRID_X[None] - centre_x - 0.025 * shot.light_x, GRID_Y[:, None] - centre_y + 0.03)
    canvas.tint(opening * np.clip((0.02 - shine) * UNIT + 0.5, 0, 1), (255, 255, 255))
    shade = np.clip(1 - (GRID_Y[:, None] + face.eye_height * shot.eye_open) / 0.06, 0, 1)
    canvas.tint(opening * shade * 0.6, (40, 30, 28))
    canvas.tint(canvas.mask(line(upper), 0.032, soft=0.006), skin * 0.16)
    canvas.tint(canvas.mask(line(lower), 0.014, soft=0.006) * 0.7, skin * (0.5, 0.36, 0.36))


def _paint_brow(
    canvas: _Canvas,
    face: SimpleNamespace,
    shot: SimpleNamespace,
    hair: np.ndarray,
    skin: np.ndarray,
    side: int,
) -> None:
    u = np.linspace(-1, 1, 15)
    x = side * (face.eye_x + 0.02 + u * face.brow_length)
    y = -face.brow_height - shot.brow_raise - face.brow_arch * (1 - (u - 0.25) ** 2)
    y = y - face.brow_tilt * u
    half = 0.5 * face.brow_thickness * np.clip(1.15 - 0.75 * np.clip(u, 0, 1) ** 1.5, 0, 1)
    shape = np.concatenate([np.column_stack([x, y - half]), np.column_stack([x, y + half])[::-1]])
    colour = 0.25 * hair + 0.08 * skin
    canvas.tint(canvas.mask(shape, soft=0.014) * face.brow_dark, colour)


def _paint_glasses(canvas: _Canvas, face: SimpleNamespace, shot: SimpleNamespace) -> None:
    turn = np.linspace(0, 2 * np.pi, 40)
    square = np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** 0.6
    for side in (-1, 1):
        rim = np.column_stack([side * face.eye_x + 0.30 * square, 0.05 + 0.22 * np.sin(turn)])
        canvas.tint(canvas.mask(rim) * 0.12, (200, 215, 225))
        canvas.tint(canvas.mask(rim, 0.035), (40 + 60 * shot.glasses, 34, 30))
    bridge = np.array([(-face.eye_x + 0.30, 0.0), (0.0, -0.04), (face.eye_x - 0.30, 0.0)])
    canvas.tint(canvas.mask(bridge, 0.03), (40 + 60 * shot.glasses, 34, 30))


def _hair_colour(shot: SimpleNamespace) -> np.ndarray:
    return _mix(HAIR_COLOURS, shot.hair_tone) * (0.6 + 0.7 * shot.hair_light)


# ---- camera --------------------------------------------------------------------------------------


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Head frame to camera frame, (3, 3): pitch, then yaw, then roll; degrees."""
    (cy, cp, cr), (sy, sp, sr) = (f(np.radians([yaw, pitch, roll])) for f in (np.cos, np.sin))
    about_x = np.array([(1, 0, 0), (0, cp, -sp), (0, sp, cp)])
    about_y = np.array([(cy, 0, sy), (0, 1, 0), (-sy, 0, cy)])
    about_z = np.array([(cr, -sr, 0), (sr, cr, 0), (0, 0, 1)])
    return about_z @ about_y @ about_x


def _project(
    points: np.ndarray, rotation: np.ndarray, camera: float, scale: float, centre: np.ndarray
) -> np.ndarray:
    """Head-frame points (N, 3) to pixels (N, 2)."""
    seen = points @ rotation.T  # (N, 3)
    return seen[:, :2] / (1 - seen[:, 2:] / camera) * scale + centre


class _Rays:
    """One ray a pixel, in a body's frame: start + depth * step, each (H, W) for x, y and z."""

    def __init__(self, x: np.ndarray, y: np.ndarray, camera: float, rotation: np.ndarray):
        self.rotation = rotation.astype(np.float32)
        turn = rotation.T.astype(np.float32)
        self.start = [row[0] * x + row[1] * y for row in turn]
        self.step = [row[2] - (row[0] * x + row[1] * y) / np.float32(camera) for row in turn]

    def at(self, axis: int, depth: np.ndarray | float) -> np.ndarray:
        return self.start[axis] + depth * self.step[axis]

    def ellipsoid(self, centre: tuple, radii: tuple) -> np.ndarray:
        """Depth of the hit nearest to the camera, -inf where there is none: a quadratic's root."""
        a = b = c = 0.0
        for start, step, middle, radius in zip(self.start, self.step, centre, radii, strict=True):
            p, q = (start - middle) / radius, step / radius
            a, b, c = a + q * q, b + p * q, c + p * p
        square = b * b - a * (c - 1)
        return np.where(square > 0, (np.sqrt(np.maximum(square, 0)) - b) / a, -np.inf)

    def height_map(self, height: np.ndarray, steps: int = 26, halvings: int = 5) -> np.ndarray:
        """Depth at which the ray, coming from the camera, first dips below the height map."""
        nearest, farthest = 2.0, -0.7
        stride = np.float32((nearest - farthest) / steps)
        depth = np.full(self.start[0].shape, nearest, np.float32)
        done = np.zeros(depth.shape, bool)
        for _ in range(steps):
            depth -= stride * ~done
            done |= self._above(height, depth) < 0
        below, above = depth, depth + stride
        for _ in range(halvings):
            middle = (below + above) / 2
            hit = self._above(height, middle) < 0
            below, above = np.where(hit, middle, below), np.where(hit, above, middle)
        return np.where(done & (self.at(2, above) > -0.6), above, -np.inf).astype(np.float32)

    def _above(self, height: np.ndarray, depth: np.ndarray) -> np.ndarray:
        column, row = (self.at(0, depth) - GRID_X[0]) * UNIT, (self.at(1, depth) - GRID_Y[0]) * UNIT
        surface = cv2.remap(
            height, column, row, cv2.INTER_LINEAR, None, cv2.BORDER_CONSTANT, (-9.0,)
        )
        return self.at(2, depth) - surface


# ---- light ---------------------------------------------------------------------------------------


def _render(
    face: SimpleNamespace,
    shot: SimpleNamespace,
    rng: np.random.Generator,
    height: np.ndarray,
    albedo: np.ndarray,
    rotation: np.ndarray,
    scale: float,
    centre: np.ndarray,
    size: int,
) -> np.ndarray:
    wide = round(size * OVERSAMPLE)
    pixel = (np.arange(wide, dtype=np.float32) + 0.5) * (size / wide) - 0.5
    x, y = np.meshgrid((pixel - centre[0]) / scale, (pixel - centre[1]) / scale)
    x, y = x.astype(np.float32), y.astype(np.float32)
    head = _Rays(x, y, shot.camera, rotation)
    body = _Rays(x, y, shot.camera, _rotation(0.25 * shot.yaw, 0, 0.3 * shot.roll))
    light = np.array([shot.light_x, shot.light_y, 1.0])
    light /= np.linalg.norm(light)

    hair = _hair_colour(shot)
    skin = _mix(SKIN_COLOURS, face.melanin)
    noise = _streaks(rng)
    height, albedo = _grow_hair(face, shot, rng, height, albedo, hair, noise)
    scene = _Scene(wide)
    scene.add_head(head, height, albedo, rotation.T @ light)
    width, volume = face.face_width, shot.hair_volume
    for side in (-1, 1):
        scene.add(head, (side * width, 0.22, -0.15), (0.10, 0.30, 0.2), skin * 0.92)
    if face.bald < 0.9 or shot.hair_length > 0:
        radii = (width + 0.05 + volume, 1.44 + volume, 1.2)
        scene.add(head, (0, -0.22, -0.5), radii, hair, noise)
    if shot.hair_length > 0:
        radii = (width + 0.1 + 1.5 * volume, 1.3 + shot.hair_length, 0.55)
        scene.add(head, (0, 0.35, -0.75), radii, hair * 0.8, noise)
    scene.add(body, (0, 1.9, -0.45), (0.56, 1.3, 0.5), skin * 0.75)
    clothes = rng.uniform(10, 235, 3)
    scene.add(body, (0, face.chin_y + 1.5, -0.6), (2.2, 1.15, 0.9), clothes)

    image = _backdrop(rng, wide)
    hit = np.isfinite(scene.depth)
    image[hit] = _shade(scene.albedo[hit], scene.normal[hit], scene.lit[hit], shot, light)
    return _develop(image, shot, rng, size)


class _Scene:
    """What each ray hits first: depth, albedo, camera-frame normal, openness to light, gloss."""

    def __init__(self, side: int):
        self.depth = np.full((side, side), -np.inf, np.float32)
        self.albedo = np.zeros((side, side, 3), np.float32)
        self.normal = np.zeros((side, side, 3), np.float32)
        self.lit = np.ones((side, side, 2), np.float32)  # share of the key light, of the fill light

    def add(self, rays: _Rays, centre, radii, colour, noise: np.ndarray | None = None) -> None:
        depth = rays.ellipsoid(centre, radii)
        near = depth > self.depth
        depth = depth[near]  # (M,)
        point = [rays.start[k][near] + depth * rays.step[k][near] for k in range(3)]
        normal = np.stack([(point[k] - centre[k]) / radii[k] ** 2 for k in range(3)], axis=1)
        self.depth[near] = depth
        self.normal[near] = _unit(normal @ rays.rotation.T)
        self.albedo[near] = colour
        self.lit[near] = (0.75, 0.7)
        if noise is not None:
            grain = _look_up(noise, point[0], point[1])
            self.albedo[near] *= 1 + 0.35 * grain

    def add_head(self, rays: _Rays, height, albedo, light: np.ndarray) -> None:
        slope_y, slope_x = np.gradient(cv2.GaussianBlur(height, (0, 0), 1.2), 1 / UNIT)
        normal = np.dstack([-slope_x, -slope_y, np.ones_like(height)]).astype(np.float32)
        lit = np.dstack([1 - _shadow(height, light), _openness(height)])
        depth = rays.height_map(height)
        near = depth > self.depth
        depth = depth[near]  # (M,)
        at = [rays.start[k][near] + depth * rays.step[k][near] for k in range(2)]
        self.depth[near] = depth
        self.albedo[near] = _look_up(albedo, *at)
        self.normal[near] = _unit(_look_up(normal, *at) @ rays.rotation.T)
        self.lit[near] = _look_up(lit.astype(np.float32), *at)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt(np.einsum("nk,nk->n", vectors, vectors) + 1e-9)[:, None]


def _look_up(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A map of the grid at M points, (M, channels)."""
    # cv2.remap takes at most 32,767 rows, so the points are laid out as a broad image
    pad = -len(x) % 256
    x, y = (np.pad(v, (0, pad)).reshape(-1, 256) for v in (x, y))
    found = cv2.remap(image, (x - GRID_X[0]) * UNIT, (y - GRID_Y[0]) * UNIT, cv2.INTER_LINEAR)
    return found.reshape(x.size, -1)[: x.size - pad]


def _shadow(height: np.ndarray, light: np.ndarray) -> np.ndarray:
    """How far each texel lies in the shadow of the surface between it and the light, 0 to 1."""
    deepest = np.zeros_like(height)
    for distance in np.linspace(0.08, 0.8, 9):
        x, y = distance * UNIT * light[:2]
        move = np.array([(1, 0, -x), (0, 1, -y)])
        size = height.shape[::-1]
        there = cv2.warpAffine(height, move, size, borderMode=cv2.BORDER_REPLICATE)
        np.maximum(deepest, there - height - distance * light[2], out=deepest)
    return cv2.GaussianBlur(np.clip(deepest / 0.05, 0, 1), (0, 0), 2.0)


def _openness(height: np.ndarray) -> np.ndarray:
    """Darkens hollows: a cheap ambient occlusion."""
    floor = np.maximum(height, -0.3)
    hollow = cv2.GaussianBlur(floor, (0, 0), 0.10 * UNIT) - floor
    return np.clip(1 - 4.0 * hollow, 0.25, 1.15)


def _streaks(rng: np.random.Generator) -> np.ndarray:
    """Strands of hair as noise stretched downwards, about -1 to 1."""
    rough = rng.standard_normal((9, 130)).astype(np.float32)
    return 0.6 * cv2.resize(rough, (len(GRID_X), len(GRID_Y)), interpolation=cv2.INTER_CUBIC)


def _grow_hair(face, shot, rng, height, albedo, hair, noise) -> tuple[np.ndarray, np.ndarray]:
    """Hair on the head's front: from the hairline up and in front of the ears."""
    x = np.abs(GRID_X[None]) / face.face_width
    line = face.hairline + shot.hairline_shift + 0.25 * x**2 + 0.9 * x**8 + shot.parting * GRID_X * (1 - x**2).clip(0)
    edge = (line - GRID_Y[:, None] + 0.03 * noise) / 0.035
    weight = (1 / (1 + np.exp(-np.clip(edge, -20, 20)))).astype(np.float32)
    if face.bald > 0.9:
        weight = weight * 0.25
    strands = hair * (1 + 0.35 * noise[..., None])
    mixed = albedo + weight[..., None] * (strands.astype(np.float32) - albedo)
    return height + (0.04 + 0.3 * shot.hair_volume) * weight, mixed


def _tone(warmth: float) -> np.ndarray:
    """Colour of a light, from bluish (-1) to orange (1)."""
    return np.array([1 + 0.22 * warmth, 1 + 0.02 * warmth, 1 - 0.25 * warmth], np.float32)


def _shade(albedo, normal, lit, shot: SimpleNamespace, light: np.ndarray) -> np.ndarray:
    """Linear light (M, 3): a wrapped Lambert key light, a fill from above, a soft gloss."""
    albedo = (np.clip(albedo, 0, 255) / 255) ** 2
    half = light + (0, 0, 1)
    light, half = light.astype(np.float32), (half / np.linalg.norm(half)).astype(np.float32)
    key = shot.key * np.clip((normal @ light + 0.15) / 1.15, 0, 1) * lit[:, 0]
    gloss = 0.06 * shot.key * np.clip(normal @ half, 0, 1) ** 24 * lit[:, 0]
    fill = shot.fill * (0.75 - 0.25 * normal[:, 1]) * lit[:, 1]
    warm, cool = _tone(shot.warmth), _tone(shot.fill_warmth)
    return albedo * (key[:, None] * warm + fill[:, None] * cool) + gloss[:, None] * warm


def _backdrop(rng: np.random.Generator, side: int) -> np.ndarray:
    """A blurred room or street in linear light (side, side, 3): colours, then boxes and discs."""
    base = rng.uniform(0, 255, (3, 3, 3)).astype(np.float32)
    base = base.mean() + (base - base.mean()) * rng.uniform(0.1, 0.7)
    image = cv2.resize(base, (side, side), interpolation=cv2.INTER_LINEAR)
    for _ in range(rng.integers(0, 9)):
        colour = (rng.uniform(0, 255) + rng.uniform(-45, 45, 3)).tolist()
        (x, y), (w, h) = rng.integers(0, side, 2).tolist(), rng.integers(8, side // 2, 2).tolist()
        if rng.random() < 0.6:
            cv2.rectangle(image, (x, y), (x + w, y + h), colour, -1)
        else:
            cv2.circle(image, (x, y), w // 2, colour, -1)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(1.0, 9.0))
    return (np.clip(image, 0, 255) / 255) ** 2


def _develop(
    image: np.ndarray, shot: SimpleNamespace, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Linear light to uint8 RGB: exposure, blur, size, gamma, saturation, noise."""
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    image *= (0.2 / image.mean()) ** 0.5  # a camera's exposure makes up half of what is missing
    if shot.blur > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), shot.blur)
    image = np.clip(image, 0, 1.2) ** (0.5 * shot.gamma)
    grey = image.mean(axis=2, keepdims=True)
    image = 255 * (grey + shot.saturation * (image - grey))
    image += shot.noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# ---- sets ----------------------------------------------------------------------------------------


def identity_name(identity: int) -> str:
    return f"s{identity:04d}"


def write_set(
    folder: Path,
    identities: range,
    photos: int,
    seed: int,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Draw photos 1 to `photos` of each identity as folder/s0007/s0007_0001.jpg, LFW's naming.

    Photos that are there are kept, so a stopped run goes on where it was: each file gets its name
    only when it is whole. `progress`, such as a tqdm's update, is called with 1 for each photo.
    Returns how many were drawn.
    """

    def draw(task: tuple[int, int, Path]) -> None:
        identity, photo, path = task
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_jpeg(path, draw_face(seed, identity, photo)[0])
        if progress:
            progress(1)

    tasks = []
    for identity in identities:
        name = identity_name(identity)
        for photo in range(1, photos + 1):
            path = Path(folder) / name / f"{name}_{photo:04d}.jpg"
            if not path.exists():
                tasks.append((identity, photo, path))
    # threads: NumPy and OpenCV hold no lock while they work, and no worker has to import anything
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return sum(1 for _ in pool.map(draw, tasks))


def _write_jpeg(path: Path, rgb: np.ndarray) -> None:
    coded = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    partial = path.with_suffix(".tmp")  # the same name in the next run, which overwrites it
    partial.write_bytes(coded.tobytes())
    os.replace(partial, path)


def lfw_pairs(identities: range, photos: int, folds: int, pairs: int, seed: int) -> str:
    """Text of a pairs file in LFW's official format, for a set made by `write_set`.

    Each fold has `pairs` genuine and then `pairs` impostor pairs, none twice, of identities that
    are in no other fold. Raises ValueError where the set is too small for that.
    """
    rng = np.random.default_rng(seed)
    lines = [f"{folds}\t{pairs}"]
    for fold in np.array_split(rng.permutation(list(identities)), folds):
        names = [identity_name(k) for k in sorted(fold.tolist())]
        shots = range(1, photos + 1)
        genuine = [f"{a}\t{i}\t{j}" for a in names for i in shots for j in shots if i < j]
        strangers = [(a, b) for a in names for b in names if a < b]
        impostor = [f"{a}\t{i}\t{b}\t{j}" for a, b in strangers for i in shots for j in shots]
        if min(len(genuine), len(impostor)) < pairs:
            raise ValueError(f"{len(names)} identities x {photos} photos give under {pairs} pairs")
        for kind in (genuine, impostor):
            lines += [kind[k] for k in sorted(rng.choice(len(kind), pairs, replace=False))]
    return "\n".join(lines) + "\n"


def write_demo(root: Path, progress: Callable[[int], object] | None = None) -> int:
    """The demo's sets: root/train/raw, root/test/raw and root/test/pairs.txt (see DEMO).

    Returns how many photos were drawn: 0 where all of them were there.
    """
    train, test = DEMO["train"], DEMO["test"]
    drawn = write_set(Path(root) / "train/raw", *train, seed=0, progress=progress)
    drawn += write_set(Path(root) / "test/raw", *test, seed=0, progress=progress)
    partial = Path(root) / "test/pairs.tmp"
    partial.write_text(lfw_pairs(*test, **DEMO["pairs"], seed=0))
    os.replace(partial, Path(root) / "test/pairs.txt")
    return drawn
