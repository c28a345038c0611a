"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def classifier_free(
    model: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    y: jax.Array,
    *,
    null_label: int,
    scale: float,
    num_guided_channels: int | None = None,
    interval: tuple[float, float] = (0, math.inf),
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A `denoise(x_t, t)` whose noise is uncond + scale * (cond - uncond); the variance is the conditional one.

    Args:
      model: (x_t, t, y) -> [B, H, W, 2C].
      y: [B] int, the labels.
      null_label: the label that stands for none.
      scale: 1 is no guidance, and then costs no second evaluation.
      num_guided_channels: how many of the noise's channels are guided: all C (None), or the first three as DiT does.
      interval: guide where interval[0] <= t <= interval[1] (Kynkaanniemi et al., arXiv 2404.07724); outside, the
        model is conditional and evaluated once.

    Returns:
      denoise(x_t [B, H, W, C], t [B]) -> [B, H, W, 2C], for samplers, which give all rows of a batch the same t.

    Raises:
      ValueError: the scale is negative, the interval is empty, or more channels are to be guided than there are.
    """
    if not scale >= 0:
        raise ValueError(f"the guidance scale must not be negative, got {scale}")
    if not interval[0] <= interval[1]:
        raise ValueError(f"the guidance interval must be (low, high) with low <= high, got {interval}")

    def conditional(x_t, t):
        return model(x_t, t, y)

    def guided(x_t, t):
        C = x_t.shape[-1]
        num_guided = C if num_guided_channels is None else num_guided_channels
        if not 1 <= num_guided <= C:
            raise ValueError(f"num_guided_channels must be from 1 to the {C} channels of x_t, got {num_guided}")
        both = model(
            jnp.concatenate([x_t, x_t]),
            jnp.concatenate([t, t]),
            jnp.concatenate([y, jnp.full_like(y, null_label)]),
        )
        cond, uncond = jnp.split(both, 2)
        noise = uncond[..., :num_guided] + scale * (cond[..., :num_guided] - uncond[..., :num_guided])
        return jnp.concatenate([noise, cond[..., num_guided:]], -1)

    if scale == 1:
        return conditional
    if tuple(interval) == (0, math.inf):
        return guided

    def denoise(x_t, t):
        time = t.astype(jnp.float32)
        inside = jnp.all((time >= interval[0]) & (time <= interval[1]))
        return jax.lax.cond(inside, guided, conditional, x_t, t)

    return denoise
