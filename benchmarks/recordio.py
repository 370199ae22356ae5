"""Random reads from a packed set against the same photos as a folder.

    python benchmarks/recordio.py --data data/faces

Packs the set into a temporary folder, then reads the same photos in the same random order from
both, in turns, so that whatever else the machine does hits both. Three ways: the bytes from the
page cache, the bytes after their pages were dropped from it (posix_fadvise; the folder's names stay
cached, which favours the folder), and decoded crops as the loader reads them. Prints Markdown.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

import config
import data_gen
import manifest
import packing
import utils
from data_gen import FaceSet

FACES = config.DATA / "faces"


@dataclass(frozen=True)
class Options:
    data: Path = config.option(FACES, "a prepared folder")
    photos: int = config.option(5000, "read in each turn", low=1)
    turns: int = config.option(5, "of each kind; the median is printed", low=1)
    scratch: Path | None = config.option(None, "where to pack (default: the system's)")


def main(options: Options) -> None:
    plain = data_gen.load_faces(options.data)
    plain = replace(plain, records=None, numbers=None)
    folder = Path(tempfile.mkdtemp(dir=options.scratch))
    try:
        (folder / "images").symlink_to((options.data / "images").resolve())
        shutil.copy(options.data / manifest.NAME, folder)
        pairs = [
            (plain.identities[label], image)
            for label, image in zip(plain.labels, plain.images, strict=True)
        ]
        begun = time.perf_counter()
        size = packing.pack(folder, pairs, lambda _: None)
        length = time.perf_counter() - begun
        print(f"packed {len(pairs):,} crops, {size:,} bytes, in {length:.1f} s")
        compare(plain, data_gen.load_faces(folder), options)
    finally:
        shutil.rmtree(folder)


def compare(plain: FaceSet, packed: FaceSet, options: Options) -> None:
    rates: dict[tuple[str, str], list[float]] = {}
    for turn in range(options.turns):
        order = np.random.default_rng(turn).permutation(len(plain))[: options.photos].tolist()
        ways = {
            "cached": (lambda faces: None, read_bytes),
            "dropped": (drop, read_bytes),
            "decoded": (lambda faces: None, FaceSet.read),
        }
        for way, (prepare, read) in ways.items():
            for name, faces in (("folder", plain), ("train.rec", packed)):
                if way == "cached":
                    rate(faces, order, read)  # once before, so that it is
                prepare(faces)
                rates.setdefault((name, way), []).append(rate(faces, order, read))
    print(f"\n{len(plain):,} crops, {options.photos:,} a turn, median of {options.turns} turns, "
          f"{utils.hardware(utils.pick_device('cpu'))}\n")  # fmt: skip
    print("| the same crops as | files | bytes on disk | photos/s, bytes cached | not cached "
          "| decoded |\n|---|---|---|---|---|---|")  # fmt: skip
    for name, faces in (("folder", plain), ("train.rec", packed)):
        files, used = on_disk(faces)
        shown = " | ".join(
            f"{np.median(rates[name, way]):,.0f}" for way in ("cached", "dropped", "decoded")
        )
        print(f"| {name} | {files:,} | {used:,} | {shown} |")


def read_bytes(faces: FaceSet, index: int) -> bytes:
    if faces.records is None:
        return (faces.folder / faces.images[index]).read_bytes()
    return faces.records.read(int(faces.numbers[index])).payload


def rate(faces: FaceSet, order: list[int], read: Callable[[FaceSet, int], object]) -> float:
    begun = time.perf_counter()
    for index in order:
        read(faces, index)
    return len(order) / (time.perf_counter() - begun)


def paths(faces: FaceSet) -> list[Path]:
    if faces.records is None:
        return [faces.folder / image for image in faces.images]
    return [faces.records.path, faces.records.path.with_suffix(".idx")]


def drop(faces: FaceSet) -> None:
    """Out of the page cache."""
    for path in paths(faces):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def on_disk(faces: FaceSet) -> tuple[int, int]:
    """Files, and the bytes of their blocks and of the folders' own."""
    files = paths(faces)
    folders = {path.parent for path in files} if faces.records is None else set()
    return len(files), sum(os.stat(path).st_blocks * 512 for path in [*files, *folders])


if __name__ == "__main__":
    config.run(main, config.parse(Options, __doc__))
