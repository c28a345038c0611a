"""The convolution mixer is the float64 sum over taps, in values and gradients, and keeps the variance of its input."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from mixer_problems import directions_of, outputs, value_and_gradients

from diffussm_jax.models.mixers import Conv, num_outputs
from diffussm_jax.ssm import multiply_adds

B, D = 2, 5


def mixer_and_input(length, dtype=jnp.float32, **options):
    model = Conv(**options)
    u = jnp.asarray(oracles.normal(0, B, length, D), dtype)
    return model, jax.jit(model.init)(jax.random.key(1), u)["params"], u


def oracle(p, u, *, reverse):
    """y_l = sum_j kernel_j u_{l-j} + D u_l."""
    kernel, skip, u = (np.asarray(x, np.float64) for x in (p["kernel"], p["D"], u))
    if reverse:
        return oracle(p, u[:, ::-1], reverse=False)[:, ::-1]
    y = skip * u
    for j in range(min(kernel.shape[1], u.shape[1])):
        y[:, j:] += kernel[:, j] * u[:, : u.shape[1] - j]
    return y


def oracle_gradients(p, u, dy, *, reverse):
    """The gradients of sum(dy * y) by kernel, D and u: du_l = sum_j kernel_j dy_{l+j} + D dy_l."""
    u, dy = np.asarray(u, np.float64), np.asarray(dy, np.float64)
    du = oracle(p, dy, reverse=not reverse)
    earlier, later = (dy, u) if reverse else (u, dy)
    d_kernel = np.zeros(p["kernel"].shape)
    for j in range(min(d_kernel.shape[1], u.shape[1])):
        d_kernel[:, j] = np.einsum("bld,bld->d", later[:, j:], earlier[:, : u.shape[1] - j])
    return {"kernel": d_kernel, "D": np.einsum("bld,bld->d", u, dy)}, du


@pytest.mark.parametrize(
    ("length", "num_phases", "options"),
    [
        (1, 1, {}),
        (7, 1, {"kernel_size": 9}),
        (64, 4, {"bidirectional": False}),
        (100, 2, {"kernel_size": 20}),
        (100, 1, {}),
    ],
)
def test_values_and_gradients(length, num_phases, options):
    model, params, u = mixer_and_input(length, **options)
    dy = oracles.normal(2, B, length, num_outputs(model), D)
    y, gradients, du = value_and_gradients(model, num_phases, params, u, jnp.asarray(dy))
    np.testing.assert_allclose(outputs(model, params, u), y.reshape(B, length, -1), rtol=1e-5, atol=1e-5)
    assert sorted(params) == sorted(directions_of(model))
    expected_du = 0
    for i, name in enumerate(directions_of(model)):
        p, reverse = params[name], name == "backward"
        assert p["kernel"].shape == (D, options.get("kernel_size") or length)
        assert oracles.relative_error(y[:, :, i], oracle(p, u, reverse=reverse)) <= 1e-6, name
        expected, du_of_direction = oracle_gradients(p, u, dy[:, :, i], reverse=reverse)
        expected_du = expected_du + du_of_direction
        for parameter, d_expected in expected.items():
            assert oracles.relative_error(gradients[name][parameter], d_expected) <= 1e-5, (name, parameter)
    assert oracles.relative_error(du, expected_du) <= 1e-5


@pytest.mark.parametrize("kernel_size", [0, 8])
def test_outputs_start_with_the_variance_of_the_input(kernel_size):
    model, u = Conv(kernel_size=kernel_size), jnp.asarray(oracles.normal(0, 4, 256, 512))
    y = outputs(model, jax.jit(model.init)(jax.random.key(1), u)["params"], u)
    assert np.var(y[..., :512]) == pytest.approx(1, rel=0.1)
    assert np.var(y[..., 512:]) == pytest.approx(1, rel=0.1)


def test_bfloat16_stays_near_float32():
    model, params, u = mixer_and_input(100, jnp.bfloat16)
    y = outputs(model, params, u)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(u, np.float32)
    expected = np.concatenate(
        [oracle(params[name], exact, reverse=name == "backward") for name in directions_of(model)], -1
    )
    assert oracles.relative_error(np.asarray(y, np.float32), expected) <= 3e-3


def test_a_kernel_of_all_positions_serves_no_other_length():
    model, params, _ = mixer_and_input(16)
    with pytest.raises(ValueError, match="has 16 taps, and kernel_size = 0 on a sequence of 20 positions needs 20"):
        outputs(model, params, jnp.zeros((B, 20, D)))
    model, params, _ = mixer_and_input(16, kernel_size=8)
    assert jax.eval_shape(lambda: outputs(model, params, jnp.zeros((B, 20, D)))).shape == (B, 20, 2 * D)
    with pytest.raises(ValueError, match="kernel_size must be a whole number of at least 0, got -1"):
        Conv(kernel_size=-1).check()


def test_costs_are_those_of_the_fft():
    assert Conv(platform="tpu").costs(64, 3, "float32") == ("fft", 3 * multiply_adds("fft", "tpu", 64, 4, 2))
