"""Time grids are those of the papers, and each step of a process in discrete time is used at most once.

| quantity, float64 | against | tolerance |
|---|---|---|
| times in continuous time | the formulas of the papers | 1e-9 relative |
| times in discrete time | the nearest step, by search | 1 step |
| times -> log-SNR -> times | the same | 1e-9 relative |
"""

import numpy as np
import pytest

from diffussm_jax.diffusion import GVP, TIME_GRIDS, RectifiedFlow, cosine_schedule, linear_schedule

RTOL = 1e-9

FULL = linear_schedule(1000)
FLOW = RectifiedFlow()
PROCESSES = {
    "linear": FULL,
    "linear, T = 21": linear_schedule(21),
    "cosine": cosine_schedule(1000),
    "zero terminal SNR": linear_schedule(1000, True),
    "cosine, zero terminal SNR": cosine_schedule(300, True),
    "one step": cosine_schedule(1),
    "flow": FLOW,
    "gvp": GVP(),
}
grids = pytest.mark.parametrize("grid", TIME_GRIDS.values(), ids=TIME_GRIDS)


@grids
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_times_decrease_from_the_first_to_clean(process, grid):
    T = process.num_steps or 2000
    for num_steps in {1, 2, 3, 10, 50, T // 2, T - 1, T} - {0}:
        if num_steps > T:
            continue
        times = grid(process, num_steps)
        assert times.shape == (num_steps + 1,)
        assert times[0] == process.times(1)[0]
        assert times[-1] == process.clean
        assert (np.diff(times) < 0).all(), times
        assert times.dtype == (np.float64 if process.num_steps is None else np.int64)


@grids
def test_as_many_steps_as_the_process_has_are_all_of_them(grid):
    np.testing.assert_array_equal(grid(FULL, 1000), np.arange(999, -2, -1))


@grids
@pytest.mark.parametrize("process, num_steps", [(FULL, 0), (FULL, 1001), (FLOW, 0)])
def test_a_wrong_number_of_steps_is_refused(grid, process, num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be .*, got {num_steps}"):
        grid(process, num_steps)


def test_uniform_is_that_of_the_process():
    for process in (FULL, FLOW):
        np.testing.assert_array_equal(TIME_GRIDS["uniform"](process, 7), process.times(7))


# The papers' formulas, in sigma / alpha


def even_in_log_snr(first, last, num_steps):
    """sigma / alpha in a geometric sequence."""
    return first * (last / first) ** (np.arange(num_steps) / (num_steps - 1))


def edm(first, last, num_steps, rho=7):
    """EDM, equation 5."""
    i = np.arange(num_steps)
    return (first ** (1 / rho) + i / (num_steps - 1) * (last ** (1 / rho) - first ** (1 / rho))) ** rho


FORMULAS = {"log_snr": even_in_log_snr, "karras": edm}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("num_steps", [2, 3, 10, 50])
def test_noise_levels_in_continuous_time(name, num_steps):
    """Between those of rectified flow at t = 0.999 and 0.001; the first one is replaced by t = 1."""
    noise = FORMULAS[name](999, 1 / 999, num_steps)[1:]
    np.testing.assert_allclose(TIME_GRIDS[name](FLOW, num_steps)[1:-1], noise / (1 + noise), rtol=RTOL)
    np.testing.assert_allclose(TIME_GRIDS[name](GVP(), num_steps)[1:-1], np.arctan(noise) * 2 / np.pi, rtol=RTOL)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("process", ["linear", "cosine", "zero terminal SNR"])
def test_noise_levels_in_discrete_time(name, process):
    process = PROCESSES[process]
    with np.errstate(divide="ignore"):
        levels = np.sqrt((1 - process.alpha_bar) / process.alpha_bar)
    wanted = FORMULAS[name](min(levels[-1], 999), levels[0], 12)
    nearest = np.abs(np.log(levels) - np.log(wanted)[:, None]).argmin(1)
    times = TIME_GRIDS[name](process, 12)
    assert times[0] == process.num_steps - 1
    assert (np.abs(times[1:-1] - nearest[1:]) <= 1).all(), (times, nearest)
    assert times[-2] == 0


def test_quadratic():
    """tau_i = c i^2 (DDIM, appendix D), here from i = 0 in discrete time, whose first step is 0."""
    np.testing.assert_array_equal(TIME_GRIDS["quadratic"](FULL, 4), [999, 444, 111, 0, -1])
    np.testing.assert_allclose(TIME_GRIDS["quadratic"](FLOW, 4), [1, 9 / 16, 1 / 4, 1 / 16, 0], rtol=RTOL)


def test_crowded_times_take_the_next_free_steps_towards_noise():
    """Nine in ten of the steps, where the even grid in log-SNR has many in one step near the data."""
    times = TIME_GRIDS["log_snr"](FULL, 900)[:-1]
    np.testing.assert_array_equal(times[-300:], np.arange(299, -1, -1))
    assert times[0] == 999


# The log-SNR and its inverse


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_time_of_is_the_inverse_of_log_snr(process):
    if process.num_steps is not None:
        times = np.arange(process.num_steps - (process.alpha(np.array([process.num_steps - 1]))[0] == 0))
        np.testing.assert_array_equal(process.time_of(process.log_snr(times)), times)
    else:
        times = np.array([0.999, 0.5, 1e-3, 1e-6])
        np.testing.assert_allclose(process.time_of(process.log_snr(times)), times, rtol=RTOL)


def test_log_snr():
    np.testing.assert_allclose(
        FLOW.log_snr(np.array([0.2, 0.5, 0.9])), 2 * np.log([4, 1, 1 / 9]), rtol=RTOL, atol=1e-12
    )
    alpha_bar = np.cumprod(1 - FULL.betas)[[0, 500, 999]]
    np.testing.assert_allclose(FULL.log_snr(np.array([0, 500, 999])), np.log(alpha_bar / (1 - alpha_bar)), rtol=RTOL)
    for process in (FLOW, GVP(), PROCESSES["zero terminal SNR"]):
        ends = np.array([process.clean, process.times(1)[0]])
        np.testing.assert_array_equal(process.log_snr(ends), [np.inf, -np.inf])


def test_time_of_a_log_snr_beyond_the_ends():
    """The end."""
    np.testing.assert_array_equal(FULL.time_of([-100.0, 100.0]), [999, 0])
    np.testing.assert_allclose(FLOW.time_of([-100.0, 100.0]), [1, 0], atol=1e-12)
