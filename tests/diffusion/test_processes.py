"""Processes are those of the papers, and a coarser grid of times is ADM's respacing.

| quantity | float64 NumPy against | relative tolerance |
|---|---|---|
| betas of the schedules | the formulas | 1e-12 |
| alpha, sigma, posterior variance | sums of logarithms, Bayes' rule | 1e-10 |
| the reverse step of any grid | ADM's respaced betas, Bayes' rule | 1e-10 |
| alpha^2 from the reverse steps of a grid | alpha^2 | 1e-10, or 1e-15 absolute: betas near 1 hold no more of it |

In float32, alpha and sigma are the rounded float64 values, and q_sample and q_posterior agree to 1e-5 of the row's
largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import (
    GVP,
    DiscreteProcess,
    RectifiedFlow,
    Reverse,
    cosine_schedule,
    linear_schedule,
    q_posterior,
    q_sample,
    scaled_linear_schedule,
)

BETAS_RTOL = 1e-12
DERIVED_RTOL = 1e-10
ALPHA_BAR_ATOL = 1e-15
FLOAT32_RTOL = 1e-5

SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}
BETAS = {"linear": oracle.linear_betas, "cosine": oracle.cosine_betas}
COUNTS = [1, 2, 3, 7, 50, 250, 999, 1000]
FLOW = RectifiedFlow()
CONTINUOUS = {"flow": (FLOW, oracle.flow_step), "gvp": (GVP(), oracle.gvp_step)}


# Schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_follow_the_paper(name):
    for num_steps in [21, 100, 1000, 4000]:
        process = SCHEDULES[name](num_steps)
        assert process.betas.dtype == np.float64
        assert process.num_steps == num_steps
        np.testing.assert_allclose(process.betas, BETAS[name](num_steps), rtol=BETAS_RTOL)


def test_roots_of_scaled_betas_are_linear():
    betas = scaled_linear_schedule(1000).betas
    assert betas[[0, -1]] == pytest.approx([0.0015, 0.0195], rel=BETAS_RTOL)
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), (0.0195**0.5 - 0.0015**0.5) / 999, rtol=1e-9)
    assert scaled_linear_schedule(beta_start=0.00085, beta_end=0.012).betas[-1] == pytest.approx(0.012)
    with pytest.raises(ValueError, match="beta_end must be from 1e-09 to 0.999, got 1.5"):
        scaled_linear_schedule(beta_end=1.5)


def test_linear_betas_run_from_1e_4_to_2e_2():
    betas = linear_schedule(1000).betas
    assert betas[[0, -1]] == pytest.approx([1e-4, 2e-2], rel=BETAS_RTOL)
    np.testing.assert_allclose(np.diff(betas), (2e-2 - 1e-4) / 999, rtol=1e-9)


def test_cosine_alpha_bar_is_a_squared_cosine_until_the_cap():
    process = cosine_schedule(1000)
    expected = [oracle.cosine_alpha_bar((t + 1) / 1000) / oracle.cosine_alpha_bar(0) for t in range(1000)]
    np.testing.assert_allclose(process.alpha_bar[:-1], expected[:-1], rtol=DERIVED_RTOL)
    assert process.betas[-1] == 0.999
    assert process.alpha_bar[-1] == pytest.approx(1e-3 * expected[-2], rel=DERIVED_RTOL)


def test_the_default_is_1000_steps():
    for schedule in SCHEDULES.values():
        np.testing.assert_array_equal(schedule().betas, schedule(1000).betas)


@pytest.mark.parametrize("num_steps", [-1, 0, 1, 20])
def test_linear_schedule_refuses_too_few_steps(num_steps):
    with pytest.raises(ValueError, match=f"num_steps.* got {num_steps}$"):
        linear_schedule(num_steps)


@pytest.mark.parametrize("num_steps", [-1, 0])
def test_cosine_schedule_refuses_no_steps(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be from 1 to 100000, got {num_steps}$"):
        cosine_schedule(num_steps)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, -0.1], [0.1, 1.1], [0.1, np.nan], [[0.1, 0.1]]])
def test_betas_must_be_a_vector_of_probabilities(betas):
    with pytest.raises(ValueError, match="betas must be a vector"):
        DiscreteProcess(np.array(betas))


# alpha and sigma


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_and_sigma(name):
    process, betas = SCHEDULES[name](1000), BETAS[name](1000)
    t = np.arange(1000)
    alpha_bar = oracle.alpha_bar(betas, t)
    np.testing.assert_allclose(process.alpha_bar, alpha_bar, rtol=DERIVED_RTOL)
    np.testing.assert_allclose(process.alpha(t), np.sqrt(alpha_bar), rtol=DERIVED_RTOL)
    np.testing.assert_allclose(process.sigma(t), np.sqrt(1 - alpha_bar), rtol=DERIVED_RTOL)


@pytest.mark.parametrize("process", [linear_schedule(50), cosine_schedule(50), FLOW, GVP()], ids=lambda p: str(p)[:9])
def test_at_clean_x_t_is_x_0(process):
    """-1 is a time of its own, and not the last row of a table."""
    assert process.alpha(np.array([process.clean]))[0] == 1
    assert process.sigma(np.array([process.clean]))[0] == 0
    traced_alpha, traced_sigma = jax.jit(lambda t: (process.alpha(t), process.sigma(t)))(jnp.asarray([process.clean]))
    assert (traced_alpha, traced_sigma) == (1, 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_traced_times_give_the_rounded_float64_values(name):
    process = SCHEDULES[name](1000)
    times = np.arange(-1, 1000)
    for function in [process.alpha, process.sigma]:
        assert function(times).dtype == np.float64
        traced = jax.jit(function)(jnp.asarray(times, jnp.int32))
        np.testing.assert_array_equal(traced, function(times).astype(np.float32))


def test_rectified_flow_is_a_straight_path():
    t = np.linspace(0, 1, 11)
    np.testing.assert_array_equal(FLOW.alpha(t), 1 - t)
    np.testing.assert_array_equal(FLOW.sigma(t), t)
    alpha, sigma = jax.jit(lambda t: (FLOW.alpha(t), FLOW.sigma(t)))(jnp.asarray(t, jnp.float32))
    assert alpha.dtype == sigma.dtype == jnp.float32
    np.testing.assert_allclose(alpha, 1 - t, atol=1e-7)
    np.testing.assert_allclose(sigma, t, atol=1e-7)
    assert FLOW.num_steps is None


def test_gvp_is_a_quarter_of_a_circle():
    """And its ends are exact, as no cosine is."""
    process, t = GVP(), np.linspace(0, 1, 11)
    np.testing.assert_allclose(process.alpha(t), np.cos(np.pi / 2 * t), atol=1e-15)
    np.testing.assert_allclose(process.sigma(t), np.sin(np.pi / 2 * t), atol=1e-15)
    alpha, sigma = jax.jit(lambda t: (process.alpha(t), process.sigma(t)))(jnp.asarray(t, jnp.float32))
    assert alpha.dtype == sigma.dtype == jnp.float32
    np.testing.assert_allclose(alpha, np.cos(np.pi / 2 * t), atol=2e-7)
    np.testing.assert_allclose(sigma, np.sin(np.pi / 2 * t), atol=2e-7)
    assert alpha[-1] == process.alpha(t)[-1] == 0 and sigma[-1] == 1


# Times


def test_the_model_is_given_the_step_or_1000_times_the_fraction():
    t = np.array([0, 3, 999])
    np.testing.assert_array_equal(linear_schedule(1000).model_time(t), t)
    np.testing.assert_array_equal(FLOW.model_time(np.array([0, 0.25, 1])), [0, 250, 1000])


def test_training_draws_every_time_alike():
    draw = jax.jit(lambda key: (cosine_schedule(7).draw_time(key, (7000,)), FLOW.draw_time(key, (7000,))))
    steps, fractions = draw(jax.random.key(0))
    assert jnp.issubdtype(steps.dtype, jnp.integer)
    counts = np.bincount(steps, minlength=7)
    assert len(counts) == 7 and np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
    assert fractions.dtype == jnp.float32
    counts, _ = np.histogram(fractions, 7, (0, 1))
    assert counts.sum() == 7000 and np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.6), (1.0, 1.5)])
@pytest.mark.parametrize("kind", [RectifiedFlow, GVP])
def test_logit_normal_times(kind, mean, std):
    """The moments of log(t / (1 - t)) are those asked for, within 5 standard errors."""
    process = kind("logit_normal", mean, std)
    t = np.asarray(jax.jit(lambda key: process.draw_time(key, (10_000,)))(jax.random.key(0)), np.float64)
    assert ((t > 0) & (t < 1)).all()
    logit = np.log(t / (1 - t))
    assert logit.mean() == pytest.approx(mean, abs=5 * std / 100)
    assert logit.std() == pytest.approx(std, abs=5 * std / 100 / np.sqrt(2))
    assert np.mean(((logit - mean) / std) ** 4) == pytest.approx(3, abs=5 * np.sqrt(96) / 100)


@pytest.mark.parametrize("kind", [RectifiedFlow, GVP])
def test_by_default_times_are_uniform_whatever_the_options_of_others(kind):
    times = kind(logit_mean=2.0).draw_time(jax.random.key(3), (64,))
    np.testing.assert_array_equal(times, jax.random.uniform(jax.random.key(3), (64,)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"time_distribution": "cosine"}, "time_distribution is 'cosine'; choose one of uniform, logit_normal"),
        ({"logit_std": 0.0}, "logit_std must be from 0.001 to 10, got 0.0"),
        ({"logit_mean": np.nan}, "logit_mean must be from -10 to 10, got nan"),
    ],
)
def test_wrong_options_of_continuous_time_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlow(**options)


@pytest.mark.parametrize("process", [cosine_schedule(7), FLOW], ids=["discrete", "flow"])
def test_sampling_starts_from_a_standard_normal(process):
    x_T = process.prior(jax.random.key(3), (2, 8, 8, 3))
    np.testing.assert_array_equal(x_T, jax.random.normal(jax.random.key(3), (2, 8, 8, 3)))
    assert x_T.dtype == jnp.float32


@pytest.mark.parametrize("num_steps", COUNTS)
def test_times_are_evenly_spaced_and_end_at_clean(num_steps):
    times = linear_schedule(1000).times(num_steps)
    assert np.issubdtype(times.dtype, np.integer)
    assert len(times) == num_steps + 1
    assert times[0] == 999
    assert times[-1] == -1
    if num_steps > 1:
        assert times[-2] == 0
        gap = 999 / (num_steps - 1)
        assert set(-np.diff(times[:-1])) <= {int(np.floor(gap)), int(np.ceil(gap))}

    times = FLOW.times(num_steps)
    np.testing.assert_allclose(times, 1 - np.arange(num_steps + 1) / num_steps, atol=1e-15)
    assert times[0] == 1
    assert times[-1] == 0


@pytest.mark.parametrize("num_steps", [2, 10, 25, 50, 100, 250, 500, 1000])
def test_times_are_the_steps_that_adm_keeps(num_steps):
    kept = linear_schedule(1000).times(num_steps)[-2::-1]
    np.testing.assert_array_equal(kept, oracle.adm_timesteps(1000, num_steps))


@pytest.mark.parametrize("num_steps", [-1, 0, 101])
def test_times_refuse_counts_outside_the_process(num_steps):
    with pytest.raises(ValueError, match=f"from 1 to the process's 100, got {num_steps}$"):
        linear_schedule(100).times(num_steps)


@pytest.mark.parametrize("num_steps", [-1, 0])
def test_times_of_rectified_flow_refuse_no_steps(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}$"):
        FLOW.times(num_steps)


# The reverse step


def assert_reverse_is_bayes(reverse, step):
    """All coefficients, against an oracle's `Step` with arrays [S]; c_0 and c_t as the mean for x_0 and x_t alone."""
    zeros, ones = np.zeros_like(step.beta), np.ones_like(step.beta)
    np.testing.assert_allclose(reverse.c_0, oracle.q_posterior(step, ones, zeros)[0], rtol=DERIVED_RTOL)
    # A cosine is not quite 0 at the end of GVP.
    np.testing.assert_allclose(reverse.c_t, oracle.q_posterior(step, zeros, ones)[0], rtol=DERIVED_RTOL, atol=1e-13)
    variance = oracle.posterior_variance(step)
    assert reverse.variance[-1] == variance[-1] == 0
    np.testing.assert_allclose(reverse.variance, variance, rtol=DERIVED_RTOL)
    clipped = np.append(variance[:-1], variance[-2:-1] if len(variance) > 1 else step.beta)
    np.testing.assert_allclose(np.exp(reverse.log_variance_min), clipped, rtol=DERIVED_RTOL)
    np.testing.assert_allclose(np.exp(reverse.log_variance_max), step.beta, rtol=DERIVED_RTOL)
    for values in reverse:
        assert values.dtype == np.float64
        assert np.isfinite(values).all()


def assert_respaced_as_adm(process, betas, times):
    kept = times[-2::-1]
    reverse = process.reverse(times)
    assert_reverse_is_bayes(reverse, oracle.ddpm_step(betas, times[:-1], times[1:]))
    respaced = np.exp(reverse.log_variance_max)[::-1]
    np.testing.assert_allclose(respaced, oracle.respaced_betas(betas, kept), rtol=DERIVED_RTOL)
    alpha_bar = np.cumprod(1 - respaced)
    np.testing.assert_allclose(alpha_bar, process.alpha(kept) ** 2, rtol=DERIVED_RTOL, atol=ALPHA_BAR_ATOL)


@pytest.mark.parametrize("num_steps", COUNTS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_grid_of_times_is_adms_respacing(name, num_steps):
    process = SCHEDULES[name](1000)
    assert_respaced_as_adm(process, BETAS[name](1000), process.times(num_steps))


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_decreasing_grid_will_do(name):
    """Also one that is not even, or thinner than another one."""
    process, random = SCHEDULES[name](1000), np.random.default_rng(0)
    uneven = np.append(np.sort(random.choice(1000, 30, replace=False))[::-1], -1)
    thinner = np.append(process.times(250)[:-1:5], -1)
    for times in [uneven, thinner, np.array([3, -1])]:
        assert_respaced_as_adm(process, BETAS[name](1000), times)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_full_grid_has_the_schedules_betas(name):
    process = SCHEDULES[name](1000)
    np.testing.assert_array_equal(process.times(1000), np.arange(999, -2, -1))
    reverse = process.reverse(process.times(1000))
    np.testing.assert_allclose(np.exp(reverse.log_variance_max)[::-1], process.betas, rtol=DERIVED_RTOL)
    variance = oracle.posterior_variance(oracle.ddpm_step(BETAS[name](1000), np.arange(1000), np.arange(-1, 999)))
    np.testing.assert_allclose(reverse.variance[::-1], variance, rtol=DERIVED_RTOL)


def test_a_single_step_has_beta_for_both_bounds_of_its_variance():
    process = linear_schedule(1000)
    reverse = process.reverse(process.times(1))
    beta = 1 - process.alpha_bar[-1]
    np.testing.assert_allclose(np.exp(reverse.log_variance_max), beta, rtol=DERIVED_RTOL)
    np.testing.assert_allclose(np.exp(reverse.log_variance_min), beta, rtol=DERIVED_RTOL)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("num_steps", COUNTS)
def test_the_reverse_step_in_continuous_time_is_bayes_rule(num_steps, name):
    """Also from t = 1, where alpha is 0."""
    process, step = CONTINUOUS[name]
    times = process.times(num_steps)
    assert_reverse_is_bayes(process.reverse(times), step(times[:-1], times[1:]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_float32_would_lose_the_variance_of_neighbouring_steps(name):
    """Why pairs of times are computed on the host."""
    process = SCHEDULES[name](1000)
    beta, times = process.betas[::-1], process.times(1000)
    log_beta = process.reverse(times).log_variance_max
    np.testing.assert_allclose(np.exp(log_beta.astype(np.float32)), beta, rtol=1e-6)
    alpha = process.alpha(times).astype(np.float32)
    in_float32 = 1 - (alpha[:-1] / alpha[1:]) ** 2
    assert np.abs(in_float32 / beta - 1).max() > 3e-4


# q_sample and q_posterior in float32


def assert_rows_close(actual, expected):
    assert actual.dtype == jnp.float32
    assert actual.shape == expected.shape
    error = np.abs(np.asarray(actual, np.float64) - expected)
    assert (error.max((1, 2, 3)) <= FLOAT32_RTOL * np.abs(expected).max((1, 2, 3))).all()


@pytest.mark.parametrize("name", ["linear", "linear-250", "cosine", "flow"])
def test_q_sample_and_q_posterior(name):
    """For rows at the noisiest, middle and last steps of a grid."""
    if name == "flow":
        process, times = FLOW, np.array([1.0, 0.999, 0.5, 0.01, 0.001, 0.0])
        step, rows = oracle.flow_step(times[:-1], times[1:]), np.arange(5)
    else:
        schedule, num_steps = name.split("-")[0], 250 if "-" in name else 1000
        process = SCHEDULES[schedule](1000)
        times = process.times(num_steps)
        step = oracle.ddpm_step(BETAS[schedule](1000), times[:-1], times[1:])
        rows = np.array([0, 1, num_steps // 2, num_steps - 3, num_steps - 2, num_steps - 1])
    variance = oracle.posterior_variance(step)
    variance[-1] = variance[-2]
    step, variance = oracle.Step(*(values[rows] for values in step)), variance[rows]
    x_0, x_t = np.random.default_rng(0).normal(size=(2, len(rows), 3, 4, 4)).astype(np.float32)

    @jax.jit
    def run(x_0, x_t, t):
        reverse = Reverse(*(jnp.asarray(v[rows, None, None, None], jnp.float32) for v in process.reverse(times)))
        return q_sample(process, x_0, t, x_t), *q_posterior(reverse, x_0, x_t)

    sampled, mean, log_variance = run(x_0, x_t, jnp.asarray(times[rows], jnp.float32 if name == "flow" else jnp.int32))
    assert_rows_close(sampled, oracle.q_sample(step, x_0, x_t))
    assert_rows_close(mean, oracle.q_posterior(step, x_0, x_t)[0])
    assert log_variance.shape == (len(rows), 1, 1, 1)
    assert_rows_close(log_variance, np.log(variance)[:, None, None, None])
