"""Weights of others: a state dict that torch.save wrote -> the same for one of our networks.

state, metadata = load(Path("backbone.pth"), "r50")      # or None: told by the keys

The keys of InsightFace's PyTorch backbones (arcface_torch: iresnet, MobileFaceNet) are those of
models.py, and so is what surrounds them: RGB in [-1, 1], BN with eps 1e-5. Only tensors are read;
a file with anything else in it is refused before it can run.
"""

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

import models
from config import InputError

SUFFIXES = (".pth", ".pt")
INPUT = "112x112 RGB, (x - 127.5) / 127.5"
# Where checkpoints keep a backbone: common use, arcface_torch, our last.pt.
WRAPPERS = ("state_dict", "state_dict_backbone", "backbone")
PREFIXES = ("module.", "_orig_mod.")  # of DDP and of torch.compile


def load(file: Path, network: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> state dict (any float type) and metadata: network, width, embedding_size, input, source.

    That all keys fit is left to checkpoint.load_state. Raises InputError: no plain state dict, or
    of a network that its keys do not tell.
    """
    state = plain(_load(file), file)
    network = network or told_by(state)
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
        "source": file.name,
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
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in saved):
            saved = {key.removeprefix(prefix): value for key, value in saved.items()}
    return dict(saved)


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
    """Width and embedding size by shapes; the published ones where there is nothing to tell."""
    last, linear = ("layer4.0.conv2.weight", "fc.weight")
    if network == "mbf":
        last, linear = ("conv_sep.layers.0.weight", "features.layers.2.weight")
    channels, embedding_size = (
        state[key].shape[0] if key in state and state[key].ndim else 512 for key in (last, linear)
    )
    return channels / 512, embedding_size
