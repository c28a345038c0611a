"""Forward processes: x_t = alpha(t) x_0 + sigma(t) noise.

    DiscreteProcess   DDPM (arXiv 2006.11239): t = 0 ... T-1, alpha^2 = alpha_bar, sigma^2 = 1 - alpha_bar
    RectifiedFlow     (arXiv 2209.03003): t in [0, 1], alpha = 1 - t, sigma = t
    GVP               (SiT, arXiv 2401.08740): t in [0, 1], alpha = cos(pi t / 2), sigma = sin(pi t / 2)

Times grow towards noise; `clean` is the time of the data themselves, where alpha = 1 and sigma = 0. A sampler runs
along a grid of times that decreases and ends at `clean`. Sampling in fewer steps is a coarser grid, not another
schedule.

Everything that depends on a pair of times is computed on the host in float64. In float32 the variance
1 - (alpha_t / alpha_s)^2 of neighbouring steps would be off by 4e-4.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.options import Choices, Range, check_options


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

    def slopes(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Derivatives of alpha and sigma at traced times, of which the target `Velocity` is made.

        In discrete time, where there is none, -1 and 1.
        """
        if self.num_steps is not None:
            return -jnp.ones(t.shape), jnp.ones(t.shape)
        return tuple(jax.jvp(values, (t,), (jnp.ones_like(t),))[1] for values in (self.alpha, self.sigma))

    def log_snr(self, t: np.ndarray) -> np.ndarray:
        """log(alpha^2 / sigma^2) of NumPy times in float64: -inf where alpha is 0, inf at `clean`."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha(t)) - np.log(self.sigma(t)))

    def time_of(self, log_snr: np.ndarray) -> np.ndarray:
        """The times with these finite log-SNRs, float64; in discrete time the nearest steps, from 0 to T - 1."""
        log_snr = np.asarray(log_snr, np.float64)
        low, high = (np.full(log_snr.shape, float(t)) for t in (self.clean, self.times(1)[0]))
        for _ in range(100):  # bisection, since the log-SNR falls with time
            middle = (low + high) / 2
            is_noisier = self.log_snr(middle) < log_snr
            low, high = np.where(is_noisier, low, middle), np.where(is_noisier, middle, high)
        return high

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

    def time_of(self, log_snr):
        steps = np.arange(self.num_steps)
        return np.round(np.interp(-np.asarray(log_snr), -self.log_snr(steps), steps)).astype(int)

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
class ContinuousProcess(Process):
    """A process from data at t = 0 to noise alone at t = 1; the model sees 1000 t.

    Attributes:
      time_distribution: of t in training; "logit_normal" draws medium times more often (Stable Diffusion 3, arXiv
        2403.03206, section 3.1): log(t / (1 - t)) is normal.
      logit_mean: of that normal distribution; a positive one moves times towards noise.
      logit_std: its standard deviation.

    Raises:
      ValueError: an option is not allowed.
    """

    time_distribution: Annotated[str, Choices(("uniform", "logit_normal"))] = "uniform"
    logit_mean: Annotated[float, Range(-10, 10)] = 0.0
    logit_std: Annotated[float, Range(1e-3, 10)] = 1.0
    clean = 0.0

    def __post_init__(self):
        check_options(self)

    def draw_time(self, key, shape):
        if self.time_distribution == "uniform":
            return jax.random.uniform(key, shape)
        return jax.nn.sigmoid(self.logit_mean + self.logit_std * jax.random.normal(key, shape))

    def model_time(self, t):
        return 1000 * t

    def times(self, num_steps: int) -> np.ndarray:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        return np.linspace(1.0, 0.0, num_steps + 1)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(ContinuousProcess):
    """Straight paths from data to noise (arXiv 2209.03003), also known as SiT's linear interpolant."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t


@dataclasses.dataclass(frozen=True)
class GVP(ContinuousProcess):
    """The generalised variance-preserving interpolant of SiT (arXiv 2401.08740)."""

    def alpha(self, t):
        return _sin(np.pi / 2 * (1 - t))  # exactly 0 at t = 1, as a cosine is not

    def sigma(self, t):
        return _sin(np.pi / 2 * t)


def _sin(angle):
    return jnp.sin(angle) if isinstance(angle, jax.Array) else np.sin(angle)


def linear_schedule(
    num_steps: Annotated[int, Range(21, 100_000)] = 1000, has_zero_terminal_snr: bool = False
) -> DiscreteProcess:
    """Betas from 1e-4 to 2e-2 (DDPM, section 4), scaled by 1000 / T for other T as ADM does.

    Args:
      num_steps: T, more than 20 (below, the last beta would pass 1).
      has_zero_terminal_snr: see `zero_terminal_snr`.

    Raises:
      ValueError: too few steps.
    """
    check_options(linear_schedule, {"num_steps": num_steps, "has_zero_terminal_snr": has_zero_terminal_snr})
    scale = 1000 / num_steps
    betas = np.linspace(1e-4 * scale, 2e-2 * scale, num_steps)
    return DiscreteProcess(zero_terminal_snr(betas) if has_zero_terminal_snr else betas)


def scaled_linear_schedule(
    num_steps: Annotated[int, Range(2, 100_000)] = 1000,
    beta_start: Annotated[float, Range(1e-9, 0.999)] = 0.0015,
    beta_end: Annotated[float, Range(1e-9, 0.999)] = 0.0195,
    has_zero_terminal_snr: bool = False,
) -> DiscreteProcess:
    """Betas whose square roots are linear, as latent diffusion's code has them (arXiv 2112.10752).

    The defaults are those of its models of images and classes; Stable Diffusion has 0.00085 and 0.012.

    Args:
      num_steps: T.
      beta_start: the first beta.
      beta_end: the last.
      has_zero_terminal_snr: see `zero_terminal_snr`.

    Raises:
      ValueError: an option is out of range.
    """
    values = {"num_steps": num_steps, "beta_start": beta_start, "beta_end": beta_end}
    check_options(scaled_linear_schedule, values | {"has_zero_terminal_snr": has_zero_terminal_snr})
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2
    return DiscreteProcess(zero_terminal_snr(betas) if has_zero_terminal_snr else betas)


def cosine_schedule(
    num_steps: Annotated[int, Range(1, 100_000)] = 1000, has_zero_terminal_snr: bool = False
) -> DiscreteProcess:
    """alpha_bar(t) = cos^2(((t/T + 0.008) / 1.008) pi/2), betas at most 0.999 (Improved DDPM, equation 17).

    Args:
      num_steps: T.
      has_zero_terminal_snr: see `zero_terminal_snr`.

    Raises:
      ValueError: num_steps is out of range.
    """
    check_options(cosine_schedule, {"num_steps": num_steps, "has_zero_terminal_snr": has_zero_terminal_snr})
    alpha_bar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return DiscreteProcess(zero_terminal_snr(betas) if has_zero_terminal_snr else betas)


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas of a schedule that ends at noise alone: the last alpha is 0 (Lin et al., arXiv 2305.08891, algorithm 1).

    alpha is shifted and scaled, and keeps its first value. No model can learn the noise at the last step, where
    x_t is the noise: use the targets v or x_0.

    Raises:
      ValueError: there is only one step.
    """
    if len(betas) < 2:
        raise ValueError(f"has_zero_terminal_snr needs num_steps of at least 2, got {len(betas)}")
    alpha = np.sqrt(np.cumprod(1 - betas))
    alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return 1 - np.append(alpha_bar[0], alpha_bar[1:] / alpha_bar[:-1])


def columns(values: Iterable, ndim: int) -> tuple[jax.Array, ...]:
    """Arrays [B] as float32, shaped [B, 1, ...] to broadcast against an array of `ndim` dimensions."""
    arrays = (jnp.asarray(v, jnp.float32) for v in values)
    return tuple(array.reshape(array.shape + (1,) * (ndim - array.ndim)) for array in arrays)


def scales(process: Process, t: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """alpha(t) and sigma(t) as `columns`."""
    return columns((process.alpha(t), process.sigma(t)), ndim)


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
