"""Forward processes: x_t = alpha(t) x_0 + sigma(t) noise.

    DiscreteProcess   DDPM (arXiv 2006.11239): t = 0 ... T-1, alpha^2 = alpha_bar, sigma^2 = 1 - alpha_bar
    RectifiedFlow     (arXiv 2209.03003): t in [0, 1], alpha = 1 - t, sigma = t

Times grow towards noise; `clean` is the time of the data themselves, where alpha = 1 and sigma = 0. A sampler runs
along a grid of times that decreases and ends at `clean`. Sampling in fewer steps is a coarser grid, not another
schedule.

Everything that depends on a pair of times is computed on the host in float64. In float32 the variance
1 - (alpha_t / alpha_s)^2 of neighbouring steps would be off by 4e-4.
"""

import abc
import dataclasses
import functools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.options import Range, check_options


class Reverse(NamedTuple):
    """q(x_s | x_t, x_0) for each pair t > s of a grid of times; float64 arrays [S].

    Attributes:
      c_0: factor of x_0 in the mean c_0 x_0 + c_t x_t (DDPM, equation 7).
      c_t: factor of x_t.
      variance: of q(x_s | x_t, x_0); 0 where s is `clean`.
      log_variance_min: its logarithm; where the variance is 0, that of the neighbouring pair, as in Improved DDPM.
      log_variance_max: logarithm of the variance of q(x_t | x_s), which is beta_t for s = t - 1.
    """

    c_0: np.ndarray
    c_t: np.ndarray
    variance: np.ndarray
    log_variance_min: np.ndarray
    log_variance_max: np.ndarray


class Process(abc.ABC):
    """A Gaussian forward process.

    Attributes:
      clean: the time of data.
      num_steps: T of a process in discrete time, None in continuous time.
    """

    clean: float
    num_steps: int | None = None

    @abc.abstractmethod
    def alpha(self, t):
        """Factor of x_0 at t: float64 for NumPy times, float32 for traced ones."""

    @abc.abstractmethod
    def sigma(self, t):
        """Factor of the noise at t: float64 for NumPy times, float32 for traced ones."""

    @abc.abstractmethod
    def draw_time(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Random times for training."""

    @abc.abstractmethod
    def times(self, num_steps: int) -> np.ndarray:
        """An even grid of num_steps + 1 times, decreasing, the last one `clean`."""

    def model_time(self, t: jax.Array) -> jax.Array:
        """The time that is passed to the model."""
        return t

    def prior(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """x_T, where sampling starts: standard normal."""
        return jax.random.normal(key, shape)

    def reverse(self, times: np.ndarray) -> Reverse:
        """Coefficients of q(x_s | x_t, x_0) for consecutive times t, s of a decreasing grid [S + 1]."""
        alpha, sigma_2 = self.alpha(times), self.sigma(times) ** 2
        ratio = alpha[:-1] / alpha[1:]
        beta = sigma_2[:-1] - ratio**2 * sigma_2[1:]
        variance = beta * sigma_2[1:] / sigma_2[:-1]
        positive = np.where(variance > 0, variance, np.append(beta[:1], variance[:-1]))
        return Reverse(
            c_0=alpha[1:] * beta / sigma_2[:-1],
            c_t=ratio * sigma_2[1:] / sigma_2[:-1],
            variance=variance,
            log_variance_min=np.log(positive),
            log_variance_max=np.log(beta),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteProcess(Process):
    """DDPM's process of T steps. t is 0 ... T-1, and -1 is `clean`.

    Attributes:
      betas: [T] float64 in (0, 1].

    Raises:
      ValueError: a beta lies outside (0, 1].
    """

    betas: np.ndarray
    clean = -1

    def __post_init__(self):
        if self.betas.ndim != 1 or not len(self.betas) or not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError(f"betas must be a vector in (0, 1], got {self.betas}")

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """[T] float64: the product of 1 - beta up to and including t."""
        return np.cumprod(1 - self.betas)

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma at t + 1, so that t = -1 does not wrap around."""
        return np.sqrt(np.append(1.0, self.alpha_bar)), np.sqrt(np.append(0.0, 1 - self.alpha_bar))

    def alpha(self, t):
        return _row(self._tables[0], t)

    def sigma(self, t):
        return _row(self._tables[1], t)

    def draw_time(self, key, shape):
        return jax.random.randint(key, shape, 0, self.num_steps)

    def times(self, num_steps: int) -> np.ndarray:
        """The steps that ADM's respacing keeps: the first, the last, and evenly spaced ones between; then -1.

        Raises:
          ValueError: not 1 <= num_steps <= T.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(f"num_steps must be from 1 to the process's {self.num_steps}, got {num_steps}")
        return np.append(np.round(np.linspace(self.num_steps - 1, 0, num_steps)).astype(int), self.clean)


def _row(table: np.ndarray, t):
    return jnp.asarray(table, jnp.float32)[t + 1] if isinstance(t, jax.Array) else table[np.asarray(t) + 1]


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Process):
    """Straight paths from data at t = 0 to noise at t = 1 (arXiv 2209.03003); the model sees 1000 t."""

    clean = 0.0

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def draw_time(self, key, shape):
        return jax.random.uniform(key, shape)

    def model_time(self, t):
        return 1000 * t

    def times(self, num_steps: int) -> np.ndarray:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        return np.linspace(1.0, 0.0, num_steps + 1)


def linear_schedule(num_steps: Annotated[int, Range(21, 100_000)] = 1000) -> DiscreteProcess:
    """Betas from 1e-4 to 2e-2 (DDPM, section 4), scaled by 1000 / T for other T as ADM does.

    Args:
      num_steps: T, more than 20 (below, the last beta would pass 1).

    Raises:
      ValueError: too few steps.
    """
    check_options(linear_schedule, {"num_steps": num_steps})
    scale = 1000 / num_steps
    return DiscreteProcess(np.linspace(1e-4 * scale, 2e-2 * scale, num_steps))


def cosine_schedule(num_steps: Annotated[int, Range(1, 100_000)] = 1000) -> DiscreteProcess:
    """alpha_bar(t) = cos^2(((t/T + 0.008) / 1.008) pi/2), betas at most 0.999 (Improved DDPM, equation 17).

    Raises:
      ValueError: num_steps is out of range.
    """
    check_options(cosine_schedule, {"num_steps": num_steps})
    alpha_bar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return DiscreteProcess(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))


def scales(process: Process, t: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """alpha(t) and sigma(t) in float32, shaped [B, 1, ...] to broadcast against an array of `ndim` dimensions."""

    def column(values):
        return jnp.asarray(values, jnp.float32).reshape(t.shape + (1,) * (ndim - t.ndim))

    return column(process.alpha(t)), column(process.sigma(t))


def q_sample(process: Process, x_0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t = alpha(t) x_0 + sigma(t) noise.

    Args:
      process: the forward process.
      x_0: [B, ...] float32.
      t: [B].
      noise: standard normal, as x_0.
    """
    alpha, sigma = scales(process, t, x_0.ndim)
    return alpha * x_0 + sigma * noise


def q_posterior(reverse: Reverse, x_0: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance (the clipped one) of q(x_s | x_t, x_0) (DDPM, equations 6 and 7).

    Args:
      reverse: coefficients that broadcast against x_0, such as one row as float32 scalars.
      x_0: [B, ...] float32.
      x_t: as x_0.
    """
    return reverse.c_0 * x_0 + reverse.c_t * x_t, reverse.log_variance_min
