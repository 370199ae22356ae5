"""Who a photo shows: its faces looked for in a gallery, as lines for a person and for --json.

said, found, pair = find(photo, threshold, options, reader, kept, settings)

The half of verify.py that goes with --gallery.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import enrolment
import pair_picture
import thresholds
import utils
from config import InputError, VerifyOptions
from enrolment import Match
from face_reader import FaceReader, Photo, several_lines, upright
from images import UnreadableImage, read_image
from pair_picture import Pair, shown
from photo_folders import one_line
from thresholds import Threshold, decision

NAMED = 20  # photos without a face that the console names; --json has all


def find(
    photo: Photo,
    threshold: Threshold | None,
    options: VerifyOptions,
    reader: FaceReader,
    kept: Path,
    settings: dict,
) -> tuple[list[str], dict, Callable[[], Pair]]:
    """Enrol what is new in the gallery and rank its people -> as verify.compare."""
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
        "boxes": photo.plain_boxes,
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
    said += thresholds.lines(threshold)
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
