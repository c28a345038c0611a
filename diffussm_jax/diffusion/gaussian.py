"""The forward process q, the learned reverse process p, and the training loss.

    q(x_t | x_0)          = N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I)                       DDPM, equation 4
    q(x_{t-1} | x_t, x_0) = N(c_0 x_0 + c_t x_t, posterior_variance I)                       DDPM, equations 6 and 7
    p(x_{t-1} | x_t)      = N(c_0 x_0^ + c_t x_t, exp(v log beta + (1 - v) log posterior_variance))
                                                                                Improved DDPM, equation 15

with x_0^ from the predicted noise, and v in [0, 1] from the model's second half (range [-1, 1] mapped there, not
clipped). Times `t` are indices into the schedule; the model is told `schedule.timesteps[t]`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.diffusion.schedule import Schedule


class Prediction(NamedTuple):
    """What a model's output says of one reverse step; every field [B, H, W, C] float32.

    Attributes:
      mean: of p(x_{t-1} | x_t).
      log_variance: its log variance.
      x_0: the predicted data.
      noise: the predicted noise, in agreement with `x_0` also where that was clipped.
    """

    mean: jax.Array
    log_variance: jax.Array
    x_0: jax.Array
    noise: jax.Array


def _at(values: np.ndarray, t: jax.Array, ndim: int) -> jax.Array:
    """values[t] in float32, shaped [B, 1, ...] to meet an array of `ndim` dimensions."""
    return jnp.asarray(values, jnp.float32)[t].reshape(t.shape + (1,) * (ndim - t.ndim))


def q_sample(schedule: Schedule, x_0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.

    Args:
      schedule: of S steps.
      x_0: [B, ...] float32.
      t: [B] int in 0 ... S-1.
      noise: standard normal, as x_0.

    Returns:
      x_t, as x_0.
    """
    signal = _at(np.sqrt(schedule.alpha_bar), t, x_0.ndim)
    return signal * x_0 + _at(np.sqrt(1 - schedule.alpha_bar), t, x_0.ndim) * noise


def q_posterior(schedule: Schedule, x_0: jax.Array, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and log variance of q(x_{t-1} | x_t, x_0) (DDPM, equations 6 and 7).

    Args:
      schedule: of S steps.
      x_0: [B, ...] float32.
      x_t: as x_0.
      t: [B] int.

    Returns:
      mean, as x_0; log variance, to broadcast against it. At t = 0, where the variance is 0, that of t = 1 stands.
    """
    alpha_bar, alpha_bar_prev = schedule.alpha_bar, schedule.alpha_bar_prev
    c_0 = np.sqrt(alpha_bar_prev) * schedule.betas / (1 - alpha_bar)
    c_t = np.sqrt(1 - schedule.betas) * (1 - alpha_bar_prev) / (1 - alpha_bar)
    mean = _at(c_0, t, x_0.ndim) * x_0 + _at(c_t, t, x_0.ndim) * x_t
    return mean, _at(schedule.posterior_log_variance, t, x_0.ndim)


def split_output(output: jax.Array, num_channels: int) -> tuple[jax.Array, jax.Array]:
    """A model's [..., 2C] output as noise and raw variance, each [..., C] float32; ValueError for another width."""
    if output.shape[-1] != 2 * num_channels:
        raise ValueError(
            f"a learned-range model returns {2 * num_channels} channels for {num_channels} of input, "
            f"got {output.shape[-1]}"
        )
    noise, raw_variance = jnp.split(output.astype(jnp.float32), 2, -1)
    return noise, raw_variance


def p_mean_variance(
    schedule: Schedule, output: jax.Array, x_t: jax.Array, t: jax.Array, *, clip_x_0: bool = False
) -> Prediction:
    """The reverse step that a learned-range model's output describes (Improved DDPM, section 3.1).

    Args:
      schedule: of S steps.
      output: [B, H, W, 2C], of the model at (x_t, schedule.timesteps[t]).
      x_t: [B, H, W, C] float32.
      t: [B] int.
      clip_x_0: whether to clip the predicted data to [-1, 1]: in pixel space, never on latents.

    Returns:
      A `Prediction`.

    Raises:
      ValueError: the output does not have 2C channels.
    """
    noise, raw_variance = split_output(output, x_t.shape[-1])
    signal_scale = _at(np.sqrt(schedule.alpha_bar), t, x_t.ndim)
    noise_scale = _at(np.sqrt(1 - schedule.alpha_bar), t, x_t.ndim)
    x_0 = (x_t - noise_scale * noise) / signal_scale
    if clip_x_0:
        x_0 = jnp.clip(x_0, -1, 1)
        noise = (x_t - signal_scale * x_0) / noise_scale
    mean, log_variance_min = q_posterior(schedule, x_0, x_t, t)
    log_variance_max = _at(np.log(schedule.betas), t, x_t.ndim)
    fraction = (raw_variance + 1) / 2
    log_variance = fraction * log_variance_max + (1 - fraction) * log_variance_min
    return Prediction(mean, log_variance, x_0, noise)


def training_losses(
    schedule: Schedule,
    model: Callable[[jax.Array, jax.Array], jax.Array],
    x_0: jax.Array,
    t: jax.Array,
    noise: jax.Array,
) -> dict[str, jax.Array]:
    """The hybrid loss of learned-range diffusion as DiT trains it: MSE on the noise plus the VLB term at t.

    The VLB term is in bits per dimension, with weight 1 and no factor T, and sees the mean through a stopped
    gradient, so that it trains the variance alone (Improved DDPM, section 3.4; DiT, arXiv 2212.09748, section 3.1).
    For t > 0 it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0 the negative log likelihood of x_0 under
    the Gaussian integrated over bins of width 2/255, the outermost open, on latents too, as in ADM and DiT. x_0 is
    not clipped here.

    Args:
      schedule: of S steps.
      model: (x_t, time) -> [B, H, W, 2C]; time is [B] int, of `schedule.timesteps`.
      x_0: [B, H, W, C] float32.
      t: [B] int.
      noise: standard normal, as x_0.

    Returns:
      "loss", "mse" and "vlb", each [B] float32, means over H, W, C; loss = mse + vlb.

    Raises:
      ValueError: the model does not return 2C channels.
    """
    x_t = q_sample(schedule, x_0, t, noise)
    output = model(x_t, jnp.asarray(schedule.timesteps)[t])
    predicted_noise, raw_variance = split_output(output, x_0.shape[-1])
    frozen_mean = jnp.concatenate([jax.lax.stop_gradient(predicted_noise), raw_variance], -1)
    p = p_mean_variance(schedule, frozen_mean, x_t, t)
    q_mean, q_log_variance = q_posterior(schedule, x_0, x_t, t)
    kl = normal_kl(q_mean, q_log_variance, p.mean, p.log_variance)
    nll = -discretized_gaussian_log_likelihood(x_0, p.mean, p.log_variance)
    image_axes = tuple(range(1, x_0.ndim))
    mse = jnp.mean((noise - predicted_noise) ** 2, image_axes)
    vlb = jnp.where(t == 0, jnp.mean(nll, image_axes), jnp.mean(kl, image_axes)) / np.float32(np.log(2))
    return {"loss": mse + vlb, "mse": mse, "vlb": vlb}


def normal_kl(mean_q: jax.Array, log_variance_q: jax.Array, mean_p: jax.Array, log_variance_p: jax.Array) -> jax.Array:
    """KL(q || p) of two diagonal Gaussians, element by element, in nats."""
    return 0.5 * (
        log_variance_p
        - log_variance_q
        + jnp.exp(log_variance_q - log_variance_p)
        + (mean_q - mean_p) ** 2 * jnp.exp(-log_variance_p)
        - 1
    )


def discretized_gaussian_log_likelihood(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """log of a Gaussian's mass in the bin x +- 1/255 (DDPM, equation 13), element by element, in nats.

    x is 8-bit data scaled to [-1, 1]; the bins of -1 and 1 reach to infinity, and no mass counts less than 1e-12. As
    in ADM and DiT the normal distribution function is approximated, 0.5 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))), to
    within 2e-4.
    """

    def distribution(z):
        return 0.5 * (1 + jnp.tanh(np.float32(np.sqrt(2 / np.pi)) * (z + 0.044715 * z**3)))

    inverse_deviation = jnp.exp(-0.5 * log_variance)
    upper = distribution((x - mean + 1 / 255) * inverse_deviation)
    lower = distribution((x - mean - 1 / 255) * inverse_deviation)
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))
