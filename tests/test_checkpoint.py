"""Files that are never half there. Run: python -m pytest tests/test_checkpoint.py"""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

import checkpoint
from checkpoint import load_checkpoint, load_state, load_weights, save_checkpoint, save_weights
from config import InputError


def state(number: int) -> dict:
    return {"step": number, "weight": torch.full((100, 100), float(number))}


@pytest.fixture
def folder(tmp_path):
    """A run with two checkpoints: step 1 is previous.pt, step 2 last.pt."""
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    return tmp_path


def test_the_newest_loads_and_the_one_before_is_kept(folder):
    saved, warnings = load_checkpoint(folder)
    assert saved["step"] == 2 and torch.equal(saved["weight"], state(2)["weight"])
    assert warnings == []
    assert torch.load(folder / "previous.pt", weights_only=True)["step"] == 1
    assert sorted(os.listdir(folder)) == ["checksums.json", "last.pt", "previous.pt"]


def damage(path, how: str) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if how == "flipped":
        data[middle] ^= 1
    path.write_bytes({"empty": b"", "half": data[:middle], "html": b"<html>"}.get(how, bytes(data)))


@pytest.mark.parametrize("how", ["flipped", "half", "empty", "html"])
def test_row25_a_damaged_newest_is_passed_over_with_a_warning(folder, how):
    damage(folder / "last.pt", how)
    saved, warnings = load_checkpoint(folder)
    assert saved["step"] == 1
    assert len(warnings) == 1 and "last.pt" in warnings[0]
    # What is saved next must not put the damaged file in the place of the good one.
    save_checkpoint(folder, state(3))
    assert load_checkpoint(folder)[0]["step"] == 3
    damage(folder / "last.pt", "flipped")
    assert load_checkpoint(folder)[0]["step"] == 1


def test_row25_where_none_loads_nothing_starts_silently(folder):
    for name in ("last.pt", "previous.pt"):
        damage(folder / name, "flipped")
    with pytest.raises(InputError, match=r"last\.pt is damaged.*previous\.pt is damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize("after", range(1, 12))
def test_row22_a_kill_at_any_call_leaves_a_checkpoint(folder, monkeypatch, after):
    """The process ends at the n-th of the calls that change the disk."""

    class Killed(BaseException):
        pass

    calls = 0

    def dying(real):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == after:
                raise Killed
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, dying(getattr(os, name)))
        with contextlib.suppress(Killed):
            save_checkpoint(folder, state(3))
    saved, warnings = load_checkpoint(folder)
    assert saved["step"] in (2, 3) and warnings == []
    save_checkpoint(folder, state(4))
    assert load_checkpoint(folder)[0]["step"] == 4


def test_row24_a_full_disk_leaves_the_good_one(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        save_checkpoint(folder, state(3))
    monkeypatch.undo()
    assert load_checkpoint(folder)[0]["step"] == 2
    assert not list(folder.glob(".*.tmp"))


def test_row24_a_disk_that_is_really_full(tmp_path):
    """A child may write 100 kB a file: the save fails half-way, with the path in its error."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from checkpoint import save_checkpoint
folder = Path(sys.argv[1])
save_checkpoint(folder, {"step": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(folder, {"step": 2, "weight": torch.zeros(1_000_000)})
except OSError as error:
    assert "last.pt" in error.filename and error.strerror, error
else:
    raise SystemExit("it was written")
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path)[0]["step"] == 1
    assert not list(tmp_path.glob(".*.tmp"))


class Evil:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_row27_a_malicious_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": 1, "evil": Evil()}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="does not load"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_weights_with_metadata_round_trip(tmp_path):
    tensors = {"a.weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)}
    save_weights(tmp_path / "best.safetensors", tensors, {"network": "r18"})
    loaded, metadata = load_weights(tmp_path / "best.safetensors")
    assert torch.equal(loaded["a.weight"], tensors["a.weight"])
    assert metadata == {"network": "r18"}


def test_a_flipped_byte_in_weights_is_detected(tmp_path):
    save_weights(tmp_path / "best.safetensors", {"a": torch.zeros(1000)}, {})
    damage(tmp_path / "best.safetensors", "flipped")
    with pytest.raises(InputError, match="is damaged"):
        load_weights(tmp_path / "best.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"<html>not weights</html>")
    with pytest.raises(InputError, match=r"a\.safetensors is not a \.safetensors of weights"):
        load_weights(tmp_path / "a.safetensors")


def test_row26_keys_that_do_not_fit_are_listed(tmp_path):
    module = torch.nn.Linear(3, 2)
    wrong = {"weight": torch.zeros(5, 3), "other": torch.zeros(1)}
    with pytest.raises(InputError) as error:
        load_state(module, wrong, tmp_path / "a.safetensors")
    text = str(error.value)
    assert "bias: missing in the file" in text and "other: not in the network" in text
    assert "weight: (5, 3) in the file, (2, 3) in the network" in text


def test_json_is_the_same_bytes_for_the_same_value(tmp_path):
    checkpoint.write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None, "é"]})
    first = (tmp_path / "a.json").read_bytes()
    checkpoint.write_json(tmp_path / "a.json", {"a": [1.5, None, "é"], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == first
    assert json.loads(first) == {"a": [1.5, None, "é"], "b": 1}


def save_in_parts(folder, step: int, ranks: int = 2) -> None:
    parts = {}
    for rank in range(ranks):
        content = {"start": rank * 3, "weight": torch.full((3, 2), float(step + rank))}
        name, digest = checkpoint.save_part(folder, step, rank, ranks, content)
        parts[name] = digest
    save_checkpoint(folder, {"step": step, "parts": parts})


def test_parts_of_the_two_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        save_in_parts(tmp_path, step)
    (tmp_path / ".head-4-0-of-2.pt.tmp").write_bytes(b"half")
    save_in_parts(tmp_path, 4)
    names = {path.name for path in tmp_path.glob("*head-*")}
    assert names == {f"head-{step}-{rank}-of-2.pt" for step in (3, 4) for rank in (0, 1)}
    part = checkpoint.load_part(tmp_path, "head-4-1-of-2.pt")
    assert part["start"] == 3 and torch.equal(part["weight"], torch.full((3, 2), 5.0))


@pytest.mark.parametrize("how", ["flipped", "lost"])
def test_row25_a_damaged_part_makes_the_one_before_count(tmp_path, how):
    for step in (1, 2):
        save_in_parts(tmp_path, step)
    part = tmp_path / "head-2-1-of-2.pt"
    if how == "lost":
        part.unlink()
    else:
        damage(part, "flipped")
    saved, warnings = load_checkpoint(tmp_path)
    assert saved["step"] == 1 and "head-2-1-of-2.pt is lost or damaged" in warnings[0]
    save_in_parts(tmp_path, 3)
    assert load_checkpoint(tmp_path)[0]["step"] == 3


def test_row22_parts_without_their_checkpoint_do_not_count(tmp_path):
    """Killed after the parts and before last.pt: the old ones are the newest."""
    for step in (1, 2):
        save_in_parts(tmp_path, step)
    checkpoint.save_part(tmp_path, 3, 0, 2, {"start": 0, "weight": torch.zeros(3, 2)})
    saved, warnings = load_checkpoint(tmp_path)
    assert saved["step"] == 2 and warnings == []


def test_equal_weights_give_equal_bytes(tmp_path):
    metadata = {f"key{number}": str(number) for number in range(20)}
    for name in ("a.safetensors", "b.safetensors"):
        save_weights(tmp_path / name, {"w": torch.arange(7.0)}, metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    tensors, found = load_weights(tmp_path / "a.safetensors")
    assert found == metadata and torch.equal(tensors["w"], torch.arange(7.0))


def test_a_lock_that_orphans_hold_is_waited_for(tmp_path):
    """The loader processes of a killed run have its lock file open for some seconds more."""
    code = """
import os, sys, time
from pathlib import Path
import checkpoint
with checkpoint.lock(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(1.5)
        os._exit(0)
    print("locked", flush=True)
    os._exit(0)
"""
    child = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True, cwd=checkpoint.__file__[:-13])
    assert "locked" in done.stdout
    with checkpoint.lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"last.pt": 5}'])
def test_row25_without_hashes_a_checkpoint_loads_with_a_warning(folder, text):
    (folder / "checksums.json").write_text(text)
    saved, warnings = load_checkpoint(folder)
    assert saved["step"] == 2 and "has no sha256" in warnings[0]
    save_checkpoint(folder, state(3))
    assert load_checkpoint(folder)[1] == []


def test_an_error_that_is_not_of_the_disk_is_not_told_as_one(tmp_path):
    def killed(file):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        checkpoint.write_atomic(tmp_path / "a", killed)


@pytest.mark.parametrize("after", range(1, 14))
def test_row22_a_kill_at_any_call_with_parts(tmp_path, monkeypatch, after):
    for step in (1, 2):
        save_in_parts(tmp_path, step)
    calls = []

    class Killed(BaseException):
        pass

    def dying(real):
        def call(*arguments, **words):
            calls.append(1)
            if len(calls) == after:
                raise Killed
            return real(*arguments, **words)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(checkpoint.Path, "unlink", dying(checkpoint.Path.unlink))
        with contextlib.suppress(Killed):
            save_in_parts(tmp_path, 3)
    saved, warnings = load_checkpoint(tmp_path)
    assert saved["step"] in (2, 3) and warnings == []
    save_in_parts(tmp_path, 4)
    assert load_checkpoint(tmp_path)[0]["step"] == 4
