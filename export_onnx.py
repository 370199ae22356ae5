"""A trained network as files to hand on: ONNX, .safetensors, sha256 and a model card.

    python export_onnx.py                                        # of the run that train.py makes
    python export_onnx.py --model runs/first                     # -> runs/first/export
    python export_onnx.py --model backbone.pth --network r50 --out published
    python lfw_eval.py --data data/lfw --pairs path/to/pairs.txt --model published/NAME.onnx
    python export_onnx.py --model runs/first --half --out published     # the weights alone, in fp16

Needs two more packages, but for --half: pip install onnx onnxruntime

Writes into the folder, the same bytes for the same weights and commit:
    NAME.onnx          float32 (N, 3, 112, 112) RGB, (x - 127.5) / 127.5 -> float32 (N, E), not
                       normalised; N is free, BN is folded
    NAME.safetensors   the weights as train.py keeps them, for load_backbone and train.py --init
    NAME.md            the model card: data, protocol, figures, limits, intended use. What it says
                       comes from the run's config.json, result.json and reports (eval.json).
                       Add what only you know: a card that differs is never written over
    NAME.sha256        of the model files, for sha256sum -c
Both model files carry the same metadata: network, width, embedding_size, resolution, input, commit,
threshold.
The ONNX file is held against PyTorch in onnxruntime before anything is written. With --half there
is none, and matrices and kernels are rounded to fp16: half the size, read by the same scripts.
"""

import config

if __name__ == "__main__":
    # Before torch is imported: --help and a wrong option answer at once.
    OPTIONS = config.parse(config.ExportOptions, __doc__)

import hashlib
import io
import shlex
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import checkpoint
import embeddings
import folding
import foreign_weights
import model_card
import utils
from config import ExportOptions, InputError
from photo_folders import one_line

OPSET = 17  # onnxruntime >= 1.12 reads it
LEAST_COSINE = 0.99999  # to PyTorch, of every embedding looked at
BATCHES = (1, 7)  # looked at
MOST_BYTES = 2_000_000_000  # protobuf's limit of a file


def main(options: ExportOptions) -> None:
    utils.commit()  # as it is now
    if options.threads:
        torch.set_num_threads(options.threads)
    model = options.model
    if model is None:
        model = config.default_model(config.default_run())
        print(f"no --model named: using {one_line(str(model))}")
    utils.check_foreign((model,), options.network)
    source = utils.model_file(model)
    if source.suffix == ".onnx":
        raise InputError(f"{source} is an ONNX file already: name a run folder or weights")
    digest = embeddings.hash_model(source)
    network = embeddings.load_hashed(model, source, digest, fold=False, network=options.network)
    metadata = complete(network.metadata)
    out, name = place(options, source, metadata["network"])
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder with --out")

    if options.half:
        state = halved(network.state_dict())
        metadata["precision"] = "fp16"
        files = {}
        rounded = utils.create(metadata, source)
        rounded.load_state_dict(state)
        lowest = check(rounded.eval(), network, source, "or leave out --half")
    else:
        state = network.state_dict()
        graph = to_onnx(folding.fold(network), metadata)
        files = {f"{name}.onnx": graph}
        lowest = check(read_back(graph), network, source)
    files[f"{name}.safetensors"] = checkpoint.weights_bytes(state, metadata)
    print(
        f"cosine to PyTorch at batch {' and '.join(map(str, BATCHES))}: at least "
        f"{np.floor(lowest * 1e7) / 1e7:.7f}"
    )

    card = model_card.text(name, source, digest, metadata, files, network)
    write(out, name, files, card, source)
    shown = one_line(str(out))
    command = f"python lfw_eval.py --model {shlex.quote(f'{shown}/{next(iter(files))}')}"
    print(f"{shown}: {', '.join(files)}, {name}.md and {name}.sha256; next: {command}")


def complete(metadata: dict[str, str]) -> dict[str, str]:
    """What a user of the file must know, besides what the weights say about themselves."""
    return {
        "input": foreign_weights.INPUT,
        **metadata,
        "colour_order": "RGB",
        "input_mean": "127.5",
        "input_std": "127.5",
        "input_size": "112",
        "export_commit": utils.commit(),
    }


def place(options: ExportOptions, source: Path, network: str) -> tuple[Path, str]:
    """The folder, and the files' name: not the run's, so that lfw_eval.py's reports differ, too."""
    of_run = source.name == checkpoint.BEST
    stem = source.resolve().parent.name if of_run else source.stem
    name = options.name if options.name is not None else f"{stem}-{network}"
    if not name.isprintable() or set(name) & set("/\\") or name.startswith((".", "-")) or not name:
        raise InputError(f"{name!r} is no plain name of a file: choose another with --name")
    return options.out or utils.home_of(source) / "export", name


def to_onnx(network: nn.Module, metadata: dict[str, str]) -> bytes:
    """A folded network -> an ONNX model of it with free batch, by torch's TorchScript exporter.

    That one needs no package but onnx, and its graphs are the same bytes each time. Raises
    InputError: no onnx, or a network too large for one file.
    """
    try:
        import onnx
    except ImportError as error:
        raise InputError("export_onnx.py needs onnx: pip install onnx onnxruntime") from error
    size = 4 * sum(parameter.numel() for parameter in network.parameters())
    if size > MOST_BYTES:
        raise InputError(
            f"{metadata['network']}, width {metadata['width']}, has {size / 1e9:.1f} GB of "
            f"weights, and an ONNX file holds {MOST_BYTES / 1e9:.0f} GB: export a narrower network"
        )
    buffer = io.BytesIO()
    free = {0: "N"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is the older one; shapes become constants
        torch.onnx.export(
            network, (torch.zeros(2, 3, 112, 112),), buffer, dynamo=False, opset_version=OPSET,
            input_names=["input"], output_names=["embedding"],
            dynamic_axes={"input": free, "embedding": free},
        )  # fmt: skip
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def halved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices and kernels in fp16. Vectors stay: they are few, and a variance may be tiny."""
    return {key: value.half() if value.ndim > 1 else value for key, value in state.items()}


def read_back(graph: bytes) -> nn.Module:
    """The network of an ONNX model, as lfw_eval.py reads it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        with config.naming(file):
            file.write_bytes(graph)
        return utils.OnnxBackbone(file)


def check(exported: nn.Module, network: nn.Module, source: Path, fix: str = "") -> float:
    """The lowest cosine between embeddings of the two, over BATCHES of patterns.

    `network` is the whole one, so that folding is checked, too. Raises InputError: too low.
    """
    cosines = []
    for size in BATCHES:
        coarse = np.random.default_rng(size).integers(0, 256, (size, 7, 7, 3), np.uint8)
        crops = coarse.repeat(16, axis=1).repeat(16, axis=2)  # fine noise would look all alike
        ours, theirs = (
            utils.embed(model, crops, flip=False).astype(np.float64)  # (size, E)
            for model in (network, exported)
        )
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        with np.errstate(invalid="ignore"):
            cosines.extend((ours * theirs).sum(axis=1) / lengths)
    lowest = min(1.0, *map(float, cosines)) if np.isfinite(cosines).all() else float("nan")
    if not lowest >= LEAST_COSINE:  # NaN, too
        raise InputError(
            f"{source}: the exported network differs from PyTorch (cosine {lowest:.7f}, at least "
            f"{LEAST_COSINE} is wanted): nothing was written; are the weights finite? {fix}".strip()
        )
    return lowest


def write(out: Path, name: str, files: dict[str, bytes], card: str, source: Path) -> None:
    """The sums come last: while they are absent, the folder is not complete.

    They leave the card out, which people edit. Raises InputError, before anything is written: it
    would go over the weights themselves, or over a card with other words, or lie beside the graph
    of an earlier export.
    """
    page, graph = out / f"{name}.md", f"{name}.onnx"
    if any((out / file).resolve() == source.resolve() for file in files):
        raise InputError(f"{source} would be written over: name another --out or --name")
    if page.exists() and page.read_bytes() != card.encode():
        raise InputError(
            f"{page} is not the card that would be written (edited, or of other weights): move it "
            "away, or name another --out or --name"
        )
    if graph not in files and (out / graph).exists():
        raise InputError(
            f"{out / graph} is of an earlier export: move it away, or name another --out or --name"
        )
    embeddings.make_folder(out)
    sums = out / f"{name}.sha256"
    sums.unlink(missing_ok=True)
    for file, content in files.items():
        checkpoint.write_atomic(out / file, content)
    checkpoint.write_atomic(page, card.encode())
    lines = [f"{hashlib.sha256(content).hexdigest()}  {file}\n" for file, content in files.items()]
    checkpoint.write_atomic(sums, "".join(lines).encode())


if __name__ == "__main__":
    config.run(main, OPTIONS)
