"""README shows what results/*.csv hold. Run: python -m pytest tests/test_readme_tables.py"""

import csv
import re

import pytest

import config
import readme_tables
from config import InputError


def rows(name: str) -> list[dict[str, str]]:
    with open(config.ROOT / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_readme_has_not_drifted_from_the_results(capsys):
    assert readme_tables.main(readme_tables.Options(check=True)) == 0, capsys.readouterr().out


def test_every_csv_is_in_readme():
    named = {block[2] for block in readme_tables.BLOCK.finditer(readme_tables.README.read_text())}
    assert named == {f"results/{p.name}" for p in (config.ROOT / "results").glob("*.csv")}


def test_no_row_has_a_column_too_many_or_too_few():
    """A comma that is not quoted cuts a note short, and README with it."""
    for path in (config.ROOT / "results").rglob("*.csv"):
        with open(path, newline="") as file:
            assert len({len(row) for row in csv.reader(file)}) == 1, path


def test_a_changed_number_is_told_and_mended(tmp_path, monkeypatch, capsys):
    text = readme_tables.README.read_text()
    drifted = text.replace("99.22 % ±", "99.92 % ±", 1)
    assert drifted != text
    (tmp_path / "README.md").write_text(drifted)
    monkeypatch.setattr(readme_tables, "README", tmp_path / "README.md")
    assert readme_tables.main(readme_tables.Options(check=True)) == 1
    said = capsys.readouterr().out
    assert "99.92 %" in said and "make readme" in said
    assert (tmp_path / "README.md").read_text() == drifted  # only looked
    assert readme_tables.main(readme_tables.Options()) == 0
    assert (tmp_path / "README.md").read_text() == text


def test_every_look_at_view_2_is_counted():
    """Those of the tables, each once where two of them share a run; seven others are told there."""
    tables = ("final", "ablations", "ablations_se", "peers", "scaling")
    text = readme_tables.README.read_text()
    key = ("command", "commit", "minutes")
    looks = {tuple(row[part] for part in key) for name in tables for row in rows(name)}
    assert f"It was looked at {len(looks) + 7} times" in " ".join(text.split())
    assert f"each of the {len(looks)} runs" in " ".join(text.split())


def test_the_figures_of_the_introduction_are_in_the_tables():
    first = readme_tables.README.read_text().split("\n## ")[0]
    named = set(re.findall(r"(\d\d\.\d\d) %", first))
    told = {row["accuracy"] for row in rows("lfw")} | {row["view2"] for row in rows("final")}
    assert named and named <= told


def test_a_table_without_its_csv_is_refused(tmp_path):
    text = "<!-- table: results/none.csv -->\n<!-- end of table -->"
    with pytest.raises(InputError, match=r"results/none\.csv"):
        readme_tables.fill(text, tmp_path)


def test_a_csv_without_a_row_is_refused(tmp_path):
    (tmp_path / "results").mkdir()
    for name in readme_tables.FORMS:
        (tmp_path / f"results/{name}.csv").write_text("change,seed\n")
        text = f"<!-- table: results/{name}.csv -->\n<!-- end of table -->"
        with pytest.raises(InputError, match=rf"results/{name}\.csv has no row"):
            readme_tables.fill(text, tmp_path)


def test_measured_rows_say_how_and_published_ones_say_where():
    for row in rows("lfw"):
        assert re.fullmatch(r"\d\d\.\d\d", row["accuracy"]) and row["protocol"] and row["note"]
        if row["command"]:
            assert all(row[key] for key in ("std", "date", "commit", "hardware", "parameters"))
            assert row["protocol"] == "nine other folds"
    for row in rows("speed"):
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])


def test_the_reference_systems_rows_and_the_anchors_are_there():
    found = {(row["accuracy"], row["protocol"]) for row in rows("lfw") if not row["command"]}
    tuned = {(value, "the test pairs") for value in ("99.43", "99.38", "99.27", "99.23")}
    assert found == tuned | {("99.53", "as published"), ("99.28", "as published")}


def a_run(**told: str) -> dict[str, str]:
    return {
        "change": "the recipe", "seed": "0", "identities": "2994", "photos": "16220",
        "photos_seen": "162000", "minutes": "14.6", "validation": "83.00", "view1": "89.00",
        "view2": "88.00", "view2_std": "1.20", "hardware": "a CPU", "date": "2026-11-28",
        "commit": "abc", "command": "python train.py", **told,
    }  # fmt: skip


def test_ablations_are_means_over_seeds_with_their_spread():
    rows = [
        a_run(view2="88.00"),
        a_run(change="no flip", view2="80.00", date="2026-11-29", commit="abd"),
        a_run(change="no flip", seed="1", view2="83.00", photos_seen="160000"),
        a_run(change="late", seed="2", validation=""),
        a_run(seed="1", view2="90.00", commit="abc, abd"),  # stopped, and gone on with
    ]
    table = readme_tables.ablations_table(rows).splitlines()
    assert table[2].endswith("| 89.00 % ± 1.41 |  |") and "| 2 | 15 | 162 k |" in table[2]
    assert table[3].startswith("| no flip | 2 | 15 | 161 k | 83.00 % ± 0.00 | +0.00 ± 0.00 |")
    assert table[3].endswith("| 81.50 % ± 2.12 | -7.50 ± 0.71 |")  # seed by seed
    assert table[4] == "| late | 1 | 15 | 162 k |  |  | 89.00 % |  | 88.00 % |  |"
    assert table[-1] == "2026-11-28 to 2026-11-29, a CPU, commits abc, abd."


def test_runs_and_their_tests_are_shown_one_a_row():
    table = readme_tables.runs_table([a_run(), a_run(change="official", seed="1")]).splitlines()
    assert (
        "16,220 photos of 2,994 people | 162,000 | 14.6 | 83.00 % | 89.00 % | 88.00 % ± 1.20"
        in (table[2])
    )
    assert table[3].startswith("| official | 1 |")
    without = [a_run(validation="")]
    assert "| 14.6 |  | 89.00 %" in readme_tables.runs_table(without)
    assert "| 162 k |  |  | 89.00 % |" in readme_tables.ablations_table(without)
    found = readme_tables.mcnemar_table([{"model A": "ours", "model B": "official", "p": "1e-9"}])
    assert found.splitlines()[2] == "| ours | official | 1e-9 |"
