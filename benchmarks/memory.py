"""Whether pre_process.py's memory stays flat over many photos, a large one among them.

    python benchmarks/memory.py --src path/to/photos --photos 100000 --megapixels 24

Links a small folder of photos again and again until there are --photos, adds one large photo, runs
pre_process.py on them and prints the resident memory of its processes as it goes. Exits with
pre_process.py's own code if that fails, and says how many photos were rejected: what was not
decoded took no memory.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import images
import manifest
import pre_process
from config import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--src", type=Path, required=True, help="folder of photos")
    parser.add_argument("--distinct", type=int, default=100, help="photos to repeat")
    parser.add_argument("--photos", type=int, default=100_000)
    parser.add_argument("--megapixels", type=float, default=24.0, help="of the large one; 0: none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        src, out = Path(folder) / "photos", Path(folder) / "out"
        sources = pre_process.list_photos(options.src).photos[: options.distinct]
        repeated = itertools.islice(itertools.cycle(sources), options.photos)
        for number, photo in enumerate(repeated):
            identity = src / f"{number // 100:06d}"
            identity.mkdir(parents=True, exist_ok=True)
            suffix = os.path.splitext(photo.source)[1]
            (identity / f"{number % 100:02d}{suffix}").symlink_to(
                (options.src / photo.source).resolve()
            )
        if options.megapixels:
            (src / f"{options.photos // 200:06d}").mkdir(exist_ok=True)
            tile = images.read_image(options.src / sources[0].source)
            side = int((options.megapixels * 1e6 / 1.5) ** 0.5)
            times = (-(-side // tile.shape[0]), -(-side * 3 // 2 // tile.shape[1]), 1)
            large = np.tile(tile, times)[:side, : side * 3 // 2]
            images.write_jpeg(src / f"{options.photos // 200:06d}/large.jpg", large)
        watch(src, out, options.photos)


def watch(src: Path, out: Path, total: int) -> None:
    command = [sys.executable, str(ROOT / "pre_process.py"), "--src", str(src), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    journal, peak, shown = out / pre_process.JOURNAL, [0, 0], -1
    print("| photos done | parent, MB | largest worker, MB | peak so far |\n|---|---|---|---|")
    while process.poll() is None:
        time.sleep(0.2)
        parent, *workers = [resident(process.pid), *map(resident, descendants(process.pid))]
        worker = max(workers, default=0)
        peak = [max(peak[0], parent), max(peak[1], worker)]
        done = journal.read_bytes().count(b"\n") if journal.exists() else 0
        if done * 10 // total > shown:
            shown = done * 10 // total
            print(f"| {done:,} | {parent} | {worker} | {peak[0]}, {peak[1]} |", flush=True)
    print(f"| the end | | | {peak[0]}, {peak[1]} |\n")
    print(process.stdout.read())
    if process.returncode:
        print(f"pre_process.py failed ({process.returncode}): the figures tell nothing")
        sys.exit(process.returncode if process.returncode > 0 else 1)
    if said := rejected(out):
        print(said)


def rejected(out: Path) -> str:
    """What to say of the photos of a prepared set that were rejected; empty where none was."""
    rows = list(manifest.read_rows(out / manifest.NAME))
    reasons = Counter(images.kind_of(cells[4]) for cells in rows if cells[3] == manifest.REJECTED)
    if not reasons:
        return ""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in reasons.most_common())
    return f"WARNING: {reasons.total():,} of {len(rows):,} photos were rejected: {kinds}"


def descendants(pid: int) -> list[int]:
    """Of a process: the server that the workers are forked from, and the workers below it."""
    try:
        own = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return own + [below for one in own for below in descendants(one)]


def resident(pid: int) -> int:
    """MB; pages that a worker shares with its parent count in both."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 // 1_000_000
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    main()
