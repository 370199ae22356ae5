"""What is made of a prepared set, at the end of pre_process.py: its RecordIO and its report.

python pre_process.py --out data/faces --pack --report    # a prepared set needs no --src
"""

from pathlib import Path

import archives
import config
import job
import manifest
import overlap
import packing
import recordio
import set_report
from checkpoint import lock
from config import InputError, PreProcessOptions
from manifest import ALIGNED, Row
from utils import Progress


def check_lists(options: PreProcessOptions) -> None:
    """Before any work is done: the lists of names can be read, and none is ignored."""
    for path in (options.exclude_names, options.test_names):
        if path is not None:
            overlap.read_names(path)
    if options.test_names is not None and not options.report:
        raise InputError("--test-names is shown in the report: add --report")


def derive(rows: list[Row], root: Path | None, out: Path, options: PreProcessOptions) -> None:
    """Pack and report as asked for; `root` holds the photos, None where they are gone."""
    if options.pack:
        pairs = sorted((row.identity, row.image) for row in rows if row.status == ALIGNED)
        if not pairs:
            raise InputError(f"{out} holds no aligned photo: there is nothing to pack")
        progress = Progress(len(pairs), "Packing crops")
        size = packing.pack(out, pairs, progress.update)
        progress.close()
        said = f"{size:,} bytes" if size else "packed already"
        print(f"{out / recordio.REC}: {len(pairs):,} crops, {said}")
    if options.report:
        print(set_report.write_report(out, root, rows, options.test_names, options.max_pixels))


def derive_only(options: PreProcessOptions) -> bool:
    """The same of a set that is prepared already -> whether that was all that is asked for."""
    out = options.out
    wanted = (options.pack or options.report) and out is not None
    if not wanted or options.src or options.exclude_names or not (out / manifest.NAME).exists():
        return False
    source = manifest.read_settings(out).get("source", "?")
    if config.RAW.exists() and source == config.canonical(config.RAW):
        return False  # --src has a default: look for new photos first
    root = config.ROOT / source  # of a folder; an archive was unpacked
    if (out / "source").is_dir():
        root = archives.strip_wrapper(out / "source")
    if job.rank() == 0:
        with lock(out):
            derive(manifest.read_manifest(out), root if root.is_dir() else None, out, options)
    return True
