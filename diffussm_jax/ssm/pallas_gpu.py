"""The chunked SSM as a Pallas kernel for NVIDIA GPUs, through Triton: products on tensor cores, states in registers.

A program processes one channel and a block of sequences, chunk by chunk: u_k [rows, c], c positions each. s is the
state at the start of a chunk, A = Lambda_bar**c, and the gain g = 2 C B_bar. A forward channel is (backward: the
positions of a chunk and the chunks are in the opposite order)

    y_k = u_k T + Re(s F)       T [c, c]  Toeplitz of the first c taps     F [N/2, c]  g Lambda_bar**(i+1)
    s   = A s + u_k V                                                      V [c, N/2]  Lambda_bar**(c-1-j)

This is the split of `chunked` (SSD, arXiv 2405.21060, section 6), with B_bar moved from the state's input to the gain.
XLA computes the powers of Lambda_bar and the taps. Each program gathers T, V and F from them once.

The gradient needs no states of the forward pass. du is the same operator on dy in the opposite direction. The gradient
of a tap is a sum of products of dy and u and symmetric in them, so the states s of dy, which du needs, also give the
gradients of the parameters:

    dT = sum_k dy_k^T u_k,   dF = sum_k u_k^T s,   and by log Lambda_bar   sum_k u_k^T r + (i+1) u_k^T s,
    r  = A (r + c s) + dy_k V',   V' = (c-1-j) V   the derivative of s by log Lambda_bar.

The residuals are the parameters and u. Sums stay in registers. XLA adds the sums of several blocks of sequences, which
makes the result deterministic. Products take operands in the dtype of u; sums and states are float32. For float32, A is
the sum of two numbers, because the error of a rounded A grows with each of thousands of chunks. For bfloat16, operands
of the parameters' gradients are sums of two bfloat16 numbers; operands of y and du are rounded.

No times were measured, for lack of a GPU. Compiled for an H100, (B, L, D, N) = (64, 1024, 1152, 64), bfloat16, both
directions:

                                      forward     backward
    bytes of operands and results     474 MB      684 MB      read and written once: 453 and 604 MB
    additional if the L2 cache misses 151 MB      453 MB      u read again; du written and read
    tensor cores                      58 GFLOP    213 GFLOP   wgmma; 3 and 11 products of 64 x 64 x 64 per chunk
    registers, shared memory          128, 48 KiB 255, 104 KiB (about 50 loads and 15 stores spilled per chunk)

XLA adds 250 MB for tables, their gradients and the sums over blocks. Blocks of 16 to 63 sequences use mma.sync. The
loop over chunks is serial, so B D should be large enough to give each multiprocessor a program.

The input comes in M phases (`ssm.phases`). The positions of a chunk keep that order, and T, V and F are gathered to
match. The matrix products of an hourglass use the same layout: a block of DiffuSSM compiled for an H100 has no copy of
U, Y or their gradients.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from diffussm_jax.ssm.discretize import discretize, split_transition, transition_powers
from diffussm_jax.ssm.kernel import taps
from diffussm_jax.ssm.pallas_common import FLOAT
from diffussm_jax.ssm.pallas_gpu_kernels import Geometry, TableRefs, backward_kernel, forward_kernel
from diffussm_jax.ssm.params import SSMParams
from diffussm_jax.ssm.phases import through_one_phase

CHUNK = {"float32": 32, "bfloat16": 64}
MAX_ROWS = {"float32": 32, "bfloat16": 64}  # per block with 64 states; fewer with more states, to limit registers
MAX_STATES = 256

_MIN_SIZE = 16  # smallest side of a matrix on a tensor core
_ROWS = (16, 32, 64)


class _Tables(NamedTuple):
    """Differentiable tables of R directions; float32, complex numbers as pairs."""

    taps: jax.Array  # [R, D, c]: K, with the skip in the first
    gain: jax.Array  # [R, D, n, 2]: g
    log_transition: jax.Array  # [R, D, n, 2]: carries the gradient of log Lambda_bar; its value is not used


class _Powers(NamedTuple):
    """Powers of Lambda_bar of R directions, float32, without gradients."""

    table: jax.Array  # [R, D, c + 1, n, 2]
    decay: jax.Array  # [R, D, p, n, 2], one or two parts with sum A


def _tables(directions: Sequence[SSMParams], discretization: str, dtype: jnp.dtype) -> tuple[_Tables, _Powers]:
    """Makes the tables for u of a dtype; n is N/2 padded to a power of two."""
    chunk = CHUNK[dtype.name]
    p = jax.tree.map(lambda *x: jnp.concatenate(x), *directions)
    n = _power_of_two(p.Lambda.shape[-1])

    def by_direction(x):
        return x.reshape(len(directions), -1, *x.shape[1:])

    def pairs(z):
        """Complex [R * D, .., N/2] to real [R, D, .., n, 2]."""
        z = jnp.pad(z, ((0, 0),) * (z.ndim - 1) + ((0, n - z.shape[-1]),))
        return by_direction(jnp.stack([z.real, z.imag], -1))

    _, B_bar = discretize(p.Lambda, p.B, p.dt, discretization)
    z = p.Lambda * p.dt[:, None].astype(p.Lambda.dtype)
    if discretization == "bilinear":
        z = z * jax.lax.stop_gradient(1 / ((1 - z / 2) * (1 + z / 2)))
    table = transition_powers(p.Lambda, p.dt, jnp.arange(chunk + 1), discretization).swapaxes(1, 2)
    decay = split_transition(p.Lambda, p.dt, discretization, chunk) if dtype == FLOAT else [table[:, -1]]
    powers = jax.lax.stop_gradient(_Powers(pairs(table), pairs(jnp.stack(decay, 1))))
    return _Tables(by_direction(taps(p, chunk, discretization)), pairs(2 * p.C * B_bar), pairs(z)), powers


def _flat(x: jax.Array) -> jax.Array:
    """[.., n, 2] to [.., W]."""
    return x.reshape(*x.shape[:-2], -1)


def _operands(tables: _Tables, powers: _Powers, dtype: jnp.dtype, powers_dtype: jnp.dtype) -> TableRefs:
    re, im = tables.gain[..., 0], tables.gain[..., 1]
    # Re(F s) = Re F Re s - Im F Im s: rows of F are g P, and -g P for the imaginary parts.
    read = jnp.stack([_flat(jnp.stack([re, -re], -1)), _flat(jnp.stack([-im, -im], -1))], 2)
    table = _flat(powers.table).astype(powers_dtype)
    return TableRefs(tables.taps.astype(dtype), read, table, decay=jnp.moveaxis(powers.decay, -1, 3))


def _complex(products: jax.Array) -> jax.Array:
    """z w [.., n] from sums of products of z and w, and of swapped z and w, [.., 2, W]."""
    straight, swapped = (products[..., i, :].reshape(*products.shape[:-2], -1, 2) for i in (0, 1))
    return jax.lax.complex(straight[..., 0] - straight[..., 1], swapped[..., 0] + swapped[..., 1])


def _gradient(derivative: jax.Array) -> jax.Array:
    """The gradient of Re f(z) by Re z and Im z, [.., 2], from f'(z)."""
    return jnp.stack([derivative.real, -derivative.imag], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _apply(directions, u, g: Geometry, discretization: str):
    """u [M, D, B, J] to y [M, R, D, B, J]."""
    return _apply_forward(directions, u, g, discretization)[0]


def _apply_forward(directions, u, g, discretization):
    M, D, _, J = u.shape
    operands = _operands(*_tables(directions, discretization, u.dtype), u.dtype, u.dtype)
    y = pl.pallas_call(
        functools.partial(forward_kernel, g),
        grid=(len(g.reverse), D, g.num_blocks),  # the first axis varies fastest: directions share the reads of u
        in_specs=[
            pl.BlockSpec((M, None, g.rows, J), lambda r, d, i: (0, d, i, 0)),
            *(
                pl.BlockSpec((1, None, *x.shape[2:]), lambda r, d, i, x=x: (r, d) + (0,) * (x.ndim - 2))
                for x in operands
            ),
        ],
        out_specs=pl.BlockSpec((M, None, None, g.rows, J), lambda r, d, i: (0, r, d, i, 0)),
        out_shape=jax.ShapeDtypeStruct((M, len(g.reverse), *u.shape[1:]), u.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2),
        interpret=g.interpret,
    )(u, *operands)
    return y, (directions, u)


def _apply_backward(g, discretization, residuals, dy):
    directions, u = residuals
    (M, D, _, J), R = u.shape, len(g.reverse)
    tables, pull_back, powers = jax.vjp(lambda p: _tables(p, discretization, u.dtype), directions, has_aux=True)
    operands = _operands(tables, powers, u.dtype, FLOAT)
    sums = [(g.chunk, g.chunk), operands.read.shape[2:], operands.read.shape[2:]]
    du, *sums = pl.pallas_call(
        functools.partial(backward_kernel, g),
        grid=(D, g.num_blocks),
        in_specs=[
            pl.BlockSpec((M, None, g.rows, J), lambda d, i: (0, d, i, 0)),
            pl.BlockSpec((M, R, None, g.rows, J), lambda d, i: (0, 0, d, i, 0)),
            *(pl.BlockSpec((R, None, *x.shape[2:]), lambda d, i, x=x: (0, d) + (0,) * (x.ndim - 2)) for x in operands),
        ],
        out_specs=[
            pl.BlockSpec((M, None, g.rows, J), lambda d, i: (0, d, i, 0)),
            *(pl.BlockSpec((None, R, None, *x), lambda d, i, x=x: (i, 0, d) + (0,) * len(x)) for x in sums),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            *(jax.ShapeDtypeStruct((g.num_blocks, R, D, *x), FLOAT) for x in sums),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2),
        interpret=g.interpret,
    )(u, dy, *operands)
    d_toeplitz, by_gain, by_log = (jnp.sum(x, 0) for x in sums)
    by_gain, by_log = _complex(by_gain), _complex(by_log)
    by_log *= jax.lax.complex(tables.gain[..., 0], tables.gain[..., 1])
    d_tables = _Tables(jnp.sum(d_toeplitz, 2), *(_gradient(x) for x in (by_gain, by_log)))
    return *pull_back(d_tables), du


_apply.defvjp(_apply_forward, _apply_backward)


def _power_of_two(size: int) -> int:
    """Rounds a size up to a power of two, at least 16."""
    return max(_MIN_SIZE, 1 << (size - 1).bit_length())


@functools.cache  # once in a process
def _warn_of_triton() -> None:
    if jax.__version_info__ < (0, 11):
        return
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)  # JAX's own
    warnings.warn(
        "on GPUs the SSM method 'pallas' needs Pallas's Triton backend, which JAX has deprecated and will remove; "
        "the methods 'auto' and 'chunked' do not need it",
        FutureWarning,
        stacklevel=2,
    )


def pallas_gpu(
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
        operands of this dtype, float32 at full precision. Phases are interleaved first if M does not divide the chunk
        of 64 positions (32 for float32).
      discretization: "zoh" or "bilinear".
      reverse: per direction, whether it runs backward.
      interpret: run the kernel as plain JAX, on any machine; slow.
      max_rows: the maximum of sequences per program: 16, 32 or 64. `MAX_ROWS` of the dtype if None, fewer for N > 64.

    Returns:
      y [M, R, D, B, J] in the dtype of `u`.

    Raises:
      ValueError: the dtype of `u` or the value of `max_rows` is not supported, N is above 256, or the discretisation is
        unknown.
    """
    if u.dtype.name not in CHUNK:
        raise ValueError(f"u must be {' or '.join(CHUNK)} for the GPU kernel, got {u.dtype}")
    N = 2 * directions[0].Lambda.shape[-1]
    if N > MAX_STATES:
        raise ValueError(f"the GPU kernel has room for {MAX_STATES} states, got {N}")
    if max_rows is None:
        most = MAX_ROWS[u.dtype.name]
        max_rows = min(most, max(_MIN_SIZE, 64 * most // _power_of_two(N)))
    if max_rows not in _ROWS:
        raise ValueError(f"max_rows must be one of {', '.join(map(str, _ROWS))}, got {max_rows}")
    if not interpret:
        _warn_of_triton()
    chunk, (M, _, B, J) = CHUNK[u.dtype.name], u.shape
    if chunk % M:
        options = {"discretization": discretization, "reverse": reverse, "interpret": interpret, "max_rows": max_rows}
        return through_one_phase(functools.partial(pallas_gpu, directions, **options), u)
    rows, tokens = min(max_rows, _power_of_two(B)), chunk // M
    g = Geometry(
        reverse=tuple(reverse),
        num_phases=M,
        chunk=chunk,
        num_chunks=-(-J // tokens),
        rows=rows,
        num_blocks=-(-B // rows),
        interpret=interpret,
    )
    u = jnp.pad(u, ((0, 0), (0, 0), (0, g.num_blocks * rows - B), (0, g.num_chunks * tokens - J)))
    return _apply(tuple(directions), u, g, discretization)[..., :B, :J]
