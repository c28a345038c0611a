"""A sampler: the two-step Adams-Bashforth method on the ODE of `diffusion.samplers.heun`."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffussm_jax.registry import register


class Row(NamedTuple):
    t: np.ndarray
    scale_t: np.ndarray
    scale_s: np.ndarray
    of_now: np.ndarray  # weights of the velocity at t, and of the one before it
    of_before: np.ndarray


@dataclasses.dataclass(frozen=True)
class AdamsBashforth:
    is_stochastic = False

    def plan(self, process, times):
        scale = process.alpha(times) + process.sigma(times)
        step = np.diff(process.sigma(times) / scale)
        ratio = np.append(0.0, step[1:] / step[:-1])  # the first step is Euler's
        return Row(times[:-1], scale[:-1], scale[1:], step * (1 + ratio / 2), -step * ratio / 2)

    def init(self, x_T):
        return x_T, jnp.zeros_like(x_T)

    def step(self, denoise, carry, row, key):
        x_t, before = carry
        x_0, noise, _ = denoise(x_t, row.t)
        now = noise - x_0
        return row.scale_s * (x_t / row.scale_t + row.of_now * now + row.of_before * before), now


register("sampler", "adams_bashforth", AdamsBashforth)
