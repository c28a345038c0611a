"""Euler's method in the process's own time, for the probability flow and for a reverse SDE (SiT, arXiv 2401.08740).

With the velocity alpha' x_0 + sigma' noise and the score -noise / sigma, the solutions of

    dx = (alpha' x_0 + sigma' noise + 1/2 w noise / sigma) dt + sqrt(w) dW,    backwards in time,

have the marginals of the process for any w(t) >= 0 (SiT, section 2).

How this relates to DDIM: for rectified flow, whose paths are straight, the ODE's step is the same as that of
`DDIM(eta=0)`. For GVP it is not: it is what SiT's sampler does, while DDIM's is exact for a constant x_0 and noise,
and at few steps the better choice. In discrete time there are no derivatives; differences of alpha and sigma stand for
them, and the step is DDIM's again.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import numpy as np

from diffussm_jax.options import Range, check_options


class Row(NamedTuple):
    """x_s = x_t + of_x_0 x_0 + of_noise noise + deviation z."""

    t: np.ndarray
    of_x_0: np.ndarray
    of_noise: np.ndarray
    deviation: np.ndarray


@dataclasses.dataclass(frozen=True)
class Euler:
    """First order, one evaluation a step; deterministic with churn = 0.

    Attributes:
      churn: noise is replaced at this rate: w dt = churn sigma |d sigma|, for rectified flow SiT's w = churn sigma. The
        last step, to the data, adds none.

    Raises:
      ValueError: churn is negative.
    """

    churn: Annotated[float, Range(0, 100)] = 0.0

    def __post_init__(self):
        check_options(self)

    @property
    def is_stochastic(self) -> bool:
        return self.churn > 0

    def plan(self, process, times):
        t, s = times[:-1], times[1:]
        sigma_t, sigma_s = process.sigma(t), process.sigma(s)
        if process.num_steps is None:
            of_x_0, of_noise = ((s - t) * _derivative(values, t) for values in (process.alpha, process.sigma))
        else:
            of_x_0, of_noise = process.alpha(s) - process.alpha(t), sigma_s - sigma_t
        replaced = np.where(s == process.clean, 0, self.churn * (sigma_t - sigma_s))
        return Row(t, of_x_0, of_noise - replaced / 2, np.sqrt(replaced * sigma_t))

    def init(self, x_T):
        return (x_T,)

    def step(self, denoise, carry, row, key):
        (x_t,) = carry
        x_0, noise, _ = denoise(x_t, row.t)
        x_s = x_t + row.of_x_0 * x_0 + row.of_noise * noise
        if self.is_stochastic:
            x_s += row.deviation * jax.random.normal(key, x_t.shape, x_t.dtype)
        return (x_s,)


def _derivative(values, t, width=1e-4):
    """By a central difference in float64, right to 1e-8."""
    return (values(t + width) - values(t - width)) / (2 * width)
