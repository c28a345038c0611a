"""DPM-Solver++ of second order (Lu et al., arXiv 2211.01095).

In the half log-SNR lambda = log(alpha / sigma), with h = lambda_s - lambda_t for a step from t to s, the probability
flow is

    x_s = sigma_s / sigma_t x_t + alpha_s int_0^h e^(tau - h) x_0(lambda_t + tau) dtau,

where x_0 is the model's prediction along the path. The methods approximate it in the integral by a line through two
predictions: the one at t, and another one before t (2M) or between t and s (2S). The reverse SDE is treated likewise.

h is infinite in the last step, to the data, and in the first one if alpha is 0 there. Steps of first order are finite
at both ends: they are DDIM's, or for the SDE those of DDPM without a learned variance.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.options import Choices, check_options


class MultistepRow(NamedTuple):
    """x_s = of_x x_t + of_now x_0(t) + of_before x_0(the time before t) + deviation z."""

    t: np.ndarray
    of_x: np.ndarray
    of_now: np.ndarray
    of_before: np.ndarray
    deviation: np.ndarray


class SinglestepRow(NamedTuple):
    """From t to s by way of `middle`, with D = x_0(t) + weight (x_0(middle) - x_0(t)).

    x_middle = middle_of_x x_t + middle_of_x_0 x_0(t), and x_s = of_x x_t + of_x_0 D; in the last step D = x_0(t).
    """

    t: np.ndarray
    middle: np.ndarray
    middle_of_x: np.ndarray
    middle_of_x_0: np.ndarray
    weight: np.ndarray
    of_x: np.ndarray
    of_x_0: np.ndarray
    is_last: np.ndarray


@dataclasses.dataclass(frozen=True)
class DPMSolverPP:
    """Second order; the last step, to the data, is of first order.

    Attributes:
      variant: "2m" (algorithm 2) evaluates once a step and remembers the prediction of the step before; its first step
        is of first order. "2s" (algorithm 1) evaluates twice a step, except once in the last. "sde_2m" is 2M for the
        reverse SDE (SDE-DPM-Solver++) and adds noise; without memory it would be DDPM.

    Raises:
      ValueError: there is no such variant.
    """

    variant: Annotated[str, Choices(("2m", "2s", "sde_2m"))] = "2m"

    def __post_init__(self):
        check_options(self)

    @property
    def is_stochastic(self) -> bool:
        return self.variant == "sde_2m"

    @property
    def evaluations_per_step(self) -> int:
        return 2 if self.variant == "2s" else 1

    def plan(self, process, times):
        if self.variant == "2s":
            return _plan_singlestep(process, times)
        alpha, sigma = process.alpha(times), process.sigma(times)
        h = np.diff(process.log_snr(times)) / 2
        # The SDE's noise decays twice as fast as the ODE's, and new noise makes up for it.
        shrinkage, of_x_0, deviation = np.ones_like(h), alpha[1:] * -np.expm1(-h), np.zeros_like(h)
        if self.is_stochastic:
            shrinkage, of_x_0 = np.exp(-h), alpha[1:] * -np.expm1(-2 * h)
            deviation = sigma[1:] * np.sqrt(-np.expm1(-2 * h))
        weight = np.zeros_like(h)  # 1 / (2 r) of the paper; 0 gives a step of first order
        weight[1:-1] = h[1:-1] / (2 * h[:-2])
        return MultistepRow(
            t=times[:-1],
            of_x=sigma[1:] / sigma[:-1] * shrinkage,
            of_now=of_x_0 * (1 + weight),
            of_before=-of_x_0 * weight,
            deviation=deviation,
        )

    def init(self, x_T):
        return (x_T,) if self.variant == "2s" else (x_T, jnp.zeros_like(x_T))

    def step(self, denoise, carry, row, key):
        if self.variant == "2s":
            return _step_singlestep(denoise, carry, row)
        x_t, before = carry
        now = denoise(x_t, row.t).x_0
        x_s = row.of_x * x_t + row.of_now * now + row.of_before * before
        if self.is_stochastic:
            x_s += row.deviation * jax.random.normal(key, x_t.shape, x_t.dtype)
        return x_s, now


def _plan_singlestep(process, times):
    sigma = process.sigma(times)
    log_snr = process.log_snr(times)
    h = np.diff(log_snr) / 2
    middle = _middle(process, times)
    h_middle = np.zeros_like(h)
    h_middle[:-1] = (process.log_snr(middle[:-1]) - log_snr[:-2]) / 2
    r = np.divide(h_middle, h, out=np.ones_like(h), where=np.isfinite(h))
    return SinglestepRow(
        t=times[:-1],
        middle=middle,
        middle_of_x=process.sigma(middle) / sigma[:-1],
        middle_of_x_0=process.alpha(middle) * -np.expm1(-h_middle),
        weight=1 / (2 * r),
        of_x=sigma[1:] / sigma[:-1],
        of_x_0=process.alpha(times[1:]) * -np.expm1(-h),
        is_last=times[1:] == process.clean,
    )


def _middle(process, times):
    """The times [S] between t and s: half way in log-SNR, in discrete time the nearest step, never t itself.

    Where alpha is 0 at t, there is no half way, and s stands for it. In the last step, where it is not used, t does.
    """
    t, s = times[:-1], times[1:]
    log_snr = process.log_snr(times)
    is_finite = np.isfinite(log_snr[:-1]) & np.isfinite(log_snr[1:])
    half_way = np.where(is_finite, log_snr[:-1], 0) / 2 + np.where(is_finite, log_snr[1:], 0) / 2
    middle = np.where(is_finite, process.time_of(half_way), s)
    if process.num_steps is not None:
        middle = np.minimum(middle, t - 1)
    middle[-1] = t[-1]
    return middle


def _step_singlestep(denoise, carry, row):
    (x_t,) = carry
    now = denoise(x_t, row.t).x_0

    def combined():
        later = denoise(row.middle_of_x * x_t + row.middle_of_x_0 * now, row.middle).x_0
        return now + row.weight * (later - now)

    return (row.of_x * x_t + row.of_x_0 * jax.lax.cond(row.is_last, lambda: now, combined),)
