"""Ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2) along any grid of times (Improved DDPM, section 4)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.diffusion.objective import p_mean_variance
from diffussm_jax.diffusion.processes import Reverse


class Row(NamedTuple):
    """Coefficients of one step from t; `is_last` where no noise is added."""

    t: np.ndarray
    reverse: Reverse
    is_last: np.ndarray


@dataclasses.dataclass(frozen=True)
class DDPM:
    """x_s ~ N(c_0 x_0 + c_t x_t, variance), with the learned variance if there is one, else the posterior's.

    The last step returns the mean. Without a learned variance samples vary too little if there are few steps.
    """

    is_stochastic = True

    def plan(self, process, times):
        return Row(times[:-1], process.reverse(times), times[1:] == process.clean)

    def init(self, x_T):
        return (x_T,)

    def step(self, denoise, carry, row, key):
        (x_t,) = carry
        mean, log_variance = p_mean_variance(row.reverse, denoise(x_t, row.t), x_t)
        noise = jax.random.normal(key, x_t.shape, x_t.dtype)
        return (mean + jnp.where(row.is_last, 0, jnp.exp(0.5 * log_variance)) * noise,)
