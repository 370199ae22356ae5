"""Drawn faces of invented identities, so that the whole pipeline runs with no data at all.

    photo, landmarks = draw_face(seed=0, identity=7, photo=3)  # uint8 (176, 176, 3) RGB, (5, 2)
    write_demo(Path("data/synthetic"))                         # train/raw, test/raw, test/pairs.txt

A photo is a function of (seed, identity, photo): the same bytes on any number of workers.
An identity is a set of TRAITS (face geometry, eyes, brows, nose, mouth, marks). What changes from
photo to photo (CONDITIONS: pose, light, expression, hair, glasses, backdrop, noise) is louder in
the pixels than the traits are, so that an identity has to be learned.

How it is drawn: the head is a height map z = H(x, y) with an albedo painted in the frontal view.
Each ray of the camera is marched to the height map (relief mapping: Policarpo, Oliveira and Comba
2005), or hits one of a few ellipsoids (hair, ears, neck, shoulders); the nearest hit is shaded.

Head frame: x to the right in the photo, y down, z towards the camera; the origin is in the middle
of the head at the height of the eyes; the unit is half the width of an average face (68 mm).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

# The demo: identities, and photos of each; train and test share no identity.
DEMO_TRAIN = (range(280), 6)
DEMO_TEST = (range(1000, 1050), 8)
DEMO_SETS = (DEMO_TRAIN, DEMO_TEST)
DEMO_FOLDS, DEMO_PAIRS = 10, 60  # folds, and pairs a fold of each kind
# Of `pre_process.py --draw`: other people than the demo's, and of other names.
CROWD_FIRST, CROWD_PHOTOS, CROWD_SEED = 5000, 8, 1

SIZE = 176  # pixels of a photo's side: one size, so that detection can batch
RAYS = 1.3  # rays to a pixel along each side, averaged
UNIT = 80  # texels of the height map and the albedo to a unit
GRID_X = np.arange(-1.30, 1.30, 1 / UNIT, dtype=np.float32)
GRID_Y = np.arange(-1.70, 1.80, 1 / UNIT, dtype=np.float32)

# What an identity is: name -> lowest and highest value. Lengths in units, the rest from 0 to 1.
TRAITS = {
    "eye_x": (0.40, 0.52),  # half the distance between the eyes
    "eye_width": (0.15, 0.24),  # half the length of an eye's opening
    "eye_height": (0.06, 0.135),
    "eye_tilt": (-0.05, 0.07),  # how far the outer corner lies above the inner one
    "lid": (0.03, 0.11),  # height of the crease above the eye
    "iris": (0.0, 1.0),  # a place in IRIS_COLOURS
    "brow_height": (0.20, 0.42),  # above the eye's centre
    "brow_thickness": (0.02, 0.12),
    "brow_arch": (0.0, 0.14),
    "brow_tilt": (-0.08, 0.09),
    "brow_length": (0.19, 0.31),
    "brow_dark": (0.4, 1.0),
    "nose_y": (0.44, 0.66),
    "nose_width": (0.09, 0.22),
    "nose_height": (0.26, 0.42),
    "nose_tip": (0.05, 0.13),
    "bridge": (0.06, 0.12),
    "mouth_gap": (0.36, 0.58),  # from the nose's tip down to the mouth
    "mouth_width": (0.25, 0.44),
    "lip_upper": (0.04, 0.12),
    "lip_lower": (0.06, 0.17),
    "lip_red": (0.0, 1.2),
    "chin_gap": (0.48, 0.74),  # from the mouth down to the chin
    "face_width": (0.86, 1.07),
    "jaw_taper": (0.0, 0.45),
    "jaw_square": (2.8, 5.0),  # exponent of the outline
    "cheek": (-0.02, 0.12),
    "hairline": (-1.15, -0.68),
    "melanin": (0.0, 1.0),  # a place in SKIN_COLOURS
    "fold": (0.0, 1.0),  # lines from the nose to the mouth
    "bags": (0.0, 1.0),  # below the eyes
    "freckles": (-1.0, 1.0),  # none below 0, here and in all that starts below 0
    "dimple": (-1.0, 1.0),
    "bald": (-4.0, 1.0),
}
# What a photo is: name -> lowest and highest value, of which the middle is likelier.
CONDITIONS = {
    "yaw": (-28.0, 28.0),  # degrees
    "pitch": (-14.0, 14.0),
    "roll": (-20.0, 20.0),
    "camera": (7.0, 25.0),  # its distance, in units
    "eye_distance": (33.0, 47.0),  # in pixels of a photo of SIZE, frontal
    "shift_x": (-0.07, 0.07),  # share of the photo's side
    "shift_y": (-0.06, 0.06),
    "light_x": (-1.3, 1.3),  # direction of the key light, of which z is 1
    "light_y": (-1.3, 0.4),
    "key": (0.5, 1.15),  # strength of the key light and of the fill light
    "fill": (0.25, 0.55),
    "key_warmth": (-1.0, 1.0),
    "fill_warmth": (-1.0, 1.0),
    "smile": (-0.3, 1.0),
    "jaw_drop": (-1.2, 1.0),
    "brow_raise": (-0.03, 0.05),
    "eye_open": (0.75, 1.15),
    "gaze_x": (-0.05, 0.05),
    "gaze_y": (-0.02, 0.02),
    "hair_tone": (0.0, 1.0),  # a place in HAIR_COLOURS
    "hair_light": (0.6, 1.3),
    "hair_volume": (0.02, 0.24),
    "hair_length": (-1.0, 1.0),
    "hairline_shift": (-0.08, 0.1),
    "parting": (-0.35, 0.35),  # slope of the hairline
    "beard": (-2.5, 1.0),
    "glasses": (-4.0, 1.0),
    "blur": (0.0, 0.7),  # pixels
    "noise": (0.5, 4.0),  # grey levels
    "gamma": (0.8, 1.3),
    "saturation": (0.65, 1.15),
}
IRIS_COLOURS = "#341e12 #603a1c #7a6030 #587048 #5c84a8 #808c94"
SKIN_COLOURS = "#f4d0ba #e0b092 #be8866 #8c5c40 #62402e"
HAIR_COLOURS = "#c49c60 #80542c #462c1a #1a1412 #462c1a #964222 #aaa8a6"


def draw_face(
    seed: int, identity: int, photo: int, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Draw photo number `photo` of an invented identity.

    Returns the photo, uint8 (size, size, 3) RGB, and its true landmarks in pixels, float64 (5, 2)
    x,y: left eye, right eye, nose tip, left and right mouth corner as they lie in the photo.
    """
    marks = np.random.default_rng((seed, identity))
    face = _draw(TRAITS, marks)
    rng = np.random.default_rng((seed, identity, photo + 1))  # (seed, identity, 0) equals `marks`
    shot = _draw(CONDITIONS, rng, terms=2)

    face.mouth_y = face.nose_y + face.mouth_gap - 0.02 * shot.smile
    face.mouth_x = face.mouth_width + 0.07 * shot.smile
    face.corner_y = face.mouth_y - 0.015 - 0.07 * shot.smile
    face.chin_y = face.mouth_y + face.chin_gap + 0.10 * max(shot.jaw_drop, 0)
    face.skin = _colour(SKIN_COLOURS, face.melanin)
    shot.hair = _colour(HAIR_COLOURS, shot.hair_tone) * np.float32(shot.hair_light)
    shot.rotation = _rotation(shot.yaw, shot.pitch, shot.roll)
    shot.scale = shot.eye_distance / (2 * face.eye_x) * size / SIZE  # pixels to a unit
    shot.centre = size * np.array([0.5 + shot.shift_x, 0.46 + shot.shift_y])

    height = _height_map(face)
    landmarks = _landmarks(face, height, shot)
    return _photograph(face, shot, height, _paint(face, shot, marks), rng, size), landmarks


def _draw(table: dict, rng: np.random.Generator, terms: int = 1) -> SimpleNamespace:
    """A value for each name: uniform, or the mean of several uniform ones, so seldom extreme."""
    low, high = np.array(list(table.values())).T
    values = low + (high - low) * rng.random((terms, len(table))).mean(axis=0)
    return SimpleNamespace(**dict(zip(table, values.tolist(), strict=True)))


def _colour(scale: str, place: float) -> np.ndarray:
    """The colour at a place, 0 to 1, of a scale of colours: float32 (3,), 0 to 255."""
    table = np.array([tuple(bytes.fromhex(name[1:])) for name in scale.split()])
    at = np.linspace(0, 1, len(table))
    return np.array([np.interp(place, at, channel) for channel in table.T], np.float32)


# ---- shape: maps of the grid, float32 (len(GRID_Y), len(GRID_X)) ---------------------------------


def _bump(x: float, y: float, sigma_x: float, sigma_y: float) -> np.ndarray:
    """A Gaussian hill at (x, y) and its mirror image at (-x, y); one hill where x is 0."""
    row = np.exp(-0.5 * ((GRID_X - x) / sigma_x) ** 2)
    if x:
        row += np.exp(-0.5 * ((GRID_X + x) / sigma_x) ** 2)
    return np.outer(np.exp(-0.5 * ((GRID_Y - y) / sigma_y) ** 2), row)


def _height_map(face: SimpleNamespace) -> np.ndarray:
    """z of the head's front; beyond its outline it falls steeply: the side of the head."""
    down = np.clip(GRID_Y / face.chin_y, 0, None)
    half_width = face.face_width * (1 - face.jaw_taper * np.clip(down, 0, 1) ** 1.6)
    across = np.abs(GRID_X[None] / half_width[:, None]) ** 2.3
    along = np.where(GRID_Y > 0, down**face.jaw_square, np.abs(GRID_Y / 1.62) ** 2.2)
    inside = 1 - across - along[:, None]
    z = 1.25 * np.sign(inside) * np.abs(inside) ** 0.45

    mouth_y, upper, lower = face.mouth_y, face.lip_upper, face.lip_lower
    z -= 0.17 * _bump(face.eye_x, -0.03, 0.24, 0.17)  # sockets, eyeballs, ridge of the brows
    z += 0.09 * _bump(face.eye_x, 0, 0.13, 0.09)
    z += 0.07 * _bump(0.30, -face.brow_height, 0.28, 0.10)
    z += face.cheek * _bump(0.62, face.nose_y - 0.1, 0.20, 0.22)
    z += 0.07 * _bump(0, mouth_y, 0.36, 0.22)
    z += 0.8 * upper * _bump(0, mouth_y - 0.55 * upper, 0.55 * face.mouth_x, 0.55 * upper)
    z += 0.9 * lower * _bump(0, mouth_y + 0.60 * lower, 0.50 * face.mouth_x, 0.55 * lower)
    z -= 0.045 * _bump(0, mouth_y, 0.8 * face.mouth_x, 0.022)
    z -= 0.03 * _bump(face.mouth_x + 0.03, face.corner_y, 0.05, 0.05)
    z -= 0.05 * _bump(0, mouth_y + lower + 0.10, 0.22, 0.06)
    z += 0.13 * _bump(0, face.chin_y - 0.20, 0.24, 0.15)
    z -= 0.05 * max(face.dimple, 0) * _bump(0, face.chin_y - 0.20, 0.025, 0.06)
    return z + _nose(face)


def _nose(face: SimpleNamespace) -> np.ndarray:
    rise = np.clip((GRID_Y + 0.18) / (face.nose_y + 0.18), 0, 1) ** 1.2
    fall = 1 / (1 + np.exp((GRID_Y - face.nose_y - 0.07) / 0.035))
    sigma = face.bridge + 0.35 * face.nose_width * rise**3
    z = (face.nose_height * rise * fall)[:, None] * np.exp(-0.5 * (GRID_X / sigma[:, None]) ** 2)
    z += 0.09 * _bump(0, face.nose_y, face.nose_tip, 0.075)
    return z + 0.11 * _bump(face.nose_width, face.nose_y + 0.035, 0.055, 0.065)


def _landmarks(face: SimpleNamespace, height: np.ndarray, shot: SimpleNamespace) -> np.ndarray:
    """The five points as the camera sees them, in pixels, float64 (5, 2)."""
    mouth_x = 0.97 * face.mouth_x
    x = np.array([-face.eye_x, face.eye_x, 0, -mouth_x, mouth_x])
    y = np.array([0, 0, face.nose_y, face.corner_y, face.corner_y])
    row, column = (np.rint((v - g[0]) * UNIT).astype(int) for v, g in ((y, GRID_Y), (x, GRID_X)))
    seen = np.column_stack([x, y, height[row, column]]) @ shot.rotation.T  # (5, 3)
    return seen[:, :2] / (1 - seen[:, 2:] / shot.camera) * shot.scale + shot.centre


# ---- paint: the albedo, float32 (len(GRID_Y), len(GRID_X), 3), 0 to 255 --------------------------


def _tint(image: np.ndarray, weight: np.ndarray, colour: np.ndarray | tuple) -> None:
    """Blend a colour into the image, as far as the weight, a map of the grid, says."""
    rows = np.flatnonzero(weight.max(axis=1) > 0.004)
    columns = np.flatnonzero(weight.max(axis=0) > 0.004)
    if len(rows):  # most tints are small, so only the box that holds them is touched
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        image[box] += np.clip(weight[box], 0, 1)[..., None] * (np.float32(colour) - image[box])


def _stroke(x, y, thickness: float = 0.0, soft: float = 0.01) -> np.ndarray:
    """A line, or a filled polygon where the thickness is 0, as a map of weights from 0 to 1."""
    weight = np.zeros((len(GRID_Y), len(GRID_X)), np.uint8)
    at = np.column_stack([(x - GRID_X[0]), (y - GRID_Y[0])]) * (UNIT * 16)
    at = np.rint(at).astype(np.int32)  # OpenCV takes 1/16 texels with shift=4
    if thickness:
        cv2.polylines(weight, [at], False, 255, max(1, round(thickness * UNIT)), cv2.LINE_AA, 4)
    else:
        cv2.fillPoly(weight, [at], 255, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(weight, (0, 0), soft * UNIT).astype(np.float32) / 255


def _lens(x: np.ndarray, top: np.ndarray, bottom: np.ndarray, soft: float = 0.006) -> np.ndarray:
    """The area between two curves over the same x."""
    return _stroke(np.append(x, x[::-1]), np.append(top, bottom[::-1]), soft=soft)


def _paint(face: SimpleNamespace, shot: SimpleNamespace, marks: np.random.Generator) -> np.ndarray:
    skin = face.skin
    image = np.tile(skin, (len(GRID_Y), len(GRID_X), 1))
    _tint(image, 0.35 * _bump(0.58, face.nose_y - 0.02, 0.22, 0.2), skin * (1.0, 0.72, 0.68))
    _tint(image, 0.35 * _bump(0, face.nose_y, 0.12, 0.10), skin * (1.0, 0.72, 0.68))
    _tint(image, 0.35 * _bump(face.eye_x, 0, 0.22, 0.14), skin * (0.72, 0.66, 0.68))
    _tint(image, 0.5 * face.bags * _bump(face.eye_x, 0.17, 0.15, 0.035), skin * 0.6)
    _paint_marks(image, face, marks)
    if shot.beard > 0:
        below = 1 / (1 + np.exp((face.nose_y + 0.14 - GRID_Y) / 0.05))
        beard = below[:, None] * (1 - 0.6 * _bump(0, face.mouth_y, face.mouth_x, 0.14))
        beard += _bump(0.9, face.mouth_y - 0.3, 0.12, 0.4)
        _tint(image, (0.25 + 0.5 * shot.beard) * beard, 0.7 * shot.hair + 0.15 * skin)
    _paint_nose(image, face)
    _paint_mouth(image, face, shot)
    for side in (-1, 1):
        _paint_eye(image, face, shot, side)
        _paint_brow(image, face, shot, side)
    if shot.glasses > 0:
        _paint_glasses(image, face, shot)
    return image


def _paint_marks(image: np.ndarray, face: SimpleNamespace, marks: np.random.Generator) -> None:
    """Moles and freckles: where they are belongs to the identity."""
    turn = np.linspace(0, 2 * np.pi, 12)
    for _ in range(marks.integers(1, 5)):
        x, y, radius = marks.uniform((-0.75, -0.7, 0.022), (0.75, 1.4, 0.05))
        mole = _stroke(x + radius * np.cos(turn), y + radius * np.sin(turn))
        _tint(image, mole, face.skin * (0.36, 0.27, 0.25))
    if face.freckles > 0:
        spots = marks.standard_normal((len(GRID_Y), len(GRID_X)), np.float32)
        spots = np.clip(4 * cv2.GaussianBlur(spots, (0, 0), 1.1) - 0.9, 0, 1)
        where = _bump(0.36, face.nose_y - 0.18, 0.26, 0.17) + _bump(0, face.nose_y - 0.2, 0.2, 0.2)
        _tint(image, 0.8 * face.freckles * where * spots, face.skin * (0.60, 0.47, 0.40))
    for side in (-1, 1):
        x = side * (np.array([0.08, 0.18, 0.28, 0.31]) + face.nose_width)
        y = np.array([0.02, 0.12, 0.27, 0.40]) + face.nose_y
        _tint(image, face.fold * _stroke(x, y, 0.02, soft=0.025), face.skin * 0.6)


def _paint_nose(image: np.ndarray, face: SimpleNamespace) -> None:
    nostril = _bump(0.62 * face.nose_width, face.nose_y + 0.075, 0.035, 0.020)
    wing = _bump(face.nose_width + 0.06, face.nose_y + 0.04, 0.018, 0.06)
    _tint(image, 0.95 * nostril, face.skin * (0.25, 0.17, 0.16))
    _tint(image, 0.35 * wing, face.skin * (0.5, 0.4, 0.4))


def _paint_mouth(image: np.ndarray, face: SimpleNamespace, shot: SimpleNamespace) -> None:
    u = np.linspace(-1, 1, 25)
    x, arch = u * face.mouth_x, 1 - u**2
    line = face.corner_y + (face.mouth_y - face.corner_y) * arch**0.8
    gap = 0.13 * max(shot.jaw_drop, 0) * arch
    top, bottom = line - 0.35 * gap, line + 0.65 * gap
    bow = face.lip_upper * arch**0.7 * (1 - 0.28 * np.exp(-((u / 0.16) ** 2)))
    red = face.skin * (0.90, 0.80 - 0.36 * face.lip_red, 0.80 - 0.30 * face.lip_red)
    _tint(image, 0.9 * _lens(x, top - bow, top), red * 0.88)
    _tint(image, 0.9 * _lens(x, bottom, bottom + face.lip_lower * arch**0.6), red)
    if shot.jaw_drop > 0.05:
        opening = _lens(x, top, bottom)
        teeth = np.clip(1.2 - (GRID_Y - face.mouth_y + 0.02) / 0.07, 0, 0.9)[:, None]
        _tint(image, opening, (58, 24, 24))
        _tint(image, opening * teeth, (214, 206, 194))
    _tint(image, _stroke(x, top, 0.014), red * 0.35)


def _paint_eye(image: np.ndarray, face: SimpleNamespace, shot: SimpleNamespace, side: int) -> None:
    u = np.linspace(-1, 1, 21)  # from the inner corner to the outer one
    x = side * (face.eye_x + u * face.eye_width)
    opened = face.eye_height * shot.eye_open
    upper = -face.eye_tilt * u - opened * (1 - np.abs(u + 0.1 * (1 - u**2)) ** 2.2)
    lower = -face.eye_tilt * u + 0.62 * face.eye_height * (1 - np.abs(u - 0.12 * (1 - u**2)) ** 2.2)
    crease = upper - face.lid * (1 - 0.3 * u**2)
    _tint(image, _stroke(x, crease, 0.02), face.skin * 0.45)

    opening = _lens(x, upper, lower)
    _tint(image, opening, (226, 220, 214))
    across = GRID_X - side * face.eye_x - shot.gaze_x
    down = (GRID_Y + 0.012 - shot.gaze_y)[:, None]
    away = np.hypot(across, down)
    iris = _colour(IRIS_COLOURS, face.iris)
    for radius, colour in ((0.098, iris * 0.45), (0.086, iris), (0.042, (12, 10, 10))):
        _tint(image, opening * np.clip((radius - away) * UNIT + 0.5, 0, 1), colour)
    glint = (0.02 - np.hypot(across - 0.025 * shot.light_x, down + 0.03)) * UNIT + 0.5
    _tint(image, opening * np.clip(glint, 0, 1), (255, 255, 255))
    _tint(image, opening * np.clip(0.6 - (GRID_Y[:, None] + opened) / 0.1, 0, 0.6), (40, 30, 28))
    _tint(image, _stroke(x, upper, 0.032), face.skin * 0.16)
    _tint(image, 0.7 * _stroke(x, lower, 0.014), face.skin * (0.5, 0.36, 0.36))


def _paint_brow(image: np.ndarray, face: SimpleNamespace, shot: SimpleNamespace, side: int) -> None:
    u = np.linspace(-1, 1, 15)
    x = side * (face.eye_x + 0.02 + u * face.brow_length)
    y = -face.brow_height - shot.brow_raise - face.brow_arch * (1 - (u - 0.25) ** 2)
    y -= face.brow_tilt * u
    half = 0.5 * face.brow_thickness * (1 - 0.75 * np.clip(u, 0, 1) ** 1.5)
    brow = face.brow_dark * _lens(x, y - half, y + half, soft=0.014)
    _tint(image, brow, 0.25 * shot.hair + 0.08 * face.skin)


def _paint_glasses(image: np.ndarray, face: SimpleNamespace, shot: SimpleNamespace) -> None:
    turn = np.linspace(0, 2 * np.pi, 40)
    across = 0.30 * np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** 0.6
    frame = (40 + 60 * shot.glasses, 34, 30)
    for side in (-1, 1):
        rim = (side * face.eye_x + across, 0.05 + 0.22 * np.sin(turn))
        _tint(image, 0.12 * _stroke(*rim), (200, 215, 225))
        _tint(image, _stroke(*rim, 0.035), frame)
    bridge = (face.eye_x - 0.30) * np.array([-1, 0, 1])
    _tint(image, _stroke(bridge, np.array([0, -0.04, 0]), 0.03), frame)


# ---- camera --------------------------------------------------------------------------------------


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """From the head's frame to the camera's, (3, 3): pitch, then yaw, then roll, in degrees."""
    (cy, cp, cr), (sy, sp, sr) = (f(np.radians([yaw, pitch, roll])) for f in (np.cos, np.sin))
    about_x = np.array([(1, 0, 0), (0, cp, -sp), (0, sp, cp)])
    about_y = np.array([(cy, 0, sy), (0, 1, 0), (-sy, 0, cy)])
    about_z = np.array([(cr, -sr, 0), (sr, cr, 0), (0, 0, 1)])
    return about_z @ about_y @ about_x


class _Rays:
    """The camera's rays in the frame of a body: start + depth * step, each 3 x (side, side)."""

    def __init__(self, shot: SimpleNamespace, rotation: np.ndarray, size: int):
        side = round(size * RAYS)
        pixel = (np.arange(side) + 0.5) * (size / side) - 0.5
        x, y = np.meshgrid(*((pixel[None] - shot.centre[:, None]) / shot.scale).astype(np.float32))
        self.rotation = rotation.astype(np.float32)
        self.start = [row[0] * x + row[1] * y for row in self.rotation.T]
        away = np.float32(1 / shot.camera)
        self.step = [
            row[2] - away * start for row, start in zip(self.rotation.T, self.start, strict=True)
        ]

    def at(self, depth: np.ndarray, where=...) -> list[np.ndarray]:
        """x, y and z at a depth, of all rays or of those of a mask."""
        return [a[where] + depth * b[where] for a, b in zip(self.start, self.step, strict=True)]

    def to_ellipsoid(self, centre: tuple, radii: tuple) -> np.ndarray:
        """Depth of the hit nearest to the camera, -inf where there is none: a quadratic's root."""
        a = b = c = 0.0
        for start, step, middle, radius in zip(self.start, self.step, centre, radii, strict=True):
            p, q = (start - middle) / radius, step / radius
            a, b, c = a + q * q, b + p * q, c + p * p
        square = b * b - a * (c - 1)
        return np.where(square > 0, (np.sqrt(np.maximum(square, 0)) - b) / a, -np.inf)

    def to_height_map(self, height: np.ndarray, steps: int = 18, halvings: int = 5) -> np.ndarray:
        """Depth at which each ray first dips below the map, -inf where it does not."""
        nearest, farthest = 2.0, -0.7
        stride = (nearest - farthest) / steps
        depth = np.full_like(self.start[0], nearest)
        hit = np.zeros(depth.shape, bool)
        for _ in range(steps):
            depth -= np.float32(stride) * ~hit
            hit |= self._is_below(height, depth)
        for _ in range(halvings):  # the surface lies between depth and depth + stride
            stride /= 2
            middle = depth + np.float32(stride)
            depth = np.where(self._is_below(height, middle), middle, depth)
        return np.where(hit & (self.at(depth)[2] > -0.6), depth, -np.inf)

    def _is_below(self, height: np.ndarray, depth: np.ndarray) -> np.ndarray:
        x, y, z = self.at(depth)
        column, row = (x - GRID_X[0]) * UNIT, (y - GRID_Y[0]) * UNIT
        beyond = (cv2.BORDER_CONSTANT, (-9.0,))
        return z < cv2.remap(height, column, row, cv2.INTER_LINEAR, None, *beyond)


# ---- light ---------------------------------------------------------------------------------------


def _photograph(
    face: SimpleNamespace,
    shot: SimpleNamespace,
    height: np.ndarray,
    albedo: np.ndarray,
    rng: np.random.Generator,
    size: int,
) -> np.ndarray:
    """The photo, uint8 (size, size, 3)."""
    light = np.array([shot.light_x, shot.light_y, 1.0])
    light /= np.linalg.norm(light)
    strands = _strands(rng)
    height, albedo = _with_hair(face, shot, height, albedo, strands)
    head = _Rays(shot, shot.rotation, size)
    body = _Rays(shot, _rotation(0.25 * shot.yaw, 0, 0.3 * shot.roll), size)

    scene = _Scene(head)
    scene.add_head(head, height, albedo, light @ shot.rotation)
    width, volume, length = face.face_width, shot.hair_volume, shot.hair_length
    for side in (-1, 1):
        scene.add(head, (side * width, 0.22, -0.15), (0.10, 0.30, 0.2), face.skin * 0.92)
    if face.bald < 0 or length > 0:
        radii = (width + 0.05 + volume, 1.44 + volume, 1.2)
        scene.add(head, (0, -0.22, -0.5), radii, shot.hair, strands)
    if length > 0:
        radii = (width + 0.1 + 1.5 * volume, 1.3 + length, 0.55)
        scene.add(head, (0, 0.35, -0.75), radii, shot.hair * 0.8, strands)
    scene.add(body, (0, 1.9, -0.45), (0.56, 1.3, 0.5), face.skin * 0.75)
    scene.add(body, (0, face.chin_y + 1.5, -0.6), (2.2, 1.15, 0.9), rng.uniform(10, 235, 3))

    image = _backdrop(rng, len(scene.depth))
    hit = np.isfinite(scene.depth)
    image[hit] = _shade(scene.albedo[hit], scene.normal[hit], scene.lit[hit], shot, light)
    return _develop(image, shot, rng, size)


class _Scene:
    """What each ray meets first: depth, albedo, normal to the camera, share of the light."""

    def __init__(self, rays: _Rays):
        shape = rays.start[0].shape
        self.depth = np.full(shape, -np.inf, np.float32)
        self.albedo = np.zeros((*shape, 3), np.float32)
        self.normal = np.zeros((*shape, 3), np.float32)
        self.lit = np.zeros((*shape, 2), np.float32)  # of the key light, of the fill light

    def add(self, rays: _Rays, centre, radii, colour, strands: np.ndarray | None = None) -> None:
        depth = rays.to_ellipsoid(centre, radii)
        near = depth > self.depth
        x, y, z = rays.at(depth[near], near)  # (M,) each
        normal = [(v - c) / r**2 for v, c, r in zip((x, y, z), centre, radii, strict=True)]
        self.depth[near] = depth[near]
        self.normal[near] = _unit(np.stack(normal, axis=1) @ rays.rotation.T)
        self.albedo[near] = colour if strands is None else colour * _look_up(strands, x, y)
        self.lit[near] = (0.75, 0.7)

    def add_head(self, rays: _Rays, height, albedo, light: np.ndarray) -> None:
        slope_y, slope_x = np.gradient(cv2.GaussianBlur(height, (0, 0), 1.2), 1 / UNIT)
        normal = np.dstack([-slope_x, -slope_y, np.ones_like(height)])
        lit = np.dstack([1 - _shadow(height, light), _openness(height)])
        depth = rays.to_height_map(height)
        near = depth > self.depth
        x, y, _ = rays.at(depth[near], near)  # (M,) each
        self.depth[near] = depth[near]
        self.normal[near] = _unit(_look_up(normal, x, y) @ rays.rotation.T)
        self.albedo[near] = _look_up(albedo, x, y)
        self.lit[near] = _look_up(lit, x, y)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt(np.einsum("mk,mk->m", vectors, vectors) + 1e-9)[:, None]  # (M, 3)


def _look_up(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A map of the grid at M points, (M, channels)."""
    pad = -len(x) % 256  # OpenCV takes at most 32,767 rows: the points go as a broad image
    column, row = (
        (np.pad(v, (0, pad)).reshape(-1, 256) - grid[0]) * UNIT
        for v, grid in ((x, GRID_X), (y, GRID_Y))
    )
    found = cv2.remap(image, column, row, cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE)
    return found.reshape(row.size, -1)[: len(x)]


def _shadow(height: np.ndarray, light: np.ndarray) -> np.ndarray:
    """How far each texel lies in the shadow of the surface between it and the light, 0 to 1."""
    deepest = np.zeros_like(height)
    for distance in (0.08, 0.16, 0.24, 0.32, 0.44, 0.56, 0.7):
        x, y, z = (distance * light).tolist()
        move = np.array([(1, 0, -x * UNIT), (0, 1, -y * UNIT)])
        there = cv2.warpAffine(height, move, height.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        np.maximum(deepest, there - height - z, out=deepest)
    return cv2.GaussianBlur(np.clip(deepest / 0.05, 0, 1), (0, 0), 2.0)


def _openness(height: np.ndarray) -> np.ndarray:
    """Share of the fill light: less in hollows, as a cheap ambient occlusion."""
    floor = np.maximum(height, -0.3)
    hollow = cv2.GaussianBlur(floor, (0, 0), 0.10 * UNIT) - floor
    return np.clip(1 - 4 * hollow, 0.25, 1.15)


def _strands(rng: np.random.Generator) -> np.ndarray:
    """Strands of hair: noise stretched downwards, a factor around 1."""
    rough = rng.standard_normal((9, 130), np.float32)
    return 1 + 0.2 * cv2.resize(rough, (len(GRID_X), len(GRID_Y)), interpolation=cv2.INTER_CUBIC)


def _with_hair(
    face: SimpleNamespace,
    shot: SimpleNamespace,
    height: np.ndarray,
    albedo: np.ndarray,
    strands: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Hair on the front of the head, above the hairline, which drops before the ears."""
    x = np.abs(GRID_X) / face.face_width
    line = face.hairline + shot.hairline_shift + 0.25 * x**2 + 0.9 * x**8
    line += shot.parting * GRID_X * np.clip(1 - x**2, 0, 1)
    above = (line - GRID_Y[:, None] + 0.15 * (strands - 1)) / 0.035
    weight = (0.25 if face.bald > 0 else 1.0) / (1 + np.exp(-np.clip(above, -20, 20)))
    hair = shot.hair * strands[..., None]
    thickness = 0.04 + 0.3 * shot.hair_volume
    return height + thickness * weight, albedo + weight[..., None] * (hair - albedo)


def _shade(albedo, normal, lit, shot: SimpleNamespace, light: np.ndarray) -> np.ndarray:
    """Linear light (M, 3): a wrapped Lambert key light, a fill light from above, a soft gloss."""
    half = light + (0, 0, 1)
    light, half = np.float32(light), np.float32(half / np.linalg.norm(half))
    key = shot.key * np.clip((normal @ light + 0.15) / 1.15, 0, 1) * lit[:, 0]
    fill = shot.fill * (0.75 - 0.25 * normal[:, 1]) * lit[:, 1]
    gloss = 0.06 * shot.key * np.clip(normal @ half, 0, 1) ** 24 * lit[:, 0]
    # a warmth from -1 (bluish) to 1 (orange)
    tint = np.array([0.22, 0.02, -0.25], np.float32)
    key_tint, fill_tint = 1 + shot.key_warmth * tint, 1 + shot.fill_warmth * tint
    diffuse = (np.clip(albedo, 0, 255) / 255) ** 2  # to linear light, with a gamma of 2
    return diffuse * (np.outer(key, key_tint) + np.outer(fill, fill_tint)) + np.outer(
        gloss, key_tint
    )


def _backdrop(rng: np.random.Generator, side: int) -> np.ndarray:
    """A room or a street out of focus, in linear light (side, side, 3)."""
    base = rng.uniform(0, 255, (3, 3, 3)).astype(np.float32)
    base = base.mean() + (base - base.mean()) * np.float32(rng.uniform(0.1, 0.5))
    image = cv2.resize(base, (side, side), interpolation=cv2.INTER_LINEAR)
    for _ in range(rng.integers(0, 9)):
        colour = (rng.uniform(0, 255) + rng.uniform(-35, 35, 3)).tolist()
        (x, y), (width, height) = rng.integers(0, side, 2), rng.integers(8, side // 2, 2)
        if rng.random() < 0.6:
            cv2.rectangle(image, (int(x), int(y), int(width), int(height)), colour, -1)
        else:
            cv2.circle(image, (int(x), int(y)), int(width) // 2, colour, -1)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(1.0, 9.0))
    return (np.clip(image, 0, 255) / 255) ** 2


def _develop(
    image: np.ndarray, shot: SimpleNamespace, rng: np.random.Generator, size: int
) -> np.ndarray:
    """From linear light to a photo: exposure, blur, gamma, saturation, noise."""
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    image *= np.sqrt(0.2 / image.mean())  # the camera makes up for half of what is missing
    if shot.blur > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), shot.blur)
    image = np.clip(image, 0, 1.2) ** np.float32(0.5 * shot.gamma)
    grey = image.mean(axis=2, keepdims=True)
    image = 255 * (grey + shot.saturation * (image - grey))
    image += shot.noise * rng.standard_normal(image.shape, np.float32)
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
        rgb, _ = draw_face(seed, identity, photo)
        coded = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, coded.tobytes())

    tasks = []
    for identity in identities:
        name = identity_name(identity)
        for photo in range(1, photos + 1):
            path = Path(folder) / name / f"{name}_{photo:04d}.jpg"
            if not path.exists():
                tasks.append((identity, photo, path))
    # threads: NumPy and OpenCV hold no lock while they work, and no worker has to import anything
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for _ in pool.map(draw, tasks):
            if progress:
                progress(1)
    return len(tasks)


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
    """The demo's sets: root/train/raw, root/test/raw and root/test/pairs.txt.

    Returns how many photos were drawn: 0 where all of them were there.
    """
    root = Path(root)
    drawn = write_set(root / "train/raw", *DEMO_TRAIN, seed=0, progress=progress)
    drawn += write_set(root / "test/raw", *DEMO_TEST, seed=0, progress=progress)
    pairs = lfw_pairs(*DEMO_TEST, DEMO_FOLDS, DEMO_PAIRS, seed=0)
    _write(root / "test/pairs.txt", pairs.encode())
    return drawn


def _write(path: Path, content: bytes) -> None:
    """Write a file that has its name only when it is whole."""
    partial = path.with_name(path.name + ".tmp")  # the next run overwrites what a killed one left
    partial.write_bytes(content)
    os.replace(partial, path)
