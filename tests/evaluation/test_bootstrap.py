"""Intervals cover what they should, as often as they should."""

import numpy as np
import pytest
from scipy import stats

from diffussm_jax.evaluation import Moments, frechet_distance, proportion_interval
from diffussm_jax.evaluation.bootstrap import bootstrap


def draws(seed, n=150, d=6):
    return 0.5 + 1.2 * np.random.default_rng(seed).standard_normal((n, d))


REFERENCE = Moments(np.zeros(6), np.eye(6))


def distance(x):
    return frechet_distance(x, REFERENCE)


def test_intervals_cover_the_mean_distance_of_as_many_samples():
    distances = [distance(draws(seed)) for seed in range(1000, 1400)]
    expected = np.mean(distances)
    sets = [draws(seed) for seed in range(100)]
    intervals = [bootstrap(lambda rows, x=x: distance(x[rows]), 150) for x in sets]
    covered = np.mean([i.low <= expected <= i.high for i in intervals])
    assert 0.88 <= covered <= 0.99
    deviations = [i.deviation for i in intervals]
    assert np.mean(deviations) == pytest.approx(np.std(distances), rel=0.15)
    ends = np.mean(
        [np.subtract(i[:2], distance(x)) / i.deviation for i, x in zip(intervals, sets, strict=True)], axis=0
    )
    np.testing.assert_allclose(ends, [-1.96, 1.96], atol=0.2)
    # The scores of resamples alone are too large: few of their percentiles contain it.
    x = draws(0)
    resampled = [distance(x[np.random.default_rng(i).integers(150, size=150)]) for i in range(100)]
    assert np.mean(resampled) > distance(x) + np.std(resampled) / 3


def test_the_deviation_of_a_mean():
    x = np.random.default_rng(0).exponential(size=400)
    found = bootstrap(lambda rows: x[rows].mean(), 400, num_resamples=1000)
    assert found.deviation == pytest.approx(x.std() / 20, rel=0.1)
    assert found.low < x.mean() < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.deviation, rel=0.1)
    assert found == bootstrap(lambda rows: x[rows].mean(), 400, num_resamples=1000)
    narrow = bootstrap(lambda rows: x[rows].mean(), 400, num_resamples=1000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * found.deviation, rel=0.1)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (8123, 10_000)])
def test_proportions_equal_scipy_s(k, n):
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    found = proportion_interval(k, n)
    assert found[:2] == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.deviation == pytest.approx((k / n * (1 - k / n) / n) ** 0.5)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="1 rows, 100 resamples"):
        bootstrap(lambda rows: 0.0, 1)
    with pytest.raises(ValueError, match="3 of 3 resampled scores are not finite"):
        bootstrap(lambda rows: np.nan, 5, num_resamples=3)
    with pytest.raises(ValueError, match="got 3 of 2"):
        proportion_interval(3, 2)
