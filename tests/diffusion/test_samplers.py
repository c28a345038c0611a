"""The samplers make the updates of the papers, converge at the order of the method, and reproduce a known target.

The target is N(MEAN, DEVIATION^2) in every pixel; its denoiser, reverse variance and probability flow are known.

| quantity, float32 | against | tolerance |
|---|---|---|
| one update | float64 NumPy | 1e-5 of the largest x_t, or of 1 |
| DDIM (eta = 0) and Heun | the probability flow | error falls with a fitted slope of 0.85 to 1.15, 1.85 to 2.15 |
| DDPM with the optimal variance | moments of the target | 5 standard errors |
| DDIM with eta = 0.5, 1; DDPM of rectified flow | moments by the recursion of its updates | 5 standard errors |
| DDIM with eta = 0.5, 1 | moments of the target | 5 standard errors and 0.02, the bias of 250 steps |
| samples with guidance, clipping and added noise | the code before targets and processes | 1e-6 of the largest value |
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import (
    DDIM,
    DDPM,
    X0,
    Heun,
    Noise,
    Objective,
    Prediction,
    RectifiedFlow,
    V,
    Velocity,
    both,
    clipped,
    cosine_schedule,
    guided,
    linear_schedule,
    sample,
)

UPDATE_RTOL = 1e-5
OLD_RTOL = 1e-6
STANDARD_ERRORS = 5
DDIM_BIAS = 0.02
ORDER_TOLERANCE = 0.15

MEAN, DEVIATION = 0.4, 0.6
FULL = linear_schedule(1000)
FLOW = RectifiedFlow()
SHAPE = (3, 8, 8, 2)
SAMPLERS = {"ddpm": DDPM(), "ddim": DDIM(), "ddim-0.5": DDIM(0.5), "ddim-1": DDIM(1.0), "heun": Heun()}
TARGETS = {"noise": Noise(), "x_0": X0(), "v": V(), "velocity": Velocity()}
# For programs whose accuracy is of no interest, or has been measured in others.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def column(values, x):
    return values.reshape(values.shape + (1,) * (x.ndim - 1))


def smooth_model(x_t, t, has_learned_variance=True):
    """Some output that depends on everything that a model is given."""
    angle = column(t.astype(jnp.float32), x_t) / 100
    output = jnp.sin(2 * x_t + angle)
    return jnp.concatenate([output, jnp.cos(3 * x_t - angle)], -1) if has_learned_variance else output


def smooth_denoise(process):
    return Objective(process, Noise()).predict(smooth_model)


def steps_of(process, times):
    """The oracle's `Step` of each pair of times, noisiest first."""
    if process.num_steps is None:
        steps = oracle.flow_step(times[:-1], times[1:])
    else:
        steps = oracle.ddpm_step(process.betas, times[:-1], times[1:])
    return [oracle.Step(*values) for values in zip(*steps, strict=True)]


def target_denoise(process, fraction=None):
    """E[x_0 | x_t] and E[noise | x_t] for the target, and a variance fraction [T]; x_t [B, ..., C]."""
    if process.num_steps is not None:
        alpha_bar = oracle.alpha_bar(process.betas, np.arange(process.num_steps))
        alphas, sigmas = (jnp.asarray(np.sqrt(values), jnp.float32) for values in (alpha_bar, 1 - alpha_bar))

    def denoise(x_t, t):
        alpha, sigma = (1 - t, t) if process.num_steps is None else (alphas[t], sigmas[t])
        x_0, noise = oracle_prediction(column(alpha, x_t), column(sigma, x_t), x_t)
        return Prediction(x_0, noise, None if fraction is None else column(fraction[t], x_t))

    def oracle_prediction(alpha, sigma, x_t):
        return oracle.optimal_prediction(alpha, sigma, MEAN, DEVIATION, x_t)

    return denoise


def noisiest_draws(process=FULL):
    """Many pixels of the target's marginal at the last step: N(0, 1) up to the schedule's rest of signal."""
    step = steps_of(process, process.times(1))[0]
    mean, variance = oracle.marginal(step.alpha, step.sigma, MEAN, DEVIATION)
    return (mean + np.sqrt(variance) * normal(2, (32, 64, 64, 1))).astype(np.float32)


def assert_moments(x, mean, deviation, bias=0.0):
    x = np.asarray(x, np.float64)
    standard_error = deviation / np.sqrt(x.size)
    assert x.mean() == pytest.approx(mean, abs=STANDARD_ERRORS * standard_error + bias)
    assert x.std() == pytest.approx(deviation, abs=STANDARD_ERRORS * standard_error / np.sqrt(2) + bias)


# Single updates


class Update(NamedTuple):
    sampler: Any
    process: Any
    num_steps: int
    target: str = "noise"
    has_learned_variance: bool = True
    clip_x_0: bool = False


UPDATES = {f"{name}-linear": Update(sampler, FULL, 6) for name, sampler in SAMPLERS.items()}
UPDATES |= {
    f"{name}-cosine-clipped": Update(SAMPLERS[name], cosine_schedule(6), 6, clip_x_0=True) for name in ("ddpm", "ddim")
}
UPDATES |= {f"{name}-flow": Update(SAMPLERS[name], FLOW, 6, "velocity", False) for name in ("ddpm", "ddim-0.5", "heun")}
MEASURED_AS_OPTIMIZED = {"ddpm-linear", "ddim-linear", "heun-linear", "heun-flow"}
UPDATES["ddpm-fixed-variance"] = Update(DDPM(), FULL, 6, "v", False)
UPDATES["ddpm-v"] = Update(DDPM(), FULL, 6, "v")


def oracle_update(case, step, output, x_t, noise):
    """x_before in float64, of the model's output in float32."""
    output, x_t = oracle.float64(output, x_t)
    variance = oracle.posterior_variance(step)
    if not case.has_learned_variance:  # a raw variance of -1 is the lower bound
        output = np.concatenate([output, np.full_like(output, -1)], -1)
    is_last = variance == 0
    bounds = (step.beta, step.beta) if is_last else (variance, step.beta)
    options = {"target": case.target, "clip_x_0": case.clip_x_0}
    mean, log_variance, x_0, predicted = oracle.p_mean_variance(step, bounds, output, x_t, **options)
    if isinstance(case.sampler, DDPM):
        return mean if is_last else mean + np.exp(log_variance / 2) * noise
    return oracle.ddim_update(step, x_0, predicted, noise, getattr(case.sampler, "eta", 0.0))


@functools.cache
def noises_by_steps_left(num_steps):
    @quick_jit
    @jax.vmap
    def draw(steps_left):
        return jax.random.normal(jax.random.fold_in(jax.random.key(7), steps_left), SHAPE)

    return np.asarray(draw(np.arange(num_steps, dtype=np.int32)), np.float64)


@pytest.mark.parametrize("name", UPDATES)
def test_every_update_is_that_of_the_paper(record, name):
    """With the noise of each step, which is drawn by the key folded with the number of steps left."""
    case = UPDATES[name]
    process, times = case.process, case.process.times(case.num_steps)
    model, calls = record(functools.partial(smooth_model, has_learned_variance=case.has_learned_variance))
    denoise = Objective(process, TARGETS[case.target], case.has_learned_variance).predict(model)

    def run(x_T):
        run_denoise = clipped(denoise, process) if case.clip_x_0 else denoise
        return sample(case.sampler, run_denoise, process, x_T, times, jax.random.key(7))

    jit = jax.jit if name in MEASURED_AS_OPTIMIZED else quick_jit
    x_0, noises = jit(run)(normal(0)), noises_by_steps_left(6)
    jax.effects_barrier()
    x_T, _, _ = calls[0]
    np.testing.assert_array_equal(x_T, normal(0))
    is_heun = isinstance(case.sampler, Heun)
    assert len(calls) == (2 * case.num_steps - 1 if is_heun else case.num_steps)
    firsts = calls[::2] if is_heun else calls
    after = [x_t for x_t, _, _ in firsts[1:]] + [np.asarray(x_0)]
    scale = 1000 if process is FLOW else 1
    for i, step in enumerate(steps_of(process, times)):
        x_t, time, output = firsts[i]
        assert_close = functools.partial(
            np.testing.assert_allclose, rtol=0, atol=UPDATE_RTOL * max(np.abs(x_t).max(), 1), err_msg=f"step {i}"
        )
        np.testing.assert_allclose(time, np.full(SHAPE[0], scale * times[i]), rtol=1e-6)
        x_before = oracle_update(case, step, output, x_t, noises[case.num_steps - 1 - i])
        if is_heun and i < case.num_steps - 1:
            euler, time, output_before = calls[2 * i + 1]
            np.testing.assert_allclose(time, np.full(SHAPE[0], scale * times[i + 1]), rtol=1e-6)
            assert_close(euler, x_before)
            channels = np.s_[..., : SHAPE[-1]]
            x_0, noise = oracle.x_0_and_noise(case.target, step, output[channels], x_t)
            before = step._replace(alpha=step.alpha_before, sigma=step.sigma_before)
            x_0_before, noise_before = oracle.x_0_and_noise(case.target, before, output_before[channels], euler)
            x_before = oracle.heun_update(step, np.float64(x_t), noise - x_0, noise_before - x_0_before)
        assert_close(after[i], x_before)


# Of the code at c3000c3, before there were processes and targets, for `old_model`, 10 steps and jax.random.key(7).
OLD_SAMPLES = {
    "ddpm": [[-0.39494321, -1.0150508, -0.8813132], [1.2094071, -0.72028726, -0.59658819]],
    "ddim": [[2.3497565, 0.87925744, -0.63880938], [-1.7393278, -1.4659467, 1.0121005]],
    "ddim 0.5": [[2.0410516, -0.52731389, -0.55441511], [-0.95312262, -1.3187758, -0.3043192]],
    "ddpm cosine clipped": [[0.57494771, -0.84016973, -0.62055969], [0.84398013, -0.9522692, -0.934259]],
    "ddpm guided": [[-0.31576017, -1.0272561, -0.88131332], [1.2172259, -0.80089104, -0.59658819]],
}


def old_model(x_t, t, label):
    rest = 1 - t.astype(jnp.float32)[:, None] / 999
    noise = (1 - 0.8 * rest**2) * x_t + 0.2 * rest * jnp.sin(2 * x_t + label.astype(jnp.float32)[:, None])
    return jnp.concatenate([noise, jnp.cos(3 * x_t - rest)], -1)


def test_samples_are_those_of_the_code_before():
    x_T = (1.5 * np.cos(np.arange(6.0))).reshape(2, 3).astype(np.float32)
    label = np.array([1, 3], np.int32)

    @quick_jit
    def run(x_T):
        def draw(sampler, denoise, process=FULL):
            return sample(sampler, denoise, process, x_T, process.times(10), jax.random.key(7))

        def conditional(process):
            return lambda x_t, t: Objective(process, Noise()).predict(old_model)(x_t, t, label)

        pair = both(Objective(FULL, Noise()).predict(old_model), label, np.zeros_like(label))
        with_guidance = guided(pair, conditional(FULL), scale=1.5, num_guided_channels=2, interval=(200, 900))
        short = cosine_schedule(10)
        return {
            "ddpm": draw(DDPM(), conditional(FULL)),
            "ddim": draw(DDIM(), conditional(FULL)),
            "ddim 0.5": draw(DDIM(0.5), conditional(FULL)),
            "ddpm cosine clipped": draw(DDPM(), clipped(conditional(short), short), short),
            "ddpm guided": draw(DDPM(), with_guidance),
        }

    samples = run(x_T)
    assert samples.keys() == OLD_SAMPLES.keys()
    for name, x_0 in samples.items():
        expected = np.array(OLD_SAMPLES[name])
        np.testing.assert_allclose(x_0, expected, rtol=0, atol=OLD_RTOL * np.abs(expected).max(), err_msg=name)


# A known target: deterministic samplers


FAMILIES = {
    "linear": lambda num_steps: linear_schedule(1000),
    "linear, finer": linear_schedule,
    "cosine": lambda num_steps: cosine_schedule(1000),
    "flow": lambda num_steps: FLOW,
    # The last step, from t = 0 to the data, is Euler's. Its error is 1 / T and does not fall with the number of steps:
    # with T = 1000 it is 1e-4 of the linear schedule, where it hides the order of Heun's method.
    "linear, T = 100,000": lambda num_steps: linear_schedule(100_000),
    "cosine, T = 100,000": lambda num_steps: cosine_schedule(100_000),
}
ORDERS = [
    (DDIM(), 1, (25, 50, 100, 200), ("linear", "linear, finer", "cosine", "flow")),
    (Heun(), 2, (24, 48, 96), ("linear, T = 100,000", "cosine, T = 100,000", "flow")),
]


@pytest.mark.parametrize(
    "sampler, order, counts, family",
    [pytest.param(*row[:3], family, id=f"{row[0]}-{family}") for row in ORDERS for family in row[3]],
)
def test_order_of_convergence_to_the_probability_flow(sampler, order, counts, family):
    errors = []
    for num_steps in counts:
        process = FAMILIES[family](num_steps)
        step = steps_of(process, process.times(1))[0]
        x_T = normal(1, (4, 96))

        @quick_jit
        def run(x_T, process=process, num_steps=num_steps):
            return sample(sampler, target_denoise(process), process, x_T, process.times(num_steps))

        flow = oracle.probability_flow(step.alpha, step.sigma, MEAN, DEVIATION, np.asarray(x_T, np.float64))
        errors.append(np.sqrt(np.mean((run(x_T) - flow) ** 2)))
    measured = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert measured == pytest.approx(order, abs=ORDER_TOLERANCE), errors


@pytest.mark.parametrize("process", [FULL, FLOW], ids=["linear", "flow"])
def test_heun_evaluates_twice_a_step_but_once_in_the_last(process):
    """And never at `clean`; evaluations are counted as they run."""
    evaluated = []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: evaluated.extend(t.tolist()), t, ordered=True)
        return Prediction(x_t, x_t)

    @quick_jit
    def run(x_T):
        return [sample(Heun(), denoise, process, x_T, process.times(num_steps)) for num_steps in (1, 2, 5)]

    run(np.ones((1, 2), np.float32))
    jax.effects_barrier()
    expected = []
    for num_steps in (1, 2, 5):
        first, *others = process.times(num_steps)[:-1]
        expected += [first, *np.repeat(others, 2)]
        assert len(others) * 2 + 1 == 2 * num_steps - 1
    np.testing.assert_allclose(evaluated, expected, rtol=1e-6)
    assert process.clean not in evaluated


# A known target: stochastic samplers


def optimal_fraction(times):
    """[T]: where the exact log variance of q(x_s | x_t) lies between the bounds of the learned range, for a grid."""
    fraction = np.zeros(1000, np.float32)
    for t, step in zip(times[:-2], steps_of(FULL, times), strict=False):
        lower, upper = np.log(oracle.posterior_variance(step)), np.log(step.beta)
        fraction[t] = (np.log(oracle.optimal_reverse_variance(step, MEAN, DEVIATION)) - lower) / (upper - lower)
    return fraction


@functools.cache
def ddpm_of_target(num_steps):
    """The sampler's x_0 as a function of the fraction [T]."""

    @jax.jit
    def run(fraction):
        denoise = target_denoise(FULL, fraction)
        return sample(DDPM(), denoise, FULL, jnp.asarray(noisiest_draws()), FULL.times(num_steps), jax.random.key(0))

    return run


@pytest.mark.parametrize("num_steps", [5, 25])
def test_ddpm_with_the_optimal_variance_reproduces_the_target(num_steps):
    """Each step is then exact, so that even five of them do."""
    assert_moments(ddpm_of_target(num_steps)(optimal_fraction(FULL.times(num_steps))), MEAN, DEVIATION)


@pytest.mark.parametrize("fraction, sign", [(0, -1), (1, 1)])
def test_ddpm_with_either_bound_misses_the_targets_deviation(fraction, sign):
    """So that the test above sees the variance."""
    x_0 = np.asarray(ddpm_of_target(25)(np.full(1000, fraction, np.float32)))
    assert sign * (x_0.std() - DEVIATION) > 4 * STANDARD_ERRORS * DEVIATION / np.sqrt(2 * x_0.size)


@pytest.mark.slow
def test_stochastic_ddim_reproduces_the_target():
    times = FULL.times(250)
    steps = steps_of(FULL, times)

    @jax.jit
    def run(x_T):
        return [sample(DDIM(eta), target_denoise(FULL), FULL, x_T, times, jax.random.key(0)) for eta in (0.5, 1.0)]

    for eta, x_0 in zip((0.5, 1.0), run(noisiest_draws()), strict=True):

        def update(step, x_0, noise, x_t, eta=eta):
            return oracle.ddim_update(step, x_0, noise, eta=eta)

        added = functools.partial(oracle.ddim_deviation, eta=eta)
        assert_moments(x_0, *oracle.moments_of_sampler(steps, MEAN, DEVIATION, update, added))
        assert_moments(x_0, MEAN, DEVIATION, bias=DDIM_BIAS)


def moments_of_posterior_sampling(num_steps):
    """Of DDPM for rectified flow, which adds the posterior's variance."""

    def update(step, x_0, noise, x_t):
        return oracle.q_posterior(step, x_0, x_t)[0]

    def added(step):
        return np.sqrt(oracle.posterior_variance(step))

    return oracle.moments_of_sampler(steps_of(FLOW, FLOW.times(num_steps)), MEAN, DEVIATION, update, added)


def test_ddpm_of_rectified_flow_reproduces_the_target_as_the_steps_grow():
    counts = (10, 100)

    @jax.jit
    def run(x_T):
        key = jax.random.key(0)
        return [sample(DDPM(), target_denoise(FLOW), FLOW, x_T, FLOW.times(count), key) for count in counts]

    for x_0, count in zip(run(noisiest_draws(FLOW)), counts, strict=True):
        assert_moments(x_0, *moments_of_posterior_sampling(count))
    counts = np.array([50, 100, 200, 400])
    means, deviations = np.transpose([moments_of_posterior_sampling(count) for count in counts])
    np.testing.assert_allclose(means, MEAN, rtol=1e-12)
    measured = -np.polyfit(np.log(counts), np.log(DEVIATION - deviations), 1)[0]
    assert measured == pytest.approx(1, abs=ORDER_TOLERANCE)


# Keys, short grids, dtypes, errors


def test_the_key_decides():
    """Of stochastic samplers, and of those alone."""

    @quick_jit
    def run(x_T, seed):
        key = jax.random.key(seed)
        return {
            name: sample(sampler, smooth_denoise(FULL), FULL, x_T, FULL.times(4), key)
            for name, sampler in SAMPLERS.items()
        }

    x_0, again, other = (run(normal(0), seed) for seed in (0, 0, 1))
    for name, sampler in SAMPLERS.items():
        np.testing.assert_array_equal(x_0[name], again[name])
        assert np.array_equal(x_0[name], other[name]) != sampler.is_stochastic
    assert {name for name, sampler in SAMPLERS.items() if sampler.is_stochastic} == {"ddpm", "ddim-0.5", "ddim-1"}


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_deterministic_samplers_need_no_key(name):
    @quick_jit
    def run(x_T):
        return [sample(SAMPLERS[name], smooth_denoise(FULL), FULL, x_T, FULL.times(4), *key) for key in keys]

    keys = [(), (jax.random.key(3),)]
    without, with_key = run(normal(0))
    np.testing.assert_array_equal(without, with_key)


def test_one_step_returns_the_predicted_data():
    """For every sampler: from the last of 1000 steps, the only step of a process of one, and rectified flow's t = 1."""
    processes = [(FULL, "noise"), (cosine_schedule(1), "noise"), (FLOW, "velocity")]

    @quick_jit
    def run(x_T):
        results = []
        for process, target in processes:
            model = functools.partial(smooth_model, has_learned_variance=False)
            denoise = Objective(process, TARGETS[target], False).predict(model)
            time = jnp.full(SHAPE[:1], process.model_time(process.times(1)[0]))
            results.append(
                (
                    model(x_T, time),
                    [sample(s, denoise, process, x_T, process.times(1), jax.random.key(0)) for s in SAMPLERS.values()],
                )
            )
        return results

    for (process, target), (output, samples) in zip(processes, run(normal(0)), strict=True):
        (step,) = steps_of(process, process.times(1))
        expected, _ = oracle.x_0_and_noise(target, step, output, normal(0))
        for x_0 in samples:
            np.testing.assert_allclose(x_0, expected, rtol=0, atol=UPDATE_RTOL * np.abs(expected).max())


def test_any_decreasing_grid_to_clean_will_do():
    """One that begins late and is uneven: DDIM against the oracle."""
    for process, times in [(FULL, np.array([700, 650, 99, -1])), (FLOW, np.array([0.8, 0.7, 0.1, 0.0]))]:
        x_T = normal(3)
        x_0 = quick_jit(lambda x_T, p=process, t=times: sample(DDIM(), target_denoise(p), p, x_T, t))(x_T)
        x = x_T.astype(np.float64)
        for step in steps_of(process, times):
            x = oracle.ddim_update(step, *oracle.optimal_prediction(step.alpha, step.sigma, MEAN, DEVIATION, x))
        np.testing.assert_allclose(x_0, x, rtol=0, atol=UPDATE_RTOL * np.abs(x).max())


def test_samples_are_float32_whatever_the_model_computes_in():
    @quick_jit
    def run(x_T):
        denoise = Objective(FULL, Noise()).predict(lambda x_t, t: smooth_model(x_t, t).astype(jnp.bfloat16))
        x_T = x_T.astype(jnp.bfloat16)
        return [sample(s, denoise, FULL, x_T, FULL.times(4), jax.random.key(0)) for s in SAMPLERS.values()]

    for x_0 in run(normal(0)):
        assert x_0.dtype == jnp.float32
        assert np.isfinite(x_0).all()


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_an_output_of_another_width_is_refused(sampler):
    denoise = Objective(FULL, Noise()).predict(lambda x_t, t: x_t)
    with pytest.raises(ValueError, match="4 channels for 2 of input.*, got 2"):
        sample(sampler, denoise, FULL, jnp.asarray(normal(0)), FULL.times(4), jax.random.key(0))


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_ddim_refuses_an_eta_outside_0_to_1(eta):
    with pytest.raises(ValueError, match=f"eta must be from 0 to 1, got {eta}$"):
        DDIM(eta)


@pytest.mark.parametrize("name", ["ddpm", "ddim-0.5", "ddim-1"])
def test_stochastic_samplers_refuse_to_go_without_a_key(name):
    with pytest.raises(ValueError, match=r"DD.M\(.*needs a key"):
        sample(SAMPLERS[name], smooth_denoise(FULL), FULL, normal(0), FULL.times(4))


@pytest.mark.parametrize(
    "process, times",
    [
        (FULL, [3, 2, 0]),
        (FULL, [-1]),
        (FULL, []),
        (FULL, [3, 3, -1]),
        (FULL, [0, 3, -1]),
        (FULL, [3, -1, -1]),
        (FLOW, [1.0, 0.5, 0.01]),
        (FLOW, [1.0, np.nan, 0.0]),
        (FLOW, [1.0, 0.5, -1.0]),
    ],
)
@pytest.mark.parametrize("sampler", [DDIM(), Heun()], ids=["ddim", "heun"])
def test_times_must_decrease_to_clean(sampler, process, times):
    with pytest.raises(ValueError, match=f"times must decrease and end at {process.clean}"):
        sample(sampler, lambda x_t, t: Prediction(x_t, x_t), process, normal(0), np.array(times))
