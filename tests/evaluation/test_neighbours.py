"""Nearest neighbours against brute force and scikit-learn; the test for copies, with copies and without."""

import numpy as np
import pytest
from feature_sets import all_distances, features
from sklearn.neighbors import NearestNeighbors

from diffussm_jax.evaluation import copy_test, nearest
from diffussm_jax.evaluation.distances import radii, squared_distances


@pytest.mark.parametrize(("k", "block_size"), [(1, None), (3, 40), (50, 60)])
def test_neighbours_equal_scikit_learn_s(k, block_size):
    x, y = features(150), features(130, seed=1)
    distances, indices = nearest(x, y, k, block_size=block_size)
    expected, of_sklearn = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(y.astype(np.float64)).kneighbors(x)
    np.testing.assert_array_equal(indices, of_sklearn)
    np.testing.assert_allclose(distances, expected**2, rtol=1e-10)
    assert distances.dtype == np.float64 and indices.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_mean_far_above_the_spread(dtype):
    """Without the mean subtracted, float32 would lose all digits."""
    x, y = (1e4 + features(n, seed=n).astype(np.float64) for n in (80, 90))
    x, y = x.astype(dtype), y.astype(dtype)
    exact = all_distances(x, y)
    np.testing.assert_allclose(squared_distances(x, y), exact, rtol=1e-4)
    np.testing.assert_allclose(radii(x, 3, block_size=30), np.sort(all_distances(x, x), axis=1)[:, 3], rtol=1e-4)
    np.testing.assert_array_equal(nearest(x, y)[1][:, 0], exact.argmin(1))
    a, b = x.astype(np.float32), y.astype(np.float32)
    naive = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    assert np.abs(naive - exact).max() > 0.5 * exact.mean()


def test_float64_decides_between_near_candidates():
    """Of two sets far apart no mean helps: within one, float32 finds all at the same distance."""
    far = np.array([[1e4, 0.0], [-1e4, 0.0]])
    near = far[0] + np.array([[0, 0.3], [0, -0.2], [0, 0.1], [0, 0.4]])
    candidates = np.concatenate([near, far[[1, 1, 1, 1]]])
    distances, indices = nearest(far[:1], candidates, 2)
    assert indices.tolist() == [[2, 1]] and distances == pytest.approx(np.array([[0.01, 0.04]]))


def images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), np.uint8)


def test_copies_have_the_distance_zero():
    training = images(60)
    queries = np.concatenate([training[[7, 50]], images(3, seed=1)])
    distances, indices = nearest(queries, training, block_size=16)
    assert indices[:2, 0].tolist() == [7, 50] and distances[:2, 0].tolist() == [0, 0]
    differences = (training[indices[2:, 0]].astype(int) - queries[2:]).reshape(3, -1)
    np.testing.assert_array_equal(distances[2:, 0], (differences**2).sum(1))
    twice = nearest(training[:1], np.concatenate([training, training]), 2)
    assert twice[1].tolist() == [[0, 60]] and twice[0].tolist() == [[0, 0]]
    assert (radii(np.repeat(features(4), 5, axis=0), 4) == 0).all()


def test_files_in_memory_maps(tmp_path):
    training = images(60)
    np.save(tmp_path / "training.npy", training)
    mapped = np.load(tmp_path / "training.npy", mmap_mode="r")
    np.testing.assert_array_equal(nearest(training, mapped)[1][:, 0], np.arange(60))


def test_without_copies_half_of_the_samples_are_nearer_to_training():
    found = copy_test(features(500), features(900, seed=1), features(400, seed=2))
    assert found.num_held_out == 400 and found.num_samples == 500 and found.num_ties == 0
    assert found.low < 0.5 < found.high and found.p_value > 0.05
    assert 0.4 < found.fraction_nearer_to_training < 0.6
    # p-values of the null are uniform, although few images are the nearest of most samples.
    p_values = []
    for seed in range(40):
        sets = (features(n, 8, seed=10 * seed + i) for i, n in enumerate((300, 30, 30)))
        p_values.append(copy_test(*sets, num_permutations=200).p_value)
    assert 0.35 < np.mean(p_values) < 0.65 and np.mean(np.array(p_values) < 0.1) <= 0.2


def test_copies_are_found():
    training, held_out = features(300, seed=1), features(300, seed=2)
    noise = 0.02 * np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    copies = training[:200] + noise
    found = copy_test(copies, training, held_out)
    assert found.fraction_nearer_to_training == 1 and found.p_value < 0.001 and found.low > 0.5
    some = copy_test(np.concatenate([copies[:60], features(140)]), training, held_out)
    assert 0.55 < some.fraction_nearer_to_training < 0.8 and some.p_value < 0.05
    other = copy_test(copies, held_out, training)  # of the held-out images
    assert other.fraction_nearer_to_training == 0 and other.p_value > 0.99


def test_ties_count_one_half():
    x, y = features(50), features(60, seed=1)
    found = copy_test(x, y, y)
    assert found.num_ties == 50 and found.fraction_nearer_to_training == 0.5 and found.p_value > 0.05
    shared = copy_test(y[:10], y[:20], np.concatenate([y[:5], y[20:35]]))  # 5 of the copies are in both sets
    assert shared.num_ties == 5 and shared.fraction_nearer_to_training == 0.75


def test_the_larger_set_is_subsampled():
    x, y = features(50), features(500, seed=1)
    first, again, other = (copy_test(x, y, y[:100], seed=seed) for seed in (0, 0, 1))
    assert first == again != other and first.num_held_out == 100
    assert copy_test(x, y[:30], y[30:]).num_held_out == 30


def test_wrong_inputs_are_named():
    x = features(40)
    for k in (0, 41):
        with pytest.raises(ValueError, match=f"1 to the number of candidates, 40; got {k}"):
            nearest(x, x, k)
    with pytest.raises(ValueError, match=r"queries have the shape \(64,\) a row, candidates \(8, 8, 3\)"):
        nearest(x, images(4))
    with pytest.raises(ValueError, match="2 images of each set, got 40 and 1"):
        copy_test(x, x, x[:1])
    with pytest.raises(ValueError, match="queries.*row 3"):
        nearest(np.where(np.arange(40)[:, None] == 3, np.nan, x), x)
