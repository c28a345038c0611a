"""The patch discriminator that autoencoders are trained against: PatchGAN (Isola et al., arXiv 1611.07004).

    x [B, H, W, C]                                                                    width channels are 64 in papers
    conv 4x4, stride 2, width;                       LeakyReLU                        first
    conv 4x4, stride 2, min(2**n, 8) width;   norm;  LeakyReLU                        n = 1 ... num_layers - 1
    conv 4x4, stride 1, min(2**n, 8) width;   norm;  LeakyReLU                        n = num_layers
    conv 4x4, stride 1, 1                     -> logits [B, h, w, 1]                  h = H // 2**num_layers - 2

as taming-transformers and latent diffusion have it: padding of 1, slope 0.2, and the initial values. With three layers
each logit sees a patch of 70 x 70 pixels.

Layers with BatchNorm have no bias before it, which the mean would cancel. With GroupNorm in its place they have one,
because a group's mean does not cancel the biases of its channels.
"""

import math
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffussm_jax.layers import conv, group_norm
from diffussm_jax.options import Choices, Range, check_options

NORMS = ("batch", "group")
_MAX_FACTOR = 8  # of width
_MAX_GROUPS, _MIN_CHANNELS_OF_GROUP = 32, 4
_EPSILON = 1e-5  # of both norms
_normal = nn.initializers.normal(0.02)


class BatchNorm(nn.Module):
    """BatchNorm by the statistics of the batch, on all devices together, in float32: [B, H, W, C] -> the same.

    The variance is the mean of squares (biased). No running averages are kept, so it serves in training only.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        scale = self.param("scale", lambda key, shape: 1 + _normal(key, shape), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x - x.mean((0, 1, 2))
        return x * (scale * jax.lax.rsqrt(jnp.square(x).mean((0, 1, 2)) + _EPSILON)) + bias


class PatchDiscriminator(nn.Module):
    """PatchGAN: images [B, H, W, C] float -> logits [B, h, w, 1] float32, positive for real patches.

    With norm "batch" an output depends on the whole batch: pass real and reconstructed images apart, as
    taming-transformers does.

    Attributes:
      width: channels of the first convolution.
      num_layers: convolutions of stride 2. `check_size` says how many an image is large enough for.
      norm: "batch", or "group" with 32 groups, or with fewer where these would have less than 4 channels.
      dtype: of convolutions except the last. Parameters, norms and logits are float32.
    """

    width: Annotated[int, Range(1, 65536)] = 64
    num_layers: Annotated[int, Range(1, 8)] = 3
    norm: Annotated[str, Choices(NORMS)] = "batch"
    dtype: Annotated[str, Choices(("float32", "bfloat16"))] = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        check_options(self)
        check_size(min(x.shape[1:3]), self.num_layers)
        for n in range(self.num_layers + 1):
            strides, is_normed = 2 if n < self.num_layers else 1, n > 0
            features = self.width * min(2**n, _MAX_FACTOR)
            use_bias = not is_normed or self.norm == "group"
            x = _conv(features, x, jnp.dtype(self.dtype), f"conv_{n}", strides=strides, use_bias=use_bias)
            if is_normed:
                x = self._normalize(x, f"norm_{n}")
            x = nn.leaky_relu(x, 0.2)
        return _conv(1, x, jnp.float32, f"conv_{self.num_layers + 1}")

    def _normalize(self, x: jax.Array, name: str) -> jax.Array:
        if self.norm == "batch":
            return BatchNorm(name=name)(x)
        num_groups = math.gcd(x.shape[-1], _MAX_GROUPS * _MIN_CHANNELS_OF_GROUP) // _MIN_CHANNELS_OF_GROUP
        return group_norm(max(num_groups, 1), name, epsilon=_EPSILON)(x)


def _conv(features: int, x: jax.Array, dtype: jnp.dtype, name: str, **options) -> jax.Array:
    """A convolution of 4 x 4 whose initial kernels are those of the GAN, and biases those of PyTorch."""
    bound = (16 * x.shape[-1]) ** -0.5

    def bias_init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return conv(features, 4, dtype, name, padding=1, kernel_init=_normal, bias_init=bias_init, **options)(x)


def output_size(size: int, num_layers: int) -> int:
    """Height of the map of logits for images of that height, or width of width; zero or less where nothing is left."""
    return size // 2**num_layers - 2


def check_size(size: int, num_layers: int) -> None:
    """Checks that a discriminator has a logit for images of that many pixels.

    Raises:
      ValueError: it has none. The message says how many layers fit.
    """
    if output_size(size, num_layers) < 1:
        most = (size // 3).bit_length() - 1  # 3 positions are left before the last two convolutions
        fit = f"at most {most} fit" if most > 0 else "images must have at least 6"
        raise ValueError(f"a discriminator with num_layers = {num_layers} leaves nothing of {size} pixels; {fit}")
