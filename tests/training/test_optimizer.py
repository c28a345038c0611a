"""The optimizer's schedule, clipping and weight decay, and the parameters' average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.training.optimizer import adamw, ema_update, learning_rate_schedule


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
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.05)
    assert not updates["dense"]["bias"].any() and not updates["ssm"]["forward"]["C"].any()


def test_clipping_bounds_what_adam_sees():
    params = {"w": {"kernel": jnp.zeros(2)}}
    optimizer = adamw(lambda step: 1.0, max_grad_norm=0.5)
    _, state = optimizer.update({"w": {"kernel": jnp.array([30.0, 40.0])}}, optimizer.init(params), params)
    np.testing.assert_allclose(state[1][0].mu["w"]["kernel"], 0.1 * np.array([0.3, 0.4]), rtol=1e-5)


def test_ema_is_the_average_by_its_definition():
    decay, params, ema = 0.9, 1.0, 0.0
    for step in range(3):
        ema = ema_update(ema, params, jnp.int32(step), decay=decay, has_warmup=False)
    np.testing.assert_allclose(ema, 1 - 0.9**3, rtol=1e-6)
    np.testing.assert_allclose(ema_update(0.0, 1.0, jnp.int32(0), decay=0.9, has_warmup=True), 0.9, rtol=1e-6)
    np.testing.assert_allclose(ema_update(0.0, 1.0, jnp.int32(10**6), decay=0.9, has_warmup=True), 0.1, rtol=1e-6)
