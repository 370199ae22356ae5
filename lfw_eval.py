"""Verification on LFW, or on any list of face pairs: accuracy, curves, and every pair it got wrong.

On what `make demo` prepared and trained (no argument needed):
    python lfw_eval.py

On LFW, with the first of runs/faces, runs/cpu and the weights that ship, and with a run:
    python pre_process.py --src path/to/lfw-deepfunneled.tgz --out data/lfw --keep-undetected
    python lfw_eval.py --data data/lfw --pairs path/to/pairs.txt
    python lfw_eval.py --data data/lfw --pairs path/to/pairs.txt --model runs/first

On a verification set of InsightFace, whose crops are in the file:
    python lfw_eval.py --pairs agedb_30.bin --model runs/first

With a foreign network (the report then goes to runs/<file name>/), or several to compare:
    python lfw_eval.py --data data/lfw --pairs path/to/pairs.txt --model runs/first other.onnx
    python lfw_eval.py --data data/lfw --pairs path/to/pairs.txt --model backbone.pth --network r50

A list of pairs is LFW's pairs.txt, or lines of path<TAB>path<TAB>label with an optional fold.
Of each model: report.html, with all numbers and every wrongly judged pair, eval.json (the same
bytes for the same input), pairs.csv (each pair's angle and threshold, and whether it was judged
rightly), run.json (date, commit, hardware, speed), theta_dist.png, roc.png.
Of several: the same in a folder each, and a comparison as report.html, .csv and .md.
Embeddings are kept beside it, so a second run embeds only photos that are new or changed.
"""

import config

if __name__ == "__main__":
    # Before torch is imported: --help and a wrong option answer at once.
    OPTIONS = config.parse(config.EvalOptions, __doc__)

import dataclasses
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

import comparison
import embeddings
import plots
import report
import scores
import utils
import verification_set
from checkpoint import BEST, write_atomic, write_json
from config import InputError
from verification_set import VerificationSet, is_packed, printable


class Model(NamedTuple):
    name: str
    given: Path  # as on the command line
    file: Path
    out: Path  # where its report goes


def main(options: config.EvalOptions) -> None:
    utils.commit()  # as it is now: embedding takes minutes
    options = with_defaults(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = utils.pick_device(options.device)
    utils.keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # full float32: a card's figures are a CPU's

    tests = verification_set.load(options.data, options.pairs)
    models = name_models(options, tests)
    for model in models[1:]:  # what can't be loaded is told before the first one is evaluated
        utils.load_backbone(
            model.given, device, options.input_mean, options.input_std, network=options.network
        )
    judged, runs = [], []
    for model in models:
        said, run = evaluate(model, tests, options, device)
        judged.append(said)
        runs.append(run)

    if len(models) == 1:
        lines = scores.summary(judged[0])
        width = max(map(len, lines))
        for name, text in lines.items():
            print(f"{name:{width}}  {text}")
        return
    out = options.out or config.RUNS / "comparison" / list_name(tests)
    embeddings.make_folder(out)
    comparison.write(out, tests, judged, runs[0])
    pairs, errors = judged[0].result["pairs"], comparison.mcnemar_rows(judged)
    print(f"{pairs['scored']} of {pairs['listed']} pairs scored, {pairs['folds']}\n")
    print(comparison.console(comparison.COLUMNS, comparison.rows(judged)), end="\n\n")
    print(comparison.console(comparison.TESTS, errors), end="\n\n")
    print(f"report: {out / 'report.html'}")


def evaluate(
    model: Model, tests: VerificationSet, options: config.EvalOptions, device: torch.device
) -> tuple[scores.Scores, dict]:
    """Embed, score, and write one model's report; eval.json comes last: with it, all is there."""
    started = time.perf_counter()
    embedded = embeddings.embed_set(tests, model.given, model.file, model.out, options, device)
    judged = scores.score(model.name, model.out, tests, embedded, options.flip, options.bootstrap)
    run = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": utils.commit(),
        "command": [printable(word) for word in sys.argv],
        "options": {key: shown(value) for key, value in dataclasses.asdict(options).items()},
        "hardware": utils.hardware(embedded.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "photos_embedded": embedded.new,
        "photos_per_second": round(embedded.new / embedded.seconds, 2) if embedded.new else None,
    }

    embeddings.make_folder(model.out)
    title = scores.title(judged.result)
    theta = plots.theta_figure(judged.angles, tests.same, judged.thresholds)
    roc = plots.roc_figure([judged], tests.same)
    theta_svg, roc_svg = (plots.svg(figure, f"{what} of {title}") for figure, what in (
        (theta, "Histogram of angles"), (roc, "ROC curve")))  # fmt: skip
    plots.save_png(theta, model.out / "theta_dist.png", title)
    plots.save_png(roc, model.out / "roc.png", title)
    report.write(model.out / "report.html", tests, judged, run, theta_svg, roc_svg)
    write_atomic(model.out / "pairs.csv", comparison.as_csv(scores.pair_rows(tests, judged)))
    run["seconds"] = round(time.perf_counter() - started, 2)
    write_json(model.out / "run.json", run)
    write_json(model.out / "eval.json", judged.result)
    return judged, run


# --- options --------------------------------------------------------------------------------------


def with_defaults(options: config.EvalOptions) -> config.EvalOptions:
    """Fill in what was not named: LFW, but for a network that was trained on the drawn faces."""
    data, model = options.data, options.model
    packed = options.pairs is not None and is_packed(options.pairs)
    if packed and data is not None:
        raise InputError(f"{options.pairs} holds its crops itself: leave --data out")
    if model is None:
        demo_too = [config.default_run()] if data is None and not packed else []
        model = (config.default_model(*demo_too),)
        print(f"no --model named: using {model[0]}")
    if data is None and not packed:
        drawn = all(map(config.knows_drawn_faces, model))
        data = config.SYNTHETIC / "test" if drawn else config.DATA / "lfw"
        what = "the embedded synthetic faces" if drawn else "LFW"
        print(f"no --data named: using {what}, {data}")
    utils.check_foreign(model, options.network, options.input_mean, options.input_std)
    if packed:
        return dataclasses.replace(options, model=model)
    if not data.is_dir():
        raise InputError(
            f"{data} is not there: prepare it first (python pre_process.py --src PHOTOS --out "
            f"{data} --keep-undetected), or name another with --data"
        )
    pairs = options.pairs or data / "pairs.txt"
    return dataclasses.replace(options, data=data, pairs=pairs, model=model)


def name_models(options: config.EvalOptions, tests: VerificationSet) -> list[Model]:
    """Names that differ and folders of their own. Raises InputError: not there, or twice."""
    files = [utils.model_file(path) for path in options.model]
    resolved = [file.resolve() for file in files]
    for place, file in enumerate(resolved):
        if file in resolved[:place]:
            raise InputError(f"{files[place]} is named twice: name each model once")
    names = [model_name(*both) for both in zip(options.model, files, strict=True)]
    for place, name in enumerate(names):
        number = 2
        while names[place] in names[:place]:
            names[place] = f"{name}-{number}"
            number += 1
    models = [
        Model(name, given, file, report_folder(options, name, file, list_name(tests)))
        for name, given, file in zip(names, options.model, files, strict=True)
    ]
    folders = [model.out.resolve() for model in models]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            twin = models[folders.index(folder)]
            raise InputError(
                f"the reports of {twin.file} and {files[place]} would both go to "
                f"{models[place].out}: rename one of the files"
            )
    return models


def model_name(model: Path, file: Path) -> str:
    return printable(file.resolve().parent.name if file.name == BEST else model.name)


def list_name(tests: VerificationSet) -> str:
    """Of a report's folder: the list's own, and for a pairs.txt the set's."""
    stem = tests.pairs_file.stem
    return tests.name if stem == "pairs" else stem


def report_folder(options: config.EvalOptions, name: str, file: Path, tests: str) -> Path:
    """`--out` (a folder in it for each of several models), else <tests>/ in the model's run folder,
    else runs/<stem of the model's file>/<tests>."""
    if options.out is not None:
        return options.out / name if len(options.model) > 1 else options.out
    return utils.home_of(file) / tests


def shown(value: object) -> object:
    return [shown(part) for part in value] if isinstance(value, tuple) else printable(str(value))


if __name__ == "__main__":
    config.run(main, OPTIONS)
