"""The chunked SSM: matrix products inside chunks of the sequence, a recurrence of states between chunks.

u is split into K chunks of c positions, rows U_k [1, c]. S_k [1, N] is the state at the start of chunk k:

    Y_k     = U_k T + S_k P           T [c, c]  Toeplitz of the kernel's first c taps (upper triangular; lower backward)
    S_{k+1} = A S_k + U_k V           V [c, N]  from the chunk's inputs to the state at its end
                                      P [N, c]  from the state at its start to the outputs
                                      A [N/2]   Lambda_bar**c, complex

This is per channel and in real arithmetic, with the real and imaginary parts of the N/2 states side by side. Work and
memory are linear in L. The split is that of SSD (arXiv 2405.21060, section 6) for diagonal, time-invariant states. For
float32, A is the sum of two numbers (`split_transition`), because the error of a rounded A grows with each of thousands
of chunks. T, V and P of all directions are concatenated (P block-diagonally), so that u is read once for the states and
once for the outputs. The input comes in M phases (`ssm.phases`); T, V and P are permuted to match the order of
positions in a chunk.

The gradient is the transposed operator. The adjoint states dW run over the chunks in the opposite order,

    dS = dY P^T,   dW_k = conj(A) dW_{k+1} + dS_{k+1},   dU = dY T^T + dW V^T.

The products over all rows U^T dY, U^T dW, S^T dY and conj(S) dW are the gradients of T, V, P and A. These operators
depend only on the parameters, and the backward pass recomputes them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffussm_jax.ssm.discretize import discretize, split_transition, transition_powers
from diffussm_jax.ssm.kernel import real_rows, taps
from diffussm_jax.ssm.params import SSMParams
from diffussm_jax.ssm.phases import through_one_phase

_FLOAT = jnp.float32


def chunk_size(num_positions: int) -> int:
    """The chunk size c for a batch with this total of positions. A larger c costs more in T and less in states."""
    return 128 if num_positions >= 2**16 else 64


class _Operators(NamedTuple):
    """The operators of R directions, float32."""

    toeplitz: jax.Array  # T [D, c, R * c]
    write: jax.Array  # V [D, c, R * N]
    read: jax.Array  # P [D, R * N, R * c], zero where the directions differ
    decay: tuple[jax.Array, ...]  # [R, D, N/2] complex, one or two parts with sum A; the last has the gradient


def _toeplitz(K: jax.Array, reverse: bool) -> jax.Array:
    """T[j, i] = K[i - j] where i >= j (backward: K[j - i] where j >= i), for K [D, c]: [D, c, c].

    Each row is the row above, shifted by one: repeated copies of a vector of length 2c are reshaped to rows of 2c - 1.
    This avoids a gather, whose gradient would be a scatter.
    """
    D, c = K.shape
    zeros = jnp.zeros_like(K)
    ring = jnp.concatenate([K[:, :1], zeros, K[:, :0:-1]] if reverse else [K, zeros], 1)  # T[j, i] = ring[i - j mod 2c]
    rows = jnp.broadcast_to(ring[:, None], (D, c, 2 * c)).reshape(D, 2 * c * c)[:, : c * (2 * c - 1)]
    return rows.reshape(D, c, 2 * c - 1)[:, :, :c]


def _in_phases(x: jax.Array, num_phases: int, axis: int) -> jax.Array:
    """Reorders an axis of positions phase by phase."""
    tokens = x.shape[axis] // num_phases
    split = x.reshape(*x.shape[:axis], tokens, num_phases, *x.shape[axis + 1 :])
    return split.swapaxes(axis, axis + 1).reshape(x.shape)


def _operators(
    directions: Sequence[SSMParams],
    chunk: int,
    dtype: jnp.dtype,
    num_phases: int,
    discretization: str,
    reverse: tuple[bool, ...],
) -> _Operators:
    toeplitz, write, read, decay = [], [], [], []
    for r, (p, is_reverse) in enumerate(zip(directions, reverse, strict=True)):
        _, B_bar = discretize(p.Lambda, p.B, p.dt, discretization)
        powers = transition_powers(p.Lambda, p.dt, jnp.arange(chunk + 1), discretization)  # [D, N/2, c + 1]
        since_input = B_bar[..., None] * powers[..., :-1]
        until_output = (2 * p.C)[..., None] * powers[..., 1:]
        if is_reverse:
            until_output = jnp.flip(until_output, -1)
        else:
            since_input = jnp.flip(since_input, -1)
        T = _toeplitz(taps(p, chunk, discretization), is_reverse)
        toeplitz.append(_in_phases(_in_phases(T, num_phases, 1), num_phases, 2))
        write.append(_in_phases(real_rows(since_input, 1), num_phases, 2).swapaxes(1, 2))
        # Re(P S) = Re P Re S - Im P Im S
        own = _in_phases(real_rows(until_output.conj(), 1), num_phases, 2)
        others = (0, 0), (0, 0), (r * chunk, (len(directions) - 1 - r) * chunk)
        read.append(jnp.pad(own, others))
        is_split = dtype == _FLOAT
        decay.append(split_transition(p.Lambda, p.dt, discretization, chunk) if is_split else (powers[..., -1],))
    return _Operators(
        *(jnp.concatenate(m, axis) for m, axis in ((toeplitz, 2), (write, 2), (read, 1))),
        tuple(jnp.stack(parts) for parts in zip(*decay, strict=True)),
    )


def _carry(written: jax.Array, decay: Sequence[jax.Array], reverse: Sequence[bool], dtype: jnp.dtype) -> jax.Array:
    """The state at the start of each chunk, in `dtype`, from what each chunk adds: [D, K, B, R * N] float32.

    On CPUs a bfloat16 carry is stored as uint16, because XLA:CPU would convert it to float32 and back at every
    iteration.
    """
    D, K, B, _ = written.shape
    half = decay[0].shape[-1]

    def carry(stored_dtype, written, decay):
        def store(x):
            return jax.lax.bitcast_convert_type(x.astype(dtype), stored_dtype)

        def body(i, loop):
            states, current = loop
            after = []
            for r, (is_reverse, state) in enumerate(zip(reverse, current, strict=True)):
                at = (0, K - 1 - i if is_reverse else i, 0, 2 * half * r)
                states = jax.lax.dynamic_update_slice(states, store(real_rows(state, -1))[:, None], at)
                added = jax.lax.dynamic_slice(written, at, (D, 1, B, 2 * half))[:, 0]
                added = jax.lax.complex(added[..., :half], added[..., half:])
                for part in reversed(decay):
                    added = part[r][:, None] * state + added
                after.append(added)
            return states, after

        start = [jnp.zeros((D, B, half), jnp.complex64) for _ in reverse]
        states, _ = jax.lax.fori_loop(0, K, body, (store(jnp.zeros(written.shape)), start))
        return jax.lax.bitcast_convert_type(states, dtype)

    native = functools.partial(carry, dtype)
    if dtype == _FLOAT:
        return native(written, decay)
    return jax.lax.platform_dependent(written, tuple(decay), cpu=functools.partial(carry, jnp.uint16), default=native)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum with operands in the dtype of a and float32 accumulation."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == _FLOAT else None
    return jnp.einsum(equation, a, b.astype(a.dtype), precision=precision, preferred_element_type=_FLOAT)


def _precise_product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`_product` with b split into two bfloat16 parts, because gradients of dt are small differences of states."""
    if a.dtype == _FLOAT:
        return _product(equation, a, b)
    high = b.astype(a.dtype)
    return _product(equation, a, high) + _product(equation, a, b - high.astype(_FLOAT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _apply(
    directions: tuple[SSMParams, ...], U: jax.Array, num_phases: int, discretization: str, reverse: tuple[bool, ...]
):
    """U [D, K, B, c] to Y [D, K, B, R * c]."""
    return _apply_forward(directions, U, num_phases, discretization, reverse)[0]


def _apply_forward(directions, U, num_phases, discretization, reverse):
    op = _operators(directions, U.shape[-1], U.dtype, num_phases, discretization, reverse)
    Y = _product("dkbj,dji->dkbi", U, op.toeplitz)
    if U.shape[1] == 1:
        return Y.astype(U.dtype), (directions, U, None)
    S = _carry(_precise_product("dkbj,djn->dkbn", U, op.write), op.decay, reverse, U.dtype)
    return (Y + _product("dkbn,dni->dkbi", S, op.read)).astype(U.dtype), (directions, U, S)


def _apply_backward(num_phases, discretization, reverse, residuals, dY):
    directions, U, S = residuals
    options = U.shape[-1], U.dtype, num_phases, discretization, reverse
    op, pull_back = jax.vjp(lambda p: _operators(p, *options), directions)
    dU = _product("dkbi,dji->dkbj", dY, op.toeplitz)
    d_toeplitz = _product("dkbj,dkbi->dji", U, dY)
    if S is None:
        (d_directions,) = pull_back(jax.tree.map(jnp.zeros_like, op)._replace(toeplitz=d_toeplitz))
        return d_directions, dU.astype(U.dtype)
    dS = _precise_product("dkbi,dni->dkbn", dY, op.read)
    dW = _carry(dS, [x.conj() for x in op.decay], [not is_reverse for is_reverse in reverse], U.dtype)
    d_op = _Operators(
        toeplitz=d_toeplitz,
        write=_product("dkbj,dkbn->djn", U, dW),
        read=_product("dkbn,dkbi->dni", S, dY),
        decay=(*map(jnp.zeros_like, op.decay[:-1]), _decay_gradient(S, dW, len(reverse))),
    )
    (d_directions,) = pull_back(d_op)
    return d_directions, (dU + _product("dkbn,djn->dkbj", dW, op.write)).astype(U.dtype)


_apply.defvjp(_apply_forward, _apply_backward)


def _decay_gradient(S: jax.Array, dW: jax.Array, num_directions: int) -> jax.Array:
    """The gradient of A [R, D, N/2], conjugated as in JAX's convention for complex numbers."""

    def as_complex(x):  # [D, K, B, R, N/2]
        x = x.astype(_FLOAT).reshape(*x.shape[:3], num_directions, 2, -1)
        return jax.lax.complex(x[..., 0, :], x[..., 1, :])

    return jnp.sum(as_complex(S) * as_complex(dW).conj(), (1, 2)).swapaxes(0, 1)


def chunked(
    directions: Sequence[SSMParams],
    u: jax.Array,
    *,
    discretization: str,
    reverse: tuple[bool, ...],
    chunk: int | None = None,
) -> jax.Array:
    """Runs R SSMs over the same u, each forward or backward.

    Matrix products take operands in the dtype of u. Products that make the states keep float32 accuracy. Sums and the
    recurrence of states are float32.

    Args:
      u: [M, D, B, J] float32 or bfloat16, in phases. The phases are interleaved first if M does not divide the chunk.
      discretization: "zoh" or "bilinear".
      reverse: per direction, whether it runs backward.
      chunk: c, positions; `chunk_size` of the batch if None.

    Returns:
      y [M, R, D, B, J] in the dtype of `u`.
    """
    M, D, B, J = u.shape
    chunk = chunk_size(M * B * J) if chunk is None else chunk
    if chunk % M:
        options = {"discretization": discretization, "reverse": reverse, "chunk": chunk}
        return through_one_phase(functools.partial(chunked, directions, **options), u)
    tokens = min(J, chunk // M)
    K = -(-J // tokens)
    U = jnp.pad(u, ((0, 0), (0, 0), (0, 0), (0, K * tokens - J))).reshape(M, D, B, K, tokens)
    U = U.transpose(1, 3, 2, 0, 4).reshape(D, K, B, M * tokens)
    Y = _apply(tuple(directions), U, M, discretization, tuple(reverse)).reshape(D, K, B, -1, M, tokens)
    return Y.transpose(4, 3, 0, 2, 1, 5).reshape(M, -1, D, B, K * tokens)[..., :J]
