"""Normalisation layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffussm_jax.layers.linear import Linear
from diffussm_jax.parallel.sharding import replicate_channels


class AdaLayerNorm(nn.Module):
    """LayerNorm(x) (1 + scale(c)) + shift(c) in float32, for x [B, J, D] and c [B, D]. The norm has no parameters.

    scale and shift come from one zero-initialised linear layer on SiLU(c).
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        D = x.shape[-1]
        options = {"kernel_init": nn.initializers.zeros, "is_gathered": True, "name": "modulation"}
        modulation = Linear("bd,de->be", (D, 2 * D), self.dtype, **options)
        shift, scale = jnp.split(replicate_channels(modulation(nn.silu(c)))[:, None], 2, -1)
        x = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32)(x)
        return (x * (1 + scale) + shift).astype(self.dtype)
