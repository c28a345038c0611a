"""Every target can be made, and gives x_0 and noise back, for every process and at both ends of time.

| quantity, float32 | float64 NumPy against | tolerance, relative to the row's largest x_0 or noise |
|---|---|---|
| `make` | p x_0 + q noise | 1e-6 |
| `predict` of a float32 output | the solution of two linear equations | 2e-6 times the condition below |
| `predict` of `make` | x_0 and noise | 2e-6 times the condition below |
| alpha x_0 + sigma noise of any output | x_t | 1e-6, relative to the larger term |

| | Noise | X0 | V | Velocity |
|---|---|---|---|---|
| condition of x_0 | 1 / alpha | 1 | 1 / (alpha^2 + sigma^2) | 1 / (alpha + sigma); of GVP 1 |
| condition of the noise | 1 | 1 / sigma | the same | the same |
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import (
    GVP,
    X0,
    Noise,
    RectifiedFlow,
    V,
    Velocity,
    cosine_schedule,
    linear_schedule,
    q_sample,
)

RTOL = 1e-6
PREDICT_RTOL = 2e-6

TARGETS = {"noise": Noise(), "x_0": X0(), "v": V(), "velocity": Velocity()}
CONDITIONS = {
    "noise": lambda alpha, sigma: (1 / alpha, np.ones_like(alpha)),
    "x_0": lambda alpha, sigma: (np.ones_like(alpha), 1 / sigma),
    "v": lambda alpha, sigma: (1 / (alpha**2 + sigma**2),) * 2,
    "velocity": lambda alpha, sigma: (1 / (alpha + sigma),) * 2,
    "velocity of GVP": lambda alpha, sigma: (np.ones_like(alpha),) * 2,
}
STEPS = np.array([0, 1, 2, 499, 998, 999], np.int32)
FRACTIONS = np.array([1e-5, 1e-3, 0.1, 0.5, 0.999, 1.0], np.float32)
PROCESSES = {
    "linear": (linear_schedule(), STEPS, oracle.ddpm_step(oracle.linear_betas(1000), STEPS, STEPS - 1)),
    "cosine": (cosine_schedule(), STEPS, oracle.ddpm_step(oracle.cosine_betas(1000), STEPS, STEPS - 1)),
    "flow": (RectifiedFlow(), FRACTIONS, oracle.flow_step(FRACTIONS.astype(np.float64), 0.0)),
    "gvp": (GVP(), FRACTIONS, oracle.gvp_step(FRACTIONS.astype(np.float64), 0.0)),
}
CASES = [(p, t) for p in PROCESSES for t in TARGETS]
X_0, NOISE, OTHER = np.random.default_rng(0).normal(size=(3, 6, 4, 4, 3)).astype(np.float32)


@functools.cache
def results():
    """Of each process: x_t; of each target: the value made, the prediction from it, and that from some output."""

    @jax.jit
    def run(x_0, noise, other):
        values = {}
        for process_name, (process, t, _) in PROCESSES.items():
            t = jnp.asarray(t)
            values[process_name, "x_t"] = x_t = q_sample(process, x_0, t, noise)
            for name, target in TARGETS.items():
                made = target.make(process, x_0, noise, t)
                predictions = (target.predict(process, output, x_t, t) for output in (made, other))
                values[process_name, name] = made, *predictions
        return values

    with jax.numpy_dtype_promotion("strict"):
        return jax.device_get(run(X_0, NOISE, OTHER))


def largest(*arrays):
    return np.max([np.abs(a).max((1, 2, 3)) for a in arrays], 0)


def assert_rows_close(actual, expected, tolerance):
    """Each row within its tolerance [B]."""
    assert actual.dtype == np.float32
    error = largest(np.asarray(actual, np.float64) - expected)
    assert (error <= tolerance).all(), f"errors {error}, allowed {tolerance}"


@pytest.mark.parametrize("process_name, name", CASES)
def test_make_and_predict(process_name, name):
    """`predict` is checked for what was made, and for an output that has nothing to do with x_0 and noise."""
    step = PROCESSES[process_name][2]
    x_t, (made, predicted, of_other) = results()[process_name, "x_t"], results()[process_name, name]
    rows = step.alpha > 1e-15 if TARGETS[name].divides_by_alpha else np.full(6, True)
    if (process_name, name) == ("gvp", "velocity"):
        name = "velocity of GVP"
    assert_rows_close(made, oracle.target(name, step, X_0, NOISE), np.pi / 2 * RTOL * largest(X_0, NOISE))
    step = oracle.Step(*(np.broadcast_to(values, 6)[rows] for values in step))
    x_t, x_0, noise, other = x_t[rows], X_0[rows], NOISE[rows], OTHER[rows]
    conditions = CONDITIONS[name](step.alpha, step.sigma)
    exact = oracle.x_0_and_noise(name, step, other, x_t)
    for actual, expected, condition in zip(predicted, (x_0, noise), conditions, strict=True):
        assert_rows_close(actual[rows], expected, PREDICT_RTOL * condition * largest(x_0, noise))
    for actual, expected, condition in zip(of_other, exact, conditions, strict=True):
        assert_rows_close(actual[rows], expected, PREDICT_RTOL * condition * largest(x_t, other))
    x_0, noise = (oracle.column(a, x_t) * p[rows] for a, p in zip((step.alpha, step.sigma), of_other, strict=True))
    assert_rows_close(x_t, x_0 + noise, RTOL * largest(x_0, noise))


def test_what_is_predicted_directly_loses_no_digits():
    """The reason why `predict` returns both."""
    for process_name in PROCESSES:
        np.testing.assert_array_equal(results()[process_name, "noise"][1][1], NOISE)
        np.testing.assert_array_equal(results()[process_name, "x_0"][1][0], X_0)


def test_only_targets_that_say_so_divide_by_alpha():
    """At the last time of rectified flow and GVP, where alpha is 0."""
    for process_name in ("flow", "gvp"):
        for name, target in TARGETS.items():
            _, (x_0, noise), _ = results()[process_name, name]
            assert np.isfinite(noise).all()
            assert np.isfinite(x_0[-1]).all() != target.divides_by_alpha


@pytest.mark.parametrize("name, step", [("flow", oracle.flow_step), ("gvp", oracle.gvp_step)])
def test_velocity_is_the_time_derivative_in_continuous_time(name, step):
    t, h = FRACTIONS.astype(np.float64), 1e-5
    after, before = (oracle.q_sample(step(t + sign * h, 0.0), X_0, NOISE) for sign in (1, -1))
    made = results()[name, "velocity"][0]
    np.testing.assert_allclose(made, (after - before) / (2 * h), atol=RTOL * np.abs(made).max())


def test_v_is_the_derivative_by_the_angle():
    """x = cos(phi) x_0 + sin(phi) noise has dx/dphi = v (arXiv 2202.00512, appendix D)."""
    step = PROCESSES["linear"][2]
    phi = np.arctan2(step.sigma, step.alpha)[:, None, None, None]

    def x(phi):
        return np.cos(phi) * X_0 + np.sin(phi) * NOISE

    derivative = (x(phi + 1e-5) - x(phi - 1e-5)) / 2e-5
    np.testing.assert_allclose(results()["linear", "v"][0], derivative, atol=RTOL * np.abs(derivative).max())
