"""Unpacking an archive of photos so that nothing lands outside the destination, or half there.

Only regular files that are named like images are taken; links, devices and other files are counted,
and so are members whose names the disk can't hold, and those that come twice: the first is kept.
An archive with a path that leaves the destination, or that expands more than 100 to 1, is refused
whole: nothing of it is kept. tarfile's own filter is not relied on (CVE-2025-4517, CVE-2025-4330).
"""

import errno
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from config import InputError, naming
from images import SUFFIXES

KINDS = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
# What a damaged archive, or one with a password, raises; bz2 an OSError without a number.
BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError),
    *(RuntimeError, NotImplementedError, OSError),
)
ODD = (None, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)  # a file within a file, too
_MAX_RATIO = 100
_SLACK = 10 << 20  # bytes that any archive may expand to, whatever the ratio


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(KINDS)


def unpack(
    archive: Path, destination: Path, before_done: Callable[[Counter], object] | None = None
) -> Counter:
    """Unpack the photos into `destination`, which appears only when all of them are there.

    -> what was skipped, by kind; `before_done` is told it first, so that it can be kept.
    Raises InputError: not an archive, cut off, or unsafe.
    """
    partial = destination.with_name(destination.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    skipped: Counter = Counter()
    try:
        members = _zip if archive.name.lower().endswith(".zip") else _tar
        for name, content in members(archive, skipped):
            _write(partial / name, content, skipped)
        os.sync()  # what has its name is never unpacked again: a power cut must find it whole
    except BROKEN as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno not in ODD:
            with naming(destination):
                raise  # the disk's fault, not the archive's
        raise InputError(
            f"{archive} is damaged or not an archive ({error}): fetch it again, or unpack it "
            "yourself and name the folder"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if before_done is not None:
        before_done(skipped)
    os.replace(partial, destination)
    return skipped


def _write(target: Path, content: BinaryIO, skipped: Counter) -> None:
    """Write a member, or count it as skipped."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(target, "xb")  # noqa: SIM115
    except OSError as error:
        twice = error.errno == errno.EEXIST and target.is_file()
        if not twice and error.errno != errno.ENAMETOOLONG:
            raise
        skipped["duplicate members" if twice else "files with too long a name"] += 1
        return
    with file:
        shutil.copyfileobj(content, file, 1 << 20)


def strip_wrapper(folder: Path) -> Path:
    """The folder that holds the identities: one level down where one folder holds only folders."""
    entries = list(folder.iterdir())
    if len(entries) == 1 and entries[0].is_dir():
        inner = list(entries[0].iterdir())
        if inner and all(entry.is_dir() for entry in inner):
            return entries[0]
    return folder


def _zip(archive: Path, skipped: Counter) -> Iterator[tuple[str, BinaryIO]]:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        _check_ratio(archive, sum(member.file_size for member in members), archive.stat().st_size)
        for member in members:
            name = _safe(archive, member.filename)
            mode = member.external_attr >> 16
            if member.is_dir():
                continue
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                skipped["links and devices"] += 1
            elif not _is_photo(name):
                skipped["other files"] += 1
            else:
                with file.open(member) as content:
                    yield name, content


def _tar(archive: Path, skipped: Counter) -> Iterator[tuple[str, BinaryIO]]:
    size, total = archive.stat().st_size, 0
    with open(archive, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as file:
        for member in file:
            file.members = []  # tarfile would keep all of them: 1 GB for a million
            name = _safe(archive, member.name)
            total += member.size
            _check_ratio(archive, total, size)
            if member.isdir():
                continue
            if not member.isfile() or member.issparse():
                skipped["links and devices"] += 1
            elif not _is_photo(name):
                skipped["other files"] += 1
            else:
                yield name, file.extractfile(member)


def _safe(archive: Path, name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    # `S: Jones/1.jpg` is a name like others, but on Windows; `C:\\1.jpg` is an absolute path of it.
    drive = name[1:2] == ":" and (os.name == "nt" or name[2:3] == "\\")
    if path.is_absolute() or drive or ".." in path.parts or "\0" in name:
        raise InputError(
            f"{archive} is unsafe: its member {name!r} leaves the destination; nothing was unpacked"
        )
    return str(path)


def _is_photo(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _check_ratio(archive: Path, expanded: int, size: int) -> None:
    if expanded > _SLACK and expanded > _MAX_RATIO * size:
        raise InputError(
            f"{archive} is unsafe: it expands to over {_MAX_RATIO} times its size; nothing was "
            "unpacked; if you trust it, unpack it yourself and name the folder"
        )
