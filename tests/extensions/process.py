"""A process in continuous time: alpha = cos(pi t / 2), sigma = sin(pi t / 2), up to t = 0.99."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.diffusion import Process
from diffussm_jax.options import Range
from diffussm_jax.registry import register


@dataclasses.dataclass(frozen=True)
class Trigonometric(Process):
    last: Annotated[float, Range(0.5, 0.999)] = 0.99
    clean = 0.0

    def alpha(self, t):
        return (jnp if isinstance(t, jax.Array) else np).cos(np.pi / 2 * t)

    def sigma(self, t):
        return (jnp if isinstance(t, jax.Array) else np).sin(np.pi / 2 * t)

    def draw_time(self, key, shape):
        return jax.random.uniform(key, shape, maxval=self.last)

    def times(self, num_steps):
        return np.linspace(self.last, 0.0, num_steps + 1)

    def model_time(self, t):
        return 1000 * t


register("process", "trigonometric", Trigonometric)
