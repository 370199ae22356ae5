"""The face set, its order, augmentation and loader. Run: python -m pytest tests/test_data_gen.py"""

import itertools
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import data_gen
import manifest
from config import InputError
from conftest import make_prepared
from data_gen import RunSampler, augment, batches, hold_out, load_faces, make_loader, make_pairs


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
        assert np.array_equal(crop.numpy(), data_gen.read_crop(faces.path(index)))


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


def test_row32_a_killed_loader_process_is_told(prepared):
    faces = load_faces(prepared)
    sampler = RunSampler(len(faces), 8, 400, 0)
    found = batches(make_loader(faces, sampler, "none", workers=1, timeout=20, pin=False))
    next(found)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(InputError, match=r"loader process was killed.*/dev/shm.*--workers 0"):
        for _ in found:
            pass


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
