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
    """Drawn faces, which the network has never seen: one person's are nearer to each other."""
    angles = []
    for number, person in enumerate((3, 3, 4)):
        Image.fromarray(draw_face(0, person, number)[0]).save(tmp_path / f"{number}.png")
    for other in (1, 2):
        done = script("verify.py", tmp_path / "0.png", tmp_path / f"{other}.png", "--json",
                      "--model", config.WEIGHTS)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert 0 < found["threshold"] < 90
        angles.append(found["angle"])
    assert angles[0] < angles[1]
