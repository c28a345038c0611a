"""The layout of a sequence in M phases: position l = j M + m is at index j of phase m.

An hourglass maps each of J tokens to M positions and back by M products, one per phase. With separate phases, and
channels before batch and tokens, no transposed copies are needed between these products and a kernel along the tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def to_phases(x: jax.Array, num_phases: int) -> jax.Array:
    """[B, L, .., D] to [M, .., D, B, J]. M must divide L."""
    B, L = x.shape[:2]
    x = x.reshape(B, L // num_phases, num_phases, *x.shape[2:])
    return x.transpose(2, *range(3, x.ndim), 0, 1)


def from_phases(x: jax.Array) -> jax.Array:
    """[M, .., D, B, J] to [B, L, .., D]."""
    M, *_, B, J = x.shape
    x = x.transpose(-2, -1, 0, *range(1, x.ndim - 2))
    return x.reshape(B, J * M, *x.shape[3:])


def join_phases(x: jax.Array) -> jax.Array:
    """[M, .., B, J] to a single phase [1, .., B, J M]."""
    return jnp.moveaxis(x, 0, -1).reshape(1, *x.shape[1:-1], -1)


def split_phases(x: jax.Array, num_phases: int) -> jax.Array:
    """[1, .., B, L] to M phases [M, .., B, L / M]."""
    return jnp.moveaxis(x[0].reshape(*x.shape[1:-1], -1, num_phases), -1, 0)


def through_one_phase(apply: Callable[[jax.Array], jax.Array], u: jax.Array) -> jax.Array:
    """Applies a function to u as a single phase: joins the phases before it and splits them after it."""
    return split_phases(apply(join_phases(u)), u.shape[0])
