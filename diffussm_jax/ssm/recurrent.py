"""The SSM as a recurrence: x_k = Lambda_bar x_{k-1} + B_bar u_k,  y_k = 2 Re(C . x_k) + D u_k.

`step` computes one position, for streaming. `recurrent` is a `lax.scan` of it, the reference for all faster methods.
`associative` is a parallel prefix scan (S5, arXiv 2208.04933, section 2.2).

A float32 recurrence that rounds Lambda_bar once and applies it L times has an error of 4e-5 at L = 4096 (S4D-LegS).
`step` splits Lambda_bar into two parts (`split_transition`), which keeps the error below 1e-6. `fft` and `chunked`,
which use powers of Lambda_bar, have the same error. `associative` multiplies within chunks: its error is below 4e-6.
"""

import jax
import jax.numpy as jnp

from diffussm_jax.ssm.discretize import discretize, split_transition, transition_powers
from diffussm_jax.ssm.params import SSMParams

ASSOCIATIVE_CHUNK = 64


def initial_state(params: SSMParams, batch_size: int) -> jax.Array:
    """The zero state [B, D, N/2] complex64."""
    return jnp.zeros((batch_size, *params.Lambda.shape), jnp.complex64)


def step(
    params: SSMParams, state: jax.Array, u_t: jax.Array, *, discretization: str = "zoh"
) -> tuple[jax.Array, jax.Array]:
    """Advances the SSM by one position.

    Args:
      state: [B, D, N/2] complex64, from `initial_state` or the previous step.
      u_t: [B, D].
      discretization: "zoh" or "bilinear".

    Returns:
      The new state, and y_t [B, D] in the dtype of `u_t`.
    """
    root, rest = split_transition(params.Lambda, params.dt, discretization)
    _, B_bar = discretize(params.Lambda, params.B, params.dt, discretization)
    u_t32 = u_t.astype(jnp.float32)
    state = root * state + (rest * state + B_bar * u_t32[..., None].astype(jnp.complex64))
    return state, _read_out(params, state, u_t32).astype(u_t.dtype)


def _read_out(params: SSMParams, x: jax.Array, u: jax.Array) -> jax.Array:
    return 2 * jnp.sum(params.C * x, -1).real + params.D * u


def recurrent(params: SSMParams, u: jax.Array, *, discretization: str, reverse: bool) -> jax.Array:
    """Runs the SSM over u [B, L, D] float32 position by position: y [B, L, D] float32."""

    def body(state, u_t):
        return step(params, state, u_t, discretization=discretization)

    _, y = jax.lax.scan(body, initial_state(params, u.shape[0]), u.swapaxes(0, 1), reverse=reverse)
    return y.swapaxes(0, 1)


def associative(params: SSMParams, u: jax.Array, *, discretization: str, reverse: bool) -> jax.Array:
    """Runs the SSM over u [B, L, D] float32 by `lax.associative_scan`: y [B, L, D] float32.

    The prefix scan runs inside chunks, each from a zero state. A `lax.scan` carries the state from chunk to chunk. The
    backward pass recomputes the states of a chunk, so that memory holds one chunk of [B, D, N/2] states instead of L.
    """
    B, L, D = u.shape
    chunk = min(L, ASSOCIATIVE_CHUNK)
    num_chunks = -(-L // chunk)
    Lambda_bar, B_bar = discretize(params.Lambda, params.B, params.dt, discretization)
    powers = transition_powers(params.Lambda, params.dt, jnp.arange(1, chunk + 1), discretization)
    carry_over = powers.transpose(2, 0, 1)[:, None]  # [chunk, 1, D, N/2]
    u = jnp.flip(u, 1) if reverse else u
    u_chunks = jnp.pad(u, ((0, 0), (0, num_chunks * chunk - L), (0, 0))).reshape(B, num_chunks, chunk, D)

    def combine(earlier, later):
        return later[0] * earlier[0], later[0] * earlier[1] + later[1]

    @jax.checkpoint
    def body(state, u_chunk):  # u_chunk [chunk, B, D]
        decays = jnp.broadcast_to(Lambda_bar, (chunk, 1, *Lambda_bar.shape))
        _, states = jax.lax.associative_scan(combine, (decays, B_bar * u_chunk[..., None].astype(jnp.complex64)))
        states = states + carry_over * state
        return states[-1], _read_out(params, states, u_chunk)

    _, y = jax.lax.scan(body, initial_state(params, B), u_chunks.transpose(1, 2, 0, 3))
    y = y.transpose(2, 0, 1, 3).reshape(B, num_chunks * chunk, D)[:, :L]
    return jnp.flip(y, 1) if reverse else y
