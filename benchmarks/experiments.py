"""The runs behind README's tables, one after the other. What results/*.csv has is not run again.

    python pre_process.py --src lfw-deepfunneled.tgz --out data/lfw --keep-undetected
    python pre_process.py --src train-faces.zip --out data/faces
    python pre_process.py --draw 4500
    python benchmarks/experiments.py --list
    python benchmarks/experiments.py --what final        # and: ablations, peers, scaling

Takes hours. It may be stopped at any moment: the run under way goes on from its last checkpoint
when the command is repeated. data/lfw must hold LFW's pairs.txt (View 2) and pairsDevTest.txt
(View 1). Nothing is chosen by View 2: each model is scored on it once, at its end.

Each run is one command of train.py, benchmarks/peers.py or benchmarks/trials.py (which can't go on,
and begins anew) in runs/experiments/<name>, then two of lfw_eval.py. Its row goes into
results/<group>.csv, its curves into results/curves/<name>.csv. Of the peers, which pairs of View 2
each one judged rightly is kept in results/right/<name>.txt (a line a fold, a digit a pair, 1 for
right), and McNemar's tests of that in results/mcnemar.csv.
"""

import csv
import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

import numpy as np

import checkpoint
import comparison
import config
import data_gen
import manifest
import train
import training_curves
from benchmarks import peers, trials
from config import ROOT, RUNS, InputError, option

RESULTS = ROOT / "results"
HEAD = ("change", "seed", "identities", "photos", "photos_seen", "minutes", "validation", "view1",
        "view2", "view2_std", "hardware", "date", "commit", "command", "options")  # fmt: skip
SHORT = 10  # epochs of an ablation: about 17 minutes
# Over one in so many of the identities: all see 343 thousand photos, to 1 % (each part's last batch
# is full, and the people held out take another share of each).
PASSES = {8: 206, 4: 85, 2: 40, 1: 20}
HELD_OUT = 39  # people, of each part of the identities alike: a tenth of the smallest
VIEW_1, VIEW_2 = "pairsDevTest.txt", "pairs.txt"
GROUPS = ("final", "ablations", "peers", "scaling")


@dataclass(frozen=True)
class Options:
    what: str = option("final", "group of runs", choices=(*GROUPS, "all"))
    data: Path = option(config.DATA / "faces", "the prepared training set")
    lfw: Path = option(config.DATA / "lfw", "prepared LFW, with its two lists of pairs")
    list: bool = option(False, "only tell the runs, and which are done")


@dataclass(frozen=True)
class Run:
    group: str
    change: str  # against the recipe, in words
    seed: int
    words: tuple[str, ...]  # the command without --data, --seed and --name
    part: int = 1  # of the identities, one in so many

    @property
    def name(self) -> str:
        slug = "".join(letter if letter.isalnum() else "-" for letter in self.change)
        return f"{self.group}-{slug}-{self.seed}"

    @property
    def curves(self) -> Path:
        return RESULTS / "curves" / f"{self.name}.csv"

    @property
    def right(self) -> Path:
        return RESULTS / "right" / f"{self.name}.txt"


# --------------------------------------------------------------------------------------------------
# the runs

OURS = ("train.py", "--recipe", "cpu")
THEIRS = ("benchmarks/peers.py", "--recipe")
TRIED = ("benchmarks/trials.py", "--recipe")
FROM_DRAWN = ("--init", "runs/experiments/drawn")  # what `draw_first` trains
KNOWN = config.RECIPES | peers.PEERS | trials.TRIALS  # by the three scripts
CHANGES = {
    "the recipe": (),
    "augment strong": ("--augment", "strong"),
    "112 px, in the same time": ("--resolution", "112", "--epochs", "4"),
    "squeeze-and-excitation": ("--network", "se-r18"),
    "s 64, m 0.5": ("--s", "64", "--m", "0.5"),
    "straight-through gradient": (*THEIRS, "straight-through"),
    "from drawn faces": FROM_DRAWN,
}
GROWN = (*TRIED, "grown", "--resolution", "112", "--epochs", "7")
CANDIDATES = {  # one seed each: what does not pay at once is not followed up
    "label smoothing 0.1": (*TRIED, "smoothed"),
    "three centres an identity": (*TRIED, "subcentres"),
    "identities drawn by the root of their photos": (*TRIED, "balanced"),
    "margin rising from 0 over half of the run": (*TRIED, "annealed"),
    "batches of 256, accumulated": (*OURS, "--batch-size", "256", "--accumulate", "4"),
    "deeper and narrower: r34, width 0.375": (*OURS, "--network", "r34", "--width", "0.375"),
    "embeddings of 512 numbers": (*OURS, "--embedding-size", "512"),
    "people of two photos left out": (*OURS, "--min-images", "3", "--epochs", "13"),
    "64 px, in the last quarter 112 px, in the same time": GROWN,
}
LIKE_OURS = ("--lr", "0.1", "--lr-batch", "64")
PEERS = {
    "ours": OURS,
    "ours, 112 px, 512 numbers": (*OURS, "--resolution", "112", "--embedding-size", "512"),
    "reference": (*THEIRS, "reference"),
    "reference, lr 0.1 at batch 64": (*THEIRS, "reference", *LIKE_OURS),
    "official": (*THEIRS, "official"),
    "official, lr 0.1 at batch 64": (*THEIRS, "official", *LIKE_OURS),
}


def planned(what: str) -> Iterator[Run]:
    if what in ("final", "all"):
        for seed in (0, 1):
            yield Run("final", "from drawn faces", seed, (*OURS, *FROM_DRAWN))
        for seed in (0, 1):
            yield Run("final", "the recipe", seed, OURS)
        yield Run("final", "with squeeze-and-excitation", 0, (*OURS, "--network", "se-r18"))
    if what in ("ablations", "all"):
        for seed, (change, words) in itertools.product((0, 1, 2), CHANGES.items()):
            script = words if words[:1] == THEIRS[:1] else (*OURS, *words)
            yield Run("ablations", change, seed, (*script, *length_of(words)))
        for change, words in CANDIDATES.items():
            yield Run("ablations", change, 0, (*words, *length_of(words)))
    if what in ("peers", "all"):
        for change, words in PEERS.items():
            yield Run("peers", change, 0, (*words, "--epochs", str(SHORT)))
    if what in ("scaling", "all"):
        for part, passes in PASSES.items():
            length = ("--epochs", str(passes), "--val-identities", str(HELD_OUT))
            yield Run("scaling", f"1 of {part}", 0, (*OURS, *length), part)


def length_of(words: Sequence[str]) -> tuple[str, ...]:
    return () if "--epochs" in words else ("--epochs", str(SHORT))


# --------------------------------------------------------------------------------------------------


def main(options: Options) -> None:
    options = replace(options, data=options.data.resolve(), lfw=options.lfw.resolve())
    if not options.list:
        check_sets(options)
    runs = list(planned(options.what))
    left = [run for run in runs if not is_done(run)]
    for run in runs:
        print(f"{'to do' if run in left else 'done':6} {run.name}", flush=True)
        if run in left and not options.list:
            perform(run, options)
    compared = [run for run in runs if run.group == "peers"]
    if compared and not options.list:
        compare(compared)


def is_done(run: Run) -> bool:
    """Raises InputError: its row is of other options, such as an older recipe's."""
    for row in read(RESULTS / f"{run.group}.csv"):
        if (row["change"], row["seed"]) == (run.change, str(run.seed)):
            wanted = settings(run)
            if row["options"] != wanted:
                other = sorted(set(row["options"].split()) ^ set(wanted.split()))
                raise InputError(
                    f"results/{run.group}.csv: {run.change}, seed {run.seed}, is of other options "
                    f"({' '.join(other)}): call it something else, or take the row out"
                )
            return True
    return False


def settings(run: Run) -> str:
    """All options that shape the run and are not the default: key=value in their order."""
    usual, chosen = config.plain(config.TrainOptions()), config.plain(parsed(run.words[1:]))
    told = {*train.FREE, "data", "seed"}  # or have a column of their own
    if run.words[0] != OURS[0]:
        told.discard("recipe")  # a peer or trial is more than its options
    return " ".join(
        f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in sorted(chosen.items())
        if key not in told and value != usual[key]
    )


def parsed(words: Sequence[str]) -> config.TrainOptions:
    """The options of a command, as its script takes it in the repo's folder."""
    with mock.patch.object(config, "RECIPES", KNOWN):
        options = config.parse(config.TrainOptions, "", list(words))
    return replace(options, data=options.data and ROOT / options.data)


def check_sets(options: Options) -> None:
    for path in (options.data, options.lfw):
        if not (path / manifest.NAME).exists():
            raise InputError(f"{path / manifest.NAME} is not there: prepare the set first (README)")
    for pairs in (VIEW_1, VIEW_2):
        if not (options.lfw / pairs).exists():
            raise InputError(f"{options.lfw / pairs} is not there: copy LFW's list of pairs there")


def perform(run: Run, options: Options) -> None:
    """Train, score on View 1 and View 2, and write the row: with it, the run counts as done."""
    folder = RUNS / "experiments" / run.name
    data = part_of(options.data, run.part)
    words = [*run.words, "--data", config.canonical(data), "--seed", str(run.seed)]
    words += ["--runs", "runs/experiments", "--name", run.name]
    trained = run.words[0] == TRIED[0] and (folder / "result.json").exists()
    if run.words[0] == TRIED[0] and not trained:
        shutil.rmtree(folder, ignore_errors=True)  # it can't go on
    begun = checkpoint.exists(folder)
    if begun:
        refuse_another(folder, words[1:])
    before = minutes(folder) if begun else 0.0
    if FROM_DRAWN[0] in words:
        before += draw_first()
    started = time.monotonic()
    if not trained:
        call([*words, *(["--resume"] if begun else [])])
    taken = before + (time.monotonic() - started) / 60
    view1, view2 = (accuracy(folder, run, options.lfw, pairs) for pairs in (VIEW_1, VIEW_2))
    result = json.loads((folder / "result.json").read_text())
    told = json.loads((folder / "config.json").read_text())
    batch = told["options"]["batch_size"]
    score = None if run.group == "scaling" else result["validation"]  # another: of the best
    row = {
        "change": run.change,
        "seed": run.seed,
        "identities": told["identities"],
        "photos": told["photos"],
        "photos_seen": result["steps"] * batch,
        "minutes": f"{taken:.1f}",
        "validation": "" if score is None else f"{100 * score:.2f}",
        "view1": f"{100 * view1['mean']:.2f}",
        "view2": f"{100 * view2['mean']:.2f}",
        "view2_std": f"{100 * view2['std']:.2f}",
        "hardware": f"{told['hardware']}, torch {told['torch']}",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": told["commit"],
        "command": shlex.join(["python", *words]),
        "options": settings(run),
    }
    write_curves(run, folder, batch)
    if run.group == "peers":
        write_right(run, folder / Path(VIEW_2).stem)
    append(RESULTS / f"{run.group}.csv", HEAD, [row])


def draw_first() -> float:
    """Train what a run starts from on drawn faces, where that is not done -> minutes it took."""
    if not (config.DRAWN / manifest.NAME).exists():
        raise InputError(f"{config.DRAWN} is not there: python pre_process.py --draw 4500")
    folder = RUNS / "experiments" / "drawn"
    words = ["train.py", "--data", config.canonical(config.DRAWN), "--recipe", "drawn"]
    words += ["--runs", "runs/experiments", "--name", "drawn"]
    if not (folder / "result.json").exists():
        call([*words, *(["--resume"] if checkpoint.exists(folder) else [])])
    return minutes(folder)


def call(words: list[str]) -> None:
    """Run a script to its end; a signal is its own to handle, and it saves first."""
    print("$ python " + shlex.join(words), flush=True)
    child = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    stops = []

    def stop(number: int, _: object) -> None:
        stops.append(number)
        if number == signal.SIGTERM:  # a terminal's Ctrl-C reaches the child by itself
            child.terminate()

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    code = 128 - code if code in (-signal.SIGINT, -signal.SIGTERM) else code  # lfw_eval.py's
    if code in (130, 143):
        raise SystemExit(code)
    if stops:  # as it ended by itself
        raise SystemExit(128 + stops[0])
    if code:
        raise InputError(f"{words[0]} ended with {code}, see above: mend it and repeat the command")


def refuse_another(folder: Path, words: list[str]) -> None:
    """Raises InputError: what lies there was begun by other options, such as an older recipe."""
    changed = train.changes(config.read_run(folder), config.plain(parsed(words)))
    if changed:
        raise InputError(
            f"{folder} was begun with another {', '.join(changed)}: move it away, and repeat"
        )


def minutes(folder: Path) -> float:
    """That a run has taken so far, by its event files."""
    files = [path for path in folder.glob(training_curves.EVENTS) if path.stat().st_size]
    begun = [float(path.name.split(".")[3]) for path in files]  # its name says when
    spans = (path.stat().st_mtime - start for path, start in zip(files, begun, strict=True))
    return sum(max(span, 0.0) for span in spans) / 60


def accuracy(folder: Path, run: Run, lfw: Path, pairs: str) -> dict[str, float]:
    out = folder / Path(pairs).stem
    call(["lfw_eval.py", "--data", str(lfw), "--pairs", str(lfw / pairs), "--model",
          str(model_of(folder, run)), "--out", str(out)])  # fmt: skip
    return json.loads((out / "eval.json").read_text())["accuracy"]


def model_of(folder: Path, run: Run) -> Path:
    if run.group == "scaling":  # the last weights: few people are held out to choose better ones
        return folder / checkpoint.LAST
    graph = folder / "reference.onnx"  # of a network that is none of ours
    return graph if "reference" in run.words else folder


def write_right(run: Run, report: Path) -> None:
    """Which pairs of View 2 it judged rightly, of lfw_eval.py's own list."""
    folds: dict[str, str] = {}
    for pair in read(report / "pairs.csv"):
        folds[pair["fold"]] = folds.get(pair["fold"], "") + pair["judged_right"]
    run.right.parent.mkdir(exist_ok=True)
    checkpoint.write_atomic(run.right, "".join(f"{fold}\n" for fold in folds.values()).encode())


def read_right(run: Run) -> np.ndarray:
    """bool (N,). Raises InputError: not there."""
    try:
        digits = "".join(run.right.read_text().split())
    except FileNotFoundError:
        raise InputError(
            f"{run.right} is not there: take the run's row out of results/peers.csv, and repeat"
        ) from None
    return np.array([digit == "1" for digit in digits])


def compare(runs: list[Run]) -> None:
    """McNemar's test of each run of ours against each of the others, on the same pairs."""
    right = [(run.change, read_right(run)) for run in runs]
    ours = [run.words[: len(OURS)] == OURS for run in runs]
    rows = comparison.tests_of(
        (right[a], right[b]) for a, b in itertools.combinations(range(len(runs)), 2) if ours[a]
    )
    checkpoint.write_atomic(
        RESULTS / "mcnemar.csv", comparison.as_csv([list(comparison.TESTS), *rows])
    )


def part_of(data: Path, part: int) -> Path:
    """A prepared folder with one in so many of the identities, whose crops are those of `data`."""
    if part == 1:
        return data
    out = data.with_name(f"{data.name}-1of{part}")
    faces = data_gen.load_faces(data)
    names = np.array(faces.identities)
    kept = set(np.random.default_rng(0).permutation(names)[: len(names) // part].tolist())
    out.mkdir(exist_ok=True)
    images, crops = out / "images", (data / "images").resolve()
    if images.is_symlink() and images.resolve() != crops:  # they lay elsewhere then
        images.unlink()
    if not images.exists():
        images.symlink_to(crops)
    rows = read(data / manifest.NAME)
    write(out / manifest.NAME, tuple(rows[0]), [row for row in rows if row["identity"] in kept])
    return out


# --------------------------------------------------------------------------------------------------
# CSV


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, head: tuple[str, ...], rows: list[dict]) -> None:
    write(path, head, [*read(path), *rows])


def write(path: Path, head: tuple[str, ...], rows: list[dict]) -> None:
    table = [list(head), *([row[key] for key in head] for row in rows)]
    checkpoint.write_atomic(path, comparison.as_csv(table))


def write_curves(run: Run, folder: Path, batch: int) -> None:
    """Validation after each epoch, and the loss there, for the pictures."""
    curves = training_curves.read(folder)
    if not {"validation/accuracy", "train/loss"} <= curves.keys():
        print(f"WARNING: {folder} has lost its events: no curves of it", file=sys.stderr)
        return
    scores, losses = curves["validation/accuracy"], curves["train/loss"]
    rows = [
        {
            "photos_seen": int(step) * batch,
            "validation": f"{100 * value:.2f}",
            "loss": f"{np.interp(step, losses.steps, losses.values):.3f}",
        }
        for step, value in zip(scores.steps, scores.values, strict=True)
    ]
    run.curves.parent.mkdir(exist_ok=True)
    write(run.curves, ("photos_seen", "validation", "loss"), rows)


if __name__ == "__main__":
    config.run(main, config.parse(Options, __doc__))
