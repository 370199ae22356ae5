"""One step of training. Run: python -m pytest tests/test_training_step.py"""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import config
import data_gen
import models
import train
import training_state
import training_step
from arcface import ArcMarginHead
from config import InputError, TrainOptions
from sharded_head import ShardedHead
from test_train import TINY

CPU = torch.device("cpu")
C = 9  # identities


@pytest.fixture
def options() -> TrainOptions:
    return TrainOptions(**{**TINY, "dropout": 0.0, "batch_size": 8})


@pytest.fixture
def batch() -> data_gen.Batch:
    generator = torch.Generator().manual_seed(3)
    crops = torch.randint(256, (8, 112, 112, 3), generator=generator, dtype=torch.uint8)
    return data_gen.Batch(
        crops, torch.randint(C, (8,), generator=generator), torch.arange(100, 108)
    )


@pytest.fixture
def faces(tmp_path) -> data_gen.FaceSet:
    names = [f"photo{number}.jpg" for number in range(200)]
    labels = torch.arange(200).remainder(C).numpy()
    return data_gen.FaceSet(tmp_path, labels, [f"id{c}" for c in range(C)], names)


def build(options: TrainOptions, amp: torch.dtype | None = None) -> training_step.Net:
    net = training_step.build(options, C, CPU, amp)
    net.backbone.train()
    return net


def grads(net: training_step.Net) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in net.backbone.named_parameters() if p.grad is not None}
    return {**found, "head": net.head.weight.grad}


def test_a_sharded_head_on_one_rank_trains_as_a_dense_one(options, batch):
    nets = []
    for kind in ("dense", "sharded"):
        changed = dataclasses.replace(options, head=kind)
        net = build(changed)
        with torch.no_grad():
            net.head.weight.copy_(torch.linspace(-1, 1, C * 32).reshape(C, 32).sin())
        training_step.backward(net, batch, 0, changed)
        training_step.update(net, training_step.gradient_norm(net), True, 0.1, 1.0)
        nets.append(net)
    dense, sharded = nets
    assert isinstance(sharded.head, ShardedHead) and isinstance(dense.head, ArcMarginHead)
    assert torch.allclose(dense.head.weight, sharded.head.weight, rtol=1e-4, atol=1e-6)
    one, other = dense.backbone.state_dict(), sharded.backbone.state_dict()
    assert all(torch.allclose(one[key], other[key], rtol=1e-3, atol=1e-5) for key in one)


def test_passes_divide_the_loss(options, batch):
    """In eval mode, BN mixes no photos: the gradients of 1, 2 and 4 passes are one another's."""
    found = []
    for passes in (1, 2, 4):
        changed = dataclasses.replace(options, accumulate=passes)
        net = build(changed)
        net.backbone.eval()
        entropy, own, other = training_step.backward(net, batch, 0, changed)
        assert entropy.shape == own.shape == other.shape == (8,)
        found.append((grads(net), entropy))
    for values, entropy in found[1:]:
        assert torch.allclose(entropy, found[0][1], rtol=1e-4)
        for name, wanted in found[0][0].items():
            error = (values[name] - wanted).norm() / wanted.norm()
            assert error < 1e-4, (name, error)


def test_sampled_centres_alone_move(options, batch):
    changed = dataclasses.replace(options, head="sharded", sample_rate=0.5, accumulate=2)
    net = build(changed)
    before = net.head.weight.detach().clone()
    training_step.backward(net, batch, 0, changed)
    grad = net.head.weight.grad
    assert grad.is_sparse and grad.is_coalesced()
    touched = grad.indices()[0]
    assert torch.isin(batch.labels, touched).all()
    norm = training_step.gradient_norm(net)
    dense = torch.nn.utils.get_total_norm(
        [*(g for name, g in grads(net).items() if name != "head"), grad.to_dense()]
    )
    assert torch.allclose(norm, dense)
    training_step.update(net, norm, True, 0.1, 5.0)
    moved = (net.head.weight != before).any(dim=1).nonzero()[:, 0]
    assert torch.equal(moved, touched)


def test_the_gradient_is_clipped_to_its_norm(options, batch):
    for head in ({"head": "dense"}, {"head": "sharded", "sample_rate": 0.5}):
        changed = dataclasses.replace(options, momentum=0.0, weight_decay=0.0, **head)
        net = build(changed)
        before = [p.detach().clone() for m in (net.backbone, net.head) for p in m.parameters()]
        training_step.backward(net, batch, 0, changed)
        norm = training_step.gradient_norm(net)
        assert norm > 1
        training_step.update(net, norm, True, 1.0, 0.5)
        after = [p for m in (net.backbone, net.head) for p in m.parameters()]
        moved = math.sqrt(
            sum(float(((a - b).detach() ** 2).sum()) for a, b in zip(after, before, strict=True))
        )
        assert moved == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("network", ["se-r18", "mbf"])
def test_checkpointing_changes_nothing_but_memory(options, batch, network):
    nets = []
    for kept in (False, True):
        changed = dataclasses.replace(options, network=network, checkpointing=kept)
        net = build(changed)
        training_step.backward(net, batch, 0, changed)
        nets.append(net)
    plain, again = nets
    assert all(torch.equal(grads(plain)[name], grads(again)[name]) for name in grads(plain))
    one, other = plain.backbone.state_dict(), again.backbone.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)  # running statistics too
    assert int(other[next(key for key in other if "num_batches" in key)]) == 1
    again.backbone.eval()
    with torch.no_grad():
        assert again.backbone(torch.rand(1, 3, 112, 112)).shape == (1, 32)


def test_row26_compiled_and_distributed_modules_save_plain_keys(options):
    changed = dataclasses.replace(options, compile=True)
    net = build(changed)
    assert net.run_backbone is not net.backbone
    keys = models.create("mbf", 32, width=0.125).state_dict().keys()
    assert net.backbone.state_dict().keys() == keys
    assert any(key.startswith("_orig_mod.") for key in net.run_backbone.state_dict())


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_takes_bf16_where_it_pays(options, monkeypatch, native):
    monkeypatch.setattr(train.utils, "multiplies_bf16", lambda: native)
    found = {
        (amp, compiled): train.pick_amp(
            dataclasses.replace(options, amp=amp, compile=compiled), CPU
        )
        for amp in ("auto", "bf16", "off")
        for compiled in (True, False)
    }
    assert found["auto", True] == (torch.bfloat16 if native else None)
    assert found["auto", False] is found["off", True] is found["off", False] is None
    assert found["bf16", True] == found["bf16", False] == torch.bfloat16


def test_a_compiler_that_fails_is_told_with_a_way_out(prepared, tmp_path):
    """In a process of its own: torch remembers the compiler that it has found."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    words = ["--data", prepared, "--runs", tmp_path, "--name", "r", "--network", "mbf"]
    words += ["--width", "0.125", "--epochs", "1", "--batch-size", "16", "--compile"]
    environment = {**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(config.ROOT / "train.py"), *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert "--compile failed (" in ended.stderr and "--no-compile" in ended.stderr


@pytest.mark.slow
def test_a_compiled_backbone_trains_as_the_plain_one(options, batch):
    found = []
    for compiled in (False, True):
        changed = dataclasses.replace(options, compile=compiled)
        net = build(changed)
        entropy, _, _ = training_step.backward(net, batch, 0, changed)
        found.append((entropy, grads(net)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-3)
    plain, other = (torch.cat([g.flatten() for g in values.values()]) for _, values in found)
    assert (plain - other).norm() < 0.01 * plain.norm()


def test_compile_without_a_compiler_is_refused(options, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    changed = dataclasses.replace(options, compile=True, name="r")
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        train.check_options(changed, 1)


def test_row26_a_checkpoint_of_another_network_lists_what_does_not_fit(options, tmp_path, faces):
    net = build(options)
    sampler = data_gen.RunSampler(200, 8, 1, 0)
    training_state.save(tmp_path, net, faces, "photos", options, sampler, 1, 0.5)
    saved = training_state.load(tmp_path)
    other = build(dataclasses.replace(options, network="se-r18"))
    with pytest.raises(InputError, match=r"keys do not fit: .*; .*; .*; .*; ") as error:
        training_state.restore(saved, other, tmp_path)
    assert "last.pt" in str(error.value)
    wider = build(dataclasses.replace(options, embedding_size=64))
    with pytest.raises(InputError, match=r"\(32, \d+\) in the file, \(64, \d+\) in the network"):
        training_state.restore(saved, wider, tmp_path)
    training_state.restore(saved, build(options), tmp_path)  # and it fits itself


def test_row26_a_checkpoint_of_an_older_format_is_refused(options, tmp_path, faces, monkeypatch):
    sampler = data_gen.RunSampler(200, 8, 1, 0)
    with monkeypatch.context() as patch:
        patch.setattr(training_state, "FORMAT", 1)
        training_state.save(tmp_path, build(options), faces, "photos", options, sampler, 1, 0.5)
    with pytest.raises(InputError, match="is of format 1"):
        training_state.load(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_row26_a_checkpoint_of_a_gpu_loads_on_a_cpu(options, tmp_path, faces):
    net = training_step.build(options, C, torch.device("cuda"), None)
    sampler = data_gen.RunSampler(200, 8, 1, 0)
    training_state.save(tmp_path, net, faces, "photos", options, sampler, 1, 0.5)
    training_state.restore(training_state.load(tmp_path), build(options), tmp_path)


def test_row28_zero_pixels_and_a_nan_pixel(options, batch, faces):
    net = build(options)
    black = batch._replace(crops=torch.zeros_like(batch.crops))
    entropy, _, _ = training_step.backward(net, black, 0, options)
    assert entropy.isfinite().all() and training_step.gradient_norm(net).isfinite()

    net.backbone.eval()  # BN in training mode would spread it over the whole batch
    with pytest.MonkeyPatch.context() as patch:
        real = training_step.utils.to_batch

        def spoiled(crops, device):
            pixels = real(crops, device)
            pixels[5, 1, 3, 4] = math.nan
            return pixels

        patch.setattr(training_step.utils, "to_batch", spoiled)
        entropy, _, _ = training_step.backward(net, batch, 0, options)
    norm = training_step.gradient_norm(net)
    code, loss_ok, norm_ok = training_step.agree(0, entropy, norm)
    assert (code, loss_ok, norm_ok) == (0, False, False)
    with pytest.raises(InputError) as error:
        training_step.check_finite(
            net, loss_ok, norm_ok, 7, 0.1, norm, entropy, batch, faces
        )  # fmt: skip
    text = str(error.value)
    assert "step 7" in text and "learning rate 0.1" in text
    assert "photos photo105.jpg, ..." in text  # the sixth of the batch, and no other


def test_row28_a_learning_rate_out_of_this_world(options, prepared, tmp_path):
    changed = dataclasses.replace(
        options, data=prepared, runs=tmp_path, name="r", lr=1e20, warmup=0.0, save_every=1
    )
    with pytest.raises(InputError, match=r"not finite|nan|inf"):
        train.main(changed)
    saved = training_state.load(tmp_path / "r")
    assert all(value.isfinite().all() for value in saved["backbone"].values())
    assert saved["head"]["weight"].isfinite().all()


def test_row28_overflows_of_fp16_are_counted_and_end_the_run_after_fifty(options, batch, faces):
    net = build(options)
    net.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    training_step.backward(net, batch, 0, options)
    before = net.head.weight.detach().clone()
    entropy = torch.ones(8)
    inf = torch.tensor(math.inf)
    for count in range(1, 51):
        training_step.check_finite(net, True, False, count, 0.1, inf, entropy, batch, faces)
        training_step.update(net, inf, False, 0.1, 5.0)
        assert net.overflows == net.all_overflows == count
    assert net.scaler._get_growth_tracker() == 0  # the scale grows after good steps in a row
    assert net.scaler.get_scale() == 2.0**-34 and torch.equal(net.head.weight, before)
    with pytest.raises(InputError, match="51 updates in a row overflowed in fp16 at step 51"):
        training_step.check_finite(net, True, False, 51, 0.1, inf, entropy, batch, faces)
    net.overflows = 50
    training_step.backward(net, batch, 0, options)  # a good one ends the row
    norm = training_step.gradient_norm(net)
    training_step.check_finite(net, True, True, 52, 0.1, norm, entropy, batch, faces)
    training_step.update(net, norm, True, 0.1, 5.0)
    assert net.overflows == 0 and net.all_overflows == 51
    assert not torch.equal(net.head.weight, before)


def test_a_scaled_loss_gives_the_same_step(options, batch):
    nets = []
    for scaled in (False, True):
        net = build(options)
        if scaled:
            net.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        training_step.backward(net, batch, 0, options)
        training_step.update(net, training_step.gradient_norm(net), True, 0.1, 5.0)
        nets.append(net)
    assert torch.allclose(nets[0].head.weight, nets[1].head.weight, rtol=1e-4, atol=1e-6)


def test_row36_out_of_memory_says_what_to_do(options, monkeypatch, prepared, tmp_path):
    changed = dataclasses.replace(
        options, data=prepared, runs=tmp_path, name="r", batch_size=16, accumulate=2, save_every=1
    )
    real, calls = F.cross_entropy, []

    def full_at_the_fifth(*arguments, **words):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(*arguments, **words)

    monkeypatch.setattr(training_step.F, "cross_entropy", full_at_the_fifth)
    with pytest.raises(InputError) as error:
        train.main(changed)
    text = str(error.value)
    assert "8 photos a pass" in text and "--accumulate" in text and "GB at the peak" in text
    assert training_state.load(tmp_path / "r")["step"] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_row36_out_of_memory_on_a_gpu(options, prepared, tmp_path):
    changed = dataclasses.replace(
        options, data=prepared, runs=tmp_path, name="r", network="r200", batch_size=128
    )
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with pytest.raises(InputError, match="out of memory at 128 photos a pass"):
            train.main(changed)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_memory_of_a_head():
    options = TrainOptions(batch_size=128)
    dense = training_step.head_memory(options, 85_164, 1)
    assert dense["weights"] == dense["gradient"] == dense["momentum"] == 85_164 * 512 * 4
    assert dense["logits"] == 4 * 128 * 85_164 * 4
    shared = dataclasses.replace(options, head="sharded", sample_rate=0.1)
    small = training_step.head_memory(shared, 1_000_000, 8)
    assert small["weights"] == small["momentum"] == 125_000 * 512 * 4
    assert small["gradient"] == 2 * 12_500 * 512 * 4
    assert small["logits"] == 3 * 128 * 12_500 * 4  # photos of all ranks, centres of this one


def test_a_head_larger_than_the_device_is_told(options, capsys, monkeypatch):
    net = build(options)
    monkeypatch.setattr(train.utils, "total_memory", lambda device: 10**6)
    train.print_what_runs(net, options, 1_000_000)
    told = capsys.readouterr()
    assert "dense head of 1,000,000 identities, a rank: weights 128 MB" in told.out
    assert "WARNING: the head needs" in told.err and "--head sharded" in told.err
    monkeypatch.undo()
    train.print_what_runs(net, options, 10)
    assert "WARNING" not in capsys.readouterr().err


def test_row30_labels_that_no_head_has_are_refused_before_the_first_step(faces):
    bad = dataclasses.replace(faces, labels=faces.labels + 1)
    with pytest.raises(InputError, match=r"label 9 at index 8 is outside 0\.\.8"):
        train.check_data(bad, TrainOptions(data=faces.folder, batch_size=8))


def test_the_recipes_fit_common_numbers_of_ranks():
    for recipe in ("casia-r50", "ms1m-r50", "ms1m-r100"):
        options = config.parse(TrainOptions, "", ["--recipe", recipe, "--name", "r"])
        for ranks in (1, 2, 4, 8, 16):
            train.check_options(options, ranks)


def test_compile_and_checkpointing_do_not_go_together(options):
    changed = dataclasses.replace(options, compile=True, checkpointing=True, name="r")
    with pytest.raises(InputError, match="do not go together"):
        train.check_options(changed, 1)


def test_row32_a_loader_process_that_dies_during_a_step_is_told(options):
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    told = training_step.explained(error, options, CPU)
    assert isinstance(told, InputError) and told.local and "--workers 0" in str(told)
    other = RuntimeError("something else")
    assert training_step.explained(other, options, CPU) is other


def test_row33_a_restart_takes_up_whatever_checkpoint_there_is(options, monkeypatch, tmp_path):
    changed = dataclasses.replace(options, data=tmp_path, runs=tmp_path, name="r")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.with_defaults(changed).resume is False
    (tmp_path / "r").mkdir()
    (tmp_path / "r/previous.pt").write_bytes(b"")
    assert train.with_defaults(changed).resume is True
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train.with_defaults(changed).resume is False
    assert train.with_defaults(dataclasses.replace(changed, resume=True)).resume is True


def test_a_shard_moves_to_other_ranks_with_its_momentum(options, tmp_path):
    """Parts of three ranks, loaded by one."""
    weight, momentum = torch.randn(C, 32), torch.randn(C, 32)
    parts = {}
    for rank in range(3):
        rows = slice(3 * rank, 3 * rank + 3)
        part = {"start": 3 * rank, "weight": weight[rows], "momentum": momentum[rows]}
        name, digest = checkpoint.save_part(tmp_path, 5, rank, 3, part)
        parts[name] = digest
    head = ShardedHead(32, C)
    assert torch.equal(training_state.load_centres(tmp_path, parts, head), momentum)
    assert torch.equal(head.weight, weight)
    del parts[name]
    with pytest.raises(InputError, match="do not hold all identities"):
        training_state.load_centres(tmp_path, parts, head)


def test_row25_a_lost_config_is_taken_from_the_checkpoint(options, prepared, tmp_path, capsys):
    begun = dataclasses.replace(options, data=prepared, runs=tmp_path, name="r", batch_size=16)
    assert train.main(begun) == 0
    (tmp_path / "r/result.json").unlink()
    for content in (None, "{", '{"options": {"batch_size": "x"}}'):
        if content is None:
            (tmp_path / "r/config.json").unlink()
        else:
            (tmp_path / "r/config.json").write_text(content)
        with pytest.raises(InputError, match=r"other options \(lr 0\.1, now 0\.3\)"):
            train.main(dataclasses.replace(begun, lr=0.3, resume=True))
        with pytest.raises(InputError, match="add --resume"):
            train.main(begun)
        assert "taken from the checkpoint" in capsys.readouterr().out
    assert train.main(dataclasses.replace(begun, resume=True)) == 0
    assert train.open_run(tmp_path / "r", train.with_defaults(begun)) == "finished"
