"""Several models on the same pairs: a table, McNemar's tests, overlaid ROC curves.

Written into one folder: comparison.csv, mcnemar.csv, comparison.md, roc.png and report.html, which
links to each model's own report.
"""

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import plots
import report
import significance
from checkpoint import write_atomic
from scores import Scores, interval, percent
from verification_set import VerificationSet

COLUMNS = ("model", "accuracy", "std", "95 % interval", "TAR@1e-3", "TAR@1e-2", "EER", "AUC",
           "d'", "tuned on test pairs")  # fmt: skip
TESTS = ("model A", "model B", "only A right", "only B right", "test", "p", "p (Holm)")
Judged = tuple[str, np.ndarray]  # a model's name, and bool (N,): which pairs it judged rightly


def write(out: Path, tests: VerificationSet, models: list[Scores], run: dict) -> None:
    figure = plots.roc_figure(models, tests.same)
    name = f"{len(models)} models on {tests.name}"
    plots.save_png(figure, out / "roc.png", name)
    table, matrix = rows(models), mcnemar_rows(models)
    write_atomic(out / "comparison.csv", as_csv(machine_rows(models)))
    write_atomic(out / "mcnemar.csv", as_csv([list(TESTS), *matrix]))
    text = f"# {name}\n\n{markdown(COLUMNS, table)}\n{markdown(TESTS, matrix)}"
    write_atomic(out / "comparison.md", text.encode())
    tables = {
        "columns": COLUMNS, "rows": table, "test_columns": TESTS, "tests": matrix,
        "command": report.command(run), "date": run["date"],
    }  # fmt: skip
    report.write_comparison(out / "report.html", models, tables, plots.svg(figure, name))


def rows(models: list[Scores]) -> list[list[str]]:
    """For people, in the order of the command line."""
    table = []
    for scores in models:
        result = scores.result
        accuracy, d_prime = result["accuracy"], result["d_prime"]
        table.append([
            scores.name, percent(accuracy["mean"]), f"{100 * accuracy['std']:.2f}",
            interval(result, "accuracy") or "n/a", percent(result["tar_at_far"]["1e-3"]),
            percent(result["tar_at_far"]["1e-2"]), percent(result["eer"]),
            percent(result["auc"], 3), "n/a" if d_prime is None else f"{d_prime:.2f}",
            percent(result["threshold_tuned_on_test_pairs"]["accuracy"]),
        ])  # fmt: skip
    return table


def machine_rows(models: list[Scores]) -> list[list[object]]:
    """The numbers as eval.json has them; an empty cell where nothing was measured."""
    head = ["model", "sha256", "pairs", "accuracy", "std", "standard_error", "accuracy_low",
            "accuracy_high", "auc", "eer", "tar_at_1e-1", "tar_at_1e-2", "tar_at_1e-3",
            "tar_at_1e-4", "d_prime", "accuracy_tuned_on_test_pairs", "false_positives",
            "false_negatives"]  # fmt: skip
    table: list[list[object]] = [head]
    for scores in models:
        result = scores.result
        accuracy, errors = result["accuracy"], result["errors"]
        table.append([
            scores.name, result["model"]["sha256"], result["pairs"]["scored"], accuracy["mean"],
            accuracy["std"], accuracy["standard_error"],
            *result["confidence_95"].get("accuracy", (None, None)), result["auc"], result["eer"],
            *result["tar_at_far"].values(), result["d_prime"],
            result["threshold_tuned_on_test_pairs"]["accuracy"], errors["false_positives"],
            errors["false_negatives"],
        ])  # fmt: skip
    return table


def mcnemar_rows(models: list[Scores]) -> list[list[str]]:
    return tests_of(itertools.combinations([(model.name, model.right) for model in models], 2))


def tests_of(pairs: Iterable[tuple[Judged, Judged]]) -> list[list[str]]:
    """McNemar's test of each two, adjusted for as many tests as there are."""
    pairs = list(pairs)
    tests = [significance.mcnemar(a, b) for (_, a), (_, b) in pairs]
    adjusted = significance.holm([test.p for test in tests])
    return [
        [a, b, str(test.only_a), str(test.only_b), test.method, f"{test.p:.3g}", f"{p:.3g}"]
        for ((a, _), (b, _)), test, p in zip(pairs, tests, adjusted, strict=True)
    ]


# --- formats --------------------------------------------------------------------------------------


def as_csv(table: list[list[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue().encode()


def markdown(columns: Sequence[str], table: list[list[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *table]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in cells)


def _cell(text: str) -> str:
    """A name may hold what Markdown or a page would read as its own."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").splitlines())


def console(columns: tuple[str, ...], table: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [list(columns), *table]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = (
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)
