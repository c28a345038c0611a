"""Layers that every backbone shares: embeddings and the adaptive LayerNorm, as in DiT (arXiv 2212.09748)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.parallel.sharding import whole_channels, whole_kernel

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


def _product(equation: str, is_gathered: bool, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    y = jnp.einsum(equation, x, _cast(kernel, x.dtype, is_gathered))
    return y + jnp.expand_dims(bias.astype(x.dtype), _axes_of_x(equation))


def _axes_of_x(equation: str) -> tuple[int, ...]:
    """The dimensions of the output that the kernel, and so the bias, does not have."""
    operands, output = equation.split("->")
    return tuple(i for i, name in enumerate(output) if name not in operands.split(",")[1])


def _cast(kernel: jax.Array, dtype: jnp.dtype, is_gathered: bool) -> jax.Array:
    """Cast before it is gathered, so that devices send the smaller dtype."""
    return whole_kernel(kernel.astype(dtype)) if is_gathered else kernel.astype(dtype)


_linear = jax.custom_vjp(_product, nondiff_argnums=(0, 1))


def _linear_forward(equation, is_gathered, x, kernel, bias):
    return _product(equation, is_gathered, x, kernel, bias), (x, kernel)


def _linear_backward(equation, is_gathered, residuals, dy):
    x, kernel = residuals
    operands, output = equation.split("->")
    of_x, of_kernel = operands.split(",")
    dx = jnp.einsum(f"{output},{of_kernel}->{of_x}", dy, _cast(kernel, x.dtype, is_gathered))
    dkernel = jnp.einsum(f"{of_x},{output}->{of_kernel}", x, dy, preferred_element_type=jnp.float32)
    dbias = jnp.sum(dy, _axes_of_x(equation), dtype=jnp.float32)
    return dx, dkernel, dbias


_linear.defvjp(_linear_forward, _linear_backward)


class Linear(nn.Module):
    """einsum(equation, x, kernel) + bias, in `dtype`; parameters float32, and their gradients summed in float32.

    Left to themselves, gradients of a bfloat16 product are rounded to bfloat16 before devices add theirs up.

    Attributes:
      equation: of x and kernel; the bias has those dimensions of the output that the kernel has.
      shape: of the kernel.
      dtype: of the product.
      kernel_init: by default Xavier's, uniform.
      is_gathered: whether every device gathers the kernel whole first. Left to itself, XLA may split a product with few
        rows along axes of the mesh that are idle, and communicate activations.
    """

    equation: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    is_gathered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        operands, output = self.equation.split("->")
        sizes = dict(zip(operands.split(",")[1], self.shape, strict=True))
        kernel = self.param("kernel", self.kernel_init, self.shape)
        bias = self.param("bias", nn.initializers.zeros, tuple(sizes[k] for k in output if k in sizes))
        return _linear(self.equation, self.is_gathered, x.astype(self.dtype), kernel, bias)


class TimeEmbed(nn.Module):
    """256 sinusoidal features of t through two linear layers with SiLU between: [B] -> [B, width]."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        D, features = self.width, sinusoidal_features(t, NUM_TIME_FEATURES)
        options = {"dtype": self.dtype, "kernel_init": nn.initializers.normal(0.02), "is_gathered": True}
        hidden = Linear("bf,fd->bd", (NUM_TIME_FEATURES, D), **options, name="hidden")
        out = Linear("bd,de->be", (D, D), **options, name="out")
        return whole_channels(out(nn.silu(whole_channels(hidden(features)))))


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

    scale and shift come from one linear layer on SiLU(c) that starts at zero. x [B, J, D], c [B, D] -> [B, J, D].
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        D = x.shape[-1]
        options = {"kernel_init": nn.initializers.zeros, "is_gathered": True, "name": "modulation"}
        modulation = Linear("bd,de->be", (D, 2 * D), self.dtype, **options)
        shift, scale = jnp.split(whole_channels(modulation(nn.silu(c)))[:, None], 2, -1)
        x = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32)(x)
        return (x * (1 + scale) + shift).astype(self.dtype)
