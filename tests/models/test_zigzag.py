"""S4D with scan = "zigzag": the float64 recurrence over positions of which every other row is reversed."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffussm_jax.models.mixers import S4D
from diffussm_jax.ssm import from_phases, to_phases

B, H, W, D = 2, 3, 6, 4
# Neighbours in this order are neighbours in the image.
ORDER = [h * W + (W - 1 - w if h % 2 else w) for h in range(H) for w in range(W)]


def mixer_and_input(**options):
    model = S4D(state_size=8, scan="zigzag", **options)
    u = jnp.asarray(oracles.normal(0, B, H * W, D))
    return model, jax.jit(lambda key: model.init(key, u, (H, W)))(jax.random.key(1))["params"], u


def test_the_order_steps_from_neighbour_to_neighbour():
    rows, columns = np.divmod(ORDER, W)
    assert (np.abs(np.diff(rows)) + np.abs(np.diff(columns)) == 1).all() and sorted(ORDER) == list(range(H * W))


@pytest.mark.parametrize(
    ("num_phases", "bidirectional", "method"),
    [(1, True, "fft"), (3, True, "chunked"), (2, False, "fft"), (6, True, "fft")],
)
def test_values_and_gradients(num_phases, bidirectional, method):
    model, params, u = mixer_and_input(bidirectional=bidirectional, method=method)
    names = ["forward", "backward"][: 1 + bidirectional]
    assert sorted(params) == sorted(names)
    dy = oracles.normal(2, B, H * W, len(names), D)

    def apply(params, u):
        return from_phases(model.apply({"params": params}, to_phases(u, num_phases), (H, W), method="phases"))

    @jax.jit
    def run(params, u, dy):
        y, pull_back = jax.vjp(apply, params, u)
        return y, model.apply({"params": params}, u, (H, W)), *pull_back(dy)

    y, of_sequence, gradients, du = run(params, u, jnp.asarray(dy))
    np.testing.assert_allclose(of_sequence, y.reshape(of_sequence.shape), rtol=1e-5, atol=1e-5 * np.abs(y).max())
    in_order, expected_du = np.asarray(u)[:, ORDER], np.zeros(u.shape)
    for i, name in enumerate(names):
        options, expected_y = {"reverse": name == "backward"}, np.zeros(u.shape)
        expected_y[:, ORDER] = oracles.recurrence(params[name], in_order, **options)
        assert oracles.relative_error(y[:, :, i], expected_y) <= 1e-5
        expected, du_in_order = oracles.recurrence_gradients(params[name], in_order, dy[:, ORDER, i], **options)
        expected_du[:, ORDER] += du_in_order
        for parameter, d_expected in expected.items():
            assert oracles.relative_error(gradients[name][parameter], d_expected) <= 1e-5, (name, parameter)
    assert oracles.relative_error(du, expected_du) <= 1e-5


def test_parameters_are_those_of_the_raster_scan():
    model, params, u = mixer_and_input()
    raster = jax.jit(S4D(state_size=8).init)(jax.random.key(1), u)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, raster)
    options = ("float32", 4)
    assert model.costs(H * W, D, *options) == S4D(state_size=8).costs(H * W, D, *options)


def test_what_it_needs_is_named():
    model, params, u = mixer_and_input()
    with pytest.raises(ValueError, match=r'scan = "zigzag" needs grid = \(H, W\)'):
        model.init(jax.random.key(0), u)
    with pytest.raises(ValueError, match='scan = "zigzag" needs a width W that is a multiple of M = 9, got 6'):
        model.apply({"params": params}, to_phases(u, 9), (H, W), method="phases")
