"""The networks against facenet-pytorch's own. Run: python -m pytest tests/test_mtcnn.py"""

import pytest
import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet

import mtcnn


@pytest.fixture(scope="module")
def networks():
    return mtcnn.load("cpu")


def draw(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels from 0 to 255, (N, H, W, 3), and the same as facenet-pytorch takes them."""
    pixels = torch.rand(*shape, 3, generator=torch.Generator().manual_seed(0)) * 255
    return pixels, ((pixels - 127.5) / 128).permute(0, 3, 1, 2)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(42, 60), (12, 12), (14, 40)])
def test_pnet(networks, shape):
    pixels, planes = draw(2, *shape)
    shift, probability = PNet()(planes)
    score, features = mtcnn.propose(networks[0], pixels, torch.zeros(0, dtype=torch.long))
    assert torch.allclose(score, probability[:, 1], atol=1e-5)
    found = mtcnn.shifts(networks[0], features.flatten(0, 2)).view(*features.shape[:3], 4)
    assert torch.allclose(found, shift.permute(0, 2, 3, 1), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("size", [(15, 20), (16, 21), (17, 33)])
def test_pnet_with_an_odd_side_beside_something_else(networks, size):
    """The last pool of an odd level must not see what lies beside it on the canvas."""
    height, width = size
    canvas, _ = draw(1, 40, 48)
    part = canvas[:, :height, :width]
    _, probability = PNet()(((part - 127.5) / 128).permute(0, 3, 1, 2))
    hole = torch.zeros(38, 46, dtype=torch.bool)
    hole[height - 2 + (height % 2 == 0) * 100 :][:1, : width - 1] = True
    hole[: height - 1, width - 2 + (width % 2 == 0) * 100 :][:, :1] = True
    score, _ = mtcnn.propose(networks[0], canvas, hole.flatten().nonzero()[:, 0])
    rows, columns = probability.shape[2:]
    assert torch.allclose(score[0, :rows, :columns], probability[0, 1], atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 7, 40])
def test_rnet_and_onet(networks, count):
    pixels, planes = draw(count, 24, 24)
    shift, probability = RNet()(planes)
    seen = mtcnn.refine(networks[1], pixels)
    assert torch.allclose(seen, torch.cat([probability[:, 1:], shift], 1), atol=1e-5)
    pixels, planes = draw(count, 48, 48)
    shift, points, probability = ONet()(planes)
    seen = mtcnn.refine(networks[2], pixels)
    assert torch.allclose(seen, torch.cat([probability[:, 1:], shift, points], 1), atol=1e-5)
