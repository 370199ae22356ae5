"""README's pictures, from drawn faces and from plots alone.

    make demo        # once: what they show
    make pictures

images/faces.png       drawn photos, and the same faces aligned
images/pair.jpg        verify.py --save, with the demo's network
images/curves.png      the demo's training
images/theta_lfw.png, theta_recipe.png
                       plots of lfw_eval.py, where it has been run on LFW's View 2: of the reference
                       network (runs/face_embedder/lfw, needs face_embedder.onnx) and of the weights
                       that ship (runs/recipe-cpu/lfw)
What can't be made is told, and the picture that is there stays.
"""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

import config
import download
import manifest
import training_curves
import verify
from checkpoint import BEST, sha256, write_atomic
from images import read_image

PEOPLE, GAP = 8, 4
PAIR = ("s1003/s1003_0002.jpg", "s1003/s1003_0005.jpg")  # of one person, who is not trained on
IMAGES = config.ROOT / "images"


def main(_: None) -> None:
    IMAGES.mkdir(exist_ok=True)
    drawn, demo = config.SYNTHETIC / "train", config.RUNS / "demo"
    reference = shown_by(config.RUNS / "face_embedder" / "lfw")
    recipe = shown_by(config.RUNS / config.WEIGHTS.stem / "lfw", config.WEIGHTS)
    photos = tuple(config.SYNTHETIC / "test" / "raw" / name for name in PAIR)
    ways = (
        ("faces.png", (drawn / manifest.NAME,), lambda path: save_faces(path, drawn)),
        ("pair.jpg", (demo / BEST, *photos), lambda path: save_pair(path, photos, demo)),
        (
            "curves.png",
            (demo / "result.json",),
            lambda path: save_curves(path, demo),
        ),
        ("theta_lfw.png", (reference,), lambda path: copy(reference, path)),
        ("theta_recipe.png", (recipe,), lambda path: copy(recipe, path)),
    )
    for name, needs, make in ways:
        missing = next((path for path in needs if not path.exists()), None)
        if missing is None:
            make(IMAGES / name)
            print(f"wrote {IMAGES / name}")
        else:
            theta = missing in (reference, recipe)
            how = "run lfw_eval.py for it (results/lfw.csv)" if theta else "run make demo first"
            print(f"{name} is left as it is: {missing} is not there, {how}")


def shown_by(report: Path, weights: Path | None = None) -> Path:
    """The plot of angles of a report of View 2, all of it, with flip; else what is not there.

    Of these weights, where they are named: others may have had the same name.
    """
    try:
        result = json.loads((report / "eval.json").read_text())
        options = json.loads((report / "run.json").read_text())["options"]
        whole = result["data"]["pairs_sha256"] == download.LFW_PAIRS[0].sha256
        theirs = weights is None or result["model"]["sha256"] == sha256(weights)
        if whole and theirs and options["flip"] == "True":
            return report / "theta_dist.png"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return report / "a report of View 2 with flip"


def save_pair(path: Path, photos: tuple[Path, ...], model: Path) -> None:
    verify.main(config.VerifyOptions(photos=photos, model=model, save=path))


def save_curves(path: Path, run: Path) -> None:
    copy(training_curves.write(run), path)


def copy(source: Path, path: Path) -> None:
    write_atomic(path, source.read_bytes())


def save_faces(path: Path, folder: Path) -> None:
    """Photos in one line, and each one's crop below its middle."""
    rows = [row for row in manifest.read_manifest(folder) if row.status == manifest.ALIGNED]
    by_identity = {row.identity: row for row in rows}  # the last photo of each
    shown = list(by_identity.values())[:PEOPLE]
    save(
        path,
        [read_image(folder / "raw" / row.source) for row in shown],
        [read_image(folder / row.image) for row in shown],
    )


def save(path: Path, photos: list[np.ndarray], crops: list[np.ndarray]) -> None:
    width, height = photos[0].shape[1], photos[0].shape[0]
    side = crops[0].shape[0]
    canvas = Image.new(
        "RGB", (len(photos) * (width + GAP) - GAP, height + GAP + side), (255, 255, 255)
    )
    for place, (photo, crop) in enumerate(zip(photos, crops, strict=True)):
        x = place * (width + GAP)
        canvas.paste(Image.fromarray(photo), (x, 0))
        canvas.paste(Image.fromarray(crop), (x + (width - side) // 2, height + GAP))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())


if __name__ == "__main__":
    config.run(main, None)
