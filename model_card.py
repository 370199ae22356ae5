"""The page that goes with published weights: what they are, were trained on, can do and must not.

text("first-se-r18", Path("runs/first/best.safetensors"), sha256, metadata, files, network)

Figures come from the run's config.json and result.json, from the weights' own metadata, and from
the eval.json of reports on these very weights (by their sha256). What is not there is said to be
not measured or unknown; nothing is made up.
"""

import hashlib
import json
from pathlib import Path

from torch import nn

import config
import models
import utils
from checkpoint import BEST
from download import LFW_PAIRS

UNKNOWN = "unknown"
VIEW_2 = LFW_PAIRS[0].sha256
MARGINS = {"arcface": ("m",), "cosface": ("m3",), "combined": ("m1", "m", "m3")}  # their own
SETTINGS = (
    "s", "easy_margin", "focal_gamma", "head", "sample_rate", "epochs", "batch_size", "lr",
    "lr_batch", "schedule", "milestones", "warmup", "weight_decay", "dropout", "augment",
    "min_images", "seed",
)  # fmt: skip
# Values that mean "not used", which are left out; None: whatever it is.
OFF = {
    "easy_margin": False, "focal_gamma": 0, "sample_rate": 1, "lr_batch": 0, "milestones": None,
    "warmup": 0, "weight_decay": 0, "dropout": 0, "augment": "none",
    "min_images": 1,
}  # fmt: skip


def text(
    name: str,
    source: Path,
    digest: str,
    metadata: dict[str, str],
    files: dict[str, bytes],
    network: nn.Module,
) -> str:
    """Markdown. `files` are those that the card goes with: name -> content.

    `digest` is the sha256 of `source` as it was when the network was read.
    """
    run = source.parent if source.name == BEST else None
    trained = read_json(run / "config.json") if run else {}
    result = read_json(run / "result.json") if run else {}
    parts = [
        f"# {name}",
        about(metadata, network),
        "## Files",
        *(
            f"- `{file}`: sha256 `{hashlib.sha256(data).hexdigest()}`"
            for file, data in files.items()
        ),
        f"- made from a file with sha256 `{digest}`, whose embeddings in PyTorch they give to a "
        "cosine of 0.99999 or better on drawn patterns",
        "",
        "## Training data and protocol",
        *training(metadata, trained, result),
        "",
        "## Figures",
        *validation(metadata),
        "",
        *tests(utils.home_of(source), digest),
        "",
        *advice(metadata),
    ]
    return "\n".join(parts) + "\n"


def about(metadata: dict[str, str], network: nn.Module) -> str:
    millions = models.count_parameters(network) / 1e6
    side = metadata.get("resolution", str(models.CROP))
    seen = "" if side == str(models.CROP) else f"; it shrinks the crops to {cell(side)} px"
    if metadata.get("precision") == "fp16":
        seen += "; matrices and kernels are rounded to fp16"
    return (
        f"\nFace embeddings: {metadata['network']}, width {metadata['width']}, {millions:.2f} M "
        f"parameters{seen}.\n\nIn: float32 (N, 3, 112, 112), {cell(metadata['input'])},\n"
        "faces aligned by five landmarks as this repo's `pre_process.py` does it.\n"
        f"Out: float32 (N, {metadata['embedding_size']}), not normalised; compare by the angle "
        "between two.\n"
    )


def training(metadata: dict[str, str], trained: dict, result: dict) -> list[str]:
    """Lines about data and settings; of weights by others, that they are not known here."""
    if "source" in metadata:
        return [
            f"Trained by others, taken in from `{cell(metadata['source'])}`. Its training data and "
            "protocol are unknown here: ask whoever published it, also about the licence."
        ]
    options = trained.get("options")
    options = options if isinstance(options, dict) else {}
    origin = metadata.get("init", "random weights" if options else UNKNOWN)
    lines = [
        f"- data: {folder(options.get('data'))}, {count(metadata, 'photos')} photos of "
        f"{count(metadata, 'identities')} identities in training; where they come from, and "
        "whether the people in them were asked, is for whoever publishes this to say",
        f"- started from: {cell(origin)}"
        + (" (whose training data count, too)" if fine_tuned(metadata) else ""),
    ]
    lines.append(f"- settings: {', '.join(settings(options)) or UNKNOWN}")
    steps = cell(result.get("steps", "the run has not finished" if options else UNKNOWN))
    lines.append(
        f"- steps: {steps}; "
        f"hardware: {cell(trained.get('hardware', UNKNOWN))}; precision: "
        f"{cell(trained.get('precision', UNKNOWN))}; torch {cell(trained.get('torch', UNKNOWN))}"
    )
    commit = trained.get("commit") or metadata.get("commit", UNKNOWN)  # all of a stopped run's
    lines.append(f"- code: commit {cell(commit)}; exported at {cell(metadata['export_commit'])}")
    return lines


def fine_tuned(metadata: dict[str, str]) -> bool:
    return config.has_seen_photos(metadata.get("init", ""))


def settings(options: dict) -> list[str]:
    """What shaped the weights, without what the run had switched off or its margin does not use."""
    wanted = ("margin", *MARGINS.get(str(options.get("margin")), ()), *SETTINGS)
    off = dict(OFF)
    if options.get("schedule") == "step":
        del off["milestones"]
    found = []
    for key in wanted:
        value = options.get(key)
        if key not in options or (key in off and off[key] in (None, value)):
            continue
        words = value if isinstance(value, list) else [value]
        found.append(f"{key} {' '.join(map(cell, words))}")
    return found


def validation(metadata: dict[str, str]) -> list[str]:
    """Of the run itself, and the threshold that the weights carry."""
    accuracy = number(metadata.get("validation_accuracy"))
    lines = ["- validation: not measured"]
    if accuracy is not None:
        lines = [
            f"- validation: {100 * accuracy:.2f} % of pairs of people held out of training, or of "
            "pairs given for it. The weights are the best epoch by this figure, which flatters it"
        ]
    degrees, far = (number(metadata.get(f"threshold_{key}")) for key in ("degrees", "far"))
    if degrees is None or far is None:
        return [*lines, "- threshold: not measured; choose one on pairs of your own"]
    pairs = f"{count(metadata, 'threshold_impostor_pairs')} impostor pairs"
    if "threshold_from" in metadata:
        pairs += f" of {cell(metadata['threshold_from'])}"
    if fine_tuned(metadata):
        pairs += " (people whom the weights it started from may have seen)"
    tar = number(metadata.get("threshold_tar"))
    genuine = "" if tar is None else f", and {100 * tar:.1f} % of the genuine pairs there"
    return [
        *lines,
        f"- threshold: {degrees:.2f} degrees, below which two photos are taken for one person. It "
        f"accepted {100 * far:g} % of {pairs}{genuine}; other people, "
        "cameras and ages give other rates",
    ]


def tests(home: Path, digest: str) -> list[str]:
    """A table of the reports on these weights. View 2 is named only where the list is LFW's own."""
    rows, other = [], []
    for path in sorted(home.glob("*/eval.json")):
        found = read_json(path)
        try:
            if found["model"]["sha256"] != digest:
                other.append(path.parent.name)
                continue
            rows.append(row(found))
        except (KeyError, TypeError, ValueError):  # of another version, or damaged
            other.append(path.parent.name)
    note = ""
    if other:
        names = ", ".join(cell(name) for name in other)
        note = f" Reports not cited, as they are of other weights or unreadable: {names}."
    if not rows:
        return [f"- test sets (LFW and others): not measured.{note}"]
    head = [
        "| test | pairs | accuracy | threshold chosen on | TAR@FAR=1e-3 |",
        "|---|---|---|---|---|",
    ]
    return [*head, *rows, f"\n± is the standard deviation over the folds.{note}"]


def row(found: dict) -> str:
    data, accuracy, pairs = found["data"], found["accuracy"], found["pairs"]
    view_2 = data["pairs_sha256"] == VIEW_2
    named = "LFW, View 2" if view_2 else f"{cell(data['set'])}, {cell(data['pairs'])}"
    folds = len(accuracy["per_fold"])
    tar = found["tar_at_far"]["1e-3"]
    tar = "not measured" if tar is None else f"{100 * tar:.1f} %"
    return (
        f"| {named}{', crop + mirror image' if found['flip'] else ', one crop'} "
        f"| {pairs['scored']:,} | {100 * accuracy['mean']:.2f} % ± {100 * accuracy['std']:.2f} "
        f"| the other {folds - 1} folds | {tar} |"
    )


def advice(metadata: dict[str, str]) -> list[str]:
    foreign = "source" in metadata or fine_tuned(metadata)
    return [
        "## Limits",
        "- Errors by age, sex, skin colour, pose, picture quality and camera were not measured.",
        "- Whether people of a test set are among those trained on is not looked at here.",
        "- Nothing here tells a photo of a photo, a mask or a generated face from a person.",
        "- Faces must be found and aligned first; what fails there is in no figure above.",
        "- Embeddings are biometric data: faces can be told, and partly drawn again, from them.",
        "",
        "## Intended use",
        "Research on face verification, and measuring such systems, with photos that may be used.",
        "",
        "Not for: deciding alone about anybody's access, money, work, freedom or rights; watching",
        "people who have not been asked or cannot refuse; guessing traits such as origin, health",
        "or character. Do not deploy it before its errors on the people concerned are measured.",
        *(["", "The licence and terms of the original weights apply."] if foreign else []),
    ]


def read_json(path: Path) -> dict:
    """Empty where it is absent or damaged: what is not known is said so."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def number(said: str | None) -> float | None:
    """None where it is not there or NaN."""
    try:
        value = float(said) if said is not None else None
    except ValueError:
        return None
    return value if value == value else None


def count(metadata: dict[str, str], key: str) -> str:
    said = metadata.get(key, "")
    return f"{int(said):,}" if said.isdecimal() else "an unknown number of"


def folder(said: object) -> str:
    """The last part of a path alone: the rest says where somebody keeps it."""
    return f"`{cell(Path(str(said)).name)}`" if said else UNKNOWN


def cell(said: object) -> str:
    """One line of text that ends no table cell."""
    return " ".join(str(said).split()).replace("|", "\\|").replace("`", "'")
