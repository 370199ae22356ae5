"""Compare two photos, or find a face in a folder of people.

    python verify.py a.jpg b.jpg                           # runs/faces, runs/cpu, or what ships
    python verify.py a.jpg b.jpg --model runs/first --save pair.png
    python verify.py a.jpg b.jpg --all                     # every face of a against every one of b
    python verify.py photo.jpg --gallery people/ --top 3   # people/<name>/*.jpg
    python verify.py a.jpg b.jpg --json                    # one JSON object, nothing else

Each photo's central face is found, aligned and embedded; the angle between two embeddings tells
whether they are of one person: below the model's threshold they are taken for it. The threshold
was taken by train.py on people held out of the training, or on its --val-pairs, at the false accept
rate that is printed with it; a model that carries none needs --threshold for a decision.

The gallery's photos are embedded once and kept in the model's run (or in --enrolled); the next
time only new and changed ones are looked at. The photos themselves are left as they are.
Exit code 0 where there is an answer, whichever; 2 for a photo that can't be used.
"""

import config

if __name__ == "__main__":
    # Before torch is imported: --help and a wrong option answer at once.
    OPTIONS = config.parse(config.VerifyOptions, __doc__)

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import embeddings
import identify
import pair_picture
import protocol
import thresholds
import utils
from config import InputError, VerifyOptions
from face_reader import FaceReader, Photo, look, several_lines
from pair_picture import Pair, shown
from photo_folders import one_line
from thresholds import Threshold, decision


def main(options: VerifyOptions) -> None:
    check(options)
    # What the steps say on the way goes to stderr where stdout is for one JSON object.
    with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
        if options.threads:
            torch.set_num_threads(options.threads)
        device = utils.pick_device(options.device)
        torch.backends.cudnn.allow_tf32 = False  # full float32: a card's angles are a CPU's
        torch.backends.cuda.matmul.allow_tf32 = False
        model = options.model or config.default_model()
        if options.model is None:
            print(f"no --model named: using {one_line(str(model))}")
        normal = options.input_mean, options.input_std
        utils.check_foreign((model,), options.network, *normal)
        file = utils.model_file(model)
        digest = embeddings.hash_model(file)
        network = embeddings.load_hashed(
            model, file, digest, device, *normal, network=options.network
        )
        threshold = thresholds.pick(options.threshold, network, file)
        about = {"model": str(model), "model_sha256": digest}
        names = ("threshold", "far", "impostor_pairs", "threshold_from", "started_from", "tar")
        facts = threshold or (None,) * len(names)
        about |= zip(names, (None if fact == "" else fact for fact in facts), strict=True)
        reader = FaceReader(network, options.min_face_size, device)
        photos = look(options.photos, reader, options.max_pixels, options.all)
        if options.gallery is None:
            said, found, pair = compare(*photos, threshold, options)
        else:
            settings = {
                "min_face_size": options.min_face_size,
                "input": list(normal),
                "network": options.network,
                "device": device.type,  # cards round differently
            }
            kept = options.enrolled or identify.enrolled_file(file, options.gallery, settings)
            settings["model"] = digest
            said, found, pair = identify.find(photos[0], threshold, options, reader, kept, settings)
    print(json.dumps(about | found, allow_nan=False) if options.json else "\n".join(said))
    if options.save:  # after the answer, which a full disk must not cost
        draw(options.save, pair(), threshold)
        print(
            f"wrote {one_line(str(options.save))}", file=sys.stderr if options.json else sys.stdout
        )


# --------------------------------------------------------------------------------------------------
# two photos


def compare(
    left: Photo, right: Photo, threshold: Threshold | None, options: VerifyOptions
) -> tuple[list[str], dict, Callable[[], Pair]]:
    """-> lines for a person, the same for --json, and what gives the nearest faces for --save."""
    angles = all_angles(left.embeddings, right.embeddings)  # (F, G) degrees
    i, j = np.unravel_index(angles.argmin(), angles.shape)
    same = None if threshold is None else angles < threshold.degrees
    found = {
        "photos": [str(left.path), str(right.path)],
        "faces_found": [left.read.found, right.read.found],
        "boxes": [left.plain_boxes, right.plain_boxes],
        "scores": [[face.score for face in photo.read.faces] for photo in (left, right)],
    }
    if options.all:
        found |= {"angles": angles.tolist(), "same": None if same is None else same.tolist()}
        said = [*matrix_lines(left, right, angles, same), *thresholds.lines(threshold)]
    else:
        found |= {
            "boxes": [b[0] for b in found["boxes"]],
            "scores": [s[0] for s in found["scores"]],
        }
        found |= {"angle": float(angles[0, 0]), "same": None if same is None else bool(same[0, 0])}
        said = [*several_lines(left, right), answer(angles[0, 0], threshold)]
        said += thresholds.lines(threshold) if threshold is None else []
    nearest = Pair(shown(left, int(i)), shown(right, int(j)), float(angles[i, j]))
    return said, found, lambda: nearest


def all_angles(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(F, E) and (G, E) -> degrees (F, G)."""
    i, j = np.indices((len(left), len(right))).reshape(2, -1)
    return protocol.theta(left[i], right[j]).reshape(len(left), len(right))


def answer(angle: float, threshold: Threshold | None) -> str:
    if threshold is None:
        return f"theta {angle:.2f}°"
    return f"theta {angle:.2f}°: {decision(angle, threshold)} ({threshold})"


def matrix_lines(
    left: Photo, right: Photo, angles: np.ndarray, same: np.ndarray | None
) -> list[str]:
    """A row a face of the first photo, a column a face of the second, from left to right."""
    lines = [
        f"{name}: {one_line(str(photo.path))}, {len(photo.read.faces)} of {photo.read.found} faces"
        for name, photo in (("a", left), ("b", right))
    ]
    head = "".join(f"{f'b{number + 1}':>10}" for number in range(angles.shape[1]))
    lines.append(f"{'':6}{head}")
    for number, row in enumerate(angles):
        marks = ["" if same is None or not same[number, k] else "*" for k in range(len(row))]
        cells = "".join(f"{f'{v:.2f}°{m:1}':>10}" for v, m in zip(row, marks, strict=True))
        lines.append(f"{f'a{number + 1}':6}{cells}")
    return lines if same is None else [*lines, "*: the same person"]


def draw(path: Path, pair: Pair, threshold: Threshold | None) -> None:
    lines = []
    if threshold is not None:  # in lines that fit between the crops
        lines = [decision(pair.angle, threshold), *threshold.parts()]
    pair_picture.save(path, pair.left, pair.right, f"{pair.angle:.2f}°", lines)


# --------------------------------------------------------------------------------------------------
# what is asked for


def check(options: VerifyOptions) -> None:
    """Refuse what can't be answered, before anything is loaded."""
    photos, gallery = options.photos, options.gallery
    if gallery is None and len(photos) != 2:
        hint = ", or one with --gallery" if len(photos) == 1 else ""
        raise InputError(f"name two photos{hint}: there are {len(photos)}")
    if gallery is not None and len(photos) != 1:
        raise InputError(f"--gallery takes one photo to look for: there are {len(photos)}")
    if gallery is None and (options.enrolled or options.top != VerifyOptions().top):
        raise InputError("--top and --enrolled are for a --gallery: leave them out, or name one")
    if options.enrolled and options.enrolled.suffix != ".safetensors":
        raise InputError(f"--enrolled {options.enrolled}: name a file that ends in .safetensors")
    if options.enrolled and options.enrolled.is_dir():
        raise InputError(f"--enrolled {options.enrolled} is a folder: name a file")
    if options.save:
        pair_picture.check(options.save, list(photos))
        if gallery and options.save.resolve().is_relative_to(gallery.resolve()):
            raise InputError(f"--save {options.save} lies in the gallery: name another place")


if __name__ == "__main__":
    config.run(main, OPTIONS)
