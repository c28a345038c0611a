"""Dynamic thresholding and rescaled guidance follow their formulas, and x_0 and noise agree after them.

| quantity, float32 | against | tolerance |
|---|---|---|
| x_0 and noise | float64 NumPy | 2e-6 of the largest value |
| what is not guided | the conditional prediction | exact |
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import GVP, Prediction, RectifiedFlow, guided, linear_schedule, thresholded

RTOL = 2e-6
SHAPE = (6, 4, 5, 4)
X_T, COND, UNCOND = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
LARGE = np.array([0.1, 0.3, 1.0, 3.0, 30.0, 0.0], np.float32)[:, None, None, None]  # contrast of each image
STEP = oracle.ddpm_step(oracle.linear_betas(1000), 300, -1)
CASES = [
    (linear_schedule(), np.int32(300), STEP),
    (RectifiedFlow(), np.float32(1.0), oracle.flow_step(1.0, 0.0)),
    (GVP(), np.float32(0.25), oracle.gvp_step(0.25, 0.0)),
]
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
all_cases = pytest.mark.parametrize("process, time, step", CASES, ids=["linear", "flow", "gvp"])


def assert_close(actual, expected):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RTOL * np.abs(expected).max())


def noise_of(x_0, step):
    return (np.float64(X_T) - step.alpha * x_0) / step.sigma


@all_cases
@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding(process, time, step, percentile):
    """Each image by its own percentile over all pixels and channels; low contrast stays as it is."""
    x_0 = COND * LARGE
    fraction = np.abs(X_T)

    def denoise(x_t, t):
        return Prediction(jnp.asarray(x_0), x_t, jnp.asarray(fraction))

    found = quick_jit(lambda x, t: thresholded(denoise, process, percentile)(x, t))(X_T, np.full(6, time))
    expected = np.zeros(SHAPE)
    for i, image in enumerate(np.float64(x_0)):
        s = max(np.quantile(np.abs(image), percentile), 1)
        expected[i] = np.minimum(np.maximum(image, -s), s) / s
    assert_close(found.x_0, expected)
    assert_close(found.noise, noise_of(expected, step))
    np.testing.assert_array_equal(found.x_0[:2], x_0[:2])
    np.testing.assert_array_equal(found.variance_fraction, fraction)
    assert np.abs(found.x_0).max() == 1


@pytest.mark.parametrize("percentile", [0.0, -0.1, 1.5, np.nan])
def test_a_percentile_is_a_fraction(percentile):
    with pytest.raises(ValueError, match=f"percentile must be a fraction above 0 and at most 1, got {percentile}"):
        thresholded(lambda x_t, t: None, CASES[0][0], percentile)


def rescaled(process, time, options):
    """Guided predictions whose noise agrees with x_0, as a model's does."""

    def of(x_0, x_t, t):
        alpha, sigma = (
            jnp.asarray(values(t), jnp.float32)[:, None, None, None] for values in (process.alpha, process.sigma)
        )
        return Prediction(x_0, (x_t - alpha * x_0) / sigma, jnp.abs(x_0))

    @quick_jit
    def run(x_t, t, cond, uncond):
        predictions = of(cond, x_t, t), of(uncond, x_t, t)
        return guided(lambda x_t, t: predictions, lambda x_t, t: predictions[0], **options)(x_t, t)

    return run(X_T, np.full(6, time), COND, UNCOND)


@all_cases
@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("num_guided_channels", [None, 3])
def test_rescaled_guidance(process, time, step, rescale, num_guided_channels):
    """Lin et al., section 3.4, on x_0, over the channels that are guided."""
    options = {"scale": 4.0, "num_guided_channels": num_guided_channels, "rescale": rescale, "process": process}
    found = rescaled(process, time, options)
    expected, guided_channels = np.float64(COND), slice(num_guided_channels)
    x_0 = (4 * np.float64(COND) - 3 * np.float64(UNCOND))[..., guided_channels]
    for i in range(len(X_T)):
        ratio = np.float64(COND[i, ..., guided_channels]).std() / x_0[i].std()
        expected[i, ..., guided_channels] = rescale * x_0[i] * ratio + (1 - rescale) * x_0[i]
    assert_close(found.x_0, expected)
    assert_close(found.noise, noise_of(expected, step))
    np.testing.assert_array_equal(found.variance_fraction, np.abs(COND))
    if num_guided_channels:
        np.testing.assert_array_equal(found.x_0[..., 3:], COND[..., 3:])
    elif rescale == 1:
        np.testing.assert_allclose(found.x_0.std((1, 2, 3)), COND.std((1, 2, 3)), rtol=1e-5)


def test_images_without_contrast_stay_finite():
    process, t = CASES[0][0], np.full(6, 300, np.int32)
    flat = Prediction(jnp.zeros(SHAPE), jnp.asarray(X_T))
    denoise = guided(lambda x_t, t: (flat, flat), lambda x_t, t: flat, scale=4.0, rescale=0.7, process=process)
    assert all(np.isfinite(values).all() for values in quick_jit(denoise)(X_T, t)[:2])


def test_rescale_needs_a_process():
    with pytest.raises(ValueError, match=r"rescale = 0.7 needs the process"):
        guided(lambda x_t, t: None, lambda x_t, t: None, scale=2.0, rescale=0.7)
