"""The convolution kernel of a diagonal SSM, K[l] = 2 Re sum_n C_n B_bar_n Lambda_bar_n**l (S4D, section 3.2).

The direct way is a product with the Vandermonde array Lambda_bar_n**l [D, N/2, L]. Making that array takes longer than
the convolution. With l = i * inner + j,

    Lambda_bar**l = (Lambda_bar**inner)**i * Lambda_bar**j

only about 2 sqrt(L) powers are needed. A real matrix product over n joins the two levels.
"""

import math

import jax
import jax.numpy as jnp

from diffussm_jax.ssm.discretize import discretize, transition_powers
from diffussm_jax.ssm.params import SSMParams


def real_rows(z: jax.Array, axis: int) -> jax.Array:
    """Concatenates Re z and Im z along `axis`: complex [.., N/2, ..] to real [.., N, ..]."""
    return jnp.concatenate([z.real, z.imag], axis)


def diagonal_kernel(
    Lambda: jax.Array,
    B: jax.Array,
    C: jax.Array,
    dt: jax.Array,
    length: int,
    discretization: str = "zoh",
) -> jax.Array:
    """The first `length` taps of the SSM's convolution kernel, without the skip D.

    Args:
      Lambda, B, C: [D, N/2] complex64.
      dt: [D] float32.
      length: L, at least 1.
      discretization: "zoh" or "bilinear".

    Returns:
      K [D, L] float32.

    Raises:
      ValueError: the discretisation is unknown, or the length is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    _, B_bar = discretize(Lambda, B, dt, discretization)
    num_inner = math.ceil(math.sqrt(length))
    num_outer = math.ceil(length / num_inner)
    exponents = jnp.concatenate([jnp.arange(num_outer) * num_inner, jnp.arange(num_inner)])
    # Without the barrier XLA recomputes the exponentials at each use.
    powers = jax.lax.optimization_barrier(transition_powers(Lambda, dt, exponents, discretization))
    outer, inner = (2 * C * B_bar)[..., None] * powers[..., :num_outer], powers[..., num_outer:]
    # Re(outer * inner) = Re outer Re inner - Im outer Im inner: one dot product, with one side conjugated.
    K = jnp.einsum("dni,dnj->dij", real_rows(outer.conj(), 1), real_rows(inner, 1), precision=jax.lax.Precision.HIGHEST)
    return K.reshape(*K.shape[:-2], num_outer * num_inner)[..., :length]


def taps(params: SSMParams, length: int, discretization: str) -> jax.Array:
    """The first `length` taps of the kernel, with the skip D added at lag 0: [D, L]."""
    p = params
    K = diagonal_kernel(p.Lambda, p.B, p.C, p.dt, length, discretization)
    return K + jnp.pad(p.D[:, None], ((0, 0), (0, length - 1)))
