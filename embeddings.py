"""Embeddings of a verification set, each photo's once, kept between runs.

embedded = embed_set(tests, model_file, out, options, device)
embedded.rows[tests.left]        # float32 (N, E)
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import torch

import utils
from checkpoint import sha256, write_atomic
from config import EvalOptions, InputError
from verification_set import Photo, VerificationSet

NAME = "embeddings.safetensors"
VERSION = 3  # of what an embedding is: 2 comes from folded networks, 3 from full batches
SAVE_EVERY = 30  # seconds of embedding that a kill may cost


class Embedded(NamedTuple):
    rows: np.ndarray  # float32 (P, E), not normalised
    model_hash: str
    device: torch.device  # where it ran, or would have
    new: int  # photos embedded in this run
    seconds: float  # that took


def embed_set(
    tests: VerificationSet,
    model: Path,
    model_file: Path,
    out: Path,
    options: EvalOptions,
    device: torch.device,
) -> Embedded:
    """From the last run's cache in `out`, or from the network, which is loaded only when needed.

    Raises InputError: no model, a crop that can't be read, an embedding without an angle.
    """
    if model_file.suffix == ".onnx":
        device = torch.device("cpu")  # onnxruntime's CPU provider
    model_hash = hash_model(model_file)
    cache = Cache(out / NAME, options, model_hash, device)
    missing = [
        (photo, key)
        for photo, key in zip(tests.photos, tests.hashes, strict=True)
        if key not in cache.rows
    ]
    seconds = 0.0
    if missing:
        normal = options.input_mean, options.input_std
        network = load_hashed(
            model, model_file, model_hash, device, *normal, network=options.network
        )
        make_folder(out)  # only now: another kind of file leaves nothing behind
        seconds = embed_photos(network, missing, cache, options)
    rows = np.stack([cache.rows[key] for key in tests.hashes])  # (P, E)
    check(rows, tests.photos, model_file)
    return Embedded(rows, model_hash, device, len(missing), seconds)


def load_hashed(
    model: Path, file: Path, digest: str, *arguments: object, **words: object
) -> torch.nn.Module:
    """utils.load_backbone of `file`, whose `hash_model` was `digest` before and still is.

    Raises InputError as that does, and where train.py replaced the file meanwhile: what is filed
    under the hash would come from other weights.
    """
    network = utils.load_backbone(model, *arguments, **words)
    if hash_model(file) != digest:
        raise InputError(f"{file} changed while it was read: run again")
    return network


def hash_model(file: Path) -> str:
    """sha256 of a model's file; of an .onnx together with the files beside it that it names."""
    if file.suffix != ".onnx":
        return sha256(file)
    graph = file.read_bytes()
    parts = [hashlib.sha256(graph).hexdigest()]
    for other in sorted(file.parent.iterdir()):  # weights above 2 GB lie in files of their own
        if other != file and other.is_file() and os.fsencode(other.name) in graph:
            parts.append(sha256(other))
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"{out} cannot be a folder, a file is in its place: name another --out"
        ) from None


class Cache:
    """Embeddings of earlier runs: sha256 of a crop's file -> float32 (E,).

    Held against the model's hash and whatever else enters an embedding; with any of these changed
    it is empty. A damaged file is the same as none: the rows have their own hash.
    """

    def __init__(self, path: Path, options: EvalOptions, model_hash: str, device: torch.device):
        self.path = path
        # Cards, versions and batch sizes round differently.
        where = [device.type, torch.__version__, options.batch_size]
        how = [options.flip, options.input_mean, options.input_std]
        how += [options.network] * (options.network is not None)  # older caches stay good
        self.key = json.dumps([VERSION, model_hash, *how, *where])
        self.rows: dict[str, np.ndarray] = {}
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                hashes, rows = file.get_tensor("crops"), file.get_tensor("embeddings")
            if metadata != self._metadata(hashes, rows):
                return
        except (OSError, safetensors.SafetensorError):  # not there, damaged, of an older version
            return
        usable = np.isfinite(rows).all(axis=1) & rows.any(axis=1)  # a bad day is not kept for ever
        self.rows = {
            key.tobytes().hex(): row
            for key, row, good in zip(hashes, rows, usable, strict=True)
            if good
        }

    def save(self) -> None:
        if not self.rows:
            return
        hashes = np.array([list(bytes.fromhex(key)) for key in self.rows], dtype=np.uint8)
        rows = np.stack(list(self.rows.values()))  # (P, E)
        tensors = {"crops": hashes, "embeddings": rows}
        write_atomic(self.path, safetensors.numpy.save(tensors, self._metadata(hashes, rows)))

    def _metadata(self, hashes: np.ndarray, rows: np.ndarray) -> dict[str, str]:
        """One entry: safetensors writes several in any order, and the bytes would differ."""
        return {
            "key": f"{self.key} {hashlib.sha256(hashes.tobytes() + rows.tobytes()).hexdigest()}"
        }


def embed_photos(
    network: torch.nn.Module, photos: list[tuple[Photo, str]], cache: Cache, options: EvalOptions
) -> float:
    """Embed each photo into the cache; seconds spent. What was done when stopped is kept.

    The last batch is filled up: results then do not depend on how many photos were left to do.
    """
    progress = utils.Progress(len(photos), "embedding")
    start = saved = time.perf_counter()
    try:
        for first in range(0, len(photos), options.batch_size):
            batch = photos[first : first + options.batch_size]
            crops = np.zeros((options.batch_size, 112, 112, 3), dtype=np.uint8)
            for place, (photo, key) in enumerate(batch):
                content = photo.read()
                if hashlib.sha256(content).hexdigest() != key:
                    raise InputError(f"{photo.name} changed while the set was read: run again")
                crops[place] = photo.decode(content)
            rows = utils.embed(network, crops, options.flip)[: len(batch)]  # (B, E)
            cache.rows.update(zip((key for _, key in batch), rows, strict=True))
            progress.update(len(batch))
            if time.perf_counter() - saved > SAVE_EVERY:
                cache.save()
                saved = time.perf_counter()
    finally:
        progress.close()
        cache.save()
    return time.perf_counter() - start


def check(rows: np.ndarray, photos: list[Photo], model_file: Path) -> None:
    """A broken network must not get a score: NaN and zero have no angle."""
    usable = np.isfinite(rows).all(axis=1) & rows.any(axis=1)  # (P,)
    if not usable.all():
        first = photos[int(np.argmin(usable))].name
        raise InputError(
            f"{model_file}: no usable embedding (zero or not finite) for {(~usable).sum()} of "
            f"{len(photos)} photos, the first is {first}: the model is broken, train it again"
        )
