"""Raw photos, one folder an identity -> aligned 112x112 face crops and an index of all photos.

    python pre_process.py                                        # data/raw, else synthetic faces
    python pre_process.py --src photos/ --out data/faces         # a folder, .zip, .tar or .tgz
    python pre_process.py --src lfw.tgz --out data/lfw --keep-undetected    # a test set
    python pre_process.py --download lfw                         # the same, fetched: data/lfw
    python pre_process.py --draw 4500                            # invented people: data/drawn
    python pre_process.py --out data/faces --pack --report       # of a set that is prepared
    torchrun --nproc-per-node 8 pre_process.py --src photos/ --out data/faces   # on eight GPUs

MTCNN finds the faces, the central one is taken, and five landmarks turn it upright by a similarity
transform. Written into --out:
    images/<identity>/<path below the identity>.jpg   the crops, RGB, JPEG quality 95
    manifest.csv          one row a photo: status, box, landmarks, score; why it was rejected
    pre_process.json      source and settings
    source/               what an archive held (for a folder, the photos stay where they are)
    removed/              crops whose photos are gone
    train.rec, train.idx, property     with --pack: the same crops in one file, for train.py
    report.html           with --report: what the set is like
It may be stopped at any moment: run again, it goes on, and the result is the same.
"""

import config
import worker_pool

if __name__ == "__main__":
    # Before torch is imported, so that --help and a wrong option answer at once, and the server of
    # the workers imports it at the same time.
    OPTIONS = config.parse(config.PreProcessOptions, __doc__)
    if worker_pool.workers(OPTIONS.workers) > 1 and OPTIONS.device in ("auto", "cpu"):
        worker_pool.warm_up()

import contextlib
import csv
import hashlib
import io
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import align_faces
import archives
import crop_faces
import derived
import download
import job
import manifest
import overlap
import synthetic_faces
from checkpoint import lock, write_atomic, write_json
from config import InputError, PreProcessOptions
from crop_faces import NO_FACE, NO_SHAPE, PARTS, Photo, write_crop
from images import UnreadableImage, kind_of, read_image
from manifest import ALIGNED, EXCLUDED, REJECTED, UNDETECTED, Row
from orphans import retire_crops
from photo_folders import is_folder, is_photo, walk
from utils import Progress, pick_device

JOURNAL = "manifest.part.csv"  # rows as they are done; gone once manifest.csv holds them
PART = "manifest.part.{}.csv"  # the same of another rank than the first
TODO = "todo.csv"  # what the ranks share, in PARTS
# What --keep-undetected can still crop: the photo is readable, only its landmarks are missing.
CROPPABLE = (NO_FACE, NO_SHAPE)
_LONGEST = 255  # bytes of a file's name, on Linux, macOS and Windows


def main(options: PreProcessOptions) -> None:
    torch.set_num_threads(1)  # the work is spread over processes
    job.own_card(pick_device(options.device))  # refused before anything is unpacked
    derived.check_lists(options)
    if options.download:
        options = download.fetch_lfw(options)
    if options.draw:
        options = draw_crowd(options)
    if derived.derive_only(options):
        return
    if options.src is not None or config.RAW.exists():
        out = options.out or config.DATA / "faces"
        if job.rank() == 0:
            prepare(options.src or config.RAW, out, options)
        else:
            assist(out, options)
        return
    if options.out is not None:
        raise InputError(f"--out {options.out} needs --src, since there is no data/raw")
    if job.rank() == 0:
        draw_demo()
    for name in ("train", "test"):
        folder = config.SYNTHETIC / name
        keep = name == "test" or options.keep_undetected
        if job.rank() == 0:
            prepare(folder / "raw", folder, replace(options, keep_undetected=keep))
        else:
            assist(folder, options)


def draw_demo() -> None:
    print("No --src and no data/raw: using the embedded synthetic faces (data/synthetic).")
    total = sum(len(people) * photos for people, photos in synthetic_faces.DEMO_SETS)
    draw(total, partial(synthetic_faces.write_demo, config.SYNTHETIC))


def draw_crowd(options: PreProcessOptions) -> PreProcessOptions:
    """Faces of invented people -> the options that prepare them. Only the first rank draws."""
    if options.src is not None:
        raise InputError("--draw (or --download) and --src both name a source: leave one out")
    out = options.out or config.DRAWN
    first, photos = synthetic_faces.CROWD_FIRST, synthetic_faces.CROWD_PHOTOS
    people = range(first, first + options.draw)
    if job.rank() == 0:
        write = partial(synthetic_faces.write_set, out / "raw", people, photos)
        draw(len(people) * photos, partial(write, synthetic_faces.CROWD_SEED))
    return replace(options, src=out / "raw", out=out)


def draw(total: int, write: Callable[..., int]) -> None:
    progress = Progress(total, "Drawing faces")
    drawn = write(progress=progress.update)
    progress.close()
    print(f"Drew {drawn} photos." if drawn else "All of them are drawn.")


def prepare(src: Path, out: Path, options: PreProcessOptions) -> None:
    """One set from start to end: list the photos, find and align the faces, write the manifest."""
    check_folders(src, out)
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        try:
            root = open_source(src, out, options)
            listing = list_photos(root)
            excluded = overlap.excluded_rows(listing.photos, options.exclude_names)
            if options.exclude_names and not excluded:
                print(f"{options.exclude_names}: none of its names is an identity of {src}")
            kept = {photo.image for photo in listing.photos if photo.source not in excluded}
            gather_parts(out)  # the crops of a stopped run's other ranks are known by it too
            retire_crops(out, known_rows(out), kept, options.keep_undetected)
            done = read_journal(out, root, listing.photos)
            if done:
                print(f"{src}: {len(done):,} of {len(listing.photos):,} photos are done already.")
            done.update((row.source, row.line()) for row in excluded.values())
            todo = [photo for photo in listing.photos if photo.source not in done]
            give_out(todo, root, out)
            rate = detect_all(todo, root, out, done, options) if todo else None
            rows = finish(done, listing, root, out, options)
        except InputError:
            if not existed:  # leave nothing behind for a source that can't be used
                forget(out)
            raise
        summarize(rows, listing, out, rate)
        derived.derive(rows, root, out, options)


@contextlib.contextmanager
def named_shortage(options: PreProcessOptions) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = (  # no InputError: what was done stays
            f"no room on the card ({str(error).splitlines()[0]}): lower --batch-size, which is "
            f"{options.batch_size}, and run again to go on"
        )
        raise SystemExit(config.complain(said, 1)) from error


def detect_all(
    todo: list[Photo], root: Path, out: Path, done: dict[str, str], options: PreProcessOptions
) -> float:
    """Find and align all faces of `todo`, adding to `done` and to the journal. -> photos/s.

    Where there are several ranks: a share of them, then what the others have done.
    """
    share = todo[job.rank() :: job.ranks()]
    device = job.own_card(pick_device(options.device))
    progress = Progress(len(share), "Aligning faces", shown=job.rank() == 0)
    path = out / (JOURNAL if job.rank() == 0 else PART.format(job.rank()))
    with config.naming(path), open(path, "ab") as journal, named_shortage(options):
        for rows in crop_faces.run(share, root, out, options, device):
            lines = [row.line() for row in rows]
            journal.write("".join(lines).encode(errors="surrogateescape"))
            journal.flush()
            os.fsync(journal.fileno())
            done.update((row.source, line) for row, line in zip(rows, lines, strict=True))
            progress.update(len(rows))
    job.wait()
    done.update(gather_parts(out) if job.rank() == 0 else {})
    progress.close()
    return len(todo) / (time.monotonic() - progress.start)


# --------------------------------------------------------------------------------------------------
# several ranks: the first one decides what there is to do, and puts together what they have done


def give_out(todo: list[Photo], root: Path, out: Path) -> None:
    """Tell the other ranks what there is to do."""
    if job.ranks() > 1:
        (out / PARTS).mkdir(exist_ok=True)
        lines = [manifest.csv_line([str(root)]), *map(manifest.csv_line, todo)]
        write_atomic(out / PARTS / TODO, "".join(lines).encode(errors="surrogateescape"))
        job.wait()
        job.wait()  # all have read it: PARTS may go


def assist(out: Path, options: PreProcessOptions) -> None:
    """What a rank but the first does: its share of what the first one gives out."""
    job.wait()
    with open(out / PARTS / TODO, **manifest.ENCODING) as file:
        (root,), *todo = csv.reader(file)
    job.wait()
    if todo:
        detect_all(list(itertools.starmap(Photo, todo)), Path(root), out, {}, options)


def gather_parts(out: Path) -> dict[str, str]:
    """Put the other ranks' journals behind the first one's -> their rows, source -> CSV line."""
    parts = sorted(out.glob(PART.format("*")))
    rows = {row[0]: manifest.csv_line(row) for part in parts for row in journal_rows(part)}
    if parts:
        own = map(manifest.csv_line, journal_rows(out / JOURNAL))
        lines = "".join(itertools.chain(own, rows.values()))
        write_atomic(out / JOURNAL, lines.encode(errors="surrogateescape"))
    for part in parts:
        part.unlink()
    return rows


# --------------------------------------------------------------------------------------------------
# the source


def check_folders(src: Path, out: Path) -> None:
    if not src.exists():
        raise InputError(f"{src} is not there: --src names a folder or archive of photos")
    if src.is_file() and not archives.is_archive(src):
        kinds = " ".join(archives.KINDS)
        raise InputError(f"{src} is no folder and no archive ({kinds}): name one with --src")
    if src.is_dir() and out.resolve().is_relative_to(src.resolve()):
        raise InputError(f"{out} lies in {src}: crops would be taken for photos; move --out")
    if src.resolve().is_relative_to((out / "images").resolve()):
        raise InputError(f"{src} is where the crops of {out} go: name another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder with --out")


def open_source(src: Path, out: Path, options: PreProcessOptions) -> Path:
    """The folder that holds the identities; an archive is unpacked first. Records the settings."""
    settings = {
        "source": config.canonical(src) if src.is_dir() else src.name,
        "bytes": None if src.is_dir() else src.stat().st_size,
        "min_face_size": options.min_face_size,
        "thresholds": list(options.thresholds),
        "factor": options.factor,
    }
    path = out / manifest.SETTINGS
    known, old = path.exists(), manifest.read_settings(out)
    if known:
        changed = [key for key in settings if old.get(key) != settings[key]]
        if changed:
            said = ", ".join(f"{key} {old.get(key)}, now {settings[key]}" for key in changed)
            raise InputError(f"{out} was prepared with {said}: name another --out or delete it")
    if src.is_file():
        settings["skipped"] = old.get("skipped", {})  # what of the archive was no photo
    write_json(path, settings)  # before unpacking: what is in source/ belongs to it
    root = src
    if src.is_file():
        root = out / "source"
        if not root.exists():
            print(f"Unpacking {src} into {root}", flush=True)

            def keep(skipped: Counter) -> None:
                settings["skipped"] = dict(skipped)
                write_json(path, settings)

            try:
                archives.unpack(src, root, keep)
            except BaseException:
                if not known:  # nothing is here yet: another archive may come
                    path.unlink()
                raise
        for kind, count in sorted(settings["skipped"].items()):
            print(f"  {count:,} {kind} in the archive were left")
        root = archives.strip_wrapper(root)
    return root


@dataclass(frozen=True)
class Listing:
    photos: list[Photo]
    identities: int
    others: int  # files that are no photos
    homeless: int  # photos outside any identity's folder
    empty: int  # identities without a photo


def list_photos(root: Path) -> Listing:
    """All photos in the identities' folders, in sorted order. Raises InputError: none, or twins."""
    folders = sorted(entry.name for entry in os.scandir(root) if is_folder(entry))
    folders = [name for name in folders if not name.startswith(".")]
    twins: dict[str, str] = {}
    for name in folders:
        twin = twins.setdefault(name.casefold(), name)
        if twin != name:
            raise InputError(
                f"{root} holds {twin} and {name}, which differ only by case: merge or rename them"
            )
    top = [entry.name for entry in os.scandir(root) if not is_folder(entry)]
    homeless = sum(is_photo(name) for name in top)
    others, empty, photos = len(top) - homeless, 0, []
    for identity in folders:
        files = sorted(walk(root / identity, identity))
        mine = [file for file in files if is_photo(file)]
        others += len(files) - len(mine)
        empty += not mine
        photos += [Photo(file, identity, image) for file, image in name_crops(mine)]
    if not photos:
        where = f"; {homeless} photos lie outside any folder" if homeless else ""
        raise InputError(f"{root} holds no photo in a folder of its identity{where}: check --src")
    return Listing(photos, len(folders) - empty, others, homeless, empty)


def name_crops(files: list[str]) -> Iterator[tuple[str, str]]:
    """`id/sub/01.png` -> `images/id/sub/01.jpg`; where another has that name, `01.png.jpg`.

    A name that would be too long for a disk ends in a hash instead.
    """
    taken: set[str] = set()
    named = {}
    for file in sorted(files, key=lambda name: (not name.endswith(".jpg"), name)):
        image = f"images/{os.path.splitext(file)[0]}.jpg"
        if image.casefold() in taken:
            image = f"images/{file}.jpg"
        while image.casefold() in taken:
            image = f"{image}.jpg"
        folder, name = os.path.split(image)
        if len(os.fsencode(name)) > _LONGEST:
            key = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
            image = f"{folder}/{os.fsdecode(os.fsencode(name)[:200])}-{key}.jpg"
        taken.add(image.casefold())
        named[file] = image
    return ((file, named[file]) for file in files)


# --------------------------------------------------------------------------------------------------
# the journal: what is done, so that a run goes on where it stopped


def read_journal(out: Path, root: Path, photos: list[Photo]) -> dict[str, str]:
    """Source -> CSV line of the photos that are done, and have not been changed since.

    A line that was cut off, or is damaged, is not one.
    """
    planned = {photo.source: photo.image for photo in photos}
    done: dict[str, str] = {}
    for cells in known_rows(out):
        try:
            row = Row.parse(cells)
        except ValueError:  # damaged: the photo is done again
            continue
        if row.status == UNDETECTED:  # decided anew at the end: the medians may have moved
            row = replace(row, status=REJECTED, image="", landmarks=None)
        if row.source not in planned or row.image not in ("", planned[row.source]):
            continue
        # A photo that could not be read is tried again: it may have been mended, or --max-pixels
        # raised.
        if row.reason in CROPPABLE or (row.image and is_whole(out / row.image)):
            since = out / (row.image or manifest.NAME)
            if not is_newer(root / row.source, since):
                done[row.source] = row.line()
    write_atomic(out / JOURNAL, "".join(done.values()).encode(errors="surrogateescape"))
    return done


def known_rows(out: Path) -> Iterator[list[str]]:
    """The cells of the manifest of the run before this one, and of the journal."""
    return itertools.chain(journal_rows(out / manifest.NAME), journal_rows(out / JOURNAL))


def journal_rows(path: Path) -> Iterator[list[str]]:
    """What is whole of a file of rows; the photos of damaged ones are done again."""
    if not path.is_file():
        return
    text = path.read_bytes().decode(errors="surrogateescape")
    whole = text[: text.rfind("\n") + 1]  # the last line may be half there
    rows = csv.reader(io.StringIO(whole, newline=""))
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error:  # zeros after a power cut, a stray quote
            continue
        if len(cells) == len(manifest.COLUMNS) and not manifest.leaves(cells[2]):
            yield cells


def is_newer(photo: Path, than: Path) -> bool:
    """Whether a photo was written after what was made of it. A time to come is a wrong clock's."""
    try:
        changed = photo.stat().st_mtime
        return than.stat().st_mtime < changed <= time.time()
    except OSError:
        return False


def is_whole(path: Path) -> bool:
    """A crop that is there and ends as a JPEG does: not lost, empty (a power cut) or cut off."""
    try:
        with open(path, "rb") as file:
            file.seek(-2, os.SEEK_END)
            return file.read() == b"\xff\xd9"
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------
# the end: what was not detected, the manifest, the summary


def finish(
    done: dict[str, str], listing: Listing, root: Path, out: Path, options: PreProcessOptions
) -> list[Row]:
    """Decide on the photos without a face, and write manifest.csv."""
    # Taken out of `done`: of millions of photos both would not fit.
    rows = [Row.parse(next(csv.reader([done.pop(photo.source)]))) for photo in listing.photos]
    aligned = [row for row in rows if row.status == ALIGNED]
    if not aligned:
        reasons = Counter(row.reason for row in rows).most_common(3)
        said = ", ".join(f"{count} {reason}" for reason, count in reasons)
        raise InputError(f"{root} has no usable photo among {len(rows)} ({said}): check --src")
    if options.keep_undetected:
        (out / PARTS).mkdir(exist_ok=True)  # not there where all photos were done before
        shares = median_landmarks(aligned)
        for index, photo in enumerate(listing.photos):
            if rows[index].reason in CROPPABLE:
                rows[index] = crop_undetected(photo, rows[index], shares, root, out, options)
    os.sync()  # the crops are on disk before the manifest says so
    header = manifest.csv_line(list(manifest.COLUMNS))
    lines = itertools.chain([header], (row.line() for row in rows))
    encoded = (line.encode(errors="surrogateescape") for line in lines)
    write_atomic(out / manifest.NAME, lambda file: file.writelines(encoded))
    (out / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    return rows


def median_landmarks(aligned: Iterable[Row]) -> np.ndarray:
    """(5, 2) medians of the landmarks as fractions of width and height."""
    return np.median([row.landmarks / (row.width, row.height) for row in aligned], axis=0)


def crop_undetected(
    photo: Photo,
    row: Row,
    shares: np.ndarray,
    root: Path,
    out: Path,
    options: PreProcessOptions,
) -> Row:
    landmarks = (shares * (row.width, row.height)).round(4)  # (5, 2)
    try:
        image = read_image(root / photo.source, options.max_pixels)
    except UnreadableImage as error:  # changed since it was looked at
        return replace(row, reason=str(error))
    matrix = align_faces.similarity_transform(landmarks)
    write_crop(out, photo.image, align_faces.warp(image, matrix))
    return replace(row, image=photo.image, status=UNDETECTED, landmarks=landmarks)


def summarize(rows: list[Row], listing: Listing, out: Path, rate: float | None) -> None:
    status = Counter(row.status for row in rows)
    reasons = Counter(kind_of(row.reason) for row in rows if row.status == REJECTED)
    several = sum(row.faces > 1 for row in rows)
    print(f"{out}: {len(rows):,} photos of {listing.identities:,} identities")
    print(f"  aligned     {status[ALIGNED]:9,}   ({several:,} photos have several faces)")
    notes = Counter(row.reason for row in rows if row.status == ALIGNED and row.reason)
    for note, count in notes.most_common():
        print(f"    {count:9,}  of them: {note}")
    if status[UNDETECTED]:
        names = [row.source for row in rows if row.status == UNDETECTED]
        said = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        print(f"  undetected  {status[UNDETECTED]:9,}   cropped by median landmarks: {said}")
    print(f"  rejected    {status[REJECTED]:9,}")
    for reason, count in reasons.most_common():
        print(f"    {count:9,}  {reason}")
    if status[EXCLUDED]:
        people = len({row.identity for row in rows if row.status == EXCLUDED})
        print(f"  excluded    {status[EXCLUDED]:9,}   photos of {people:,} identities, by name")
    people = Counter(row.identity for row in rows if row.status == ALIGNED)
    single = sum(count == 1 for count in people.values())
    for count, what in (
        (single, "identities have one aligned photo (train.py --min-images 2 leaves them out)"),
        (listing.others, "other files were left"),
        (listing.homeless, "photos outside any identity's folder were left"),
        (listing.empty, "identities have no photo"),
    ):
        if count:
            print(f"  {count:,} {what}")
    if status[REJECTED] > 0.05 * len(rows):
        print(
            f"  WARNING: {status[REJECTED] / len(rows):.0%} of the photos are rejected: see {out}"
        )
    if listing.identities == 1:
        print("  WARNING: one identity only; is --src one folder too high?")
    print(f"  {rate:.1f} photos/s" if rate else "  nothing was left to do")


def forget(out: Path) -> None:
    """Remove what a refused run made in a folder of its own: it holds no crops yet, or few."""
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    config.run(main, OPTIONS)
