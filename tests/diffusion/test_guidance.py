"""Guidance follows its formula, where it is asked to, at no more evaluations than it needs; clipping comes after it.

| quantity, float32 | against | tolerance |
|---|---|---|
| guided x_0 and noise | float64 NumPy | 1e-5 of the largest value |
| alpha x_0 + sigma noise | x_t | 1e-5 of the largest value |
| what is not guided | the conditional prediction | exact |
| guided DDIM, 6 steps | the same loop in float64 NumPy | 1e-4 of the largest value |
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import (
    DDIM,
    Noise,
    Objective,
    Prediction,
    RectifiedFlow,
    Velocity,
    both,
    clipped,
    guided,
    linear_schedule,
    pair,
    sample,
)

RTOL = 1e-5
LOOP_RTOL = 1e-4
NULL = 10
TABLE = np.random.default_rng(0).normal(size=(NULL + 1, 1, 1, 8)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(5, 4, 4, 4)).astype(np.float32)
# A pytree that guidance must not look into.
CONDITION = {
    "label": np.array([3, 0, 9, 3, 7], np.int32),
    "tokens": {"ids": np.arange(15.0, dtype=np.float32).reshape(5, 3)},
}
NO_CONDITION = {"label": np.full(5, NULL, np.int32), "tokens": {"ids": np.zeros((5, 3), np.float32)}}

PROCESS = linear_schedule(1000)
OBJECTIVE = Objective(PROCESS, Noise())
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def numpy_model(x_t, t, condition):
    """A learned-range model in float64: 8 channels for 4 of input, each depending on image, time and condition."""
    x_t, t, embedding, ids = oracle.float64(x_t, t, TABLE[condition["label"]], condition["tokens"]["ids"])
    t, shift = t[:, None, None, None], ids.sum(1)[:, None, None, None] / 20
    wave = np.concatenate([np.sin(x_t + shift), np.cos(x_t + shift)], -1)
    return wave * (1 + t / 1000) * (1 + embedding) + embedding


def model(x_t, t, condition):
    t = t.astype(jnp.float32)[:, None, None, None]
    embedding = jnp.asarray(TABLE)[condition["label"]]
    shift = condition["tokens"]["ids"].sum(1)[:, None, None, None] / 20
    return (
        jnp.concatenate([jnp.sin(x_t + shift), jnp.cos(x_t + shift)], -1) * (1 + t / 1000) * (1 + embedding) + embedding
    )


def step_of(t, before=-1):
    return oracle.ddpm_step(oracle.linear_betas(1000), t, before)


def numpy_prediction(x_t, time, condition):
    """x_0, noise and variance fraction in float64."""
    noise, raw = np.split(numpy_model(x_t, np.full(5, time), condition), 2, -1)
    return *oracle.x_0_and_noise("noise", step_of(time), noise, x_t), (raw + 1) / 2


def guided_prediction(x_t, time, scale, num_guided_channels):
    """Ho & Salimans, equation 6, with their w = scale - 1, on the first channels of x_0 and noise."""
    cond = numpy_prediction(x_t, time, CONDITION)
    uncond = numpy_prediction(x_t, time, NO_CONDITION)
    first = np.arange(4) < num_guided_channels
    x_0, noise = (np.where(first, scale * c - (scale - 1) * u, c) for c, u in zip(cond[:2], uncond[:2], strict=True))
    return x_0, noise, cond[2]


def assert_close(actual, expected, rtol=RTOL):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def assert_all_close(prediction, expected):
    for actual, values in zip(prediction, expected, strict=True):
        assert_close(actual, values)


def assert_consistent(prediction, time):
    """x_t = alpha x_0 + sigma noise."""
    step = step_of(time)
    x_0, noise = oracle.float64(prediction.x_0, prediction.noise)
    np.testing.assert_allclose(step.alpha * x_0 + step.sigma * noise, X, atol=RTOL * np.abs(noise).max())


def evaluate(denoise, time):
    return denoise(jnp.asarray(X), jnp.full(len(X), time, jnp.int32))


def classifier_free(model=model, **options):
    """The usual composition: one model, called with the condition and with none."""
    predict = OBJECTIVE.predict(model)
    return guided(both(predict, CONDITION, NO_CONDITION), lambda x_t, t: predict(x_t, t, CONDITION), **options)


# One evaluation


SCALES = [0, 0.5, 1.5, 4]


@functools.cache
def predictions_at_300():
    """Of each scale and number of guided channels, and unguided with and without the condition."""

    @jax.jit
    def run():
        values = {
            (scale, channels): evaluate(classifier_free(scale=scale, num_guided_channels=channels), 300)
            for scale in SCALES
            for channels in [None, 4, 3, 1]
        }
        predict = OBJECTIVE.predict(model)
        unguided = [evaluate(lambda x_t, t, c=c: predict(x_t, t, c), 300) for c in (CONDITION, NO_CONDITION)]
        return list(values.values()), unguided

    with jax.numpy_dtype_promotion("strict"):
        values, unguided = jax.device_get(run())
    return dict(zip([(s, c) for s in SCALES for c in [None, 4, 3, 1]], values, strict=True)), *unguided


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("num_guided_channels", [None, 4, 3, 1])
def test_formula(scale, num_guided_channels):
    prediction = predictions_at_300()[0][scale, num_guided_channels]
    assert_all_close(prediction, guided_prediction(X, 300, scale, num_guided_channels or 4))
    assert_consistent(prediction, 300)


def test_scale_0_is_unconditional_but_for_the_variance():
    predictions, cond, uncond = predictions_at_300()
    assert_close(predictions[0, None].x_0, uncond.x_0)
    assert_close(predictions[0, None].noise, uncond.noise)
    assert_close(predictions[0, None].variance_fraction, cond.variance_fraction)
    assert np.abs(cond.variance_fraction - uncond.variance_fraction).max() > 0.1


def test_what_is_not_guided_is_the_conditional_prediction_exactly():
    cond, uncond = (Prediction(*np.random.default_rng(i).normal(size=(3, *X.shape)).astype(np.float32)) for i in (0, 1))

    @quick_jit
    def run(*both):
        denoise = guided(lambda x_t, t: both, lambda x_t, t: both[0], scale=4.0, num_guided_channels=3)
        return evaluate(denoise, 300)

    prediction = run(cond, uncond)
    np.testing.assert_array_equal(prediction.x_0[..., 3:], cond.x_0[..., 3:])
    np.testing.assert_array_equal(prediction.noise[..., 3:], cond.noise[..., 3:])
    np.testing.assert_array_equal(prediction.variance_fraction, cond.variance_fraction)
    assert_close(prediction.x_0[..., :3], (4 * np.float64(cond.x_0) - 3 * np.float64(uncond.x_0))[..., :3])
    assert_close(prediction.noise[..., :3], (4 * np.float64(cond.noise) - 3 * np.float64(uncond.noise))[..., :3])


def counted(rows, function=model):
    """The model, adding the batch sizes of each trace to rows."""

    def counting_model(x_t, t, condition):
        rows.append((len(x_t), len(t), *(len(leaf) for leaf in jax.tree.leaves(condition))))
        return function(x_t, t, condition)

    return counting_model


@pytest.mark.parametrize("scale, batch_size", [(1, 5), (1.0, 5), (1.5, 10), (0, 10)])
def test_the_model_is_evaluated_once_on_one_or_two_batches(scale, batch_size):
    rows = []
    jax.eval_shape(lambda: evaluate(classifier_free(counted(rows), scale=scale), 300))
    assert rows == [(batch_size,) * 4]


@pytest.mark.parametrize("options", [{}, {"num_guided_channels": 3}, {"interval": (100, 200)}])
def test_scale_1_is_the_conditional_denoiser(options):
    def conditional(x_t, t):
        raise AssertionError

    assert guided(pair(conditional, conditional), conditional, scale=1, **options) is conditional


def test_a_condition_may_be_an_array_and_the_variance_not_learned():
    """And nothing but shapes is asked of it: rectified flow with images as conditions."""
    flow = RectifiedFlow()
    predict = Objective(flow, Velocity(), has_learned_variance=False).predict(lambda x_t, t, image: x_t * image)
    image = X[..., :1]

    @quick_jit
    def run(x_t, t):
        denoise = guided(both(predict, image, 0 * image), lambda x_t, t: predict(x_t, t, image), scale=3.0)
        return denoise(x_t, t)

    prediction = run(X, np.full(5, 0.25, np.float32))
    assert prediction.variance_fraction is None
    # Of the velocities x_t image and 0.
    step, velocity = oracle.flow_step(0.25, 0.0), 3.0 * X.astype(np.float64) * image
    assert_all_close(prediction[:2], oracle.x_0_and_noise("velocity", step, velocity, X))


def test_a_null_of_another_structure_is_refused():
    predict = OBJECTIVE.predict(model)
    evaluate_both = both(predict, CONDITION, {"label": NO_CONDITION["label"]})
    with pytest.raises(ValueError, match="tokens|[Dd]ict|structure"):
        evaluate(evaluate_both, 300)


# Guidance by another model


def test_a_pair_of_denoisers_is_two_calls_of_one_batch():
    """Autoguidance (arXiv 2406.02507, equation 3): D_b + scale (D_a - D_b)."""
    rows = []

    def weak(x_t, t, condition):
        return 0.5 * model(x_t, t, condition) + 0.1

    def conditional(model):
        predict = OBJECTIVE.predict(counted(rows, model))
        return lambda x_t, t: predict(x_t, t, CONDITION)

    @quick_jit
    def run():
        a, b = conditional(model), conditional(weak)
        return evaluate(guided(pair(a, b), a, scale=2.5, num_guided_channels=3), 300)

    prediction = run()
    assert rows == [(5,) * 4] * 2
    output = numpy_model(X, np.full(5, 300), CONDITION)
    first = np.arange(4) < 3
    strong = output[..., :4]
    noise = np.where(first, 2.5 * strong - 1.5 * (0.5 * strong + 0.1), strong)
    x_0, _ = oracle.x_0_and_noise("noise", step_of(300), noise, X)
    assert_all_close(prediction, (x_0, noise, (output[..., 4:] + 1) / 2))
    assert_consistent(prediction, 300)


# Intervals


INTERVALS = {
    (100, 600): {100, 300, 600},
    (300, 300): {300},
    (0, 999): {0, 99, 100, 300, 600, 601, 999},
    (100, math.inf): {100, 300, 600, 601, 999},
    (-math.inf, 99): {0, 99},
}


def test_guidance_is_confined_to_its_interval():
    """The bounds belong to it, and outside the model runs on one batch only, counted when it runs."""
    rows = {interval: [] for interval in INTERVALS}

    def counting_model(interval):
        def run(x_t, t, condition):
            jax.debug.callback(lambda t: rows[interval].append(len(t)), t)
            return model(x_t, t, condition)

        return run

    @quick_jit
    def run(t):
        denoisers = [classifier_free(counting_model(i), scale=3.0, interval=i) for i in INTERVALS]
        return [denoise(jnp.asarray(X), t) for denoise in denoisers]

    for time in [0, 99, 100, 300, 600, 601, 999]:
        predictions = run(np.full(5, time, np.int32))
        jax.effects_barrier()
        for prediction, (interval, guided_times) in zip(predictions, INTERVALS.items(), strict=True):
            is_guided = time in guided_times
            assert rows[interval] == ([10] if is_guided else [5])
            assert_all_close(prediction, guided_prediction(X, time, 3.0 if is_guided else 1.0, 4))
            rows[interval].clear()


def test_a_sampler_runs_guided_within_an_interval():
    times = PROCESS.times(6)

    @jax.jit
    def run(x_T):
        denoise = classifier_free(scale=2.0, num_guided_channels=3, interval=(300, 800))
        return sample(DDIM(), denoise, PROCESS, x_T, times)

    x = X.astype(np.float64)
    for t, before in itertools.pairwise(times):
        x_0, noise, _ = guided_prediction(x, t, 2.0 if 300 <= t <= 800 else 1.0, 3)
        x = oracle.ddim_update(step_of(t, before), x_0, noise)
    assert_close(run(X), x, LOOP_RTOL)


# Clipping


def test_clipping_comes_after_guidance():
    """x_0 is clipped as guided, the noise is that of the clipped x_0, the variance stays."""

    @quick_jit
    def run(t):
        denoise = classifier_free(scale=3.0)
        x_t = jnp.asarray(X)
        ranges = [{}, {"low": -0.5, "high": 2.0}]
        return [denoise(x_t, t), *(clipped(denoise, PROCESS, **options)(x_t, t) for options in ranges)]

    for time in [0, 300, 999]:
        guided_only, default, other = jax.device_get(run(np.full(5, time, np.int32)))
        for prediction, low, high in [(default, -1, 1), (other, -0.5, 2.0)]:
            np.testing.assert_array_equal(prediction.x_0, np.clip(guided_only.x_0, low, high))
            assert {low, high} <= set(prediction.x_0.flat)
            np.testing.assert_array_equal(prediction.variance_fraction, guided_only.variance_fraction)
            assert_consistent(prediction, time)


def test_clipping_in_rectified_flow():
    """Also at t = 1, where x_t is the noise."""
    flow = RectifiedFlow()

    def denoise(x_t, t):
        return Prediction(3 * x_t, x_t)

    for time in [1.0, 0.5, 0.01]:
        prediction = quick_jit(clipped(denoise, flow))(X, np.full(5, time, np.float32))
        x_0 = np.clip(3 * X, -1, 1).astype(np.float64)
        assert_close(prediction.x_0, x_0)
        assert_close(prediction.noise, (X - (1 - time) * x_0) / time)


# Errors


@pytest.mark.parametrize("num_guided_channels", [-1, 0, 5])
def test_guided_channels_must_exist(num_guided_channels):
    denoise = classifier_free(scale=2.0, num_guided_channels=num_guided_channels)
    with pytest.raises(ValueError, match=f"from 1 to the 4 channels of x_t, got {num_guided_channels}"):
        evaluate(denoise, 300)


@pytest.mark.parametrize("scale", [-0.5, math.nan, math.inf])
def test_an_impossible_scale_is_refused(scale):
    with pytest.raises(ValueError, match=f"guidance scale must be from 0 to 3.4e.38, got {scale}"):
        classifier_free(scale=scale)


@pytest.mark.parametrize("interval", [(500, 499), (math.nan, 1)])
def test_an_empty_interval_is_refused(interval):
    with pytest.raises(ValueError, match=rf"low <= high, got \({interval[0]}, {interval[1]}\)"):
        classifier_free(scale=2.0, interval=interval)
