"""Guidance, clipping and thresholding: functions that wrap a denoiser. None of them knows what the condition is.

    predict = objective.predict(apply)                                   # (x_t, t, condition) -> Prediction
    conditional = lambda x_t, t: predict(x_t, t, condition)
    denoise = guided(both(predict, condition, null), conditional, scale=1.5)
    denoise = clipped(denoise, process)                                  # or thresholded(denoise, process, 0.995)

Samplers take the result. With another model in place of the unconditional prediction it is autoguidance
(arXiv 2406.02507): `guided(pair(conditional, weaker), conditional, scale=2.0)`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffussm_jax.diffusion.objective import Denoise, Prediction
from diffussm_jax.diffusion.processes import Process, scales

_MAX_SCALE = float(jnp.finfo(jnp.float32).max)
Pair = Callable[[jax.Array, jax.Array], tuple[Prediction, Prediction]]


def both(predict: Callable[..., Prediction], condition, null) -> Pair:
    """The predictions with `condition` and with `null`, by one call of the model on a doubled batch.

    Args:
      predict: (x_t, t, condition) -> `Prediction`.
      condition: a pytree of arrays [B, ...].
      null: the same pytree for "no condition".
    """

    def evaluate(x_t, t):
        doubled = jax.tree.map(lambda *halves: jnp.concatenate(halves), (x_t, t, condition), (x_t, t, null))
        halves = jax.tree.map(lambda x: jnp.split(x, 2), predict(*doubled))
        return tuple(jax.tree.map(lambda x, i=i: x[i], halves, is_leaf=lambda x: isinstance(x, list)) for i in (0, 1))

    return evaluate


def pair(denoise_a: Denoise, denoise_b: Denoise) -> Pair:
    """The predictions of two denoisers, for autoguidance: those of the model, and of a weaker one."""
    return lambda x_t, t: (denoise_a(x_t, t), denoise_b(x_t, t))


def check_guidance(
    scale: float, interval: tuple[float, float], num_guided_channels: int | None, num_channels: int
) -> None:
    """Raises ValueError if the scale is negative or no float32, the interval empty, or there are fewer channels."""
    if not 0 <= scale <= _MAX_SCALE:
        raise ValueError(f"the guidance scale must be from 0 to {_MAX_SCALE:.3g}, got {scale}")
    is_pair = len(interval) == 2 and all(isinstance(end, int | float) for end in interval)
    if not is_pair or not interval[0] <= interval[1]:
        raise ValueError(f"the guidance interval must be (low, high) with low <= high, got {interval}")
    if num_guided_channels is not None and not 1 <= num_guided_channels <= num_channels:
        raise ValueError(
            f"num_guided_channels must be from 1 to the {num_channels} channels of x_t, got {num_guided_channels}"
        )


def guided(
    predictions: Pair,
    conditional: Denoise,
    *,
    scale: float,
    num_guided_channels: int | None = None,
    interval: tuple[float, float] = (-math.inf, math.inf),
    rescale: float = 0.0,
    process: Process | None = None,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): uncond + scale * (cond - uncond).

    x_0 and noise are combined with the same weights; the variance is the conditional one. With `rescale` (Lin et al.,
    arXiv 2305.08891, section 3.4) the standard deviation of each image's x_0 moves back to that of the conditional
    prediction, and the noise is computed anew. The paper rescales the model's output, whatever the target.

    Args:
      predictions: gives the conditional and the unconditional prediction.
      conditional: the denoiser without guidance.
      scale: 1 is no guidance, and costs no second evaluation.
      num_guided_channels: guides only the first channels, as DiT does with three; all if None.
      interval: guides where interval[0] <= t <= interval[1] (Kynkaanniemi et al., arXiv 2404.07724); elsewhere the
        model is evaluated once. All rows of a batch must have the same t.
      rescale: phi, the share of the rescaled x_0, from 0 (none) to 1.
      process: the forward process, which only `rescale` needs.

    Raises:
      ValueError: the scale is negative, the interval is empty, there are fewer channels, or `rescale` has no process.
    """
    check_guidance(scale, interval, None, 0)
    if rescale and process is None:
        raise ValueError(f"rescale = {rescale} needs the process")
    if scale == 1:
        return conditional

    def guide(x_t, t):
        C = x_t.shape[-1]
        check_guidance(scale, interval, num_guided_channels, C)
        is_guided = jnp.arange(C) < (C if num_guided_channels is None else num_guided_channels)
        cond, uncond = predictions(x_t, t)

        def combine(c, u):
            return jnp.where(is_guided, u + scale * (c - u), c)

        x_0, noise = combine(cond.x_0, uncond.x_0), combine(cond.noise, uncond.noise)
        if not rescale:
            return cond._replace(x_0=x_0, noise=noise)
        ratio = _deviation(cond.x_0[..., :num_guided_channels]) / _deviation(x_0[..., :num_guided_channels])
        x_0 = jnp.where(is_guided, (rescale * ratio + 1 - rescale) * x_0, x_0)
        return _with_x_0(cond, x_0, process, x_t, t)

    if interval[0] == -math.inf and interval[1] == math.inf:
        return guide

    def denoise(x_t, t):
        time = t.astype(jnp.float32)
        is_inside = jnp.all((time >= interval[0]) & (time <= interval[1]))
        return jax.lax.cond(is_inside, guide, conditional, x_t, t)

    return denoise


def _deviation(x: jax.Array) -> jax.Array:
    """The standard deviation within each image, not quite 0; shaped to broadcast."""
    return jnp.maximum(jnp.std(x, range(1, x.ndim), keepdims=True), 1e-6)


def _with_x_0(prediction: Prediction, x_0, process: Process, x_t, t) -> Prediction:
    """The prediction with another x_0, and with the noise that agrees with it."""
    alpha, sigma = scales(process, t, x_t.ndim)
    return prediction._replace(x_0=x_0, noise=(x_t - alpha * x_0) / sigma)


def clipped(denoise: Denoise, process: Process, low: float = -1.0, high: float = 1.0) -> Denoise:
    """Clips the predicted x_0, and computes the noise anew so that both agree. For pixels, not for latents."""

    def clip(x_t, t):
        prediction = denoise(x_t, t)
        return _with_x_0(prediction, jnp.clip(prediction.x_0, low, high), process, x_t, t)

    return clip


def thresholded(denoise: Denoise, process: Process, percentile: float) -> Denoise:
    """Dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3), against too much contrast. For pixels in [-1, 1].

    s is a percentile of |x_0| within each image, and at least 1. x_0 is clipped to [-s, s] and divided by s; the noise
    is computed anew.

    Args:
      denoise: guided already.
      process: the forward process.
      percentile: as a fraction in (0, 1], such as 0.995.

    Raises:
      ValueError: the percentile is none.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"the percentile must be a fraction above 0 and at most 1, got {percentile}")

    def threshold(x_t, t):
        prediction = denoise(x_t, t)
        x_0 = prediction.x_0
        s = jnp.quantile(jnp.abs(x_0), percentile, axis=tuple(range(1, x_0.ndim)), keepdims=True)
        s = jnp.maximum(s, 1)
        return _with_x_0(prediction, jnp.clip(x_0, -s, s) / s, process, x_t, t)

    return threshold
