"""The kernels of `pallas_gpu`: one channel, a block of sequences, chunk by chunk. That module has the equations.

The positions of a chunk come phase after phase, as in memory. Only T, V and F depend on their order.

Complex numbers are stored along the last axis of real arrays [.., W], the real and imaginary part of a state side by
side, as operands of matrix products. In the output of a tensor core both parts are registers of one thread, so complex
products move no data between threads.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from diffussm_jax.ssm.pallas_common import FLOAT, dot, high_and_low, runs_backwards


class Geometry(NamedTuple):
    """The static shape of a call."""

    reverse: tuple[bool, ...]
    num_phases: int  # M
    chunk: int  # c, positions of a chunk; a multiple of M
    num_chunks: int  # K, per sequence
    rows: int  # sequences per block
    num_blocks: int
    interpret: bool

    def position(self, index):
        """Converts an index in memory to a position in a chunk."""
        tokens = self.chunk // self.num_phases
        return jax.lax.rem(index, tokens) * self.num_phases + jax.lax.div(index, tokens)

    def chunk_at(self, i, is_reverse):
        """Indices into [M, rows, J] of the i-th chunk in time."""
        tokens, index = self.chunk // self.num_phases, _iota((self.rows, self.chunk), 1)
        first = jnp.where(is_reverse, self.num_chunks - 1 - i, i) * tokens
        return jax.lax.div(index, tokens), _iota(index.shape, 0), first + jax.lax.rem(index, tokens)


class TableRefs(NamedTuple):
    """The tables of R directions; the forward kernel gets those of one direction."""

    taps: jax.Array  # [R, c] in the dtype of u: K, with the skip added to the first
    read: jax.Array  # [R, 2, W]: factors made of g that turn powers into F
    powers: jax.Array  # [R, c + 1, W] of Lambda_bar; the forward kernel has them in the dtype of u
    decay: jax.Array  # [R, p, 2, W/2]: real and imaginary part of one or two parts with sum A


class _Operators(NamedTuple):
    toeplitz: jax.Array  # T [c, c]
    write: jax.Array  # V [c, W]
    read: jax.Array  # F [W, c]
    decay: list[tuple[jax.Array, jax.Array]]  # real and imaginary part of each part of A, [1, W/2]


def _times(a: Sequence[tuple[jax.Array, jax.Array]], z: jax.Array) -> jax.Array:
    """The complex product of z with the sum of the parts of a, each a pair of real and imaginary part."""
    re, im = jax.lax.unstack(z.reshape(z.shape[0], -1, 2), axis=-1)
    products = [(x * re - y * im, x * im + y * re) for x, y in a]
    parts = [functools.reduce(jnp.add, part) for part in zip(*products, strict=True)]
    return jax.lax.stack(parts, axis=-1).reshape(z.shape)


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _lags(g: Geometry, is_reverse) -> jax.Array:
    """[c, c]: the lag from position j (first axis) to position i."""
    i, j = (g.position(_iota((g.chunk, g.chunk), axis)) for axis in (1, 0))
    return jnp.where(is_reverse, j - i, i - j)


def _exponents(g: Geometry, shape: tuple[int, int], axis: int, is_reverse) -> jax.Array:
    """The exponents in F of the positions along an axis. Exponents in V are c minus these."""
    position = g.position(_iota(shape, axis))
    return jnp.where(is_reverse, g.chunk - position, position + 1)


def _operators(g: Geometry, tables: TableRefs, r: int, is_reverse) -> _Operators:
    chunk, W, dtype = g.chunk, tables.powers.shape[-1], tables.taps.dtype
    lag = _lags(g, is_reverse)
    write = chunk - _exponents(g, (chunk, W), 0, is_reverse)
    read, part = _exponents(g, (W, chunk), 1, is_reverse), _iota((W, chunk), 0)
    same, cross = (tables.read[r, i, :][:, None] for i in (0, 1))
    F = same * tables.powers[r, read, part].astype(FLOAT) + cross * tables.powers[r, read, part ^ 1].astype(FLOAT)
    return _Operators(
        toeplitz=jnp.where(lag >= 0, tables.taps[r, jnp.maximum(lag, 0)], jnp.zeros((), dtype)),
        write=tables.powers[r, write, _iota((chunk, W), 1)],
        read=F.astype(dtype),
        decay=[tuple(tables.decay[r, p, i, :][None, :] for i in (0, 1)) for p in range(tables.decay.shape[1])],
    )


def forward_kernel(g: Geometry, u_ref, *refs):
    """Computes y [M, rows, J] of one direction from u [M, rows, J]."""
    *tables, y_ref = refs
    is_reverse, dtype = runs_backwards(g.reverse, pl.program_id(0)), u_ref.dtype
    T, V, F, A = _operators(g, TableRefs(*tables), 0, is_reverse)

    def body(i, state):
        here = g.chunk_at(i, is_reverse)
        u = u_ref[here]
        y_ref[here] = (dot(u, T) + dot(state.astype(dtype), F)).astype(dtype)
        return _times(A, state) + dot(u, V)

    jax.lax.fori_loop(0, g.num_chunks, body, jnp.zeros((g.rows, V.shape[1]), FLOAT))


class _Sums(NamedTuple):
    """Sums over chunks and sequences that give the gradients of a direction's tables."""

    toeplitz: jax.Array  # [c, c]: dy_j u_i
    state: jax.Array  # [c, W]: u_i s
    tangent: jax.Array  # [c, W]: u_i r / c


def backward_kernel(g: Geometry, u_ref, dy_ref, *refs):
    """Computes du [M, rows, J] and the tables' gradients per direction from u [M, rows, J] and dy [M, R, rows, J]."""
    *tables, du_ref, d_toeplitz_ref, by_gain_ref, by_log_ref = refs
    tables = TableRefs(*tables)
    for r, is_backward in enumerate(g.reverse):
        if r and not g.interpret:
            pltriton.debug_barrier()  # threads read parts of du that other threads wrote
        sums = _adjoint(g, r, not is_backward, u_ref, dy_ref, tables, du_ref)
        _write_gradients(g, r, not is_backward, sums, tables, d_toeplitz_ref, by_gain_ref, by_log_ref)


def _adjoint(g: Geometry, r: int, is_reverse: bool, u_ref, dy_ref, tables: TableRefs, du_ref) -> _Sums:
    """Writes du for the first direction, or adds to it for the others."""
    dtype = u_ref.dtype
    T, V, F, A = _operators(g, tables, r, is_reverse)
    V_tangent = (1 - _exponents(g, V.shape, 0, is_reverse).astype(FLOAT) / g.chunk) * V
    write, write_tangent = high_and_low(V, dtype), high_and_low(V_tangent, dtype)

    def body(i, carry):
        state, tangent, sums = carry
        here = phase, row, token = g.chunk_at(i, is_reverse)
        u, dy = u_ref[here], dy_ref[phase, r, row, token]
        d_toeplitz = sums.toeplitz + dot(dy, u, (0, 0))
        operand, *low = high_and_low(state, dtype)
        du = dot(dy, T) + dot(operand, F)
        if r:
            du += du_ref[here].astype(FLOAT)
        du_ref[here] = du.astype(dtype)
        by_state = sum((dot(u, part, (0, 0)) for part in low), sums.state + dot(u, operand, (0, 0)))
        by_tangent = sum((dot(u, part, (0, 0)) for part in high_and_low(tangent, dtype)), sums.tangent)
        sums = _Sums(d_toeplitz, by_state, by_tangent)
        tangent = _times(A, tangent + state)
        state = _times(A, state)
        state = sum((dot(dy, part) for part in write), state)
        return state, sum((dot(dy, part) for part in write_tangent), tangent), sums

    state, by_power = (jnp.zeros((rows, V.shape[1]), FLOAT) for rows in (g.rows, g.chunk))
    sums = _Sums(jnp.zeros(T.shape, FLOAT), by_power, by_power)
    return jax.lax.fori_loop(0, g.num_chunks, body, (state, state, sums))[-1]


def _write_gradients(g: Geometry, r: int, is_reverse: bool, sums: _Sums, tables: TableRefs, *gradient_refs):
    """Writes dT [R, c, c], with columns ordered by lag, and products with powers, straight and swapped, [R, 2, W]."""
    d_toeplitz_ref, by_gain_ref, by_log_ref = gradient_refs
    chunk, W = sums.state.shape
    lag = _lags(g, is_reverse)
    column = jnp.where(lag < 0, lag + chunk, lag)
    d_toeplitz_ref[r, _iota((chunk, chunk), 0), column] = jnp.where(lag < 0, 0.0, sums.toeplitz)
    exponent, part = _exponents(g, (chunk, W), 0, is_reverse), _iota((chunk, W), 1)
    weighted = exponent.astype(FLOAT) * sums.state + chunk * sums.tangent
    for i in (0, 1):
        powers = tables.powers[r, exponent, part ^ i]
        by_gain_ref[r, i, :] = jnp.sum(powers * sums.state, 0)
        by_log_ref[r, i, :] = jnp.sum(powers * weighted, 0)
