"""Scores against ADM's formulas, brute force in float64, and scikit-learn."""

import warnings

import numpy as np
import pytest
from feature_sets import all_distances, features
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel

from diffussm_jax.evaluation import density_coverage, gaussian_mmd, inception_score, kid, precision_recall
from diffussm_jax.evaluation.fidelity import ClassSortedWarning


def probabilities(n, num_classes=20):
    logits = 3 * np.random.default_rng(0).standard_normal((n, num_classes))
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("n", "chunk_size"), [(1200, 500), (1000, 500), (300, 5000)])
def test_inception_scores_equal_adm_s(n, chunk_size):
    p = probabilities(n)
    scores = []
    for chunk in (p[i : i + chunk_size].astype(np.float64) for i in range(0, n, chunk_size)):
        entropy, of_mean = -(chunk * np.log(chunk)).sum(1).mean(), chunk.mean(0)
        scores.append(np.exp(-(of_mean * np.log(of_mean)).sum() - entropy))
    found = inception_score(p, chunk_size)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-6)
    assert found.deviation == pytest.approx(np.std(scores), rel=1e-6, abs=1e-12)


def test_the_range_of_inception_scores():
    """From 1, where all samples look alike, to the number of classes; probabilities of 0 are no NaN."""
    certain = np.eye(10)[np.arange(1000) % 10]
    assert inception_score(certain).mean == pytest.approx(10)
    assert inception_score(np.tile(probabilities(1), (100, 1))).mean == pytest.approx(1)
    assert inception_score(certain[np.argsort(np.arange(1000) % 10)], 100).mean == pytest.approx(1)


def test_sorted_classes_warn():
    p, labels = probabilities(600), np.arange(600) // 60
    for order in (labels, labels[::-1]):
        with pytest.warns(ClassSortedWarning, match="sorted by class"):
            inception_score(p, 100, labels=order)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inception_score(p, 100, labels=np.arange(600) % 10)
        inception_score(p, 600, labels=labels)  # one chunk
        inception_score(p, 100, labels=np.zeros(600, int))  # one class


def brute_precision_recall(x, y, k):
    radii_x, radii_y = (np.sort(all_distances(z, z), axis=1)[:, k] for z in (x, y))
    distances = all_distances(x, y)
    return (distances <= radii_y).any(1), (distances <= radii_x[:, None]).any(0)


@pytest.mark.parametrize("block_size", [None, 90])
@pytest.mark.parametrize(("shift", "scale"), [(0.05, 1), (0.05, 1e-3)])
def test_precision_and_recall_equal_brute_force(shift, scale, block_size):
    """With scale 1e-3 the mean is a thousand times the spread."""
    x, y = features(400), features(301, seed=1, shift=shift)
    if scale != 1:
        x, y = (1 + scale * z.astype(np.float64) for z in (x, y))
    for k in (1, 3):
        inside = brute_precision_recall(x, y, k)
        found = precision_recall(x, y, k=k, block_size=block_size)
        assert 0.2 < found.precision < 0.99 and 0.2 < found.recall < 0.99
        for mask, expected in zip(found, inside, strict=True):
            assert mask.dtype == bool and mask.shape == expected.shape and (mask != expected).sum() <= 2
        assert abs(found.precision - inside[0].mean()) <= 2 / len(x)
        assert abs(found.recall - inside[1].mean()) <= 2 / len(y)


def adm_distances(u, v):
    """Of ADM's evaluator: each result in float16, sums accumulated in float32; float32 if one is not finite."""
    for dtype in (np.float16, np.float32):
        a, b = u.astype(dtype), v.astype(dtype)
        norms = [(np.square(x).astype(np.float32).sum(1)).astype(dtype) for x in (a, b)]
        products = (a.astype(np.float32) @ b.astype(np.float32).T).astype(dtype)
        found = np.maximum((norms[0][:, None] - dtype(2) * products) + norms[1], dtype(0))
        if np.isfinite(found).all():
            return found.astype(np.float32)
    raise AssertionError


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("scale", [4, 400])  # of which 400 is too large for squares in float16
def test_the_float16_mode_rounds_as_adm_does(scale):
    x, y = scale * features(300), scale * features(250, seed=1, shift=0.05)
    assert np.isfinite(np.square(y.astype(np.float16)).sum(1)).all() == (scale == 4)
    radii_x, radii_y = (np.sort(adm_distances(z, z), axis=1)[:, 3] for z in (x, y))
    distances = adm_distances(y, x)  # the reference first
    expected = (distances <= radii_y[:, None]).any(0), (distances <= radii_x).any(1)
    found = precision_recall(x, y, mode="adm_float16")
    for mask, of_adm in zip(found, expected, strict=True):
        assert (mask != of_adm).sum() <= (0 if scale == 4 else 2)
    in_float32 = precision_recall(x, y)
    if scale == 4:  # so coarse that the mode can be told apart
        assert (found.is_sample_inside != in_float32.is_sample_inside).any()


def test_sets_that_are_the_same_or_far_apart():
    x = features(50)
    same, apart = precision_recall(x, x), precision_recall(x, x + 100)
    assert (same.precision, same.recall, apart.precision, apart.recall) == (1, 1, 0, 0)
    copies = np.repeat(x[:5], 10, axis=0)  # all radii are 0, and only equal points are inside
    found = precision_recall(copies, x)
    assert found.recall == pytest.approx(5 / 50) and found.precision == 1


def both(found):
    assert len(found.num_balls) and found.is_covered.dtype == bool
    return found.density, found.coverage


@pytest.mark.parametrize("block_size", [None, 90])
def test_density_and_coverage_equal_brute_force(block_size):
    x, y = features(300), features(250, seed=1, shift=0.05)
    radii = np.sort(all_distances(y, y), axis=1)[:, 5]
    is_inside = all_distances(x, y) < radii
    found = density_coverage(x, y, block_size=block_size)
    assert found.density == pytest.approx(is_inside.sum() / (5 * 300), abs=2 / 300)
    assert found.coverage == pytest.approx(is_inside.any(0).mean(), abs=2 / 250)
    same = both(density_coverage(np.repeat(x[:3], 8, axis=0), np.repeat(x[:3], 8, axis=0)))
    assert same == (0, 0)  # open balls of radius 0
    line = np.arange(8.0)[:, None]
    assert both(density_coverage(line[[7, 7]] + 1, line, k=1)) == (
        0,
        0,
    )  # at the distance 1, the radius of the last ball
    assert both(density_coverage(line[[7, 7]] + 0.9, line, k=1)) == (1, 1 / 8)


def unbiased_mmd(x, y, kernel):
    n = len(x)
    within = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / (n * (n - 1)) for z in (x, y)]
    return sum(within) - 2 * kernel(x, y).mean()


def test_kid_equals_scikit_learn():
    x, y = features(200), features(200, seed=1, shift=0.05)
    expected = unbiased_mmd(
        x.astype(np.float64), y.astype(np.float64), lambda a, b: polynomial_kernel(a, b, degree=3, coef0=1)
    )
    found = kid(x, y, num_subsets=3, subset_size=200)  # each the whole set
    assert found.mean == pytest.approx(expected, abs=1e-6) and found.deviation < 1e-7
    assert expected > 1e-3
    subsets = kid(x, y, num_subsets=50, subset_size=50)
    assert subsets.mean == pytest.approx(expected, abs=4 * subsets.deviation / 50**0.5) and subsets.deviation > 1e-5
    alike = kid(x, features(1000, seed=2), num_subsets=50, subset_size=100)
    assert abs(alike.mean) < 3 * alike.deviation  # unbiased: not above 0 by 1 / n


@pytest.mark.parametrize("block_size", [None, 70])
def test_gaussian_mmd_equals_scikit_learn(block_size):
    x, y = features(200), features(150, seed=1, shift=0.05)
    for sigma in (10.0, 1.0):
        a, b = x.astype(np.float64), y.astype(np.float64)
        expected = 1000 * sum(
            sign * rbf_kernel(p, q, gamma=0.5 / sigma**2).mean() for sign, p, q in ((1, a, a), (1, b, b), (-2, a, b))
        )
        assert gaussian_mmd(x, y, sigma=sigma, block_size=block_size) == pytest.approx(expected, rel=1e-5)


def test_wrong_inputs_are_named():
    x, broken = features(40), features(40)
    broken[17, 3] = np.inf
    for score in (precision_recall, density_coverage, gaussian_mmd):
        with pytest.raises(ValueError, match="reference: values are not finite, the first in row 17"):
            score(x, broken)
        with pytest.raises(ValueError, match=r"\(64,\) a row, reference \(10,\)"):
            score(x, x[:, :10])
    with pytest.raises(ValueError, match="3-th nearest .* 40 samples and 3 references"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="'float64'; choose one of float32, adm_float16"):
        precision_recall(x, x, mode="float64")
    with pytest.raises(ValueError, match="subsets of 1000, 40 samples"):
        kid(x, x)
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        gaussian_mmd(x, x, sigma=0)
    with pytest.raises(ValueError, match="real numbers, got complex64"):
        precision_recall(x.astype(np.complex64), x)
    for bad in (-probabilities(10), 2 * probabilities(10), np.full((10, 5), np.nan)):
        with pytest.raises(ValueError, match="rows 0 to 9"):
            inception_score(bad)
    with pytest.raises(ValueError, match=r"got \(10,\), 5000"):
        inception_score(np.ones(10))
    with pytest.raises(ValueError, match=r"labels must be \[N\] for 10 samples, got \(3,\)"):
        inception_score(probabilities(10), labels=np.zeros(3))
