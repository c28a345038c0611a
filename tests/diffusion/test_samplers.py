"""The samplers make the updates of the papers, converge at the order of the method, and reproduce a known target.

The target is N(MEAN, DEVIATION^2) in every pixel; its noise predictor, reverse variance and probability flow are known.

| quantity, float32 | against | tolerance |
|---|---|---|
| one update | float64 NumPy | 1e-5 of the largest x_t, or of 1 |
| DDIM, eta = 0 | the probability flow | error falls with a fitted slope of 0.85 to 1.15 |
| DDPM with the optimal variance | moments of the target | 5 standard errors |
| DDIM with eta = 0.5, 1 | moments by the recursion of its updates | 5 standard errors |
| DDIM with eta = 0.5, 1 | moments of the target | 5 standard errors and 0.02, the bias of 250 steps |
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import SAMPLERS, cosine_schedule, ddim, ddpm, linear_schedule, respace

UPDATE_RTOL = 1e-5
STANDARD_ERRORS = 5
DDIM_BIAS = 0.02
ORDER = (0.85, 1.15)

MEAN, DEVIATION = 0.4, 0.6
FULL = linear_schedule(1000)
SHAPE = (3, 8, 8, 2)
UPDATES = {
    "ddpm": (ddpm, oracle.ddpm_update, {}),
    "ddim": (ddim, oracle.ddim_update, {}),
    "ddim-0.5": (ddim, oracle.ddim_update, {"eta": 0.5}),
    "ddim-1": (ddim, oracle.ddim_update, {"eta": 1.0}),
}


def normal(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def smooth_denoise(x_t, t, phase=0.0):
    """Some output that depends on everything a denoiser is given."""
    angle = t.astype(jnp.float32)[:, None, None, None] / 100 + phase
    return jnp.concatenate([jnp.sin(2 * x_t + angle), jnp.cos(3 * x_t - angle)], -1)


def target_denoise(schedule, fraction=None):
    """E[noise | x_t] for the target, beside a log variance this fraction [S] of the way between its bounds."""
    signal = np.sqrt([oracle.alpha_bar(schedule.betas, t) for t in range(len(schedule))])
    mean, variance = np.transpose([oracle.marginal(schedule.betas, MEAN, DEVIATION, t) for t in range(len(schedule))])
    slope = np.sqrt(1 - signal**2) / variance
    fraction = jnp.zeros(len(schedule)) if fraction is None else fraction
    table = jnp.stack([jnp.asarray(mean, jnp.float32), jnp.asarray(slope, jnp.float32), 2 * fraction - 1])
    index_of = jnp.zeros(FULL.timesteps[-1] + 1, jnp.int32).at[schedule.timesteps].set(jnp.arange(len(schedule)))

    def denoise(x_t, t):
        mean, slope, raw = table[:, index_of[t], None, None, None]
        return jnp.concatenate([(x_t - mean) * slope, jnp.broadcast_to(raw, x_t.shape)], -1)

    return denoise


def noisiest_draws():
    """Many pixels of the target's marginal at the last step: N(0, 1) up to the schedule's rest of signal."""
    mean, variance = oracle.marginal(FULL.betas, MEAN, DEVIATION, 999)
    return jnp.float32(mean) + jnp.float32(np.sqrt(variance)) * normal(2, (32, 64, 64, 1))


def assert_moments(x, mean, deviation, bias=0.0):
    x = np.asarray(x, np.float64)
    standard_error = deviation / np.sqrt(x.size)
    assert x.mean() == pytest.approx(mean, abs=STANDARD_ERRORS * standard_error + bias)
    assert x.std() == pytest.approx(deviation, abs=STANDARD_ERRORS * standard_error / np.sqrt(2) + bias)


# Single updates


def recorded_runs(record, run):
    """For two phases of the denoiser: x_t, times and outputs of each step, and the x_{t-1} that was made of them."""

    @jax.jit
    def recorded_run(phase):
        denoise, steps_of_trace = record(lambda x_t, t: smooth_denoise(x_t, t, phase))
        steps.append(steps_of_trace)
        return run(denoise)

    steps, runs = [], []
    for phase in (0.0, 2.0):
        x_0 = recorded_run(jnp.float32(phase))
        jax.effects_barrier()
        x_t, times, outputs = map(np.stack, zip(*steps[0], strict=True))
        steps[0].clear()
        runs.append((x_t, times, outputs, np.concatenate([x_t[1:], x_0[None]])))
    return runs


@pytest.mark.parametrize(
    "name, schedule, clip_x_0",
    [pytest.param(name, respace(FULL, 6), False, id=f"{name}-linear") for name in UPDATES]
    + [pytest.param(name, cosine_schedule(6), True, id=f"{name}-cosine-clipped") for name in SAMPLERS],
)
def test_every_update_is_that_of_the_paper(record, name, schedule, clip_x_0):
    """Two runs with one key add the same noise, so the first reveals that of the second, which has other outputs."""
    sampler, update, options = UPDATES[name]
    options = options | {"clip_x_0": clip_x_0}
    key = jax.random.key(7)
    first, second = recorded_runs(record, lambda denoise: sampler(denoise, schedule, normal(0), key, **options))
    assert np.abs(first[2] - second[2]).max() > 0.1
    noises = []
    for i, t in enumerate(reversed(range(len(schedule)))):
        x_t, time, output, x_prev = (values[i] for values in first)
        x_t_too, _, output_too, x_prev_too = (values[i] for values in second)
        np.testing.assert_array_equal(time, schedule.timesteps[t])
        make = functools.partial(update, schedule.betas, t=t, **options)
        still = make(output, x_t, noise=0.0)
        deviation = make(output, x_t, noise=1.0) - still
        assert_close = functools.partial(
            np.testing.assert_allclose, rtol=0, atol=UPDATE_RTOL * max(np.abs(x_t).max(), 1), err_msg=f"step {t}"
        )
        if np.any(deviation):
            noises.append(((x_prev - still) / deviation).ravel())
            assert_close(x_prev_too, make(output_too, x_t_too, noise=noises[-1].reshape(SHAPE)))
        else:
            assert_close(x_prev, still)
    assert len(noises) == (0 if name == "ddim" else len(schedule) - 1)
    if noises:
        assert_moments(np.stack(noises), 0, 1)
        assert np.abs(np.corrcoef(noises) - np.eye(len(noises))).max() < STANDARD_ERRORS / np.sqrt(noises[0].size)


# A known target


@pytest.mark.parametrize("family", [linear_schedule, functools.partial(respace, FULL)], ids=["finer", "respaced"])
def test_ddim_converges_to_the_probability_flow_at_first_order(family):
    x_T = normal(1)
    counts, errors = [25, 50, 100, 200], []
    for num_steps in counts:
        schedule = family(num_steps)
        x_0 = ddim(target_denoise(schedule), schedule, x_T)
        flow = oracle.probability_flow(schedule.betas, MEAN, DEVIATION, np.asarray(x_T, np.float64))
        errors.append(np.sqrt(np.mean((x_0 - flow) ** 2)))
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert ORDER[0] < order < ORDER[1]


def optimal_fraction(schedule):
    """Where the exact log variance of q(x_{t-1} | x_t) lies between the bounds of the learned range."""
    fraction = np.zeros(len(schedule), np.float32)
    for t in range(1, len(schedule)):
        lower, upper = np.log(oracle.variance_bounds(schedule.betas, t))
        exact = np.log(oracle.optimal_reverse_variance(schedule.betas, MEAN, DEVIATION, t))
        fraction[t] = (exact - lower) / (upper - lower)
    return fraction


@functools.cache
def ddpm_of_target(num_steps):
    """The respaced schedule, and the sampler's x_0 as a function of the fraction [S]."""
    schedule = respace(FULL, num_steps)

    @jax.jit
    def sample(fraction):
        denoise = target_denoise(schedule, fraction)
        return ddpm(denoise, schedule, noisiest_draws(), jax.random.key(0))

    return schedule, sample


@pytest.mark.parametrize("num_steps", [5, 25])
def test_ddpm_with_the_optimal_variance_reproduces_the_target(num_steps):
    """Each step is then exact, so that even five of them do."""
    schedule, sample = ddpm_of_target(num_steps)
    assert_moments(sample(optimal_fraction(schedule)), MEAN, DEVIATION)


@pytest.mark.parametrize("fraction, sign", [(0, -1), (1, 1)])
def test_ddpm_with_either_bound_misses_the_targets_deviation(fraction, sign):
    """So that the test above sees the variance."""
    _, sample = ddpm_of_target(25)
    x_0 = np.asarray(sample(np.full(25, fraction, np.float32)))
    assert sign * (x_0.std() - DEVIATION) > 4 * STANDARD_ERRORS * DEVIATION / np.sqrt(2 * x_0.size)


def ddim_moments(schedule, eta):
    """Mean and deviation of DDIM's x_0 for the target: the update is affine in x_t, so both follow a recursion."""
    betas = schedule.betas
    mean, variance = oracle.marginal(betas, MEAN, DEVIATION, len(betas) - 1)
    for t in reversed(range(len(betas))):
        center, spread = oracle.marginal(betas, MEAN, DEVIATION, t)
        x_t = np.array([[0.0], [1.0]])
        noise = (x_t - center) * np.sqrt(1 - oracle.alpha_bar(betas, t)) / spread
        at_0, at_1 = oracle.ddim_update(betas, np.concatenate([noise, noise], -1), x_t, t, 0.0, eta)[:, 0]
        offset, slope = at_0, at_1 - at_0
        mean, variance = offset + slope * mean, slope**2 * variance + oracle.ddim_sigma(betas, t, eta) ** 2
    return mean, np.sqrt(variance)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_ddim_reproduces_the_target(eta):
    schedule = respace(FULL, 250)
    x_0 = ddim(target_denoise(schedule), schedule, noisiest_draws(), jax.random.key(0), eta=eta)
    mean, deviation = ddim_moments(schedule, eta)
    assert_moments(x_0, mean, deviation)
    assert_moments(x_0, MEAN, DEVIATION, bias=DDIM_BIAS)


# Keys, short schedules, dtypes, errors


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim-1"])
def test_the_key_decides(name):
    sampler, _, options = UPDATES[name]
    run = jax.jit(lambda key: sampler(smooth_denoise, respace(FULL, 4), normal(0), key, **options))
    x_0 = run(jax.random.key(0))
    np.testing.assert_array_equal(x_0, run(jax.random.key(0)))
    is_deterministic = name == "ddim"
    assert np.array_equal(x_0, run(jax.random.key(1))) == is_deterministic


def test_deterministic_ddim_needs_no_key():
    schedule = respace(FULL, 4)
    x_0 = ddim(smooth_denoise, schedule, normal(0))
    np.testing.assert_array_equal(x_0, ddim(smooth_denoise, schedule, normal(0), jax.random.key(3)))


@pytest.mark.parametrize(
    "name, schedule",
    [("ddpm", respace(FULL, 1)), ("ddim", respace(FULL, 1)), ("ddim-1", cosine_schedule(1))],
    ids=["ddpm-respaced", "ddim-respaced", "ddim-1-T=1"],
)
def test_one_step_returns_the_predicted_data(name, schedule):
    sampler, _, options = UPDATES[name]
    x_T = normal(0)
    output = smooth_denoise(x_T, jnp.full(SHAPE[:1], schedule.timesteps[0]))
    predict = functools.partial(oracle.p_mean_variance, schedule.betas, t=0)
    _, _, expected, _ = predict(output, np.asarray(x_T, np.float64))
    x_0 = sampler(smooth_denoise, schedule, x_T, jax.random.key(0), **options)
    np.testing.assert_allclose(x_0, expected, rtol=0, atol=UPDATE_RTOL * np.abs(expected).max())


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_samples_are_float32_whatever_the_model_computes_in(sampler):
    def denoise(x_t, t):
        return smooth_denoise(x_t, t).astype(jnp.bfloat16)

    x_0 = sampler(denoise, respace(FULL, 4), normal(0).astype(jnp.bfloat16), jax.random.key(0))
    assert x_0.dtype == jnp.float32
    assert np.isfinite(x_0).all()


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_an_output_of_another_width_is_refused(sampler):
    with pytest.raises(ValueError, match="returns 4 channels for 2 of input, got 2"):
        sampler(lambda x_t, t: x_t, respace(FULL, 4), normal(0), jax.random.key(0))


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_ddim_refuses_an_eta_outside_0_to_1(eta):
    with pytest.raises(ValueError, match=f"eta must be from 0 to 1, got {eta}$"):
        ddim(smooth_denoise, FULL, normal(0), jax.random.key(0), eta=eta)


def test_stochastic_ddim_refuses_to_go_without_a_key():
    with pytest.raises(ValueError, match=r"eta = 0\.5 .* needs a key"):
        ddim(smooth_denoise, FULL, normal(0), eta=0.5)
