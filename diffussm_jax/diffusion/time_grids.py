"""Time grids: where a sampler evaluates the model, as functions (process, num_steps) -> times [S + 1].

    uniform     even in t; `process.times`
    log_snr     even in log(alpha^2 / sigma^2), as DPM-Solver (arXiv 2206.00927) chooses its steps
    karras      even in (sigma / alpha)^(1 / rho) with rho = 7 (EDM, arXiv 2206.00364, equation 5)
    quadratic   even in the square root of t (DDIM, arXiv 2010.02502, appendix D)

All begin at the process's first time and end at `clean`. The last evaluation of log_snr and karras is at the process's
cleanest step in discrete time. In continuous time the log-SNR is unbounded, so the S evaluations span the log-SNRs of
rectified flow at t = 0.999 and t = 0.001, and the first of them is moved to the first time. The same limits hold in
discrete time, where schedules with little or no signal at the last step would pass them.

Times of a discrete process are rounded to whole steps. Where several fall on one step, they take the nearest free ones
towards noise, so that each step is used once.
"""

from collections.abc import Callable

import numpy as np

from diffussm_jax.diffusion.processes import Process

_LARGEST_LOG_SNR = 2 * np.log(0.999 / 0.001)
_RHO = 7


def uniform(process: Process, num_steps: int) -> np.ndarray:
    """Even in t."""
    return process.times(num_steps)


def log_snr(process: Process, num_steps: int) -> np.ndarray:
    """Even in the log-SNR."""
    return _finished(process, process.time_of(np.linspace(*_log_snr_span(process, num_steps), num_steps)))


def karras(process: Process, num_steps: int) -> np.ndarray:
    """Even in (sigma / alpha)^(1/7): shorter steps near the data than `log_snr` has, relative to the noise left."""
    ends = np.exp(-np.array(_log_snr_span(process, num_steps)) / (2 * _RHO))
    return _finished(process, process.time_of(-2 * _RHO * np.log(np.linspace(*ends, num_steps))))


def quadratic(process: Process, num_steps: int) -> np.ndarray:
    """Even in the square root of t."""
    first = process.times(num_steps)[0]
    if process.num_steps is not None:
        return _finished(process, np.linspace(np.sqrt(first), 0, num_steps) ** 2)
    return process.clean + (first - process.clean) * np.linspace(1, 0, num_steps + 1) ** 2


def _log_snr_span(process: Process, num_steps: int) -> tuple[float, float]:
    """The log-SNRs of the first and the last evaluation."""
    times = process.times(num_steps)  # checks num_steps
    last = process.clean if process.num_steps is None else 0
    low, high = np.clip(process.log_snr(np.array([times[0], last])), -_LARGEST_LOG_SNR, _LARGEST_LOG_SNR)
    return low, high


def _finished(process: Process, times: np.ndarray) -> np.ndarray:
    """The S times with the first one at the process's first, and with `clean` behind."""
    times = np.append(process.times(1)[0], times[1:])
    if process.num_steps is not None:
        times = _distinct(times, process.num_steps)
    return np.append(times, process.clean)


def _distinct(times: np.ndarray, T: int) -> np.ndarray:
    """Whole steps in 0 ... T - 1 that strictly decrease, near times that do not increase."""
    S = len(times)
    places_after = np.arange(S - 1, -1, -1)
    excess = np.round(times).astype(int) - places_after  # never increases if and only if the steps strictly decrease
    excess = np.maximum.accumulate(excess[::-1])[::-1]
    return np.clip(excess, 0, T - S) + places_after


# The choices of `config.sampling.time_grid`.
TIME_GRIDS: dict[str, Callable[[Process, int], np.ndarray]] = {
    "uniform": uniform,
    "log_snr": log_snr,
    "karras": karras,
    "quadratic": quadratic,
}
