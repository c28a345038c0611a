"""The S6 mixer is the float64 layer, in values and in the gradients of u and of every parameter, in both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_selective
import pytest
from mixer_problems import directions_of, outputs, product_multiply_adds, value_and_gradients

from diffussm_jax.models.mixers import S6, num_outputs

B, D = 2, 6


def mixer_and_input(length, dtype=jnp.float32, **options):
    model = S6(state_size=4, dt_rank=3, **options)
    u = jnp.asarray(oracles.normal(0, B, length, D), dtype)
    return model, jax.jit(model.init)(jax.random.key(1), u)["params"], u


@pytest.mark.parametrize(
    ("length", "num_phases", "options"),
    [(1, 1, {}), (7, 1, {"bidirectional": False}), (64, 4, {"discretization": "zoh"}), (100, 2, {})],
)
def test_values_and_gradients(length, num_phases, options):
    model, params, u = mixer_and_input(length, **options)
    dy = oracles.normal(2, B, length, num_outputs(model), D)

    y, gradients, du = value_and_gradients(model, num_phases, params, u, jnp.asarray(dy))
    np.testing.assert_allclose(outputs(model, params, u), y.reshape(B, length, -1), rtol=1e-5, atol=1e-6)
    of_scan, expected_du = {"discretization": options.get("discretization", "euler")}, 0
    assert sorted(params) == sorted(directions_of(model))
    for i, name in enumerate(directions_of(model)):
        of_direction = of_scan | {"reverse": name == "backward"}
        expected = oracles_selective.layer(params[name], u, **of_direction)
        assert oracles.relative_error(y[:, :, i], expected) <= 2e-6, name
        d_params, du_of_direction = oracles_selective.layer_gradients(params[name], u, dy[:, :, i], **of_direction)
        expected_du = expected_du + du_of_direction
        for parameter, d_expected in d_params.items():
            found = gradients[name][parameter]
            if length == 1 and parameter == "A_log":  # the only state does not decay before it is read
                assert not np.any(found)
            else:
                assert oracles.relative_error(found, d_expected) <= 1e-5, (name, parameter)
    assert oracles.relative_error(du, expected_du) <= 1e-5


def test_directions_start_apart_and_with_mambas_rank():
    model = S6(state_size=4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4, 40)))["params"]
    assert params["forward"]["dt_proj"].shape == (40, 3)  # 40 / 16, rounded up
    assert not np.array_equal(params["forward"]["x_proj"], params["backward"]["x_proj"])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_bfloat16_stays_near_float32():
    model, params, u = mixer_and_input(64, jnp.bfloat16)
    y = outputs(model, params, u)
    assert y.dtype == jnp.bfloat16
    expected = [
        oracles_selective.layer(params[name], np.asarray(u, np.float32), reverse=name == "backward")
        for name in directions_of(model)
    ]
    assert oracles.relative_error(np.asarray(y, np.float32), np.concatenate(expected, -1)) <= 3e-3


@pytest.mark.parametrize("bidirectional", [True, False])
def test_costs_are_the_products_of_the_trace_and_the_recurrence(bidirectional):
    model, length, width = S6(state_size=4, bidirectional=bidirectional), 32, 48
    method, multiply_adds = model.costs(length, width, "float32")
    recurrence = num_outputs(model) * 3 * length * width * 4
    assert method == "scan" and multiply_adds == product_multiply_adds(model, length, width) + recurrence


def test_wrong_options_are_named():
    for options, message in (
        ({"state_size": 0}, "state_size must be a whole number of at least 1, got 0"),
        ({"discretization": "bilinear"}, "'bilinear'; choose one of euler, zoh"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            S6(**options).check()
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(S6(**options).init, jax.random.key(0)), jnp.zeros((1, 4, 8)))
