"""Folded networks equal the whole ones. Run: python -m pytest tests/test_folding.py"""

import copy

import pytest
import torch
from torch import nn

import folding
import models


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


def network(name: str) -> nn.Module:
    """Random everywhere a trained one may be: BN weights, biases and running statistics too."""
    torch.manual_seed(1)
    model = models.create(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm(dim=1) / b.norm(dim=1)).max().item()


@pytest.mark.parametrize("name", ["r18", "se-r18", "mbf"])
@torch.inference_mode()
def test_a_folded_network_gives_the_same_embeddings(name, batch):
    model = network(name)
    before = copy.deepcopy(model.state_dict())
    folded = folding.fold(model)
    expected = model(batch)
    assert relative(folded(batch), expected) < 1e-5
    assert torch.isfinite(expected).all() and expected.std() > 1e-3  # there is something to equal
    after = model.state_dict()
    assert before.keys() == after.keys()  # the network itself is untouched
    assert all(torch.equal(before[key], after[key]) for key in before)


def normal(norm: nn.Module) -> nn.Module:
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.1, 3)
    return norm.double().eval()


@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.inference_mode()
def test_in_float64_each_piece_is_exact_padding_and_all(groups):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, bias=groups == 2).double()
    norm = normal(nn.BatchNorm2d(8))
    torch.testing.assert_close(folding.after(conv, norm)(x), norm(conv(x)), rtol=1e-12, atol=1e-12)

    first, linear, last = normal(nn.BatchNorm2d(4)), nn.Linear(144, 5).double(), nn.BatchNorm1d(5)
    last = normal(last)
    one = folding.before(first, folding.after(linear, last), 36)
    expected = last(linear(first(x).flatten(1)))
    torch.testing.assert_close(one(x.flatten(1)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "left"), [("r18", 8), ("se-r18", 8), ("r50", 24), ("mbf", 0)])
def test_only_the_norms_before_a_padded_convolution_stay(name, left):
    """One a block, its first; it can't be folded exactly."""
    folded = folding.fold(models.create(name, width=0.125, embedding_size=16))
    norms = [
        key
        for key, module in folded.named_modules()
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
    ]
    assert len(norms) == left
    assert all(key.endswith(".bn1") and key.startswith("layer") for key in norms)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not folded.training


def test_another_network_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        folding.fold(nn.Linear(2, 2))


def test_the_benchmark_runs_both_ways_and_they_agree(script):
    done = script(
        "benchmarks/embed.py", "--network", "mbf", "--crops", 20, "--rounds", 1, "--batch-size", 20
    )
    assert done.returncode == 0, done.stderr
    apart = float(done.stderr.split("apart by ")[1].split()[0])
    assert apart < 1e-4
    row = done.stdout.splitlines()[-1].split("|")
    assert row[1:3] == [" mbf ", " 20 "] and float(row[5].split()[0]) > 0
