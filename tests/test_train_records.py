"""Training from RecordIO. Run: python -m pytest tests/test_train_records.py"""

import shutil

import numpy as np
import pytest

import data_gen
import packing
import recordio
import train
from config import InputError, TrainOptions
from conftest import make_prepared
from test_train import TINY, same, weights


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = make_prepared(tmp_path_factory.mktemp("packed"), 30, 6)
    pairs = [(image.split("/")[1], image) for image in data_gen.load_faces(folder).images]
    packing.pack(folder, pairs, lambda _: None)
    return folder


def run(data, runs, **more):
    options = TrainOptions(data=data, runs=runs, name="r", **{**TINY, "epochs": 1, **more})
    assert train.main(options) == 0
    return runs / "r"


def test_the_same_weights_from_crops_and_from_records(packed, tmp_path):
    """Packed beside its manifest, the files alone as InsightFace distributes them, or a .rec."""
    plain = shutil.copytree(packed, tmp_path / "plain", ignore=shutil.ignore_patterns("train.*"))
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("train.rec", "train.idx", "property"):
        shutil.copy(packed / name, alone)
    sources = [plain, packed, alone, alone / "train.rec"]
    runs = [run(data, tmp_path / f"runs{place}") for place, data in enumerate(sources)]
    for other in runs[1:]:
        assert same(weights(runs[0]), weights(other))


def test_row16_skip_bad_is_an_option_of_training(packed, tmp_path, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("train.rec", "train.idx"):
        shutil.copy(packed / name, alone)
    start = int(recordio.RecordFile(alone / "train.rec").starts[9])
    with open(alone / "train.rec", "r+b") as file:
        file.seek(start)
        file.write(b"\0\0\0\0")
    with pytest.raises(InputError, match=f"record 9 at offset {start} starts with 00000000"):
        run(alone, tmp_path / "refused", epochs=3)
    folder = run(alone, tmp_path / "runs", skip_bad=True)
    told = capsys.readouterr()
    assert "WARNING: 1 damaged records are left out" in told.err and "179 photos" in told.out
    listed = (folder / "skipped.txt").read_text().splitlines()
    assert len(listed) == 1 and f"record 9 at offset {start}" in listed[0]


def test_the_name_of_a_run_is_that_of_the_folder(packed):
    options = train.with_defaults(TrainOptions(data=packed / "train.rec"))
    assert options.name == packed.name
    assert np.array_equal(data_gen.load_faces(packed / "train.rec").labels,
                          data_gen.load_faces(packed).labels)  # fmt: skip
