"""Fixtures that several test files use. Run all: make test"""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

import manifest
import recordio
from images import write_jpeg
from manifest import ALIGNED, Row

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)  # the nets are tiny: threads would only wait for each other


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout; absent on a user's machine."""
    if not SHARED.exists():
        pytest.skip("needs ../shared")
    return SHARED


@pytest.fixture
def script():
    """Run a script of the repo as a user would -> the finished process, its output as text."""

    def run(*words: object, cwd: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / str(words[0])), *map(str, words[1:])]
        environment = {**os.environ, "PYTHONWARNINGS": "error::UserWarning"}
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
