"""Several ranks on gloo. Run: python -m pytest tests/test_distributed.py (slow ones: -m slow)

What the ranks compute is in tests/ranks.py, which runs under torchrun.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import models
from conftest import ROOT
from test_train import TINY, scalars

RANKS = ROOT / "tests/ranks.py"


def torchrun(ranks: int, *words: object, restarts: int = 0) -> list[str]:
    job = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *job, *map(str, words)]


def finished(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sharded_head_is_the_dense_one(ranks):
    done = finished(torchrun(ranks, RANKS, "lazy_sgd", "heads"))
    assert f"all equal on {ranks} ranks" in done.stdout, done.stderr[-3000:]


def test_two_ranks_have_the_gradients_of_one_process(ranks=2):
    done = finished(torchrun(ranks, RANKS, "gradients"))
    assert f"all equal on {ranks} ranks" in done.stdout, done.stderr[-3000:]


def test_ranks_without_a_photo_to_validate(ranks=3):
    done = finished(torchrun(ranks, RANKS, "few_photos"))  # 4 photos: 2, 2 and none
    assert f"all equal on {ranks} ranks" in done.stdout, done.stderr[-3000:]


@pytest.fixture
def job(prepared, tmp_path):
    """Run train.py on ranks, stopped or spoiled at a step as ranks.py does -> process, run."""

    def run(name: str, ranks: int = 2, stop_at: int = 0, spoil_at: int = 0, **change: object):
        words = {**TINY, "data": str(prepared), "runs": str(tmp_path), "name": name, **change}
        (tmp_path / "options.json").write_text(json.dumps(words))
        command = torchrun(ranks, RANKS, "run", tmp_path / "options.json", stop_at, spoil_at)
        return finished(command), tmp_path / name

    return run


def contents(run: Path) -> dict:
    """Everything in the newest checkpoint, the parts of the head included."""
    saved, _ = checkpoint.load_checkpoint(run)
    parts = {name: checkpoint.load_part(run, name) for name in saved.pop("parts")}
    saved.pop("options")
    return {**saved, **parts}


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.slow
def test_all_ranks_start_a_fine_tuning_from_the_same_weights(job, tmp_path):
    torch.manual_seed(7)
    sizes = ("network", "width", "embedding_size", "resolution")
    given = models.create(**{key: TINY[key] for key in sizes}).state_dict()
    torch.save(given, tmp_path / "given.pth")
    still = {"lr": 1e-12, "momentum": 0.0, "weight_decay": 0.0, "epochs": 1}
    done, run = job("r", init=str(tmp_path / "given.pth"), **still)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("given.pth, the head is new") == 1
    saved, _ = checkpoint.load_checkpoint(run)
    for key, value in saved["backbone"].items():
        if "running" not in key and "num_batches" not in key:
            assert torch.allclose(value, given[key], atol=1e-6), key
    done, _ = job("other", init=str(tmp_path / "given.pth"), network="r18")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and "another network" in errors[0]


def test_row28_a_nan_on_one_rank_stops_all_before_the_update(job):
    done, run = job("r", spoil_at=4, save_every=1)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-3000:]  # of the rank that met it
    assert "loss nan" in errors[0] and "step 3" in errors[0] and "learning rate" in errors[0]
    assert "images/id" in errors[0]
    saved, _ = checkpoint.load_checkpoint(run)
    assert saved["step"] == 3
    assert all(torch.isfinite(value).all() for value in saved["backbone"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{}, {"head": "sharded", "sample_rate": 0.5, "accumulate": 2, "save_every": 3, "workers": 1}],
    ids=["dense", "sharded"],
)
def test_row34_a_stopped_job_goes_on_as_if_never_stopped(job, change):
    done, straight = job("straight", **change)
    assert done.returncode == 0, done.stderr[-3000:]
    done, stopped = job("stopped", stop_at=7, **change)
    assert "stopped at step 7" in done.stdout, done.stderr[-3000:]
    done, _ = job("stopped", resume=True, **change)
    assert done.returncode == 0 and "going on from step 7" in done.stdout, done.stderr[-3000:]
    assert equal(contents(stopped), contents(straight))
    assert (stopped / "result.json").read_text() == (straight / "result.json").read_text()
    steps = [event.step for event in scalars(stopped, "train/loss")]
    assert len(steps) == len(set(steps))
    parts = {path.name for path in stopped.glob("head-*")}
    kept = 4 if change else 0  # of last.pt and previous.pt, two ranks each
    assert len(parts) == kept


@pytest.mark.slow
def test_row34_a_job_goes_on_with_another_number_of_ranks(job):
    change = {"head": "sharded", "batch_size": 16, "dropout": 0.0}
    done, run = job("r", ranks=2, stop_at=7, **change)
    before = contents(run)
    whole = torch.cat([before[f"head-7-{rank}-of-2.pt"]["weight"] for rank in range(2)])
    assert whole.shape == (27, 32)
    done, _ = job("r", ranks=4, stop_at=1, resume=True, **change)
    assert "saved by 2 ranks, going on with 4" in done.stdout, done.stderr[-3000:]
    after = contents(run)
    weight = torch.cat([after[f"head-8-{rank}-of-4.pt"]["weight"] for rank in range(4)])
    # One step further at a small learning rate: each centre is near where it was.
    assert weight.shape == whole.shape
    assert torch.nn.functional.cosine_similarity(weight, whole).min() > 0.9
    done, _ = job("r", ranks=1, resume=True, **change)
    assert done.returncode == 0, done.stderr[-3000:]


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    below = children(pid)
    return below + [one for child in below for one in descendants(child)]


def rank_of(pid: int) -> str | None:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((w.decode()[5:] for w in words if w.startswith(b"RANK=")), None)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_row33_a_killed_rank(prepared, tmp_path, restarts):
    """Without restarts the job ends within a minute, nobody left; with them it goes on."""
    names = {"s": "scale", "m": "m2"}  # torchrun takes --s and --m for its own
    words = [f"--{names.get(key, key).replace('_', '-')}={value}" for key, value in TINY.items()]
    words += ["--data", prepared, "--runs", tmp_path, "--name", "r", "--workers", "1"]
    words += ["--epochs", "6", "--save-every", "5"]
    process = subprocess.Popen(
        torchrun(2, ROOT / "train.py", *words, restarts=restarts),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step     12"):
            break
    assert said[-1].startswith("step     12"), "".join(said)[-3000:]
    everyone = descendants(process.pid)
    victim = next(pid for pid in children(process.pid) if rank_of(pid) == "1")
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    rest, _ = process.communicate(timeout=240)
    if not restarts:
        assert time.monotonic() - start < 60 and process.returncode != 0
        time.sleep(6)  # loader processes look for their parent every five seconds
        alive = [pid for pid in everyone if Path(f"/proc/{pid}").exists()]
        assert not [pid for pid in alive if "Z" not in Path(f"/proc/{pid}/stat").read_text()[:60]]
        assert checkpoint.load_checkpoint(tmp_path / "r")[0]["step"] >= 10
        return
    assert process.returncode == 0, rest[-3000:]
    assert "going on from step" in rest
    events = scalars(tmp_path / "r", "train/loss")
    assert [event.step for event in events] == [*range(3, 61, 3)]
