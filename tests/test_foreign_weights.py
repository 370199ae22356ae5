"""Weights of others, as .pth and .pt. Run: python -m pytest tests/test_foreign_weights.py"""

import builtins
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import foreign_weights
import models
import utils
from config import InputError
from test_models import MBF_KEYS, fixture_weights

KIND = {"network": "r18", "width": 0.125, "embedding_size": 32}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = models.create(**KIND).eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def refused(path: Path, network: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        utils.load_backbone(path, network=network)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("named", [True, False])
def test_official_r18_weights_give_the_official_embeddings(shared, tmp_path, named, capsys):
    expected = json.loads((shared / "fixtures/iresnet_parity.json").read_text())["iresnet18"]
    file = save(tmp_path / "backbone.pth", fixture_weights(expected["keys"]))
    model = utils.load_backbone(file, network="r18" if named else None)
    told = capsys.readouterr().err
    assert told == ("" if named else f"{file}: by its keys r18, width 1.0, embedding size 512\n")
    batch = torch.from_numpy(
        (np.random.default_rng(1).random((2, 3, 112, 112)) * 2 - 1).astype(np.float32)
    )
    got = model(batch)  # (2, 512)
    first = torch.tensor(expected["first16"])
    assert ((got[:, :16] - first).norm() / first.norm()) < 1e-4
    torch.testing.assert_close(got.norm(dim=1), torch.tensor(expected["norm"]), rtol=1e-4, atol=0)
    assert model.metadata == {
        "network": "r18", "width": "1.0", "embedding_size": "512",
        "input": "112x112 RGB, (x - 127.5) / 127.5", "source": "backbone.pth",
    }  # fmt: skip


@pytest.mark.parametrize("name", [*models.BLOCKS, "se-r18", "se-r50", "mbf"])
def test_the_keys_tell_network_and_sizes(name):
    with torch.device("meta"):
        state = models.create(name, embedding_size=256, width=0.5).state_dict()
    assert foreign_weights.told_by(state) == name
    assert foreign_weights.sizes(state, name) == (0.5, 256)


WIDTHS = [0.01, 0.03, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.45, 0.5, 0.6, 2 / 3, 0.7,
          0.75, 0.8, 0.9, 1.0, 1.1, 1.25, 1.37, 1.5, 1.7, 2.0, 3.3]  # fmt: skip


@pytest.mark.parametrize("name", ["r18", "mbf"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_width_is_told_from_rounded_channels(name, width):
    """Any width that gives the same channels will do; a published one comes out as it is."""
    with torch.device("meta"):
        state = models.create(name, embedding_size=64, width=width).state_dict()
        found, size = foreign_weights.sizes(state, name)
        again = models.create(name, embedding_size=size, width=found).state_dict()
    assert {key: value.shape for key, value in again.items()} == {
        key: value.shape for key, value in state.items()
    }
    if width in (0.25, 0.5, 0.75, 1.0, 2.0):
        assert found == width


def test_official_mbf_keys_tell_mbf():
    state = {key: torch.zeros(shape, device="meta") for key, shape in MBF_KEYS.items()}
    assert foreign_weights.told_by(state) == "mbf"
    assert foreign_weights.sizes(state, "mbf") == (1.0, 512)


WRAPPED = {
    "plain": lambda state: state,
    "of DDP": lambda state: {f"module.{key}": value for key, value in state.items()},
    "DDP, of compiled": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    "compiled, of DDP": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "best": 0.5},
    "backbone, of DDP": lambda state: {
        "backbone": {f"module.{key}": value for key, value in state.items()}, "step": 7,
    },
    "arcface_torch's checkpoint": lambda state: {
        "epoch": 3, "global_step": 9, "state_dict_backbone": state,
    },
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_prefixes_and_wrappers_change_nothing(network, tmp_path, how, suffix):
    file = save(tmp_path / f"a{suffix}", WRAPPED[how](network.state_dict()))
    loaded = utils.load_backbone(file, fold=False)
    expected = network.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(network, tmp_path, kind):
    state = {
        key: value.to(kind) if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }
    loaded = utils.load_backbone(save(tmp_path / "a.pth", state), fold=False)
    for key, value in loaded.state_dict().items():
        assert value.dtype == network.state_dict()[key].dtype
        assert torch.equal(value, state[key].to(value.dtype))


def test_our_own_checkpoint_is_one_of_them(network, tmp_path):
    checkpoint.save_checkpoint(tmp_path, {"step": 1, "backbone": network.state_dict(), "head": {}})
    batch = torch.rand(2, 3, 112, 112)
    loaded = utils.load_backbone(tmp_path / "last.pt")
    assert torch.allclose(loaded(batch), network(batch), atol=1e-4)


@pytest.fixture
def ours(network, tmp_path) -> Path:
    """A checkpoint as train.py writes it, of a width that the shapes do not tell."""
    torch.manual_seed(0)
    options = {"network": "r18", "width": 0.13, "embedding_size": 32}
    state = {"format": 2, "backbone": network.state_dict(), "head": {}, "options": options}
    checkpoint.save_checkpoint(tmp_path, state)
    return tmp_path / "last.pt"


def test_our_own_checkpoint_tells_by_its_options(ours, capsys):
    assert utils.load_backbone(ours).metadata == {
        "network": "r18", "width": "0.13", "embedding_size": "32", "resolution": "112",
        "input": "112x112 RGB, (x - 127.5) / 127.5",
    }  # fmt: skip
    assert capsys.readouterr().err == ""  # nothing was guessed
    assert "says that it holds r18: leave --network out" in refused(ours, "r34")
    state = torch.load(ours, weights_only=True)
    state["options"]["init"] = "x/others/r50.pth"
    save(ours.with_name("a.pt"), state)
    assert utils.load_backbone(ours.with_name("a.pt")).metadata["init"] == "x/others/r50.pth"
    state["origin"] = "others/r50.pth"
    save(ours.with_name("a.pt"), state)
    assert utils.load_backbone(ours.with_name("a.pt")).metadata["init"] == "others/r50.pth"


@pytest.mark.parametrize("options", [5, {}, {"network": 1, "width": 1.0, "embedding_size": 32}])
def test_options_that_are_none_make_it_one_of_others(network, tmp_path, options):
    state = {"format": 2, "backbone": network.state_dict(), "options": options}
    metadata = utils.load_backbone(save(tmp_path / "a.pt", state)).metadata
    assert metadata["source"] == "a.pt" and metadata["network"] == "r18"


def test_a_flipped_bit_is_seen_where_the_sha256_is_known(ours, network):
    content = bytearray(ours.read_bytes())
    place = bytes(content).find(network.state_dict()["fc.weight"].numpy().tobytes()[:64])
    content[place + 3] ^= 0x10
    ours.write_bytes(content)
    assert "is damaged (its sha256 is not the one in checksums.json)" in refused(ours)
    (ours.parent / checkpoint.CHECKSUMS).unlink()
    utils.load_backbone(ours)


def test_a_name_that_is_not_utf8_can_be_kept_with_the_weights(network, tmp_path):
    file = save(tmp_path / os.fsdecode(b"latin-\xe9.pth"), network.state_dict())
    metadata = utils.load_backbone(file).metadata
    checkpoint.save_weights(tmp_path / "x.safetensors", network.state_dict(), metadata)
    assert checkpoint.load_weights(tmp_path / "x.safetensors")[1]["source"] == "latin-\\udce9.pth"


# --- refused --------------------------------------------------------------------------------------


def test_row26_another_network_is_refused_with_the_first_keys(network, tmp_path):
    state = network.state_dict()
    file = save(tmp_path / "a.pth", state)
    said = refused(file, "r34")
    assert "holds another network" in said and "layer1.2.bn1.weight: missing in the file" in said
    assert "layers.0.layers.0.weight: missing in the file" in refused(file, "mbf")
    del state["bn2.weight"]
    state |= {"extra": torch.zeros(2), "conv1.weight": torch.zeros(3, 3)}
    said = refused(save(tmp_path / "b.pth", state))
    assert "bn2.weight: missing in the file" in said and "extra: not in the network" in said
    assert "conv1.weight: (3, 3) in the file, (16, 3, 3, 3) in the network" in said


def test_a_file_that_claims_a_huge_network_takes_no_memory(network, tmp_path, monkeypatch):
    state = network.state_dict()
    state["layer4.0.conv2.weight"] = torch.zeros(1).expand(8000, 1, 1, 1)  # four bytes in the file
    file = save(tmp_path / "a.pth", state)
    real, made = models.create, []

    def create(*arguments, **words):
        made.append(real(*arguments, **words))
        return made[-1]

    monkeypatch.setattr(models, "create", create)
    assert "keys do not fit" in refused(file)
    assert [model.conv1.weight.device.type for model in made] == ["meta"]


class Evil:
    def __reduce__(self):
        return builtins.open, ("canary", "w")


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"state_dict": {"a": evil}}])
def test_row27_code_in_a_file_is_not_run(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    said = refused(save(tmp_path / "evil.pth", wrap(Evil())), "r18")
    assert "it asks for io.open, which is code" in said
    assert not (tmp_path / "canary").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_whole_module_and_torchscript_are_refused(network, tmp_path):
    file = save(tmp_path / "module.pth", network)
    assert "it asks for models.IResNet, which is code" in refused(file)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    assert "a TorchScript archive" in refused(tmp_path / "script.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "an empty dict"),
        ([torch.zeros(2)], "a list"),
        (torch.zeros(2), "a Tensor"),
        ({"state_dict": {}}, "an empty dict"),
        ({"a": 1}, "a is a int"),
        ({1: torch.zeros(2)}, "1 is a Tensor"),
        ({"a": torch.zeros(2).to_sparse()}, "no dense tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "no dense tensor of real numbers"),
        ({"a": torch.zeros(2)}, "do not tell which network"),
        ({"layer1.99999999999.x": torch.zeros(2)}, "do not tell which network"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_is_no_state_dict_is_refused(tmp_path, content, said):
    assert said in refused(save(tmp_path / "a.pth", content))


@pytest.mark.parametrize("content", [b"", b"hello\nworld\n", b"<html>", b"PK\x03\x04", b"\x80\x02"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    assert "is no plain state dict" in refused(tmp_path / "a.pth", "r50")
    half = save(tmp_path / "half.pth", {"a": torch.zeros(1000)})
    half.write_bytes(half.read_bytes()[:2000])
    assert "is no plain state dict" in refused(half)
    (tmp_path / "folder.pth").mkdir()
    assert "holds no best.safetensors" in refused(tmp_path / "folder.pth")
