"""From a prepared folder to batches: the face set, its deterministic order, augmentation, loader.

    faces = load_faces(Path("data/faces"))               # or a folder with train.rec, train.idx
    train, held_out = hold_out(faces, identities=200, seed=0)
    for batch in batches(make_loader(train, ...)): ...   # uint8 crops, labels, indices

The order of the photos is a function of (seed, epoch), the augmentation one of (seed, epoch,
index) and, where it grows, of how many epochs there are: so a run that is resumed is the same run,
whatever the number of loader processes.
"""

import hashlib
import itertools
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

import manifest
import packing
import protocol
import recordio
from config import InputError
from images import UnreadableImage, decode_image, read_image
from record_labels import read_labels
from recordio import RecordFile

SIDE = 112  # of a crop, in pixels


@dataclass(frozen=True, eq=False)
class FaceSet:
    """Crops and their identities. The class number of an identity is its place in sorted order."""

    folder: Path
    labels: np.ndarray  # int64 (N,)
    identities: list[str]  # (C) names, sorted
    images: list[str] | None  # (N) paths below the folder; None where there are only records
    records: RecordFile | None = None  # where set, the crops are read from it
    numbers: np.ndarray | None = None  # int32 (N,) their records
    left_out: int = 0  # photos of the folder that are not in the set: no face, or too few
    damaged: tuple[str, ...] = ()  # records that --skip-bad left out

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """What a message calls a photo."""
        if self.images is not None:
            return self.images[index]
        return f"{self.records.path.name} record {self.numbers[index]}"

    def read(self, index: int) -> np.ndarray:
        """uint8 (112, 112, 3) RGB. Raises InputError: lost or damaged since preparation."""
        if self.records is None:
            return read_crop(self.folder / self.images[index])
        number = int(self.numbers[index])
        try:
            crop = decode_image(self.records.read(number).payload)
        except UnreadableImage as error:
            raise InputError(
                f"{self.records.path}: the image of record {number} is unusable ({error}): "
                "fetch or pack the set again"
            ) from error
        return _checked(crop, f"{self.records.path}: record {number}")

    def digest(self) -> str:
        """Tells whether another set is the same photos under the same class numbers."""
        if self.images is not None:  # packed or not, it is the same set
            lines = (
                f"{label} {name}" for label, name in zip(self.labels, self.images, strict=True)
            )
            return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
        parts = (np.int64([self.records.size]), self.numbers, self.labels)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def load_faces(path: Path, min_images: int = 1, skip_bad: bool = False) -> FaceSet:
    """The crops of a prepared folder, or of one that holds train.rec and train.idx, or of a .rec.

    Where both are there, the names come from the manifest, and the crops from train.rec if it was
    packed from it. `skip_bad` leaves out damaged records instead of refusing the set.
    Raises InputError: not prepared, damaged, or fewer than two identities in it.
    """
    rec = path if path.suffix == ".rec" else path / recordio.REC
    if path == rec or (rec.exists() and not (path / manifest.NAME).exists()):
        faces = _load_records(rec, skip_bad)
    else:
        faces = _load_manifest(path)
    photos = len(faces) + faces.left_out
    faces = _subset(faces, np.bincount(faces.labels)[faces.labels] >= min_images)
    if len(faces.identities) < 2:
        raise InputError(
            f"{path} has {len(faces.identities)} identities with at least {min_images} aligned "
            "faces, and training takes two or more: prepare more photos, or lower --min-images"
        )
    return replace(faces, left_out=photos - len(faces))


def _load_manifest(folder: Path) -> FaceSet:
    rows = [cells[1:4] for cells in manifest.read_rows(folder / manifest.NAME)]
    pairs = sorted((name, image) for name, image, status in rows if status == manifest.ALIGNED)
    names, labels = np.unique([name for name, _ in pairs], return_inverse=True)
    images = [image for _, image in pairs]
    faces = FaceSet(folder, labels.astype(np.int64), names.tolist(), images)
    faces = replace(faces, left_out=len(rows) - len(faces))
    if not (folder / recordio.REC).exists():
        return faces
    if not packing.is_packed(folder, pairs):
        print(f"{folder / recordio.REC} was packed from another {manifest.NAME}: not used; "
              "pre_process.py --pack renews it")  # fmt: skip
        return faces
    records = RecordFile(folder / recordio.REC)
    return replace(faces, records=records, numbers=records.images())


def _load_records(rec: Path, skip_bad: bool) -> FaceSet:
    """A set as InsightFace distributes it: its identities have numbers instead of names."""
    records = RecordFile(rec)
    numbers = records.images()  # int32 (N,)
    labels, damaged = read_labels(records, numbers, skip_bad)
    numbers, labels = numbers[labels >= 0], labels[labels >= 0]
    classes, labels = np.unique(labels, return_inverse=True)
    names = [f"{label:08d}" for label in classes.tolist()]  # sorted as their numbers are
    return FaceSet(
        rec.parent, labels.astype(np.int64), names, None, records, numbers, len(damaged), damaged
    )


def _subset(faces: FaceSet, keep: np.ndarray) -> FaceSet:
    """The photos where `keep`, bool (N,), is true; classes dense from 0."""
    names, labels = np.unique(faces.labels[keep], return_inverse=True)
    return replace(
        faces,
        labels=labels.astype(np.int64),
        identities=[faces.identities[name] for name in names],
        images=faces.images and list(itertools.compress(faces.images, keep)),
        numbers=None if faces.numbers is None else faces.numbers[keep],
    )


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
    held = chosen[faces.labels]  # (N,)
    return _subset(faces, ~held), _subset(faces, held)


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
    box: np.ndarray | None = None  # (4,) x1, y1, x2, y2 of the face in the photo

    @property
    def label(self) -> str:
        """The name without suffix, and without the folder where the name repeats it (as in LFW)."""
        stem = without_suffix(self.source)
        folder, _, name = stem.rpartition("/")
        return name if name.startswith(f"{folder}_") else stem


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
                photos.append(Photo(row.source, data / row.image, undetected, row.box))
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


class Strength(NamedTuple):
    """How often a change is made, and how far an affine one goes at most."""

    affine: float
    turn: float  # degrees
    scale: float  # of the logarithm
    shift: float  # pixels
    stretch: float  # of the logarithm of one side, against the other
    shear: float
    colour: float
    grey: float
    erase: float


STRONG = Strength(0.5, 10, 0.1, 4, 0, 0, colour=0.5, grey=0.1, erase=0)
HEAVY = Strength(0.8, 15, 0.15, 6, 0.08, 0.08, colour=0.6, grey=0.15, erase=0.5)


_GREY = np.tile([0.299, 0.587, 0.114], (3, 1))


def augment(
    image: np.ndarray, kind: str, rng: np.random.Generator, done: float = 1.0
) -> np.ndarray:
    """uint8 (112, 112, 3) RGB -> the same size; `kind` is none, flip, strong or growing.

    `growing` is strong at the start of a run and heavy at its end; `done` of it, 0 to 1, is over.
    Early on, a network that knows no face yet learns little from what heavy leaves of one; later
    on, it knows what strong shows it by heart (README, "How the CPU recipe was chosen").
    """
    if kind == "none":
        return image
    if rng.random() < 0.5:
        image = np.ascontiguousarray(image[:, ::-1])
    if kind == "flip":
        return image
    share = done if kind == "growing" else 0.0
    strength = Strength(*(a + share * (b - a) for a, b in zip(STRONG, HEAVY, strict=True)))
    if rng.random() < strength.affine:
        image = _affine(image, strength, rng)
    if rng.random() < strength.colour:
        image = _colour(image, rng)
    if rng.random() < strength.grey:
        image = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    if rng.random() < 0.1:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.5))
    if rng.random() < 0.2:
        image = _low_resolution(image, rng)
    if rng.random() < strength.erase:
        image = _erase(image, rng)
    return image


def _affine(image: np.ndarray, strength: Strength, rng: np.random.Generator) -> np.ndarray:
    """Turn, scale, stretch and shear about the middle, and shift."""
    turn, scale, stretch, shear, right, down = rng.uniform(-1, 1, size=6)
    angle = np.deg2rad(strength.turn * turn)
    size, ratio = np.exp(strength.scale * scale), np.exp(strength.stretch * stretch)
    turned = size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turned @ np.array([[ratio, strength.shear * shear], [0, 1 / ratio]])  # (2, 2)
    centre = np.full(2, (SIDE - 1) / 2)
    offset = centre - linear @ centre + strength.shift * np.array([right, down])
    matrix = np.column_stack([linear, offset])  # (2, 3)
    return cv2.warpAffine(image, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT_101)


def _colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation by up to 30 % each, warmth by up to 10 %.

    Each is linear in the pixels, so that one matrix does all, ten times as fast as one by one.
    """
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, size=3)
    warmth = rng.uniform(0.9, 1.1)
    linear = saturation * np.eye(3) + (1 - saturation) * _GREY  # (3, 3): each row sums to one
    mean = _GREY @ cv2.mean(image)[:3]  # (3,), three times that of the grey picture
    matrix = np.column_stack([contrast * linear, (1 - contrast) * mean])  # (3, 4)
    matrix *= brightness * np.array([[warmth], [1.0], [1 / warmth]])
    return cv2.transform(image, matrix)  # rounded, and clipped to 0 .. 255


def _erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A plain rectangle, 16 to 55 px a side, cut off at the rim: a hand covers a face so."""
    height, width = rng.integers(SIDE // 7, SIDE // 2, size=2)
    top, left = rng.integers(-8, SIDE - 8, size=2)
    image = image.copy()
    covered = image[max(0, top) : top + height, max(0, left) : left + width]
    covered[:] = rng.integers(0, 256, size=3) if rng.random() < 0.5 else 127
    return image


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
    """A sample's key is (epoch, index): what its augmentation depends on, besides what is fixed."""

    def __init__(self, faces: FaceSet, kind: str, seed: int, epochs: int):
        self.faces, self.kind, self.seed, self.epochs = faces, kind, seed, epochs

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int, int] | str:
        """-> crop, label, index; or what is wrong with the file, in one line."""
        epoch, index = key
        try:
            image = self.faces.read(index)
        except InputError as error:  # raised in `batches`: a worker would wrap it in its traceback
            return str(error)
        rng = np.random.default_rng((self.seed, epoch, index))
        done = epoch / max(1, self.epochs - 1)
        return augment(image, self.kind, rng, done), int(self.faces.labels[index]), index


def read_crop(path: Path) -> np.ndarray:
    """uint8 (112, 112, 3) RGB. Raises InputError: not readable, or of another size."""
    try:
        crop = read_image(path)
    except UnreadableImage as error:
        raise InputError(f"{path}: {error}; run pre_process.py on its folder again") from error
    return _checked(crop, str(path))


def _checked(crop: np.ndarray, where: str) -> np.ndarray:
    if crop.shape != (SIDE, SIDE, 3):
        raise InputError(
            f"{where} is {crop.shape[1]}x{crop.shape[0]}, not {SIDE}x{SIDE}: "
            "name a folder that pre_process.py made, or a .rec of aligned faces"
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
        self.epochs, self.steps = epochs, self.steps_per_epoch * epochs

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
        FaceDataset(faces, kind, sampler.seed, sampler.epochs),
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
            told = lost_worker(error)
            for child in multiprocessing.active_children():
                child.kill()  # one that hangs would be waited for at the end
            if told is None:
                raise
            # Without the loader's frames, which would keep it: torch then raises the same error
            # again wherever the next child process of any kind ends.
            iterator = None
            raise told from error.with_traceback(None)
        if isinstance(batch, str):
            raise InputError(batch, local=True)
        yield Batch(*batch)


def lost_worker(error: Exception) -> InputError | None:
    """What to tell where a loader process is gone; torch has no kind of error of its own for it.

    It is raised wherever the main thread is when the process dies, not only where a batch is due.
    """
    said = str(error).splitlines()[0].rstrip(". ") if str(error) else "a DataLoader pipe ended"
    if isinstance(error, RuntimeError) and "DataLoader" not in said:
        return None
    return InputError(
        f"{said}: a loader process was killed or hangs (the disk, the memory, or a full /dev/shm: "
        "there, try --workers 0); what was saved is kept, --resume goes on",
        local=True,
    )


def _collate(samples: list) -> tuple[torch.Tensor, ...] | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    crops, labels, indices = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(crops)), torch.tensor(labels), torch.tensor(indices)


def _start_worker(_: int) -> None:
    # A signal to the whole group is the parent's to handle: it ends the step and saves first. So
    # Ctrl-C is ignored here, and SIGTERM obeyed after ten minutes, should the parent not be done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
