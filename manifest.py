"""The index of a prepared folder: manifest.csv, one row a photo, whatever became of it.

`source` is the photo's path below the raw folder, `image` the crop's below the prepared one (empty
for a rejected photo). Coordinates are in pixels of the photo. CSV with quotes where needed, so any
file name goes through; bytes that are not UTF-8 too.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import InputError

NAME = "manifest.csv"
SETTINGS = "pre_process.json"  # source and settings of a prepared folder
POINTS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
COLUMNS = (
    *("source", "identity", "image", "status", "reason", "width", "height", "faces", "score"),
    *("x1", "y1", "x2", "y2"),
    *(f"{point}_{axis}" for point in POINTS for axis in "xy"),
)
ENCODING = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}

ALIGNED = "aligned"
UNDETECTED = "undetected"  # no face was found; cropped by the set's median landmarks
REJECTED = "rejected"
EXCLUDED = "excluded"  # its identity is in the list of --exclude-names


@dataclass(frozen=True)
class Row:
    """One photo. `box` is (4,) x1, y1, x2, y2 and `landmarks` (5, 2), or None without a face."""

    source: str
    identity: str
    image: str
    status: str
    reason: str = ""
    width: int = 0
    height: int = 0
    faces: int = 0
    score: float | None = None
    box: np.ndarray | None = None
    landmarks: np.ndarray | None = None

    def line(self) -> str:
        """The row as CSV, with its line end."""
        numbers = [self.score, *_flat(self.box, 4), *_flat(self.landmarks, 10)]
        cells = [self.source, self.identity, self.image, self.status, self.reason]
        cells += [str(value) for value in (self.width, self.height, self.faces)]
        return csv_line(cells + ["" if value is None else f"{value:.4f}" for value in numbers])

    @staticmethod
    def parse(cells: list[str]) -> "Row":
        """Cells in the order of COLUMNS. Raises ValueError where they are not such."""
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{len(cells)} cells instead of {len(COLUMNS)}")
        width, height, faces = (int(cell) for cell in cells[5:8])
        box = _numbers(cells[9:13])
        landmarks = _numbers(cells[13:])
        return Row(
            *cells[:5], width, height, faces,
            float(cells[8]) if cells[8] else None,
            box,
            None if landmarks is None else landmarks.reshape(5, 2),
        )  # fmt: skip


def csv_line(cells: list[str]) -> str:
    text = io.StringIO()
    # With \n alone as its end, Python 3.11 leaves a \r in a name bare, which no reader takes.
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


def read_rows(path: Path) -> Iterator[list[str]]:
    """The cells of each row of a manifest. Raises InputError: not there, or of another kind."""
    try:
        with open(path, **ENCODING) as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) != COLUMNS:
                raise InputError(
                    f"{path} is not a manifest of this version: prepare the folder again "
                    f"(python pre_process.py --src ... --out {path.parent})"
                )
            for cells in reader:
                if len(cells) != len(COLUMNS):
                    raise InputError(
                        f"{path}:{reader.line_num} has {len(cells)} cells instead of "
                        f"{len(COLUMNS)}: run pre_process.py on this folder again"
                    )
                if leaves(cells[2]):
                    raise InputError(
                        f"{path}:{reader.line_num} names a crop outside of {path.parent} "
                        f"({cells[2]}): prepare the folder again"
                    )
                yield cells
    except (FileNotFoundError, NotADirectoryError) as error:
        folder = path.parent
        how = f"--src RAW --out {folder}"
        if folder.exists():  # raw photos, or an archive of them
            how = f"--src {folder} --out data/NAME, then name that"
        raise InputError(
            f"{path} is not there: prepare the folder first (python pre_process.py {how})"
        ) from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path} can't be read ({error}): prepare the folder again") from error


def leaves(image: str) -> bool:
    """Whether the path of a crop leads out of its folder."""
    return image.startswith("/") or ".." in image.split("/")


def read_manifest(folder: Path) -> list[Row]:
    """All rows of a prepared folder. Raises InputError: not there, or damaged."""
    path = folder / NAME
    rows = []
    for number, cells in enumerate(read_rows(path), start=2):
        try:
            rows.append(Row.parse(cells))
        except ValueError as error:
            raise InputError(f"{path}: row {number} is damaged ({error}): prepare again") from error
    return rows


def read_settings(folder: Path) -> dict:
    """Source and settings that a folder was prepared with; empty where there are none.

    Raises InputError: damaged.
    """
    path = folder / SETTINGS
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(errors="surrogateescape"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): delete {folder} and prepare it again"
        ) from error
    return settings


def _flat(array: np.ndarray | None, size: int) -> list[float | None]:
    return [None] * size if array is None else np.asarray(array, dtype=float).ravel().tolist()


def _numbers(cells: list[str]) -> np.ndarray | None:
    return np.array([float(cell) for cell in cells]) if cells[0] else None
