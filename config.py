"""Every default and every option: one frozen dataclass a script, named recipes, the argparse.

A script says `options = config.parse(config.TrainOptions, __doc__)`. What the command line does not
name comes from the recipe (`--recipe`), and what the recipe does not name from the dataclass.
Nothing here imports torch, so that `--help` and a wrong option answer at once.
"""

import argparse
import dataclasses
import difflib
import errno
import io
import json
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = (
    Path(__file__).resolve().parent
)  # defaults hang here, whatever folder a script is started from
DATA = ROOT / "data"
RUNS = ROOT / "runs"
RAW = DATA / "raw"  # the user's photos, where there are any
WEIGHTS = ROOT / "weights" / "recipe-cpu.safetensors"  # of --recipe cpu; they ship with the repo
SYNTHETIC = DATA / "synthetic"  # the embedded faces, drawn on demand
DRAWN = DATA / "drawn"  # many more of them, to start a training from

DEPTHS = (18, 34, 50, 100, 101, 152, 200)
NETWORKS = (*(f"r{d}" for d in DEPTHS), *(f"se-r{d}" for d in DEPTHS), "mbf")


# Options of a run that a continuation takes from the command line or from their defaults.
NOT_RESUMED = ("resume", "runs", "name", "device", "workers", "threads")

Options = typing.TypeVar("Options")


class InputError(Exception):
    """A bad input by the user. Its text is one line that names the file and the fix.

    Under torchrun all ranks meet it, and the first one tells; `local` is one that this rank alone
    has met.
    """

    def __init__(self, text: str, local: bool = False):
        super().__init__(text)
        self.local = local


def option(default: object, help: str, **metadata: object) -> typing.Any:
    """A dataclass field with its help, and what its value is checked against."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


# --------------------------------------------------------------------------------------------------
# options of the scripts


@dataclass(frozen=True)
class PreProcessOptions:
    src: Path | None = option(
        None,
        "raw photos, one folder an identity: a folder, .zip, .tar or .tgz "
        "(default: data/raw; where there is none, the embedded synthetic faces)",
    )
    out: Path | None = option(
        None, "where crops and manifest.csv go (default: data/faces, or data/synthetic)"
    )
    keep_undetected: bool = option(
        False,
        "crop a photo without a face by the set's median landmarks and mark it, instead of "
        "rejecting it; for test sets, so that no pair is lost",
    )
    download: str | None = option(
        None,
        "fetch a published set and prepare it: lfw (the funneled photos and the lists of pairs)",
        choices=("lfw",),
    )
    draw: int = option(
        0,
        "draw eight faces each of so many invented people and prepare them (default of --out: "
        "data/drawn), for --recipe drawn",
        low=0,
    )
    exclude_names: Path | None = option(
        None,
        "leave out identities whose names are in this list (LFW's people.txt, or a name a line), "
        "however they are spelt",
        group="the set",
    )
    pack: bool = option(
        False, "also write the aligned crops as train.rec, train.idx and property (RecordIO)"
    )
    report: bool = option(False, "also write report.html: what the set is like")
    test_names: Path | None = option(
        None, "show in the report which identities are in this list, such as LFW's people.txt"
    )
    min_face_size: int = option(
        20, "smallest face looked for, in pixels", low=12, group="detection"
    )
    thresholds: tuple[float, ...] = option(
        (0.6, 0.7, 0.7), "score a face must pass in MTCNN's three stages", low=0, high=1, length=3
    )
    factor: float = option(0.709, "step of the image pyramid", low=0.1, high=0.95)
    max_pixels: int = option(
        50_000_000,
        "a photo with more pixels is rejected before it is decoded",
        low=1,
        high=178_000_000,  # Pillow's own limit
    )
    batch_size: int = option(
        32,
        "photos that a worker takes at a time; on a GPU they are detected together (try 256)",
        low=1,
        group="speed",
    )
    workers: int = option(
        -1,
        "processes of one thread each, or on a GPU threads that read and write (-1: one a core; "
        "0: none)",
        low=-1,
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class TrainOptions:
    data: Path | None = option(
        None,
        "a prepared folder, or a folder with train.rec and train.idx as InsightFace distributes "
        "them (default: data/faces if data/raw is there, else data/synthetic/train)",
    )
    recipe: str | None = option(
        None, "a named set of the options below; what you name yourself wins"
    )
    name: str | None = option(
        None, "name of the run: runs/<name> (default: that of the recipe or data)"
    )
    runs: Path = option(RUNS, "where runs are kept")
    resume: bool = option(False, "go on with the run of this name where it stopped")
    min_images: int = option(1, "leave out identities with fewer photos", low=1)
    skip_bad: bool = option(
        False, "leave out damaged records of a train.rec and list them, instead of refusing the set"
    )

    network: str = option("se-r18", "backbone", choices=NETWORKS, group="model")
    width: float = option(1.0, "multiplies the channels; 1.0 is the published net", above=0, high=4)
    resolution: int = option(
        112,
        "side in pixels to which the network shrinks the crops, a multiple of 16; 64 trains over "
        "twice as fast",
        low=16,
        high=112,
    )
    embedding_size: int = option(512, "length of an embedding", low=2)
    dropout: float = option(
        0.0, "before the last linear layer; 0.4 helps on small sets", low=0, high=0.95
    )
    init: Path | None = option(
        None,
        "start a fine-tuning from these weights (run folder, .safetensors, .pth); the head is new",
    )

    head: str = option(
        "dense",
        "dense: every rank holds all centres; sharded: each holds a part, for identities by the "
        "hundred thousand",
        choices=("dense", "sharded"),
        group="margin head",
    )
    sample_rate: float = option(
        1.0,
        "share of the centres that take part in a step (sharded head); 0.1 is published for "
        "millions of identities (the accuracy shown is then among the sampled ones)",
        above=0,
        high=1,
    )
    margin: str = option("arcface", "its kind", choices=("arcface", "cosface", "combined"))
    # torchrun takes --s and --m for beginnings of its own options: hence the second names.
    s: float = option(
        32.0,
        "scale of the logits; 64 is published for ten thousand identities and more",
        above=0,
        alias="scale",
    )
    m: float = option(
        0.3,
        "additive angular margin in radians (m2 of the combined one); 0.5 is published, and needs "
        "tens of epochs",
        low=0,
        high=3.14,
        alias="m2",
    )
    m1: float = option(1.0, "multiplies the angle (combined margin)", low=1, high=4)
    m3: float = option(
        0.35, "subtracted from the cosine (cosface and combined margin)", low=0, high=1
    )
    easy_margin: bool = option(False, "no margin beyond 90 degrees")
    focal_gamma: float = option(0.0, "focal loss per sample, 0 = cross-entropy", low=0)

    epochs: int = option(20, "passes over the training photos", low=1, group="optimisation")
    batch_size: int = option(64, "photos a step, of all ranks together", low=2)
    accumulate: int = option(
        1, "passes in which a rank takes its share of a step, where memory is short", low=1
    )
    lr: float = option(0.1, "learning rate for a batch of --lr-batch photos", above=0)
    lr_batch: int = option(
        64, "the batch that --lr is meant for: it is scaled by batch size / this; 0 = no", low=0
    )
    schedule: str = option(
        "cosine", "of the learning rate", choices=("cosine", "step", "poly", "linear")
    )
    milestones: tuple[float, ...] = option(
        (0.625, 0.875),
        "step schedule: shares of the run at which lr is divided by 10",
        low=0,
        high=1,
    )
    warmup: float = option(0.1, "share of the run in which lr rises from 0", low=0, high=1)
    momentum: float = option(0.9, "of SGD", low=0, high=0.9999)
    weight_decay: float = option(5e-4, "not applied to BN, biases and PReLU", low=0)
    clip_norm: float = option(
        5.0, "largest norm of the gradient of backbone and head; 0 = off", low=0
    )

    augment: str = option(
        "flip",
        "none, flip, strong (flip, small affine, colour, grey, blur, low resolution), or growing "
        "(from strong to more of it, with a part erased; for small sets and many passes)",
        choices=("none", "flip", "strong", "growing"),
        group="data",
    )
    workers: int = option(-1, "loader processes (-1: 1 on CPU, up to 8 on CUDA; 0: none)", low=-1)
    timeout: int = option(120, "seconds after which a silent loader process is an error", low=1)
    val_identities: int = option(
        200, "identities held out for validation (at most a tenth of them); 0 = none", low=0
    )
    val_data: Path | None = option(None, "prepared folder that --val-pairs names, such as data/lfw")
    val_pairs: Path | None = option(
        None,
        "validate on these pairs instead, such as LFW View 1's pairsDevTest.txt (never View 2)",
    )

    seed: int = option(
        0,
        "of weights, order, augmentation and held-out identities",
        low=0,
        high=2**32 - 1,
        group="run",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    amp: str = option(
        "auto",
        "mixed precision; auto: bf16 on a card that has it, else fp16; on a CPU bf16 with "
        "--compile where the processor has it, else off",
        choices=("auto", "off", "bf16", "fp16"),
    )
    channels_last: bool = option(True, "memory format; faster on CPU and on tensor cores")
    checkpointing: bool = option(
        False, "compute activations again in the backward pass: a third slower, far less memory"
    )
    compile: bool = option(False, "torch.compile the backbone (needs a C++ compiler, or a card)")
    threads: int = option(0, "CPU threads, 0 = torch's default", low=0)
    log_every: int = option(20, "steps between lines on the console and in TensorBoard", low=1)
    save_every: int = option(500, "steps between checkpoints, besides one an epoch", low=1)
    tensorboard: bool = option(True, "write curves for TensorBoard")


@dataclass(frozen=True)
class ExportOptions:
    model: Path | None = option(
        None,
        "run folder, .safetensors, or .pth of others (default: the run that train.py makes by "
        "default, runs/faces or runs/cpu, where trained, else the weights that ship)",
    )
    network: str | None = option(
        None, "that a .pth holds (default: told by its keys)", choices=NETWORKS
    )
    out: Path | None = option(
        None, "folder of what is written (default: runs/<run>/export, or runs/<file>/export)"
    )
    name: str | None = option(
        None, "of the files, without suffix (default: that of the run or file, and the network)"
    )
    half: bool = option(False, "write the weights alone, in fp16: half the size")
    threads: int = option(0, "CPU threads, 0 = torch's default", low=0)


@dataclass(frozen=True)
class EvalOptions:
    data: Path | None = option(
        None,
        "prepared folder of the test photos (default: data/lfw; for a run on the drawn faces "
        "data/synthetic/test)",
    )
    pairs: Path | None = option(
        None,
        "pairs in LFW's format, lines of path<TAB>path<TAB>label, or a verification set (.bin) "
        "that holds its crops itself (default: pairs.txt in the data folder)",
    )
    model: tuple[Path, ...] | None = option(
        None,
        "run folder, .safetensors, .onnx, or .pth of others; several are compared "
        "(default: runs/faces or runs/cpu, where trained, else the weights that ship; on the drawn "
        "faces the demo's)",
    )
    out: Path | None = option(
        None,
        "where the report goes (default: in the model's run, named like the list of pairs, or for "
        "a pairs.txt like the set)",
    )
    flip: bool = option(True, "add the embedding of the mirror image")
    bootstrap: int = option(
        1000, "resamples of the pairs behind the confidence intervals; 0 = none", low=0
    )
    batch_size: int = option(64, "crops embedded together", low=1)
    network: str | None = option(
        None,
        "that a .pth holds (default: told by its keys)",
        choices=NETWORKS,
        group="foreign model",
    )
    input_mean: float = option(
        127.5, "subtracted from pixels; for a foreign ONNX file that names nothing"
    )
    input_std: float = option(127.5, "divides them then", above=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="run")
    threads: int = option(0, "CPU threads, 0 = torch's default", low=0)


@dataclass(frozen=True)
class VerifyOptions:
    photos: tuple[Path, ...] = option(
        (), "two photos to compare, or with --gallery the one to find", positional=True
    )
    model: Path | None = option(
        None,
        "run folder, .safetensors, .onnx, or .pth of others (default: runs/faces or runs/cpu, "
        "where trained, else the weights that ship)",
    )
    threshold: float | None = option(
        None,
        "angle in degrees below which two faces are taken for one person (default: the one that "
        "the model carries)",
        above=0,
        high=180,
    )
    all: bool = option(False, "look at all faces of a photo, not at the central one alone")
    save: Path | None = option(None, "write a picture of the comparison: a .png or .jpg")
    json: bool = option(False, "print one JSON object and nothing else")
    gallery: Path | None = option(
        None, "find the photo's face in this folder, one folder an identity", group="a gallery"
    )
    top: int = option(5, "identities shown, the nearest first", low=1)
    enrolled: Path | None = option(
        None,
        "where the gallery's embeddings are kept, a .safetensors (default: in the folder enrolled "
        "of the model's run)",
    )
    min_face_size: int = option(
        20, "smallest face looked for, in pixels", low=12, group="detection"
    )
    max_pixels: int = option(
        50_000_000,
        "a photo with more pixels is not decoded",
        low=1,
        high=178_000_000,  # Pillow's own limit
    )
    network: str | None = option(
        None,
        "that a .pth holds (default: told by its keys)",
        choices=NETWORKS,
        group="foreign model",
    )
    input_mean: float = option(
        127.5, "subtracted from pixels; for a foreign ONNX file that names nothing"
    )
    input_std: float = option(127.5, "divides them then", above=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="run")
    threads: int = option(0, "CPU threads, 0 = torch's default", low=0)


def default_run() -> Path:
    """The run that train.py makes by default."""
    return RUNS / ("faces" if RAW.is_dir() else "demo")


def default_model(*first: Path) -> Path:
    """The first of the runs that is finished, runs/faces and runs/cpu at last; or the shipped.

    Those are what `--data data/faces` alone and `--recipe cpu` are called, and they count
    where they are not of the drawn faces.
    """
    own = [run for run in (RUNS / "faces", RUNS / "cpu") if not knows_drawn_faces(run)]
    return next((run for run in (*first, *own) if (run / "result.json").exists()), WEIGHTS)


def knows_drawn_faces(model: Path) -> bool:
    """Whether a run was trained on drawn faces alone: its threshold says nothing about photos."""
    try:
        told = read_run(model)
    except InputError:  # a file, or a run of which only the weights are left
        return model == RUNS / "demo"
    data, init = told.get("data"), told.get("init")
    return not init and data is not None and ROOT / str(data) in (SYNTHETIC / "train", DRAWN)


_ONLY_DRAWN = "drawn faces: "  # then what trained on them


def of_drawn_faces(origin: str) -> str:
    """What a run says that it started from, where that has seen drawn faces alone."""
    return _ONLY_DRAWN + origin


def has_seen_photos(origin: str) -> bool:
    """Whether the weights that a run started from, in its own words, may have."""
    return bool(origin) and not origin.startswith(_ONLY_DRAWN)


# --------------------------------------------------------------------------------------------------
# recipes: only what differs from the defaults above

_CPU = {
    "network": "r18", "width": 0.5, "resolution": 64, "embedding_size": 256, "dropout": 0.2,
    "augment": "growing", "compile": True,
}  # fmt: skip

RECIPES: dict[str, dict[str, object]] = {
    # The demo on synthetic faces: three minutes on 2 CPU cores.
    "demo": {
        "network": "se-r18", "width": 0.25, "embedding_size": 128, "dropout": 0.2, "epochs": 5,
        "batch_size": 32, "lr_batch": 32,
    },
    # 17 thousand photos of 3 thousand people on 2 cores, about 100 minutes; see README for how.
    "cpu": {**_CPU, "epochs": 60},
    # 36 thousand drawn faces of 4,500 people, some ten minutes: what `cpu` can start from (--init).
    "drawn": {**_CPU, "epochs": 5},
    # The same set on one small GPU, SE-LResNet50E-IR at full size. It has not been run yet.
    "small-gpu": {
        "network": "se-r50", "dropout": 0.4, "epochs": 60, "batch_size": 128, "augment": "growing",
    },
    # ArcFace paper, section 3.1: batch 512, lr 0.1, wd 5e-4; /10 at 20K and 28K of 32K steps.
    "casia-r50": {
        "network": "r50", "epochs": 34, "batch_size": 512, "lr": 0.1, "lr_batch": 512,
        "schedule": "step", "milestones": (0.625, 0.875), "warmup": 0.0, "s": 64.0, "m": 0.5,
        "dropout": 0.4,
    },
    # The same on MS1MV2 (5.8 M photos): /10 at 100K and 160K of 180K steps, i.e. 16 passes.
    "ms1m-r50": {
        "network": "r50", "epochs": 16, "batch_size": 512, "lr": 0.1, "lr_batch": 512,
        "schedule": "step", "milestones": (0.556, 0.889), "warmup": 0.0, "s": 64.0, "m": 0.5,
    },
    "ms1m-r100": {
        "network": "r100", "epochs": 16, "batch_size": 512, "lr": 0.1, "lr_batch": 512,
        "schedule": "step", "milestones": (0.556, 0.889), "warmup": 0.0, "s": 64.0, "m": 0.5,
    },
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# argparse from a dataclass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        """One line, exit code 2: no usage dump in front of what is wrong."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parse(kind: type[Options], doc: str | None, argv: list[str] | None = None) -> Options:
    """Command line -> `kind`. Exits with 2 and one line where a word is unknown or out of range."""
    parser = _parser(kind, doc)
    named, unknown = parser.parse_known_intermixed_args(argv)  # photos anywhere among options
    if unknown:
        parser.error(_suggest(unknown[0], parser))
    typed = values = vars(named)
    if values.get("resume"):
        values = {**_of_run(values, parser), **values}
    if kind is TrainOptions and not {"data", "recipe"} & values.keys() and not RAW.exists():
        values["recipe"] = "demo"  # on the embedded faces; what the command line names still wins
    recipe = values.get("recipe")
    if recipe in RECIPES:
        values = {**RECIPES[recipe], **values}
    elif "recipe" in typed:  # one of a run may be older than these: its values are in config.json
        parser.error(f"--recipe {recipe!r} is unknown: choose from {', '.join(RECIPES)}")
    options = kind(**values)
    for field in dataclasses.fields(kind):
        complaint = _out_of_range(field, getattr(options, field.name))
        if complaint:
            parser.error(f"{_flag(field)} {complaint}")
    return options


def run(main: Callable[[typing.Any], int | None], options: object) -> typing.NoReturn:
    """Run a script's `main`; a bad input ends it with one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        code = main(options) or 0
        sys.stdout.flush()
    except InputError as error:
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of each machine
        code = complain(str(error), 2) if first or error.local else 2
    except KeyboardInterrupt:
        code = complain("stopped by Ctrl-C; what was done is kept", 130)
    except BrokenPipeError:  # `train.py | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        disk = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
        path = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)
        if error.errno not in disk + path:
            raise
        free = f" ({free_bytes(error.filename):,} bytes free)" if error.errno in disk else ""
        # A file is written under a hidden name first, which nobody has named.
        file = re.sub(r"(^|/)\.([^/]+)\.tmp$", r"\1\2", str(error.filename or "a file"))
        fix = "make room or name another place, and run again; what was finished is kept"
        said = f"{file}: {error.strerror}{free}: {fix if free else 'name another path'}"
        code = complain(said, 1 if error.errno in disk else 2)
    sys.exit(code)


def read_run(run: Path) -> dict[str, object]:
    """The options with which a run was started. Raises InputError: config.json lost or damaged."""
    path = run / "config.json"
    hints = typing.get_type_hints(TrainOptions)
    try:
        options = dict(json.loads(path.read_text())["options"])
        wrong = [key for key, value in options.items() if not _fits(value, hints.get(key))]
        if wrong or not options:
            raise ValueError(f"{', '.join(wrong) or 'nothing'} in it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is lost or damaged ({error}): put it back, or move it away and repeat the "
            "run's options beside --resume"
        ) from error
    return options


def _fits(value: object, hint: object) -> bool:
    """Whether a value of a JSON file is one of an option with this type; an unknown one is not."""
    if isinstance(hint, types.UnionType):
        return value is None or _fits(value, typing.get_args(hint)[0])
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(isinstance(part, (int, float)) for part in value)
    kinds = {bool: bool, int: int, float: (int, float), str: str, Path: str}
    return isinstance(value, kinds.get(hint, ())) and isinstance(value, bool) == (hint is bool)


def plain(options: object) -> dict[str, object]:
    """Options as JSON and a weights-only checkpoint can hold them."""

    def plainly(value: object) -> object:
        if isinstance(value, Path):
            return canonical(value)
        return list(value) if isinstance(value, tuple) else value

    return {key: plainly(value) for key, value in dataclasses.asdict(options).items()}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A failed write says which file it was, as a failed open() does by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def free_bytes(path: str | None) -> int:
    """On the disk that holds the path, or its first folder that is there."""
    place = Path(path or ".").resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def canonical(path: Path) -> str:
    """A path as it is kept in files: below the repo relative to it, so that a clone can move."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def complain(line: str, code: int) -> int:
    print("error: " + " ".join(line.splitlines()), file=sys.stderr)
    return code


def _of_run(values: dict[str, typing.Any], parser: _Parser) -> dict[str, typing.Any]:
    """What `--resume` need not repeat: the options that the run of this name was started with."""
    run = values.get("runs", RUNS) / values.get("name", "")
    if "name" not in values or not (run / "config.json").exists():
        return {}
    try:
        saved = read_run(run)
    except InputError as error:
        parser.error(str(error))
    hints = typing.get_type_hints(TrainOptions)
    found = {}
    for field in dataclasses.fields(TrainOptions):
        if field.name not in saved or field.name in NOT_RESUMED or saved[field.name] is None:
            continue
        value = saved[field.name]
        if hints[field.name] in (Path, Path | None):
            value = ROOT / str(value)  # absolute ones stay
        found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


def _flag(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def _parser(kind: type, doc: str | None) -> _Parser:
    parser = _Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not named is left to recipe and class
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(kind)
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(kind):
        if "group" in field.metadata:
            group = parser.add_argument_group(str(field.metadata["group"]))
        names = [_flag(field)]
        if "alias" in field.metadata:
            names.append(f"--{field.metadata['alias']}")
        words = _argument(field, hints[field.name])
        if "positional" in field.metadata:
            names, words = [field.name], words | {"nargs": "*", "metavar": "PHOTO"}
        group.add_argument(*names, **words)
    return parser


def _argument(field: dataclasses.Field, hint: object) -> dict[str, typing.Any]:
    """Keywords of add_argument for one field."""
    text = str(field.metadata["help"])
    if field.name == "recipe":
        text += f" ({', '.join(RECIPES)})"
    if field.default not in (None, ()):
        text += f" (default: {_shown(field.default)})"
    text = text.replace("%", "%%")
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if isinstance(hint, types.UnionType):  # `X | None`
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]  # of each entry
        metavar = "X" if kind is float else kind.__name__.upper()
        kind = _path if kind is Path else kind
        return {"type": kind, "nargs": "+", "action": _Tuple, "metavar": metavar, "help": text}
    choices = field.metadata.get("choices")
    metavar = None if choices is None else "NAME"
    kind = _path if hint is Path else hint
    return {
        "type": _chosen(choices) if choices else kind,
        "metavar": metavar or hint.__name__.upper(),
        "help": text + (f" [{' '.join(choices)}]" if choices else ""),
    }


def _path(word: str) -> Path:
    if not word:  # an unset variable of a shell; Path("") is the current folder
        raise argparse.ArgumentTypeError("an empty path")
    return Path(word)


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, flag=None):
        setattr(namespace, self.dest, tuple(values))


def _chosen(choices: tuple[str, ...]) -> Callable[[str], str]:
    def check(word: str) -> str:
        if word in choices:
            return word
        near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise argparse.ArgumentTypeError(f"{word!r} is unknown{hint} (one of: {' '.join(choices)})")

    return check


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, Path) and value.is_relative_to(ROOT):
        return str(value.relative_to(ROOT))
    return str(value)


def _suggest(word: str, parser: _Parser) -> str:
    if not word.startswith("-") and Path(word).exists():
        flag = next(a.option_strings[0] for a in parser._actions if a.type is _path)
        return f"{word!r} stands alone; did you mean {flag} {word}?"
    if not word.startswith("-"):
        return f"{word!r} stands alone: a yes/no option is --flag or --no-flag, without a value"
    flags = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
    return f"{word} is unknown" + (f"; did you mean {near[0]}?" if near else "")


def _out_of_range(field: dataclasses.Field, value: object) -> str | None:
    rules = field.metadata
    values = value if isinstance(value, tuple) else (value,)
    if "choices" in rules and value is not None and value not in rules["choices"]:
        # Read back from a run that another version began.
        return f"{value} is unknown (one of: {' '.join(rules['choices'])})"
    if "length" in rules and len(values) != rules["length"]:
        return f"takes {rules['length']} numbers"
    for number in values:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        if number != number or number in (float("inf"), float("-inf")):
            return f"{number} is not a finite number"
        if "low" in rules and number < rules["low"]:
            return f"{number} is below {rules['low']}"
        if "above" in rules and number <= rules["above"]:
            return f"{number} must be above {rules['above']}"
        if "high" in rules and number > rules["high"]:
            return f"{number} is above {rules['high']}"
    return None
