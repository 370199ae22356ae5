"""From a prepared folder to batches: the face set, its deterministic order, augmentation, loader.

    faces = load_faces(Path("data/faces"))               # crops and class numbers
    train, held_out = hold_out(faces, identities=200, seed=0)
    for batch in batches(make_loader(train, ...)): ...   # uint8 crops, labels, indices

The order of the photos is a function of (seed, epoch) and the augmentation of one of (seed, epoch,
index), so a run that is resumed is the same run, whatever the number of loader processes.
"""

import hashlib
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

import manifest
import protocol
from config import InputError
from images import UnreadableImage, read_image

SIDE = 112  # of a crop, in pixels


@dataclass(frozen=True, eq=False)
class FaceSet:
    """Crops and their identities. The class number of an identity is its place in sorted order."""

    folder: Path
    images: list[str]  # (N) paths below the folder
    labels: np.ndarray  # int64 (N,)
    identities: list[str]  # (C) names, sorted
    left_out: int = 0  # photos of the folder that are not in the set: no face, or too few

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> Path:
        return self.folder / self.images[index]

    def digest(self) -> str:
        """Tells whether another set is the same photos under the same class numbers."""
        lines = (f"{label} {image}" for label, image in zip(self.labels, self.images, strict=True))
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def load_faces(folder: Path, min_images: int = 1) -> FaceSet:
    """The aligned crops of a prepared folder. Raises InputError: not prepared, or nothing in it."""
    rows = [cells[1:4] for cells in manifest.read_rows(folder / manifest.NAME)]
    pairs = sorted((name, image) for name, image, status in rows if status == manifest.ALIGNED)
    faces = _face_set(folder, pairs, min_images)
    return replace(faces, left_out=len(rows) - len(faces))


def _face_set(folder: Path, pairs: list[tuple[str, str]], min_images: int = 1) -> FaceSet:
    """(identity, image) pairs, sorted -> the set, classes dense from 0."""
    counts = Counter(name for name, _ in pairs)
    pairs = [pair for pair in pairs if counts[pair[0]] >= min_images]
    names, labels = np.unique([name for name, _ in pairs], return_inverse=True)
    if len(names) < 2:
        raise InputError(
            f"{folder} has {len(names)} identities with at least {min_images} aligned faces, and "
            "training takes two or more: prepare more photos, or lower --min-images"
        )
    return FaceSet(folder, [image for _, image in pairs], labels.astype(np.int64), names.tolist())


def hold_out(faces: FaceSet, identities: int, seed: int) -> tuple[FaceSet, FaceSet | None]:
    """Split off whole identities for validation -> the rest, and those (None where there are none).

    At most a tenth of the identities are taken, and only such as have two photos or more.
    """
    counts = np.bincount(faces.labels)
    able = np.flatnonzero(counts >= 2)
    wanted = min(identities, len(able), len(faces.identities) // 10)
    if wanted < 2:
        return faces, None
    chosen = np.zeros(len(counts), dtype=bool)
    chosen[np.random.default_rng((seed, 1)).permutation(able)[:wanted]] = True
    named = list(
        zip((faces.identities[label] for label in faces.labels), faces.images, strict=True)
    )
    parts = [
        [pair for pair, label in zip(named, faces.labels, strict=True) if chosen[label] == held]
        for held in (False, True)
    ]
    return _face_set(faces.folder, parts[0]), _face_set(faces.folder, parts[1])


def make_pairs(faces: FaceSet, seed: int, most: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Pairs for validation: as many genuine as impostor, at most `most` of each.

    -> indices (P, 2) and same (P,). No identity gives more than ten genuine pairs, so that one with
    many photos does not decide the figure.
    """
    rng = np.random.default_rng((seed, 2))
    order = np.argsort(faces.labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(faces.labels[order])) + 1)
    genuine = []
    for group in groups:
        first, second = np.triu_indices(len(group), k=1)
        picked = rng.permutation(len(first))[:10]
        genuine += zip(group[first[picked]], group[second[picked]], strict=True)
    genuine = rng.permutation(np.array(genuine, dtype=np.int64).reshape(-1, 2))[:most]  # (G, 2)
    counts = np.bincount(faces.labels)
    possible = (len(faces) ** 2 - int((counts**2).sum())) // 2  # pairs of different identities
    genuine = genuine[: possible // 2]  # never more than can be drawn in a moment
    impostor: set[tuple[int, int]] = set()
    while len(impostor) < len(genuine):
        one, other = sorted(rng.integers(len(faces), size=2).tolist())
        if faces.labels[one] != faces.labels[other]:
            impostor.add((one, other))
    pairs = np.concatenate([genuine, np.array(sorted(impostor), dtype=np.int64).reshape(-1, 2)])
    return pairs, np.arange(len(pairs)) < len(genuine)  # (P, 2), (P,)


# --------------------------------------------------------------------------------------------------
# the photos that a list of pairs names


class Photo(NamedTuple):
    source: str  # path below the raw folder
    crop: Path
    undetected: bool  # no face was found, cropped by median landmarks

    @property
    def label(self) -> str:
        """The name without suffix, and without the folder where the name repeats it (as in LFW)."""
        stem = without_suffix(self.source)
        folder, _, name = stem.rpartition("/")
        return name if name.startswith(folder) else stem


def find_photos(pairs: protocol.Pairs, data: Path) -> tuple[list[Photo], np.ndarray, np.ndarray]:
    """The photos that the pairs name, each once, and the index of each pair's two, (N,) both.

    Raises InputError for a pair that cannot be scored: never fewer pairs than the protocol has.
    """
    exact: dict[str, manifest.Row] = {}
    short: dict[str, list[manifest.Row]] = {}  # by the name without suffix, as LFW's lists have it
    for row in manifest.read_manifest(data):
        exact[row.source] = row
        short.setdefault(without_suffix(row.source), []).append(row)

    found: dict[str, int] = {}  # source -> index into photos
    photos: list[Photo] = []
    indices = np.empty((len(pairs), 2), dtype=int)
    for pair, names in enumerate(zip(pairs.left, pairs.right, strict=True)):
        for side, name in enumerate(names):
            rows = [exact[name]] if name in exact else short.get(name, [])
            if len(rows) != 1 or not rows[0].image:
                raise InputError(f"{pairs.where(pair)}: {name} {_unusable(rows, data)}")
            row = rows[0]
            if row.source not in found:
                found[row.source] = len(photos)
                undetected = row.status == manifest.UNDETECTED
                photos.append(Photo(row.source, data / row.image, undetected))
            indices[pair, side] = found[row.source]
        if indices[pair, 0] == indices[pair, 1]:
            raise InputError(f"{pairs.where(pair)}: {names[0]} and {names[1]} are the same photo")
    return photos, indices[:, 0], indices[:, 1]


def _unusable(rows: list[manifest.Row], data: Path) -> str:
    if not rows:
        return f"is not in {data / manifest.NAME}: prepare the photos that these pairs name"
    if len(rows) > 1:
        return f"may be {' or '.join(row.source for row in rows)} in {data}: give the suffix"
    return (
        f"has no crop in {data} ({rows[0].reason or rows[0].status}): "
        "prepare the set with --keep-undetected"
    )


def without_suffix(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


# --------------------------------------------------------------------------------------------------
# augmentation


def augment(image: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """uint8 (112, 112, 3) RGB -> the same size; `kind` is none, flip or strong."""
    if kind == "none":
        return image
    if rng.random() < 0.5:
        image = np.ascontiguousarray(image[:, ::-1])
    if kind == "flip":
        return image
    if rng.random() < 0.5:
        image = _affine(image, rng)
    if rng.random() < 0.5:
        image = _colour(image, rng)
    if rng.random() < 0.1:
        image = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    if rng.random() < 0.1:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.5))
    if rng.random() < 0.2:
        image = _low_resolution(image, rng)
    return image


def _affine(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn by up to 10 degrees, scale by up to 10 %, shift by up to 4 px."""
    centre = (SIDE - 1) / 2
    matrix = cv2.getRotationMatrix2D(
        (centre, centre), rng.uniform(-10, 10), np.exp(rng.uniform(-0.1, 0.1))
    )
    matrix[:, 2] += rng.uniform(-4, 4, size=2)
    return cv2.warpAffine(image, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT_101)


def _colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation by up to 30 % each, warmth by up to 10 %."""
    pixels = image.astype(np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (H, W)
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, size=3)
    warmth = rng.uniform(0.9, 1.1)
    pixels = grey[..., None] + (pixels - grey[..., None]) * saturation
    mean = grey.mean()
    pixels = ((pixels - mean) * contrast + mean) * brightness
    pixels *= np.array([warmth, 1.0, 1 / warmth], dtype=np.float32)
    return pixels.clip(0, 255).astype(np.uint8)


def _low_resolution(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Down to 28 to 84 px and up again, as a face in the background of a photo is."""
    side = int(rng.integers(SIDE // 4, 3 * SIDE // 4))
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)


# --------------------------------------------------------------------------------------------------
# loader


class Batch(NamedTuple):
    crops: torch.Tensor  # uint8 (N, 112, 112, 3) RGB
    labels: torch.Tensor  # int64 (N,)
    indices: torch.Tensor  # int64 (N,), into the set


class FaceDataset(Dataset):
    """A sample's key is (epoch, index): all that its augmentation depends on besides the seed."""

    def __init__(self, faces: FaceSet, kind: str, seed: int):
        self.faces, self.kind, self.seed = faces, kind, seed

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int, int] | str:
        """-> crop, label, index; or what is wrong with the file, in one line."""
        epoch, index = key
        try:
            image = read_crop(self.faces.path(index))
        except InputError as error:  # raised in `batches`: a worker would wrap it in its traceback
            return str(error)
        rng = np.random.default_rng((self.seed, epoch, index))
        return augment(image, self.kind, rng), int(self.faces.labels[index]), index


def read_crop(path: Path) -> np.ndarray:
    """uint8 (112, 112, 3) RGB. Raises InputError: not readable, or of another size."""
    try:
        crop = read_image(path)
    except UnreadableImage as error:
        raise InputError(f"{path}: {error}; run pre_process.py on its folder again") from error
    if crop.shape != (SIDE, SIDE, 3):
        raise InputError(
            f"{path} is {crop.shape[1]}x{crop.shape[0]}, not {SIDE}x{SIDE}: "
            "name a folder that pre_process.py made"
        )
    return crop


class RunSampler(Sampler):
    """The batches of a whole run, as lists of (epoch, index), from any step on.

    The last photos of an epoch that fill no batch are left out; the next epoch's order is another.
    With several ranks, each takes its part of every batch: all make the same number of steps, and
    the order is the same for any number of ranks that divides the batch.
    """

    def __init__(
        self,
        photos: int,
        batch_size: int,
        epochs: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.photos, self.batch_size, self.seed, self.start = photos, batch_size, seed, start
        self.share = batch_size // ranks  # of this rank
        self.offset = rank * self.share
        self.steps_per_epoch = photos // batch_size
        self.steps = self.steps_per_epoch * epochs

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, of_epoch = None, -1
        for step in range(self.start, self.steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != of_epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.photos)
                of_epoch = epoch
            first = place * self.batch_size + self.offset
            yield [(epoch, int(index)) for index in order[first : first + self.share]]


def make_loader(
    faces: FaceSet, sampler: RunSampler, kind: str, workers: int, timeout: int, pin: bool
) -> DataLoader:
    """One loader for the whole run: workers are started once, and read ahead across epochs."""
    return DataLoader(
        FaceDataset(faces, kind, sampler.seed),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        timeout=timeout if workers else 0,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
        # Its own generator: the loader draws a seed at its start, and must not take it from the
        # global one, or a resumed run would go on with other random numbers.
        generator=torch.Generator().manual_seed(sampler.seed),
    )


def batches(loader: DataLoader) -> Iterator[Batch]:
    """The loader's batches.

    Raises InputError: a file was lost or damaged since preparation, or a loader process was lost.
    """
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, EOFError, ConnectionError) as error:
            # torch has no kind of its own for a worker that is gone, maybe in mid-batch.
            said = str(error).splitlines()[0] if str(error) else "its DataLoader pipe ended"
            if isinstance(error, RuntimeError) and "DataLoader" not in said:
                raise
            raise InputError(
                f"{said}: a loader process was killed or hangs (the disk, the memory, or a full "
                "/dev/shm: there, try --workers 0); what was saved is kept, --resume goes on",
                local=True,
            ) from error
        if isinstance(batch, str):
            raise InputError(batch, local=True)
        yield Batch(*batch)


def _collate(samples: list) -> tuple[torch.Tensor, ...] | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    crops, labels, indices = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(crops)), torch.tensor(labels), torch.tensor(indices)


def _start_worker(_: int) -> None:
    # A signal to the whole group is the parent's to handle: it ends the step and saves first. So
    # Ctrl-C is ignored here, and SIGTERM obeyed after 20 seconds.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
