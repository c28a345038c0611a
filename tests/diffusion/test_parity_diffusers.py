"""Processes and single steps agree with diffusers' DDPM and DDIM schedulers, in PyTorch.

The steps are compared on the full schedule of 1000, since diffusers spaces fewer steps in other ways. Its schedulers
derive betas from a float32 alpha_bar, which costs three digits at small t; they are given a float64 one here, so that
formulas are compared. Not compared: the learned variance at t = 0, which no sampler uses; diffusers takes 1e-20.

| quantity, float32 | against | tolerance |
|---|---|---|
| betas | diffusers, float32 | 1e-6 relative |
| mean, log variance, x_0 (of three targets) and update of each step | diffusers, float64 | 1e-5 of the largest value |
| 1000 steps of DDIM | diffusers, float64 | 1e-4 of the largest value |
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.diffusion import (
    DDIM,
    X0,
    Noise,
    Objective,
    Reverse,
    V,
    clipped,
    cosine_schedule,
    linear_schedule,
    sample,
    scaled_linear_schedule,
)
from diffussm_jax.diffusion.objective import p_mean_variance

torch = pytest.importorskip("torch", reason="parity with diffusers needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers")

BETAS_RTOL = 1e-6
STEP_RTOL = 1e-5
LOOP_RTOL = 1e-4
PROCESS = linear_schedule(1000)
TIMES = PROCESS.times(1000)
OBJECTIVE = Objective(PROCESS, Noise())
SHAPE = (2, 4, 4, 3)
LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}


def in_float64(scheduler):
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    return scheduler


def to_torch(x):
    return torch.from_numpy(np.array(x, np.float64)).permute(0, 3, 1, 2)


def to_numpy(x):
    return x.permute(0, 2, 3, 1).numpy()


def assert_close(actual, expected, rtol=STEP_RTOL, message=""):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max(), err_msg=message)


def test_linear_betas():
    scheduler = diffusers.DDPMScheduler(**LINEAR)
    np.testing.assert_allclose(PROCESS.betas, scheduler.betas.numpy(), rtol=BETAS_RTOL)


def test_scaled_linear_betas():
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, **options)
    np.testing.assert_allclose(scaled_linear_schedule(1000).betas, scheduler.betas.numpy(), rtol=BETAS_RTOL)


def test_cosine_betas():
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    np.testing.assert_allclose(cosine_schedule(1000).betas, scheduler.betas.numpy(), rtol=BETAS_RTOL)


STEPS = [0, 1, 2, 10, 500, 998, 999]


def random_step(t):
    """x_t, noise and raw variance."""
    return np.random.default_rng(t).normal(size=(3, *SHAPE)).astype(np.float32)


@functools.cache
def reverse_steps(clip_x_0):
    """Of each of STEPS: x_0, mean and log variance."""

    @jax.jit
    @jax.vmap
    def run(t, reverse, x_t, noise, raw):
        denoise = OBJECTIVE.predict(lambda x_t, t: jnp.concatenate([noise, raw], -1))
        denoise = clipped(denoise, PROCESS) if clip_x_0 else denoise
        prediction = denoise(x_t, jnp.broadcast_to(t, SHAPE[:1]))
        return prediction.x_0, *p_mean_variance(reverse, prediction, x_t)

    t = np.array(STEPS, np.int32)
    reverse = Reverse(*(values[::-1][t].astype(np.float32) for values in PROCESS.reverse(TIMES)))
    return jax.device_get(run(t, reverse, *np.stack([random_step(t) for t in STEPS], 1)))


@pytest.mark.parametrize("clip_x_0", [False, True])
@pytest.mark.parametrize("t", STEPS)
def test_ddpm_step(t, clip_x_0):
    x_t, noise, raw = random_step(t)
    output = np.concatenate([noise, raw], -1)
    x_0, mean, log_variance = (values[STEPS.index(t)] for values in reverse_steps(clip_x_0))

    scheduler = in_float64(diffusers.DDPMScheduler(**LINEAR, variance_type="learned_range", clip_sample=clip_x_0))
    step = scheduler.step(to_torch(output), t, to_torch(x_t), generator=torch.Generator().manual_seed(t))
    generator = torch.Generator().manual_seed(t)
    added = to_numpy(torch.randn(to_torch(x_t).shape, generator=generator, dtype=torch.float64))

    deviation = np.exp(0.5 * log_variance.astype(np.float64)) if t > 0 else 0
    assert_close(x_0, to_numpy(step.pred_original_sample))
    assert_close(mean + deviation * added, to_numpy(step.prev_sample))
    if t > 0:
        assert_close(log_variance, to_numpy(scheduler._get_variance(t, predicted_variance=to_torch(raw))))


PREDICTION_TYPES = {"epsilon": Noise(), "sample": X0(), "v_prediction": V()}


def test_targets():
    """x_0 of one DDIM step for each prediction type, by diffusers in float64."""

    @jax.jit
    @jax.vmap
    def run(t, x_t, output):
        t = jnp.broadcast_to(t, SHAPE[:1])
        return {name: target.predict(PROCESS, output, x_t, t)[0] for name, target in PREDICTION_TYPES.items()}

    x_t, output, _ = np.stack([random_step(t) for t in STEPS], 1)
    for name, x_0 in run(np.array(STEPS, np.int32), x_t, output).items():
        scheduler = in_float64(diffusers.DDIMScheduler(**LINEAR, clip_sample=False, prediction_type=name))
        scheduler.set_timesteps(1000)
        for i, t in enumerate(STEPS):
            step = scheduler.step(to_torch(output[i]), t, to_torch(x_t[i]))
            assert_close(x_0[i], to_numpy(step.pred_original_sample), message=f"{name}, t = {t}")


def smooth_model(x_t, t):
    angle = t.astype(jnp.float32)[:, None, None, None] / 100
    return jnp.concatenate([jnp.sin(2 * x_t + angle), jnp.cos(3 * x_t - angle)], -1)


def torch_model(x_t, t):
    return torch.sin(2 * x_t + t / 100)


@pytest.fixture
def ddim_scheduler():
    scheduler = in_float64(diffusers.DDIMScheduler(**LINEAR, clip_sample=False, set_alpha_to_one=True))
    scheduler.set_timesteps(1000)
    return scheduler


def test_each_of_1000_ddim_steps(record, ddim_scheduler):
    model, steps = record(smooth_model)
    x_T = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    x_0 = sample(DDIM(), OBJECTIVE.predict(model), PROCESS, x_T, TIMES)
    jax.effects_barrier()
    assert [time[0] for _, time, _ in steps] == ddim_scheduler.timesteps.tolist()
    after = [x_t for x_t, _, _ in steps[1:]] + [x_0]
    for (x_t, time, output), x_prev in zip(steps, after, strict=True):
        noise = to_torch(output[..., : SHAPE[-1]])
        step = ddim_scheduler.step(noise, int(time[0]), to_torch(x_t), eta=0.0)
        assert_close(x_prev, to_numpy(step.prev_sample), message=f"t = {time[0]}")


def test_the_whole_of_ddim(ddim_scheduler):
    x_T = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    x_t = to_torch(x_T)
    for t in ddim_scheduler.timesteps.tolist():
        x_t = ddim_scheduler.step(torch_model(x_t, t), t, x_t, eta=0.0).prev_sample
    x_0 = sample(DDIM(), OBJECTIVE.predict(smooth_model), PROCESS, jnp.asarray(x_T), TIMES)
    assert_close(x_0, to_numpy(x_t), LOOP_RTOL)
