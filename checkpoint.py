"""Files that are never half there: atomic writes, checkpoints with hashes, weights as safetensors.

A run folder holds `last.pt` and `previous.pt` (all that a resume needs), `best.safetensors` (the
weights to use) and `checksums.json` (their sha256). While a file is being replaced, checksums.json
holds the old and the coming hash, and either is valid: a kill at any moment leaves a checkpoint
that loads. A flipped byte, which torch.load and safetensors take without a word, is detected.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch

from config import InputError

LAST, PREVIOUS, BEST, CHECKSUMS = "last.pt", "previous.pt", "best.safetensors", "checksums.json"


def write_atomic(path: Path, write: bytes | Callable[[BinaryIO], object]) -> None:
    """Temporary file in the same folder, flush, fsync, replace, fsync of the folder."""
    temporary = _write_temporary(path, write)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """Sorted keys and a final newline: the same value gives the same bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One process a folder. The lock is the kernel's: it goes with the process, however that ends.

    Raises InputError: another one has it.
    """
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise InputError(
                f"{folder} is in use by process {file.read().strip() or '?'}: wait for its end"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(folder: Path, state: dict) -> None:
    """`state` -> folder/last.pt; the one before stays as previous.pt.

    `state` may hold tensors, dicts, lists and plain numbers and strings only: that is what
    weights_only=True loads again.
    """
    hashes = _read_hashes(folder)
    temporary = _write_temporary(folder / LAST, lambda file: torch.save(state, file))
    old, new = hashes.get(LAST, []), [sha256(temporary)]
    pending = {LAST: old + new, PREVIOUS: hashes.get(PREVIOUS, []) + old}
    write_json(folder / CHECKSUMS, {**hashes, **pending})
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
        hashes[PREVIOUS] = old
    os.replace(temporary, folder / LAST)
    _sync_folder(folder)
    write_json(folder / CHECKSUMS, {**hashes, LAST: new})


def load_checkpoint(folder: Path) -> tuple[dict, list[str]]:
    """The newest undamaged checkpoint of a run, on the CPU, and warnings about those passed over.

    Raises InputError where none loads: a run never starts over silently.
    """
    warnings: list[str] = []
    damaged: list[Path] = []
    hashes = _read_hashes(folder)
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        damage = _damage(path, hashes)
        if damage is None:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                # Out of the way, so that the next save does not put it in the place of this one.
                for bad in damaged:
                    os.replace(bad, bad.with_name(f"{bad.name}.damaged"))
                return state, warnings
            except MemoryError:
                raise
            except Exception as error:  # torch.load raises five kinds for a file that is not one
                damage = f"does not load ({str(error).splitlines()[0][:120]})"
        damaged.append(path)
        warnings.append(f"{path} {damage}")
    said = "; ".join(warnings) or f"{folder} holds no checkpoint"
    raise InputError(f"{said}; start the run anew under another --name, or delete {folder}")


def save_weights(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Weights with their metadata, atomically; the hash goes into the folder's checksums.json."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    data = safetensors.torch.save(tensors, metadata)
    hashes = _read_hashes(path.parent)
    new = [hashlib.sha256(data).hexdigest()]
    pending = hashes.get(path.name, []) + new
    write_json(path.parent / CHECKSUMS, {**hashes, path.name: pending})
    write_atomic(path, data)
    write_json(path.parent / CHECKSUMS, {**hashes, path.name: new})


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """-> state dict and metadata of a .safetensors. Raises InputError: damaged, or another kind."""
    damage = _damage(path, _read_hashes(path.parent))
    if damage:
        raise InputError(f"{path} {damage}: restore the file, or train the model again")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a .safetensors of weights ({error}): name a run folder, "
            "a .safetensors that train.py wrote, or an .onnx file"
        ) from error


def load_state(module: torch.nn.Module, state: dict[str, torch.Tensor], source: Path) -> None:
    """Strict load; raises InputError that lists the first five keys and shapes that do not fit."""
    own = module.state_dict()
    wrong = [f"{key}: missing in the file" for key in own if key not in state]
    wrong += [f"{key}: not in the network" for key in state if key not in own]
    wrong += [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if wrong:
        raise InputError(
            f"{source} holds another network, {len(wrong)} keys do not fit: "
            f"{'; '.join(wrong[:5])}: use the --network, --width and --embedding-size of the file"
        )
    module.load_state_dict(state)


def _write_temporary(path: Path, write: bytes | Callable[[BinaryIO], object]) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # what torch.save makes of a write that failed
            said = f"can't be written, is the disk full? ({str(error).splitlines()[0][:80]})"
            raise OSError(errno.ENOSPC, said, str(path)) from error
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    """A rename is on disk only once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_hashes(folder: Path) -> dict[str, list[str]]:
    try:
        return json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return {}


def _damage(path: Path, hashes: dict[str, list[str]]) -> str | None:
    valid = hashes.get(path.name)
    if valid and sha256(path) not in valid:
        return f"is damaged (its sha256 is not the one in {CHECKSUMS})"
    return None
