"""Folders of photos, one an identity: what is a photo, and where they are.

files = walk(root / "Ann", "Ann")    # "Ann/1.jpg", "Ann/2024/2.jpg", "Ann/notes.txt"
photos = [file for file in files if is_photo(file)]
"""

import os
from collections.abc import Iterator
from pathlib import Path

from images import SUFFIXES


def is_photo(path: str) -> bool:
    name = path.rsplit("/", 1)[-1].lower()
    return name.endswith(SUFFIXES) and not name.startswith(".")


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def walk(folder: Path, prefix: str, seen: set[str] | None = None) -> Iterator[str]:
    """Files below a folder, as paths with /. Links to folders are followed, to each folder once."""
    seen = set() if seen is None else seen
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = f"{prefix}/{entry.name}"
        if is_folder(entry) and not is_photo(name):
            yield from walk(folder / entry.name, name, seen)
        else:
            yield name


def one_line(name: str) -> str:
    """A file's name as a line of a terminal can hold it: what is not printable is escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in name
    )
