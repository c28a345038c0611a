"""Layers that every backbone shares: embeddings and the adaptive LayerNorm, as in DiT (arXiv 2212.09748)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.parallel.sharding import gathered_dot_general, whole_channels

NUM_TIME_FEATURES = 256

gelu = nn.gelu  # Flax's default is the tanh form


def sinusoidal_features(t: jax.Array, num_features: int, max_period: float = 10_000) -> jax.Array:
    """[cos(w_i t), sin(w_i t)] with frequencies w_i = max_period**(-i / half), as DiT orders them.

    Args:
      t: [B], times or positions, int or float.
      num_features: even.
      max_period: the slowest frequency is about 1 / max_period.

    Returns:
      [B, num_features] float32.
    """
    half = num_features // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def sincos_2d(height: int, width: int, num_features: int) -> np.ndarray:
    """Fixed sin-cos position features of a grid in raster order: half for the column, half for the row (MAE, DiT).

    Args:
      height: rows.
      width: columns.
      num_features: a multiple of 4.

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
    """256 sinusoidal features of t through two Dense layers with SiLU between: [B] -> [B, width]."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        options = {"kernel_init": init, "dtype": self.dtype, "dot_general": gathered_dot_general}
        x = sinusoidal_features(t, NUM_TIME_FEATURES)
        x = nn.silu(whole_channels(nn.Dense(self.width, **options, name="hidden")(x)))
        return whole_channels(nn.Dense(self.width, **options, name="out")(x))


class LabelEmbed(nn.Module):
    """A table of num_classes + 1 rows, the last for the null label: [B] -> [B, width].

    With `train`, each label is replaced by the null label with probability `dropout`, by the stream "label_dropout".
    """

    num_classes: int
    width: int
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, y: jax.Array, *, train: bool) -> jax.Array:
        if train and self.dropout > 0:
            dropped = jax.random.bernoulli(self.make_rng("label_dropout"), self.dropout, y.shape)
            y = jnp.where(dropped, self.num_classes, y)
        table = nn.Embed(
            self.num_classes + 1,
            self.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            name="table",
        )
        return whole_channels(table(y))


class AdaLayerNorm(nn.Module):
    """LayerNorm(x) (1 + scale(c)) + shift(c), the norm without parameters of its own, in float32.

    scale and shift come from one Dense on SiLU(c) that starts at zero. x [B, J, D], c [B, D] -> [B, J, D].
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        D = x.shape[-1]
        modulation = nn.Dense(
            2 * D,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            dot_general=gathered_dot_general,
            name="modulation",
        )
        shift, scale = jnp.split(whole_channels(modulation(nn.silu(c)))[:, None], 2, -1)
        x = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32)(x)
        return (x * (1 + scale) + shift).astype(self.dtype)
