"""Samplers: from x_T ~ N(0, I) to x_0, each one `lax.scan` over a `denoise(x_t, t)` callable.

`denoise` takes x_t [B, H, W, C] and the time t [B] int (of `schedule.timesteps`), and returns what a learned-range
model returns, [B, H, W, 2C]. A sampler knows nothing else of the model; guidance is part of `denoise` (guidance.py).
Fewer steps than the model was trained with are a matter of the schedule: pass `respace(schedule, num_steps)`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.diffusion.gaussian import Prediction, p_mean_variance
from diffussm_jax.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def _sample_loop(
    denoise: Denoise,
    schedule: Schedule,
    x_T: jax.Array,
    key: jax.Array,
    clip_x_0: bool,
    update: Callable[[Prediction, jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Runs x <- update(prediction, x, step, noise) from the schedule's last step to its first."""
    timesteps = jnp.asarray(schedule.timesteps, jnp.int32)

    def body(x_t, step):
        batch = jnp.broadcast_to(step, x_t.shape[:1])
        output = denoise(x_t, timesteps[batch])
        prediction = p_mean_variance(schedule, output, x_t, batch, clip_x_0=clip_x_0)
        noise = jax.random.normal(jax.random.fold_in(key, step), x_t.shape, x_t.dtype)
        return update(prediction, x_t, step, noise), None

    x_0, _ = jax.lax.scan(body, x_T.astype(jnp.float32), jnp.arange(len(schedule), dtype=jnp.int32), reverse=True)
    return x_0


def ddpm(denoise: Denoise, schedule: Schedule, x_T: jax.Array, key: jax.Array, *, clip_x_0: bool = False) -> jax.Array:
    """Ancestral sampling with the learned variance (DDPM, arXiv 2006.11239, algorithm 2).

    Args:
      denoise: (x_t, t) -> [B, H, W, 2C].
      schedule: of S steps.
      x_T: [B, H, W, C], standard normal.
      key: the PRNG key of the noise that is added at each step.
      clip_x_0: whether to clip the predicted data to [-1, 1] at each step.

    Returns:
      x_0 [B, H, W, C] float32: the mean of the last step, no noise added.

    Raises:
      ValueError: `denoise` does not return 2C channels.
    """

    def update(prediction, x_t, step, noise):
        deviation = jnp.exp(0.5 * prediction.log_variance)
        return prediction.mean + jnp.where(step > 0, deviation, 0) * noise

    return _sample_loop(denoise, schedule, x_T, key, clip_x_0, update)


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    x_T: jax.Array,
    key: jax.Array | None = None,
    *,
    eta: float = 0.0,
    clip_x_0: bool = False,
) -> jax.Array:
    """DDIM (arXiv 2010.02502, equation 12): deterministic with eta = 0, as noisy as DDPM with eta = 1.

    Args:
      denoise: (x_t, t) -> [B, H, W, 2C]; of its output only the noise is used.
      schedule: of S steps.
      x_T: [B, H, W, C], standard normal.
      key: the PRNG key of the added noise; needed only if eta > 0.
      eta: from 0 to 1.
      clip_x_0: whether to clip the predicted data to [-1, 1] at each step.

    Returns:
      x_0 [B, H, W, C] float32.

    Raises:
      ValueError: eta is not in [0, 1], or is positive without a key; or `denoise` does not return 2C channels.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")
    if eta > 0 and key is None:
        raise ValueError(f"eta = {eta} adds noise, and needs a key")
    sigma = eta * np.sqrt(schedule.posterior_variance)
    signal_scale = jnp.asarray(np.sqrt(schedule.alpha_bar_prev), jnp.float32)
    noise_scale = jnp.asarray(np.sqrt(np.maximum(1 - schedule.alpha_bar_prev - sigma**2, 0)), jnp.float32)
    sigma = jnp.asarray(sigma, jnp.float32)

    def update(prediction, x_t, step, noise):
        x_prev = signal_scale[step] * prediction.x_0 + noise_scale[step] * prediction.noise
        return x_prev + sigma[step] * noise if eta > 0 else x_prev

    return _sample_loop(denoise, schedule, x_T, jax.random.key(0) if key is None else key, clip_x_0, update)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}
