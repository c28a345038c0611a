"""The kernels of `pallas_gpu`, whose docstring has the equations: one channel, a block of sequences, chunk by chunk."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

FLOAT = jnp.float32


class Geometry(NamedTuple):
    """The static shape of a call."""

    reverse: tuple[bool, ...]
    chunk: int  # c, positions of a chunk
    num_chunks: int  # K, of a sequence
    rows: int  # sequences of a block
    num_blocks: int
    interpret: bool

    def is_reverse(self, direction):
        """Whether a direction, a traced number, is backward."""
        is_one = [direction == r for r, is_backward in enumerate(self.reverse) if is_backward]
        return functools.reduce(jnp.logical_or, is_one, direction < 0)

    def positions(self, i, is_reverse):
        """The slice of the chunk that comes i-th in time."""
        return pl.ds(jnp.where(is_reverse, self.num_chunks - 1 - i, i) * self.chunk, self.chunk)


class TableRefs(NamedTuple):
    """What the kernels need of the parameters of R directions; one direction of them in the forward kernel."""

    taps: jax.Array  # [R, c]: K, with the skip in the first
    gain: jax.Array  # [R, 2, n]: real and imaginary part of g
    powers: jax.Array  # [R, 2, c + 1, n] of Lambda_bar
    decay: jax.Array  # [R, 2, n]: A


class _Operators(NamedTuple):
    toeplitz: jax.Array  # T [c, c]
    write: tuple[jax.Array, jax.Array]  # Re V, Im V [c, n]
    read: tuple[jax.Array, jax.Array]  # Re F, -Im F [n, c]
    decay: tuple[jax.Array, jax.Array]  # Re A, Im A [1, n]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product of two matrices over an axis of each, float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == FLOAT else None
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=FLOAT)


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _since(position: jax.Array, chunk: int, is_reverse) -> jax.Array:
    """How many positions of the chunk come after one: the exponent in V; that in P is c minus it."""
    return jnp.where(is_reverse, position, chunk - 1 - position)


def _lags(chunk: int, is_reverse) -> jax.Array:
    """[c, c]: by how much position j (first axis) is before position i."""
    lag = _iota((chunk, chunk), 1) - _iota((chunk, chunk), 0)
    return jnp.where(is_reverse, -lag, lag)


def _operators(tables: TableRefs, r: int, is_reverse) -> _Operators:
    (_, chunk), n, dtype = tables.taps.shape, tables.gain.shape[-1], tables.taps.dtype
    lag = _lags(chunk, is_reverse)
    write = _since(_iota((chunk, n), 0), chunk, is_reverse), _iota((chunk, n), 1)
    read = chunk - _since(_iota((n, chunk), 1), chunk, is_reverse), _iota((n, chunk), 0)
    re, im = (tables.powers[r, part, *read].astype(FLOAT) for part in (0, 1))
    gain_re, gain_im = (tables.gain[r, part, :][:, None] for part in (0, 1))
    return _Operators(
        toeplitz=jnp.where(lag >= 0, tables.taps[r, jnp.maximum(lag, 0)], jnp.zeros((), dtype)),
        write=tuple(tables.powers[r, part, *write] for part in (0, 1)),
        read=((gain_re * re - gain_im * im).astype(dtype), (-(gain_re * im + gain_im * re)).astype(dtype)),
        decay=tuple(tables.decay[r, part, :][None, :] for part in (0, 1)),
    )


def _times(a, z):
    """The product of two complex numbers, each a pair of real and imaginary part."""
    return a[0] * z[0] - a[1] * z[1], a[0] * z[1] + a[1] * z[0]


def _written(x: jax.Array, table) -> list[jax.Array]:
    """What x [rows, c] leaves in the states through a complex table [c, n]."""
    return [_dot(x, part) for part in table]


def _plus(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _output(operators: _Operators, x: jax.Array, state) -> jax.Array:
    """The outputs of a chunk [rows, c] from its inputs and the state at its start, both operands."""
    return _dot(x, operators.toeplitz) + _dot(state[0], operators.read[0]) + _dot(state[1], operators.read[1])


def forward_kernel(g: Geometry, u_ref, *refs):
    """y [1, rows, L] of one direction from u [rows, L]."""
    *tables, y_ref = refs
    tables = TableRefs(*tables)
    is_reverse, dtype = g.is_reverse(pl.program_id(2)), u_ref.dtype
    operators = _operators(tables, 0, is_reverse)

    def body(i, state):
        here = g.positions(i, is_reverse)
        u = u_ref[:, here]
        y_ref[0, :, here] = _output(operators, u, [part.astype(dtype) for part in state]).astype(dtype)
        return _plus(_times(operators.decay, state), _written(u, operators.write))

    zeros = jnp.zeros((g.rows, tables.gain.shape[-1]), FLOAT)
    jax.lax.fori_loop(0, g.num_chunks, body, (zeros, zeros))


class _Sums(NamedTuple):
    """Sums over chunks and sequences, from which the gradients of a direction's tables follow."""

    toeplitz: jax.Array  # [c, c]: dy_j u_i
    state: tuple[jax.Array, jax.Array]  # [c, n]: u_i s
    tangent: tuple[jax.Array, jax.Array]  # [c, n]: u_i r


def backward_kernel(g: Geometry, u_ref, dy_ref, *refs):
    """du [rows, L] of all directions, and of each the gradients of its tables, from u [rows, L] and dy [R, rows, L]."""
    *tables, du_ref, d_toeplitz_ref, d_gain_ref, d_log_ref = refs
    tables = TableRefs(*tables)
    for r, is_backward in enumerate(g.reverse):
        if r and not g.interpret:
            pltriton.debug_barrier()  # threads read what others wrote of du
        sums = _adjoint(g, r, not is_backward, u_ref, dy_ref, tables, du_ref)
        _write_gradients(r, not is_backward, sums, tables, d_toeplitz_ref, d_gain_ref, d_log_ref)


def _adjoint(g: Geometry, r: int, is_reverse: bool, u_ref, dy_ref, tables: TableRefs, du_ref) -> _Sums:
    """Adds one direction's part to du."""
    chunk, n, dtype = g.chunk, tables.gain.shape[-1], u_ref.dtype
    operators = _operators(tables, r, is_reverse)
    exponent = _since(_iota((chunk, n), 0), chunk, is_reverse).astype(FLOAT)
    write_tangent = [(exponent * part.astype(FLOAT)).astype(dtype) for part in operators.write]

    def body(i, carry):
        state, tangent, sums = carry
        here = g.positions(i, is_reverse)
        u, dy = u_ref[:, here], dy_ref[r, :, here]
        state_operands, tangent_operands = ([part.astype(dtype) for part in x] for x in (state, tangent))
        du = _output(operators, dy, state_operands)
        if r:
            du += du_ref[:, here].astype(FLOAT)
        du_ref[:, here] = du.astype(dtype)
        sums = _Sums(
            sums.toeplitz + _dot(dy, u, (0, 0)),
            _plus(sums.state, [_dot(u, part, (0, 0)) for part in state_operands]),
            _plus(sums.tangent, [_dot(u, part, (0, 0)) for part in tangent_operands]),
        )
        tangent = _plus(tangent, [chunk * part for part in state])
        tangent = _plus(_times(operators.decay, tangent), _written(dy, write_tangent))
        state = _plus(_times(operators.decay, state), _written(dy, operators.write))
        return state, tangent, sums

    state, by_power = ((jnp.zeros((rows, n), FLOAT),) * 2 for rows in (g.rows, chunk))
    sums = _Sums(jnp.zeros((chunk, chunk), FLOAT), by_power, by_power)
    return jax.lax.fori_loop(0, g.num_chunks, body, (state, state, sums))[-1]


def _write_gradients(r: int, is_reverse: bool, sums: _Sums, tables: TableRefs, d_toeplitz_ref, d_gain_ref, d_log_ref):
    """Of T [R, c, c], its columns in order of the lag; of g and of log Lambda_bar, over g, [R, 2, n]."""
    chunk, n = sums.state[0].shape
    lag = _lags(chunk, is_reverse)
    column = jnp.where(lag < 0, lag + chunk, lag)
    d_toeplitz_ref[r, _iota((chunk, chunk), 0), column] = jnp.where(lag < 0, 0.0, sums.toeplitz)
    exponent = chunk - _since(_iota((chunk, n), 0), chunk, is_reverse)
    powers = [tables.powers[r, part, exponent, _iota((chunk, n), 1)].astype(FLOAT) for part in (0, 1)]
    weighted = [exponent.astype(FLOAT) * part for part in sums.state]
    for ref, by_power in ((d_gain_ref, sums.state), (d_log_ref, _plus(weighted, sums.tangent))):
        for part, total in enumerate(_times(powers, by_power)):
            ref[r, part, :] = jnp.sum(total, 0)
