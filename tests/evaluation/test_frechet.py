"""Fréchet distances against ADM's formula and closed forms; streamed moments against NumPy's of the whole."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from feature_sets import features
from scipy import linalg

from diffussm_jax.evaluation import Moments, RunningMoments, frechet_distance, frechet_infinity
from diffussm_jax.evaluation.frechet import FewSamplesWarning

few = pytest.mark.filterwarnings("ignore::diffussm_jax.evaluation.frechet.FewSamplesWarning")


def numpy_moments(x):
    return x.astype(np.float64).mean(0), np.cov(x.astype(np.float64), rowvar=False)


def adm_distance(x, y):
    """Of the root of the product of both covariances, as in ADM's evaluator and in the first FID's code."""
    (m_x, s_x), (m_y, s_y) = numpy_moments(x), numpy_moments(y)
    root = linalg.sqrtm(s_x @ s_y)
    return ((m_x - m_y) ** 2).sum() + np.trace(s_x) + np.trace(s_y) - 2 * np.trace(root).real


@pytest.mark.parametrize(("n", "m", "d"), [(300, 400, 64), (500, 300, 128)])
def test_distances_equal_adm_s(n, m, d):
    x, y = features(n, d), features(m, d, seed=1, shift=0.05)
    expected = adm_distance(x, y)
    published = Moments(*numpy_moments(y))
    for samples, reference in ((x, y), (Moments.of(x), y), (x, published), (Moments.of(x), Moments.of(y))):
        assert frechet_distance(samples, reference) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(published, x) == pytest.approx(expected, rel=1e-6)


def rotated(variances_x, variances_y, seed=0):
    """Sets whose covariances have the same eigenvectors, and their distance: sum of (sqrt a - sqrt b)**2."""
    d = len(variances_x)
    axes = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    sets = []
    for variances in (variances_x, variances_y):
        (used,) = np.nonzero(variances)
        n = 2 * len(used)
        rows = np.sqrt(variances[used] * (n - 1) / 2)[:, None] * axes[used]
        sets.append(3 + np.concatenate([rows, -rows]))
    distance = ((np.sqrt(variances_x) - np.sqrt(variances_y)) ** 2).sum()
    return *sets, distance, variances_x.sum() + variances_y.sum()


def variances(kind, d=96):
    decaying, low, flat = np.geomspace(1, 1e-12, d), np.zeros(d), np.ones(d)
    low[: d // 3] = np.geomspace(5, 0.1, d // 3)
    one = np.zeros(d)
    one[0] = 2.0
    return {
        "rank 1": (one, one * 3),
        "rank 1 and full": (one, flat),
        "low rank": (low, low / 2),
        "low rank and decaying": (low, decaying),
        "overlapping": (low, np.roll(low, 20)),
        "disjoint": (low, low[::-1]),
        "one axis each": (one, one[::-1]),
        "decaying": (decaying, decaying * 2),
    }[kind]


@few
@pytest.mark.parametrize(
    "kind",
    [
        *("rank 1", "rank 1 and full", "low rank", "low rank and decaying", "overlapping", "disjoint"),
        *("one axis each", "decaying"),
    ],
)
def test_singular_covariances(kind):
    x, y, expected, traces = rotated(*variances(kind))
    found = [
        frechet_distance(a, b)
        for p, q in ((x, y), (y, x))
        for a in (p, Moments.of(p), Moments(*numpy_moments(p)))
        for b in (q, Moments.of(q))
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * traces)
    np.testing.assert_allclose([frechet_distance(x, x), frechet_distance(y, Moments.of(y))], 0, atol=1e-6 * traces)


def test_rounding_adds_nothing_to_singular_covariances():
    """Roots of eigenvalues of 1e-16 in place of 0 would add 1e-8 for each dimension."""
    d = 96
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0]
    one, steep = np.eye(d)[0], np.full(d, 1e-4)
    steep[0] = 1
    a, b = (Moments(np.zeros(d), (axes * variances) @ axes.T) for variances in (one, steep))
    for found in (frechet_distance(a, b), frechet_distance(b, a)):
        assert found == pytest.approx(0.01**2 * (d - 1), abs=1e-10)


@few
def test_fewer_samples_than_dimensions():
    """Against eigenvalues of the product of covariances; one set has n < d, or both."""
    d = 128
    for x, y in ((features(50, d), features(70, d, seed=1)), (features(50, d), features(400, d, seed=1))):
        (m_x, s_x), (m_y, s_y) = numpy_moments(x), numpy_moments(y)
        roots = np.sqrt(np.maximum(np.linalg.eigvals(s_x @ s_y).real, 0)).sum()
        traces = np.trace(s_x) + np.trace(s_y)
        expected = ((m_x - m_y) ** 2).sum() + traces - 2 * roots
        for a in (x, Moments.of(x)):
            for b in (y, Moments.of(y)):
                assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6 * traces)
                assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-6 * traces)


def test_few_samples_warn_and_enough_do_not():
    x, y = features(64), features(65)
    with pytest.warns(FewSamplesWarning, match="64 samples for features of 64 dimensions"):
        frechet_distance(x, y)
    with pytest.warns(FewSamplesWarning, match="64 reference samples"):
        frechet_distance(y, Moments.of(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(y, Moments(*numpy_moments(x)))  # of an unknown count


def test_parts_in_any_order_give_the_moments_of_the_whole():
    x = 100 + features(5000, 16)  # more than one block
    parts = np.split(x, [1, 700, 701, 4900])
    streamed, merged, empty = RunningMoments(), RunningMoments(), RunningMoments()
    for part in parts:
        streamed.add(part)
    for part in parts[::-1]:
        merged.merge(empty).merge(RunningMoments().add(part))
    mean, covariance = numpy_moments(x)
    for found in (Moments.of(x), streamed.moments(), merged.merge(empty).merge_over_hosts().moments()):
        assert found.count == 5000
        np.testing.assert_allclose(found.mean, mean, rtol=1e-13)
        np.testing.assert_allclose(found.covariance, covariance, rtol=1e-10, atol=1e-12 * covariance.max())


# Two processes of four devices each hold a global array [64, 8], rows over all eight devices, and one whose rows are
# on two devices each. Host 1 has all rows of a third set. The scores of blocks use four devices.
PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from feature_sets import features
from diffussm_jax.evaluation import RunningMoments, copy_test, gaussian_mmd, nearest, precision_recall
from diffussm_jax.evaluation.distances import radii

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
found = {}
for name, axes in {"over_eight": ("a", "b"), "copies": ("a",)}.items():
    running = RunningMoments()
    for i in range(3):
        x = 10 + features(64, 8, seed=i)
        parts = jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(axes)), lambda index: x[index])
        running.add(parts)
    assert 0 < running.count < 192 and len(jax.local_devices()) == 4
    total = running.merge_over_hosts().moments()
    found |= {name: np.vstack([total.mean, total.covariance]), name + "_count": total.count}
running = RunningMoments()
if jax.process_index() == 1:
    running.add(features(192, 8))
total = running.merge_over_hosts().moments()
found |= {"one": np.vstack([total.mean, total.covariance])}
x, y = features(103, 16), features(90, 16, seed=1)
result = precision_recall(x, y, block_size=30)
found |= {"inside": result.is_sample_inside, "covered": result.is_reference_inside, "radii": radii(x, 3, block_size=30)}
found |= {"nearest": nearest(x, y, 2, block_size=30)[1], "mmd": gaussian_mmd(x, y, block_size=30)}
np.savez(sys.argv[3], **found)
"""


def run_two_processes(folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    paths = [folder / f"{i}.npz" for i in range(2)]
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, address, str(i), path], env=environment)
        for i, path in enumerate(paths)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return [np.load(path) for path in paths]


@pytest.mark.slow
def test_eight_devices_of_two_processes(tmp_path):
    from diffussm_jax.evaluation import gaussian_mmd, nearest, precision_recall
    from diffussm_jax.evaluation.distances import radii

    found = run_two_processes(tmp_path)
    whole = np.concatenate([10 + features(64, 8, seed=i) for i in range(3)])
    for name, rows in {"over_eight": whole, "copies": whole, "one": features(192, 8)}.items():
        for one in found:
            np.testing.assert_allclose(one[name], np.vstack(numpy_moments(rows)), rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(found[0][name], found[1][name])
    assert found[0]["over_eight_count"] == found[1]["copies_count"] == 192
    x, y = features(103, 16), features(90, 16, seed=1)
    inside = precision_recall(x, y)
    for one in found:
        np.testing.assert_array_equal(one["inside"], inside.is_sample_inside)
        np.testing.assert_array_equal(one["covered"], inside.is_reference_inside)
        np.testing.assert_array_equal(one["nearest"], nearest(x, y, 2)[1])
        np.testing.assert_allclose(one["radii"], radii(x, 3), rtol=1e-5)
        np.testing.assert_allclose(one["mmd"], gaussian_mmd(x, y), rtol=1e-4)


def test_the_distance_of_infinitely_many_samples():
    """Of Gaussians whose distance is known; that of the largest subset is biased upwards."""
    d, generator = 12, np.random.default_rng(0)
    reference = Moments(np.zeros(d), np.eye(d))
    x = 0.1 + generator.standard_normal((6000, d))
    found = frechet_infinity(x, reference, min_size=200)
    assert len(found.sizes) == len(found.distances) == 15 and (found.sizes[0], found.sizes[-1]) == (200, 6000)
    assert found.distances[0] > found.distances[-1] == pytest.approx(frechet_distance(x, reference), rel=1e-12)
    assert found.value == pytest.approx(d * 0.1**2, abs=0.02)
    assert found.value < found.distances[-1]
    again = frechet_infinity(x, reference, min_size=200)
    np.testing.assert_array_equal(again.distances, found.distances)
    slope, value = np.polyfit(1 / found.sizes, found.distances, 1)
    assert found.value == pytest.approx(value) and slope > 0
    with pytest.warns(FewSamplesWarning, match="8 samples in the smallest subset"):
        frechet_infinity(x[:100], reference, min_size=8)


def test_wrong_inputs_are_named():
    x, broken = features(80), features(80)
    broken[7, 5] = np.nan
    with pytest.raises(ValueError, match=r"features.*: 1 values are not finite, the first at \[7, 5\]"):
        frechet_distance(broken, x)
    with pytest.raises(ValueError, match=r"features: 1 values .* at \[7, 5\]"):
        frechet_distance(broken[:20], x)
    with pytest.raises(ValueError, match="d = 10, the reference has d = 64"):
        frechet_distance(x[:, :10], x)
    with pytest.raises(ValueError, match=r"\[N, d\], got \(80,\)"):
        frechet_distance(x[:, 0], x)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match=r"got \(3,\), \(2, 2\)"):
        Moments(np.zeros(3), np.eye(2))
    with pytest.raises(ValueError, match="the covariance: 4 values are not finite"):
        Moments(np.zeros(2), np.full((2, 2), np.inf))
    with pytest.raises(ValueError, match="not symmetric"):
        Moments(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="d = 10, those before had 64"):
        RunningMoments().add(x).add(x[:, :10])
    with pytest.raises(ValueError, match="min_size = 5000 and 80 samples"):
        frechet_infinity(x, x)
