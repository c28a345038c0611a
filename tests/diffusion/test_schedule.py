"""Schedules are those of the papers, and respacing keeps alpha_bar at the steps kept.

| quantity | float64 NumPy against | relative tolerance |
|---|---|---|
| betas of the schedules | the formulas | 1e-12 |
| alpha_bar, posterior variance | sums of logarithms, Bayes' rule | 1e-10 |
| betas after `respace` | the formula | 1e-10 |
| alpha_bar after `respace` | the full schedule | 1e-10, or 1e-15 absolute: betas near 1 hold no more of it |
"""

import numpy as np
import oracles_diffusion as oracle
import pytest

from diffussm_jax.diffusion import SCHEDULES, Schedule, cosine_schedule, linear_schedule, respace

BETAS_RTOL = 1e-12
DERIVED_RTOL = 1e-10
ALPHA_BAR_ATOL = 1e-15

BETAS = {"linear": oracle.linear_betas, "cosine": oracle.cosine_betas}
COUNTS = [1, 2, 3, 7, 50, 250, 999, 1000]


@pytest.mark.parametrize("num_steps", [21, 100, 1000, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_follow_the_paper(name, num_steps):
    schedule = SCHEDULES[name](num_steps)
    assert schedule.betas.dtype == np.float64
    assert len(schedule) == num_steps
    np.testing.assert_allclose(schedule.betas, BETAS[name](num_steps), rtol=BETAS_RTOL)
    np.testing.assert_array_equal(schedule.timesteps, np.arange(num_steps))


def test_linear_betas_run_from_1e_4_to_2e_2():
    betas = linear_schedule(1000).betas
    assert betas[[0, -1]] == pytest.approx([1e-4, 2e-2], rel=BETAS_RTOL)
    np.testing.assert_allclose(np.diff(betas), (2e-2 - 1e-4) / 999, rtol=1e-9)


def test_cosine_alpha_bar_is_a_squared_cosine_until_the_cap():
    schedule = cosine_schedule(1000)
    expected = [oracle.cosine_alpha_bar((t + 1) / 1000) / oracle.cosine_alpha_bar(0) for t in range(1000)]
    np.testing.assert_allclose(schedule.alpha_bar[:-1], expected[:-1], rtol=DERIVED_RTOL)
    assert schedule.betas[-1] == 0.999
    assert schedule.alpha_bar[-1] == pytest.approx(1e-3 * expected[-2], rel=DERIVED_RTOL)


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_bar_and_posterior_variance(name):
    schedule = SCHEDULES[name](1000)
    for t in [0, 1, 2, 500, 998, 999]:
        assert schedule.alpha_bar[t] == pytest.approx(oracle.alpha_bar(schedule.betas, t), rel=DERIVED_RTOL)
        assert schedule.alpha_bar_prev[t] == pytest.approx(oracle.alpha_bar(schedule.betas, t - 1), rel=DERIVED_RTOL)
        _, variance = oracle.q_posterior(schedule.betas, 0.0, 0.0, t)
        assert schedule.posterior_variance[t] == pytest.approx(variance, rel=DERIVED_RTOL, abs=0)
        _, variance = oracle.q_posterior(schedule.betas, 0.0, 0.0, max(t, 1))
        assert np.exp(schedule.posterior_log_variance[t]) == pytest.approx(variance, rel=DERIVED_RTOL)


@pytest.mark.parametrize("num_steps", COUNTS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_respace_keeps_alpha_bar_at_the_steps_kept(name, num_steps):
    schedule = SCHEDULES[name](1000)
    respaced = respace(schedule, num_steps)
    assert len(respaced) == num_steps
    np.testing.assert_allclose(
        respaced.alpha_bar, schedule.alpha_bar[respaced.timesteps], rtol=DERIVED_RTOL, atol=ALPHA_BAR_ATOL
    )
    np.testing.assert_allclose(
        respaced.betas, oracle.respaced_betas(schedule.betas, respaced.timesteps), rtol=DERIVED_RTOL
    )


@pytest.mark.parametrize("num_steps", COUNTS)
def test_respace_keeps_evenly_spaced_steps(num_steps):
    timesteps = respace(linear_schedule(1000), num_steps).timesteps
    assert np.issubdtype(timesteps.dtype, np.integer)
    assert timesteps[-1] == 999
    if num_steps > 1:
        assert timesteps[0] == 0
        gap = 999 / (num_steps - 1)
        assert set(np.diff(timesteps)) <= {int(np.floor(gap)), int(np.ceil(gap))}


@pytest.mark.parametrize("num_steps", [2, 10, 25, 50, 100, 250, 500, 1000])
def test_respace_keeps_the_steps_that_adm_keeps(num_steps):
    timesteps = respace(linear_schedule(1000), num_steps).timesteps
    np.testing.assert_array_equal(timesteps, oracle.adm_timesteps(1000, num_steps))


@pytest.mark.parametrize("name", SCHEDULES)
def test_respace_to_full_length_is_the_identity(name):
    schedule = SCHEDULES[name](1000)
    respaced = respace(schedule, 1000)
    np.testing.assert_array_equal(respaced.timesteps, schedule.timesteps)
    np.testing.assert_allclose(respaced.betas, schedule.betas, rtol=DERIVED_RTOL)


def test_respace_of_a_respaced_schedule_tells_the_original_times():
    schedule = linear_schedule(1000)
    twice = respace(respace(schedule, 250), 10)
    assert set(twice.timesteps) <= set(respace(schedule, 250).timesteps)
    np.testing.assert_allclose(twice.alpha_bar, schedule.alpha_bar[twice.timesteps], rtol=DERIVED_RTOL)


def test_a_single_step_has_beta_for_both_bounds_of_its_variance():
    schedule = respace(linear_schedule(1000), 1)
    np.testing.assert_allclose(schedule.posterior_log_variance, np.log(schedule.betas), rtol=DERIVED_RTOL)


@pytest.mark.parametrize("num_steps", [-1, 0, 1, 20])
def test_linear_schedule_refuses_too_few_steps(num_steps):
    with pytest.raises(ValueError, match=f"num_steps.* got {num_steps}$"):
        linear_schedule(num_steps)


@pytest.mark.parametrize("num_steps", [-1, 0])
def test_cosine_schedule_refuses_no_steps(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}$"):
        cosine_schedule(num_steps)


@pytest.mark.parametrize("num_steps", [-1, 0, 101])
def test_respace_refuses_counts_outside_the_schedule(num_steps):
    with pytest.raises(ValueError, match=f"from 1 to the schedule's 100, got {num_steps}$"):
        respace(linear_schedule(100), num_steps)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, -0.1], [0.1, 1.1], [0.1, np.nan], [[0.1, 0.1]]])
def test_schedule_refuses_betas_that_are_no_vector_of_probabilities(betas):
    betas = np.array(betas)
    with pytest.raises(ValueError, match="betas must be a vector"):
        Schedule(betas=betas, timesteps=np.zeros(betas.shape, int))


def test_schedule_refuses_timesteps_of_another_length():
    with pytest.raises(ValueError, match=r"2 betas but timesteps of shape \(3,\)"):
        Schedule(betas=np.array([0.1, 0.2]), timesteps=np.arange(3))
