"""The SSM as a convolution by FFT, both directions from one transform of the input.

With a transform of at least 2L - 1 points the circular convolution is the linear one, and running backwards in time is
conjugating the kernel's spectrum, so

    y_f = irfft(rfft(u) rfft(K_f)),    y_b = irfft(rfft(u) conj(rfft(K_b))).

The gradients are convolutions too. They are written out, because JAX transposes a real FFT into a complex one of twice
the work.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.fft import next_fast_len

from diffussm_jax.ssm.kernel import taps
from diffussm_jax.ssm.params import SSMParams


def _directed(spectra: jax.Array, reverse: tuple[bool, ...]) -> jax.Array:
    """[R, ..] spectra, conjugated where the direction is backward."""
    sign = np.where(np.asarray(reverse), -1, 1).astype(np.float32)
    return jax.lax.complex(spectra.real, spectra.imag * sign.reshape(-1, *(1,) * (spectra.ndim - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(u: jax.Array, kernels: jax.Array, reverse: tuple[bool, ...]) -> jax.Array:
    """u [B, D, L] with R kernels [R, D, L]: [R, B, D, L]."""
    return _convolve_forward(u, kernels, reverse)[0]


def _convolve_forward(u, kernels, reverse):
    L = u.shape[-1]
    n = next_fast_len(2 * L - 1, real=True)
    kernel_spectra = _directed(jnp.fft.rfft(kernels, n), reverse)
    y = jnp.fft.irfft(jnp.fft.rfft(u, n) * kernel_spectra[:, None], n)[..., :L]
    return y, (u, kernels)


def _convolve_backward(reverse, residuals, dy):
    u, kernels = residuals
    L = u.shape[-1]
    n = next_fast_len(2 * L - 1, real=True)
    dy_spectra, kernel_spectra = jnp.fft.rfft(dy, n), _directed(jnp.fft.rfft(kernels, n), reverse)
    du = jnp.fft.irfft(jnp.sum(kernel_spectra.conj()[:, None] * dy_spectra, 0), n)
    dkernel_spectra = _directed(jnp.sum(jnp.fft.rfft(u, n).conj() * dy_spectra, 1), reverse)
    return du[..., :L], jnp.fft.irfft(dkernel_spectra, n)[..., :L]


_convolve.defvjp(_convolve_forward, _convolve_backward)


def fft(
    directions: Sequence[SSMParams],
    u: jax.Array,
    *,
    discretization: str,
    reverse: tuple[bool, ...],
) -> jax.Array:
    """R SSMs over the same u [B, L, D] float32, each forward or backward: y [B, L, R * D] float32."""
    B, L, D = u.shape
    kernels = jnp.stack([taps(p, L, discretization) for p in directions])
    y = _convolve(u.swapaxes(1, 2), kernels, reverse)
    return y.transpose(1, 3, 0, 2).reshape(B, L, len(directions) * D)
