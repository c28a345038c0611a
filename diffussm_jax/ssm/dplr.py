"""S4 (arXiv 2111.00396): SSMs with a diagonal plus low-rank state matrix, A = diag(Lambda) - P P*.

P is the same on both sides, as in S4's later code (arXiv 2202.09729), so that with Re Lambda < 0 states never grow,
whatever is learned. Of each conjugate pair one half is kept. The discretisation is bilinear,

    A_bar = (I - dt/2 A)^-1 (I + dt/2 A),    B_bar = (I - dt/2 A)^-1 dt B.

With Lambda, P and B scaled by dt/2, sqrt(dt/2) and dt, these have no step any more, and neither has what follows:

    A_bar = (I - A)^-1 (I + A),    B_bar = (I - A)^-1 B.

The kernel K[l] = C^T A_bar^l B_bar comes from its values at n >= L points z of the plane (S4, appendix C.3),

    sum_{l<n} z^l K[l] = C~^T (I - z A_bar)^-1 B_bar = C~^T (tau I - A)^-1 B / (1 + z),    C~^T = C^T (I - z^n A_bar^n),

where tau = (1 - z) / (1 + z). With the Cauchy sums S_vw = sum_n v_n w_n / (tau - Lambda_n), Woodbury's identity gives
C~^T (tau I - A)^-1 B = S_CB - S_CP S_PB / (1 + S_PP), whose denominator is at least 1 in absolute value.

- The points are z = r exp(-2 pi i k / n) with r^n = 1/4; S4 has r = 1. An FFT gives r^l K[l]. Slow states have their
  poles near the unit circle, and at a distance from it float32 has the digits for their gradients. (Ours.)
- The parameter is C, and C~ is computed from it, by log2 n products of [N, N] matrices for each channel of a batch.
  S4's code learns C~, which belongs to one length and one dt. C serves any length, and the recurrence.
- Near a pole tau - Lambda cancels: imaginary parts are sums of two floats. Powers are kept as A_bar^j - I, which
  for slow states has the digits that A_bar^j rounds away.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.fft import next_fast_len

from diffussm_jax.ssm.discretize import _exact_product
from diffussm_jax.ssm.hippo import dplr_legs
from diffussm_jax.ssm.params import init_s4d, to_complex

_R_TO_THE_N = 0.25
_BLOCK = 2**20  # elements of an array [D, N/2, frequencies] of a block


class DPLRParams(NamedTuple):
    """D independent SSMs with A = diag(Lambda) - P P*, one per channel.

    Attributes:
      Lambda: [D, N/2] complex64, with negative real part.
      B: [D, N/2] complex64.
      C: [D, N/2] complex64.
      dt: [D] float32, positive.
      D: [D] float32, the skip from input to output.
      P: [D, N/2] complex64.
    """

    Lambda: jax.Array
    B: jax.Array
    C: jax.Array
    dt: jax.Array
    D: jax.Array
    P: jax.Array


def init_s4(
    key: jax.Array, width: int, state_size: int = 64, *, dt_min: float = 1e-3, dt_max: float = 1e-1
) -> dict[str, jax.Array]:
    """Initialises the real parameters of `width` S4 channels at HiPPO-LegS (S4, arXiv 2111.00396, theorem 1).

    Returns:
      float32: those of `init_s4d` with "legs", and P [D, N/2, 2], real and imaginary part.

    Raises:
      ValueError: the state size is odd or below 2.
    """
    real = init_s4d(key, width, state_size, initialization="legs", dt_min=dt_min, dt_max=dt_max)
    P = dplr_legs(state_size)[1][state_size // 2 :]
    return real | {"P": jnp.tile(jnp.asarray(np.stack([P.real, P.imag], -1), jnp.float32), (width, 1, 1))}


def to_dplr(real: dict[str, jax.Array]) -> DPLRParams:
    """Converts the real parameters of `init_s4` to `DPLRParams`."""
    return DPLRParams(*to_complex(real), P=jax.lax.complex(real["P"][..., 0], real["P"][..., 1]))


def dplr_kernel(params: DPLRParams, length: int) -> jax.Array:
    """The first `length` taps of the SSM's convolution kernel, without the skip D (S4, appendix C).

    The sums over states take blocks of frequencies, and the backward pass computes a block again.

    Args:
      length: L, at least 1.

    Returns:
      K [D, L] float32.

    Raises:
      ValueError: the length is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    m, k = _num_points(length)
    n = m << k
    num_blocks = math.ceil((n // 2 + 1) * params.Lambda.size / _BLOCK)
    scaled = _Scaled.of(params)
    C = jax.checkpoint(_truncated, static_argnums=(2, 3))(scaled, params.C, m, k)
    spectrum = jax.lax.map(jax.checkpoint(_spectrum(scaled, C)), _nodes(n, num_blocks))  # [blocks, D, frequencies]
    spectrum = jnp.moveaxis(spectrum, 0, 1).reshape(params.dt.size, -1)[:, : n // 2 + 1]
    growth = _R_TO_THE_N ** (-np.arange(length) / n)
    return jnp.fft.irfft(spectrum, n)[:, :length] * growth.astype(np.float32)


def dplr_step(params: DPLRParams, state: jax.Array, u_t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Advances the SSM by one position, with O(N) operations for each channel.

    Args:
      state: [B, D, N/2] complex64: zeros (`initial_state`), or from the previous step.
      u_t: [B, D].

    Returns:
      The new state, and y_t [B, D] in the dtype of `u_t`.
    """
    u_t32 = u_t.astype(jnp.float32)
    state = state + _change(_Scaled.of(params), state, u_t32[..., None].astype(jnp.complex64))
    return state, (2 * jnp.sum(params.C * state, -1).real + params.D * u_t32).astype(u_t.dtype)


class _Scaled(NamedTuple):
    """dt/2 Lambda, the rounding error of its imaginary part, sqrt(dt/2) P and dt B, [D, N/2]."""

    Lambda: jax.Array
    im_low: jax.Array
    P: jax.Array
    B: jax.Array

    @classmethod
    def of(cls, p: DPLRParams) -> "_Scaled":
        half_dt = p.dt[:, None] / 2
        im, im_low = _two_float_product(half_dt, p.Lambda.imag)
        Lambda = jax.lax.complex(half_dt * p.Lambda.real, im)
        return cls(Lambda, im_low, jnp.sqrt(half_dt).astype(p.P.dtype) * p.P, (2 * half_dt).astype(p.B.dtype) * p.B)


@jax.custom_jvp
def _two_float_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a * b and its rounding error, which has no gradient."""
    return _exact_product(a, b)


@_two_float_product.defjvp
def _two_float_product_jvp(primals, tangents):
    product, low = _two_float_product(*primals)
    return (product, low), (primals[0] * tangents[1] + primals[1] * tangents[0], jnp.zeros_like(low))


def _change(p: _Scaled, x: jax.Array, u: jax.Array) -> jax.Array:
    """(A_bar - I) x + B_bar u for states x [.., D, N/2] and inputs u [.., D, 1].

    With S = (I - diag(Lambda))^-1 and g = 1 + P* S P, nothing cancels in

        A_bar - I = 2 (Lambda S - S P P* S / g),    B_bar = S B - S P P* S B / g.
    """

    def read(x):  # P* x over both halves of the pairs, [.., 1]
        return 2 * jnp.sum((p.P.conj() * x).real, -1, keepdims=True).astype(jnp.complex64)

    S = 1 / (1 - p.Lambda)
    S_x, S_Bu, S_P = S * x, S * p.B * u, S * p.P
    return 2 * p.Lambda * S_x + S_Bu - S_P * (read(2 * S_x + S_Bu) / (1 + read(S_P)))


def _num_points(length: int) -> tuple[int, int]:
    """m <= 16 and k such that n = m 2**k is at least `length` and a product of small primes."""
    k = max(0, (length - 1).bit_length() - 4)
    return next_fast_len(-(-length >> k), real=True), k


def _truncated(p: _Scaled, C: jax.Array, m: int, k: int) -> jax.Array:
    """C~ = (I - r^n A_bar^n)^T C [D, N/2] for n = m 2**k.

    In real coordinates (Re x, Im x). Powers are held as E_j = A_bar^j - I, so E_2j = 2 E_j + E_j^2.
    """
    half = p.Lambda.shape[1]
    unit = jnp.concatenate([jnp.eye(half, dtype=jnp.complex64), 1j * jnp.eye(half, dtype=jnp.complex64)])
    columns = _change(p, unit[:, None], jnp.zeros((1, 1), jnp.complex64))  # [N, D, N/2]
    E = jnp.concatenate([columns.real, columns.imag], -1).transpose(1, 2, 0)

    def product(a, b):
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    E = jax.lax.fori_loop(0, k, lambda _, E: 2 * E + product(E, E), E)
    row = jnp.concatenate([C.real, -C.imag], -1)[:, None]
    change = jnp.zeros_like(row)  # C^T (A_bar^j - I)
    change = jax.lax.fori_loop(0, m, lambda _, change: change + product(row + change, E), change)
    row = (1 - _R_TO_THE_N) * row - _R_TO_THE_N * change
    return jax.lax.complex(row[:, 0, :half], -row[:, 0, half:])


def _nodes(n: int, num_blocks: int) -> tuple[np.ndarray, ...]:
    """Re tau, Im tau, the rounding error of the latter, and 1 / (1 + z), of n/2 + 1 points or more in blocks."""
    size = -(-(n // 2 + 1) // num_blocks)
    log_z = (np.log(_R_TO_THE_N) - 2j * np.pi * np.arange(num_blocks * size).reshape(num_blocks, size)) / n
    tau = np.tanh(-log_z / 2)
    tau_im = tau.imag.astype(np.float32)
    tau_low = (tau.imag - tau_im).astype(np.float32)
    return tau.real.astype(np.float32), tau_im, tau_low, (1 / (1 + np.exp(log_z))).astype(np.complex64)


def _spectrum(p: _Scaled, C: jax.Array) -> Callable[[tuple[np.ndarray, ...]], jax.Array]:
    """Some `_nodes` -> sum_l z^l K[l] at them, [D, frequencies] complex64.

    The Cauchy sums over conjugate pairs are matrix products, because the terms of a pair, with Lambda = -a + i t, have
    a denominator w that is the same for all v:

        v / (tau + a - i t) + conj(v) / (tau + a + i t) = 2 (a Re v - t Im v + tau Re v) / w.
    """
    a, t, t_low = -p.Lambda.real, p.Lambda.imag, p.im_low
    v = jnp.stack([C * p.B, C * p.P, p.P.conj() * p.B, p.P.conj() * p.P], 1)
    weights = jnp.concatenate([a[:, None] * v.real - t[:, None] * v.imag, v.real], 1)  # [D, 8, N/2]

    def spectrum(nodes):
        tau_re, tau_im, tau_low, by_1_plus_z = nodes
        re = tau_re + a[..., None]
        minus, plus = (tau_im - t[..., None]) + (tau_low - t_low[..., None]), tau_im + t[..., None]
        w_re, w_im = re * re - minus * plus, 2 * re * tau_im
        scale = 1 / (w_re * w_re + w_im * w_im)
        by_w = w_re * scale, -w_im * scale
        products = (jnp.einsum("dvn,dnf->dvf", weights, x, precision=jax.lax.Precision.HIGHEST) for x in by_w)
        sums = jax.lax.complex(*products)
        CB, CP, PB, PP = (2 * (sums[:, :4] + jax.lax.complex(tau_re, tau_im) * sums[:, 4:])).swapaxes(0, 1)
        return by_1_plus_z * (CB - CP * PB / (1 + PP))

    return spectrum
