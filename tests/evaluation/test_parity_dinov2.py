"""DINOv2 agrees with the same network in PyTorch, written here with Meta's names of tensors, on random weights.

Tolerances are fractions of the largest value; measured is 2e-6 for the network,
3e-6 for the table of positions, 1.8e-5 for the resize.
"""

import jax
import numpy as np
import pytest
from random_tensors import assert_close, random_tensors

from diffussm_jax.evaluation import dinov2
from diffussm_jax.evaluation.dinov2 import DINOv2, dinov2_extractor, params_of, resize_positions
from diffussm_jax.evaluation.pretrained import read_published
from diffussm_jax.evaluation.resize import resize_bicubic

torch = pytest.importorskip("torch", reason="parity of DINOv2 needs PyTorch")

import torch.nn.functional as F
from torch import nn

TOLERANCE = 1e-5
RESIZE_TOLERANCE = 3e-5  # PyTorch has positions in float32; Pillow, in test_resize.py, agrees to 4e-6
SMALL = DINOv2(width=48, depth=3, num_heads=4)


class Attention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class TorchBlock(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, num_heads), MLP(width)
        self.ls1, self.ls2 = Gain(width), Gain(width)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TorchDINOv2(nn.Module):
    def __init__(self, width, depth, num_heads):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 14, 14)})
        self.blocks = nn.ModuleList(TorchBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True) / 255
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (x - mean[:, None, None]) / deviation[:, None, None]
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + positions(self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


def positions(table):
    square = table[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    factor = (224 // 14 + 0.1) / 37
    return torch.cat([table[:, :1], F.interpolate(square, scale_factor=factor, mode="bicubic").flatten(2).mT], 1)


@pytest.fixture(scope="module")
def reference():
    network = TorchDINOv2(SMALL.width, SMALL.depth, SMALL.num_heads).eval()
    tensors = random_tensors({name: tuple(x.shape) for name, x in network.state_dict().items()})
    network.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})
    return network


@pytest.fixture(scope="module")
def tensors(reference, tmp_path_factory):
    """As read from a file in Meta's layout."""
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_pretrain.pth"
    torch.save(reference.state_dict(), path)
    return read_published(dinov2.published(SMALL), path)[0]


@pytest.mark.parametrize("size", [32, 256, 300])
def test_whole(size, reference, tensors):
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    images[1] = np.sort(images[1], 0)
    with torch.no_grad():
        expected = reference(torch.from_numpy(images)).numpy()
    assert np.abs(expected[1] - expected[0]).max() > 0.1
    actual = jax.jit(SMALL.apply)({"params": params_of(SMALL, tensors)}, images)["features"]
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("i", range(SMALL.depth))
def test_blocks(i, reference, tensors):
    x = np.random.default_rng(1).standard_normal((2, 11, SMALL.width), np.float32)
    with torch.no_grad():
        expected = reference.blocks[i](torch.from_numpy(x))
    params = jax.tree.map(lambda leaf: leaf[i], params_of(SMALL, tensors)["blocks"])
    assert_close(dinov2.Block(SMALL.num_heads).apply({"params": params}, x), expected, TOLERANCE)


def test_positions(reference):
    table = reference.pos_embed.detach()
    assert_close(resize_positions(table[0, 1:].numpy(), 16), positions(table)[0, 1:], TOLERANCE)


@pytest.mark.parametrize("shape", [(32, 32), (224, 224), (256, 300), (512, 100)])
def test_resize(shape):
    images = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
    expected = F.interpolate(
        torch.from_numpy(images).permute(0, 3, 1, 2).float(), (224, 224), mode="bicubic", antialias=True
    )
    assert_close(resize_bicubic(images, 224, 224), expected.permute(0, 2, 3, 1), RESIZE_TOLERANCE)


def test_the_extractor_reads_pytorch_files(reference, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(reference.state_dict(), path)
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    with torch.no_grad():
        expected = reference(torch.from_numpy(images))
    assert_close(dinov2_extractor(path, model=SMALL)(images)["features"], expected, TOLERANCE)
