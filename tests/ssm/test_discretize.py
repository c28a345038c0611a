"""Discretisation against float64: one step, tiny steps, and the powers of up to 65536 steps, with their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from ssm_problems import WELL_COMPILED

from diffussm_jax.ssm import DISCRETIZATIONS, INITIALIZATIONS, bilinear, zoh
from diffussm_jax.ssm.discretize import discretize, split_transition, transition_powers

# Largest error of one entry: Lambda_bar absolute (its magnitude is at most 1), B_bar relative.
LAMBDA_BAR_TOLERANCE = 5e-7
B_BAR_TOLERANCE = 5e-7

# Largest absolute error of Lambda_bar**l, at l = 0 and for each unit of l: whole turns are dropped before rounding, but
# the rest of the bilinear angle is a short arctangent in float32.
POWER_TOLERANCE = {"zoh": (1e-6, 0), "bilinear": (1e-6, 2e-9)}
# Relative error of whole gradients, at exponents up to 4095.
POWER_GRADIENT_TOLERANCE = {"zoh": 1e-6, "bilinear": 2e-6}

FUNCTIONS = {"zoh": zoh, "bilinear": bilinear}
# Digits are counted here, so of the code that users run.
jit = functools.partial(jax.jit, compiler_options=WELL_COMPILED)
jitted_powers = jit(transition_powers, static_argnames="discretization")


def _initial_system(initialization, dt):
    """Lambda, B [D, N/2] complex64, the same in every channel, for dt [D] float32."""
    return *(np.tile(x.astype(np.complex64), (len(dt), 1)) for x in INITIALIZATIONS[initialization](64)), dt


def _slow_decay_system():
    """Lambda, dt of states that turn as fast as any of LegS (N = 64), but decay so slowly that 65536 steps are seen."""
    rng = np.random.default_rng(0)
    dt = np.geomspace(1e-3, 1e-1, 20).astype(np.float32)
    imag_part = np.concatenate([np.zeros((20, 1)), rng.uniform(0, 1303, (20, 31))], 1)
    return (-1e-6 / dt[:, None] + 1j * imag_part).astype(np.complex64), dt


def _exact_powers(Lambda, dt, exponents, discretization):
    if discretization == "zoh":
        return np.exp(Lambda.astype(np.complex128)[..., None] * dt.astype(np.float64)[:, None, None] * exponents)
    return oracles.discretize(Lambda, Lambda, dt, discretization)[0][..., None] ** exponents


def test_every_discretization_is_tested():
    assert sorted(FUNCTIONS) == sorted(DISCRETIZATIONS)


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize("discretization", FUNCTIONS)
def test_one_step(discretization, initialization):
    system = _initial_system(initialization, np.geomspace(1e-3, 1e-1, 9, dtype=np.float32))
    Lambda_bar, B_bar = jit(FUNCTIONS[discretization])(*system)
    assert Lambda_bar.dtype == B_bar.dtype == np.complex64
    expected_Lambda_bar, expected_B_bar = oracles.discretize(*system, discretization)
    np.testing.assert_allclose(Lambda_bar, expected_Lambda_bar, rtol=0, atol=LAMBDA_BAR_TOLERANCE)
    np.testing.assert_allclose(B_bar, expected_B_bar, rtol=B_BAR_TOLERANCE)


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize("discretization", FUNCTIONS)
def test_tiny_steps_keep_their_digits(discretization, initialization):
    """exp(z) - 1 in float32 would be off by 17 percent at dt = 1e-7, and by everything at 1e-8."""
    system = _initial_system(initialization, np.array([1e-8, 1e-7, 1e-6, 1e-5, 1e-4], np.float32))
    _, B_bar = jit(FUNCTIONS[discretization])(*system)
    np.testing.assert_allclose(B_bar, oracles.discretize(*system, discretization)[1], rtol=B_BAR_TOLERANCE)


@pytest.mark.parametrize("discretization", FUNCTIONS)
@pytest.mark.parametrize("exponent", [0, 1, 2, 100, 1023, 4095, 65535, 65536])
def test_transition_powers(discretization, exponent):
    Lambda, dt = _slow_decay_system()
    powers = jitted_powers(Lambda, dt, jnp.array([exponent]), discretization=discretization)
    assert powers.shape == (*Lambda.shape, 1) and powers.dtype == np.complex64
    expected = _exact_powers(Lambda, dt, np.array([exponent]), discretization)
    base, slope = POWER_TOLERANCE[discretization]
    assert np.abs(np.asarray(powers) - expected).max() < base + slope * exponent


@pytest.mark.parametrize("num_steps", [1, 64, 128])
@pytest.mark.parametrize("discretization", FUNCTIONS)
def test_split_transition_keeps_more_digits_than_one_float(discretization, num_steps):
    Lambda, dt = _slow_decay_system()
    root, rest = jit(split_transition, static_argnums=(2, 3))(Lambda, dt, discretization, num_steps)
    assert root.dtype == rest.dtype == np.complex64
    assert np.abs(rest).max() < 0.01
    total = np.asarray(root, np.complex128) + np.asarray(rest, np.complex128)
    expected = _exact_powers(Lambda, dt, np.array([num_steps]), discretization)[..., 0]
    # An angle of the bilinear transform is itself rounded, in each step.
    assert np.abs(total - expected).max() < 2e-9 * (num_steps if discretization == "bilinear" else 1)
    assert np.abs(expected.astype(np.complex64) - expected).max() > 2e-8


@pytest.mark.parametrize("discretization", FUNCTIONS)
def test_gradient_of_transition_powers(discretization):
    Lambda, dt = _slow_decay_system()
    exponents = np.array([0, 1, 7, 100, 4095])
    rng = np.random.default_rng(1)
    real, imag = rng.normal(size=(2, *Lambda.shape, len(exponents))).astype(np.float32)

    @jit
    @jax.grad
    def gradient(p):
        powers = transition_powers(jax.lax.complex(p["re"], p["im"]), p["dt"], jnp.asarray(exponents), discretization)
        return jnp.sum(real * powers.real + imag * powers.imag)

    actual = gradient({"re": Lambda.real, "im": Lambda.imag, "dt": dt})

    # d log(Lambda_bar) = d(dt Lambda) for zoh, d(dt Lambda) / (1 - (dt Lambda / 2)**2) for bilinear.
    z = dt.astype(np.float64)[:, None] * Lambda.astype(np.complex128)
    by_z = 1 if discretization == "zoh" else 1 / (1 - (z / 2) ** 2)
    powers = _exact_powers(Lambda, dt, exponents, discretization)
    d_z = (by_z * np.sum(exponents * powers * (real - 1j * imag), -1)).conj()
    d_Lambda = d_z * dt[:, None]
    expected = {
        "re": d_Lambda.real,
        "im": d_Lambda.imag,
        "dt": np.sum(Lambda.astype(np.complex128).conj() * d_z, -1).real,
    }
    for name, value in expected.items():
        assert oracles.relative_error(actual[name], value) < POWER_GRADIENT_TOLERANCE[discretization], name


def test_unknown_discretization():
    Lambda, dt = _slow_decay_system()
    message = "unknown discretization 'euler'; choose one of zoh, bilinear"
    with pytest.raises(ValueError, match=message):
        discretize(Lambda, Lambda, dt, "euler")
    with pytest.raises(ValueError, match=message):
        transition_powers(Lambda, dt, jnp.arange(3), "euler")
