"""Compare two photos, or find a face in a folder of people.

    python verify.py a.jpg b.jpg                           # with the model that train.py makes
    python verify.py a.jpg b.jpg --model runs/first --save pair.png
    python verify.py a.jpg b.jpg --all                     # every face of a against every one of b
    python verify.py photo.jpg --gallery people/ --top 3   # people/<name>/*.jpg
    python verify.py a.jpg b.jpg --json                    # one JSON object, nothing else

Each photo's central face is found, aligned and embedded; the angle between two embeddings tells
whether they are of one person: below the model's threshold they are taken for it. The threshold
was taken by train.py on people held out of the training, at the false accept rate that is printed
with it; a model that carries none needs --threshold for a decision.

The gallery's photos are embedded once and kept in the model's run (or in --enrolled); the next
time only new and changed ones are looked at. The photos themselves are left as they are.
Exit code 0 where there is an answer, whichever; 2 for a photo that can't be used.
"""

import config

if __name__ == "__main__":
    # Before torch is imported: --help and a wrong option answer at once.
    OPTIONS = config.parse(config.VerifyOptions, __doc__)

import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import embeddings
import enrolment
import pair_picture
import protocol
import utils
from config import InputError, VerifyOptions
from enrolment import Match
from face_reader import FaceReader, Read, upright
from images import UnreadableImage, read_image
from photo_folders import one_line

LONGEST = 200  # letters that a model may say of where it comes from
NAMED = 20  # photos without a face that the console names; --json has all


class Threshold(NamedTuple):
    degrees: float
    far: float | None  # None: the user's, whose rate is not known
    impostor_pairs: int | None
    taken_on: str = ""  # whose pairs these are
    started_from: str = ""  # the weights before a fine-tuning

    def __str__(self) -> str:
        return "; ".join(self.parts())

    def parts(self) -> list[str]:
        """For one line, or for several where there is less room."""
        if self.far is None:
            return [f"threshold {self.degrees:.2f}°, as named", "its false accept rate is unknown"]
        whose = f" of {self.taken_on}" if self.taken_on else ""
        parts = [
            f"threshold {self.degrees:.2f}°, at which 1 in {1 / self.far:,.0f} impostor pairs is "
            "accepted",
            f"{self.impostor_pairs:,} pairs{whose}",
        ]
        if self.started_from:
            parts.append(
                f"the weights that it started from ({self.started_from}) may have seen these people"
            )
        return parts


class Photo(NamedTuple):
    path: Path
    pixels: np.ndarray  # uint8 (H, W, 3)
    read: Read

    @property
    def boxes(self) -> list[np.ndarray]:
        return [face.box for face in self.read.faces]

    @property
    def embeddings(self) -> np.ndarray:
        return np.stack([face.embedding for face in self.read.faces])  # (F, E)


class Pair(NamedTuple):
    """What --save draws."""

    left: pair_picture.Shown
    right: pair_picture.Shown
    angle: float


def main(options: VerifyOptions) -> None:
    check(options)
    # What the steps say on the way goes to stderr where stdout is for one JSON object.
    with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
        if options.threads:
            torch.set_num_threads(options.threads)
        device = utils.pick_device(options.device)
        torch.backends.cudnn.allow_tf32 = False  # full float32: a card's angles are a CPU's
        torch.backends.cuda.matmul.allow_tf32 = False
        model = options.model or config.default_run()
        if options.model is None:
            print(f"no --model named: using {one_line(str(model))}")
        normal = options.input_mean, options.input_std
        utils.check_foreign((model,), options.network, *normal)
        file = utils.model_file(model)
        digest = embeddings.hash_model(file)
        network = embeddings.load_hashed(
            model, file, digest, device, *normal, network=options.network
        )
        threshold = pick_threshold(options, network, file)
        about = {"model": str(model), "model_sha256": digest}
        facts = threshold or (None, None, None, None, None)
        names = ("threshold", "far", "impostor_pairs", "threshold_from", "started_from")
        about |= zip(names, (fact or None for fact in facts), strict=True)
        reader = FaceReader(network, options.min_face_size, device)
        photos = look(options, reader)
        if options.gallery is None:
            said, found, pair = compare(*photos, threshold, options)
        else:
            settings = {
                "min_face_size": options.min_face_size,
                "input": list(normal),
                "network": options.network,
                "device": device.type,  # cards round differently
            }
            kept = options.enrolled or enrolled_file(file, options.gallery, settings)
            settings["model"] = digest
            said, found, pair = find(photos[0], threshold, options, reader, kept, settings)
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
        "boxes": [plain_boxes(left), plain_boxes(right)],
        "scores": [[face.score for face in photo.read.faces] for photo in (left, right)],
    }
    if options.all:
        found |= {"angles": angles.tolist(), "same": None if same is None else same.tolist()}
        said = [*matrix_lines(left, right, angles, same), *threshold_lines(threshold)]
    else:
        found |= {
            "boxes": [b[0] for b in found["boxes"]],
            "scores": [s[0] for s in found["scores"]],
        }
        found |= {"angle": float(angles[0, 0]), "same": None if same is None else bool(same[0, 0])}
        said = [*several_lines(left, right), answer(angles[0, 0], threshold)]
        said += threshold_lines(threshold) if threshold is None else []
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


def decision(angle: float, threshold: Threshold) -> str:
    return "the same person" if angle < threshold.degrees else "different people"


def several_lines(*photos: Photo) -> list[str]:
    return [
        f"{one_line(str(photo.path))}: {photo.read.found} faces, the central one is taken "
        "(--all for every one)"
        for photo in photos
        if photo.read.found > 1
    ]


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


def threshold_lines(threshold: Threshold | None) -> list[str]:
    if threshold is not None:
        return [str(threshold)]
    return [
        "no decision: the model carries no threshold; train.py stores one that it takes on "
        "held-out people, or name one with --threshold, such as that of lfw_eval.py's report"
    ]


def shown(photo: Photo, index: int) -> pair_picture.Shown:
    crop = photo.read.faces[index].crop
    return pair_picture.Shown(one_line(photo.path.name), photo.pixels, photo.boxes, index, crop)


def draw(path: Path, pair: Pair, threshold: Threshold | None) -> None:
    lines = []
    if threshold is not None:  # in lines that fit between the crops
        lines = [decision(pair.angle, threshold), *threshold.parts()]
    pair_picture.save(path, pair.left, pair.right, f"{pair.angle:.2f}°", lines)


# --------------------------------------------------------------------------------------------------
# a gallery


def find(
    photo: Photo,
    threshold: Threshold | None,
    options: VerifyOptions,
    reader: FaceReader,
    kept: Path,
    settings: dict,
) -> tuple[list[str], dict, Callable[[], Pair]]:
    """Enrol what is new in the gallery and rank its people -> as `compare`."""
    enrolled = enrolment.refresh(options.gallery, kept, reader, settings, options.max_pixels)
    rejected = {name: e.reason for name, e in enrolled.entries.items() if e.reason}
    rejected |= {name: "outside any identity's folder" for name in enrolled.outside}
    if all(entry.reason for entry in enrolled.entries.values()):
        first, reason = next(iter(rejected.items()))
        raise InputError(
            f"{options.gallery} holds no photo with a face ({len(rejected)} without, such as "
            f"{one_line(first)}: {reason}): name another --gallery"
        )
    gallery = enrolment.Gallery.of(enrolled.entries)
    started = time.perf_counter()
    matches = gallery.search(photo.embeddings, options.top)
    search_ms = 1000 * (time.perf_counter() - started)
    hits = None if threshold is None or not threshold.far else threshold.far * len(gallery.photos)

    found = {
        "photo": str(photo.path),
        "faces_found": photo.read.found,
        "boxes": plain_boxes(photo),
        "scores": [face.score for face in photo.read.faces],
        "gallery": str(options.gallery),
        "enrolled_file": str(kept),
        "enrolled": len(gallery.photos),
        "identities": len(gallery.identities),
        "new": enrolled.new,
        "removed": enrolled.removed,
        "not_enrolled": rejected,
        "expected_false_hits": hits,
        "search_ms": round(search_ms, 3),
        "matches": [[plain_match(match, threshold) for match in mine] for mine in matches],
    }
    said = gallery_lines(found, rejected)
    if not options.all:
        said += several_lines(photo)
    for number, mine in enumerate(matches):
        which = f", face {number + 1} of {len(matches)}" if len(matches) > 1 else ""
        said += [f"{one_line(str(photo.path))}{which}:", *match_lines(mine, threshold)]
    said += threshold_lines(threshold)
    if hits is not None:
        said.append(
            "note: that rate is of one comparison; a stranger's face is expected to be taken for "
            f"{hits:,.{0 if hits >= 10 else 3}f} of the {len(gallery.photos):,} enrolled photos"
        )
    said.append(f"searched {len(gallery.photos):,} photos in {search_ms:.1f} ms")
    return said, found, partial(nearest_pair, photo, matches, enrolled, options)


def enrolled_file(model: Path, gallery: Path, settings: dict) -> Path:
    """runs/<model>/enrolled/<gallery's name>-<hash>.safetensors

    Hashed are both paths and the settings: a try with others does not throw this one's away. The
    model's content is not: a run that goes on takes its old file's place.
    """
    place = gallery.resolve()
    name = re.sub(r"[^\w.-]+", "_", one_line(place.name))[:40] or "gallery"
    what = json.dumps([str(place), str(model.resolve()), settings], sort_keys=True)
    key = hashlib.sha256(what.encode()).hexdigest()[:8]
    return utils.home_of(model) / "enrolled" / f"{name}-{key}.safetensors"


def gallery_lines(found: dict, rejected: dict[str, str]) -> list[str]:
    lines = [
        f"{one_line(found['gallery'])}: {found['enrolled']:,} photos of {found['identities']:,} "
        f"people enrolled ({found['new']:,} looked at now, {found['removed']:,} removed)"
    ]
    if rejected:
        lines[0] += f"; {len(rejected):,} are not:"
        named = list(rejected.items())[:NAMED]
        lines += [f"  {one_line(name)}: {one_line(reason)}" for name, reason in named]
        if len(rejected) > NAMED:
            lines.append(f"  and {len(rejected) - NAMED:,} more (--json names all)")
    return lines


def match_lines(matches: list[Match], threshold: Threshold | None) -> list[str]:
    names = [one_line(match.identity) for match in matches]
    width = max(map(len, names))
    return [
        f"  {rank:3}  {name:{width}}  {match.angle:6.2f}°  "
        + (f"{decision(match.angle, threshold):16}  " if threshold else "")
        + one_line(match.photo)
        for rank, (name, match) in enumerate(zip(names, matches, strict=True), 1)
    ]


def plain_match(match: Match, threshold: Threshold | None) -> dict:
    same = None if threshold is None else match.angle < threshold.degrees
    return {**match._asdict(), "same": same}


def nearest_pair(
    photo: Photo,
    matches: list[list[Match]],
    enrolled: enrolment.Enrolled,
    options: VerifyOptions,
) -> Pair:
    """The face and the enrolled photo that are nearest to each other."""
    face = min(range(len(matches)), key=lambda index: matches[index][0].angle)
    match = matches[face][0]
    entry, path = enrolled.entries[match.photo], options.gallery / match.photo
    try:
        pixels = read_image(path, options.max_pixels)
    except UnreadableImage as error:
        raise InputError(f"{path}: {error}, just now: run again") from error
    crop = upright(pixels, entry.landmarks)
    right = pair_picture.Shown(one_line(match.photo), pixels, [entry.box], 0, crop)
    return Pair(shown(photo, face), right, match.angle)


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


def look(options: VerifyOptions, reader: FaceReader) -> list[Photo]:
    """Read the photos named. Raises InputError: one can't be read, or shows no face."""
    photos = []
    for path in options.photos:
        try:
            pixels = read_image(path, options.max_pixels)
        except UnreadableImage as error:
            hint = "name a photo" if path.exists() else "check its name"
            hint = "a folder of people goes with --gallery" if path.is_dir() else hint
            raise InputError(f"{path}: {error}: {hint}") from error
        read = reader.read([pixels], options.all)[0]
        if read.reason:
            raise InputError(f"{path}: {read.reason}: name another photo, or try --min-face-size")
        photos.append(Photo(path, pixels, read))
    return photos


def pick_threshold(
    options: VerifyOptions, network: torch.nn.Module, file: Path
) -> Threshold | None:
    """The user's, else the model's, else None."""
    if options.threshold is not None:
        return Threshold(options.threshold, None, None)
    kept = {key: value for key, value in network.metadata.items() if key.startswith("threshold_")}
    if not kept:
        return None
    try:
        degrees, far = float(kept["threshold_degrees"]), float(kept["threshold_far"])
        if not (0 < degrees < 180 and 0 < far < 1):
            raise ValueError(f"{degrees}° at {far}")
        about = (
            one_line(network.metadata.get(key, ""))[:LONGEST] for key in ("threshold_from", "init")
        )
        return Threshold(degrees, far, int(kept["threshold_impostor_pairs"]), *about)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{file} carries a threshold that is none ({error}): name one with --threshold"
        ) from error


def plain_boxes(photo: Photo) -> list[list[float]]:
    return [[round(float(value), 2) for value in box] for box in photo.boxes]


if __name__ == "__main__":
    config.run(main, OPTIONS)
