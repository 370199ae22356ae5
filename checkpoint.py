"""Files that are never half there: atomic writes, checkpoints with hashes, weights as safetensors.

A run folder holds `last.pt` and `previous.pt` (all that a resume needs), `best.safetensors` (the
weights to use) and `checksums.json` (their sha256). While a file is being replaced, checksums.json
holds the old and the coming hash, and either is valid: a kill at any moment leaves a checkpoint
that loads. A flipped byte, which torch.load and safetensors take without a word, is detected.

A head that is shared out over ranks is too large for one file: each rank writes its part under a
name of its own (`head-<step>-<rank>-of-<ranks>.pt`), then the first writes last.pt with the names
and hashes of the parts. That one replacement makes all of them the newest checkpoint.
"""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch

from config import InputError, naming

LAST, PREVIOUS, BEST, CHECKSUMS = "last.pt", "previous.pt", "best.safetensors", "checksums.json"


def write_atomic(path: Path, write: bytes | Callable[[BinaryIO], object]) -> None:
    """Temporary file in the same folder, flush, fsync, replace, fsync of the folder."""
    temporary = _write_temporary(path, write)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """Sorted keys and a final newline: the same value gives the same bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode(errors="surrogateescape"))  # a path may be no text


@contextmanager
def lock(folder: Path, name: str = ".lock") -> Iterator[None]:
    """One process a folder, or a name in it. The lock is the kernel's: it goes with the process,
    however that ends.

    Raises InputError: another one has it.
    """
    with open(folder / name, "a+") as file:
        for attempt in range(100):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                file.seek(0)
                owner = file.read().strip()
                # The loader processes of a killed run hold its lock until they notice, in seconds.
                if attempt < 99 and owner.isdigit() and not Path(f"/proc/{owner}").exists():
                    time.sleep(0.2)
                    continue
                raise InputError(
                    f"{folder} is in use by process {owner or '?'}: wait for its end"
                ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exists(folder: Path) -> bool:
    """Whether a run has saved anything yet, damaged or not."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


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
    _drop_parts(folder, state)


def part_name(step: int, rank: int, ranks: int) -> str:
    return f"head-{step}-{rank}-of-{ranks}.pt"


def save_part(folder: Path, step: int, rank: int, ranks: int, state: dict) -> tuple[str, str]:
    """One rank's part of a checkpoint -> its file's name and sha256, for state["parts"]."""
    name = part_name(step, rank, ranks)
    write_atomic(folder / name, lambda file: torch.save(state, file))
    return name, sha256(folder / name)


def load_part(folder: Path, name: str) -> dict:
    """A part, its tensors left on the disk until they are used."""
    return torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)


def _drop_parts(folder: Path, state: dict) -> None:
    """Delete the parts that neither last.pt, which is `state`, nor previous.pt names."""
    pattern = "head-*-of-*.pt"
    found = list(folder.glob(pattern))
    for stale in folder.glob(f".{pattern}.tmp"):  # of a killed run: all parts of this one are named
        stale.unlink(missing_ok=True)
    if not found:
        return
    wanted = set(state.get("parts", {}))
    if (folder / PREVIOUS).exists():
        try:
            wanted |= set(load_part(folder, PREVIOUS).get("parts", {}))
        except Exception:  # damaged: then what it names is not known, and nothing is deleted
            return
    for path in found:
        if path.name not in wanted:
            path.unlink(missing_ok=True)


def load_checkpoint(
    folder: Path, names: tuple[str, ...] = (LAST, PREVIOUS), parts: bool = True
) -> tuple[dict, list[str]]:
    """The newest undamaged checkpoint of a run, on the CPU, and warnings about those passed over.

    `names` are tried in turn; `parts` are checked, too. Raises InputError where none loads: a run
    never starts over silently.
    """
    warnings: list[str] = []
    damaged: list[Path] = []
    hashes = _read_hashes(folder)
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        damage = _damage(path, hashes)
        if not hashes.get(name):
            warnings.append(f"{path} has no sha256 in {CHECKSUMS}: a flipped bit would not be seen")
        if damage is None:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                damage = _damaged_part(folder, state) if parts else None
                if damage is not None:
                    raise ValueError(damage)
                # Out of the way, so that the next save does not put it in the place of this one.
                for bad in damaged:
                    os.replace(bad, bad.with_name(f"{bad.name}.damaged"))
                return state, warnings
            except (MemoryError, OSError):  # the machine's fault, not the file's
                raise
            except Exception as error:  # torch.load raises five kinds for a file that is not one
                damage = f"does not load ({str(error).splitlines()[0][:120]})"
        damaged.append(path)
        warnings.append(f"{path} {damage}")
    said = "; ".join(warnings) or f"{folder} holds no checkpoint"
    raise InputError(f"{said}; start the run anew under another --name, or delete {folder}")


def save_weights(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Weights with their metadata, atomically; the hash goes into the folder's checksums.json."""
    data = weights_bytes(state, metadata)
    hashes = _read_hashes(path.parent)
    new = [hashlib.sha256(data).hexdigest()]
    pending = hashes.get(path.name, []) + new
    write_json(path.parent / CHECKSUMS, {**hashes, path.name: pending})
    write_atomic(path, data)
    write_json(path.parent / CHECKSUMS, {**hashes, path.name: new})


def weights_bytes(state: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """Content of a .safetensors; equal weights and metadata give equal bytes."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    return _sorted_header(safetensors.torch.save(tensors, metadata))


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors with its header's keys sorted: equal weights give equal bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":"))
    padded = header.encode() + b" " * (-len(header.encode()) % 8)  # tensors start aligned
    return len(padded).to_bytes(8, "little") + padded + data[8 + size :]


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
    """Strict load. Raises InputError as check_state does."""
    check_state(module, state, source)
    module.load_state_dict(state)


def check_state(
    module: torch.nn.Module,
    state: dict[str, torch.Tensor],
    source: Path,
    fix: str = "use the --network, --width, --resolution and --embedding-size of the file",
) -> None:
    """Raises InputError that lists the first five keys and shapes that do not fit."""
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
            f"{'; '.join(wrong[:5])}: {fix}"
        )


def _write_temporary(path: Path, write: bytes | Callable[[BinaryIO], object]) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and any(
            sign in str(error) for sign in ("unexpected pos", "PytorchStreamWriter", "inline_cont")
        ):  # what torch.save makes of a write that failed
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
        hashes = json.loads((folder / CHECKSUMS).read_text())
    except (FileNotFoundError, ValueError):  # load_checkpoint warns where a hash is missing
        return {}
    entries = hashes.items() if isinstance(hashes, dict) else ()
    return {name: known for name, known in entries if isinstance(known, list)}


def _damaged_part(folder: Path, state: dict) -> str | None:
    for name, expected in state.get("parts", {}).items():
        if not (folder / name).exists() or sha256(folder / name) != expected:
            return f"its part {name} is lost or damaged"
    return None


def _damage(path: Path, hashes: dict[str, list[str]]) -> str | None:
    valid = hashes.get(path.name)
    if valid and sha256(path) not in valid:
        return f"is damaged (its sha256 is not the one in {CHECKSUMS})"
    return None
