"""Functions that the TPU and GPU kernels share."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

FLOAT = jnp.float32


def runs_backwards(reverse: Sequence[bool], direction):
    """Whether the direction with this traced index runs backward."""
    is_one = [direction == r for r, is_backward in enumerate(reverse) if is_backward]
    return functools.reduce(jnp.logical_or, is_one, direction < 0)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The float32 product of two matrices, contracted over one axis of each."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == FLOAT else None
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=FLOAT)


def high_and_low(x: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """Splits a float32 array into one or two arrays of a dtype that sum to it."""
    high = x.astype(dtype)
    return [high] if dtype == FLOAT else [high, (x - high.astype(FLOAT)).astype(dtype)]
