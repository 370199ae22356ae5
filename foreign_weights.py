"""Weights of others: a state dict that torch.save wrote -> the same for one of our networks.

state, metadata = load(Path("backbone.pth"), "r50")      # or None: told by the keys
state, metadata = load(Path("runs/first/last.pt"))       # our own: told by its options

The keys of InsightFace's PyTorch backbones (arcface_torch: iresnet, MobileFaceNet) are those of
models.py, and so is what surrounds them: RGB in [-1, 1], BN with eps 1e-5. Only tensors are read;
a file with anything else in it is refused before it can run.
"""

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import models
from config import InputError
from photo_folders import one_line

SUFFIXES = (".pth", ".pt")
INPUT = "112x112 RGB, (x - 127.5) / 127.5"
# Where checkpoints keep a backbone: common use, arcface_torch, our last.pt.
WRAPPERS = ("state_dict", "state_dict_backbone", "backbone")
# Keys whose first size is a stage's channels, and how many those are at width 1.
IRESNET = {f"layer{k + 1}.0.conv2.weight": c for k, c in enumerate((64, 128, 256, 512))}
MBF = {
    "layers.0.layers.0.weight": 128,
    "layers.4.layers.2.layers.0.weight": 256,
    "conv_sep.layers.0.weight": 512,
}
PREFIXES = ("module.", "_orig_mod.")  # of DDP and of torch.compile


def load(
    file: Path, network: str | None = None, otherwise: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> state dict (any float type) and metadata: network, width, embedding_size, input, source.

    `network` goes before what the keys tell, `otherwise` is taken where they tell nothing. That all
    keys fit is left to checkpoint.load_state. Raises InputError: damaged, no plain state dict, or
    of a network that its keys do not tell.
    """
    damage = checkpoint._damage(file, checkpoint._read_hashes(file.parent))
    if damage:
        raise InputError(f"{file} {damage}: restore the file, or name another one")
    saved = _load(file)
    state = plain(saved, file)
    if own := told_by_us(saved):
        if network not in (None, own["network"]):
            raise InputError(f"{file} says that it holds {own['network']}: leave --network out")
        return state, own
    network = network or told_by(state) or otherwise
    if network is None:
        raise InputError(
            f"{file}: its keys do not tell which network it holds (the first: "
            f"{', '.join(list(state)[:3])}): name it with --network, if it is one of "
            f"{', '.join(models.NETWORKS)}"
        )
    width, embedding_size = sizes(state, network)
    return state, {
        "network": network,
        "width": repr(width),
        "embedding_size": str(embedding_size),
        "input": INPUT,
        "source": one_line(file.name),
    }


def _load(file: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript file, which is refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, OSError):  # the machine's fault, not the file's
        raise
    except Exception as error:  # torch.load raises five kinds for a file that is not one
        raise InputError(
            f"{file} is no plain state dict ({_reason(error)}): name one that holds tensors alone, "
            "as torch.save(model.state_dict(), path) writes it"
        ) from error


def _reason(error: Exception) -> str:
    """What torch.load's long texts come down to."""
    if named := re.search(r"GLOBAL (\S+) was not", str(error)):
        return f"it asks for {named[1][:80]}, which is code"
    if "TorchScript" in str(error):
        return "a TorchScript archive"
    return "it is cut off or empty" if isinstance(error, EOFError) else "no file of torch.save"


def plain(saved: object, file: Path) -> dict[str, Tensor]:
    """The state dict without what wraps it, and its keys without the prefixes of DDP and compile.

    Raises InputError: it is none.
    """
    for name in WRAPPERS:
        if isinstance(saved, dict) and isinstance(saved.get(name), dict):
            saved = saved[name]
            break
    if not isinstance(saved, dict) or not saved:
        kind = "an empty dict" if isinstance(saved, dict) else f"a {type(saved).__name__}"
        raise InputError(f"{file} holds {kind}, not a state dict: name another file")
    for key, value in saved.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        if not isinstance(key, str) or not dense or value.is_quantized or value.is_complex():
            raise InputError(
                f"{file} is no plain state dict: {str(key)[:80]} is a {type(value).__name__}, no "
                "dense tensor of real numbers; name a file of weights alone"
            )
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in saved)), None):
        saved = {key.removeprefix(prefix): value for key, value in saved.items()}
    return dict(saved)


def told_by_us(saved: object) -> dict[str, str] | None:
    """Metadata of a checkpoint of train.py, which holds its options; None for all else."""
    if not isinstance(saved, dict) or not {"format", "backbone", "options"} <= saved.keys():
        return None
    options = saved["options"]
    kind = {"network": str, "width": (int, float), "embedding_size": int}
    if not isinstance(options, dict) or not all(
        isinstance(options.get(key), types) for key, types in kind.items()
    ):
        return None
    origin = saved.get("origin") or options.get("init")
    return {
        "network": options["network"],
        "width": repr(float(options["width"])),
        "embedding_size": str(options["embedding_size"]),
        "resolution": str(options.get("resolution", models.CROP)),
        "input": INPUT,
        **({"init": one_line(str(origin))} if origin else {}),
    }


def told_by(state: dict[str, Tensor]) -> str | None:
    """The network by its numbers of blocks; no two of ours have the same."""
    if "conv_sep.layers.0.weight" in state:
        return "mbf"
    depths = [0, 0, 0, 0]
    for key in state:
        if found := re.match(r"layer([1-4])\.(\d{1,3})\.", key):
            stage, block = int(found[1]) - 1, int(found[2])
            depths[stage] = max(depths[stage], block + 1)
    names = [name for name, blocks in models.BLOCKS.items() if blocks == tuple(depths)]
    if not names:
        return None
    return "se-" * any(".se." in key for key in state) + names[0]


def sizes(state: dict[str, Tensor], network: str) -> tuple[float, int]:
    """Width and embedding size by shapes; the published ones where there is nothing to tell.

    models._scaled rounds channels to multiples of 8, at least 16: each stage leaves an interval of
    widths. In the one that all leave, the width by the last stage is taken if it lies there (1.0,
    0.5, 0.25 come out as such), else the middle.
    """
    stages, linear = IRESNET, "fc.weight"
    if network == "mbf":
        stages, linear = MBF, "features.layers.2.weight"
    found = {key: state[key].shape[0] for key in (*stages, linear)
             if key in state and state[key].ndim}  # fmt: skip
    low, high, width = 1e-6, float("inf"), 1.0
    for key, base in stages.items():
        if key in found:
            channels = found[key]
            low = max(low, (channels - 4) / base if channels > 16 else low)
            high = min(high, (channels + 4) / base)
            width = channels / base
    if not low < width < high:
        width = (low + high) / 2
    return width, found.get(linear, 512)
