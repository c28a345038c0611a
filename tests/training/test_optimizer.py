"""The optimizer's schedule, clipping and weight decay, and the parameters' average."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffussm_jax.training.ema import EMA
from diffussm_jax.training.optimizer import adamw, learning_rate_schedule, scale_by_learning_rate
from diffussm_jax.training.step import apply_gradients, create_state


def test_learning_rate_warms_up_and_decays():
    rate = learning_rate_schedule(2.0, warmup_steps=4, decay="cosine", num_steps=12)
    np.testing.assert_allclose([rate(s) for s in (0, 2, 4, 8, 12)], [0, 1, 2, 1, 0], atol=1e-6)
    constant = learning_rate_schedule(2.0, warmup_steps=0, decay="constant", num_steps=12)
    np.testing.assert_allclose([constant(s) for s in (0, 1, 11)], 2)


def test_wrong_schedules_are_named():
    with pytest.raises(ValueError, match="unknown decay 'linear'"):
        learning_rate_schedule(1.0, warmup_steps=0, decay="linear", num_steps=9)
    with pytest.raises(ValueError, match="warmup_steps = 9 must be fewer than num_steps = 9"):
        learning_rate_schedule(1.0, warmup_steps=9, decay="cosine", num_steps=9)


def test_weight_decay_spares_vectors_and_ssms():
    params = {"dense": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "ssm": {"forward": {"C": jnp.ones(3)}}}
    optimizer = adamw(lambda step: 0.1, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, step=0)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.05)
    assert not updates["dense"]["bias"].any() and not updates["ssm"]["forward"]["C"].any()


def test_clipping_bounds_what_adam_sees():
    params = {"w": {"kernel": jnp.zeros(2)}}
    optimizer = adamw(lambda step: 1.0, max_grad_norm=0.5)
    gradient = {"w": {"kernel": jnp.array([30.0, 40.0])}}
    _, state = optimizer.update(gradient, optimizer.init(params), params, step=0)
    np.testing.assert_allclose(state[1][0].mu["w"]["kernel"], 0.1 * np.array([0.3, 0.4]), rtol=1e-5)


def test_the_learning_rate_is_that_of_the_step_however_many_updates_were_made():
    schedule = learning_rate_schedule(2.0, warmup_steps=4, decay="cosine", num_steps=12)
    optimizer = scale_by_learning_rate(schedule)
    state = optimizer.init({"w": jnp.ones(2)})
    for step in (0, 2, 3, 9, 12):  # the others were skipped
        updates, state = optimizer.update({"w": jnp.float32([1, -2])}, state, step=jnp.int32(step))
        np.testing.assert_allclose(updates["w"], -float(schedule(step)) * np.array([1, -2]), rtol=1e-6)
        assert int(state.count) == step + 1
    counting = optax.scale_by_schedule(lambda count: -schedule(count))
    assert jax.tree.structure(state) == jax.tree.structure(counting.init({}))  # as old checkpoints hold it


def test_a_cosine_reaches_its_end_after_skipped_steps_too():
    schedule = learning_rate_schedule(0.1, warmup_steps=0, decay="cosine", num_steps=6)
    optimizer = adamw(schedule)
    made = {"optimizer": optimizer, "ema": EMA(decay=0.5), "max_skipped_steps": 3}
    update = jax.jit(lambda state, grads, loss: apply_gradients(state, grads, {"loss": loss}, **made))
    state, grads = create_state({"w": {"kernel": jnp.ones(2)}}, optimizer, made["ema"]), {"w": {"kernel": jnp.ones(2)}}
    for step in range(7):
        before = state.params["w"]["kernel"]
        state, metrics = update(state, grads, jnp.float32(jnp.nan if step in (1, 2) else 1.0))
        moved = before - state.params["w"]["kernel"]
        expected = 0 if step in (1, 2) else float(schedule(step))  # Adam's steps are 1 for gradients that stay the same
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-7)
        assert float(metrics["skipped"]) == (step in (1, 2))
    assert float(schedule(6)) == 0 == np.abs(moved).max()


def averages(ema, params, step=0, power=()):
    return types.SimpleNamespace(step=jnp.int32(step), ema_params=ema, power_ema=dict(power)), params


def test_ema_is_the_average_by_its_definition():
    ema = 0.0
    for step in range(3):
        ema = EMA(decay=0.9).update(*averages(ema, 1.0, step))["ema_params"]
    np.testing.assert_allclose(ema, 1 - 0.9**3, rtol=1e-6)
    warm = EMA(decay=0.9, has_warmup=True)
    np.testing.assert_allclose(warm.update(*averages(0.0, 1.0))["ema_params"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(warm.update(*averages(0.0, 1.0, 10**6))["ema_params"], 0.1, rtol=1e-6)
    assert EMA(decay=0.9, power_sigmas=("0.05",)).init(1.0).keys() == {"ema_params", "power_ema"}
