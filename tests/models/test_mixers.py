"""The S4D mixer, along the sequence and over a grid: values and gradients are the float64 recurrence's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffussm_jax.models.mixers import S4D
from diffussm_jax.ssm import from_phases, to_phases

B, H, W, D, M = 2, 3, 5, 4, 5
NAMES = {
    (None, True): ["forward", "backward"],
    (None, False): ["forward"],
    ((H, W), True): ["forward", "backward", "column_forward", "column_backward"],
    ((H, W), False): ["forward", "column_forward"],
}
CASES = pytest.mark.parametrize("grid,bidirectional", list(NAMES), ids=["both", "forward", "grid", "grid-forward"])
BY_COLUMNS = [h * W + w for w in range(W) for h in range(H)]  # which position of the rows' order comes next


def mixer_and_input(grid, bidirectional, dtype=jnp.float32, **options):
    model = S4D(state_size=8, grid=grid, bidirectional=bidirectional, **options)
    u = jnp.asarray(oracles.normal(0, B, H * W, D), dtype)
    params = model.init(jax.random.key(1), to_phases(u, M))["params"]
    return model, params, u


def apply(model, params, u):
    """[B, L, D] to [B, L, R, D]."""
    return from_phases(model.apply({"params": params}, to_phases(u, M)))


def in_order(name):
    """The positions as the SSM of this name meets them, and whether it runs backwards."""
    return BY_COLUMNS if "column" in name else list(range(H * W)), "backward" in name


def oracle(params, u):
    """[B, L, R, D]: what each SSM gives, put back in its place, added up for each of R directions."""
    y = np.zeros((B, H * W, 1 + ("backward" in params), D))
    for name, real in params.items():
        order, is_backward = in_order(name)
        y[:, order, int(is_backward)] += oracles.recurrence(real, u[:, order], reverse=is_backward)
    return y


def oracle_gradients(params, u, dy):
    gradients, du = {}, np.zeros(u.shape)
    for name, real in params.items():
        order, is_backward = in_order(name)
        gradients[name], du_in_order = oracles.recurrence_gradients(
            real, u[:, order], dy[:, order, int(is_backward)], reverse=is_backward
        )
        du[:, order] += du_in_order
    return gradients, du


@CASES
@pytest.mark.parametrize("method", ["fft", "chunked"])
def test_values_and_gradients(grid, bidirectional, method):
    model, params, u = mixer_and_input(grid, bidirectional, method=method)
    assert sorted(params) == sorted(NAMES[grid, bidirectional])
    y, vjp = jax.vjp(functools.partial(apply, model), params, u)
    assert oracles.relative_error(y, oracle(params, np.asarray(u))) <= 1e-5
    dy = oracles.normal(2, *y.shape)
    found, du = vjp(jnp.asarray(dy))
    gradients, expected_du = oracle_gradients(params, np.asarray(u), dy)
    assert oracles.relative_error(du, expected_du) <= 1e-5
    for name, real in gradients.items():
        for parameter, expected in real.items():
            assert oracles.relative_error(found[name][parameter], expected) <= 1e-5, (name, parameter)


def test_scans_by_column_start_with_parameters_of_their_own_and_change_no_others():
    params = mixer_and_input((H, W), True)[1]
    without = mixer_and_input(None, True)[1]
    for name in without:
        jax.tree.map(np.testing.assert_array_equal, params[name], without[name])
    assert len({params[name]["C"].tobytes() for name in params}) == 4


def test_bfloat16_stays_near_float32():
    model, params, u = mixer_and_input((H, W), True, jnp.bfloat16)
    y = apply(model, params, u)
    assert y.dtype == jnp.bfloat16
    # Both terms of the sum are rounded, and the sum.
    assert oracles.relative_error(np.asarray(y, np.float32), oracle(params, np.asarray(u, np.float64))) <= 5e-3
