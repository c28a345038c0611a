"""ADM's and LDM's U-Net in plain PyTorch: what our own is timed beside, and compared with.

Written from the papers and the published structure. It shares nothing with `models.unet` but the names of the tensors,
which are guided-diffusion's and latent-diffusion's.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """A residual block; `change`, if any, changes the resolution of both of its branches."""

    def __init__(self, n_in: int, n_out: int, n_emb: int, groups: int, scale_shift: bool, change=None):
        super().__init__()
        self.change, self.scale_shift = change or nn.Identity(), scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, n_in), nn.SiLU(), nn.Conv2d(n_in, n_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(n_emb, 2 * n_out if scale_shift else n_out))
        last = _zero(nn.Conv2d(n_out, n_out, 3, padding=1))
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, n_out), nn.SiLU(), nn.Dropout(0), last)
        self.skip_connection = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x, emb, context):
        norm, silu, conv = self.in_layers
        h = conv(self.change(silu(norm(x))))
        of_emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = of_emb.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + of_emb)
        return self.skip_connection(self.change(x)) + h


class AttentionBlock(nn.Module):
    """ADM's self-attention, with either order of q, k and v."""

    def __init__(self, channels: int, heads: int, groups: int, new_order: bool):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x, emb, context):
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        order = (3, self.heads) if self.new_order else (self.heads, 3)
        q, k, v = qkv.unflatten(1, (*order, -1)).mT.unbind(1 if self.new_order else 2)
        h = F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)
        return (flat + self.proj_out(h)).reshape(x.shape)


class CrossAttention(nn.Module):
    """Attention of x [B, L, C] onto a context [B, S, C']."""

    def __init__(self, n_query: int, n_context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(n_query, n_query, bias=False)
        self.to_k = nn.Linear(n_context, n_query, bias=False)
        self.to_v = nn.Linear(n_context, n_query, bias=False)
        self.to_out = nn.Sequential(nn.Linear(n_query, n_query), nn.Dropout(0))

    def forward(self, x, context):
        by_head = (f.unflatten(2, (self.heads, -1)) for f in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(*(f.transpose(1, 2) for f in by_head))
        return self.to_out(h.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """The first half of a linear layer's outputs, times GELU of the second."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.proj = nn.Linear(n_in, 2 * n_out)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """A GEGLU of four times the channels, and a linear layer."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(0), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward."""

    def __init__(self, channels: int, heads: int, n_context: int):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, n_context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x), self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """LDM's transformer over all positions."""

    def __init__(self, channels: int, heads: int, groups: int, n_context: int, depth: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, n_context) for _ in range(depth))
        self.proj_out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb, context):
        h = self.proj_in(self.norm(x)).flatten(2).mT
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.mT.reshape(x.shape))


class Downsample(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb, context):
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb, context):
        return self.conv(F.interpolate(x, scale_factor=2))


class ConvIn(nn.Conv2d):
    """The first convolution."""

    def forward(self, x, emb, context):
        return super().forward(x)


class TorchUNet(nn.Module):
    """x [B, C, H, W], t [B], labels [B] or None, context [B, T, n_context] or None -> [B, num_outputs C, H, W].

    The arguments are those of `models.UNet`, and:

    Args:
      image_size: of x.
      n_in: C.
      num_classes: rows of the table of labels; 0 for none.
      n_context: channels of the context of LDM's transformers; 0 for ADM's attention.
    """

    def __init__(
        self,
        image_size: int,
        n_in: int,
        *,
        width: int,
        channel_mult: Sequence[float],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_outputs: int = 2,
        num_classes: int = 0,
        n_context: int = 0,
        num_heads: int = 1,
        num_head_channels: int = 0,
        qkv_order: str = "new",
        transformer_depth: int = 1,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        n_emb, groups = 4 * width, norm_num_groups
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, n_emb), nn.SiLU(), nn.Linear(n_emb, n_emb))
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, n_emb)

        def residual(n_in, n_out, change=None):
            return ResBlock(n_in, n_out, n_emb, groups, use_scale_shift_norm, change)

        def attention(channels):
            heads = channels // num_head_channels if num_head_channels else num_heads
            if n_context:
                return SpatialTransformer(channels, heads, groups, n_context, transformer_depth)
            return AttentionBlock(channels, heads, groups, qkv_order == "new")

        features = [int(factor * width) for factor in channel_mult]
        has_attention = [image_size // 2**level in attention_resolutions for level in range(len(features))]
        channels = [features[0]]  # of each output that is kept
        self.input_blocks = nn.ModuleList([nn.ModuleList([ConvIn(n_in, features[0], 3, padding=1)])])
        for level, n in enumerate(features):
            for _ in range(num_res_blocks):
                block = [residual(channels[-1], n)] + [attention(n)] * has_attention[level]
                self.input_blocks.append(nn.ModuleList(block))
                channels.append(n)
            if level < len(features) - 1:
                down = residual(n, n, nn.AvgPool2d(2)) if resblock_updown else Downsample(n)
                self.input_blocks.append(nn.ModuleList([down]))
                channels.append(n)
        self.middle_block = nn.ModuleList([residual(n, n), attention(n), residual(n, n)])
        self.output_blocks = nn.ModuleList()
        for level, n_out in reversed(list(enumerate(features))):
            for i in range(num_res_blocks + 1):
                block = [residual(n + channels.pop(), n_out)] + [attention(n_out)] * has_attention[level]
                n = n_out
                if level and i == num_res_blocks:
                    block.append(residual(n, n, nn.Upsample(scale_factor=2)) if resblock_updown else Upsample(n))
                self.output_blocks.append(nn.ModuleList(block))
        last = _zero(nn.Conv2d(n, num_outputs * n_in, 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(groups, n), nn.SiLU(), last)

    def forward(self, x, t, labels=None, context=None):
        half = self.width // 2
        # In float64, because at t = 1000 the rounding of a float32 exponential moves the angles by 1e-4.
        exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * exponents).float()
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        if labels is not None:
            emb = emb + self.label_emb(labels)
        kept = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, emb, context)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, emb, context)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], 1)
            for layer in block:
                x = layer(x, emb, context)
        return self.out(x)
