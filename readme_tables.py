"""README's tables of results, from results/*.csv.

    make readme                          # rewrite them
    python readme_tables.py --check      # only say whether they differ; exit code 1 then

A table stands in README between `<!-- table: results/NAME.csv -->` and `<!-- end of table -->`.
To add a row, add it to the CSV: accuracies in percent, empty where nothing is known, `command` as
it was typed. Then run `make readme`; a test fails where README and CSV differ.
"""

import csv
import difflib
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import config
from checkpoint import write_atomic
from comparison import markdown
from config import InputError, option

README = config.ROOT / "README.md"
BLOCK = re.compile(
    r"(<!-- table: (results/[\w-]+\.csv) -->\n).*?(<!-- end of table -->)", re.DOTALL
)


@dataclass(frozen=True)
class Options:
    check: bool = option(False, "write nothing, say whether README is up to date")


def main(options: Options) -> int:
    old = README.read_text()
    new = fill(old, config.ROOT)
    if new == old:
        print(f"{README.name} is up to date")
        return 0
    if options.check:
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "results/",
                                     lineterm="", n=0)  # fmt: skip
        print("\n".join(lines))
        print(f"{README.name} differs from results/*.csv: run make readme")
        return 1
    write_atomic(README, new.encode())
    print(f"wrote {README}")
    return 0


def fill(text: str, root: Path) -> str:
    """README with every table made anew. Raises InputError: a CSV is not there, or has no form."""

    def table(block: re.Match) -> str:
        path = root / block[2]
        form = FORMS.get(path.stem)
        if form is None or not path.is_file():
            raise InputError(f"README names {block[2]}, which is not there or has no form here")
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise InputError(f"{block[2]} has no row")
        return block[1] + form(rows) + block[3]

    return BLOCK.sub(table, text)


def lfw_table(rows: list[dict[str, str]]) -> str:
    """One row a network; below it, how each row of ours was measured."""
    lines, notes = [], []
    for row in rows:
        mark = ""
        if row["command"]:
            notes.append(
                f"{len(notes) + 1}. {row['note']}. {row['date']}, {row['hardware']}, "
                f"commit {row['commit']}: `{row['command']}`\n"
            )
            mark = f" [{len(notes)}]"
        accuracy = f"{row['accuracy']} %" + (f" ± {row['std']}" if row["std"] else "")
        parameters = f"{int(row['parameters']) / 1e6:.2f} M" if row["parameters"] else ""
        cells = [row["backbone"] + mark, row["training_data"], accuracy, row["protocol"],
                 f"{row['tar_1e-3']} %" if row["tar_1e-3"] else "", parameters,
                 row["photos_per_s"]]  # fmt: skip
        if not row["command"]:  # not ours: in italics, with where it comes from
            cells[0] += f", {row['note']}"
            cells = [f"*{cell}*" if cell else "" for cell in cells]
        lines.append(cells)
    head = ["network", "trained on", "LFW", "threshold chosen on", "TAR@FAR=1e-3", "parameters",
            "photos/s"]  # fmt: skip
    return markdown(head, lines) + "\n" + "".join(notes)


def speed_table(rows: list[dict[str, str]]) -> str:
    head = ["network", "crops", "official way", "ours", "ratio (smallest to largest)", "measured"]
    lines = [
        [row["network"], f"{int(row['crops']):,}", f"{row['official_per_s']}/s",
         f"{row['ours_per_s']}/s", f"{row['ratio']} ({row['ratio_low']} to {row['ratio_high']})",
         f"{row['date']}, {row['hardware']}, {row['note']}, commit {row['commit']}: "
         f"`{row['command']}`"]
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines)


# --------------------------------------------------------------------------------------------------
# what benchmarks/experiments.py wrote

FIGURES = {"validation": "held-out people", "view1": "LFW View 1", "view2": "LFW View 2"}


def runs_table(rows: list[dict[str, str]]) -> str:
    """One row a run."""
    head = ["run", "seed", "trained on", "photos seen", "minutes", *FIGURES.values()]
    lines = [
        [row["change"], row["seed"],
         f"{int(row['photos']):,} photos of {int(row['identities']):,} people",
         f"{int(row['photos_seen']):,}", row["minutes"],
         f"{row['validation']} %" if row["validation"] else "",
         f"{row['view1']} %", f"{row['view2']} % ± {row['view2_std']}"]
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines) + how(rows)


def ablations_table(rows: list[dict[str, str]]) -> str:
    """One row a change: mean and standard deviation over its seeds, and of what it changes.

    A seed is another choice of people who are held out, so that a change is measured seed by seed,
    against the first row of the table.
    """
    head = ["change", "seeds", "minutes", "photos seen"]
    for name in FIGURES.values():
        head += [name, "changed by"]
    first, lines = rows[0]["change"], []
    usual = {row["seed"]: row for row in rows if row["change"] == first}
    for change in dict.fromkeys(row["change"] for row in rows):
        runs = [row for row in rows if row["change"] == change]
        line = [change, str(len(runs)), f"{mean_of(runs, 'minutes'):.0f}",
                f"{mean_of(runs, 'photos_seen') / 1000:,.0f} k"]  # fmt: skip
        both = [(row, usual[row["seed"]]) for row in runs if row["seed"] in usual]
        for name in FIGURES:
            if not all(row[name] for row in (*runs, *usual.values())):
                line += ["", ""]
                continue
            gains = [float(row[name]) - float(other[name]) for row, other in both]
            line += [spread([float(row[name]) for row in runs], "{:.2f} %"),
                     "" if change == first else spread(gains, "{:+.2f}")]  # fmt: skip
        lines.append(line)
    return markdown(head, lines) + how(rows)


def mean_of(rows: list[dict[str, str]], name: str) -> float:
    return statistics.mean(float(row[name]) for row in rows)


def spread(values: list[float], form: str) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + deviation


def trials_table(rows: list[dict[str, str]]) -> str:
    """One row a trial; accuracy and area under the ROC of both sets of pairs, in percent."""
    head = ["trial", "network", "passes", "minutes", "held-out people", "averaged weights",
            "LFW View 1", "averaged weights"]  # fmt: skip
    lines = [
        [row["change"], row["network"], row["passes"], row["minutes"],
         *(accuracy_and_area(row[name], row[f"{name}_auc"])
           for name in ("held", "averaged_held", "v1", "averaged_v1"))]
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines)


def accuracy_and_area(accuracy: str, area: str) -> str:
    """What was not measured is left out."""
    said = f"{float(accuracy):.2f}" if accuracy else ""
    return f"{said} ({float(area):.2f})" if area else said


def mcnemar_table(rows: list[dict[str, str]]) -> str:
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def how(rows: list[dict[str, str]]) -> str:
    """When, on what and from which code; each run's own command stands in the CSV."""
    said = {key: sorted({row[key] for row in rows}) for key in ("date", "hardware")}
    said["commit"] = sorted({one for row in rows for one in row["commit"].split(", ")})
    days = said["date"][0] + (f" to {said['date'][-1]}" if len(said["date"]) > 1 else "")
    commits = f"commit{'s' * (len(said['commit']) > 1)} {', '.join(said['commit'])}"
    return f"\n{days}, {'; '.join(said['hardware'])}, {commits}.\n"


FORMS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "lfw": lfw_table,
    "speed": speed_table,
    "final": runs_table,
    "ablations": ablations_table,
    "ablations_se": ablations_table,
    "peers": runs_table,
    "mcnemar": mcnemar_table,
    "scaling": runs_table,
    "trials": trials_table,
}


if __name__ == "__main__":
    config.run(main, config.parse(Options, __doc__))
