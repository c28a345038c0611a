"""The training objective: what is drawn, what is compared, and how a model's output is read in sampling.

The loss is the mean squared error on the target, times a weight (`weightings`). With a learned variance (Improved DDPM,
arXiv 2102.09672, section 3.1) the model returns 2C channels. The second half is v in [-1, 1], which interpolates the
log variance of the reverse step,

    log_variance = f log_variance_max + (1 - f) log_variance_min,    f = (v + 1) / 2, not clipped,

and the variational bound is added to the loss: at t > 0 KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the
negative log likelihood of x_0 in bins of 1/127.5, in bits per dimension, with weight 1 and no factor T. Its gradient
stops at the mean, so that it trains the variance alone (Improved DDPM, section 3.4; DiT, arXiv 2212.09748,
section 3.1).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.diffusion.processes import Process, Reverse, q_posterior, q_sample, scales
from diffussm_jax.diffusion.targets import Target
from diffussm_jax.diffusion.weightings import Weighting

_MAX_SNR = 1e12


class Prediction(NamedTuple):
    """What a model says about x_t; fields [B, ..., C] float32.

    Attributes:
      x_0: the predicted data, not clipped.
      noise: the predicted noise, with x_t = alpha x_0 + sigma noise.
      variance_fraction: f above; None if the variance is not learned.
    """

    x_0: jax.Array
    noise: jax.Array
    variance_fraction: jax.Array | None = None


Denoise = Callable[[jax.Array, jax.Array], Prediction]


class Drawn(NamedTuple):
    """A training batch: data x_0 [B, ..., C] float32, times t [B], and noise, as x_0."""

    x_0: jax.Array
    t: jax.Array
    noise: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """Process, target and loss. Training and the held-out loss use the same weighting.

    Attributes:
      process: the forward process.
      target: what the model predicts.
      has_learned_variance: whether the model returns 2C channels.
      weighting: of the mean squared error, not of the variational bound; None is a weight of 1.

    Raises:
      ValueError: the variance is to be learned in continuous time, or the target divides by an alpha that reaches 0.
    """

    process: Process
    target: Target
    has_learned_variance: bool = True
    weighting: Weighting | None = None

    def __post_init__(self):
        name = type(self.process).__name__
        if self.has_learned_variance and self.process.num_steps is None:
            raise ValueError(f"a learned variance (has_learned_variance) needs a process in discrete time, got {name}")
        if self.target.divides_by_alpha and self.process.alpha(self.process.times(1))[0] == 0:
            target = type(self.target).__name__
            raise ValueError(
                f"the target {target} divides by alpha, which is 0 at the last time of {name}: of rectified flow, and "
                "of any schedule with has_zero_terminal_snr; choose target = x_0, v or velocity"
            )

    def num_output_channels(self, num_channels: int) -> int:
        """Channels that the model returns for data of `num_channels`."""
        return 2 * num_channels if self.has_learned_variance else num_channels

    def draw(self, t_key: jax.Array, noise_key: jax.Array, x_0: jax.Array) -> Drawn:
        """Draws times and noise for a whole batch x_0."""
        t = self.process.draw_time(t_key, x_0.shape[:1])
        return Drawn(x_0, t, jax.random.normal(noise_key, x_0.shape, x_0.dtype))

    def _split(self, output: jax.Array, num_channels: int) -> tuple[jax.Array, jax.Array | None]:
        """Target and raw variance in float32."""
        expected = self.num_output_channels(num_channels)
        if output.shape[-1] != expected:
            raise ValueError(
                f"the model must return {expected} channels for {num_channels} of input"
                f"{' (learned variance)' if self.has_learned_variance else ''}, got {output.shape[-1]}"
            )
        output = output.astype(jnp.float32)
        return tuple(jnp.split(output, 2, -1)) if self.has_learned_variance else (output, None)

    def _prediction(self, target, raw_variance, x_t, t) -> Prediction:
        x_0, noise = self.target.predict(self.process, target, x_t, t)
        return Prediction(x_0, noise, None if raw_variance is None else (raw_variance + 1) / 2)

    def predict(self, apply: Callable[..., jax.Array]) -> Callable[..., Prediction]:
        """The model as a function (x_t, t, *condition) -> `Prediction`, from apply(x_t, time, *condition) -> output."""

        def predict(x_t, t, *condition):
            output = apply(x_t, self.process.model_time(t), *condition)
            return self._prediction(*self._split(output, x_t.shape[-1]), x_t, t)

        return predict

    @functools.cached_property
    def _reverse(self) -> Reverse:
        """The reverse step from each t = 0 ... T-1 to t - 1."""
        reverse = self.process.reverse(self.process.times(self.process.num_steps))
        return Reverse(*(values[::-1] for values in reverse))

    def weight(self, t: jax.Array) -> jax.Array:
        """Weights [B] of the mean squared error at times t [B].

        An error e of the target is an error c e of the predicted x_0, whose weight is that of `weighting`.
        """
        if self.weighting is None:
            return jnp.ones(t.shape)
        c, _ = self.target.predict(self.process, jnp.ones(t.shape), jnp.zeros(t.shape), t)
        alpha, sigma = scales(self.process, t, 1)
        return c**2 * self.weighting(jnp.minimum((alpha / sigma) ** 2, _MAX_SNR))

    def losses(self, apply: Callable[[jax.Array, jax.Array], jax.Array], drawn: Drawn) -> dict[str, jax.Array]:
        """The loss of each example.

        Args:
          apply: (x_t, time) -> the model's output [B, ..., C or 2C].
          drawn: the batch.

        Returns:
          "loss" and "mse", and with a learned variance "vlb", each [B] float32; loss = weight mse + vlb.

        Raises:
          ValueError: the output has another number of channels.
        """
        x_0, t, noise = drawn
        x_t = q_sample(self.process, x_0, t, noise)
        predicted, raw_variance = self._split(apply(x_t, self.process.model_time(t)), x_0.shape[-1])
        target = self.target.make(self.process, x_0, noise, t)
        mse = jnp.mean((target - predicted) ** 2, range(1, x_0.ndim))
        loss = mse if self.weighting is None else self.weight(t) * mse
        if raw_variance is None:
            return {"loss": loss, "mse": mse}
        frozen = self._prediction(jax.lax.stop_gradient(predicted), raw_variance, x_t, t)
        vlb = self._variational_bound(frozen, x_0, x_t, t)
        return {"loss": loss + vlb, "mse": mse, "vlb": vlb}

    def _variational_bound(self, prediction: Prediction, x_0, x_t, t) -> jax.Array:
        def at_t(values):
            return jnp.asarray(values, jnp.float32)[t].reshape(t.shape + (1,) * (x_0.ndim - 1))

        reverse = Reverse(*map(at_t, self._reverse))
        mean, log_variance = p_mean_variance(reverse, prediction, x_t)
        q_mean, q_log_variance = q_posterior(reverse, x_0, x_t)
        kl = normal_kl(q_mean, q_log_variance, mean, log_variance)
        nll = -discretized_gaussian_log_likelihood(x_0, mean, log_variance)
        axes = tuple(range(1, x_0.ndim))
        return jnp.where(t == 0, jnp.mean(nll, axes), jnp.mean(kl, axes)) / np.float32(np.log(2))


def p_mean_variance(reverse: Reverse, prediction: Prediction, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance of the learned reverse step p(x_s | x_t) (Improved DDPM, equation 15).

    Without a learned variance the log variance is `reverse.log_variance_min`.

    Args:
      reverse: coefficients that broadcast against x_t.
      prediction: at x_t.
      x_t: [B, ..., C] float32.
    """
    mean, log_variance = q_posterior(reverse, prediction.x_0, x_t)
    fraction = prediction.variance_fraction
    if fraction is not None:
        log_variance = fraction * reverse.log_variance_max + (1 - fraction) * reverse.log_variance_min
    return mean, log_variance


def normal_kl(mean_q: jax.Array, log_variance_q: jax.Array, mean_p: jax.Array, log_variance_p: jax.Array) -> jax.Array:
    """KL(q || p) of two diagonal Gaussians, elementwise, in nats."""
    return 0.5 * (
        log_variance_p
        - log_variance_q
        + jnp.exp(log_variance_q - log_variance_p)
        + (mean_q - mean_p) ** 2 * jnp.exp(-log_variance_p)
        - 1
    )


def discretized_gaussian_log_likelihood(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """log of a Gaussian's mass in the bin x +- 1/255 (DDPM, equation 13), elementwise, in nats.

    x is 8-bit data scaled to [-1, 1]; the bins of -1 and 1 reach to infinity, and the mass is at least 1e-12. As in
    ADM and DiT the normal distribution function is approximated, 0.5 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))), to
    within 2e-4.
    """

    def distribution(z):
        return 0.5 * (1 + jnp.tanh(np.float32(np.sqrt(2 / np.pi)) * (z + 0.044715 * z**3)))

    inverse_deviation = jnp.exp(-0.5 * log_variance)
    upper = distribution((x - mean + 1 / 255) * inverse_deviation)
    lower = distribution((x - mean - 1 / 255) * inverse_deviation)
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))
