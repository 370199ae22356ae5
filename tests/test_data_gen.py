"""The face set, its order, augmentation and loader. Run: python -m pytest tests/test_data_gen.py"""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import time

import numpy as np
import pytest
import torch

import data_gen
import manifest
import packing
import recordio
from config import InputError
from conftest import make_prepared, write_records
from data_gen import RunSampler, augment, batches, hold_out, load_faces, make_loader, make_pairs
from images import jpeg_bytes


def loaded(faces, workers: int, start: int = 0, kind: str = "strong", epochs: int = 2):
    sampler = RunSampler(len(faces), 16, epochs, seed=3, start=start)
    return list(batches(make_loader(faces, sampler, kind, workers, 60, pin=False)))


def test_row17_classes_are_dense_in_sorted_order(prepared):
    faces = load_faces(prepared)
    assert faces.identities == sorted(faces.identities) and len(faces.identities) == 30
    assert sorted(set(faces.labels.tolist())) == list(range(30))
    for image, label in zip(faces.images, faces.labels, strict=True):
        assert image.split("/")[1] == faces.identities[label]


def test_only_aligned_photos_are_trained_on(tmp_path):
    folder = make_prepared(tmp_path, 3, 2)
    text = (folder / manifest.NAME).read_text()
    text = text.replace("id001/01.jpg,aligned", "id001/01.jpg,undetected")
    (folder / manifest.NAME).write_text(text.replace("id002/00.jpg,aligned,", ",rejected,no face"))
    images = load_faces(folder).images
    assert "images/id001/01.jpg" not in images and len(images) == 4


def test_row17_min_images_leaves_out_small_identities(tmp_path):
    folder = make_prepared(tmp_path, 4, 3)
    lines = (folder / manifest.NAME).read_text().splitlines(keepends=True)
    (folder / manifest.NAME).write_text("".join(lines[:1] + lines[2:]))  # one of id000 is lost
    faces = load_faces(folder, min_images=3)
    assert faces.identities == ["id001", "id002", "id003"]
    assert sorted(set(faces.labels.tolist())) == [0, 1, 2] and len(faces) == 9
    with pytest.raises(InputError, match="0 identities with at least 4"):
        load_faces(folder, min_images=4)


def test_what_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.csv is not there: prepare the folder"):
        load_faces(tmp_path)
    (tmp_path / manifest.NAME).write_text("a,b,c\n1,2,3\n")
    with pytest.raises(InputError, match="not a manifest"):
        load_faces(tmp_path)


def test_held_out_identities_are_not_trained_on(prepared):
    faces = load_faces(prepared)
    train, held = hold_out(faces, 200, seed=0)
    assert len(held.identities) == 3  # a tenth at most
    assert not set(train.identities) & set(held.identities)
    assert sorted(train.images + held.images) == sorted(faces.images)
    again, other = hold_out(faces, 200, seed=0)[1], hold_out(faces, 200, seed=1)[1]
    assert again.identities == held.identities and other.identities != held.identities
    assert hold_out(faces, 0, seed=0) == (faces, None)


def test_validation_pairs_are_what_they_say(prepared):
    faces = load_faces(prepared)
    pairs, same = make_pairs(faces, seed=0)
    assert same.sum() == (~same).sum() == 300  # ten of the fifteen of each identity
    left, right = faces.labels[pairs[:, 0]], faces.labels[pairs[:, 1]]
    assert np.array_equal(left == right, same)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len({tuple(sorted(pair)) for pair in pairs.tolist()}) == len(pairs)
    assert np.array_equal(make_pairs(faces, seed=0)[0], pairs)


def test_few_photos_give_few_pairs_and_an_end(tmp_path):
    folder = make_prepared(tmp_path, 2, 5)
    lines = (folder / manifest.NAME).read_text().splitlines(keepends=True)
    (folder / manifest.NAME).write_text("".join(lines[:8]))  # five photos of one, two of the other
    _, same = make_pairs(load_faces(folder), seed=0)
    assert same.sum() == (~same).sum() == 5


def test_the_digest_tells_sets_apart(prepared, tmp_path):
    assert load_faces(prepared).digest() == load_faces(prepared).digest()
    assert load_faces(prepared).digest() != load_faces(make_prepared(tmp_path, 30, 5)).digest()


def test_each_epoch_shows_every_photo_at_most_once_in_its_own_order():
    sampler = RunSampler(100, 16, epochs=3, seed=0)
    steps = list(sampler)
    assert len(steps) == len(sampler) == 18
    orders = []
    for epoch in range(3):
        keys = [key for batch in steps[epoch * 6 : epoch * 6 + 6] for key in batch]
        assert {key[0] for key in keys} == {epoch}
        indices = [index for _, index in keys]
        assert len(set(indices)) == 96
        orders.append(indices)
    assert orders[0] != orders[1] != orders[2]
    assert steps == list(RunSampler(100, 16, epochs=3, seed=0))
    assert steps != list(RunSampler(100, 16, epochs=3, seed=1))


@pytest.mark.parametrize("start", [1, 6, 11])
def test_from_any_step_on_the_same_batches(start):
    whole = list(RunSampler(100, 16, epochs=3, seed=0))
    assert list(RunSampler(100, 16, epochs=3, seed=0, start=start)) == whole[start:]


def test_the_same_pixels_whatever_the_workers_and_the_start(prepared):
    faces = hold_out(load_faces(prepared), 200, 0)[0]
    whole = loaded(faces, workers=0)
    for workers, start in ((2, 0), (0, 9), (1, 15)):
        part = loaded(faces, workers, start)
        assert len(part) == len(whole) - start
        for one, other in zip(whole[start:], part, strict=True):
            for left, right in zip(one, other, strict=True):
                assert torch.equal(left, right)


def test_batches_are_what_the_set_holds(prepared):
    faces = load_faces(prepared)
    batch = loaded(faces, workers=0, kind="none")[0]
    assert batch.crops.shape == (16, 112, 112, 3) and batch.crops.dtype == torch.uint8
    for crop, label, index in zip(*batch, strict=True):
        assert label == faces.labels[index]
        assert np.array_equal(crop.numpy(), data_gen.read_crop(faces.folder / faces.images[index]))


def test_the_loader_leaves_the_global_generator_alone(prepared):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded(load_faces(prepared), workers=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_row31_a_photo_lost_or_damaged_since_is_named(prepared, tmp_path, workers):
    folder = shutil.copytree(prepared, tmp_path / "set")
    faces = load_faces(folder)
    bad = folder / "images/id010/03.jpg"
    bad.write_bytes(bad.read_bytes()[:500])
    with pytest.raises(InputError, match=r"id010/03\.jpg: truncated; run pre_process\.py"):
        loaded(faces, workers)
    bad.unlink()
    with pytest.raises(InputError, match=r"id010/03\.jpg: no such file"):
        loaded(faces, workers)


# --------------------------------------------------------------------------------------------------
# RecordIO


def write_set(folder, counts, labels=float, ranges=True):
    """A set as InsightFace lays it out, of patterned crops; `labels` makes a record's label."""
    header, spans = recordio.framing(counts)
    people = np.repeat(np.arange(len(counts)), counts).tolist()
    pattern = np.random.default_rng(0).integers(0, 256, (len(people), 112, 112, 3), dtype=np.uint8)
    photos = [
        (labels(label), jpeg_bytes(image)) for label, image in zip(people, pattern, strict=True)
    ]
    if ranges:
        photos = [(header, b""), *photos, *((span, b"") for span in spans)]
    return write_records(folder, photos)


def test_training_reads_what_mxnet_wrote(shared):
    folder = shared / "fixtures/recordio"
    faces = load_faces(folder)
    expected = json.loads((folder / "expected.json").read_text())["images"]
    assert faces.labels.tolist() == [known["label"] for known in expected.values()]
    assert faces.identities == [f"{label:08d}" for label in range(5)] and faces.left_out == 0
    for index in range(len(faces)):
        assert faces.read(index).shape == (112, 112, 3)
    assert faces.name(3) == "train.rec record 4"
    assert len(load_faces(folder / "train.rec", min_images=5)) == 10  # two identities have five
    assert load_faces(folder, 5).left_out == 12


def test_the_same_batches_from_records_whatever_the_workers(tmp_path):
    faces = load_faces(write_set(tmp_path / "set", (10, 12, 15)))
    whole = loaded(faces, workers=0)
    for crop, label, index in zip(*loaded(faces, 0, kind="none")[0], strict=True):
        assert np.array_equal(crop.numpy(), faces.read(index)) and label == faces.labels[index]
    for one, other in zip(whole, loaded(faces, workers=2), strict=True):
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def test_labels_without_ranges_are_read_once_and_kept(tmp_path, capsys):
    folder = write_set(tmp_path / "set", (3, 2, 4), labels=lambda n: (n, 0.0), ranges=False)
    first = load_faces(folder)
    assert "Reading the labels of 9 records" in capsys.readouterr().out
    again = load_faces(folder)
    assert "Reading" not in capsys.readouterr().out
    assert first.labels.tolist() == again.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert first.digest() == again.digest()
    cache = folder / "train.labels.npz"
    cache.write_bytes(cache.read_bytes()[:-30])  # a damaged one is made again
    assert load_faces(folder).labels.tolist() == first.labels.tolist()
    write_set(folder, (4, 5), ranges=False)  # of another set, too
    os.utime(folder / "train.rec", ns=(1, 1))
    assert load_faces(folder).labels.tolist() == [0] * 4 + [1] * 5


def test_labels_with_gaps_become_dense_classes(tmp_path):
    folder = write_set(tmp_path / "set", (3, 2, 4), labels=lambda n: float((7, 300, 10)[n]))
    faces = load_faces(folder)
    assert faces.identities == ["00000007", "00000010", "00000300"]
    assert faces.labels.tolist() == [0, 0, 0, 2, 2, 1, 1, 1, 1]
    train, held = hold_out(load_faces(write_set(tmp_path / "big", (3,) * 30)), 10, seed=0)
    assert len(held.identities) == 3 and len(train) == 81
    both = np.sort(np.concatenate([train.numbers, held.numbers]))
    assert both.tolist() == list(range(1, 91))


def test_row16_skip_bad_leaves_out_damaged_records_and_says_which(tmp_path):
    folder = write_set(tmp_path / "set", (3, 2, 4))
    starts = recordio.RecordFile(folder / "train.rec").starts
    with open(folder / "train.rec", "r+b") as file:
        for number in (2, 7):
            file.seek(int(starts[number]))
            file.write(b"\0\0\0\0")
    faces = load_faces(folder, skip_bad=True)
    assert faces.labels.tolist() == [0, 0, 1, 1, 2, 2, 2] and faces.left_out == 2
    assert faces.numbers.tolist() == [1, 3, 4, 5, 6, 8, 9]
    for number, line in zip((2, 7), faces.damaged, strict=True):
        assert f"record {number} at offset {starts[number]} starts with 00000000" in line
    assert load_faces(folder, skip_bad=True).damaged == faces.damaged  # from the cache
    # Without it: refused when the record is read, or at the start where all labels are.
    with pytest.raises(InputError, match="record 2 at offset"):
        load_faces(folder).read(1)
    bare = write_set(tmp_path / "bare", (3, 2, 4), ranges=False)
    with open(bare / "train.rec", "r+b") as file:
        file.seek(12)
        file.write(struct.pack("<f", 1.5))
    with pytest.raises(InputError, match=r"record 0 at offset 0 has the label 1\.5.*--skip-bad"):
        load_faces(bare)
    assert len(load_faces(bare, skip_bad=True)) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_a_record_that_does_not_decode_is_named(tmp_path, workers):
    folder = write_set(tmp_path / "set", (20, 20))
    starts = recordio.RecordFile(folder / "train.rec").starts
    with open(folder / "train.rec", "r+b") as file:
        file.seek(int(starts[5]) + 32)
        file.write(b"no jpeg!")
    with pytest.raises(InputError, match="the image of record 5 is unusable"):
        loaded(load_faces(folder), workers)


def test_a_packed_set_is_the_same_set(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "set")
    plain = load_faces(folder)
    pairs = [(image.split("/")[1], image) for image in plain.images]
    packing.pack(folder, pairs, lambda _: None)
    packed = load_faces(folder)
    assert packed.records is not None and plain.records is None
    assert packed.digest() == plain.digest() and packed.identities == plain.identities
    for index in range(len(plain)):
        assert np.array_equal(packed.read(index), plain.read(index))
    held = hold_out(packed, 200, seed=0)[1], hold_out(plain, 200, seed=0)[1]
    assert held[0].digest() == held[1].digest()
    assert np.array_equal(held[0].read(4), held[1].read(4))
    moved = shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("*.csv"))
    alone = load_faces(moved)
    assert alone.labels.tolist() == plain.labels.tolist() and alone.images is None


def test_a_stale_pack_is_not_trained_on(prepared, tmp_path, capsys):
    folder = shutil.copytree(prepared, tmp_path / "set")
    plain = load_faces(folder)
    pairs = [(image.split("/")[1], image) for image in plain.images]
    packing.pack(folder, pairs[:-1], lambda _: None)
    faces = load_faces(folder)
    assert faces.records is None and "not used" in capsys.readouterr().out
    assert faces.digest() == plain.digest()


@pytest.fixture(scope="module")
def crop() -> np.ndarray:
    y, x = np.mgrid[:112, :112]
    return np.stack([x * 2, y * 2, (x + y)], axis=2).astype(np.uint8)


def test_flip_is_the_crop_or_its_mirror_image(crop):
    kinds = []
    for index in range(200):
        result = augment(crop, "flip", np.random.default_rng(index))
        kinds.append(np.array_equal(result, crop))
        assert kinds[-1] or np.array_equal(result, crop[:, ::-1])
    assert 70 < sum(kinds) < 130
    assert augment(crop, "none", np.random.default_rng(0)) is crop


def test_strong_changes_a_lot_but_not_beyond_a_face(crop):
    results = [augment(crop, "strong", np.random.default_rng(index)) for index in range(300)]
    assert all(r.shape == crop.shape and r.dtype == np.uint8 for r in results)
    plain = sum(np.array_equal(r, crop) or np.array_equal(r, crop[:, ::-1]) for r in results)
    assert 20 < plain < 100  # 0.5 * 0.5 * 0.9 * 0.9 * 0.8 of them: 16 %
    grey = sum((r[..., 0] == r[..., 1]).all() for r in results)
    assert 10 < grey < 60
    # The middle of the face stays within the shift, turn and scale that are allowed.
    means = np.array([[r[40:72, 40:72].mean() for r in results]])
    assert np.abs(means - crop[40:72, 40:72].mean()).max() < 80


def test_growing_goes_from_strong_to_more_of_it_and_a_part_erased(crop):
    for index in range(20):
        strong, first = (
            augment(crop, kind, np.random.default_rng(index), done=0.0)
            for kind in ("strong", "growing")
        )
        assert np.array_equal(strong, first)
    results = [augment(crop, "growing", np.random.default_rng(index)) for index in range(300)]
    assert all(r.shape == crop.shape and r.dtype == np.uint8 for r in results)
    plain = sum(np.array_equal(r, crop) or np.array_equal(r, crop[:, ::-1]) for r in results)
    assert plain < 25  # 0.2 * 0.4 * 0.85 * 0.9 * 0.8 * 0.5 of them: 2.4 %
    erased = 0
    for result in results:
        flat = (result[:, 1:] == result[:, :-1]).all(axis=2)  # the crop itself has a slope
        erased += (flat.sum(axis=1) >= 14).sum() >= 14
    assert 80 < erased < 220  # half of them
    before = crop.copy()
    data_gen._erase(crop, np.random.default_rng(0))
    assert np.array_equal(crop, before)  # a photo in memory is not written to


def test_growing_is_half_way_in_the_middle_of_the_run(prepared, monkeypatch):
    faces, seen = data_gen.load_faces(prepared), []
    monkeypatch.setattr(data_gen, "augment", lambda image, kind, rng, done: seen.append(done))
    sampler = RunSampler(len(faces), 8, 5, seed=0)
    loader = data_gen.make_loader(faces, sampler, "growing", workers=0, timeout=0, pin=False)
    for epoch in range(5):
        loader.dataset[epoch, 0]
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]
    data_gen.FaceDataset(faces, "growing", 0, epochs=1)[0, 0]
    assert seen[-1] == 0.0


def test_an_affine_change_turns_about_the_middle_and_shifts(crop):
    none = data_gen.Strength(1, 0, 0, 0, 0, 0, colour=0, grey=0, erase=0)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(data_gen._affine(crop, none, rng), crop)
    dot = np.zeros((112, 112, 3), np.uint8)
    dot[54:58, 54:58] = 255  # in the middle, where turning and scaling leave it

    def middles(strength):
        found = []
        for seed in range(50):
            moved = data_gen._affine(dot, strength, np.random.default_rng(seed))[..., 0].astype(
                float
            )
            total = moved.sum()
            found.append([(moved.sum(axis=0) @ np.arange(112)) / total,
                          (moved.sum(axis=1) @ np.arange(112)) / total])  # fmt: skip
        return np.array(found) - 55.5

    still = middles(none._replace(turn=15, scale=0.15, stretch=0.08, shear=0.08))
    assert np.abs(still).max() < 0.2
    shifted = middles(none._replace(shift=6))
    assert 5 < np.abs(shifted).max() <= 6.1 and np.abs(shifted.mean(axis=0)).max() < 1.5


def test_row32_a_killed_loader_process_is_told(prepared):
    faces = load_faces(prepared)
    sampler = RunSampler(len(faces), 8, 400, 0)
    found = batches(make_loader(faces, sampler, "none", workers=1, timeout=20, pin=False))
    next(found)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(InputError, match=r"loader process was killed.*/dev/shm.*--workers 0"):
        for _ in found:
            pass
    subprocess.run(["true"], check=True)  # its end does not raise the error again


def test_row32_a_loader_process_that_hangs_is_told_in_time(prepared, monkeypatch):
    real = data_gen.read_crop

    def hang(path):
        if "id007" in str(path):
            time.sleep(1000)
        return real(path)

    monkeypatch.setattr(data_gen, "read_crop", hang)
    faces = load_faces(prepared)
    sampler = RunSampler(len(faces), 8, 400, 0)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"timed out after 2 seconds.*hangs.*--resume goes on"):
        list(batches(make_loader(faces, sampler, "none", workers=1, timeout=2, pin=False)))
    assert time.monotonic() - start < 30


def test_row30_an_empty_set_is_refused_and_a_short_last_batch_left_out(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        load_faces(tmp_path)
    (tmp_path / "manifest.csv").write_text(manifest.csv_line(list(manifest.COLUMNS)))
    with pytest.raises(InputError, match="has 0 identities"):
        load_faces(tmp_path)
    steps = list(RunSampler(17, 8, 2, 0))
    assert len(steps) == 4 and all(len(step) == 8 for step in steps)  # 17 = 2 * 8 + 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_row34_ranks_share_every_batch(ranks):
    whole = list(RunSampler(45, 8, 2, seed=3, start=3))
    shares = [list(RunSampler(45, 8, 2, 3, 3, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # as many steps on each
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert list(itertools.chain(*parts)) == batch and len({len(part) for part in parts}) == 1
