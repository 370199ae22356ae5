"""Fetching a published set: its hash is checked, and what was cut off is resumed.

    python pre_process.py --download lfw

LFW's own server is often unreachable; scikit-learn keeps a copy at figshare (without the
deep-funneled archive), and its names, addresses and hashes are those below.
"""

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import config
import job
from checkpoint import lock, sha256
from config import InputError, PreProcessOptions, naming

# No address, no answer, an error, a cut; what the disk raises is another matter (see _network).
_NETWORK = (urllib.error.URLError, http.client.HTTPException)
_LOCK = ".download.lock"
_TIMEOUT = 30  # seconds without a byte
_BLOCK = 1 << 20


class File(NamedTuple):
    name: str
    url: str
    sha256: str


_FIGSHARE = "https://ndownloader.figshare.com/files/"
LFW = File(
    "lfw-funneled.tgz",
    _FIGSHARE + "5976015",
    "b47c8422c8cded889dc5a13418c4bc2abbda121092b3533a83306f90d900100a",
)
LFW_PAIRS = (
    File(
        "pairs.txt",
        _FIGSHARE + "5976006",
        "ea42330c62c92989f9d7c03237ed5d591365e89b3e649747777b70e692dc1592",
    ),
    File(
        "pairsDevTest.txt",
        _FIGSHARE + "5976009",
        "7cb06600ea8b2814ac26e946201cdb304296262aad67d046a16a7ec85d0ff87c",
    ),
)


def fetch(file: File, folder: Path) -> Path:
    """The file in `folder`, fetched where it is not there yet.

    Raises InputError: no network, another content than the published one, or another process that
    fetches into the folder. What came before a cut is kept as <name>.part, and the next call goes
    on from there.
    """
    path = folder / file.name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder, _LOCK):
            if not path.exists():  # else another process has just fetched it
                _fetch(file, path)
                return path
    if (found := sha256(path)) != file.sha256:
        raise InputError(
            f"{path} is not the published file (sha256 {found}, not {file.sha256}): delete it, "
            f"and it is fetched from {file.url}"
        )
    return path


def _fetch(file: File, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    try:
        _receive(file, part)
    except _NETWORK as error:
        kept = part.stat().st_size if part.exists() else 0
        said = f"; {kept:,} bytes are kept, run again to go on" if kept else ""
        raise InputError(
            f"{file.url} can't be fetched ({_reason(error)}){said}; or put the file there yourself "
            f"as {path} (sha256 {file.sha256})"
        ) from error
    found = sha256(part)
    if found != file.sha256:
        part.unlink()
        raise InputError(
            f"{file.url} gave another file (sha256 {found}, not {file.sha256}), which was deleted: "
            f"try again later, or put the published one there yourself as {path}"
        )
    os.replace(part, path)


def fetch_lfw(options: PreProcessOptions) -> PreProcessOptions:
    """LFW's photos and lists of pairs -> the options that prepare them as a test set.

    Of several ranks only the first one fetches: the others wait for what it gives out.
    """
    if options.src is not None:
        raise InputError("--download and --src both name a source: leave one out")
    out = options.out or config.DATA / "lfw"
    downloads = config.DATA / "downloads"
    if job.rank() == 0:
        for file, folder in ((LFW, downloads), *((file, out) for file in LFW_PAIRS)):
            fetch(file, folder)
    return replace(options, src=downloads / LFW.name, out=out, keep_undetected=True)


def _receive(file: File, part: Path) -> None:
    """Append what is missing of the file to `part`."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "pre_process.py", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(file.url, headers=headers)
    try:
        with _network():
            answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return  # all is there, or more: the hash will tell
        raise
    with answer:
        resumed = answer.status == http.client.PARTIAL_CONTENT and str(
            answer.headers.get("Content-Range", "")
        ).startswith(f"bytes {have}-")
        length = answer.headers.get("Content-Length")
        start = have if resumed else 0
        total = start + int(length) if length else None
        print(f"Fetching {file.name} from {file.url}" + (f" ({total:,} bytes)" if total else ""))
        with naming(part), open(part, "ab" if resumed else "wb") as out:
            done, last = start, time.monotonic()
            while block := _read(answer):
                out.write(block)
                done += len(block)
                if time.monotonic() - last >= 10:
                    last = time.monotonic()
                    share = f", {done / total:.0%}" if total else ""
                    print(f"Fetching {file.name}: {done:,} bytes{share}", flush=True)
        if total is not None and done < total:  # read(n) says nothing of a connection that broke
            raise http.client.IncompleteRead(b"", total - done)


def _read(answer: http.client.HTTPResponse) -> bytes:
    with _network():
        return answer.read(_BLOCK)


@contextmanager
def _network() -> Iterator[None]:
    """What is raised in here is the network's fault, EHOSTUNREACH and ssl.SSLError among it."""
    try:
        yield
    except urllib.error.URLError:
        raise
    except OSError as error:
        raise urllib.error.URLError(error) from error


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, http.client.IncompleteRead):
        return f"cut off, {error.expected:,} bytes are missing"
    return str(getattr(error, "reason", error)) or type(error).__name__
