"""Classifier-free guidance follows its formula, where it is asked to, at no more evaluations than it needs.

| quantity, float32 | against | tolerance |
|---|---|---|
| guided output | float64 NumPy | 1e-5 of the largest value |
| unguided output | the model itself | exact |
| guided DDIM, 6 steps | the same loop in float64 NumPy | 1e-4 of the largest value |
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import classifier_free, ddim, linear_schedule, respace

RTOL = 1e-5
LOOP_RTOL = 1e-4
NULL = 10
LABELS = np.array([3, 0, 9, 3, 7])
TABLE = np.random.default_rng(0).normal(size=(NULL + 1, 1, 1, 8)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(5, 4, 4, 4)).astype(np.float32)


def numpy_model(x_t, t, y):
    """A learned-range model in float64: 8 channels for 4 of input, each depending on image, time and label."""
    x_t, t, embedding = oracle.float64(x_t, t, TABLE[y])
    t = t[:, None, None, None]
    return np.concatenate([np.sin(x_t), np.cos(x_t)], -1) * (1 + t / 1000) * (1 + embedding) + embedding


def model(x_t, t, y):
    t = t.astype(jnp.float32)[:, None, None, None]
    embedding = jnp.asarray(TABLE)[y]
    return jnp.concatenate([jnp.sin(x_t), jnp.cos(x_t)], -1) * (1 + t / 1000) * (1 + embedding) + embedding


def guided_output(x_t, t, scale, num_guided_channels):
    """Ho & Salimans, equation 6, with their w = scale - 1, on the first channels."""
    cond = numpy_model(x_t, t, LABELS)
    uncond = numpy_model(x_t, t, np.full_like(LABELS, NULL))
    guided = cond.copy()
    first = np.s_[..., :num_guided_channels]
    guided[first] = scale * cond[first] - (scale - 1) * uncond[first]
    return guided


def assert_close(actual, expected, rtol=RTOL):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def evaluate(denoise, time):
    return denoise(jnp.asarray(X), jnp.full(len(X), time, jnp.int32))


def unguided(time):
    return model(jnp.asarray(X), jnp.full(len(X), time, jnp.int32), jnp.asarray(LABELS))


def guide(model, **options):
    return classifier_free(model, jnp.asarray(LABELS), null_label=NULL, **options)


@pytest.mark.parametrize("num_guided_channels, num_guided", [(None, 4), (4, 4), (3, 3), (1, 1)])
@pytest.mark.parametrize("scale", [0, 0.5, 1.5, 4])
def test_formula(scale, num_guided_channels, num_guided):
    output = evaluate(guide(model, scale=scale, num_guided_channels=num_guided_channels), 300)
    assert output.dtype == jnp.float32
    assert_close(output, guided_output(X, np.full(5, 300), scale, num_guided))


def test_scale_0_is_unconditional_but_for_the_variance():
    output = evaluate(guide(model, scale=0), 300)
    uncond = model(jnp.asarray(X), jnp.full(5, 300, jnp.int32), jnp.full(5, NULL, jnp.int32))
    assert_close(output[..., :4], uncond[..., :4])
    np.testing.assert_array_equal(output[..., 4:], unguided(300)[..., 4:])


def counted(rows):
    """The model, adding the batch size of each trace to rows."""

    def counting_model(x_t, t, y):
        rows.append((len(x_t), len(t), len(y)))
        return model(x_t, t, y)

    return counting_model


@pytest.mark.parametrize("scale, batch_size", [(1, 5), (1.0, 5), (1.5, 10), (0, 10)])
def test_the_model_is_evaluated_once_on_one_or_two_batches(scale, batch_size):
    rows = []
    jax.jit(lambda: evaluate(guide(counted(rows), scale=scale), 300))()
    assert rows == [(batch_size,) * 3]


@pytest.mark.parametrize("options", [{}, {"num_guided_channels": 3}, {"interval": (100, 200)}])
def test_scale_1_is_the_conditional_model(options):
    np.testing.assert_array_equal(evaluate(guide(model, scale=1, **options), 150), unguided(150))


@pytest.mark.parametrize(
    "interval, guided_times",
    [
        ((100, 600), {100, 300, 600}),
        ((300, 300), {300}),
        ((0, 999), {0, 99, 100, 300, 600, 601, 999}),
        ((100, math.inf), {100, 300, 600, 601, 999}),
    ],
)
def test_guidance_is_confined_to_its_interval(interval, guided_times):
    """The bounds belong to it, and outside the model runs on one batch only, counted when it runs."""
    rows = []

    def counting_model(x_t, t, y):
        jax.debug.callback(lambda t: rows.append(len(t)), t)
        return model(x_t, t, y)

    denoise = jax.jit(guide(counting_model, scale=3.0, interval=interval))
    for time in [0, 99, 100, 300, 600, 601, 999]:
        rows.clear()
        output = evaluate(denoise, time)
        jax.effects_barrier()
        if time in guided_times:
            assert rows == [10]
            assert_close(output, guided_output(X, np.full(5, time), 3.0, 4))
        else:
            assert rows == [5]
            assert_close(output, numpy_model(X, np.full(5, time), LABELS))


def test_a_sampler_runs_guided_within_an_interval():
    schedule = respace(linear_schedule(1000), 6)
    x_0 = ddim(guide(model, scale=2.0, num_guided_channels=3, interval=(300, 800)), schedule, jnp.asarray(X))
    x = X.astype(np.float64)
    for i in reversed(range(6)):
        t = schedule.timesteps[i]
        scale = 2.0 if 300 <= t <= 800 else 1.0
        output = guided_output(x, np.full(5, t), scale, 3)
        x = oracle.ddim_update(schedule.betas, output, x, i, 0.0)
    assert_close(x_0, x, LOOP_RTOL)


@pytest.mark.parametrize("num_guided_channels", [-1, 0, 5])
def test_guided_channels_must_exist(num_guided_channels):
    denoise = guide(model, scale=2.0, num_guided_channels=num_guided_channels)
    with pytest.raises(ValueError, match=f"from 1 to the 4 channels of x_t, got {num_guided_channels}"):
        evaluate(denoise, 300)


def test_a_negative_scale_is_refused():
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.5"):
        guide(model, scale=-0.5)


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match=r"low <= high, got \(500, 499\)"):
        guide(model, scale=2.0, interval=(500, 499))
