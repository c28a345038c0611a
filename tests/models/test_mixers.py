"""The S4D mixer, along the sequence and over a grid: values and gradients are the float64 recurrence's."""

import functools
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from diffussm_jax.models.mixers import S4D
from diffussm_jax.ssm import from_phases, to_phases

B, H, W, D, M = 2, 3, 5, 4, 5
NAMES = {
    ("raster", True): ["forward", "backward"],
    ("raster", False): ["forward"],
    ("2d", True): ["forward", "backward", "column_forward", "column_backward"],
    ("2d", False): ["forward", "column_forward"],
}
CASES = pytest.mark.parametrize("scan,bidirectional", list(NAMES), ids=["both", "forward", "2d", "2d-forward"])
BY_COLUMNS = [h * W + w for w in range(W) for h in range(H)]  # which position of the rows' order comes next


def mixer_and_input(scan, bidirectional, dtype=jnp.float32, **options):
    model = S4D(state_size=8, scan=scan, bidirectional=bidirectional, **options)
    u = jnp.asarray(oracles.normal(0, B, H * W, D), dtype)
    params = jax.jit(lambda key: model.init(key, u, (H, W)))(jax.random.key(1))["params"]
    return model, params, u


def apply(model, params, u):
    """[B, L, D] to [B, L, R, D], in phases."""
    return from_phases(model.apply({"params": params}, to_phases(u, M), (H, W), method="phases"))


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
def test_values_and_gradients(scan, bidirectional, method):
    model, params, u = mixer_and_input(scan, bidirectional, method=method)
    assert sorted(params) == sorted(NAMES[scan, bidirectional])
    dy = oracles.normal(2, B, H * W, 1 + bidirectional, D)

    @jax.jit
    def run(params, u, dy):
        y, vjp = jax.vjp(functools.partial(apply, model), params, u)
        return y, model.apply({"params": params}, u, (H, W)), *vjp(dy)

    y, of_sequence, found, du = run(params, u, jnp.asarray(dy))
    assert oracles.relative_error(y, oracle(params, np.asarray(u))) <= 1e-5
    assert of_sequence.shape == (B, H * W, (1 + bidirectional) * D)  # the layer without phases: forward, then backward
    np.testing.assert_allclose(of_sequence, y.reshape(of_sequence.shape), rtol=1e-5, atol=1e-5 * np.abs(y).max())
    gradients, expected_du = oracle_gradients(params, np.asarray(u), dy)
    assert oracles.relative_error(du, expected_du) <= 1e-5
    for name, real in gradients.items():
        for parameter, expected in real.items():
            assert oracles.relative_error(found[name][parameter], expected) <= 1e-5, (name, parameter)


def test_scans_by_column_start_with_parameters_of_their_own_and_change_no_others():
    params = mixer_and_input("2d", True)[1]
    without = mixer_and_input("raster", True)[1]
    for name in without:
        jax.tree.map(np.testing.assert_array_equal, params[name], without[name])
    assert len({params[name]["C"].tobytes() for name in params}) == 4


def test_bfloat16_stays_near_float32():
    model, params, u = mixer_and_input("2d", True, jnp.bfloat16)
    y = jax.jit(functools.partial(apply, model))(params, u)
    assert y.dtype == jnp.bfloat16
    # Both terms of the sum are rounded, and the sum.
    assert oracles.relative_error(np.asarray(y, np.float32), oracle(params, np.asarray(u, np.float64))) <= 5e-3


def test_what_a_scan_by_columns_needs_is_named():
    u = jnp.zeros((B, H * W, D))
    with pytest.raises(ValueError, match=r'scan = "2d" needs grid = \(H, W\)'):
        S4D(scan="2d").init(jax.random.key(0), u)
    with pytest.raises(ValueError, match="scan.*'3d'; choose one of raster, 2d"):
        S4D(scan="3d").init(jax.random.key(0), u)


def example_of_the_docstring():
    lines = S4D.__doc__.split("Example, in a model of your own:")[1].split("Attributes:")[0]
    names = {"S4D": S4D, "nn": nn}
    exec(textwrap.dedent(lines), names)
    return names["Classifier"]()


def test_the_docstrings_model_tells_rising_from_falling_sequences():
    model = example_of_the_docstring()
    rng = np.random.default_rng(0)
    slopes = rng.uniform(0.5, 2, 64) * np.where(np.arange(64) % 2, 1, -1)
    signs = [1, 1, 1, -1, -1, -1]  # the norm takes away what all channels share
    u = slopes[:, None, None] * np.linspace(-1, 1, 20)[:, None] * signs + rng.normal(0, 0.3, (64, 20, 6))
    u, labels = jnp.float32(u), jnp.asarray(slopes > 0, jnp.int32)
    optimizer = optax.adam(1e-2)

    def loss_fn(params):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, u), labels).mean()

    @jax.jit
    def train():
        params = model.init(jax.random.key(0), u)

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=60)
        return model.apply(params, u), losses

    logits, losses = train()
    assert logits.shape == (64, 10)
    assert losses[0] > 2 and losses[-1] < 0.1 and (logits.argmax(-1) == labels).all()
