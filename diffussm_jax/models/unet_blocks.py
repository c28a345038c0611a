"""The blocks of the U-Net: residual blocks, ADM's self-attention and LDM's transformer with cross-attention."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffussm_jax.layers import PYTORCH_INIT, Linear, attend, conv, group_norm
from diffussm_jax.parallel.sharding import replicate_channels, replicate_kernel

QKV_ORDERS = ("new", "legacy")
_NHWC = ("NHWC", "HWIO", "NHWC")


def _forward(x: jax.Array, kernel: jax.Array, stride: int, **options) -> jax.Array:
    options = {"padding": ((1, 1), (1, 1)), **options}
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), dimension_numbers=_NHWC, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """3 x 3 convolution of x [B, H, W, C] with zero padding; H and W are multiples of the stride, which is 1 or 2.

    The gradients are JAX's, bit for bit, as convolutions of the same layout. XLA:CPU has fast code for this layout, and
    brings others into it only outside of loops: in a scan over microbatches JAX's own gradient of a kernel takes 300
    times as long. Programs for TPUs and GPUs are the same either way.
    """
    return _forward(x, kernel, stride)


def _convolve_forward(x, kernel, stride):
    return _forward(x, kernel, stride), (x, kernel)


def _convolve_backward(stride, residuals, dy):
    x, kernel = residuals
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    dx = _forward(dy, flipped, 1, lhs_dilation=(stride, stride), padding=((1, stride), (1, stride)))
    # The rows of the batch are the inputs that are summed over, and dy is the kernel.
    x, dy, padding = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 2 - stride)
    dkernel = _forward(x, dy, 1, rhs_dilation=(stride, stride), padding=(padding, padding))
    return dx, dkernel.transpose(1, 2, 0, 3)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _convolve_gathered(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], *_, **__) -> jax.Array:
    return convolve(x, replicate_kernel(kernel), strides[0])


def conv3(features: int, dtype: jnp.dtype, name: str, **options) -> nn.Conv:
    """A 3 x 3 convolution by `convolve`, its kernel gathered on every device first; `options` of `nn.Conv`."""
    return conv(features, 3, dtype, name, conv_general_dilated=_convolve_gathered, **options)


def linear(inputs: int, outputs: int, dtype: jnp.dtype, name: str, kernel_init=PYTORCH_INIT, **options) -> Linear:
    """A linear layer over the last axis of [B, L, C]."""
    options |= {"kernel_init": kernel_init, "is_gathered": True, "name": name}
    return Linear("blc,cd->bld", (inputs, outputs), dtype, **options)


def norm(num_groups: int, x: jax.Array, name: str, epsilon: float = 1e-5) -> jax.Array:
    """GroupNorm in float32, of fewer groups where `num_groups` does not divide the channels."""
    return group_norm(math.gcd(num_groups, x.shape[-1]), name, epsilon=epsilon)(x)


def double(x: jax.Array) -> jax.Array:
    """The nearest neighbours, at twice the resolution."""
    return x.repeat(2, 1).repeat(2, 2)


def halve(x: jax.Array) -> jax.Array:
    """The mean of each 2 x 2 positions."""
    B, H, W, C = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))


def head_count(channels: int, num_heads: int, num_head_channels: int) -> int:
    """`num_heads`, unless each head has a stated number of channels."""
    return channels // num_head_channels if num_head_channels else num_heads


class ResidualBlock(nn.Module):
    """A residual block with a condition: x [B, H, W, C], c [B, E] -> [B, H', W', features].

    Attributes:
      features: channels of the output.
      norm_num_groups: see `UNet`.
      use_scale_shift_norm: c scales and shifts after the second norm, else it is added before.
      resample: changes the resolution between the first norm and the first convolution, and on the shortcut; or None.
      dropout: rate of dropout before the last convolution, where there are random numbers for it ("dropout").
      dtype: of the convolutions and the residual stream.
    """

    features: int
    norm_num_groups: int
    use_scale_shift_norm: bool
    dtype: jnp.dtype
    resample: Callable[[jax.Array], jax.Array] | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        h = nn.silu(norm(self.norm_num_groups, x, "norm1")).astype(self.dtype)
        if self.resample:
            h, x = self.resample(h), self.resample(x)
        h = conv3(self.features, self.dtype, "conv1")(h)
        num_modulations = 2 if self.use_scale_shift_norm else 1
        of_c = linear(c.shape[-1], num_modulations * self.features, self.dtype, "modulation")
        modulation = of_c(nn.silu(c)[:, None])[:, None]
        if self.use_scale_shift_norm:
            scale, shift = jnp.split(modulation, 2, -1)
            h = norm(self.norm_num_groups, h, "norm2") * (1 + scale) + shift
        else:
            h = norm(self.norm_num_groups, h + modulation, "norm2")
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(nn.silu(h))
        h = conv3(self.features, self.dtype, "conv2", kernel_init=nn.initializers.zeros)(h)
        if x.shape[-1] != self.features:
            B, H, W, C = x.shape
            shortcut = linear(C, self.features, self.dtype, "shortcut")
            x = shortcut(x.reshape(B, H * W, C)).reshape(h.shape)
        return replicate_channels(x + h)


class SelfAttention(nn.Module):
    """ADM's attention over all positions, with a residual connection: [B, H, W, C] -> [B, H, W, C].

    Attributes:
      num_heads, num_head_channels: see `UNet`.
      norm_num_groups: see `UNet`.
      qkv_order: in the outputs of one layer "new" has q, k and v of all heads, "legacy" each head's q, k and v.
      attention: of `layers.attend`.
      dtype: of the linear layers.
    """

    num_heads: int
    num_head_channels: int
    norm_num_groups: int
    qkv_order: str
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, tokens: None = None) -> jax.Array:
        B, H, W, C = x.shape
        heads = head_count(C, self.num_heads, self.num_head_channels)
        h = norm(self.norm_num_groups, x, "norm").reshape(B, H * W, C)
        qkv = linear(C, 3 * C, self.dtype, "qkv")(h)
        if self.qkv_order == "new":
            q, k, v = jnp.moveaxis(qkv.reshape(B, H * W, 3, heads, C // heads), 2, 0)
        else:
            q, k, v = jnp.moveaxis(qkv.reshape(B, H * W, heads, 3, C // heads), 3, 0)
        h = attend(q, k, v, self.attention).reshape(B, H * W, C)
        h = linear(C, C, self.dtype, "proj_out", nn.initializers.zeros)(h)
        return replicate_channels(x + h.reshape(x.shape))


class CrossAttention(nn.Module):
    """Attention of x [B, L, C] onto context [B, S, C'] -> [B, L, C]; q, k and v have no bias."""

    num_heads: int
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        B, L, C = x.shape

        def heads_of(inputs, name):
            h = linear(inputs.shape[-1], C, self.dtype, name, has_bias=False)(inputs)
            return h.reshape(B, -1, self.num_heads, C // self.num_heads)

        h = attend(heads_of(x, "to_q"), heads_of(context, "to_k"), heads_of(context, "to_v"), self.attention)
        return linear(C, C, self.dtype, "to_out")(h.reshape(B, L, C))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention onto tokens and a GEGLU, each on a LayerNorm: x [B, L, C] -> [B, L, C]."""

    num_heads: int
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        C = x.shape[-1]
        attention = functools.partial(CrossAttention, self.num_heads, self.attention, self.dtype)

        def layer_norm(name):
            return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)

        h = layer_norm("norm1")(x)
        x = x + attention(name="attn1")(h, h)
        x = x + attention(name="attn2")(layer_norm("norm2")(x), tokens)
        value, gate = jnp.split(linear(C, 8 * C, self.dtype, "ff_in")(layer_norm("norm3")(x)), 2, -1)
        return x + linear(4 * C, C, self.dtype, "ff_out")(value * nn.gelu(gate, approximate=False))


class SpatialTransformer(nn.Module):
    """LDM's transformer over all positions, with a residual connection: [B, H, W, C], tokens [B, T, E] -> [B, H, W, C].

    Attributes:
      num_heads, num_head_channels: see `UNet`.
      depth: number of transformer blocks.
      norm_num_groups: see `UNet`.
      attention: of `layers.attend`.
      dtype: of the linear layers.
    """

    num_heads: int
    num_head_channels: int
    depth: int
    norm_num_groups: int
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        heads = head_count(C, self.num_heads, self.num_head_channels)
        h = norm(self.norm_num_groups, x, "norm", 1e-6).reshape(B, H * W, C)
        h = linear(C, C, self.dtype, "proj_in")(h)
        for i in range(self.depth):
            h = TransformerBlock(heads, self.attention, self.dtype, name=f"block_{i}")(h, tokens)
        h = linear(C, C, self.dtype, "proj_out", nn.initializers.zeros)(h)
        return replicate_channels(x + h.reshape(x.shape))
