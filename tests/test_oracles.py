"""The oracles of the SSM tests against a matrix exponential, the trapezoid rule, a convolution and differences."""

import numpy as np
import oracles
import pytest
import scipy.linalg

L, B, D, HALF_N = 9, 2, 3, 4


def _real_parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "log_neg_re": rng.normal(size=(D, HALF_N)),
        "im": 3 * rng.normal(size=(D, HALF_N)),
        "B": rng.normal(size=(D, HALF_N, 2)),
        "C": rng.normal(size=(D, HALF_N, 2)),
        "log_dt": rng.uniform(-3, 0, D),
        "D": rng.normal(size=D),
    }


def _input_and_cotangent(seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, L, D)), rng.normal(size=(B, L, D))


def test_zoh_solves_the_system_for_a_constant_input():
    p = oracles.complex_parameters(_real_parameters())
    Lambda_bar, B_bar = oracles.discretize(p["Lambda"], p["B"], p["dt"], "zoh")
    for d in range(D):
        for n in range(HALF_N):
            # x' = Lambda x + B u and u' = 0, as one linear system.
            system = np.array([[p["Lambda"][d, n], p["B"][d, n]], [0, 0]])
            expected = scipy.linalg.expm(system * p["dt"][d])[0]
            np.testing.assert_allclose([Lambda_bar[d, n], B_bar[d, n]], expected, rtol=1e-12)


def test_bilinear_is_the_trapezoid_rule():
    p = oracles.complex_parameters(_real_parameters())
    Lambda_bar, B_bar = oracles.discretize(p["Lambda"], p["B"], p["dt"], "bilinear")
    before, u = 0.3 - 0.7j, 1.9
    after = Lambda_bar * before + B_bar * u
    slope = p["Lambda"] * (before + after) / 2 + p["B"] * u
    np.testing.assert_allclose((after - before) / p["dt"][:, None], slope, rtol=1e-12)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_recurrence_is_the_convolution_with_the_kernel(discretization):
    real, (u, _) = _real_parameters(), _input_and_cotangent()
    p = oracles.complex_parameters(real)
    K = oracles.kernel(p["Lambda"], p["B"], p["C"], p["dt"], L, discretization)
    forward, backward = np.zeros_like(u), np.zeros_like(u)
    for i in range(L):
        for j in range(L):
            if j <= i:
                forward[:, i] += K[:, i - j] * u[:, j]
            if j >= i:
                backward[:, i] += K[:, j - i] * u[:, j]
    skip = p["D"] * u
    actual = oracles.recurrence(real, u, discretization=discretization)
    np.testing.assert_allclose(actual, forward + skip, rtol=1e-10, atol=1e-12)
    actual = oracles.recurrence(real, u, discretization=discretization, reverse=True)
    np.testing.assert_allclose(actual, backward + skip, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_gradients_agree_with_central_differences(discretization, reverse):
    real, (u, dy) = _real_parameters(), _input_and_cotangent()
    d_real, du = oracles.recurrence_gradients(real, u, dy, discretization=discretization, reverse=reverse)
    assert sorted(d_real) == sorted(oracles.REAL_PARAMETERS)

    def differences(name, x):
        gradient = np.empty_like(x)
        for index in np.ndindex(x.shape):
            values = []
            for sign in (1, -1):
                moved = x.copy()
                moved[index] += sign * 1e-5
                inputs = (real, moved) if name == "u" else (real | {name: moved}, u)
                y = oracles.recurrence(*inputs, discretization=discretization, reverse=reverse)
                values.append(np.sum(dy * y))
            gradient[index] = (values[0] - values[1]) / 2e-5
        return gradient

    assert oracles.relative_error(du, differences("u", u)) < 1e-8
    for name, value in real.items():
        assert oracles.relative_error(d_real[name], differences(name, value)) < 1e-8, name
