"""Files to hand on, held against PyTorch. Run: python -m pytest tests/test_export_onnx.py"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import config
import embeddings
import export_onnx
import lfw_eval
import model_card
import models
import utils
from config import EvalOptions, ExportOptions, InputError
from conftest import patterned_crop
from download import LFW_PAIRS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TOLD = {  # as train.py writes it
    "input": "112x112 RGB, (x - 127.5) / 127.5", "identities": "27", "photos": "1620",
    "validation_accuracy": "0.812500", "commit": "abc1234", "threshold_degrees": "71.2500",
    "threshold_far": "0.001", "threshold_impostor_pairs": "12000",
}  # fmt: skip


def make_run(folder: Path, network: str = "r18", resolution: int = 112, **told: str) -> Path:
    """A run folder with random weights, BN included."""
    torch.manual_seed(0)
    model = models.create(network, embedding_size=32, width=0.125, resolution=resolution)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    metadata = {"network": network, "width": "0.125", "embedding_size": "32", **TOLD, **told}
    metadata["resolution"] = str(resolution)
    folder.mkdir(parents=True)
    checkpoint.save_weights(folder / checkpoint.BEST, model.state_dict(), metadata)
    options = {"data": "/home/somebody/faces", "epochs": 3, "margin": "arcface", "lr": 0.1}
    checkpoint.write_json(folder / "config.json", {"options": options, "hardware": "a CPU | x"})
    checkpoint.write_json(folder / "result.json", {"steps": 75, "validation": 0.8125})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def exported(run) -> Path:
    export_onnx.main(ExportOptions(model=run))
    return run / "export"


@pytest.mark.parametrize(
    ("network", "resolution"), [("r18", 112), ("se-r18", 112), ("mbf", 112), ("se-r18", 64)]
)
def test_any_batch_gives_the_embeddings_of_pytorch(tmp_path, network, resolution, capsys):
    folder = make_run(tmp_path / "r", network, resolution)
    export_onnx.main(ExportOptions(model=folder, out=tmp_path))
    said = capsys.readouterr()
    assert "cosine to PyTorch at batch 1 and 7: at least 0.99999" in said.out and not said.err
    ours = utils.load_backbone(folder, fold=False)
    theirs = utils.load_backbone(tmp_path / f"r-{network}.onnx")
    assert theirs.input.shape[0] == "N"
    crops = np.stack([patterned_crop(identity, 0) for identity in range(5)])
    expected, found = utils.embed(ours, crops), utils.embed(theirs, crops)  # (5, 32)
    assert found.shape == expected.shape
    spread = np.linalg.norm(expected - expected.mean(axis=0), axis=1)  # how the crops differ
    assert (np.linalg.norm(found - expected, axis=1) < 0.002 * spread).all()


def test_both_files_say_all_that_is_known(exported, run):
    _, told = checkpoint.load_weights(run / checkpoint.BEST)
    for suffix in ("onnx", "safetensors"):
        metadata = utils.load_backbone(exported / f"first-r18.{suffix}").metadata
        assert metadata.items() >= told.items()
        assert metadata["colour_order"] == "RGB" and metadata["input_size"] == "112"
        assert metadata["input_mean"] == metadata["input_std"] == "127.5"
        assert metadata["export_commit"] == utils.commit()
    ours = utils.load_backbone(run, fold=False).state_dict()
    theirs = utils.load_backbone(exported / "first-r18.safetensors", fold=False).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_half_writes_the_weights_alone_at_half_the_size(run, exported, tmp_path, monkeypatch):
    for package in ("onnx", "onnxruntime"):  # it needs neither
        monkeypatch.setitem(sys.modules, package, None)
    export_onnx.main(ExportOptions(model=run, out=tmp_path, half=True))
    assert {path.name for path in tmp_path.iterdir()} == {
        f"first-r18.{suffix}" for suffix in ("safetensors", "md", "sha256")
    }
    file = tmp_path / "first-r18.safetensors"
    full = exported / file.name
    assert file.stat().st_size < 0.55 * full.stat().st_size
    state, metadata = checkpoint.load_weights(file)
    assert metadata == {**checkpoint.load_weights(full)[1], "precision": "fp16"}
    kinds = {value.dtype for value in state.values() if value.ndim > 1}
    assert kinds == {torch.float16}
    assert state["bn1.running_var"].dtype == torch.float32
    model = utils.load_backbone(file)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    crops = np.stack([patterned_crop(identity, 0) for identity in range(5)])
    ours, theirs = utils.embed(model, crops), utils.embed(utils.load_backbone(run), crops)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() > 0.99999
    card = (tmp_path / "first-r18.md").read_text()
    assert "`first-r18.safetensors`" in card and ".onnx`" not in card and "to fp16" in card


def test_the_default_model_is_the_own_run_or_what_ships(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "RUNS", tmp_path)
    monkeypatch.setattr(config, "WEIGHTS", run / checkpoint.BEST)
    own = shutil.copytree(run, config.default_run(), ignore=shutil.ignore_patterns("*export*"))
    (own / "result.json").unlink(missing_ok=True)
    for name, finished in (("a", False), ("b", True)):
        if finished:
            (own / "result.json").touch()
        export_onnx.main(ExportOptions(out=tmp_path / name, half=True))
        used = own if finished else config.WEIGHTS
        assert f"no --model named: using {used}\n" in capsys.readouterr().out


def test_bn_is_folded(exported):
    kinds = [node.op_type for node in onnx.load(exported / "first-r18.onnx").graph.node]
    assert kinds.count("BatchNormalization") == 8  # those before a padded convolution, one a block


def test_two_exports_are_the_same_bytes(exported, run, tmp_path):
    """In another process, too."""
    command = [sys.executable, str(config.ROOT / "export_onnx.py"), "--model", str(run)]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    names = sorted(path.name for path in exported.iterdir())
    assert names == [f"first-r18.{suffix}" for suffix in ("md", "onnx", "safetensors", "sha256")]
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (exported / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_sums_are_those_of_the_files(exported, tmp_path):
    lines = (exported / "first-r18.sha256").read_text().splitlines()
    assert [line[66:] for line in lines] == ["first-r18.onnx", "first-r18.safetensors"]
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "-c", "first-r18.sha256"], cwd=exported)
        assert done.returncode == 0


def test_lfw_eval_gives_the_same_accuracy_without_flags(lfw_like, tmp_path):
    export_onnx.main(ExportOptions(model=lfw_like.parent / "run", out=tmp_path, name="x"))
    means = []
    for model in (lfw_like.parent / "run", tmp_path / "x.onnx", tmp_path / "x.safetensors"):
        out = tmp_path / model.suffix / "report"
        lfw_eval.main(EvalOptions(data=lfw_like, model=(model,), out=out, device="cpu", threads=1,
                                  bootstrap=0))  # fmt: skip
        means.append(json.loads((out / "eval.json").read_text())["accuracy"]["mean"])
    assert max(means) - min(means) <= 2e-4 and means[0] > 0.6


def test_a_pth_of_others_is_exported_and_its_card_says_so(run, tmp_path):
    state, _ = checkpoint.load_weights(run / checkpoint.BEST)
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "backbone.pth")
    export_onnx.main(ExportOptions(model=tmp_path / "backbone.pth", out=tmp_path / "out"))
    card = (tmp_path / "out/backbone-r18.md").read_text()
    assert "Trained by others, taken in from `backbone.pth`" in card and "unknown here" in card
    assert "validation: not measured" in card and "threshold: not measured" in card
    metadata = utils.load_backbone(tmp_path / "out/backbone-r18.onnx").metadata
    assert metadata["source"] == "backbone.pth" and metadata["network"] == "r18"


def test_a_card_with_other_words_is_never_written_over(run, tmp_path):
    export_onnx.main(ExportOptions(model=run, out=tmp_path))
    export_onnx.main(ExportOptions(model=run, out=tmp_path))  # the same: nothing in the way
    edited = (tmp_path / "first-r18.md").read_text() + "\nThe photos are ours.\n"
    (tmp_path / "first-r18.md").write_text(edited)
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"first-r18\.md is not the card .* move it away"):
        export_onnx.main(ExportOptions(model=run, out=tmp_path))
    assert before == {path: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
    if shutil.which("sha256sum"):  # an edited card is as good as one that is not
        assert not subprocess.run(["sha256sum", "-c", "first-r18.sha256"], cwd=tmp_path).returncode


def test_weights_that_change_while_they_are_read_are_not_exported(tmp_path, monkeypatch):
    run, other = make_run(tmp_path / "r"), make_run(tmp_path / "other", photos="1")
    real = utils.load_backbone

    def load(*arguments, **words):
        network = real(*arguments, **words)
        for name in (checkpoint.BEST, checkpoint.CHECKSUMS):
            shutil.copyfile(other / name, run / name)
        return network

    monkeypatch.setattr(utils, "load_backbone", load)
    with pytest.raises(InputError, match="changed while it was read: run again"):
        export_onnx.main(ExportOptions(model=run))
    assert not (run / "export").exists()


def test_an_onnx_beside_a_name_that_is_not_utf8(exported, tmp_path):
    shutil.copyfile(exported / "first-r18.onnx", tmp_path / "a.onnx")
    (tmp_path / os.fsdecode(b"latin-\xe9.txt")).touch()
    assert embeddings.hash_model(tmp_path / "a.onnx") == checkpoint.sha256(tmp_path / "a.onnx")


def test_our_own_checkpoint_is_not_said_to_be_of_others(run, tmp_path):
    state, _ = checkpoint.load_weights(run / checkpoint.BEST)
    options = {"network": "r18", "width": 0.125, "embedding_size": 32}
    saved = {"format": 2, "backbone": state, "head": {}, "options": options}
    checkpoint.save_checkpoint(tmp_path, saved)
    export_onnx.main(ExportOptions(model=tmp_path / "last.pt", out=tmp_path / "out"))
    said = (tmp_path / "out/last-r18.md").read_text()
    assert "others" not in said.replace("(LFW and others)", "") and "licence and terms" not in said


# --- what the file says of its input --------------------------------------------------------------


def with_metadata(exported: Path, file: Path, **told: str) -> Path:
    model = onnx.load(exported / "first-r18.onnx")
    said = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, said | told)
    onnx.save(model, file)
    return file


def test_the_files_own_normalisation_counts_and_not_what_is_given(exported, tmp_path):
    crops = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    plain = utils.embed(utils.load_backbone(exported / "first-r18.onnx"), crops)
    given = utils.embed(utils.load_backbone(exported / "first-r18.onnx", mean=0, std=255), crops)
    assert np.array_equal(plain, given)
    other = with_metadata(exported, tmp_path / "a.onnx", input_mean="127", input_std="128")
    assert not np.allclose(utils.embed(utils.load_backbone(other), crops), plain)
    for bad in ("x", "nan", "0", "-1"):
        with pytest.raises(InputError, match="no usable input_mean and input_std"):
            utils.load_backbone(with_metadata(exported, tmp_path / "b.onnx", input_std=bad))


# --- refused --------------------------------------------------------------------------------------


def test_what_differs_from_pytorch_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch):
    real = export_onnx.folding.fold

    def wrong(network):
        folded = real(network)
        folded.fc.weight += 0.01 * folded.fc.weight.std() * torch.randn_like(folded.fc.weight)
        return folded

    monkeypatch.setattr(export_onnx.folding, "fold", wrong)
    with pytest.raises(InputError, match=r"differs from PyTorch \(cosine 0\.99.*nothing was writt"):
        export_onnx.main(ExportOptions(model=run, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = make_run(tmp_path / "r")
    state, metadata = checkpoint.load_weights(folder / checkpoint.BEST)
    state["fc.bias"][3] = float("nan")
    checkpoint.save_weights(folder / checkpoint.BEST, state, metadata)
    with pytest.raises(InputError, match="cosine nan"):
        export_onnx.main(ExportOptions(model=folder))
    assert not (folder / "export").exists()


def test_bad_input_is_refused(exported, run, tmp_path, monkeypatch):
    for changes, said in (
        ({"model": exported / "first-r18.onnx"}, "is an ONNX file already"),
        ({"model": tmp_path / "absent"}, "absent is not there"),
        ({"model": tmp_path}, "holds no best.safetensors"),
        ({"network": "r18"}, "--network is for a .pth or .pt"),
        ({"name": "a/b"}, "no plain name of a file"),
        ({"name": "-a"}, "no plain name of a file"),
        ({"name": "a\nb"}, "no plain name of a file"),
        ({"out": run, "name": "best"}, "would be written over"),
        ({"out": run / "config.json"}, "is a file: name a folder"),
    ):
        with pytest.raises(InputError, match=said) as error:
            export_onnx.main(ExportOptions(**{"model": run, "out": tmp_path / "out", **changes}))
        assert "\n" not in str(error.value)
    monkeypatch.setattr(export_onnx, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="export a narrower network"):
        export_onnx.main(ExportOptions(model=run, out=tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="pip install onnx onnxruntime"):
        export_onnx.main(ExportOptions(model=run, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_alone_are_not_put_beside_the_graph_of_an_earlier_export(run, tmp_path):
    export_onnx.main(ExportOptions(model=run, out=tmp_path, name="n"))
    (tmp_path / "n.md").unlink()  # as the refusal over a card advises
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"n\.onnx is of an earlier export: move it away"):
        export_onnx.main(ExportOptions(model=run, out=tmp_path, name="n", half=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "n.onnx").unlink()
    export_onnx.main(ExportOptions(model=run, out=tmp_path, name="n", half=True))


def test_a_stop_while_writing_leaves_no_sums(run, tmp_path, monkeypatch):
    export_onnx.main(ExportOptions(model=run, out=tmp_path))
    real = checkpoint.write_atomic

    def stopped(path, content):
        if path.suffix == ".safetensors":
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_atomic", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_onnx.main(ExportOptions(model=run, out=tmp_path))
    assert not (tmp_path / "first-r18.sha256").exists()


# --- the card -------------------------------------------------------------------------------------


def card(run: Path, **told: str) -> str:
    network = utils.load_backbone(run, fold=False)
    metadata = export_onnx.complete({**network.metadata, **told})
    best = run / checkpoint.BEST
    digest = checkpoint.sha256(best)
    return model_card.text("n", best, digest, metadata, {"n.onnx": b"x"}, network)


def report(run: Path, name: str, digest: str, pairs: str = "0" * 64) -> None:
    (run / name).mkdir()
    accuracy = {"mean": 0.80567, "std": 0.0222, "per_fold": [0.8] * 10}
    content = {
        "model": {"sha256": digest}, "accuracy": accuracy, "flip": True,
        "data": {"set": "a|b", "pairs": "pairs.txt", "pairs_sha256": pairs},
        "pairs": {"scored": 6000}, "tar_at_far": {"1e-3": 0.264},
    }  # fmt: skip
    checkpoint.write_json(run / name / "eval.json", content)


def test_the_card_says_what_is_known(run):
    said = card(run)
    assert "27 identities" in said and "1,620 photos" in said and "steps: 75" in said
    assert "`faces`" in said and "somebody" not in said  # where the data lie is nobody's business
    assert "81.25 %" in said and "71.25 degrees" in said and "0.1 % of 12,000 impostor" in said
    assert "epochs 3" in said and "abc1234" in said and "started from: random weights" in said
    assert "test sets (LFW and others): not measured" in said and "Not for:" in said
    assert checkpoint.sha256(run / checkpoint.BEST) in said
    assert "started from: others/r50.pth (whose training" in card(run, init="others/r50.pth")


def test_figures_come_from_reports_on_these_weights_alone(tmp_path):
    run = make_run(tmp_path / "r")
    digest = checkpoint.sha256(run / checkpoint.BEST)
    report(run, "others", "f" * 64)
    (run / "damaged").mkdir()
    (run / "damaged/eval.json").write_text("{")
    said = card(run)
    assert "not measured. Reports not cited" in said and "damaged, others" in said
    assert "80.57" not in said
    report(run, "demo", digest)
    said = card(run)
    assert "| a\\|b, pairs.txt, crop + mirror image | 6,000 | 80.57 % ± 2.22 " in said
    assert "| the other 9 folds | 26.4 % |" in said and "View 2" not in said
    report(run, "lfw", digest, LFW_PAIRS[0].sha256)
    assert "| LFW, View 2, crop" in card(run)


def test_a_card_without_files_or_figures_makes_nothing_up(tmp_path):
    run = make_run(tmp_path / "r")
    (run / "config.json").write_text('{"options": 5}')
    (run / "result.json").unlink()
    said = card(run, validation_accuracy="nan", threshold_degrees="x")
    assert "validation: not measured" in said and "threshold: not measured" in said
    assert "data: unknown" in said and "settings: unknown" in said and "steps: unknown" in said


LICENCE = "The licence and terms of the original weights apply."


def test_the_licence_of_what_the_weights_come_from_is_named(run):
    assert LICENCE not in card(run)
    assert LICENCE in card(run, source="backbone.pth")
    assert LICENCE in card(run, init="others/r50.pth")
    drawn = card(run, init=config.of_drawn_faces("drawn/best.safetensors"))
    assert LICENCE not in drawn and "may have seen" not in drawn and "data count" not in drawn
    assert "started from: drawn faces: drawn/best.safetensors\n" in drawn


def test_the_card_says_whose_pairs_the_threshold_was_taken_on(run):
    assert "0.1 % of 12,000 impostor pairs of pairsDevTest.txt; other" in card(
        run, threshold_from="pairsDevTest.txt"
    )
    assert "may have seen" not in card(run) and "may have seen" in card(run, init="a/b.pth")
    assert "pairs of pairsDevTest.txt, and 61.5 % of the genuine pairs there; other" in card(
        run, threshold_from="pairsDevTest.txt", threshold_tar="0.6150"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "margin arcface, m 0.3, s 32.0, head dense, epochs 20"),
        ({"margin": "cosface"}, "margin cosface, m3 0.35, s 32.0, head dense, epochs 20"),
        ({"margin": "combined", "m1": 1.1}, "margin combined, m1 1.1, m 0.3, m3 0.35, s 32.0"),
        ({"head": "sharded", "sample_rate": 0.1, "focal_gamma": 2.0, "easy_margin": True},
         "s 32.0, easy_margin True, focal_gamma 2.0, head sharded, sample_rate 0.1, epochs 20"),
        ({"schedule": "step"}, "schedule step, milestones 0.625 0.875, warmup 0.1"),
        ({"warmup": 0.0, "weight_decay": 0.0, "lr_batch": 0, "seed": 0, "min_images": 2},
         "lr 0.1, schedule cosine, augment flip, min_images 2, seed 0"),
    ],
)  # fmt: skip
def test_the_card_names_the_settings_that_were_in_use(tmp_path, changes, said):
    """All of them are options of train.py, and what was off or of another margin is left out."""
    options = config.plain(config.TrainOptions(**changes))
    assert set(options) >= {*model_card.SETTINGS, *sum(model_card.MARGINS.values(), ())}
    named = {said.split()[0] for said in model_card.settings(options)}
    assert named & {"m1", "m", "m3"} == set(model_card.MARGINS[options["margin"]])
    line = ", ".join(model_card.settings(options))
    assert said in line
    run = make_run(tmp_path / "r")
    checkpoint.write_json(run / "config.json", {"options": options})
    assert f"- settings: {line}\n" in card(run)
