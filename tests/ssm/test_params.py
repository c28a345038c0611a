"""The initial parameters of S4D: shapes, distributions, and the complex numbers that they stand for."""

import functools

import jax
import numpy as np
import oracles
import pytest

from diffussm_jax.ssm import INITIALIZATIONS, init_s4d, s4d_inv, s4d_legs, s4d_lin, s4d_random, to_complex

D, N = 2000, 16
SCHEMES = {"legs": s4d_legs, "lin": s4d_lin, "inv": s4d_inv}


@functools.cache
def _initial(seed, initialization, **step_range):
    return init_s4d(jax.random.key(seed), D, N, initialization=initialization, **step_range)


def test_every_scheme_is_tested():
    assert sorted([*SCHEMES, "random"]) == sorted(INITIALIZATIONS)


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_parameters_are_real_float32_of_the_documented_shapes(initialization):
    real = _initial(0, initialization)
    half = (D, N // 2)
    expected = {"log_neg_re": half, "im": half, "B": (*half, 2), "C": (*half, 2), "log_dt": (D,), "D": (D,)}
    assert {name: value.shape for name, value in real.items()} == expected
    assert {value.dtype for value in real.values()} == {np.dtype("float32")}


@pytest.mark.parametrize("initialization", SCHEMES)
def test_lambda_and_b_are_the_schemes_in_every_channel(initialization):
    params = to_complex(_initial(0, initialization))
    Lambda, B = SCHEMES[initialization](N)
    np.testing.assert_allclose(params.Lambda, np.tile(Lambda, (D, 1)), rtol=3e-7)
    np.testing.assert_allclose(params.B, np.tile(B, (D, 1)), rtol=3e-7)


def test_a_random_lambda_is_uniform_and_drawn_for_each_channel():
    real = {name: np.asarray(value, np.float64) for name, value in _initial(0, "random").items()}
    quantiles = np.array([0.01, 0.25, 0.5, 0.75, 0.99])
    uniform = np.exp(real["log_neg_re"]), real["im"] / (np.pi * N / 2)
    for fraction in uniform:
        assert 0 < fraction.min() and fraction.max() <= 1 and len(np.unique(fraction)) > 0.99 * fraction.size
        np.testing.assert_allclose(np.quantile(fraction, quantiles), quantiles, atol=0.01)
        np.testing.assert_allclose(fraction.mean(0), 0.5, atol=0.05)  # of each state over channels
    assert abs(np.corrcoef(*(fraction.ravel() for fraction in uniform))[0, 1]) < 0.02
    assert (real["B"] == [1, 0]).all()
    other = _initial(0, "lin")
    for name in ("C", "log_dt", "D"):
        np.testing.assert_array_equal(real[name], other[name])
    assert np.any(_initial(1, "random")["im"] != real["im"])
    Lambda, B = s4d_random(N)
    assert (Lambda == s4d_random(N)[0]).all() and Lambda.shape == B.shape == (N // 2,)
    assert (Lambda.real < 0).all() and (Lambda.real >= -1).all() and (B == 1).all()


def test_random_parameters_have_their_distributions():
    real = {name: np.asarray(value) for name, value in _initial(0, "lin").items()}
    C, skip = real["C"], real["D"]
    np.testing.assert_allclose(C.var((0, 1)), 0.5, rtol=0.05)  # so that E|C|^2 = 1
    np.testing.assert_allclose(C.mean((0, 1)), 0, atol=0.02)
    np.testing.assert_allclose(skip.var(), 1, rtol=0.1)
    # Drawn independently: a key used twice would show as correlation.
    assert abs(np.corrcoef(skip, real["log_dt"])[0, 1]) < 0.1
    assert abs(np.corrcoef(skip, C[:, 0, 0])[0, 1]) < 0.1
    another = _initial(1, "lin")
    for name in ("C", "log_dt", "D"):
        assert np.any(another[name] != real[name]), name


@pytest.mark.parametrize(
    ("dt_min", "dt_max", "given"), [(1e-3, 1e-1, {}), (1e-2, 1.0, {"dt_min": 1e-2, "dt_max": 1.0})]
)
def test_steps_are_log_uniform(dt_min, dt_max, given):
    log_dt = np.asarray(_initial(0, "lin", **given)["log_dt"])
    fraction = (log_dt - np.log(dt_min)) / np.log(dt_max / dt_min)
    assert fraction.min() >= -1e-6 and fraction.max() <= 1 + 1e-6
    quantiles = np.array([0.01, 0.25, 0.5, 0.75, 0.99])
    np.testing.assert_allclose(np.quantile(fraction, quantiles), quantiles, atol=0.04)


def test_to_complex():
    rng = np.random.default_rng(0)
    real = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in _initial(0, "lin").items()}
    expected = oracles.complex_parameters(real)
    params = jax.jit(to_complex)(real)
    assert sorted(params._fields) == sorted(expected)
    for name, value in expected.items():
        actual = getattr(params, name)
        assert actual.dtype == (np.complex64 if np.iscomplexobj(value) else np.float32), name
        assert oracles.relative_error(actual, value) < 2e-7, name


def test_errors():
    with pytest.raises(ValueError, match="unknown initialization 'fourier'; choose one of legs, lin, inv, random"):
        init_s4d(jax.random.key(0), D, N, initialization="fourier")
    with pytest.raises(ValueError, match=r"state_size must be even .* got 7"):
        init_s4d(jax.random.key(0), D, 7)
