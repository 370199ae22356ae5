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
            return block[1] + form(list(csv.DictReader(file))) + block[3]

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


FORMS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "lfw": lfw_table,
    "speed": speed_table,
}


if __name__ == "__main__":
    config.run(main, config.parse(Options, __doc__))
