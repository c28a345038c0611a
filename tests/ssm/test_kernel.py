"""The two-level kernel against the float64 Vandermonde product, at lengths that are and are not squares."""

import functools

import jax
import numpy as np
import oracles
import pytest
from ssm_problems import WELL_COMPILED

from diffussm_jax.ssm import INITIALIZATIONS, diagonal_kernel, init_s4d, to_complex

TOLERANCE = 1e-6  # relative error of the whole kernel
D, N = 6, 64
jit = functools.partial(jax.jit, compiler_options=WELL_COMPILED)


@functools.cache
def _params(initialization):
    return jax.jit(lambda key: to_complex(init_s4d(key, D, N, initialization=initialization)))(jax.random.key(0))


@functools.cache
def _jitted_kernel(length, discretization):
    return jit(lambda p: diagonal_kernel(p.Lambda, p.B, p.C, p.dt, length, discretization))


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize(
    ("discretization", "length"),
    [("zoh", 1), ("zoh", 64), ("zoh", 127), ("zoh", 4099), ("bilinear", 127), ("bilinear", 4099)],
)
def test_kernel_is_the_vandermonde_product(initialization, discretization, length):
    p = _params(initialization)
    K = _jitted_kernel(length, discretization)(p)
    assert K.shape == (D, length) and K.dtype == np.float32
    expected = oracles.kernel(p.Lambda, p.B, p.C, p.dt, length, discretization)
    assert oracles.relative_error(K, expected) < TOLERANCE


def test_default_discretization_is_zoh():
    p = _params("lin")
    K = jit(diagonal_kernel, static_argnums=4)(p.Lambda, p.B, p.C, p.dt, 5)
    assert oracles.relative_error(K, oracles.kernel(p.Lambda, p.B, p.C, p.dt, 5, "zoh")) < TOLERANCE


@pytest.mark.parametrize("length", [0, -3])
def test_length_must_be_positive(length):
    p = _params("lin")
    with pytest.raises(ValueError, match=f"length must be at least 1, got {length}"):
        diagonal_kernel(p.Lambda, p.B, p.C, p.dt, length)


def test_unknown_discretization():
    p = _params("lin")
    with pytest.raises(ValueError, match="unknown discretization 'euler'; choose one of zoh, bilinear"):
        diagonal_kernel(p.Lambda, p.B, p.C, p.dt, 4, "euler")
