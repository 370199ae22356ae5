"""Verification on LFW, or on any list of face pairs: accuracy, curves, and every pair it got wrong.

On what `make demo` prepared and trained (no argument needed):
    python lfw_eval.py

On LFW, with a run of train.py:
    python pre_process.py --src path/to/lfw-deepfunneled.tgz --out data/lfw --keep-undetected
    python lfw_eval.py --data data/lfw --pairs path/to/pairs.txt --model runs/first

With a foreign network (the report then goes to runs/<file name>/lfw):
    python lfw_eval.py --data data/lfw --pairs path/to/pairs.txt --model other.onnx

A list of pairs is LFW's pairs.txt, or lines of path<TAB>path<TAB>label with an optional fold.
The report: eval.json, theta_dist.png, roc.png, and pages of false positives and false negatives.
Embeddings are kept beside it, so a second run embeds only photos that are new or changed.
"""

import config

if __name__ == "__main__":
    # Before torch is imported: --help and a wrong option answer at once.
    OPTIONS = config.parse(config.EvalOptions, __doc__)

import dataclasses
import hashlib
import io
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import numpy as np
import safetensors
import safetensors.numpy
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import data_gen
import protocol
import utils
from checkpoint import BEST, sha256, write_atomic, write_json
from config import InputError
from data_gen import SIDE, Photo
from images import write_jpeg

FARS = {"1e-2": 1e-2, "1e-3": 1e-3}
CACHE = "embeddings.safetensors"
SAVE_EVERY = 30  # seconds of embedding that a kill may cost
BLUE, ORANGE = "#1f6fb4", "#d95f02"  # genuine, impostor: told apart by the colour-blind too


def main(options: config.EvalOptions) -> None:
    started = time.perf_counter()
    options = with_defaults(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = utils.pick_device(options.device)

    # --- what is compared: pairs -> photos, each once
    pairs = protocol.read_pairs(options.pairs)
    photos, left, right = data_gen.find_photos(
        pairs, options.data
    )  # left, right: (N,) index into photos
    hashes = [hash_crop(photo) for photo in photos]
    model_file = utils.model_file(options.model)
    if model_file.suffix == ".onnx":
        device = torch.device("cpu")  # onnxruntime's CPU provider
    out = report_folder(options, model_file)

    # --- embeddings, from the last run or from the network
    model_hash = sha256(model_file)
    cache = Cache(out / CACHE, options, model_hash)
    missing = [index for index, key in enumerate(hashes) if key not in cache.rows]
    seconds = 0.0
    if missing:
        model = utils.load_backbone(
            options.model, device, options.input_mean, options.input_std
        )  # raises for another kind of file, before anything is written
        make_folder(out)
        seconds = embed_photos(model, [photos[index] for index in missing], cache, options)
    embeddings = np.stack([cache.rows[key] for key in hashes])  # (P, E) of P photos
    check_embeddings(embeddings, photos, model_file)

    # --- the numbers
    angles = protocol.theta(embeddings[left], embeddings[right])  # (N,) degrees
    folds = protocol.kfold_accuracy(angles, pairs.same, pairs.fold)
    thresholds = folds.threshold[pairs.fold]  # (N,) the one that judged each pair
    wrong = (angles < thresholds) != pairs.same  # (N,)
    result = {
        "model": {"name": model_name(options.model, model_file), "sha256": model_hash},
        "data": {
            "set": options.data.resolve().name,
            "pairs": options.pairs.name,
            "pairs_sha256": sha256(options.pairs),
            "crops_sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
            "photos": len(photos),
            "undetected": [photo.source for photo in photos if photo.undetected],
        },
        "flip": options.flip,
        **measure(pairs, angles, folds),
    }

    # --- the report; eval.json comes last, so where it is the rest is too
    make_folder(out)
    (out / "eval.json").unlink(missing_ok=True)
    draw_theta(out / "theta_dist.png", angles, pairs.same, folds, result)
    draw_roc(out / "roc.png", angles, pairs.same, result)
    for name, kind in (("false_positives", ~pairs.same), ("false_negatives", pairs.same)):
        shown = np.flatnonzero(wrong & kind)
        shown = shown[np.argsort(-np.abs(angles - thresholds)[shown], kind="stable")]
        rows = [
            (photos[left[pair]], photos[right[pair]], angles[pair], thresholds[pair])
            for pair in shown
        ]
        draw_gallery(out, name, rows)
    write_json(
        out / "run.json",
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": utils.commit(),
            "command": sys.argv,
            "options": {key: str(value) for key, value in dataclasses.asdict(options).items()},
            "hardware": utils.hardware(device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - started, 2),
            "photos_embedded": len(missing),
            "photos_per_second": round(len(missing) / seconds, 2) if missing else None,
        },
    )
    write_json(out / "eval.json", result)
    print_summary(result, wrong & ~pairs.same, wrong & pairs.same, out)


# --- options and input ----------------------------------------------------------------------------


def with_defaults(options: config.EvalOptions) -> config.EvalOptions:
    """Fill in what was not named: LFW where the user has own photos, else the synthetic faces."""
    data, model = options.data, options.model
    if data is None:
        own = config.RAW.is_dir()
        data = config.DATA / "lfw" if own else config.SYNTHETIC / "test"
        if own and not data.is_dir():
            raise InputError(
                f"{data} is not there: prepare a test set (python pre_process.py --src lfw.tgz "
                "--out data/lfw --keep-undetected), or name one with --data"
            )
        what = "LFW" if own else "the embedded synthetic faces"
        print(f"no --data named: using {what}, {data}")
    if model is None:
        model = config.RUNS / ("faces" if config.RAW.is_dir() else "demo")
        print(f"no --model named: using {model}")
    if not data.is_dir():
        raise InputError(f"{data} is not there: prepare it first (python pre_process.py)")
    pairs = options.pairs or data / "pairs.txt"
    return dataclasses.replace(options, data=data, pairs=pairs, model=model)


def report_folder(options: config.EvalOptions, model_file: Path) -> Path:
    """`--out`, else lfw/ in the model's run folder, else runs/<stem of the model file>/lfw."""
    if options.out is not None:
        return options.out
    home = model_file.parent if model_file.name == BEST else config.RUNS / model_file.stem
    return home / "lfw"


def model_name(model: Path, model_file: Path) -> str:
    return model_file.resolve().parent.name if model_file.name == BEST else model.name


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"{out} cannot be a folder, a file is in its place: name another --out"
        ) from None


def hash_crop(photo: Photo) -> str:
    try:
        return hashlib.sha256(photo.crop.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"{photo.crop} cannot be read ({error.strerror}): run pre_process.py again"
        ) from None


# --- embeddings -----------------------------------------------------------------------------------


class Cache:
    """Embeddings of earlier runs: sha256 of a crop's file -> float32 (E,).

    Held against the model's hash and whatever else enters an embedding; with any of these changed
    it is empty. A damaged file is the same as none: the rows have their own hash.
    """

    def __init__(self, path: Path, options: config.EvalOptions, model_hash: str):
        self.path = path
        self.key = json.dumps([model_hash, options.flip, options.input_mean, options.input_std])
        self.rows: dict[str, np.ndarray] = {}
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                hashes, rows = file.get_tensor("crops"), file.get_tensor("embeddings")
            if metadata != self._metadata(hashes, rows):
                return
        except (OSError, safetensors.SafetensorError):  # not there, damaged, of an older version
            return
        self.rows = {key.tobytes().hex(): row for key, row in zip(hashes, rows, strict=True)}

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
    model: torch.nn.Module, photos: list[Photo], cache: Cache, options: config.EvalOptions
) -> float:
    """Embed each photo into the cache; seconds spent. What was done when stopped is kept."""
    progress = utils.Progress(len(photos), "embedding")
    start = saved = time.perf_counter()
    try:
        for first in range(0, len(photos), options.batch_size):
            batch = photos[first : first + options.batch_size]
            crops = np.stack(
                [data_gen.read_crop(photo.crop) for photo in batch]
            )  # (B, 112, 112, 3)
            rows = utils.embed(model, crops, options.flip)  # (B, E)
            cache.rows.update((hash_crop(p), row) for p, row in zip(batch, rows, strict=True))
            progress.update(len(batch))
            if time.perf_counter() - saved > SAVE_EVERY:
                cache.save()
                saved = time.perf_counter()
    finally:
        progress.close()
        cache.save()
    return time.perf_counter() - start


def check_embeddings(embeddings: np.ndarray, photos: list[Photo], model_file: Path) -> None:
    """A broken network must not get a score: NaN and zero have no angle."""
    usable = np.isfinite(embeddings).all(axis=1) & embeddings.any(axis=1)  # (P,)
    if not usable.all():
        first = photos[int(np.argmin(usable))].source
        raise InputError(
            f"{model_file}: no usable embedding (zero or not finite) for {(~usable).sum()} of "
            f"{len(photos)} photos, the first is {first}: the model is broken, train it again"
        )


# --- numbers --------------------------------------------------------------------------------------


def measure(pairs: protocol.Pairs, angles: np.ndarray, folds: protocol.Folds) -> dict:
    """The numbers of eval.json. Rounded, so that the last digits of a sum do not show."""
    same = pairs.same
    tuned, tuned_threshold = protocol.tuned_accuracy(angles, same)
    separation = protocol.d_prime(angles, same)

    def rate(value: float | None) -> float | None:
        return None if value is None else round(float(value), 6)

    def degrees(value: float) -> float:
        return round(float(value), 4)

    return {
        "pairs": {
            "scored": len(angles),
            "listed": len(pairs),
            "genuine": int(same.sum()),
            "impostor": int((~same).sum()),
            "folds": pairs.folds_from,
        },
        "accuracy": {
            "mean": rate(folds.mean),
            "std": rate(folds.std),
            "standard_error": rate(folds.standard_error),
            "per_fold": [rate(value) for value in folds.accuracy],
            "threshold_degrees_per_fold": [degrees(value) for value in folds.threshold],
        },
        "threshold_tuned_on_test_pairs": {
            "accuracy": rate(tuned),
            "threshold_degrees": degrees(tuned_threshold),
        },
        "auc": rate(protocol.auc(angles, same)),
        "eer": rate(protocol.eer(angles, same)),
        "tar_at_far": {
            name: rate(protocol.tar_at_far(angles, same, far)) for name, far in FARS.items()
        },
        "d_prime": rate(separation),
        "theta_degrees": {
            name: {"mean": degrees(angles[kind].mean()), "sigma": degrees(angles[kind].std())}
            for name, kind in (("genuine", same), ("impostor", ~same))
        },
    }


def print_summary(
    result: dict, false_positives: np.ndarray, false_negatives: np.ndarray, out: Path
) -> None:
    pairs, accuracy, theta = result["pairs"], result["accuracy"], result["theta_degrees"]
    cuts, tuned = accuracy["threshold_degrees_per_fold"], result["threshold_tuned_on_test_pairs"]
    undetected = result["data"]["undetected"]
    names = ", ".join(data_gen.without_suffix(source) for source in undetected[:5])
    more = f" and {len(undetected) - 5} more (eval.json)" if len(undetected) > 5 else ""
    lines = {
        "model": f"{result['model']['name']}, sha256 {result['model']['sha256'][:12]}, "
        + ("crop + mirror image" if result["flip"] else "one crop"),
        "pairs": f"{pairs['scored']} of {pairs['listed']} pairs scored "
        f"({pairs['genuine']} genuine, {pairs['impostor']} impostor; {pairs['folds']})",
        "photos": f"{result['data']['photos']} of {result['data']['set']}, "
        + (f"{len(undetected)} with fixed landmarks (undetected): {names}{more}" if undetected
           else "all with a detected face"),
        "accuracy": f"{100 * accuracy['mean']:.2f} % ± {100 * accuracy['std']:.2f} over "
        f"{len(cuts)} folds, standard error {100 * accuracy['standard_error']:.2f}",
        "threshold": f"{np.mean(cuts):.2f}° ({min(cuts):.2f}° to {max(cuts):.2f}° over the folds)",
        "tuned": f"{100 * tuned['accuracy']:.2f} % with the threshold chosen on the test pairs "
        f"({tuned['threshold_degrees']:.2f}°; for comparison with older papers only)",
        "AUC": f"{100 * result['auc']:.3f} %",
        "EER": f"{100 * result['eer']:.2f} %",
        **{f"TAR@FAR={far}": percent(tar) for far, tar in result["tar_at_far"].items()},
        "theta": ", ".join(
            f"{kind} {theta[kind]['mean']:.1f}° ± {theta[kind]['sigma']:.1f}°" for kind in theta
        ),
        "wrong": f"{false_positives.sum()} false positives, "
        f"{false_negatives.sum()} false negatives",
        "report": str(out),
    }  # fmt: skip
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:{width}}  {text}")


def percent(value: float | None) -> str:
    return "n/a (too few impostor pairs)" if value is None else f"{100 * value:.2f} %"


# --- pictures -------------------------------------------------------------------------------------


def draw_theta(
    path: Path, angles: np.ndarray, same: np.ndarray, folds: protocol.Folds, result: dict
) -> None:
    """Histograms of both kinds of angles, the normals fitted to them, and the threshold."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    low = np.floor(angles.min())
    high = max(np.ceil(angles.max()), low + 1)  # all angles may be equal
    bins = np.linspace(low, high, max(int(high - low), 30) + 1)  # of one degree, or finer
    grid = np.linspace(low, high, 500)
    for name, kind, colour in (("genuine", same, BLUE), ("impostor", ~same, ORANGE)):
        mean, sigma = angles[kind].mean(), angles[kind].std()
        label = f"{name}: mean {mean:.1f}°, sigma {sigma:.1f}° (n = {kind.sum()})"
        axes.hist(angles[kind], bins, density=True, color=colour, alpha=0.4, label=label)
        if sigma > 0:
            normal = np.exp(-0.5 * ((grid - mean) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
            axes.plot(grid, normal, color=colour, linewidth=1.8)
    cut = folds.threshold.mean()
    label = f"threshold {cut:.1f}° ({folds.threshold.min():.1f}° to {folds.threshold.max():.1f}°)"
    axes.axvline(cut, color="black", linestyle="--", linewidth=1.2, label=label)
    axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlabel("angle between the two embeddings (degrees)")
    axes.set_ylabel("density")
    axes.set_title(title(result))
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def draw_roc(path: Path, angles: np.ndarray, same: np.ndarray, result: dict) -> None:
    """TAR over FAR on a log axis, from half of one impostor pair to all."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    far, tar = protocol.roc(angles, same)
    left = 0.5 / (~same).sum()
    axes.plot(np.maximum(far, left), tar, color=BLUE, label=f"AUC {100 * result['auc']:.3f} %")
    for name, value in result["tar_at_far"].items():
        if value is not None:
            label = f"TAR@FAR={name}: {100 * value:.2f} %"
            axes.plot(FARS[name], value, "o", color=ORANGE, label=label)
    axes.axvline(result["eer"] or left, color="grey", linewidth=0.8, linestyle=":",
                 label=f"EER {100 * result['eer']:.2f} %")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(left, 1)
    bottom = tar[np.searchsorted(far, 0, side="right") - 1]  # TAR where no impostor is let in
    axes.set_ylim(max(0.0, bottom - 0.1 * (1 - bottom) - 0.005), 1.002)
    axes.set_xlabel("FAR, share of impostor pairs accepted")
    axes.set_ylabel("TAR, share of genuine pairs accepted")
    axes.set_title(title(result))
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    save_figure(figure, path)


def title(result: dict) -> str:
    accuracy = result["accuracy"]
    return (
        f"{result['model']['name']} on {result['data']['set']}: "
        f"{100 * accuracy['mean']:.2f} % ± {100 * accuracy['std']:.2f}"
    )


def save_figure(figure: Figure, path: Path) -> None:
    # A Figure of its own, without pyplot: nothing global, and Agg draws it without a display.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


COLUMNS, ROWS, GAP, TEXT = 5, 8, 12, 48  # pairs a row, rows a page; pixels of space and of text


def draw_gallery(out: Path, name: str, rows: list[tuple[Photo, Photo, float, float]]) -> None:
    """All wrong pairs, the worst first, on as many numbered pages as they need.

    `rows` holds both photos, their angle, and the threshold that judged them. Pages of an earlier
    run that are too many now are removed.
    """
    size = COLUMNS * ROWS
    pages = [rows[first : first + size] for first in range(0, len(rows), size)] or [[]]
    kept = set()
    for number, page in enumerate(pages, 1):
        path = out / f"{name}_{number:02d}.jpg"
        heading = f"{name.replace('_', ' ').capitalize()}: {len(rows)}, the worst first"
        if len(pages) > 1:
            heading += f" (page {number} of {len(pages)})"
        write_jpeg(path, draw_page(heading if rows else f"No {name.replace('_', ' ')}", page))
        kept.add(path)
    for old in set(out.glob(f"{name}_*.jpg")) - kept:
        old.unlink()


def draw_page(heading: str, page: list[tuple[Photo, Photo, float, float]]) -> np.ndarray:
    """One page of pairs -> uint8 (H, W, 3)."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # shipped with matplotlib
    small, bold = (
        ImageFont.truetype(fonts / file, points)
        for file, points in (("DejaVuSans.ttf", 11), ("DejaVuSans-Bold.ttf", 13))
    )
    width, height = 2 * SIDE + 2 + 2 * GAP, SIDE + TEXT + 2 * GAP
    columns = min(COLUMNS, max(len(page), 2))
    lines = -(-len(page) // COLUMNS)
    canvas = Image.new("RGB", (columns * width + GAP, lines * height + 40), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, 12), heading, "black", bold)
    for place, (left, right, angle, threshold) in enumerate(page):
        x, y = GAP + place % COLUMNS * width, 40 + place // COLUMNS * height
        canvas.paste(Image.fromarray(data_gen.read_crop(left.crop)), (x, y))
        canvas.paste(Image.fromarray(data_gen.read_crop(right.crop)), (x + SIDE + 2, y))
        side = "over" if angle >= threshold else "under"
        text = f"{angle:.1f}°, {abs(angle - threshold):.1f}° {side} {threshold:.1f}°"
        draw.text((x, y + SIDE + 2), text, "black", bold)
        for line, photo in enumerate((left, right)):
            name = photo.label + (" (undetected)" if photo.undetected else "")
            fit = shorten(name, lambda text: small.getlength(text) <= 2 * SIDE + GAP)
            draw.text((x, y + SIDE + 18 + 14 * line), fit, "#444444", small)
    return np.asarray(canvas)


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """Cut the middle out of a long name: its end tells the photo."""
    short, keep = text, len(text)
    while not fits(short) and keep > 8:
        keep -= 1
        short = text[: keep // 2] + "…" + text[-(keep - keep // 2) :]
    return short


if __name__ == "__main__":
    config.run(main, OPTIONS)
