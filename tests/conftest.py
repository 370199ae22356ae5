"""Fixtures that several test files use. Run all: make test"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import manifest
import models
import recordio
from images import write_jpeg
from manifest import ALIGNED, REJECTED, UNDETECTED, Row

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)  # the nets are tiny: threads would only wait for each other


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout; absent on a user's machine."""
    if not SHARED.exists():
        pytest.skip("needs ../shared")
    return SHARED


@pytest.fixture(scope="session")
def script():
    """Run a script of the repo as a user would -> the finished process, its output as text."""

    def run(
        *words: object, cwd: Path = ROOT, timeout: float = 120, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / str(words[0])), *map(str, words[1:])]
        environment = {**os.environ, "PYTHONWARNINGS": "error::UserWarning", **(env or {})}
        return subprocess.run(
            command, cwd=cwd, timeout=timeout, capture_output=True, text=True, env=environment
        )

    return run


def make_prepared(folder: Path, identities: int, photos: int, seed: int = 0) -> Path:
    """A prepared folder of patterned crops: quick, and an identity can be learned from them."""
    rows = []
    for identity in range(identities):
        pattern = np.random.default_rng((seed, identity)).uniform(40, 215, (7, 7, 3))
        for photo in range(photos):
            noise = np.random.default_rng((seed, identity, photo)).normal(0, 30, (7, 7, 3))
            crop = np.kron((pattern + noise).clip(0, 255).astype(np.uint8), np.ones((16, 16, 1)))
            name = f"id{identity:03d}"
            image = f"images/{name}/{photo:02d}.jpg"
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            write_jpeg(folder / image, crop.astype(np.uint8))
            rows.append(Row(f"{name}/{photo:02d}.jpg", name, image, ALIGNED))
    lines = [manifest.csv_line(list(manifest.COLUMNS)), *(row.line() for row in rows)]
    (folder / manifest.NAME).write_text("".join(lines))
    return folder


def write_records(folder: Path, records: Iterable[tuple]) -> Path:
    """Records of (labels, payload) -> folder/train.rec and train.idx."""
    folder.mkdir(exist_ok=True)
    data, lines = b"", []
    for number, (labels, payload) in enumerate(records):
        lines.append(f"{number}\t{len(data)}\n")
        data += recordio.encode(recordio.content(labels, number, payload))
    (folder / "train.rec").write_bytes(data)
    (folder / "train.idx").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """30 identities with 6 crops each. Read only."""
    return make_prepared(tmp_path_factory.mktemp("prepared"), 30, 6)


# --- a test set with pairs, for the evaluation


def patterned_crop(identity: int, photo: int) -> np.ndarray:
    """A coarse pattern that belongs to the identity, under noise of the photo's own."""
    pattern = np.random.default_rng(identity).uniform(0, 255, (7, 7, 3))
    noise = np.random.default_rng(1000 * identity + photo).normal(0, 60, (7, 7, 3))
    image = np.clip(pattern + noise, 0, 255).astype(np.uint8)
    return np.kron(image, np.ones((16, 16, 1), dtype=np.uint8))  # (112, 112, 3)


def manifest_row(source: str, status: str = ALIGNED, image: str | None = None) -> Row:
    if image is None:
        image = "" if status == REJECTED else f"images/{source}"
    reason = "" if status == ALIGNED else "no face found"
    return Row(source, source.split("/")[0], image, status, reason)


def write_manifest(data: Path, rows: list[Row]) -> None:
    head = manifest.csv_line(list(manifest.COLUMNS))
    (data / manifest.NAME).write_text(head + "".join(entry.line() for entry in rows))


@pytest.fixture(scope="session")
def lfw_like(tmp_path_factory) -> Path:
    """A prepared set, its pairs.txt of 80 pairs, and beside it `run`, a tiny random network."""
    torch.set_num_threads(1)
    data = tmp_path_factory.mktemp("a set") / "faces"
    rows = []
    for identity in range(6):
        name = f"Person_{identity}"
        (data / "images" / name).mkdir(parents=True)
        for photo in range(1, 5):
            source = f"{name}/{name}_{photo:04d}.jpg"
            crop = patterned_crop(identity, photo)
            Image.fromarray(crop).save(data / "images" / source, quality=95)
            (data.parent / "raw" / name).mkdir(parents=True, exist_ok=True)
            frame = np.pad(crop, ((30, 10), (20, 40), (0, 0)))  # (152, 172, 3)
            Image.fromarray(frame).save(data.parent / "raw" / source)
            box = np.array([40.0, 50.0, 110.0, 130.0])
            rows.append(
                replace(manifest_row(source), width=172, height=152, faces=1, score=1.0, box=box)
            )
    rows[0] = manifest_row(rows[0].source, UNDETECTED)
    write_manifest(data, rows)
    settings = {"source": str(data.parent / "raw"), "bytes": None}
    (data / "pre_process.json").write_text(json.dumps(settings))

    rng = np.random.default_rng(0)
    lines = ["10\t4"]
    for _ in range(10):
        for _ in range(4):
            a, b = 1 + rng.choice(4, 2, replace=False)
            lines.append(f"Person_{rng.integers(6)}\t{a}\t{b}")
        for _ in range(4):
            (i, j), (a, b) = rng.choice(6, 2, replace=False), 1 + rng.choice(4, 2)
            lines.append(f"Person_{i}\t{a}\tPerson_{j}\t{b}")
    (data / "pairs.txt").write_text("\n".join(lines) + "\n")

    run = data.parent / "run"
    run.mkdir()
    torch.manual_seed(0)
    kind = {"network": "r18", "width": 0.125, "embedding_size": 32}
    network = models.create(**kind)
    metadata = {key: str(value) for key, value in kind.items()}
    checkpoint.save_weights(run / checkpoint.BEST, network.state_dict(), metadata)
    return data
