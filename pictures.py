"""README's pictures, from drawn faces alone: images/faces.png. Run `make demo` first.

make pictures
"""

from pathlib import Path

import numpy as np
from PIL import Image

import config
import manifest
from images import read_image

PEOPLE, GAP = 8, 4


def main(_: None) -> None:
    folder = config.SYNTHETIC / "train"
    rows = [row for row in manifest.read_manifest(folder) if row.status == manifest.ALIGNED]
    by_identity = {row.identity: row for row in rows}  # the last photo of each
    shown = list(by_identity.values())[:PEOPLE]
    photos = [read_image(folder / "raw" / row.source) for row in shown]
    crops = [read_image(folder / row.image) for row in shown]
    path = config.ROOT / "images" / "faces.png"
    path.parent.mkdir(exist_ok=True)
    save(path, photos, crops)
    print(f"wrote {path}")


def save(path: Path, photos: list[np.ndarray], crops: list[np.ndarray]) -> None:
    """Photos in one line, and each one's crop below its middle."""
    width, height = photos[0].shape[1], photos[0].shape[0]
    side = crops[0].shape[0]
    canvas = Image.new(
        "RGB", (len(photos) * (width + GAP) - GAP, height + GAP + side), (255, 255, 255)
    )
    for place, (photo, crop) in enumerate(zip(photos, crops, strict=True)):
        x = place * (width + GAP)
        canvas.paste(Image.fromarray(photo), (x, 0))
        canvas.paste(Image.fromarray(crop), (x + (width - side) // 2, height + GAP))
    canvas.save(path, optimize=True)


if __name__ == "__main__":
    config.run(main, None)
