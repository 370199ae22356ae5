"""Training, stopping and going on. Run: python -m pytest tests/test_train.py"""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import config
import data_gen
import models
import train
import training_state
import training_step
import utils
from arcface import ArcMarginHead
from config import InputError, TrainOptions
from conftest import make_prepared

TINY = {
    "network": "mbf", "width": 0.125, "embedding_size": 32, "epochs": 2, "batch_size": 16,
    "s": 16.0, "m": 0.2, "dropout": 0.2, "workers": 0, "log_every": 3, "threads": 1,
    "resolution": 48,
}  # fmt: skip


@pytest.fixture
def options(prepared, tmp_path) -> TrainOptions:
    return TrainOptions(data=prepared, runs=tmp_path / "runs", name="r", **TINY)


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory) -> tuple[TrainOptions, Path]:
    """A run that came to its end. Read only."""
    runs = tmp_path_factory.mktemp("runs")
    options = TrainOptions(data=prepared, runs=runs, name="r", **TINY)
    assert train.main(options) == 0
    return options, runs / "r"


def scalars(run: Path, name: str) -> list:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return events.Scalars(name)


def weights(run: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(run / "last.pt", weights_only=True)
    return {**saved["backbone"], **{f"head.{key}": v for key, v in saved["head"].items()}}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_leaves_what_it_promises(finished):
    _, run = finished
    names = {path.name for path in run.iterdir()}
    assert {"last.pt", "previous.pt", "best.safetensors", "checksums.json", "config.json",
            "result.json"} <= names  # fmt: skip
    what = json.loads((run / "config.json").read_text())
    assert what["options"]["network"] == "mbf" and what["identities"] == 27
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 20 and 0.5 < result["validation"] <= 1


def test_tensorboard_shows_what_it_should(finished):
    options, run = finished
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        *("train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm"),
        *("speed/photos_per_second", "speed/waiting_for_data", "validation/accuracy"),
    }
    assert set(tags["histograms"]) == {"theta/own", "theta/nearest_other"}
    assert tags["images"] == ["augmented"] and tags["tensors"] == ["options/text_summary"]
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == [3, 6, 9, 12, 15, 18, 20]
    assert [event.step for event in events.Scalars("validation/accuracy")] == [10, 20]
    expected = training_step.learning_rate(19, 20, options)
    assert events.Scalars("train/learning_rate")[-1].value == pytest.approx(expected)


def test_the_loss_falls_and_identities_are_learned(prepared, tmp_path):
    options = TrainOptions(
        data=prepared, runs=tmp_path, name="r", **{**TINY, "epochs": 12, "lr": 0.2, "s": 16.0}
    )
    train.main(options)
    losses = [event.value for event in scalars(tmp_path / "r", "train/loss")]
    assert losses[-1] < 0.6 * losses[0]
    accuracy = [event.value for event in scalars(tmp_path / "r", "train/accuracy")]
    assert accuracy[-1] > 0.5  # of 27 identities, on plain cosines
    assert json.loads((tmp_path / "r/result.json").read_text())["validation"] > 0.85


def test_a_run_is_a_function_of_its_seed(finished, tmp_path):
    options, run = finished
    train.main(dataclasses.replace(options, runs=tmp_path))
    assert same(weights(tmp_path / "r"), weights(run))
    train.main(dataclasses.replace(options, runs=tmp_path, name="other", seed=1))
    assert not same(weights(tmp_path / "other"), weights(run))


@pytest.mark.parametrize(("stop_at", "workers"), [(1, 0), (10, 0), (14, 0), (7, 2), (13, 2)])
def test_row21_a_stopped_run_goes_on_as_if_never_stopped(
    finished, tmp_path, monkeypatch, stop_at, workers
):
    options, run = finished
    options = dataclasses.replace(options, runs=tmp_path, workers=workers)

    class StopAt(train.Stop):  # as if SIGTERM came in that step
        calls = 0

        @property
        def code(self):
            type(self).calls += 1
            return 143 if self.calls >= stop_at else 0

        @code.setter
        def code(self, value):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(train, "Stop", StopAt)
        assert train.main(options) == 143
    stopped = torch.load(tmp_path / "r/last.pt", weights_only=True)["step"]
    assert 0 < stopped < 20
    with pytest.raises(InputError, match="add --resume"):
        train.main(options)
    assert train.main(dataclasses.replace(options, resume=True)) == 0
    assert same(weights(tmp_path / "r"), weights(run))
    assert (tmp_path / "r/result.json").read_text() == (run / "result.json").read_text()
    steps = [event.step for event in scalars(tmp_path / "r", "train/loss")]
    assert len(steps) == len(set(steps))


def test_a_run_from_before_an_option_goes_on(options, monkeypatch):
    """The option's default is what the run did."""
    options = dataclasses.replace(options, resolution=112, epochs=1, save_every=4)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", skip_result(checkpoint.write_json))
        train.main(options)
    run = options.runs / "r"
    content = json.loads((run / "config.json").read_text())
    del content["options"]["resolution"]
    content["commit"] = "abc1234"
    (run / "config.json").write_text(json.dumps(content))
    state = torch.load(run / "previous.pt", weights_only=True)  # of step 8 of 10
    del state["options"]["resolution"]
    checkpoint.save_checkpoint(run, state)
    with pytest.raises(InputError, match="resolution 112, now 48"):
        train.main(dataclasses.replace(options, resolution=48, resume=True))
    assert train.main(dataclasses.replace(options, resume=True)) == 0
    assert (run / "result.json").exists()
    told = json.loads((run / "config.json").read_text())
    assert told["commit"] == f"abc1234, {utils.commit()}"  # both have trained it


def test_code_that_ended_before_a_checkpoint_has_trained_nothing(tmp_path):
    (tmp_path / "config.json").write_text('{"commit": "abc1234"}')
    assert train.commits(tmp_path) == utils.commit()
    (tmp_path / checkpoint.PREVIOUS).touch()
    assert train.commits(tmp_path) == f"abc1234, {utils.commit()}"


def test_a_run_that_is_named_keeps_its_precision(finished):
    _, run = finished
    words = ["--resume", "--runs", str(run.parent), "--name", run.name, "--compile"]
    assert config.parse(TrainOptions, "", words).amp == "off"  # where auto would take bf16


@pytest.mark.parametrize("stored", ["auto", "bf16"])  # as of a run from before, and as of now
def test_a_run_keeps_the_precision_that_it_began_with(options, monkeypatch, stored):
    """Also where `auto`, as of a command without --name, would take another one now."""
    options = dataclasses.replace(options, epochs=1, save_every=4, amp="bf16")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", skip_result(checkpoint.write_json))
        train.main(options)
    run = options.runs / "r"
    content = json.loads((run / "config.json").read_text())
    content["options"]["amp"] = stored
    (run / "config.json").write_text(json.dumps(content))
    again = dataclasses.replace(options, amp="auto", resume=True)
    assert train.pick_amp(again, torch.device("cpu")) is None
    assert train.main(again) == 0
    told = json.loads((run / "config.json").read_text())
    assert (told["options"]["amp"], told["precision"]) == ("bf16", "torch.bfloat16")
    with pytest.raises(InputError, match="amp bf16, now off"):
        train.main(dataclasses.replace(options, amp="off"))
    content["precision"], content["options"]["amp"] = "torch.float16", "fp16"  # on a card
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"began in fp16 goes on with CUDA alone: choose another"):
        train.main(dataclasses.replace(again, device="cpu"))


def test_a_finished_run_says_so_and_other_options_are_refused(finished, capsys):
    options, run = finished
    before = (run / "last.pt").stat().st_mtime_ns
    assert train.main(options) == 0
    assert "is finished" in capsys.readouterr().out
    assert train.main(dataclasses.replace(options, log_every=7)) == 0  # changes no result
    with pytest.raises(InputError, match=r"lr 0\.1, now 0\.3"):
        train.main(dataclasses.replace(options, lr=0.3))
    assert (run / "last.pt").stat().st_mtime_ns == before


def test_a_run_may_be_started_from_another_place(finished, monkeypatch):
    options, _ = finished
    monkeypatch.chdir(options.data.parent)
    relative = dataclasses.replace(options, data=Path(options.data.name))
    assert train.main(relative) == 0  # the same run, and it is finished


def test_two_trainings_of_one_name_the_second_is_refused(options):
    (options.runs / "r").mkdir(parents=True)
    with (
        checkpoint.lock(options.runs / "r"),
        pytest.raises(InputError, match=f"in use by process {os.getpid()}"),
    ):
        train.main(options)


def test_row25_a_lost_checkpoint_never_starts_the_run_over(options, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_json", skip_result(checkpoint.write_json))
    train.main(options)
    run = options.runs / "r"
    (run / "previous.pt").unlink()
    (run / "last.pt").write_bytes(b"")
    for _ in range(2):  # and not at the second try either
        with pytest.raises(InputError, match=r"last\.pt is damaged"):
            train.main(dataclasses.replace(options, resume=True))


def test_added_photos_are_refused_at_resume(options, monkeypatch, tmp_path):
    changed = dataclasses.replace(options, data=make_prepared(tmp_path / "set", 30, 4))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", skip_result(checkpoint.write_json))
        train.main(changed)
    make_prepared(tmp_path / "set", 30, 5)
    with pytest.raises(InputError, match="or other photos"):
        train.main(dataclasses.replace(changed, resume=True))


def test_without_enough_pairs_all_photos_are_trained_on(options, tmp_path):
    changed = dataclasses.replace(options, data=make_prepared(tmp_path / "set", 20, 3), epochs=1)
    assert train.main(changed) == 0
    run = options.runs / "r"
    assert json.loads((run / "result.json").read_text())["validation"] is None
    assert json.loads((run / "config.json").read_text())["identities"] == 20
    assert (run / "best.safetensors").exists()


def test_resume_of_nothing_is_refused(options):
    with pytest.raises(InputError, match="no run to resume"):
        train.main(dataclasses.replace(options, resume=True))


def test_row25_a_damaged_last_checkpoint_is_passed_over(options, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "write_json", skip_result(checkpoint.write_json))
    train.main(options)  # ends without result.json, as if killed just before
    run = options.runs / "r"
    data = bytearray((run / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "last.pt").write_bytes(bytes(data))
    monkeypatch.undo()
    assert train.main(dataclasses.replace(options, resume=True)) == 0
    told = capsys.readouterr()
    assert "WARNING" in told.err and "last.pt is damaged" in told.err
    assert "going on from step 10" in told.out


def skip_result(real):
    return lambda path, value: None if path.name == "result.json" else real(path, value)


def test_row17_other_identities_are_refused_at_resume(options, monkeypatch, tmp_path):
    folder = make_prepared(tmp_path / "set", 30, 4)
    options = dataclasses.replace(options, data=folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", skip_result(checkpoint.write_json))
        train.main(options)
    make_prepared(tmp_path / "set", 31, 4)
    with pytest.raises(InputError, match="was trained on 30 identities"):
        train.main(dataclasses.replace(options, resume=True))


def test_the_weights_say_what_they_are(finished):
    _, run = finished
    _, metadata = checkpoint.load_weights(run / "best.safetensors")
    assert metadata["network"] == "mbf" and metadata["embedding_size"] == "32"
    assert metadata["resolution"] == "48"
    assert "RGB" in metadata["input"] and "127.5" in metadata["input"]
    assert 0 < float(metadata["threshold_degrees"]) < 180
    assert int(metadata["threshold_impostor_pairs"]) * float(metadata["threshold_far"]) >= 10
    assert metadata["threshold_from"] == "18 photos of 3 held-out identities"
    assert 0 <= float(metadata["threshold_tar"]) <= 1
    assert "init" not in metadata
    model = utils.load_backbone(run)
    assert model.metadata == metadata
    crops = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    embeddings = utils.embed(model, crops, flip=False)
    assert embeddings.shape == (3, 32) and embeddings.dtype == np.float32
    mirrored = utils.embed(model, crops[:, :, ::-1], flip=False)
    assert np.allclose(utils.embed(model, crops), embeddings + mirrored, atol=1e-5)
    batch = torch.from_numpy(crops).permute(0, 3, 1, 2) / 255  # the contract, written out
    assert torch.equal(utils.to_batch(crops), utils.to_batch(torch.from_numpy(crops)))
    assert torch.allclose(utils.to_batch(crops), (batch - 0.5) / 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 400}, "fewer than one batch"),
        ({"data": Path("nowhere")}, "nowhere/manifest.csv is not there"),
        ({"min_images": 7}, "lower --min-images"),
        ({"device": "cuda:99"}, "cuda:99 is not there"),
        ({"device": "abacus"}, "abacus is unknown"),
        ({"amp": "fp16", "device": "cpu"}, "fp16 needs CUDA"),
        ({"val_pairs": Path("x.txt")}, "needs --val-data"),
        ({"val_data": Path("x")}, "needs --val-data"),
        ({"m1": 1.2}, "--m1 is not of --margin arcface"),
        ({"m3": 0.2}, "--m3 is not of --margin arcface"),
        ({"margin": "cosface", "easy_margin": True}, "--easy-margin is not of --margin cosface"),
        ({"sample_rate": 0.5}, "--sample-rate is not of --head dense: it takes sharded"),
        ({"accumulate": 3}, "name a multiple of 3, at least 6"),
        ({"accumulate": 16}, "name a multiple of 16, at least 32"),
        ({"name": "a/b"}, "is no name of a folder"),
        ({"resolution": 60}, "--resolution 60 is no multiple of 16"),
    ],
)
def test_bad_input_is_refused_before_a_folder_is_made(options, change, said):
    with pytest.raises(InputError, match=said):
        train.main(dataclasses.replace(options, **change))
    assert not (options.runs / "r").exists()


def test_view_2_is_refused_for_validation(options, shared, prepared):
    changed = dataclasses.replace(options, val_data=prepared, val_pairs=shared / "data/pairs.txt")
    with pytest.raises(InputError, match="View 2"):
        train.main(changed)


def test_validation_on_given_pairs(options, prepared, tmp_path):
    lines = []
    for identity in range(10):
        one, other = f"id{identity:03d}", f"id{identity + 15:03d}"
        lines += [f"{one}/00.jpg\t{one}/01.jpg\t1", f"{one}/00.jpg\t{other}/00.jpg\t0"]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    changed = dataclasses.replace(
        options, epochs=1, val_data=prepared, val_pairs=tmp_path / "pairs.tsv"
    )
    assert train.main(changed) == 0
    result = json.loads((options.runs / "r/result.json").read_text())
    assert 0 <= result["validation"] <= 1
    assert json.loads((options.runs / "r/config.json").read_text())["identities"] == 30
    validation = train.make_validation(data_gen.load_faces(prepared, 1, False), changed)[1]
    assert validation.what == "pairs.tsv"  # no folder: it goes into the weights


def test_row28_no_update_is_made_with_a_loss_that_is_not_finite(options, monkeypatch):
    real, calls = F.cross_entropy, []

    def nan_at_the_fifth(*arguments, **words):
        calls.append(1)
        return real(*arguments, **words) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(training_step.F, "cross_entropy", nan_at_the_fifth)
    with pytest.raises(InputError) as error:
        train.main(dataclasses.replace(options, save_every=1))
    text = str(error.value)
    assert "step 4" in text and "learning rate" in text and "images/id" in text
    saved = torch.load(options.runs / "r/last.pt", weights_only=True)
    assert saved["step"] == 4
    assert all(torch.isfinite(value).all() for value in saved["backbone"].values())


def test_weight_decay_spares_norms_biases_and_slopes(options):
    backbone, head = models.create("se-r18", width=0.125), ArcMarginHead(512, 10)
    groups = training_step.make_optimizer(backbone, head, options).param_groups
    decayed, spared, last = groups
    assert decayed["weight_decay"] == options.weight_decay and spared["weight_decay"] == 0
    assert last["weight_decay"] == options.weight_decay
    assert last["params"][0] is head.weight and len(last["params"]) == 1
    names = {id(p): name for name, p in backbone.named_parameters()}
    for parameter in spared["params"]:
        assert "bn" in names[id(parameter)] or any(
            part in names[id(parameter)] for part in ("prelu", "bias", "downsample.1", "features")
        )
    counted = sum(len(group["params"]) for group in groups)
    trained = [p for m in (backbone, head) for p in m.parameters() if p.requires_grad]
    assert counted == len(trained)


def test_the_schedules(options):
    def rates(**change):
        changed = dataclasses.replace(options, lr=1.0, batch_size=32, lr_batch=32, **change)
        return [training_step.learning_rate(step, 100, changed) for step in range(100)]

    cosine = rates(schedule="cosine", warmup=0.1)
    assert cosine[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert cosine[10] == 1.0 and cosine[55] == pytest.approx(0.5) and cosine[99] < 0.001
    step = rates(schedule="step", warmup=0.0, milestones=(0.5, 0.75))
    assert step[0] == step[49] == 1.0
    assert step[50] == step[74] == pytest.approx(0.1) and step[75] == pytest.approx(0.01)
    poly = rates(schedule="poly", warmup=0.0)
    assert poly[0] == 1.0 and poly[50] == pytest.approx(0.25)
    linear = rates(schedule="linear", warmup=0.0)
    assert linear[0] == 1.0 and linear[50] == pytest.approx(0.5) and linear[75] < 0.26
    double = dataclasses.replace(options, lr=0.1, batch_size=256, lr_batch=128, warmup=0.0)
    assert training_step.learning_rate(0, 100, double) == pytest.approx(0.2)
    unscaled = dataclasses.replace(double, lr_batch=0)
    assert training_step.learning_rate(0, 100, unscaled) == pytest.approx(0.1)


def test_the_heads_of_the_options(options):
    def head(**change):
        made = training_step.make_head(dataclasses.replace(options, s=30.0, m=0.4, **change), 5)
        return made.s, made.m, made.m1, made.m3

    assert head(margin="arcface", m1=1.5, m3=0.2) == (30.0, 0.4, 1.0, 0.0)
    assert head(margin="cosface", m3=0.2) == (30.0, 0.0, 1.0, 0.2)
    assert head(margin="combined", m1=1.5, m3=0.2) == (30.0, 0.4, 1.5, 0.2)


# --- fine-tuning ----------------------------------------------------------------------------------


def start_from(run: Path, folder: Path, how: str) -> Path:
    """A run's best weights in each form that --init takes."""
    if how == "run folder":
        return run
    if how == ".safetensors":
        return Path(shutil.copy(run / "best.safetensors", folder / "weights.safetensors"))
    state, _ = checkpoint.load_weights(run / "best.safetensors")
    torch.save({f"module.{key}": value for key, value in state.items()}, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize("how", ["run folder", ".safetensors", ".pth"])
def test_init_starts_from_the_given_backbone_and_a_new_head(finished, tmp_path, monkeypatch, how):
    options, run = finished
    given = utils.load_backbone(run, fold=False)
    crops = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    seen = []

    def first_batch(net, batch, step, options):
        net.backbone.eval()
        seen.append((utils.embed(net.backbone, crops), net.head.weight.detach().clone(), step))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "backward", first_batch)
    for init in (start_from(run, tmp_path, how), None):
        with pytest.raises(KeyboardInterrupt):
            name = "tuned" if init else "fresh"
            train.main(dataclasses.replace(options, runs=tmp_path, name=name, init=init))
    (tuned, head, step), (fresh, other_head, _) = seen
    assert step == 0 and np.array_equal(tuned, utils.embed(given, crops))
    assert not np.allclose(tuned, fresh, rtol=0.1)
    assert torch.equal(head, other_head)  # the seed's, not the run's
    trained = torch.load(run / "last.pt", weights_only=True)["head"]["weight"]
    assert not torch.allclose(head, trained, atol=1e-3)


def test_a_run_that_starts_from_drawn_faces_says_so(finished, tmp_path, monkeypatch):
    options, run = finished
    options = dataclasses.replace(options, runs=tmp_path, init=run)
    assert "drawn faces" not in training_state.initial_weights(options)[1]
    monkeypatch.setattr(config, "DRAWN", options.data)
    told = training_state.initial_weights(options)[1]
    assert told == f"drawn faces: {run.name}/best.safetensors"
    assert train.main(options) == 0
    second = tmp_path / options.name
    assert utils.load_backbone(second).metadata["init"] == told
    monkeypatch.setattr(config, "DRAWN", config.DATA / "drawn")
    assert not config.knows_drawn_faces(second)
    monkeypatch.setattr(config, "DRAWN", options.data)
    assert not config.knows_drawn_faces(second)  # it started from something


@pytest.mark.parametrize(("stop_at", "how"), [(1, ".safetensors"), (13, ".pth")])
def test_row21_a_resumed_fine_tuning_needs_no_init_file(
    finished, tmp_path, monkeypatch, stop_at, how
):
    options, run = finished
    init = start_from(run, tmp_path, how)
    origin = f"{tmp_path.name}/{init.name}"  # not where somebody keeps it
    if how == ".safetensors":  # fine-tuned itself, from weights of others
        state, metadata = checkpoint.load_weights(init)
        checkpoint.save_weights(init, state, metadata | {"init": "others/r50.pth"})
        origin += ", started from others/r50.pth"
    options = dataclasses.replace(options, runs=tmp_path, init=init)
    assert train.main(dataclasses.replace(options, name="straight")) == 0

    class StopAt(train.Stop):
        calls = 0

        @property
        def code(self):
            type(self).calls += 1
            return 143 if self.calls >= stop_at else 0

        @code.setter
        def code(self, value):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(train, "Stop", StopAt)
        assert train.main(options) == 143
    init.unlink()
    words = ["--resume", "--runs", str(tmp_path), "--name", "r", "--threads", "1", "--workers", "0"]
    resumed = config.parse(TrainOptions, "", words)  # as a person would: --init comes from the run
    assert resumed.init == init.resolve()
    assert train.main(resumed) == 0
    assert same(weights(tmp_path / "r"), weights(tmp_path / "straight"))
    digests = {checkpoint.sha256(tmp_path / n / "best.safetensors") for n in ("r", "straight")}
    assert len(digests) == 1
    assert not same(weights(tmp_path / "r"), weights(run))
    assert json.loads((tmp_path / "r/config.json").read_text())["options"]["init"] == str(init)
    metadata = utils.load_backbone(tmp_path / "r").metadata
    assert metadata["init"] == origin
    assert utils.load_backbone(tmp_path / "r/last.pt").metadata["init"] == origin
    with pytest.raises(InputError, match=r"init .*weights\..*, now None"):
        train.main(dataclasses.replace(options, init=None))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"network": "r18"},
            r"conv1\.weight: missing .*its --network and sizes \(mbf, width 0\.125",
        ),
        ({"width": 0.25}, r"in the file, .* in the network.*\(mbf, width 0\.125"),
        ({"embedding_size": 64}, r"\(32, 64\) in the file, \(64, 64\) .* embedding size 32"),
        ({"init": Path("nowhere")}, "nowhere is not there"),
        ({"init": Path("x.onnx")}, "an .onnx holds a graph, no weights to train"),
        ({"init": Path("x.pth")}, "x.pth is no plain state dict"),
        ({"init": Path("x.txt")}, "x.txt is not a model"),
    ],
    ids=str,
)
def test_init_that_does_not_fit_is_refused_before_a_folder_is_made(
    finished, tmp_path, monkeypatch, change, said
):
    options, run = finished
    monkeypatch.chdir(tmp_path)
    for name in ("x.onnx", "x.pth", "x.txt"):
        Path(name).write_text("text")
    for how in ("run folder", ".pth"):
        init = start_from(run, tmp_path, how)
        words = {"runs": tmp_path / "runs", "init": init, **change}
        with pytest.raises(InputError, match=said) as error:
            train.main(dataclasses.replace(options, **words))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_init_whose_keys_tell_no_network_is_not_told_to_name_one(finished, tmp_path):
    options, run = finished
    state, _ = checkpoint.load_weights(run / "best.safetensors")
    torch.save({f"backbone.{key}": value for key, value in state.items()}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="name weights whose keys are those") as error:
        training_state.initial_weights(dataclasses.replace(options, init=tmp_path / "odd.pth"))
    assert "missing in the file" in str(error.value) and "--network" not in str(error.value)


def test_the_origin_names_all_that_the_weights_come_from(tmp_path):
    file = tmp_path / "b" / os.fsdecode(b"latin-\xe9.safetensors")
    name = "b/latin-\\udce9.safetensors"
    assert training_state.origin(file, {}) == name
    assert training_state.origin(file, {"source": "r50.pth"}) == f"{name}, made from r50.pth"
    said = training_state.origin(file, {"init": "a/x.pth, made from y"})
    assert said == f"{name}, started from a/x.pth, made from y"
    assert training_state.origin(tmp_path / "b/r50.pth", {"source": "r50.pth"}) == "b/r50.pth"
    assert len(training_state.origin(file, {"init": "x" * 10_000})) == 500


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_row23_a_signal_ends_the_step_and_saves(prepared, tmp_path, number, code):
    words = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    command = [sys.executable, str(config.ROOT / "train.py"), "--data", str(prepared), *words]
    command += ["--runs", str(tmp_path), "--name", "r", "--epochs", "500", "--workers", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("step "):
            break
    os.killpg(process.pid, number)  # as Ctrl-C does: the loader processes get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "--resume goes on" in out and "Traceback" not in err
    assert checkpoint.load_checkpoint(tmp_path / "r")[0]["step"] > 0


@pytest.mark.slow
def test_row22_thirty_kills_leave_no_unreadable_checkpoint(prepared, tmp_path):
    """SIGKILL a real run that saves at every step, again and again; each time it goes on."""
    words = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    command = [sys.executable, str(config.ROOT / "train.py"), "--data", str(prepared), *words]
    command += ["--runs", str(tmp_path), "--name", "r", "--epochs", "5000", "--save-every", "1"]
    rng = np.random.default_rng(0)
    reached = 0
    for kill in range(30):
        process = subprocess.Popen(
            [*command, *(["--resume"] if kill else [])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for line in process.stdout:
            if line.startswith("step "):
                break
        else:
            pytest.fail(process.stderr.read())
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.wait()
        saved, warnings = checkpoint.load_checkpoint(tmp_path / "r")
        assert warnings == [] and saved["step"] >= reached
        reached = saved["step"]
    assert reached >= 30


@pytest.mark.slow
def test_row21_three_kills_and_the_same_weights(prepared, tmp_path):
    """SIGKILL in mid-epoch, three times; bit-equal to a run that was never stopped, twice."""
    words = [
        f"--{key.replace('_', '-')}={value}" for key, value in TINY.items() if key != "workers"
    ]
    command = [sys.executable, str(config.ROOT / "train.py"), "--data", str(prepared), *words]
    command += ["--runs", str(tmp_path), "--epochs", "20", "--save-every", "7", "--log-every", "2"]
    rng = np.random.default_rng(1)
    subprocess.run([*command, "--name", "straight", "--workers", "0"], check=True)
    wanted = hashes(tmp_path / "straight")
    for workers in ("0", "2"):
        name = f"killed{workers}"
        for kill in range(4):
            resume = ["--resume"] if kill else []
            process = subprocess.Popen(
                [*command, "--name", name, "--workers", workers, *resume],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            if kill == 3:
                out, err = process.communicate(timeout=300)
                assert process.returncode == 0, err
                break
            stop_after = rng.integers(8, 25)
            for line in process.stdout:
                stop_after -= line.startswith("step ")
                if stop_after == 0:
                    break
            process.kill()
            process.wait()
        assert "going on from step" in out
        assert hashes(tmp_path / name) == wanted
        assert same(weights(tmp_path / name), weights(tmp_path / "straight"))
        steps = [event.step for event in scalars(tmp_path / name, "train/loss")]
        assert steps == list(range(2, 201, 2))


@pytest.mark.slow
@pytest.mark.skipif(not utils.has_compiler(), reason="no C++ compiler")
def test_row21_a_compiled_run_in_bf16_is_killed_and_ends_with_the_same_weights(prepared, tmp_path):
    """What the recipe `cpu` does, with its network at a small width."""
    command = [
        sys.executable, str(config.ROOT / "train.py"), "--data", str(prepared), "--recipe", "cpu",
        *("--amp", "bf16", "--width", "0.25", "--resolution", "48", "--embedding-size", "32"),
        *("--batch-size", "16", "--epochs", "3", "--save-every", "5", "--log-every", "1"),
        *("--threads", "1", "--runs", str(tmp_path)),
    ]  # fmt: skip
    subprocess.run([*command, "--name", "straight"], check=True, capture_output=True)
    with subprocess.Popen([*command, "--name", "killed"], stdout=subprocess.PIPE, text=True) as one:
        for line in one.stdout:
            if line.startswith("step") and int(line.split()[1].split("/")[0]) == 13:
                one.kill()
                break
    done = subprocess.run(
        [*command, "--name", "killed", "--resume"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "going on from step 10" in done.stdout, done.stderr
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "straight")


def hashes(run: Path) -> tuple[str, str]:
    """Of the best weights, and of the result."""
    return checkpoint.sha256(run / "best.safetensors"), (run / "result.json").read_text()
