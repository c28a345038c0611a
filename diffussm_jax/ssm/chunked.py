"""The SSM by chunks: matrix products inside a chunk of the sequence, a short recurrence of states between chunks.

Cut into K chunks of c positions, u becomes u_k, and with s_k the state on entering chunk k

    y_k     = T u_k + F s_k          T [c, c]   Toeplitz of the kernel's first c taps (lower triangular; upper for
    backward) s_{k+1} = Lambda_bar**c s_k + E u_k   E [N, c]  what the chunk's inputs leave in the state at its end
                                     F [c, N]   what the state at its start gives to the outputs

all per channel and in real arithmetic, the real and imaginary parts of the N/2 states one under the other. Work and
memory are linear in L (the same split as SSD, arXiv 2405.21060, section 6, with states that are diagonal and
time-invariant).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffussm_jax.ssm.discretize import discretize, transition_powers
from diffussm_jax.ssm.kernel import diagonal_kernel, real_rows
from diffussm_jax.ssm.params import SSMParams

CHUNK = 64


class _Operators(NamedTuple):
    toeplitz: jax.Array  # T [D, c, c]
    write: jax.Array  # E [D, N, c]
    read: jax.Array  # F [D, c, N]
    decay: jax.Array  # Lambda_bar**c [D, N/2] complex


def _toeplitz(K: jax.Array, reverse: bool) -> jax.Array:
    """T[i, j] = K[i - j] where i >= j (backward: K[j - i] where j >= i), for K [D, c]: [D, c, c].

    Every row is the one above, shifted by one: laid end to end, copies of a vector of length 2c read in rows of 2c - 1.
    No gather, whose gradient would be a scatter.
    """
    D, c = K.shape
    zeros = jnp.zeros_like(K)
    ring = jnp.concatenate([K, zeros] if reverse else [K[:, :1], zeros, K[:, :0:-1]], 1)  # T[i, j] = ring[j - i mod 2c]
    rows = jnp.broadcast_to(ring[:, None], (D, c, 2 * c)).reshape(D, 2 * c * c)[:, : c * (2 * c - 1)]
    return rows.reshape(D, c, 2 * c - 1)[:, :, :c]


def _operators(params: SSMParams, chunk: int, discretization: str, reverse: bool) -> _Operators:
    _, B_bar = discretize(params.Lambda, params.B, params.dt, discretization)
    K = diagonal_kernel(params.Lambda, params.B, params.C, params.dt, chunk, discretization)
    powers = transition_powers(params.Lambda, params.dt, jnp.arange(chunk + 1), discretization)  # [D, N/2, c + 1]
    since_input = B_bar[..., None] * powers[..., :-1]
    until_output = (2 * params.C)[..., None] * powers[..., 1:]
    if reverse:
        until_output = jnp.flip(until_output, -1)
    else:
        since_input = jnp.flip(since_input, -1)
    return _Operators(
        toeplitz=_toeplitz(K.at[:, 0].add(params.D), reverse),  # the skip is a tap at lag 0
        write=real_rows(since_input, 1),
        read=real_rows(until_output.conj(), 1).swapaxes(1, 2),  # Re(F s) = Re F Re s - Im F Im s
        decay=powers[..., -1],
    )


def _carry(written: jax.Array, decay: jax.Array, reverse: bool) -> jax.Array:
    """The state on entering each chunk, from what each chunk writes: both [D, N, B, K] real."""
    half = written.shape[1] // 2
    written = jax.lax.complex(written[:, :half], written[:, half:]).transpose(3, 0, 1, 2)

    def body(state, written_k):
        return decay[..., None] * state + written_k, state

    _, states = jax.lax.scan(body, jnp.zeros_like(written[0]), written, reverse=reverse)
    return real_rows(states.transpose(1, 2, 3, 0), 1)


def _product(operator: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("dij,djbk->dibk", operator, x, precision=jax.lax.Precision.HIGHEST)


def chunked(
    directions: Sequence[SSMParams],
    u: jax.Array,
    *,
    discretization: str,
    reverse: tuple[bool, ...],
) -> jax.Array:
    """R SSMs over the same u [B, L, D] float32, each forward or backward: y [B, L, R * D] float32."""
    B, L, D = u.shape
    c = min(L, CHUNK)
    K = -(-L // c)
    u = jnp.pad(u, ((0, 0), (0, K * c - L), (0, 0))).reshape(B, K, c, D).transpose(3, 2, 0, 1)  # [D, c, B, K]
    operators = [_operators(p, c, discretization, r) for p, r in zip(directions, reverse, strict=True)]
    if K == 1:
        outputs = jnp.split(_product(jnp.concatenate([op.toeplitz for op in operators], 1), u), len(operators), 1)
    else:
        # All that multiplies u, in one product: T and E of every direction, stacked.
        stacked = jnp.concatenate([m for op in operators for m in (op.toeplitz, op.write)], 1)
        products = jnp.split(_product(stacked, u), len(operators), 1)
        outputs = []
        for op, product, r in zip(operators, products, reverse, strict=True):
            outputs.append(product[:, :c] + _product(op.read, _carry(product[:, c:], op.decay, r)))
    y = jnp.stack(outputs)  # [R, D, c, B, K]
    return y.transpose(3, 4, 2, 0, 1).reshape(B, K * c, len(directions) * D)[:, :L]
