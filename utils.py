"""What the scripts share: loading a backbone, embedding crops, devices, progress.

from utils import embed, load_backbone
model = load_backbone("runs/first")        # or a .safetensors, .onnx, .pth of others
embeddings = embed(model, crops)           # uint8 (N, 112, 112, 3) RGB -> float32 (N, E)
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import folding
import foreign_weights
import models
from checkpoint import BEST, check_state, load_weights
from config import ROOT, InputError
from onnx_backbone import OnnxBackbone


def to_batch(crops: np.ndarray | torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 (N, H, W, 3) RGB -> float32 (N, 3, H, W) in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    # Moved as bytes, a quarter of the floats. The permuted view is channels-last already.
    if isinstance(crops, np.ndarray):
        crops = torch.from_numpy(np.ascontiguousarray(crops))  # torch takes no mirrored view
    pixels = crops.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return pixels.float().div_(127.5).sub_(1.0)  # (N, 3, H, W)


@torch.inference_mode()
def embed(model: torch.nn.Module, crops: np.ndarray, flip: bool = True) -> np.ndarray:
    """uint8 (N, 112, 112, 3) RGB -> float32 (N, E), not normalised.

    With `flip`, the raw embeddings of each crop and of its mirror image are summed: the sum weighs
    the two by their norms, as the published LFW figures of InsightFace do.
    """
    parameter = next(model.parameters(), None)
    batch = to_batch(crops, "cpu" if parameter is None else parameter.device)
    embeddings = model(batch)  # (N, E)
    if flip:
        embeddings = embeddings + model(batch.flip(3))
    return embeddings.float().cpu().numpy()


def model_file(path: Path) -> Path:
    """A run folder, .safetensors, .onnx, .pth or .pt -> the file that holds the weights."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is not there: train a model first (python train.py), or name one")
    if path.is_dir():
        best = path / BEST
        if not best.exists():
            raise InputError(f"{path} holds no {BEST}: name the folder of a run that has validated")
        return best
    if path.suffix not in (".safetensors", ".onnx", *foreign_weights.SUFFIXES):
        raise InputError(
            f"{path} is not a model: name a run folder, a .safetensors, .onnx, .pth or .pt file"
        )
    return path


def home_of(file: Path) -> Path:
    """Where what is made of a model goes: its run's folder, or runs/<stem> for a single file."""
    return file.parent if file.name == BEST else config.RUNS / file.stem


def check_foreign(
    models: Iterable[Path], network: str | None, mean: float = 127.5, std: float = 127.5
) -> None:
    """Raises InputError: options for models of others that would go unheeded."""
    suffixes = {path.suffix for path in models}
    if (mean, std) != (127.5, 127.5) and ".onnx" not in suffixes:
        raise InputError("--input-mean and --input-std are for an .onnx: our models say their own")
    if network and not suffixes & set(foreign_weights.SUFFIXES):
        raise InputError("--network is for a .pth or .pt: our models say which one they are")


def load_backbone(
    path: Path | str,
    device: torch.device | str = "cpu",
    mean: float = 127.5,
    std: float = 127.5,
    fold: bool = True,
    network: str | None = None,
) -> torch.nn.Module:
    """A trained network in eval mode: float32 (N, 3, 112, 112) in [-1, 1] -> float32 (N, E).

    Its `metadata`, text to text, is what its file says about it: architecture, input, threshold.
    `mean` and `std` are those of a foreign .onnx, in pixels; ours says its own. With `fold`, BNs
    are folded into convolutions: faster, and the same but for rounding (see folding.py). `network`
    is that of a .pth, where its keys do not tell. Raises InputError: not there, damaged, no model.
    """
    file = model_file(Path(path))
    if file.suffix == ".onnx":
        return OnnxBackbone(file, mean, std)
    state, metadata = read_weights(file, network)
    if "source" in metadata and file.suffix in foreign_weights.SUFFIXES and network is None:
        print(f"{file}: by its keys {described(metadata)}", file=sys.stderr)
    with torch.device("meta"):  # shapes alone: a file that claims more than it holds takes nothing
        fix = "name the --network that it holds, or another file"
        check_state(create(metadata, file), state, file, fix)
    model = create(metadata, file)
    model.load_state_dict(state)
    if fold:
        model = folding.fold(model)
    model.metadata = metadata
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def read_weights(
    file: Path, network: str | None = None, otherwise: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """State dict and metadata of a .safetensors, .pth or .pt. `network` as in load_backbone.

    `otherwise` is the network of a .pth whose keys tell none.
    """
    if file.suffix in foreign_weights.SUFFIXES:
        return foreign_weights.load(file, network, otherwise)
    return load_weights(file)


def described(metadata: dict[str, str]) -> str:
    """The network of a file's metadata in words, for people."""
    network, width, size = (
        metadata.get(key, "unknown") for key in ("network", "width", "embedding_size")
    )
    resolution = metadata.get("resolution", str(models.CROP))
    seen = "" if resolution == str(models.CROP) else f", resolution {resolution}"
    return f"{network}, width {width}, embedding size {size}{seen}"


def create(metadata: dict[str, str], file: Path) -> torch.nn.Module:
    """The network that a file says it holds, with fresh weights."""
    try:
        resolution = int(metadata.get("resolution", models.CROP))
        if not (float(metadata["width"]) <= 16 and int(metadata["embedding_size"]) <= 1 << 16):
            raise ValueError("no network is that large")
        if resolution > models.CROP:
            raise ValueError(f"resolution {resolution}, and crops have {models.CROP} px")
        return models.create(
            metadata["network"],
            embedding_size=int(metadata["embedding_size"]),
            width=float(metadata["width"]),
            resolution=resolution,
        )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{file} does not say which network it holds ({error}): "
            "name a .safetensors that train.py wrote"
        ) from error


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> a device that is there. Raises InputError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name} is unknown: auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is not supported: auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name} is not there: {torch.cuda.device_count()} CUDA devices")
    return device


@functools.cache
def commit() -> str:
    """Short hash of the repo's commit, with + where files differ from it; 'unknown' without git.

    As it was at the first call, when the code that runs was read: a later commit is not running.
    What was measured (results/) is no code, and does not count as a difference.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)results"],
            capture_output=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def hardware(device: torch.device) -> str:
    """One line: the card, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


def total_memory(device: torch.device) -> int:
    """Bytes of the card, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free, instead of giving it back to the kernel.

    Each step allocates the same activations again, and fresh pages are zeroed by the kernel one by
    one: that took a fifth of a training step on a CPU. The process stays as large as at its peak.
    Nothing happens where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt(m_trim_threshold, -1)  # never shrink the heap
    mallopt(m_mmap_max, 0)  # and have large blocks in it


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for it (AVX-512 BF16, AMX or ARM's)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # no Linux: not known, and float32 is never wrong
        return False
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "c++"))


class Progress:
    """A tqdm bar on a terminal, else one plain line every ten seconds."""

    def __init__(self, total: int, what: str, done: int = 0, shown: bool = True):
        self.total, self.what, self.done, self.started_at = total, what, done, done
        self.start = self.last = time.monotonic()
        self.shown, self.bar = shown, None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=what, unit="photo", dynamic_ncols=True)

    def update(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            return
        now = time.monotonic()
        if self.shown and now - self.last >= 10:
            self.last = now
            left = (self.total - self.done) / self.rate()
            print(
                f"{self.what}: {self.done:,} of {self.total:,}, {self.rate():.1f} photos/s, "
                f"{int(left) // 60}:{int(left) % 60:02d} left",
                flush=True,
            )

    def rate(self) -> float:
        """Photos per second since the start, without those done before it."""
        return max(self.done - self.started_at, 1) / max(time.monotonic() - self.start, 1e-9)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
