"""LSSL (arXiv 2110.13985): SSMs with the dense HiPPO-LegS matrix A [N, N], the ancestor of S4, for small N.

The discretisation is the generalised bilinear transform (section 2),

    A_bar = (I - alpha dt A)^-1 (I + (1 - alpha) dt A),    B_bar = (I - alpha dt A)^-1 dt B,

bilinear for alpha = 1/2, backward Euler for alpha = 1. The kernel K[l] = C . A_bar^l B_bar is Krylov's: vectors
B_bar, A_bar B_bar, .. double in number with each product, and so do those of C with A_bar^c. With c near sqrt(L),

    K[i c + j] = ((A_bar^T)^(i c) C) . (A_bar^j B_bar).

A is fixed and the same in all channels; B, C, dt and D are learned. The paper's LSSL-fixed fixes dt too, and its LSSL
learns dt and A, within a structured class.

Each channel has A_bar of its own: N^2 numbers, and log2 L products of N^3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.ssm.hippo import legs


class LSSLParams(NamedTuple):
    """D independent SSMs with the LegS matrix A, one per channel.

    Attributes:
      B: [D, N] float32.
      C: [D, N] float32.
      dt: [D] float32, positive.
      D: [D] float32, the skip from input to output.
    """

    B: jax.Array
    C: jax.Array
    dt: jax.Array
    D: jax.Array


def init_lssl(
    key: jax.Array, width: int, state_size: int = 16, *, dt_min: float = 1e-3, dt_max: float = 1e-1
) -> dict[str, jax.Array]:
    """Initialises the parameters of `width` LSSL channels (arXiv 2110.13985).

    B is that of LegS in all channels. C is normal with variance 1, dt log-uniform in [dt_min, dt_max], D normal.

    Returns:
      float32: B and C [D, N]; log_dt and D [D].
    """
    C_key, dt_key, D_key = jax.random.split(key, 3)
    return {
        "B": jnp.tile(jnp.asarray(legs(state_size)[1], jnp.float32), (width, 1)),
        "C": jax.random.normal(C_key, (width, state_size), jnp.float32),
        "log_dt": jax.random.uniform(dt_key, (width,), jnp.float32, np.log(dt_min), np.log(dt_max)),
        "D": jax.random.normal(D_key, (width,), jnp.float32),
    }


def to_lssl(real: dict[str, jax.Array]) -> LSSLParams:
    """Converts the parameters of `init_lssl` to `LSSLParams`."""
    return LSSLParams(B=real["B"], C=real["C"], dt=jnp.exp(real["log_dt"]), D=real["D"])


def lssl_kernel(params: LSSLParams, length: int, *, alpha: float = 0.5) -> jax.Array:
    """The first `length` taps of the SSM's convolution kernel, without the skip D.

    Args:
      length: L, at least 1.
      alpha: of the generalised bilinear transform, from 0.5 to 1.

    Returns:
      K [D, L] float32.

    Raises:
      ValueError: the length is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    A, dt = _matrix(params), params.dt[:, None, None]
    of_all = jnp.broadcast_to(A, (len(params.dt), *A.shape))
    solved = _solve(params, alpha, dt * jnp.concatenate([of_all, params.B[..., None]], -1))
    num_inner = 1 << (length.bit_length() // 2)
    inner, E = _krylov(solved[..., :-1], solved[..., -1], num_inner)
    outer, _ = _krylov(E.swapaxes(1, 2), params.C, -(-length // num_inner))
    K = _product(outer.swapaxes(1, 2), inner)
    return K.reshape(K.shape[0], -1)[:, :length]


def lssl_step(
    params: LSSLParams, state: jax.Array, u_t: jax.Array, *, alpha: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """Advances the SSM by one position, with O(N^2) operations for each channel.

    Args:
      state: [B, D, N] float32: zeros, or from the previous step.
      u_t: [B, D].
      alpha: of the generalised bilinear transform.

    Returns:
      The new state, and y_t [B, D] in the dtype of `u_t`.
    """
    u_t32 = u_t.astype(jnp.float32)
    derivative = (
        _product(_matrix(params), state.transpose(1, 2, 0)) + params.B[..., None] * u_t32.T[:, None]
    )  # [D, N, B]
    state = state + _solve(params, alpha, params.dt[:, None, None] * derivative).transpose(2, 0, 1)
    return state, (jnp.sum(params.C * state, -1) + params.D * u_t32).astype(u_t.dtype)


def _matrix(p: LSSLParams) -> jax.Array:
    """A [N, N]."""
    return jnp.asarray(legs(p.B.shape[1])[0], jnp.float32)


def _solve(p: LSSLParams, alpha: float, x: jax.Array) -> jax.Array:
    """(I - alpha dt A)^-1 x for x [D, N, K], by forward substitution.

    With r_n = sqrt(2n + 1), the row n of A is -r_n r_k for k < n and -(n + 1) on the diagonal, so that the sum over
    k < n is r_n times a running total. `lax.linalg.triangular_solve` is not used, because in a training step with a
    scan over blocks it does not return on CPUs with two cores (JAX 0.10.2).
    """
    n = jnp.arange(x.shape[1], dtype=jnp.float32)
    step = alpha * p.dt[:, None]

    def substitute(total, row):
        n, x_n = row
        r_n = jnp.sqrt(2 * n + 1)
        y_n = (x_n - step * r_n * total) / (1 + step * (n + 1))
        return total + r_n * y_n, y_n

    _, y = jax.lax.scan(substitute, jnp.zeros_like(x[:, 0]), (n, x.swapaxes(0, 1)))
    return y.swapaxes(0, 1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _krylov(E: jax.Array, x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """x, (I + E) x, (I + E)^2 x, ..: [D, N, count'], and (I + E)^count' - I, where count' >= count is a power of two.

    The difference to I has the digits of slow states that the power itself rounds away.
    """
    x = x[..., None]
    while x.shape[-1] < count:
        x = jnp.concatenate([x, x + _product(E, x)], -1)
        E = 2 * E + _product(E, E)
    return x, E
