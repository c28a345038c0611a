"""What the kernels for TPUs and for GPUs share."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

FLOAT = jnp.float32


def runs_backwards(reverse: Sequence[bool], direction):
    """Whether a direction, a traced number, is one that runs backwards."""
    is_one = [direction == r for r, is_backward in enumerate(reverse) if is_backward]
    return functools.reduce(jnp.logical_or, is_one, direction < 0)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product of two matrices over an axis of each, float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == FLOAT else None
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=FLOAT)


def high_and_low(x: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """float32 as a sum of one or two arrays of a dtype."""
    high = x.astype(dtype)
    return [high] if dtype == FLOAT else [high, (x - high.astype(FLOAT)).astype(dtype)]
