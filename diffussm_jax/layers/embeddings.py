"""Embeddings of time and position, as in DiT (arXiv 2212.09748)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.layers.linear import Linear
from diffussm_jax.parallel.sharding import replicate_channels

NUM_TIME_FEATURES = 256


def sinusoidal_features(t: jax.Array, num_features: int, max_period: float = 10_000) -> jax.Array:
    """[cos(w_i t), sin(w_i t)] with frequencies w_i = max_period**(-i / half), in DiT's order.

    Args:
      t: [B], int or float.
      num_features: even.
      max_period: inverse of the lowest frequency, about.

    Returns:
      [B, num_features] float32.
    """
    half = num_features // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def sincos_2d(height: int, width: int, num_features: int) -> np.ndarray:
    """Fixed sin-cos position features of a grid in raster order: half for the column, half for the row (MAE, DiT).

    Returns:
      [height * width, num_features] float32.

    Raises:
      ValueError: num_features is not a multiple of 4.
    """
    if num_features % 4:
        raise ValueError(f"a 2-D position embedding needs a width that is a multiple of 4, got {num_features}")

    def features_1d(position):
        frequencies = 10_000.0 ** (-np.arange(num_features // 4) / (num_features // 4))
        angles = np.outer(position, frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)

    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.concatenate([features_1d(columns.ravel()), features_1d(rows.ravel())], 1).astype(np.float32)


class TimeEmbed(nn.Module):
    """256 sinusoidal features of t, then two linear layers with SiLU between them: [B] -> [B, width]."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        D, features = self.width, sinusoidal_features(t, NUM_TIME_FEATURES)
        options = {"dtype": self.dtype, "kernel_init": nn.initializers.normal(0.02), "is_gathered": True}
        hidden = Linear("bf,fd->bd", (NUM_TIME_FEATURES, D), **options, name="hidden")
        out = Linear("bd,de->be", (D, D), **options, name="out")
        return replicate_channels(out(nn.silu(replicate_channels(hidden(features)))))
