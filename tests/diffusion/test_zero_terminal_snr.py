"""Schedules that end at noise alone: all that divides by alpha elsewhere is finite and right where alpha is 0.

| quantity | against | tolerance |
|---|---|---|
| betas | algorithm 1 of arXiv 2305.08891 | 1e-12 |
| the reverse step of any grid | Bayes' rule | 1e-9 |
| MSE and VLB, float32 | float64 NumPy | 1e-5; 1e-4, or 1e-8 where the bounds of the variance all but meet |
| samplers, 6 steps, float32 | the same loop in float64 NumPy | 1e-5 of the largest value |
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import (
    DDIM,
    DDPM,
    X0,
    Drawn,
    Heun,
    Noise,
    Objective,
    V,
    Velocity,
    clipped,
    cosine_schedule,
    linear_schedule,
    sample,
    zero_terminal_snr,
)

SCHEDULES = {
    "linear": (linear_schedule, oracle.zero_terminal_snr_betas(oracle.linear_betas(1000))),
    "cosine": (cosine_schedule, oracle.zero_terminal_snr_betas(oracle.cosine_betas(1000))),
}
TARGETS = {"x_0": X0(), "v": V(), "velocity": Velocity()}
SHAPE = (3, 4, 4, 2)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_follow_the_paper(name):
    schedule, betas = SCHEDULES[name]
    process, before = schedule(has_zero_terminal_snr=True), schedule()
    np.testing.assert_allclose(process.betas, betas, rtol=1e-12)
    assert process.betas[-1] == 1
    assert (process.alpha(np.array([999]))[0], process.sigma(np.array([999]))[0]) == (0, 1)
    assert process.alpha(np.array([0]))[0] == pytest.approx(before.alpha(np.array([0]))[0], rel=1e-12)
    alphas = process.alpha(np.arange(1000))
    np.testing.assert_allclose(
        np.diff(alphas) / np.diff(before.alpha(np.arange(1000))),
        alphas[0] / (alphas[0] - before.alpha(np.array([999]))[0]),
        rtol=1e-6,
    )  # shifted and scaled


def test_one_step_has_no_such_schedule():
    with pytest.raises(ValueError, match="has_zero_terminal_snr needs num_steps of at least 2, got 1"):
        cosine_schedule(1, has_zero_terminal_snr=True)
    assert zero_terminal_snr(np.array([0.1, 0.2])).tolist() == pytest.approx([0.1, 1.0])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 50, 1000])
def test_the_reverse_step_is_bayes_rule(name, num_steps):
    schedule, betas = SCHEDULES[name]
    process = schedule(has_zero_terminal_snr=True)
    times = process.times(num_steps)
    reverse, step = process.reverse(times), oracle.ddpm_step(betas, times[:-1], times[1:])
    zeros, ones = np.zeros(num_steps), np.ones(num_steps)
    np.testing.assert_allclose(reverse.c_0, oracle.q_posterior(step, ones, zeros)[0], rtol=1e-9)
    np.testing.assert_allclose(reverse.c_t, oracle.q_posterior(step, zeros, ones)[0], rtol=1e-9)
    np.testing.assert_allclose(reverse.variance, oracle.posterior_variance(step), rtol=1e-9)
    assert all(np.isfinite(values).all() for values in reverse)


def test_the_noise_is_no_target():
    for has_learned_variance in (True, False):
        with pytest.raises(ValueError, match="target Noise divides by alpha, which is 0 at the last time of Discrete"):
            Objective(linear_schedule(has_zero_terminal_snr=True), Noise(), has_learned_variance)


@pytest.mark.parametrize("name", TARGETS)
def test_losses_and_their_gradients_are_finite_and_right(name):
    process, betas = cosine_schedule(has_zero_terminal_snr=True), SCHEDULES["cosine"][1]
    t = np.array([0, 500, 998, 999], np.int32)
    x_0, noise, error, raw = np.random.default_rng(0).normal(size=(4, 4, *SHAPE[1:])).astype(np.float32)
    step = oracle.ddpm_step(betas, t, t - 1)
    x_t, value = oracle.q_sample(step, x_0, noise), oracle.target(name, step, x_0, noise)
    output = np.concatenate([value + error / 2, raw], -1).astype(np.float32)

    @jax.jit
    def run(output):
        def loss(output):
            losses = Objective(process, TARGETS[name]).losses(lambda x_t, t: output, Drawn(x_0, jnp.asarray(t), noise))
            return losses["loss"].sum(), losses

        (_, losses), gradient = jax.value_and_grad(loss, has_aux=True)(output)
        return losses, gradient

    losses, gradient = run(output)
    np.testing.assert_allclose(losses["mse"], oracle.mse_term(output[..., :2], value), rtol=1e-5)
    vlb = oracle.mean_of_rows(oracle.vlb_elements(betas, output, x_0, x_t, t, target=name))
    np.testing.assert_allclose(losses["vlb"], vlb, rtol=1e-4, atol=1e-8)
    assert np.isfinite(gradient).all()


def oracle_sample(sampler, betas, times, x, has_clipping, noises):
    """The sampler in float64, for a model whose output v is sin(2 x_t + t / 100)."""

    def predict(x, step, t):
        x_0, noise = oracle.x_0_and_noise("v", step, np.sin(2 * x + t / 100), x)
        if has_clipping:
            x_0 = np.clip(x_0, -1, 1)
            noise = (x - step.alpha * x_0) / step.sigma
        return x_0, noise

    for i, (t, before) in enumerate(itertools.pairwise(times)):
        step = oracle.ddpm_step(betas, t, before)
        x_0, noise = predict(x, step, t)
        x_ddim = oracle.ddim_update(step, x_0, noise)
        if isinstance(sampler, DDPM):
            mean, variance = oracle.q_posterior(step, x_0, x)
            x = mean + np.sqrt(variance) * noises[len(times) - 2 - i]
        elif isinstance(sampler, Heun) and before >= 0:
            x_0_before, noise_before = predict(x_ddim, oracle.ddpm_step(betas, before, -1), before)
            x = oracle.heun_update(step, x, noise - x_0, noise_before - x_0_before)
        else:
            x = x_ddim
    return x


@pytest.mark.parametrize("has_clipping", [False, True])
def test_samplers(has_clipping):
    """The first evaluation is at noise alone."""
    process, betas = linear_schedule(has_zero_terminal_snr=True), SCHEDULES["linear"][1]
    times, x_T = process.times(6), np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    samplers = (DDPM(), DDIM(), Heun())

    def model(x_t, t):
        return jnp.sin(2 * x_t + t.astype(jnp.float32)[:, None, None, None] / 100)

    @jax.jit
    def run(x_T):
        denoise = Objective(process, V(), has_learned_variance=False).predict(model)
        denoise = clipped(denoise, process) if has_clipping else denoise
        keys = (jax.random.fold_in(jax.random.key(7), i) for i in range(6))
        noises = [jax.random.normal(key, SHAPE) for key in keys]
        return [sample(sampler, denoise, process, x_T, times, jax.random.key(7)) for sampler in samplers], noises

    found, noises = jax.device_get(run(x_T))
    for sampler, x_0 in zip(samplers, found, strict=True):
        expected = oracle_sample(sampler, betas, times, x_T.astype(np.float64), has_clipping, np.float64(noises))
        np.testing.assert_allclose(x_0, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=str(sampler))
