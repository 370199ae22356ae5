"""The weights that ship with the repo. Run: python -m pytest tests/test_weights.py"""

import hashlib
import json

import torch
from PIL import Image

import checkpoint
import config
from synthetic_faces import draw_face

MOST_BYTES = 8_000_000


def test_they_are_the_recipe_in_fp16_and_their_card_goes_with_them():
    assert config.WEIGHTS.stat().st_size <= MOST_BYTES
    state, metadata = checkpoint.load_weights(config.WEIGHTS)
    for key in ("network", "width", "embedding_size", "resolution"):
        assert metadata[key] == str(config.RECIPES["cpu"][key])
    assert {value.dtype for value in state.values() if value.ndim > 1} == {torch.float16}
    digest = hashlib.sha256(config.WEIGHTS.read_bytes()).hexdigest()
    sums = config.WEIGHTS.with_suffix(".sha256").read_text()
    assert sums == f"{digest}  {config.WEIGHTS.name}\n"
    card = config.WEIGHTS.with_suffix(".md").read_text()
    for said in (digest, metadata["commit"], "LFW, View 2", "Research on face verification"):
        assert said in card


def test_two_photos_are_compared_with_nothing_trained(script, tmp_path):
    angles = []
    for person in (3, 4):
        for number, shown in enumerate((3, person)):
            Image.fromarray(draw_face(0, shown, number)[0]).save(tmp_path / f"{number}.png")
        done = script("verify.py", tmp_path / "0.png", tmp_path / "1.png", "--json",
                      "--model", config.WEIGHTS)  # fmt: skip
        assert done.returncode == 0, done.stderr
        angles.append(json.loads(done.stdout))
    print(angles)
