"""Unpacking: what is taken, what is refused. Run: python -m pytest tests/test_archives.py"""

import errno
import io
import os
import shutil
import tarfile
import tracemalloc
import warnings
import zipfile

import pytest

from archives import strip_wrapper, unpack
from config import InputError


def tar(path, members) -> None:
    with tarfile.open(path, "w:gz") as file:
        for member, data in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def files(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", ["zip", "tgz", "tar", "tar.bz2", "tar.xz"])
def test_photos_are_taken_and_others_counted(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    members = {"set/ann/1.jpg": b"x" * 5, "set/bob/deep/2.PNG": b"yy", "set/notes.txt": b"z",
               "__MACOSX/set/ann/._1.jpg": b"junk", "set/ann/.hidden.jpg": b"h"}  # fmt: skip
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members.items():
                file.writestr(name, data)
    else:
        mode = {"tgz": "w:gz", "tar": "w", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}[kind]
        with tarfile.open(path, mode) as file:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    skipped = unpack(path, tmp_path / "out")
    assert files(tmp_path / "out") == ["set/ann/1.jpg", "set/bob/deep/2.PNG"]
    assert (tmp_path / "out/set/ann/1.jpg").read_bytes() == b"x" * 5
    assert skipped == {"other files": 3}
    assert strip_wrapper(tmp_path / "out") == tmp_path / "out/set"


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "/tmp/evil.jpg", "a/../../evil.jpg", "C:\\evil.jpg"]
)
@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_row14_a_path_that_leaves_refuses_the_whole(tmp_path, name, kind):
    folder = tmp_path / "work"
    folder.mkdir()
    path = folder / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("good/1.jpg", b"x")
            file.writestr(name, b"evil")
    else:
        tar(path, [("good/1.jpg", b"x"), (name, b"evil")])
    with pytest.raises(InputError, match="leaves the destination"):
        unpack(path, folder / "out")
    assert os.listdir(folder) == [path.name]
    assert not list(tmp_path.rglob("evil*"))


def test_row14_links_and_devices_are_counted_and_never_made(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    path = tmp_path / "a.tgz"
    tar(
        path,
        [
            (link("id/link.jpg", tarfile.SYMTYPE, str(secret)), b""),
            (link("id/hard.jpg", tarfile.LNKTYPE, str(secret)), b""),
            (link("id/pipe.jpg", tarfile.FIFOTYPE, ""), b""),
            (link("id/dev.jpg", tarfile.CHRTYPE, ""), b""),
            (link("dir", tarfile.SYMTYPE, str(tmp_path)), b""),
            ("dir/written.jpg", b"through the link"),
            ("id/1.jpg", b"good"),
        ],
    )
    skipped = unpack(path, tmp_path / "out")
    assert skipped == {"links and devices": 5}
    assert files(tmp_path / "out") == ["dir/written.jpg", "id/1.jpg"]
    assert not (tmp_path / "out/dir").is_symlink() and not (tmp_path / "written.jpg").exists()


@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_row14_a_bomb_is_refused(tmp_path, kind):
    path, zeros = tmp_path / f"a.{kind}", bytes(50 << 20)
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("id/1.jpg", zeros)
    else:
        tar(path, [("id/1.jpg", zeros)])
    with pytest.raises(InputError, match="100 times"):
        unpack(path, tmp_path / "out")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["a.zip", "a.tgz", "a.tar"])
@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"PK\x03\x04 cut", b"\x1f\x8b\x08 cut"]
)
def test_what_is_no_archive_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        unpack(tmp_path / name, tmp_path / "out")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_a_cut_download_is_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    data = os.urandom(100_000)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("id/1.jpg", data)
    else:
        tar(path, [("id/1.jpg", data), ("id/2.jpg", data)])
    path.write_bytes(path.read_bytes()[:-30_000])
    with pytest.raises(InputError, match="damaged or not an archive"):
        unpack(path, tmp_path / "out")
    assert os.listdir(tmp_path) == [path.name]


def test_a_locked_zip_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("id/1.jpg", b"x" * 50)
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1  # the flag of an encrypted member
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="damaged or not an archive"):
        unpack(path, tmp_path / "out")


def test_a_file_within_a_file_is_refused(tmp_path):
    tar(tmp_path / "a.tgz", [("id/1.jpg", b"x"), ("id/1.jpg/2.jpg", b"y")])
    with pytest.raises(InputError, match="damaged or not an archive"):
        unpack(tmp_path / "a.tgz", tmp_path / "out")


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_that_is_a_folder_is_refused_in_either_order(tmp_path, order):
    tar(tmp_path / "a.tgz", [("id/1.jpg", b"x"), ("id/1.jpg/2.jpg", b"y")][::order])
    with pytest.raises(InputError, match="damaged or not an archive"):
        unpack(tmp_path / "a.tgz", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.tgz"]


def write(path, members) -> None:
    """As zip or as tar, by the name of the archive; a name may come twice."""
    if path.suffix != ".zip":
        return tar(path, members)
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of names that come twice
        for name, data in members:
            file.writestr(name, data)


@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_a_name_that_is_too_long_is_counted(tmp_path, kind):
    long = "x" * 300
    names = [f"id/{long}.jpg", f"{long}/1.jpg", "id/" + "d/" * 2100 + "1.jpg", "id/2.jpg"]
    write(tmp_path / f"a.{kind}", [(name, b"x") for name in names])
    assert unpack(tmp_path / f"a.{kind}", tmp_path / "out") == {"files with too long a name": 3}
    assert files(tmp_path / "out") == ["id/2.jpg"]


@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_of_members_that_come_twice_the_first_is_kept(tmp_path, kind):
    members = [("a/1.jpg", b"first"), ("a/1.jpg", b"second"), ("a//1.jpg", b"third"),
               ("./a/1.jpg", b"fourth"), ("a/2.jpg", b"good")]  # fmt: skip
    write(tmp_path / f"a.{kind}", members)
    assert unpack(tmp_path / f"a.{kind}", tmp_path / "out") == {"duplicate members": 3}
    assert files(tmp_path / "out") == ["a/1.jpg", "a/2.jpg"]
    assert (tmp_path / "out/a/1.jpg").read_bytes() == b"first"


@pytest.mark.skipif(os.name == "nt", reason="there it is a drive")
@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_a_colon_in_second_place_is_no_drive(tmp_path, kind):
    write(tmp_path / f"a.{kind}", [("S: Jones/1.jpg", b"x"), ("T:/2.jpg", b"y")])
    assert not unpack(tmp_path / f"a.{kind}", tmp_path / "out")
    assert files(tmp_path / "out") == ["S: Jones/1.jpg", "T:/2.jpg"]


def test_photos_are_on_disk_before_their_folder_has_its_name(tmp_path, monkeypatch):
    """A power cut must not leave a folder of cut-off photos that is never unpacked again."""
    seen = []
    monkeypatch.setattr(os, "sync", lambda: seen.append(files(tmp_path)))
    write(tmp_path / "a.tgz", [("id/1.jpg", b"x"), ("id/2.jpg", b"y")])
    unpack(tmp_path / "a.tgz", tmp_path / "out")
    assert seen == [["a.tgz", "out.part/id/1.jpg", "out.part/id/2.jpg"]]


def test_a_full_disk_is_no_fault_of_the_archive(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "a.tgz", [("id/1.jpg", b"x")])
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError) as error:
        unpack(tmp_path / "a.tgz", tmp_path / "out")
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.tgz"]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_a_member_that_does_not_decompress_is_refused(tmp_path, method):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("id/1.jpg", os.urandom(5000))
    data = bytearray(path.read_bytes())
    data[60:4000] = bytes(3940)
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="damaged or not an archive"):
        unpack(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_a_killed_unpacking_starts_over(tmp_path):
    (tmp_path / "out.part" / "old").mkdir(parents=True)
    (tmp_path / "out.part/old/half.jpg").write_bytes(b"ha")
    tar(tmp_path / "a.tgz", [("id/1.jpg", b"x")])
    unpack(tmp_path / "a.tgz", tmp_path / "out")
    assert files(tmp_path / "out") == ["id/1.jpg"] and not (tmp_path / "out.part").exists()


@pytest.mark.slow
def test_row14_many_members_take_no_memory(tmp_path):
    """100,000 members within 20 MB; tarfile by itself keeps 1 kB of each."""
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.fileobj.write(b"".join(
            tarfile.TarInfo(f"id/{number}.txt").tobuf() for number in range(100_000)
        ))  # fmt: skip
        file.offset = file.fileobj.tell()
    tracemalloc.start()
    try:
        skipped = unpack(tmp_path / "a.tar", tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert skipped["other files"] == 100_000 and peak < 20e6


def test_a_wrapper_is_stripped_only_when_it_holds_only_folders(tmp_path):
    (tmp_path / "a/set/id").mkdir(parents=True)
    assert strip_wrapper(tmp_path / "a") == tmp_path / "a/set"
    (tmp_path / "a/set/photo.jpg").touch()
    assert strip_wrapper(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "b/id1").mkdir(parents=True)
    (tmp_path / "b/id2/x").mkdir(parents=True)
    assert strip_wrapper(tmp_path / "b") == tmp_path / "b"
