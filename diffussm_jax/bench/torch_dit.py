"""DiT with adaLN-Zero in plain PyTorch: what our own is timed beside, and compared with.

Written from the paper (arXiv 2212.09748) and the published names of the tensors, so that it shares nothing else with
`models.dit`.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

NUM_TIME_FEATURES = 256


def position_table(size: int, width: int) -> torch.Tensor:
    """[1, size**2, width] float32: sines and cosines of the column, then of the row, of each patch."""
    frequencies = np.array([10_000 ** (-4 * i / width) for i in range(width // 4)])
    table = np.empty((size, size, width))
    for row in range(size):
        for column in range(size):
            parts = [f(position * frequencies) for position in (column, row) for f in (np.sin, np.cos)]
            table[row, column] = np.concatenate(parts)
    return torch.from_numpy(table.reshape(1, size * size, width)).float()


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, J, D]."""

    def __init__(self, patch_size: int, num_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(num_channels, width, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """[B] -> [B, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUM_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = NUM_TIME_FEATURES // 2
        # In float64, because at t = 1000 the rounding of a float32 exponential moves the angles by 1e-4.
        exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * exponents).float()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """[B] -> [B, D]; the last row is the null label."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    """[B, J, D] -> [B, J, D]."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """[B, J, D] -> [B, J, D]."""

    def __init__(self, width: int, num_hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, num_hidden)
        self.fc2 = nn.Linear(num_hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """x [B, J, D], c [B, D] -> [B, J, D]."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = MLP(width, int(mlp_ratio * width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_1[:, None] * self.attn(_modulated(x, shift_1, scale_1))
        return x + gate_2[:, None] * self.mlp(_modulated(x, shift_2, scale_2))


class FinalLayer(nn.Module):
    """x [B, J, D], c [B, D] -> [B, J, P * P * channels]."""

    def __init__(self, width: int, num_outputs: int):
        super().__init__()
        self.linear = nn.Linear(width, num_outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(_modulated(x, *self.adaLN_modulation(c).chunk(2, 1)))


class TorchDiT(nn.Module):
    """(x_t [B, C, H, W], t [B], y [B] int64) -> [B, 2 C, H, W], for H = W = `latent_size`.

    Its initial values are PyTorch's: no layer starts at zero.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        mlp_ratio: float = 4.0,
        latent_size: int = 32,
        num_channels: int = 4,
        num_classes: int = 1000,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.x_embedder = PatchEmbed(patch_size, num_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.pos_embed = nn.Parameter(position_table(latent_size // patch_size, width), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2 * 2 * num_channels)

    def forward(self, x_t, t, y):
        P = self.patch_size
        B, _, H, W = x_t.shape
        x = self.x_embedder(x_t) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).reshape(B, H // P, W // P, P, P, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)
