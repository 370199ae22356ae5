"""Packing a prepared set as RecordIO. Run: python -m pytest tests/test_packing.py"""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

import packing
from config import ROOT, InputError
from conftest import make_prepared
from data_gen import load_faces

NAMES = ("train.rec", "train.idx", "property", "train.pack.json")


def read_independently(folder):
    """A reader after mxnet's description of the format, which shares no line with recordio.py.

    -> {number: (flag, label, id, id2, labels, payload)}, by walking over the file; and the places.
    """
    data = (folder / "train.rec").read_bytes()
    found, places, at = {}, {}, 0
    while at < len(data):
        begin, body = at, b""
        while True:
            magic, word = struct.unpack_from("<II", data, at)
            assert magic == 0xCED7230A
            kind, size = word // 2**29, word % 2**29
            body += data[at + 8 : at + 8 + size]
            at += 8 + size
            while at % 4:
                assert data[at] == 0
                at += 1
            if kind in (0, 3):
                break
            body += struct.pack("<I", 0xCED7230A)
        flag, label = struct.unpack_from("<If", body)
        number, other = struct.unpack_from("<QQ", body, 8)
        labels = [struct.unpack_from("<f", body, 24 + 4 * k)[0] for k in range(flag)]
        found[number] = flag, label, number, other, labels, body[24 + 4 * flag :]
        places[number] = begin
    return found, places


def pairs_of(folder):
    faces = load_faces(folder)
    return [(image.split("/")[1], image) for image in faces.images]


@pytest.fixture
def folder(tmp_path):
    return make_prepared(tmp_path / "set", 6, 4)


def pack(folder, pairs=None) -> int:
    return packing.pack(folder, pairs or pairs_of(folder), lambda _: None)


def contents(folder) -> list[bytes]:
    return [(folder / name).read_bytes() for name in NAMES]


def test_an_independent_reader_finds_every_crop(folder):
    pairs = pairs_of(folder)[:-2]  # identities of different sizes
    assert pack(folder, pairs) == (folder / "train.rec").stat().st_size
    found, places = read_independently(folder)
    assert sorted(found) == list(range(1 + 22 + 6))
    assert found[0] == (2, 0.0, 0, 0, [23.0, 29.0], b"")
    people = sorted({name for name, _ in pairs})
    for number, (name, image) in enumerate(pairs, start=1):
        payload = (folder / image).read_bytes()
        assert found[number] == (0, people.index(name), number, 0, [], payload)
    for place, name in enumerate(people):
        numbers = [1 + at for at, pair in enumerate(pairs) if pair[0] == name]
        labels = [float(numbers[0]), float(numbers[-1] + 1)]
        assert found[23 + place] == (2, 0.0, 23 + place, 0, labels, b"")
    lines = "".join(f"{number}\t{places[number]}\n" for number in sorted(places))
    assert (folder / "train.idx").read_text() == lines
    assert (folder / "property").read_text() == "6,112,112\n"


def test_a_crop_that_holds_the_magic_word_is_split(folder):
    pairs = pairs_of(folder)
    crop = folder / pairs[5][1]
    magic = struct.pack("<I", 0xCED7230A)
    crop.write_bytes(b"\xff\xd8ab" + magic * 2 + b"abc" + magic + b"x\xff\xd9")
    pack(folder)
    assert read_independently(folder)[0][6][5] == crop.read_bytes()


def test_packing_again_does_nothing_until_the_set_changes(folder):
    assert pack(folder)
    before = contents(folder)
    assert pack(folder) == 0 and contents(folder) == before
    (folder / "train.idx").unlink()
    assert pack(folder) and contents(folder) == before
    assert pack(folder, pairs_of(folder)[4:])  # an identity fewer
    assert (folder / "property").read_text() == "5,112,112\n"
    assert not list(folder.glob(".train*"))


def test_a_pack_that_was_stopped_goes_on(folder, monkeypatch):
    pack(folder)
    whole = contents(folder)
    for name in NAMES:
        (folder / name).unlink()
    monkeypatch.setattr(packing, "_SYNC", 4000)
    read, real = [], packing._read_crop

    def stop_at_ten(path):
        read.append(path)
        if len(read) == 10:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(packing, "_read_crop", stop_at_ten)
    with pytest.raises(KeyboardInterrupt):
        pack(folder)
    assert not any((folder / name).exists() for name in NAMES)
    with open(folder / ".train.idx.tmp", "a") as file:
        file.write("7\t99")  # a line that was cut off
    count = len(read)
    pack(folder)
    assert contents(folder) == whole
    assert count + 5 < len(read) < count + 24  # not from the start, and not all was there


def test_parts_of_another_set_are_not_used(folder):
    pack(folder)
    whole = contents(folder)
    (folder / ".train.rec.tmp").write_bytes(b"x" * 5000)
    (folder / ".train.idx.tmp").write_text("0\t0\n1\t40\n2\t900\n")
    (folder / ".train.pack.json.tmp").write_text('{"photos": "of another set"}')
    (folder / "train.rec").unlink()
    pack(folder)
    assert contents(folder) == whole


def test_a_lost_or_cut_crop_is_refused_and_the_old_pack_stays(folder):
    pack(folder)
    before = contents(folder)
    pairs = pairs_of(folder)
    crop = folder / pairs[3][1]
    whole = crop.read_bytes()
    for bad in (whole[:-40], b"", None):
        crop.unlink() if bad is None else crop.write_bytes(bad)
        with pytest.raises(InputError, match=r"id000/03\.jpg is lost or cut off"):
            pack(folder, pairs[:-1])
        assert contents(folder) == before


def stop_early(folder, monkeypatch, at=12):
    """Leave the parts of a pack that was stopped; they list about as many records."""
    monkeypatch.setattr(packing, "_SYNC", 3000)
    read, real = [], packing._read_crop

    def stop(path):
        read.append(path)
        if len(read) == at:
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_read_crop", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(folder)
    lines = (folder / ".train.idx.tmp").read_text().splitlines(keepends=True)
    assert len(lines) > 5
    return lines


@pytest.mark.parametrize(
    "damage",
    ["nuls", "a gap", "not from 0", "swapped", "not of 4", "no magic", "beyond", "words", "huge",
     "shifted"],
)  # fmt: skip
def test_a_damaged_index_of_a_stopped_pack_is_not_gone_on_with(folder, monkeypatch, damage):
    pack(folder)
    whole = contents(folder)
    for name in NAMES:
        (folder / name).unlink()
    lines = stop_early(folder, monkeypatch)
    offsets = [int(line.split("\t")[1]) for line in lines]
    text = {
        "nuls": "\0" * sum(map(len, lines)) + "\n",
        "a gap": f"0\t0\n7\t{offsets[7] if len(offsets) > 7 else 400}\n",
        "not from 0": f"0\t{offsets[1]}\n1\t{offsets[2]}\n",
        "swapped": f"0\t0\n1\t{offsets[2]}\n2\t{offsets[1]}\n",
        "not of 4": f"0\t0\n1\t{offsets[1] + 2}\n",
        "no magic": f"0\t0\n1\t{offsets[1] + 4}\n",
        "beyond": "".join(lines) + f"{len(lines)}\t{10**9}\n",
        "words": "0\t0\n1\tx\n",
        "huge": f"0\t0\n1\t{10**30}\n",
        "shifted": f"0\t0\n1\t{offsets[2]}\n",  # the place of a record, but of another one
    }[damage]
    (folder / ".train.idx.tmp").write_text(text)
    read, real = [], packing._read_crop
    monkeypatch.setattr(packing, "_read_crop", lambda path: (read.append(path), real(path))[1])
    pack(folder)
    assert contents(folder) == whole and len(read) == 24  # from the start
    assert not list(folder.glob(".train*"))


def test_parts_that_a_power_cut_emptied_are_written_anew(folder, monkeypatch):
    pack(folder)
    whole = contents(folder)
    for cut in (0, 3, 41):
        for name in NAMES:
            (folder / name).unlink()
        stop_early(folder, monkeypatch)
        rec = folder / ".train.rec.tmp"
        rec.write_bytes(rec.read_bytes()[:cut])
        pack(folder)
        assert contents(folder) == whole


def test_parts_of_another_set_are_gone_before_the_mark_is_ours(folder, monkeypatch):
    """A kill right behind the mark leaves none of them, else the next run would go on with them."""
    lines = stop_early(folder, monkeypatch)
    write = packing.write_json

    def killed(path, value):
        write(path, value)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, pairs_of(folder)[4:])
    assert lines and [path.name for path in folder.glob(".train*")] == [".train.pack.json.tmp"]


def test_records_are_on_disk_before_the_index_that_lists_them(folder, monkeypatch):
    synced, fsync = [], os.fsync

    def told(handle):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(packing, "_SYNC", 4000)
    monkeypatch.setattr(os, "fsync", told)
    pack(folder)
    parts = [name for name in synced if name in (".train.rec.tmp", ".train.idx.tmp")]
    assert len(parts) > 6 and parts == [".train.rec.tmp", ".train.idx.tmp"] * (len(parts) // 2)


def test_a_changed_crop_under_its_old_name_makes_the_pack_stale(folder):
    pairs = pairs_of(folder)
    pack(folder)
    assert packing.is_packed(folder, pairs)
    crop = folder / pairs[3][1]
    crop.write_bytes((folder / pairs[9][1]).read_bytes())  # of a photo that was replaced
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace("aligned,,0,0,0", "aligned,,90,80,1", 1))
    assert (folder / "manifest.csv").read_text() != text
    assert not packing.is_packed(folder, pairs)
    assert pack(folder) and packing.is_packed(folder, pairs)
    assert read_independently(folder)[0][4][5] == crop.read_bytes()


@pytest.mark.slow
def test_kills_lose_nothing(folder):
    """SIGKILL at 20 random moments of packing, then to the end: the same bytes."""
    pack(folder)
    whole = contents(folder)
    code = (
        "import sys, time, pathlib; sys.path.insert(0, sys.argv[2]);"
        "import packing, data_gen; packing._SYNC = 3000;"
        "folder = pathlib.Path(sys.argv[1]);"
        "pairs = [(i.split('/')[1], i) for i in data_gen.load_faces(folder).images];"
        "print('go', flush=True); packing.pack(folder, pairs, lambda n: time.sleep(0.01))"
    )
    rng = np.random.default_rng(0)
    unfinished = 0
    for _ in range(20):
        for name in NAMES:
            (folder / name).unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(ROOT)], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.25))
        unfinished += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if rng.random() < 0.5:  # now and then two kills in a row on the same parts
            pack(folder)
            assert contents(folder) == whole
    pack(folder)
    assert unfinished >= 10 and contents(folder) == whole
