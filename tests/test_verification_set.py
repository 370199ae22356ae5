"""What is compared: sets, originals, .bin. Run: python -m pytest tests/test_verification_set.py"""

import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import sklearn.model_selection
from PIL import Image

import config
import verification_set
from config import InputError
from conftest import patterned_crop, write_manifest


def encoded(identity: int, photo: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(patterned_crop(identity, photo)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Have recordio.read_bin give these images and labels -> the path of such a .bin."""

    def make(images: list[bytes], same: list[bool]) -> Path:
        fake = types.ModuleType("recordio")
        fake.read_bin = lambda _: (images, np.array(same))
        monkeypatch.setitem(sys.modules, "recordio", fake)
        (tmp_path / "agedb_30.bin").write_bytes(b"read by recordio")
        return tmp_path / "agedb_30.bin"

    return make


# --- a prepared folder ----------------------------------------------------------------------------


def test_photos_come_with_crop_original_and_frame(lfw_like):
    tests = verification_set.load(lfw_like, lfw_like / "pairs.txt")
    assert len(tests) == 80 and tests.name == "faces" and not tests.no_originals
    assert len(tests.photos) == len(tests.hashes) == len({p.name for p in tests.photos})
    for photo in tests.photos:
        assert photo.original == lfw_like.parent / "raw" / photo.name and photo.original.is_file()
        assert (photo.box is None) == photo.undetected
        assert photo.decode(photo.read()).shape == (112, 112, 3)
    assert [photo.name for photo in tests.photos if photo.undetected] == [
        "Person_0/Person_0_0001.jpg"
    ]


def test_originals_are_where_the_set_says(tmp_path, monkeypatch):
    def where(source: str, size: int | None) -> tuple[Path | None, str]:
        said = {"source": source, "bytes": size}
        (tmp_path / "pre_process.json").write_text(json.dumps(said))
        return verification_set.originals(tmp_path)

    assert where("lfw.tgz", 5)[0] is None and "gone from" in where("lfw.tgz", 5)[1]
    (tmp_path / "source" / "lfw" / "A").mkdir(parents=True)
    assert where("lfw.tgz", 5) == (tmp_path / "source" / "lfw", "")  # without the wrapper
    (tmp_path / "photos").mkdir()
    assert where(str(tmp_path / "photos"), None) == (tmp_path / "photos", "")
    monkeypatch.setattr(config, "ROOT", tmp_path)
    assert where("photos", None)[0] == tmp_path / "photos"
    for damaged in ("[]", "{}", "no json", '{"source": 3, "bytes": null}'):
        (tmp_path / "pre_process.json").write_text(damaged)
        assert "does not say" in verification_set.originals(tmp_path)[1]
    (tmp_path / "pre_process.json").unlink()
    assert "does not say" in verification_set.originals(tmp_path)[1]


def test_the_errata_are_those_of_lfw(shared):
    theirs = verification_set.read_errata(shared / "data" / "lfw_errata.txt")
    assert verification_set.read_errata(verification_set.ERRATA) == theirs and len(theirs) == 7
    name = "Debra_Messing/Debra_Messing_000"
    assert frozenset({name + "1", name + "2"}) in theirs


def test_only_the_genuine_pairs_of_the_errata_are_marked(lfw_like, tmp_path, monkeypatch):
    a, b, c, d = (f"Person_{i}/Person_{i}_000{n}" for i in (1, 2) for n in (1, 2))
    errata, listed = tmp_path / "errata.txt", tmp_path / "p.tsv"
    errata.write_text("# a comment\n1\tPerson_1\t2\t1\n5\tPerson_2\t1\t3\n")
    monkeypatch.setattr(verification_set, "ERRATA", errata)
    for label, marked in ((1, True), (0, False)):
        lines = [f"{a}\t{b}.jpg\t{label}", f"{c}\t{d}\t1", f"{a}\t{c}\t0"] * 2
        lines += [f"{b}\t{c}\t0"] * 2
        listed.write_text("\n".join(lines) + "\n")
        found = verification_set.load(lfw_like, listed).mislabelled
        assert found.tolist() == [marked, False, False] * 2 + [False] * 2


def test_a_crop_is_refused_by_name(lfw_like, tmp_path):
    for content, word in ((b"", "empty"), (b"text", "not an image"), (encoded(0, 1)[:200], "")):
        photo = verification_set.Photo("a", "a", tmp_path / "a.jpg")
        with pytest.raises(InputError, match=r"a\.jpg.*pre_process") as refusal:
            photo.decode(content)
        assert word in str(refusal.value)
    with pytest.raises(InputError, match="cannot be read"):
        photo.read()
    small = io.BytesIO()
    Image.new("RGB", (50, 40)).save(small, "PNG")
    with pytest.raises(InputError, match=r"x\.bin: pair 1, left is 50x40.*fetch"):
        verification_set.Photo("x.bin: pair 1, left", "", small.getvalue()).decode(small.getvalue())


def test_a_name_that_is_no_utf8_can_be_written():
    name = b"caf\xe9/1.jpg".decode(errors="surrogateescape")
    assert verification_set.printable(name).encode() == b"caf\\xe9/1.jpg"
    assert verification_set.printable("çà/1.jpg") == "çà/1.jpg"


# --- .bin -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [2, 6, 10, 23, 6000])
def test_a_bin_is_cut_as_insightface_cuts_it(pairs):
    fold, said = verification_set.contiguous_folds(pairs)
    splits = sklearn.model_selection.KFold(min(10, pairs), shuffle=False).split(np.arange(pairs))
    for number, (_, held_out) in enumerate(splits):
        assert np.flatnonzero(fold == number).tolist() == held_out.tolist()
    assert said.startswith(f"{min(10, pairs)} contiguous folds")


def test_a_bin_gives_its_crops_and_each_picture_once(packed):
    a, b, c = encoded(0, 1), encoded(0, 2), encoded(1, 1)
    tests = verification_set.load(None, packed([a, b, a, c, b, c], [True, False, False]))
    assert tests.name == "agedb_30" and len(tests) == 3 and len(tests.photos) == 3
    assert tests.left.tolist() == [0, 0, 1] and tests.right.tolist() == [1, 2, 2]
    assert tests.same.tolist() == [True, False, False] and not tests.mislabelled.any()
    assert (tests.photos[2].decode(tests.photos[2].read()) == patterned_crop(1, 1)).all()
    assert tests.photos[2].label == "pair 2, right" and "crops only" in tests.no_originals


@pytest.mark.parametrize("same", [[True, True], [False, False]])
def test_a_bin_of_one_kind_is_refused(packed, same):
    with pytest.raises(InputError, match=r"agedb_30\.bin: no (genuine|impostor) pair"):
        verification_set.load(None, packed([encoded(i, 1) for i in range(4)], same))


@pytest.mark.parametrize("name", ["pairs_py3.bin", "pairs_py2.bin"])
def test_both_pickles_of_insightface(shared, name):
    tests = verification_set.load(None, shared / "fixtures" / "recordio" / name)
    assert len(tests) == 6 and len(tests.photos) == 12
    assert tests.same.tolist() == [True, True, True, True, False, True]
    assert tests.fold.tolist() == list(range(6))
    for photo in tests.photos:
        assert photo.decode(photo.read()).shape == (112, 112, 3)


def test_a_pickle_with_anything_else_is_refused(tmp_path):
    (tmp_path / "evil.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    with pytest.raises(InputError, match=r"evil\.bin"):
        verification_set.load(None, tmp_path / "evil.bin")


def test_a_list_that_names_a_photo_without_a_crop_is_refused(lfw_like, tmp_path):
    write_manifest(tmp_path, [])
    with pytest.raises(InputError, match="is not in"):
        verification_set.load(tmp_path, lfw_like / "pairs.txt")
