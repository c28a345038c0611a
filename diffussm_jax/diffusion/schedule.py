"""Noise schedules, in float64 NumPy, and respacing for sampling in fewer steps."""

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """A noise schedule of S steps; everything else follows from its betas.

    Attributes:
      betas: [S] float64 in (0, 1].
      timesteps: [S] int, the time that a model is told at each step: 0 ... S-1, or after `respace` the steps kept.

    Raises:
      ValueError: a beta lies outside (0, 1], or the two lengths differ.
    """

    betas: np.ndarray
    timesteps: np.ndarray

    def __post_init__(self):
        if self.betas.ndim != 1 or not len(self.betas) or not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError(f"betas must be a vector in (0, 1], got {self.betas}")
        if self.timesteps.shape != self.betas.shape:
            raise ValueError(f"{len(self.betas)} betas but timesteps of shape {self.timesteps.shape}")

    def __len__(self) -> int:
        return len(self.betas)

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """[S]: the product of 1 - beta up to and with t; q(x_t | x_0) = N(sqrt(alpha_bar) x_0, 1 - alpha_bar)."""
        return np.cumprod(1 - self.betas)

    @functools.cached_property
    def alpha_bar_prev(self) -> np.ndarray:
        """[S]: alpha_bar at t - 1, and 1 at t = 0."""
        return np.append(1.0, self.alpha_bar[:-1])

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """[S]: the variance of q(x_{t-1} | x_t, x_0) (DDPM, equation 7); 0 at t = 0."""
        return self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """[S]: its logarithm, with t = 0 set to the value at t = 1, as in Improved DDPM."""
        clipped = np.append(self.posterior_variance[1:2], self.posterior_variance[1:])
        return np.log(clipped if len(self) > 1 else self.betas)


def linear_schedule(num_steps: int = 1000) -> Schedule:
    """Betas from 1e-4 to 2e-2 (DDPM, section 4), scaled by 1000 / T for other T as ADM does.

    Args:
      num_steps: T, more than 20 (below, the last beta would pass 1).

    Raises:
      ValueError: too few steps.
    """
    scale = 1000 / num_steps if num_steps >= 1 else math.inf
    if 0.02 * scale >= 1:
        raise ValueError(f"num_steps of a linear schedule must be more than 20, got {num_steps}")
    return Schedule(betas=np.linspace(1e-4 * scale, 2e-2 * scale, num_steps), timesteps=np.arange(num_steps))


def cosine_schedule(num_steps: int = 1000) -> Schedule:
    """alpha_bar(t) = cos^2(((t/T + 0.008) / 1.008) pi/2), betas at most 0.999 (Improved DDPM, equation 17).

    Args:
      num_steps: T, at least 1.

    Raises:
      ValueError: no steps.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    alpha_bar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return Schedule(betas=np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999), timesteps=np.arange(num_steps))


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}


def respace(schedule: Schedule, num_steps: int) -> Schedule:
    """Keeps `num_steps` of a schedule's steps, evenly spaced, the first and the last among them.

    The new betas give the same alpha_bar at the steps kept, and the model is still told the old times (Improved DDPM,
    section 4).

    Args:
      schedule: of S steps.
      num_steps: from 1 to S. With 1, the last step is kept.

    Raises:
      ValueError: not 1 <= num_steps <= S.
    """
    if not 1 <= num_steps <= len(schedule):
        raise ValueError(f"num_steps must be from 1 to the schedule's {len(schedule)}, got {num_steps}")
    kept = np.round(np.linspace(len(schedule) - 1, 0, num_steps)).astype(int)[::-1]
    alpha_bar = schedule.alpha_bar[kept]
    betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return Schedule(betas=betas, timesteps=schedule.timesteps[kept])
