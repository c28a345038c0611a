"""The kernels of `pallas_tpu`: one block of rows and 16 channels, in one direction. That module has the equations.

Two channels share the W lanes of a register: the real parts of both, then the imaginary parts of both.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diffussm_jax.ssm.pallas_common import FLOAT, dot, high_and_low, runs_backwards

CHUNK = 128
CHANNELS = 16  # per block: 8 pairs of channels fill the sublanes of a register
SUBLANES = 8


class Geometry(NamedTuple):
    """The static shape of a call and its order of rows."""

    reverse: tuple[bool, ...]
    num_chunks: int  # K, per sequence
    stride: int  # interleaved sequences: row r + stride holds the chunk after that of row r, of the same sequence
    rows: int  # per block
    num_blocks: int  # of rows

    def block(self, direction, i, *, is_adjoint: bool):
        """The i-th block of rows in the order of a direction, or in the opposite order if `is_adjoint`."""
        is_backward = runs_backwards(self.reverse, direction) != is_adjoint
        return jnp.where(is_backward, self.num_blocks - 1 - i, i)


def _swap(z: jax.Array) -> jax.Array:
    """Exchanges real and imaginary parts."""
    return pltpu.roll(z, z.shape[-1] // 2, 1)


def lane_masks(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Masks of the lanes with real parts, and of those of the first channel of the pair."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    half = shape[1] // 2
    is_real = lane < half
    return is_real, jnp.where(is_real, lane, lane - half) < half // 2


def _factors(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(same, cross) with a z = z * same + swap(z) * cross and conj(a) z = z * same - swap(z) * cross."""
    is_real, _ = lane_masks(a.shape)
    return jnp.where(is_real, a, _swap(a)), jnp.where(is_real, -_swap(a), a)


def _conjugate_product(x: jax.Array, dx: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """The sum over rows of weight conj(x) dx: [1, W]."""
    weighted = x if weight is None else x * weight
    same, cross = (jnp.sum(weighted * y, 0, keepdims=True) for y in (dx, _swap(dx)))
    is_real, _ = lane_masks(same.shape)
    return jnp.where(is_real, same + _swap(same), _swap(cross) - cross)


def _by_channel(first: jax.Array, second: jax.Array) -> jax.Array:
    """Takes the lanes of the pair's first channel from `first`, the others from `second`."""
    return jnp.where(lane_masks(first.shape)[1], first, second)


def interleaving(num_phases: int, dtype: jnp.dtype) -> jax.Array:
    """The permutation of M c lanes from the order of phases to the order of positions: m c + j to j M + m."""
    size = num_phases * CHUNK
    phases, positions = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return (jax.lax.rem(phases, CHUNK) * num_phases + jax.lax.div(phases, CHUNK) == positions).astype(dtype)


def _lanes(x: jax.Array, i: int) -> jax.Array:
    return x[:, i * CHUNK : (i + 1) * CHUNK]


def _read(phases: Sequence[jax.Array], permutation: jax.Array) -> jax.Array:
    """The chunks of a block, [rows, c], from its M phases [sequences, tokens].

    Interleaving the lanes of M tiles of c tokens, one per phase, gives M chunks. The matrix unit interleaves exactly.
    """
    tokens, dtype = phases[0].shape[1], phases[0].dtype
    if tokens == CHUNK and len(phases) == 1:
        return phases[0]
    phases = [x.astype(FLOAT) for x in phases]  # a register holds 8 rows of float32, 16 of bfloat16
    tiles = [jnp.concatenate([_lanes(x, t) for x in phases], 1) for t in range(tokens // CHUNK)]
    if len(phases) > 1:
        tiles = jnp.split(dot(jnp.concatenate(tiles, 0).astype(dtype), permutation, (1, 0)), len(tiles))
    return jnp.concatenate([_lanes(x, q) for x in tiles for q in range(len(phases))], 0).astype(dtype)


def _write(rows: jax.Array, phases: Sequence, permutation: jax.Array) -> None:
    """The inverse of `_read`, into references [sequences, tokens]."""
    num_sequences, tokens = phases[0].shape
    dtype = phases[0].dtype
    if tokens == CHUNK and len(phases) == 1:
        phases[0][...] = rows.astype(dtype)
        return
    chunks = jnp.split(rows, rows.shape[0] // num_sequences)
    M = len(phases)
    tiles = [jnp.concatenate(chunks[t * M : (t + 1) * M], 1) for t in range(tokens // CHUNK)]
    if M > 1:
        tiles = jnp.split(dot(jnp.concatenate(tiles, 0).astype(dtype), permutation, (1, 1)), len(tiles))
    for t, tile in enumerate(tiles):
        for m, ref in enumerate(phases):
            ref[:, t * CHUNK : (t + 1) * CHUNK] = _lanes(tile, m).astype(dtype)


def _products(of_channels: Sequence[jax.Array], b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Products of u or y of two channels with b, each in the lanes of its channel.

    For bfloat16 u or y, b is split into two bfloat16 parts, so that the product keeps float32 accuracy. The gradients
    of parameters are small differences of such products.
    """
    parts = high_and_low(b, of_channels[0].dtype)
    return _by_channel(*(sum(dot(x, part, contract) for part in parts) for x in of_channels))


def _toeplitz_mask(is_reverse: jax.Array) -> jax.Array:
    """The mask where T[j, i] is nonzero: output i is not before input j."""
    to, since = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (1, 0))
    lag = to - since
    return jnp.where(is_reverse, -lag, lag) >= 0


def _shear(block: jax.Array, sign: int) -> jax.Array:
    """Shifts row j of [8, c] by j lanes, to the right for sign 1, to the left for sign -1."""
    row = jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
    for shift in (1, 2, 4):
        block = jnp.where((row & shift) != 0, pltpu.roll(block, sign * shift % CHUNK, 1), block)
    return block


def _channel_rows(pair: jax.Array) -> jax.Array:
    """[1, W] to [2, W]: one row per channel, zero in the lanes of the other channel."""
    row = jax.lax.broadcasted_iota(jnp.int32, (2, pair.shape[1]), 0)
    _, is_first = lane_masks(row.shape)
    return jnp.where(row == jnp.where(is_first, 0, 1), pair, 0.0)


def _ring(first_tap: jax.Array, gain: jax.Array, P: jax.Array, is_reverse: jax.Array) -> jax.Array:
    """The taps of two channels [2, c], ordered so that T[j, i] = ring[i - j mod c] where T is nonzero.

    Forward, the product of g and P is K[1], .., K[c], and the ring is K[0], .., K[c-1]. Backward, the product is K[c],
    .., K[1], and the ring is K[0], K[c-1], .., K[1].
    """
    taps = dot(_channel_rows(gain), P, (1, 1))
    lane = jax.lax.broadcasted_iota(jnp.int32, taps.shape, 1)
    return jnp.where(lane == 0, first_tap, jnp.where(is_reverse, taps, pltpu.roll(taps, 1, 1)))


def _ring_transposed(d_ring, gain, P, is_reverse) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of the first taps [2, c], g [1, W] and P [c, W] from the gradient of the ring."""
    is_tap_0 = jax.lax.broadcasted_iota(jnp.int32, d_ring.shape, 1) == 0
    d_taps = jnp.where(is_tap_0, 0.0, d_ring)
    d_taps = jnp.where(is_reverse, d_taps, pltpu.roll(d_taps, CHUNK - 1, 1))
    d_gain = dot(d_taps, P, (1, 0))
    d_P = dot(d_taps, _channel_rows(gain), (0, 0))
    return jnp.where(is_tap_0, d_ring, 0.0), _by_channel(d_gain[:1], d_gain[1:]), d_P


def _toeplitz(ring: jax.Array, mask: jax.Array) -> jax.Array:
    """T[j, i] = ring[i - j mod c] where the mask is true: [c, c] from [1, c]."""
    block = _shear(jnp.broadcast_to(ring, (SUBLANES, CHUNK)), 1)
    rows = [block] + [pltpu.roll(block, j, 1) for j in range(SUBLANES, CHUNK, SUBLANES)]
    return jnp.where(mask, jnp.concatenate(rows, 0), 0.0)


def _toeplitz_transposed(d_toeplitz: jax.Array, mask: jax.Array) -> jax.Array:
    """The gradient of the ring [1, c]: sums along the diagonals of [c, c]."""
    d_toeplitz = jnp.where(mask, d_toeplitz, 0.0)
    block = d_toeplitz[:SUBLANES]
    for j in range(SUBLANES, CHUNK, SUBLANES):
        block = block + pltpu.roll(d_toeplitz[j : j + SUBLANES], CHUNK - j, 1)
    return jnp.sum(_shear(block, -1), 0, keepdims=True)


class _Order(NamedTuple):
    """The place of each row of a block in the order of a direction."""

    is_reverse: jax.Array
    in_sequence: jax.Array  # [rows, W]: number of chunks before it in the sequence
    in_block: jax.Array  # [rows, W]: number of chunks before it in the block


def _order(g: Geometry, block: jax.Array, is_reverse: jax.Array, lanes: int) -> tuple[_Order, _Order]:
    """The order of a direction, and its opposite."""
    row = jax.lax.broadcasted_iota(jnp.int32, (g.rows, lanes), 0)
    per_block = g.rows // g.stride
    in_block = jax.lax.div(row, g.stride)
    in_sequence = jax.lax.rem(block * per_block + in_block, g.num_chunks)
    after_sequence, after_block = g.num_chunks - 1 - in_sequence, per_block - 1 - in_block
    up = jnp.where(is_reverse, after_sequence, in_sequence), jnp.where(is_reverse, after_block, in_block)
    down = jnp.where(is_reverse, in_sequence, after_sequence), jnp.where(is_reverse, in_block, after_block)
    return _Order(is_reverse, *up), _Order(~is_reverse, *down)


def _scan(written, carry, steps, order: _Order, g: Geometry):
    """The states at the start of each chunk of a block, [rows, W], and at the end of its last chunks, [stride, W].

    Args:
      written: [rows, W], the contribution of each chunk to the state.
      carry: [stride, W], the states at the start of the block's first chunks.
      steps: the `_factors` of A**(1, 2, 4, ..).
      order: the order of the chunks.
    """
    same, cross = steps
    per_block = g.rows // g.stride

    def previous(x, distance):
        rows = distance * g.stride
        return pltpu.roll(x, jnp.where(order.is_reverse, g.rows - rows, rows), 0)

    entering = carry if g.stride == 1 else jnp.concatenate([carry] * per_block, 0)
    states = jnp.where(order.in_block == 0, entering, previous(written, 1))
    states = jnp.where(order.in_sequence == 0, 0.0, states)
    reach = jnp.minimum(order.in_sequence, order.in_block)
    for i in range((min(g.num_chunks, per_block) - 1).bit_length()):
        x = previous(states, 1 << i)
        states = states + jnp.where(reach >= 1 << i, x * same[i : i + 1] + _swap(x) * cross[i : i + 1], 0.0)
    last, written = (jnp.where(order.is_reverse, x[: g.stride], x[g.rows - g.stride :]) for x in (states, written))
    return states, last * same[:1] + _swap(last) * cross[:1] + written


def _power_tables(powers: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """V and P [c, W], and the `_factors` of A**(1, 2, 4, ..), from a pair's powers [40, W]."""
    num_high = CHUNK // SUBLANES
    same, cross = _factors(powers[2 * SUBLANES :])

    def table(low, cross, order):
        swapped = _swap(low)
        return jnp.concatenate([low * same[m : m + 1] + swapped * cross[m : m + 1] for m in order], 0)

    V = table(powers[:SUBLANES], cross, range(num_high))
    # V and P have the powers in opposite orders, and P is conjugated.
    P = table(powers[SUBLANES : 2 * SUBLANES], -cross, range(num_high)[::-1])
    return V, P, (same[num_high:], cross[num_high:])


def _phases(ref, *index) -> list:
    """References to the M phases [sequences, tokens] of a channel."""
    return [ref.at[(m, *index)] for m in range(ref.shape[0])]


def _channels(ref, p, permutation: jax.Array, *index) -> list[jax.Array]:
    """The chunks [rows, c] of both channels of a pair."""
    return [_read([x[...] for x in _phases(ref, *index, 2 * p + c)], permutation) for c in (0, 1)]


def forward_kernel(g: Geometry, u_ref, first_tap_ref, gain_ref, powers_ref, y_ref, carries_ref, carry_ref):
    """Computes y of a block, and saves the states at its start for the backward kernel."""
    direction, i = pl.program_id(1), pl.program_id(2)
    is_reverse, lanes, dtype = runs_backwards(g.reverse, direction), powers_ref.shape[-1], u_ref.dtype
    order, _ = _order(g, g.block(direction, i, is_adjoint=False), is_reverse, lanes)
    mask, permutation = _toeplitz_mask(is_reverse), interleaving(u_ref.shape[0], dtype)

    @pl.when(i == 0)
    def _():
        carry_ref[...] = jnp.zeros_like(carry_ref)

    carries_ref[0, 0] = carry_ref[...]

    def pair(p, _):
        V, P, steps = _power_tables(powers_ref[0, p])
        P_operand = P.astype(dtype)
        u = _channels(u_ref, p, permutation)
        here, carried = pl.ds(p, 1), pl.ds(p * g.stride, g.stride)
        states, carry_ref[carried] = _scan(_products(u, V, (1, 0)), carry_ref[carried], steps, order, g)
        gain = gain_ref[0, here]
        same, cross = _factors(gain)
        read = states * same + _swap(states) * cross
        ring = _ring(first_tap_ref[0, pl.ds(2 * p, 2)], gain, P, is_reverse)
        zeros = jnp.zeros_like(read)
        for c, own in enumerate((_by_channel(read, zeros), _by_channel(zeros, read))):
            T, own = _toeplitz(ring[c : c + 1], mask).astype(dtype), own.astype(dtype)
            y = dot(u[c], T, (1, 0)) + dot(own, P_operand, (1, 1))
            _write(y, _phases(y_ref, 0, 2 * p + c), permutation)
        return 0

    jax.lax.fori_loop(0, CHANNELS // 2, pair, 0)


def backward_kernel(
    g: Geometry,
    u_ref,
    dy_ref,
    carries_ref,
    first_tap_ref,
    gain_ref,
    powers_ref,
    du_ref,
    d_first_tap_ref,
    d_gain_ref,
    d_log_ref,
    carry_ref,
):
    """Computes a direction's part of du, and accumulates the tables' gradients over all blocks."""
    direction, i = pl.program_id(1), pl.program_id(2)
    is_reverse, lanes, dtype = runs_backwards(g.reverse, direction), powers_ref.shape[-1], u_ref.dtype
    order, opposite = _order(g, g.block(direction, i, is_adjoint=True), is_reverse, lanes)
    mask, permutation = _toeplitz_mask(is_reverse), interleaving(u_ref.shape[0], dtype)
    row = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, lanes), 0)
    V_exponents = jnp.where(is_reverse, row, CHUNK - 1 - row).astype(FLOAT)
    P_exponents = CHUNK - V_exponents

    @pl.when(i == 0)
    def _():
        for ref in (carry_ref, d_first_tap_ref, d_gain_ref, d_log_ref):
            ref[...] = jnp.zeros_like(ref)

    def pair(p, _):
        here, carried = pl.ds(p, 1), pl.ds(p * g.stride, g.stride)
        V, P, (same, cross) = _power_tables(powers_ref[0, p])
        V_operand = V.astype(dtype)
        u, dy = _channels(u_ref, p, permutation), _channels(dy_ref, p, permutation, 0)

        states, _ = _scan(_products(u, V, (1, 0)), carries_ref[0, 0, carried], (same, cross), order, g)
        gain = gain_ref[0, here]
        gain_same, gain_cross = _factors(gain)
        read = states * gain_same + _swap(states) * gain_cross
        d_read = _products(dy, P, (1, 0))
        d_states = d_read * gain_same - _swap(d_read) * gain_cross
        d_written, carry_ref[carried] = _scan(d_states, carry_ref[carried], (same, -cross), opposite, g)

        ring = _ring(first_tap_ref[0, pl.ds(2 * p, 2)], gain, P, is_reverse)
        d_rings, zeros = [], jnp.zeros_like(d_written)
        for c, own in enumerate((_by_channel(d_written, zeros), _by_channel(zeros, d_written))):
            T, own = _toeplitz(ring[c : c + 1], mask).astype(dtype), own.astype(dtype)
            du = dot(dy[c], T, (1, 1)) + dot(own, V_operand, (1, 1))
            _write(du, _phases(du_ref, 0, 2 * p + c), permutation)
            d_rings.append(_toeplitz_transposed(dot(u[c], dy[c], (0, 0)), mask))
        d_first_tap, d_gain, d_P = _ring_transposed(jnp.concatenate(d_rings, 0), gain, P, is_reverse)
        d_first_tap_ref[0, pl.ds(2 * p, 2)] += d_first_tap
        d_gain_ref[0, here] += d_gain + _conjugate_product(states, d_read)

        d_decay = _conjugate_product(states, d_written)
        d_log = CHUNK * (d_decay * same[:1] - _swap(d_decay) * cross[:1])
        d_log += _conjugate_product(V, _products(u, d_written, (0, 0)), V_exponents)
        from_P = _conjugate_product(P, _products(dy, read, (0, 0)) + d_P, P_exponents)
        d_log_ref[0, here] += d_log + jnp.where(lane_masks(from_P.shape)[0], from_P, -from_P)
        return 0

    jax.lax.fori_loop(0, CHANNELS // 2, pair, 0)
