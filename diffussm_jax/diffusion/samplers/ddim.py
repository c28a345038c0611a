"""DDIM (Song, Meng, Ermon, arXiv 2010.02502, equation 12)."""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import numpy as np

from diffussm_jax.options import Range, check_options


class Row(NamedTuple):
    """x_s = alpha x_0 + direction noise + deviation z, from t."""

    t: np.ndarray
    alpha: np.ndarray
    direction: np.ndarray
    deviation: np.ndarray


@dataclasses.dataclass(frozen=True)
class DDIM:
    """First order; deterministic with eta = 0, as noisy as DDPM with eta = 1.

    Attributes:
      eta: share of DDPM's posterior deviation that is added as noise.

    Raises:
      ValueError: eta is not in [0, 1].
    """

    eta: Annotated[float, Range(0, 1)] = 0.0

    def __post_init__(self):
        check_options(self)

    @property
    def is_stochastic(self) -> bool:
        return self.eta > 0

    def plan(self, process, times):
        deviation = self.eta * np.sqrt(process.reverse(times).variance)
        direction = np.sqrt(np.maximum(process.sigma(times[1:]) ** 2 - deviation**2, 0))
        return Row(times[:-1], process.alpha(times[1:]), direction, deviation)

    def init(self, x_T):
        return (x_T,)

    def step(self, denoise, carry, row, key):
        (x_t,) = carry
        x_0, noise, _ = denoise(x_t, row.t)
        x_s = row.alpha * x_0 + row.direction * noise
        if self.is_stochastic:
            x_s += row.deviation * jax.random.normal(key, x_t.shape, x_t.dtype)
        return (x_s,)
