"""The S4 and LSSL mixers against the dense float64 recurrence, in values and gradients, and inside a model."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_dense
import pytest
from mixer_problems import directions_of, outputs, value_and_gradients
from tiny import tiny_config

from diffussm_jax.config import choose
from diffussm_jax.experiment import build_experiment
from diffussm_jax.models.mixers import LSSL, S4, num_outputs
from diffussm_jax.ssm import multiply_adds, to_dplr, to_lssl
from diffussm_jax.ssm.hippo import legs

B, D = 2, 5


def mixer_and_input(model, length, dtype=jnp.float32):
    u = jnp.asarray(oracles.normal(0, B, length, D), dtype)
    return jax.jit(model.init)(jax.random.key(1), u)["params"], u


def dense(model, real):
    """The dense system of a direction, and what turns its gradients into those of the real parameters."""
    if isinstance(model, S4):
        pairs = oracles_dense.pairs_of(real, jax.jit(to_dplr)(real))
        return oracles_dense.from_pairs(pairs), lambda gradients: oracles_dense.to_pairs(gradients, pairs)
    A, dt = legs(model.state_size)[0], np.asarray(jax.jit(to_lssl)(real).dt, np.float64)
    system = {name: np.asarray(real[name], np.float64) for name in "BCD"}
    system |= {"A": np.broadcast_to(A, (D, *A.shape)), "dt": dt}
    return system, lambda gradients: {n: gradients[n] for n in "BCD"} | {"log_dt": gradients["dt"] * dt}


def oracle(model, params, u):
    """[B, L, R, D]."""
    options = {"alpha": getattr(model, "alpha", 0.5)}
    return np.stack(
        [
            oracles_dense.recurrence(dense(model, params[name])[0], u, reverse=name == "backward", **options)
            for name in directions_of(model)
        ],
        2,
    )


@pytest.mark.parametrize(
    ("model", "length", "num_phases"),
    [
        (S4(state_size=4), 7, 1),
        (S4(state_size=64), 64, 2),
        (S4(state_size=16, bidirectional=False), 100, 4),
        (LSSL(state_size=4, bidirectional=False), 7, 7),
        (LSSL(state_size=64), 64, 2),
        (LSSL(state_size=16, alpha=1.0), 100, 1),
    ],
    ids=lambda x: f"{type(x).__name__}-{x.state_size}" if hasattr(x, "state_size") else None,
)
def test_values_and_gradients(model, length, num_phases):
    params, u = mixer_and_input(model, length)
    dy = oracles.normal(2, B, length, num_outputs(model), D)
    y, gradients, du = value_and_gradients(model, num_phases, params, u, jnp.asarray(dy))
    np.testing.assert_allclose(outputs(model, params, u), y.reshape(B, length, -1), rtol=1e-5, atol=1e-5)
    assert sorted(params) == sorted(directions_of(model))
    assert oracles.relative_error(y, oracle(model, params, u)) <= 2e-6
    expected_du = 0
    for i, name in enumerate(directions_of(model)):
        options = {"alpha": getattr(model, "alpha", 0.5), "reverse": name == "backward"}
        system, of_real = dense(model, params[name])
        expected, du_of_direction = oracles_dense.recurrence_gradients(system, u, dy[:, :, i], **options)
        expected_du = expected_du + du_of_direction
        expected = of_real(expected)
        assert sorted(expected) == sorted(params[name])
        for parameter, d_expected in expected.items():
            # For S4 the gradient of dt is a sum that nearly cancels (`tests/ssm/test_dplr.py`).
            bound = 1e-4 if parameter == "log_dt" and isinstance(model, S4) else 1e-5
            assert oracles.relative_error(gradients[name][parameter], d_expected) <= bound, (name, parameter)
    assert oracles.relative_error(du, expected_du) <= 1e-5


@pytest.mark.parametrize("model", [S4(state_size=16), LSSL()], ids=["s4", "lssl"])
def test_bfloat16_is_float32_inside(model):
    params, u = mixer_and_input(model, 60, jnp.bfloat16)
    y = outputs(model, params, u)
    assert y.dtype == jnp.bfloat16 and {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact = oracle(model, params, np.asarray(u, np.float64)).reshape(y.shape)
    assert oracles.relative_error(np.asarray(y, np.float32), exact) <= 3e-3


@pytest.mark.parametrize("model", [S4(state_size=16), LSSL()], ids=["s4", "lssl"])
def test_parameters_serve_other_lengths(model):
    params, _ = mixer_and_input(model, 16)
    u = oracles.normal(3, B, 45, D)
    expected = oracle(model, params, u).reshape(B, 45, 2 * D)
    assert oracles.relative_error(outputs(model, params, jnp.asarray(u)), expected) <= 2e-6


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="state_size must be even, got 5"):
        S4(state_size=5).check()
    with pytest.raises(ValueError, match="state_size must be from 1 to 64, got 128"):
        LSSL(state_size=128).check()
    with pytest.raises(ValueError, match="alpha must be from 0.5 to 1, got 0.2"):
        LSSL(alpha=0.2).check()


@pytest.mark.parametrize("mixer", [S4, LSSL])
def test_costs_are_those_of_the_fft(mixer):
    assert mixer(platform="tpu").costs(64, 3, "float32") == ("fft", 3 * multiply_adds("fft", "tpu", 64, 4, 2))
    one = mixer(platform="gpu", bidirectional=False)
    assert one.costs(64, 3, "bfloat16", 8) == ("fft", 3 * multiply_adds("fft", "gpu", 64, 4, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s4", pytest.param("lssl", marks=pytest.mark.slow)])
def test_a_model_trains(name):
    config = tiny_config()
    choose(config, "model.mixer.name", name)
    config.model.mixer.state_size, config.optimizer.learning_rate = 4, 1e-2
    experiment = build_experiment(config)
    task, batches = experiment.task, experiment.train_loader.iterate(0)
    state = task.create_state()
    before = jax.device_get(state.params["blocks"]["ssm"])
    state, metrics = task.train_step(state, next(batches))
    assert np.isfinite(metrics["loss"])
    for _ in range(2):  # the gate starts at zero, and passes gradients from the second step
        state, metrics = task.train_step(state, next(batches))
    after = jax.device_get(state.params["blocks"]["ssm"])
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(b).all() and (a != b).any()
