"""report.html: one self-contained file per model, or per comparison of several.

    write(out / "report.html", tests, scores, run, figures)

Templates lie in templates/. The pages hold no script, ask the network for nothing (their
Content-Security-Policy forbids it), and follow the reader's light or dark setting.
"""

import os
import shlex
from pathlib import Path
from urllib.parse import quote

import jinja2
import numpy as np
from markupsafe import Markup, escape

import config
from checkpoint import write_atomic
from gallery import Gallery
from scores import Scores, interval, percent
from verification_set import VerificationSet, is_packed, printable

ANGLES = (
    ("mean", "mean"), ("standard deviation", "sigma"), ("smallest", "min"),
    ("1 % are below", "q01"),
    ("5 % are below", "q05"), ("median", "median"), ("95 % are below", "q95"),
    ("99 % are below", "q99"), ("largest", "max"),
)  # fmt: skip


def write(
    path: Path, tests: VerificationSet, scores: Scores, run: dict, theta_svg: str, roc_svg: str
) -> None:
    """The report of one model. `run` is what goes into run.json."""
    result = scores.result
    shown = Gallery(tests, scores)
    _render(
        path,
        "report.html",
        result=result,
        run=run,
        shown=shown,
        numbers=_numbers(result),
        facts=_facts(tests, scores, run),
        folds=_folds(tests, scores),
        angle_rows=ANGLES,
        theta_svg=Markup(theta_svg),
        roc_svg=Markup(roc_svg),
        no_originals=tests.no_originals,
        packed=is_packed(tests.pairs_file),
        marked=result["data"]["pairs_listed_as_mislabelled"],
        command=command(run),
    )


def write_comparison(path: Path, models: list[Scores], tables: dict, roc_svg: str) -> None:
    """Several models: `tables` holds the cells of both tables and what the footer says."""
    _render(
        path,
        "comparison.html",
        data=models[0].result["data"],
        pairs=models[0].result["pairs"],
        links={m.name: quote(_relative(m.out / "report.html", path.parent)) for m in models},
        roc_svg=Markup(roc_svg),
        **tables,
    )


def command(run: dict) -> str:
    """The command line as one would type it."""
    return printable("python " + shlex.join(run["command"]))


def _render(path: Path, template: str, **values: object) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(config.ROOT / "templates"),
        autoescape=True,  # names of files are anyone's: they are text, never markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    text = environment.get_template(template).render(percent=percent, **values)
    write_atomic(path, text.encode())


def breakable(name: str) -> Markup:
    """A long name may be broken after an underscore or a slash, not amid a number."""
    text = str(escape(name))  # a Markup would escape the tags too
    return Markup(text.replace("_", "_<wbr>").replace("/", "/<wbr>"))


def _numbers(result: dict) -> list[tuple[str, str, str]]:
    """(measure, value, 95 % interval)"""
    accuracy, tuned = result["accuracy"], result["threshold_tuned_on_test_pairs"]
    cuts = accuracy["threshold_degrees_per_fold"]
    d_prime = result["d_prime"]
    rows = [
        ("accuracy, mean of the folds", percent(accuracy["mean"]), interval(result, "accuracy")),
        ("standard deviation", f"{100 * accuracy['std']:.2f}", ""),
        ("standard error", f"{100 * accuracy['standard_error']:.2f}", ""),
        ("threshold, mean", f"{np.mean(cuts):.2f}°", ""),
        ("AUC", percent(result["auc"], 3), interval(result, "auc", 3)),
        ("EER", percent(result["eer"]), interval(result, "eer")),
    ]
    for far, tar in result["tar_at_far"].items():
        ends = interval(result, "tar") if far == "1e-3" else ""
        rows.append((f"TAR at FAR {far}", percent(tar), ends))
    rows += [
        ("d'", "n/a" if d_prime is None else f"{d_prime:.3f}", ""),
        ("tuned on the test pairs", percent(tuned["accuracy"]), ""),
    ]
    return rows


def _facts(tests: VerificationSet, scores: Scores, run: dict) -> list[tuple[str, str]]:
    result = scores.result
    data, pairs = result["data"], result["pairs"]
    speed = run["photos_per_second"]
    facts = [
        ("model", scores.name),
        ("sha256", result["model"]["sha256"]),
        ("embedding", "crop + mirror image" if result["flip"] else "one crop"),
        ("data", f"{data['set']}, {data['photos']:,} photos"),
        ("list of pairs", f"{data['pairs']}, sha256 {data['pairs_sha256'][:12]}"),
        ("protocol", f"{pairs['genuine']:,} genuine and {pairs['impostor']:,} impostor pairs, "
                     f"{pairs['folds']}"),
        ("date", run["date"]),
        ("commit", run["commit"]),
        ("hardware", run["hardware"]),
        ("speed", f"{speed} photos/s ({run['photos_embedded']:,} embedded in this run)" if speed
                  else "all embeddings from the cache of an earlier run"),
        ("torch", run["torch"]),
    ]  # fmt: skip
    if data["pairs_of_one_picture"]:
        facts.insert(6, ("note", f"{data['pairs_of_one_picture']} pairs hold one picture twice"))
    return facts


def _folds(tests: VerificationSet, scores: Scores) -> list[dict]:
    accuracy = scores.result["accuracy"]
    return [
        {
            "accuracy": accuracy["per_fold"][k],
            "threshold": accuracy["threshold_degrees_per_fold"][k],
            "wrong": int((~scores.right[tests.fold == k]).sum()),
            "pairs": int((tests.fold == k).sum()),
        }
        for k in range(len(accuracy["per_fold"]))
    ]


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
