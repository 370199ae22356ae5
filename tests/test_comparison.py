"""Several models in one call. Run: python -m pytest tests/test_comparison.py"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import comparison
import config
import lfw_eval
import models
import significance
import verification_set
from config import InputError


def network(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    kind = {"network": "r18", "width": 0.125, "embedding_size": 16}
    metadata = {key: str(value) for key, value in kind.items()}
    path = folder / checkpoint.BEST
    checkpoint.save_weights(path, models.create(**kind).state_dict(), metadata)
    return folder


def options(data: Path, out: Path | None, *named: Path) -> config.EvalOptions:
    return config.EvalOptions(
        data=data, pairs=data / "pairs.txt", model=named, out=out, device="cpu", threads=1,
        bootstrap=20,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compared(lfw_like, tmp_path_factory) -> tuple[Path, Path]:
    """The comparison of three networks (one of them a single file), and where it lies."""
    folder = tmp_path_factory.mktemp("compare")
    named = [network(folder / name, seed) for seed, name in ((1, "first"), (2, "second|<i>one"))]
    shutil.copy(network(folder / "third", 3) / checkpoint.BEST, folder / "third.safetensors")
    out = folder / "out"
    lfw_eval.main(options(lfw_like, out, *named, folder / "third.safetensors"))
    return folder, out


NAMES = ["first", "second|<i>one", "third.safetensors"]


def test_each_model_has_its_report_and_all_one_comparison(compared):
    _, out = compared
    assert {p.name for p in out.iterdir()} == {
        *NAMES, "comparison.csv", "comparison.md", "mcnemar.csv", "report.html", "roc.png",
    }  # fmt: skip
    for name in NAMES:
        assert {"eval.json", "run.json", "report.html", "roc.png", "theta_dist.png"} <= {
            p.name for p in (out / name).iterdir()
        }


def test_the_tables_hold_the_numbers_of_each_eval_json(compared):
    _, out = compared
    with open(out / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == NAMES
    results = [json.loads((out / name / "eval.json").read_text()) for name in NAMES]
    for row, result in zip(rows, results, strict=True):
        assert float(row["accuracy"]) == result["accuracy"]["mean"]
        assert float(row["eer"]) == result["eer"] and row["tar_at_1e-3"] == ""
        assert float(row["accuracy_low"]) == result["confidence_95"]["accuracy"][0]
    text = (out / "comparison.md").read_text()
    assert "second\\|&lt;i>one" in text and "n/a" in text
    table = [line for line in text.splitlines() if line.startswith("| third.safetensors |")]
    assert f"{100 * results[2]['accuracy']['mean']:.2f} %" in table[0]
    columns = {line.replace("\\|", "").count("|") for line in text.splitlines()[2:7]}
    assert len(columns - {0}) == 1


def test_mcnemar_is_made_of_the_same_pairs_judged_one_by_one(compared, lfw_like):
    _, out = compared
    with open(out / "mcnemar.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model A"], row["model B"]) for row in rows] == [
        (NAMES[0], NAMES[1]), (NAMES[0], NAMES[2]), (NAMES[1], NAMES[2]),
    ]  # fmt: skip
    wrong = [sum(json.loads((out / name / "eval.json").read_text())["errors"][kind]
                 for kind in ("false_positives", "false_negatives")) for name in NAMES]  # fmt: skip
    for row, (a, b) in zip(rows, ((0, 1), (0, 2), (1, 2)), strict=True):
        # what only A has right less what only B has right is the difference of their errors
        assert int(row["only A right"]) - int(row["only B right"]) == wrong[b] - wrong[a]
        assert 0 <= float(row["p"]) <= float(row["p (Holm)"]) <= 1


def test_the_page_links_to_the_reports(compared):
    _, out = compared
    text = (out / "report.html").read_text()
    for name in ("first", "second%7C%3Ci%3Eone", "third.safetensors"):
        assert f'href="{name}/report.html"' in text
    assert text.count("<svg") == 1 and "McNemar" in text and "3 tests (Holm)" in text


def test_the_console_shows_both_tables(compared, lfw_like, capsys):
    folder, _ = compared
    lfw_eval.main(options(lfw_like, folder / "out", folder / "first", folder / "second|<i>one"))
    said = capsys.readouterr().out
    assert "80 of 80 pairs scored" in said and "only A right" in said and "95 % interval" in said
    assert str(folder / "out" / "report.html") in said
    lines = [line for line in said.splitlines() if line.startswith(("first", "second|<i>one"))]
    assert len(lines) == 3


def test_models_of_one_name_are_told_apart_and_one_model_is_not_compared(lfw_like, tmp_path):
    one, twin = network(tmp_path / "one" / "run", 1), network(tmp_path / "two" / "run", 2)
    tests = verification_set.load(lfw_like, lfw_like / "pairs.txt")
    named = lfw_eval.name_models(options(lfw_like, tmp_path / "out", one, twin), tests)
    assert [(m.name, m.out.name) for m in named] == [("run", "run"), ("run-2", "run-2")]
    with pytest.raises(InputError, match="named twice"):
        lfw_eval.main(options(lfw_like, tmp_path / "out", one, one / checkpoint.BEST))
    assert not (tmp_path / "out").exists()


def test_reports_that_would_share_a_folder_are_refused(lfw_like, tmp_path):
    for name in ("a", "b"):
        source = network(tmp_path / name, 1) / checkpoint.BEST
        shutil.copy(source, tmp_path / name / "net.safetensors")
    named = options(lfw_like, None, tmp_path / "a/net.safetensors", tmp_path / "b/net.safetensors")
    with pytest.raises(InputError, match="would both go to"):
        lfw_eval.main(named)


def test_the_command_line_takes_several_models():
    parsed = config.parse(config.EvalOptions, "", ["--model", "a", "b.onnx", "--flip"])
    assert parsed.model == (Path("a"), Path("b.onnx"))


def test_aligned_columns():
    text = comparison.console(("name", "x"), [["a", "1.00"], ["longer", "10.00"]])
    assert text == "name        x\na        1.00\nlonger  10.00"


def test_holm_never_lowers(compared):
    p = np.random.default_rng(0).random(20).tolist()
    assert all(b >= a for a, b in zip(p, significance.holm(p), strict=True))


def test_a_model_that_cannot_be_loaded_is_told_before_the_first_is_evaluated(lfw_like, tmp_path):
    good, bad = network(tmp_path / "good", 1), tmp_path / "bad.safetensors"
    bad.write_bytes((good / checkpoint.BEST).read_bytes()[:5000])
    with pytest.raises(InputError, match=r"bad\.safetensors"):
        lfw_eval.main(options(lfw_like, tmp_path / "out", good, bad))
    assert not (tmp_path / "out").exists()
