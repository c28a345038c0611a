"""The chunked SSM as a Pallas kernel for TPUs: products on the matrix unit, states that never leave the chip.

The sequence is split into chunks of c = 128 positions, the rows of a matrix U [rows, c] per channel. s_k is the state
at the start of chunk k, A = Lambda_bar**c, and the gain g = 2 C B_bar. A forward channel is (backward: the positions of
a chunk and the chunks are in the opposite order)

    w_k = sum_j Lambda_bar**(c-1-j) u_kj                     W = U V        V [c, N]  powers of Lambda_bar
    s_k = A s_{k-1} + w_{k-1}                                doubling       s_k += A**d s_{k-d} for d = 1, 2, 4, ..
    y_ki = sum_{j<=i} K[i-j] u_kj
           + Re sum_n g_n s_kn Lambda_bar_n**(i+1)           U T + S' P^T   T [c, c]  Toeplitz of the taps K
                                                             S' = g S       P [c, N]  conjugate powers, K = g P^T

This is the split of `chunked` (SSD, arXiv 2405.21060, section 6), with B_bar moved from the state's input to the gain.
The kernel makes T from K by shifts, and V and P as products of 8 with 16 powers, so that memory traffic is little more
than u and y. The gradient is the transposed operator,

    dS' = dY P,   dW = the states of dS in the opposite order, with conj A,   dU = dY T^T + dW V^T.

dT = U^T dY, dV = U^T dW and dP = dY^T S' are reduced on chip to the gradients of g, of K[0] and of log Lambda_bar. The
last is sum_m m conj(Lambda_bar**m) d(Lambda_bar**m) over the powers.

The input comes in M phases [D, B, J], with position j M + m at index j of phase m, the layout of the hourglass. XLA
reads and writes phases in the adjacent products without transposed copies. A block of the kernel holds at least c
tokens of all phases of at least 8 sequences. The matrix unit interleaves the phases; rows are ordered chunk by chunk,
over all these sequences. XLA interleaves more than 4 phases first. For a batch size that 8 does not divide, the input
is rearranged to the chunks of one sequence after another.

Two channels share the lanes of a register: the real parts of both, then the imaginary parts of both. Products take
operands in the dtype of u; sums, states and carries are float32. For bfloat16, operands that make the states and the
parameters' gradients are sums of two bfloat16 numbers. Only T and the operands that read the states are rounded.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diffussm_jax.ssm.discretize import discretize, transition_powers
from diffussm_jax.ssm.pallas_common import FLOAT
from diffussm_jax.ssm.pallas_tpu_kernels import (
    CHANNELS,
    CHUNK,
    SUBLANES,
    Geometry,
    backward_kernel,
    forward_kernel,
    lane_masks,
)
from diffussm_jax.ssm.params import SSMParams
from diffussm_jax.ssm.phases import through_one_phase

MAX_ROWS = {"float32": 128, "bfloat16": 256}  # per block; at most 256, because there are 8 doublings of A
MAX_PHASES = 4  # that the kernel interleaves; this work grows with M

_ROW_TILE = 16  # rows of a bfloat16 tile


class _Tables(NamedTuple):
    """Differentiable tables of R directions: D channels in pairs, W lanes per pair; float32."""

    first_tap: jax.Array  # [R, D, c]: K[0] and the skip in each lane
    gain: jax.Array  # [R, D/2, W]: g
    log_transition: jax.Array  # [R, D/2, W]: carries the gradient of log Lambda_bar; its value is not used


def _pair(x: jax.Array, fill: float = 0) -> jax.Array:
    """[R, D, N/2] to [R, D/2, W/2]: the states of two channels side by side, padded to whole registers."""
    R, D, half = x.shape
    x = jnp.pad(x, ((0, 0), (0, -D % CHANNELS), (0, -half % 32)), constant_values=fill)
    return x.reshape(R, x.shape[1] // 2, -1)


def _pack(z: jax.Array) -> jax.Array:
    """Complex [.., W/2] to real [.., W]."""
    return jnp.concatenate([z.real, z.imag], -1)


def _powers(Lambda: jax.Array, dt: jax.Array, exponents: jax.Array, discretization: str) -> jax.Array:
    """Lambda_bar**l with a step size per number: [R, D/2, .., n] from Lambda, dt [R, D/2, n] and l [R, ..]."""

    def power(Lambda, dt, exponent):
        return transition_powers(Lambda[..., None], dt, exponent[None], discretization)[..., 0, 0]

    for axis in range(1, exponents.ndim):
        power = jax.vmap(power, (None, None, 0), axis)
    return jax.vmap(power)(Lambda, dt, exponents)


def _exponents(is_reverse: bool) -> jax.Array:
    """[40]: exponents of the first 8 rows of V, of P, of each eighth row of V, and of A**(1, 2, 4, .., 128)."""
    low, high = jnp.arange(SUBLANES), jnp.arange(0, CHUNK, SUBLANES)
    steps = CHUNK * 2 ** jnp.arange(8)
    if is_reverse:
        return jnp.concatenate([low, low[::-1] + 1, high, steps])
    return jnp.concatenate([low[::-1], low + 1, high[::-1], steps])


def _tables(
    directions: Sequence[SSMParams], discretization: str, reverse: tuple[bool, ...]
) -> tuple[_Tables, jax.Array]:
    """The differentiable tables, and powers of Lambda_bar [R, D/2, 40, W] without gradients."""
    p = jax.tree.map(lambda *x: jnp.stack(x), *directions)
    dt = _pair(jnp.broadcast_to(p.dt[..., None], p.Lambda.shape))
    Lambda = _pair(p.Lambda, -1)
    z = Lambda * dt.astype(Lambda.dtype)
    _, B_bar = discretize(Lambda[..., None], _pair(p.B)[..., None], dt, discretization)
    gain = 2 * _pair(p.C) * B_bar[..., 0]
    skip = jnp.pad(p.D, ((0, 0), (0, -p.D.shape[1] % CHANNELS)))
    first_tap = jnp.sum(gain.real.reshape(*skip.shape, -1), -1) + skip
    tables = _Tables(
        first_tap=jnp.broadcast_to(first_tap[..., None], (*skip.shape, CHUNK)),
        gain=_pack(gain),
        log_transition=_pack(
            z if discretization == "zoh" else z * jax.lax.stop_gradient(1 / ((1 - z / 2) * (1 + z / 2)))
        ),
    )
    # Real and imaginary parts are computed in their own lanes. Joining them later would cost a pass through memory.
    exponents = jnp.stack([_exponents(is_reverse) for is_reverse in reverse])
    powers = _powers(*(jnp.concatenate([x, x], -1) for x in (Lambda, dt)), exponents, discretization)
    is_real, _ = lane_masks(powers.shape[-2:])
    is_P = jax.lax.broadcasted_iota(jnp.int32, is_real.shape, 0) // SUBLANES == 1
    return tables, jnp.where(is_real, powers.real, jnp.where(is_P, -powers.imag, powers.imag))


def _tile(num_phases: int, g: Geometry) -> tuple[int, int]:
    """The tile of X and Y in a block of `rows` chunks."""
    rows = g.rows if g.stride == 1 else g.stride
    return rows, g.rows // (num_phases * rows) * CHUNK


def _call(kernel, g: Geometry, inputs: dict, outputs: dict, *, is_adjoint: bool, interpret: bool):
    """Calls a kernel over (blocks of channels, directions, blocks of rows).

    Args:
      kernel: called with the geometry, references to the inputs and outputs, and a carry.
      inputs: arrays by name, see `outputs`.
      outputs: shapes by name: "u" [M, D, X, Y], "y", "dy" and "du" [M, R, D, X, Y], "carries"
        [R, num_blocks, D/2 * stride, W], all others [R, D or D/2, ..] with one block for all rows.
      is_adjoint: process rows in the opposite order of the direction.
    """
    lanes, (M, D, _, Y) = inputs["powers"].shape[-1], inputs["u"].shape
    tile = _tile(M, g)
    across = Y // tile[1]

    def place(r, i):
        block = g.block(r, i, is_adjoint=is_adjoint)
        return jax.lax.div(block, across), jax.lax.rem(block, across)

    def spec(name, x):
        if name == "carries":
            shape = (1, 1, CHANNELS // 2 * g.stride, lanes)
            return pl.BlockSpec(shape, lambda d, r, i: (r, g.block(r, i, is_adjoint=is_adjoint), d, 0))
        if name == "u":
            return pl.BlockSpec((M, CHANNELS, *tile), lambda d, r, i: (0, d, *place(r, i)))
        if name in ("y", "dy", "du"):
            return pl.BlockSpec((M, 1, CHANNELS, *tile), lambda d, r, i: (0, r, d, *place(r, i)))
        channels = CHANNELS if name == "first_tap" else CHANNELS // 2
        return pl.BlockSpec((1, channels, *x.shape[2:]), lambda d, r, i: (r, d) + (0,) * (x.ndim - 2))

    return pl.pallas_call(
        functools.partial(kernel, g),
        grid=(D // CHANNELS, len(g.reverse), g.num_blocks),
        in_specs=[spec(name, x) for name, x in inputs.items()],
        out_specs=[spec(name, x) for name, x in outputs.items()],
        out_shape=list(outputs.values()),
        scratch_shapes=[pltpu.VMEM((CHANNELS // 2 * g.stride, lanes), FLOAT)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )(*inputs.values())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _apply(directions, u, g: Geometry, discretization: str, interpret: bool):
    """u [M, D, X, Y] to y [M, R, D, X, Y]."""
    return _apply_forward(directions, u, g, discretization, interpret)[0]


def _apply_forward(directions, u, g, discretization, interpret):
    tables, powers = _tables(directions, discretization, g.reverse)
    R, (M, D, *tiles) = len(g.reverse), u.shape
    carries = jax.ShapeDtypeStruct((R, g.num_blocks, D // 2 * g.stride, powers.shape[-1]), FLOAT)
    y, carries = _call(
        forward_kernel,
        g,
        {"u": u, "first_tap": tables.first_tap, "gain": tables.gain, "powers": powers},
        {"y": jax.ShapeDtypeStruct((M, R, D, *tiles), u.dtype), "carries": carries},
        is_adjoint=False,
        interpret=interpret,
    )
    return y, (directions, u, carries)


def _apply_backward(g, discretization, interpret, residuals, dy):
    directions, u, carries = residuals
    tables, pull_back, powers = jax.vjp(lambda p: _tables(p, discretization, g.reverse), directions, has_aux=True)
    du, *d_tables = _call(
        backward_kernel,
        g,
        {"u": u, "dy": dy, "carries": carries, "first_tap": tables.first_tap, "gain": tables.gain, "powers": powers},
        {"du": jax.ShapeDtypeStruct(dy.shape, u.dtype)}
        | {name: jax.ShapeDtypeStruct(x.shape, FLOAT) for name, x in tables._asdict().items()},
        is_adjoint=True,
        interpret=interpret,
    )
    (d_directions,) = pull_back(_Tables(*d_tables))
    # XLA fuses separate additions into the next operation. A sum over an axis would be a pass of its own.
    return d_directions, sum(du[:, r].astype(FLOAT) for r in range(len(g.reverse))).astype(u.dtype)


_apply.defvjp(_apply_forward, _apply_backward)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _as_phases(u: jax.Array, max_rows: int, apply) -> jax.Array:
    """Applies to u [M, D, B, J], padded to whole tiles of tokens. B is a multiple of 8. Returns as `pallas_tpu`."""
    M, _, B, J = u.shape
    stride = max(s for s in range(SUBLANES, B + 1, SUBLANES) if B % s == 0 and M * s <= max_rows)
    num_tiles = -(-J // CHUNK)
    across = -(-num_tiles // (max_rows // (M * stride)))
    per_block = -(-num_tiles // across)
    y = apply(
        jnp.pad(u, ((0, 0), (0, 0), (0, 0), (0, across * per_block * CHUNK - J))),
        num_chunks=across * per_block * M,
        stride=stride,
        rows=per_block * M * stride,
        num_blocks=across * B // stride,
    )
    return y[..., :J]


def _as_rows(u: jax.Array, max_rows: int, apply) -> jax.Array:
    """Applies to u [1, D, B, L] as [1, D, B * K, c], sequence after sequence. Returns as `pallas_tpu`."""
    _, D, B, L = u.shape
    K = -(-L // CHUNK)
    num_blocks = -(-B * K // max_rows)
    rows = _round_up(-(-B * K // num_blocks), _ROW_TILE)
    u = jnp.pad(u, ((0, 0), (0, 0), (0, 0), (0, K * CHUNK - L)))
    u = jnp.pad(u.reshape(1, D, B * K, CHUNK), ((0, 0), (0, 0), (0, rows * num_blocks - B * K), (0, 0)))
    y = apply(u, num_chunks=K, stride=1, rows=rows, num_blocks=num_blocks)[..., : B * K, :]
    return y.reshape(1, -1, D, B, K * CHUNK)[..., :L]


def pallas_tpu(
    directions: Sequence[SSMParams],
    u: jax.Array,
    *,
    discretization: str,
    reverse: tuple[bool, ...],
    interpret: bool = False,
    max_rows: int | None = None,
) -> jax.Array:
    """Runs R SSMs over the same u, each forward or backward. Differentiable in u and in the parameters.

    After SSD (arXiv 2405.21060, section 6). Memory and work are linear in L.

    Args:
      u: [M, D, B, J] float32 or bfloat16: position j M + m of the L = J M is u[m, :, :, j]. Matrix products take
        operands of this dtype, float32 at full precision.
      discretization: "zoh" or "bilinear".
      reverse: per direction, whether it runs backward.
      interpret: run the kernel as plain JAX, on any machine; slow.
      max_rows: the maximum of chunks of 128 positions, over all sequences, on the chip at a time: a multiple of 16, at
        most 256. `MAX_ROWS` of the dtype if None.

    Returns:
      y [M, R, D, B, J] in the dtype of `u`.

    Raises:
      ValueError: the dtype of `u`, the value of `max_rows` or the discretisation is not supported.
    """
    if u.dtype.name not in MAX_ROWS:
        raise ValueError(f"u must be {' or '.join(MAX_ROWS)} for the TPU kernel, got {u.dtype}")
    max_rows = MAX_ROWS[u.dtype.name] if max_rows is None else max_rows
    if max_rows % _ROW_TILE or not _ROW_TILE <= max_rows <= 256:
        raise ValueError(f"max_rows must be a multiple of {_ROW_TILE} from {_ROW_TILE} to 256, got {max_rows}")
    M, D, B, _ = u.shape
    if M > 1 and (M > MAX_PHASES or M * SUBLANES > max_rows or B % SUBLANES):
        options = {"discretization": discretization, "reverse": reverse, "interpret": interpret, "max_rows": max_rows}
        return through_one_phase(functools.partial(pallas_tpu, directions, **options), u)
    lay_out = _as_rows if B % SUBLANES else _as_phases

    def apply(u, **sizes):
        return _apply(tuple(directions), u, Geometry(tuple(reverse), **sizes), discretization, interpret)

    return lay_out(jnp.pad(u, ((0, 0), (0, -D % CHANNELS), (0, 0), (0, 0))), max_rows, apply)[:, :, :D]
