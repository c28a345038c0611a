"""The SSM as a convolution by FFT, with one transform of the input for both directions.

With at least 2L - 1 points the circular convolution equals the linear one. Running backward in time conjugates the
spectrum of the kernel:

    y_f = irfft(rfft(u) rfft(K_f)),    y_b = irfft(rfft(u) conj(rfft(K_b))).

The gradients are convolutions too. They are written by hand, because JAX transposes a real FFT into a complex FFT of
twice the work.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.fft import next_fast_len

from diffussm_jax.ssm.kernel import taps
from diffussm_jax.ssm.params import SSMParams
from diffussm_jax.ssm.phases import through_one_phase


def _conjugate_backward(spectra: jax.Array, reverse: tuple[bool, ...]) -> jax.Array:
    """Conjugates the spectra [R, ..] of backward directions."""
    sign = np.where(np.asarray(reverse), -1, 1).astype(np.float32)
    return jax.lax.complex(spectra.real, spectra.imag * sign.reshape(-1, *(1,) * (spectra.ndim - 1)))


def transform_length(length: int, platform: str) -> int:
    """The number of points of the FFT: at least 2L - 1, and a product of small primes.

    CPUs avoid powers of two. At that stride rows compete for the same cache lines, and the inverse transform and the
    transpose take up to seven times as long (L = 16,384, D = 384).
    """
    if platform != "cpu":
        return next_fast_len(2 * length - 1, real=True)
    sixteenths = next_fast_len(-(-(2 * length - 1) // 16))
    while sixteenths % 32 == 0:  # n floats are a multiple of 2 KiB
        sixteenths = next_fast_len(sixteenths + 1)
    return 16 * sixteenths


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(u: jax.Array, kernels: jax.Array, n: int, reverse: tuple[bool, ...]) -> jax.Array:
    """Convolves u [B, D, L] with R kernels [R, D, L] by FFTs of n points: [R, B, D, L]."""
    return _convolve_forward(u, kernels, n, reverse)[0]


def _convolve_forward(u, kernels, n, reverse):
    L = u.shape[-1]
    kernel_spectra = _conjugate_backward(jnp.fft.rfft(kernels, n), reverse)
    y = jnp.fft.irfft(jnp.fft.rfft(u, n) * kernel_spectra[:, None], n)[..., :L]
    return y, (u, kernels)


def _convolve_backward(n, reverse, residuals, dy):
    u, kernels = residuals
    L = u.shape[-1]
    dy_spectra, kernel_spectra = jnp.fft.rfft(dy, n), _conjugate_backward(jnp.fft.rfft(kernels, n), reverse)
    du = jnp.fft.irfft(jnp.sum(kernel_spectra.conj()[:, None] * dy_spectra, 0), n)
    dkernel_spectra = _conjugate_backward(jnp.sum(jnp.fft.rfft(u, n).conj() * dy_spectra, 1), reverse)
    return du[..., :L], jnp.fft.irfft(dkernel_spectra, n)[..., :L]


convolve.defvjp(_convolve_forward, _convolve_backward)


def convolve_phases(kernels: jax.Array, u: jax.Array, *, reverse: tuple[bool, ...], platform: str) -> jax.Array:
    """Convolves a sequence in phases, u [M, D, B, J] float32, with R kernels [R, D, L]: [M, R, D, B, J] float32."""
    n = transform_length(kernels.shape[-1], platform)

    def apply(u):  # [1, D, B, L]
        return convolve(u[0].swapaxes(0, 1), kernels, n, reverse).swapaxes(1, 2)[None]

    return through_one_phase(apply, u)


def fft(
    directions: Sequence[SSMParams],
    u: jax.Array,
    *,
    discretization: str,
    reverse: tuple[bool, ...],
    platform: str,
) -> jax.Array:
    """Runs R SSMs over the same u [B, L, D] float32, each forward or backward: y [B, L, R * D] float32."""
    B, L, D = u.shape
    kernels = jnp.stack([taps(p, L, discretization) for p in directions])
    y = convolve(u.swapaxes(1, 2), kernels, transform_length(L, platform), reverse)
    return y.transpose(1, 3, 0, 2).reshape(B, L, len(directions) * D)
