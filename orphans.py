"""Crops that belong to no photo any more: moved aside, never deleted.

Only files that a manifest of the set named are touched, and only below its images/.
"""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from manifest import UNDETECTED

CROPS, ASIDE = "images", "removed"


def move_orphans(out: Path, images: Iterable[str]) -> int:
    """Move `images`, paths below the set such as images/ann/1.jpg, to removed/ -> how many."""
    moved = 0
    for image in images:
        parts = PurePosixPath(image).parts
        source = out / image
        if parts[:1] != (CROPS,) or ".." in parts or source.is_symlink() or not source.is_file():
            continue
        target = out.joinpath(ASIDE, *parts[1:])
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        moved += 1
        _remove_empty(source.parent, out / CROPS)
    return moved


def retire_crops(
    out: Path, cells: Iterable[list[str]], kept: set[str], keep_undetected: bool
) -> None:
    """Move aside what manifest rows (as `cells`) of a run before this one name and it won't.

    Before the journal is read: a run that is stopped in between finds the same ones again.
    """
    gone = [
        image
        for _, _, image, status, *_ in cells
        if image and (image not in kept or (status == UNDETECTED and not keep_undetected))
    ]
    moved = move_orphans(out, gone)
    if moved:
        print(f"{moved:,} crops of photos that are gone or left out were moved to {out / ASIDE}")


def _remove_empty(folder: Path, top: Path) -> None:
    while folder != top:
        try:
            folder.rmdir()
        except OSError:  # not empty
            return
        folder = folder.parent
