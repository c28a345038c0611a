"""The forward process, the learned reverse step and the loss agree with a float64 oracle, gradients included.

| quantity, float32 | against | tolerance, relative to the row's largest value |
|---|---|---|
| q_sample, q_posterior, every field of p_mean_variance | float64 NumPy | 1e-5 |
| the terms of the loss | float64 NumPy | 1e-5 |
| MSE's gradient in the model's output | closed form | 1e-5 |
| VLB's gradient in the model's output | central differences in float64 | 1e-4, or 1e-9 absolute |
| normal_kl | numerical integration | 1e-5 |
| the discretised likelihood | float64 NumPy; with the exact normal distribution function | 1e-5; 4e-4 in mass |
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import (
    Prediction,
    cosine_schedule,
    linear_schedule,
    p_mean_variance,
    q_posterior,
    q_sample,
    respace,
    training_losses,
)
from diffussm_jax.diffusion.gaussian import discretized_gaussian_log_likelihood, normal_kl

RTOL = 1e-5
VLB_GRADIENT_RTOL = 1e-4
VLB_GRADIENT_ATOL = 1e-9
CDF_ATOL = 4e-4

SCHEDULES = {
    "linear": linear_schedule(1000),
    "cosine": cosine_schedule(1000),
    "respaced": respace(linear_schedule(1000), 250),
}
SHAPE = (3, 4, 4)


def assert_rows_close(actual, expected, rtol=RTOL, atol=0.0, scale=None):
    """Each row agrees to atol + rtol of its scale, by default its largest value, so that no row hides another."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    scale = largest_of_row(expected) if scale is None else scale
    for row, (a, e, unit) in enumerate(zip(actual, expected, scale, strict=True)):
        np.testing.assert_allclose(a, e, rtol=0, atol=atol + rtol * unit, err_msg=f"row {row}")


def largest_of_row(values):
    return np.abs(values).reshape(len(values), -1).max(1)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.fixture
def times(schedule):
    last = len(schedule) - 1
    return np.array([0, 1, 2, last // 2, last - 1, last])


@pytest.fixture
def batch(times):
    """x_0 with values within and beyond [-1, 1] and on its ends, noise, and an output whose noise is half right."""
    random = np.random.default_rng(0)
    x_0, noise, error, raw = random.normal(size=(4, len(times), *SHAPE)).astype(np.float32)
    x_0[:, 0, 0, 0], x_0[:, 0, 0, 1] = -1, 1
    output = np.concatenate([noise + np.float32(0.5) * error, raw], -1)
    return x_0, noise, output


@pytest.fixture
def oracle_of(schedule):
    """The oracle's function of this name, for the schedule's betas and a batch."""

    def bind(name, *batches, **options):
        function = functools.partial(getattr(oracle, name), schedule.betas, **options)
        return oracle.by_row(function, *batches)

    return bind


def test_q_sample(schedule, times, batch, oracle_of):
    x_0, noise, _ = batch
    x_t = q_sample(schedule, jnp.asarray(x_0), jnp.asarray(times), jnp.asarray(noise))
    assert x_t.dtype == jnp.float32
    assert_rows_close(x_t, oracle_of("q_sample", x_0, times, noise))


def test_q_posterior(schedule, times, batch, oracle_of):
    x_0, x_t, _ = batch
    mean, log_variance = q_posterior(schedule, jnp.asarray(x_0), jnp.asarray(x_t), jnp.asarray(times))
    assert_rows_close(mean, oracle_of("q_posterior", x_0, x_t, times)[0])
    lower, _ = oracle_of("variance_bounds", times)
    assert log_variance.shape == (len(times), 1, 1, 1)
    assert_rows_close(log_variance[:, 0, 0, 0], np.log(lower))


@pytest.mark.parametrize("clip_x_0", [False, True])
def test_p_mean_variance(schedule, times, batch, oracle_of, clip_x_0):
    _, x_t, output = batch
    prediction = p_mean_variance(schedule, jnp.asarray(output), jnp.asarray(x_t), jnp.asarray(times), clip_x_0=clip_x_0)
    expected = Prediction(*oracle_of("p_mean_variance", output, x_t, times, clip_x_0=clip_x_0))
    unclipped = Prediction(*oracle_of("p_mean_variance", output, x_t, times))
    for field in Prediction._fields:
        actual = getattr(prediction, field)
        assert actual.dtype == jnp.float32
        # Clipping does not undo the rounding of an x_0 that was 100 times larger before.
        scale = largest_of_row(unclipped.x_0) if field == "x_0" else None
        assert_rows_close(actual, getattr(expected, field), scale=scale)


def test_learned_range_is_not_clipped(schedule, times, batch):
    """-1 and 1 give the bounds of the variance, and what lies beyond goes on in a line."""
    _, x_t, _ = batch
    lower, upper = oracle.by_row(functools.partial(oracle.variance_bounds, schedule.betas), times)
    for raw, expected in [(-1, np.log(lower)), (1, np.log(upper)), (3, 2 * np.log(upper) - np.log(lower))]:
        output = jnp.concatenate([jnp.zeros_like(x_t), jnp.full_like(x_t, raw)], -1)
        prediction = p_mean_variance(schedule, output, jnp.asarray(x_t), jnp.asarray(times))
        assert_rows_close(prediction.log_variance[:, 0, 0, 0], expected)


def test_p_mean_variance_takes_a_bfloat16_output(schedule, times, batch):
    _, x_t, output = batch
    output = jnp.asarray(output, jnp.bfloat16)
    prediction = p_mean_variance(schedule, output, jnp.asarray(x_t), jnp.asarray(times))
    same = p_mean_variance(schedule, output.astype(jnp.float32), jnp.asarray(x_t), jnp.asarray(times))
    for actual, expected in zip(prediction, same, strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_array_equal(actual, expected)


def losses_of_output(schedule, output, x_0, t, noise):
    arrays = map(jnp.asarray, (x_0, t, noise))
    return training_losses(schedule, lambda x_t, time: jnp.asarray(output), *arrays)


def test_training_losses(schedule, times, batch, oracle_of):
    x_0, noise, output = batch
    losses = losses_of_output(schedule, output, x_0, times, noise)
    mse = oracle.by_row(oracle.mse_term, output, noise)
    vlb = oracle_of("vlb_term", output, x_0, oracle_of("q_sample", x_0, times, noise), times)
    for name, expected in {"mse": mse, "vlb": vlb, "loss": mse + vlb}.items():
        assert losses[name].dtype == jnp.float32
        assert_rows_close(losses[name], expected)


def test_training_losses_evaluate_the_model_once_at_x_t_and_its_time(schedule, times, batch, oracle_of):
    x_0, noise, output = batch
    calls = []

    def model(x_t, time):
        calls.append((x_t, time))
        return jnp.asarray(output)

    training_losses(schedule, model, jnp.asarray(x_0), jnp.asarray(times), jnp.asarray(noise))
    ((x_t, time),) = calls
    assert_rows_close(x_t, oracle_of("q_sample", x_0, times, noise))
    np.testing.assert_array_equal(time, schedule.timesteps[times])


def gradient_in_output(name, schedule, output, x_0, t, noise):
    def total(output):
        return jnp.sum(losses_of_output(schedule, output, x_0, t, noise)[name])

    return np.split(np.asarray(jax.grad(total)(jnp.asarray(output)), np.float64), 2, -1)


def test_mse_gradient_reaches_the_noise_alone(schedule, times, batch):
    x_0, noise, output = batch
    in_noise, in_variance = gradient_in_output("mse", schedule, output, x_0, times, noise)
    predicted, _ = np.split(output.astype(np.float64), 2, -1)
    assert_rows_close(in_noise, 2 * (predicted - noise) / np.prod(SHAPE))
    np.testing.assert_array_equal(in_variance, 0)


def test_vlb_gradient_reaches_the_variance_alone(schedule, times, batch, oracle_of):
    x_0, noise, output = batch
    in_noise, in_variance = gradient_in_output("vlb", schedule, output, x_0, times, noise)
    np.testing.assert_array_equal(in_noise, 0)

    x_t = oracle_of("q_sample", x_0, times, noise)
    expected = np.zeros_like(in_variance)
    step = 1e-4
    for element in np.ndindex(SHAPE):
        index = (slice(None), *element[:-1], SHAPE[-1] + element[-1])
        above, below = output.astype(np.float64), output.astype(np.float64)
        above[index] += step
        below[index] -= step
        rise = oracle_of("vlb_term", above, x_0, x_t, times) - oracle_of("vlb_term", below, x_0, x_t, times)
        expected[(slice(None), *element)] = rise / (2 * step)
    # Where the two bounds all but meet, the gradient is what the rounding of their float32 logarithms leaves.
    assert_rows_close(in_variance, expected, VLB_GRADIENT_RTOL, VLB_GRADIENT_ATOL)


def test_loss_gradient_is_the_sum_of_both(schedule, times, batch):
    x_0, noise, output = batch
    in_noise, in_variance = gradient_in_output("loss", schedule, output, x_0, times, noise)
    np.testing.assert_array_equal(in_noise, gradient_in_output("mse", schedule, output, x_0, times, noise)[0])
    np.testing.assert_array_equal(in_variance, gradient_in_output("vlb", schedule, output, x_0, times, noise)[1])


@pytest.mark.parametrize(
    "mean_q, log_variance_q, mean_p, log_variance_p",
    [(0.0, 0.0, 1.0, 0.0), (0.3, -1.0, 0.3, 1.0), (-2.0, 0.5, 0.5, -0.7), (0.1, -9.0, 0.12, -8.5)],
)
def test_normal_kl_is_the_integral(mean_q, log_variance_q, mean_p, log_variance_p):
    z = np.linspace(-12, 12, 20001)
    deviation = np.exp(log_variance_q / 2)
    x = mean_q + deviation * z
    log_q = -(z**2) / 2 - log_variance_q / 2
    log_p = -((x - mean_p) ** 2) / (2 * np.exp(log_variance_p)) - log_variance_p / 2
    integral = np.trapezoid(np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (log_q - log_p), z)
    actual = normal_kl(*map(jnp.float32, (mean_q, log_variance_q, mean_p, log_variance_p)))
    assert float(actual) == pytest.approx(integral, rel=RTOL)


def test_normal_kl_of_a_distribution_with_itself_is_zero():
    assert float(normal_kl(*map(jnp.float32, (0.7, -3.0, 0.7, -3.0)))) == 0


def pixel_values():
    return np.linspace(-1, 1, 256).astype(np.float32)


@pytest.mark.parametrize("mean, log_variance", [(0.0, -2.0), (0.9, -5.0), (-1.2, -4.0), (0.501, -9.2)])
def test_discretized_likelihood(mean, log_variance):
    x = pixel_values()
    log_mass = np.asarray(
        discretized_gaussian_log_likelihood(jnp.asarray(x), jnp.float32(mean), jnp.float32(log_variance)), np.float64
    )
    assert np.exp(log_mass).sum() == pytest.approx(1, abs=RTOL)
    expected = oracle.discretized_log_likelihood(x, mean, log_variance)
    np.testing.assert_allclose(np.exp(log_mass), np.exp(expected), rtol=0, atol=RTOL)
    exact = oracle.discretized_log_likelihood(x, mean, log_variance, oracle.exact_normal_cdf)
    np.testing.assert_allclose(np.exp(log_mass), np.exp(exact), rtol=0, atol=CDF_ATOL)


def test_discretized_likelihood_far_from_the_data_is_floored_and_has_a_finite_gradient():
    x = jnp.asarray([-1.0, -0.2, 0.5, 1.0])
    mean = jnp.asarray([40.0, 30.0, -30.0, -40.0])
    log_variance = jnp.full_like(x, -9)

    def total(log_variance):
        return jnp.sum(discretized_gaussian_log_likelihood(x, mean, log_variance))

    np.testing.assert_allclose(discretized_gaussian_log_likelihood(x, mean, log_variance), np.log(1e-12), rtol=1e-6)
    assert np.isfinite(jax.grad(total)(log_variance)).all()


@pytest.mark.parametrize("num_channels", [4, 7, 12])
def test_an_output_of_another_width_is_refused(num_channels):
    schedule, t = SCHEDULES["linear"], jnp.zeros(2, jnp.int32)
    x, output = jnp.zeros((2, 4, 4, 4)), jnp.zeros((2, 4, 4, num_channels))
    message = f"returns 8 channels for 4 of input, got {num_channels}$"
    with pytest.raises(ValueError, match=message):
        p_mean_variance(schedule, output, x, t)
    with pytest.raises(ValueError, match=message):
        training_losses(schedule, lambda x_t, time: output, x, t, x)
