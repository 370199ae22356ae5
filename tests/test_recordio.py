"""RecordIO and .bin files. Run: python -m pytest tests/test_recordio.py"""

import json
import multiprocessing
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest

import recordio
from config import InputError
from conftest import write_records
from recordio import BadRecord, RecordFile, read_bin

MAGIC = bytes.fromhex("0a23d7ce")


@pytest.fixture
def fixture(shared):
    return shared / "fixtures/recordio"


def write(folder, records) -> RecordFile:
    """(labels, payload) each -> folder/train.rec, opened."""
    return RecordFile(write_records(folder, records) / "train.rec")


def make_set(counts=(2, 1, 3), label=float) -> list:
    """A training set: header, photos, identity records."""
    header, ranges = recordio.framing(counts)
    labels = [index for index, count in enumerate(counts) for _ in range(count)]
    photos = [(label(name), b"photo%d" % place * 9) for place, name in enumerate(labels)]
    return [(header, b""), *photos, *[(pair, b"") for pair in ranges]]


def faces(records: RecordFile) -> list[int]:
    """Classes of all photos, told twice where there are ranges."""
    numbers = records.images()
    labels, faults = records.scan(numbers)
    if faults:
        raise BadRecord(next(iter(faults.values())))
    by_range = records.labels_by_range(len(numbers))
    assert by_range is None or by_range.tolist() == labels.tolist()
    return labels.tolist()


# --------------------------------------------------------------------------------------------------
# mxnet's own files


def test_the_fixture_reads_as_expected(fixture):
    expected = json.loads((fixture / "expected.json").read_text())
    records = RecordFile(fixture / "train.rec")
    numbers = records.images()
    assert len(numbers) == expected["num_images"] == len(expected["images"])
    labels, faults = records.scan(numbers)
    assert not faults and records.labels_by_range(len(numbers)).tolist() == labels.tolist()
    assert len(set(labels.tolist())) == expected["num_ids"]
    for number, label in zip(numbers.tolist(), labels.tolist(), strict=True):
        image, known = records.read(number).payload, expected["images"][str(number)]
        assert (label, len(image), zlib.crc32(image)) == tuple(known.values())
        assert records.label(number) == label
    for name in ("pairs_py3.bin", "pairs_py2.bin"):
        images, same = read_bin(fixture / name)
        assert same.dtype == bool and same.tolist() == [True] * 4 + [False, True]
        crcs = {known["crc32"] for known in expected["images"].values()}
        assert len(images) == 12 and all(zlib.crc32(image) in crcs for image in images)


def test_the_split_record_of_the_fixture(fixture):
    expected = json.loads((fixture / "expected.json").read_text())
    records = RecordFile(fixture / "split.rec")
    assert records.read(0) == ((7.0,), bytes.fromhex(expected["split_payload_hex"]))
    assert records.read(1) == ((8.0,), b"after")


@pytest.mark.parametrize("name", ["train", "split"])
def test_the_same_content_gives_mxnets_bytes(fixture, name, tmp_path):
    records = RecordFile(fixture / f"{name}.rec")
    contents = [records.read(number) for number in range(len(records))]
    alike = [(labels if len(labels) > 1 else labels[0], payload) for labels, payload in contents]
    write_records(tmp_path, alike)
    for suffix in ("rec", "idx"):
        ours = (tmp_path / f"train.{suffix}").read_bytes()
        assert ours == (fixture / f"{name}.{suffix}").read_bytes()


def test_the_header_and_ranges_of_the_fixture(fixture):
    records = RecordFile(fixture / "train.rec")
    counts = np.bincount(faces(records)).tolist()
    header, ranges = recordio.framing(counts)
    assert records.read(0).labels == header
    assert [records.read(number).labels for number in range(23, 28)] == list(ranges)


# --------------------------------------------------------------------------------------------------
# reading


@pytest.mark.parametrize("payload", [
    MAGIC, MAGIC * 3, b"a" + MAGIC, b"abcd" + MAGIC, b"abcd" + MAGIC + b"x", MAGIC + b"abc" + MAGIC,
    b"\x0a\x23\xd7", b"", b"x" * 1000 + MAGIC * 5 + b"y",
])  # fmt: skip
def test_any_payload_comes_back(tmp_path, payload):
    records = write(tmp_path, [(3.0, payload), ((1.0, 2.0), payload), (4.0, b"end")])
    assert [records.read(number) for number in range(3)] == [
        ((3.0,), payload), ((1.0, 2.0), payload), ((4.0,), b"end")
    ]  # fmt: skip


def test_labels_come_from_the_ranges_or_from_the_photos(tmp_path, monkeypatch):
    whole = make_set()
    ranges = write(tmp_path / "ranges", whole)
    assert faces(ranges) == ranges.labels_by_range(6).tolist() == [0, 0, 1, 2, 2, 2]
    wrong = [*whole[:7], ((1.0, 4.0), b""), ((4.0, 4.0), b""), ((4.0, 7.0), b"")]
    shifted = [*whole[:7], ((1.0, 2.0), b""), ((2.0, 4.0), b""), ((4.0, 7.0), b"")]
    pairs = make_set(label=lambda name: (float(name), 0.0))
    for name, content in (("wrong", wrong), ("shifted", shifted), ("bare", whole[1:7]),
                          ("pairs", pairs)):  # fmt: skip
        records = write(tmp_path / name, content)
        assert faces(records) == [0, 0, 1, 2, 2, 2], name
        assert (records.labels_by_range(6) is None) == (name != "pairs")
    monkeypatch.setattr(recordio, "_BLOCK", 100)  # several blocks, of one to three records
    records = RecordFile(tmp_path / "bare/train.rec")
    assert records.scan(records.images())[0].tolist() == [0, 0, 1, 2, 2, 2]


def test_an_index_in_another_order(tmp_path):
    records = write(tmp_path, make_set())
    contents = [records.read(number) for number in range(len(records))]
    lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
    (tmp_path / "train.idx").write_text("".join(lines[::-1]))
    again = RecordFile(tmp_path / "train.rec")
    assert [again.read(number) for number in range(len(again))] == contents
    # And records that stand in another order than their numbers.
    data = (tmp_path / "train.rec").read_bytes()
    starts = [int(line.split()[1]) for line in lines] + [len(data)]
    order = np.random.default_rng(0).permutation(len(lines))
    moved, place = {}, 0
    with open(tmp_path / "train.rec", "wb") as rec:
        for number in order:
            moved[number] = place
            place += rec.write(data[starts[number] : starts[number + 1]])
    text = "".join(f"{number}\t{moved[number]}\n" for number in range(len(lines)))
    (tmp_path / "train.idx").write_text(text)
    again = RecordFile(tmp_path / "train.rec")
    assert [again.read(number) for number in range(len(again))] == contents
    assert again.scan(again.images())[0].tolist() == [0, 0, 1, 2, 2, 2]


def test_more_photos_than_float32_counts(tmp_path, monkeypatch):
    """As in Glint360K (17 million): header and ranges are rounded, so they are not relied on."""
    monkeypatch.setattr(recordio, "_EXACT", 4)
    records = write(tmp_path, [((6.0, 12.0), b""), *make_set()[1:]])  # rounded: 7 and 10 are true
    assert records.images().tolist() == [1, 2, 3, 4, 5, 6] and faces(records) == [0, 0, 1, 2, 2, 2]
    rounded = [((1.0, 3.0), b""), ((3.0, 5.0), b""), ((5.0, 7.0), b"")]  # 3 to 4, 4 to 7 are true
    records = write(tmp_path, [((6.0, 12.0), b""), *make_set()[1:7], *rounded])
    assert records.labels_by_range(6) is None and faces(records) == [0, 0, 1, 2, 2, 2]


def _read_in_child(records: RecordFile, number: int, opened, queue) -> None:
    calls, real = [], os.open
    os.open = lambda *words, **named: calls.append(words[0]) or real(*words, **named)
    queue.put(([records.read(number).payload for _ in range(200)], len(calls)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_process_opens_the_file_once_for_itself(tmp_path, method):
    records = write(tmp_path, make_set((40,)))
    expected = [records.read(number).payload for number in range(1, 5)]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [
        context.Process(target=_read_in_child, args=(records, number, None, queue))
        for number in range(1, 5)
    ]
    for child in children:
        child.start()
    read = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert [opened for _, opened in read] == [1, 1, 1, 1]
    assert sorted(payloads[0] for payloads, _ in read) == sorted(expected)
    assert all(len(set(payloads)) == 1 for payloads, _ in read)


# --------------------------------------------------------------------------------------------------
# faults


@pytest.fixture
def whole(tmp_path):
    write(tmp_path / "set", make_set())
    return tmp_path / "set"


def patch(folder, offset: int, data: bytes) -> None:
    with open(folder / "train.rec", "r+b") as file:
        file.seek(offset)
        file.write(data)


def refused(folder) -> str:
    with pytest.raises(InputError) as error:
        records = RecordFile(folder / "train.rec")
        faces(records)
        [records.read(number) for number in range(len(records))]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_row16_a_truncated_rec(whole):
    data = (whole / "train.rec").read_bytes()
    starts = RecordFile(whole / "train.rec").starts
    for keep, number in ((len(data) - 1, 9), (len(data) - 40, 9), (int(starts[4]) + 20, 4), (3, 0)):
        (whole / "train.rec").write_bytes(data[:keep])
        said = refused(whole)
        assert f"record {number} at offset {starts[number]}" in said and "train.rec" in said, said
    (whole / "train.rec").write_bytes(b"")
    assert "record 0 at offset 0" in refused(whole)


def test_row16_an_index_that_is_cut_off_or_of_another_set(whole, tmp_path):
    text = (whole / "train.idx").read_text()
    lines = text.splitlines(keepends=True)
    for bad, said in (
        ("".join(lines[:-1]), "record 8 at offset"),
        (text[:-3], "record 9 at offset 6 does not fit"),  # the last offset lost its last digits
        ("".join(lines[:3] + lines[4:]), "record 3 is missing or stands twice"),
        ("".join(lines + lines[-1:]), "record 10 is missing or stands twice"),
        (text + "10\t\n", "after record 9"),
        ("", "is empty"),
        ("<html>404</html>", "is not an index"),
        (text.replace(lines[5], "5\t999999999\n"), "record 5 at offset 999999999 does not fit"),
        (text.replace(lines[5], lines[5][:-2] + "1\n"), "record 5 at offset"),
    ):
        (whole / "train.idx").write_text(bad)
        assert said in refused(whole), said
    write(tmp_path / "other", make_set((1, 5)))
    shutil.copy(tmp_path / "other/train.idx", whole / "train.idx")
    assert "record" in refused(whole)
    (whole / "train.idx").unlink()
    assert "train.idx is not there" in refused(whole)


def test_row16_a_header_that_counts_other_records(tmp_path):
    write(tmp_path, [((7.0, 12.0), b""), *make_set()[1:]])
    assert "header counts 12 records" in refused(tmp_path) and "index 10" in refused(tmp_path)


def test_row16_bad_magic_and_lengths(whole):
    start = int(RecordFile(whole / "train.rec").starts[3])
    data = (whole / "train.rec").read_bytes()
    for offset, damage, said in (
        (0, b"\0\0\0\0", "starts with 00000000, not with 0a23d7ce"),
        (4, struct.pack("<I", 5000), "is cut off"),
        (4, struct.pack("<I", 40), "from where the index says"),
        (4, struct.pack("<I", 1 << 29 | 78), "is cut off"),  # first part, and no other follows
        (4, struct.pack("<I", 5 << 29 | 78), "part of kind 5"),
        (8, struct.pack("<I", 1 << 30), "is said to have 1073741824 labels"),
        (12, struct.pack("<f", 1.5), "has the label 1.5, no whole number"),
        (12, struct.pack("<f", -1), "has the label -1, no whole number"),
        (12, struct.pack("<f", float("nan")), "has the label nan, no whole number"),
        (12, struct.pack("<f", 1e30), "has the label 1e+30, no whole number"),
    ):
        (whole / "train.rec").write_bytes(data)
        patch(whole, start + offset, damage)
        message = refused(whole)
        assert f"record 3 at offset {start}" in message and said in message, message


def test_row16_what_is_damaged_is_told_apart_from_the_rest(whole):
    starts = RecordFile(whole / "train.rec").starts
    patch(whole, int(starts[2]), b"\0\0\0\0")
    patch(whole, int(starts[5]) + 12, struct.pack("<f", 0.25))
    records = RecordFile(whole / "train.rec")
    labels, faults = records.scan(records.images())
    assert labels.tolist() == [0, -1, 1, 2, -1, 2] and sorted(faults) == [2, 5]
    assert "label 0.25" in faults[5] and f"offset {starts[2]}" in faults[2]


def test_row16_a_number_out_of_bounds(whole):
    records = RecordFile(whole / "train.rec")
    for number in (-1, 10, 10**12):
        with pytest.raises(BadRecord, match="is not one of 10"):
            records.read(number)


# --------------------------------------------------------------------------------------------------
# .bin

PAIR = ([b"a", b"b", b"c", b"d"], [True, False])


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_bin_of_python_3(tmp_path, protocol):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(PAIR, protocol))
    images, same = read_bin(tmp_path / "x.bin")
    assert images == PAIR[0] and same.tolist() == PAIR[1] and same.dtype == bool


@pytest.mark.parametrize("start", [b"", b"\x80\x02"])
def test_bin_of_python_2(tmp_path, start):
    """Protocols 1 and 2: its `str` is bytes, and its answers may be numbers."""
    data = start + b"(]q\x01(U\x01aU\x01\xffU\x01bU\x01be]q\x02(I01\nK\x00et."
    (tmp_path / "x.bin").write_bytes(data)
    images, same = read_bin(tmp_path / "x.bin")
    assert images == [b"a", b"\xff", b"b", b"b"] and same.tolist() == [True, False]


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def bin_refused(tmp_path, data: bytes) -> str:
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(InputError) as error:
        read_bin(tmp_path / "x.bin")
    assert "\n" not in str(error.value) and "x.bin" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_bin_with_code_is_refused_by_its_name(tmp_path, protocol):
    canary = tmp_path / "canary"
    said = bin_refused(tmp_path, pickle.dumps(([Evil(canary)], [True]), protocol))
    assert "mkdir" in said and not canary.exists()
    bomb = b"(i" + b"os\nmkdir\n."  # INST
    assert "os.mkdir" in bin_refused(tmp_path, bomb) and not canary.exists()


@pytest.mark.parametrize(
    "data, said",
    [
        (b"\x80\x02}.", "EMPTY_DICT"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02Pabc\n.", "PERSID"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "numbers an object 2147483647"),  # a table of 34 GB
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.", "expected 1152921504606846976"),
        (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"].", ""),
        (b"L" + b"9" * 10000 + b"L\n.", ""),
        (b"", ""),
        (b"<html>404</html>", ""),
        (b"\x80\x03].", "not a pair"),
        (b"h\x07.", ""),
    ],
)
def test_bin_with_other_operations_or_none(tmp_path, data, said):
    assert said in bin_refused(tmp_path, data)


@pytest.mark.parametrize(
    "value, said",
    [
        ((["a", "b"], [True]), "image 0 is of type str"),
        (([b"a", 1.5], [True]), "FLOAT"),
        (([b"a", None], [True]), "NONE"),
        (([b"a", b"b"], [b"1"]), "answer 0 is of type bytes"),
        (([b"a", b"b"], [7]), "neither true nor false"),
        (([b"a", b"b", b"c"], [True]), "3 images for 1 pairs"),
        (([], []), "0 images for 0 pairs"),
        ((b"ab", [True]), "the images are no list"),
        (([b"a", b"b"], [True], 3), "not a pair"),
    ],
)
def test_bin_of_other_content(tmp_path, value, said):
    assert said in bin_refused(tmp_path, pickle.dumps(value, 4))


def test_bin_that_is_no_file(tmp_path):
    with pytest.raises(InputError, match="not a file"):
        read_bin(tmp_path)
    with pytest.raises(InputError, match="not a file"):
        read_bin(tmp_path / "none.bin")


def test_bin_cut_anywhere(fixture, tmp_path):
    data = (fixture / "pairs_py2.bin").read_bytes()
    for keep in (1, 100, 30000, len(data) - 1):
        bin_refused(tmp_path, data[:keep])


def test_row16_a_bin_of_countless_lists_is_refused_before_they_are_made(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x80\x03" + b"]" * 100_000 + b".")
    with pytest.raises(InputError, match="more than 16 lists and tuples"):
        recordio.read_bin(tmp_path / "a.bin")
