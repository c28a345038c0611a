"""Features of the tests' scores: correlated and clipped at 0, as after a ReLU."""

import numpy as np


def features(num_rows, dimension=64, *, seed=0, shift=0.0):
    """[num_rows, dimension] float32; sets of different seeds have the same distribution."""
    mixing = np.random.default_rng(1000).standard_normal((dimension, dimension)) / dimension**0.5
    scales = np.geomspace(1, 0.05, dimension)
    noise = np.random.default_rng(seed).standard_normal((num_rows, dimension)) * scales
    return np.maximum(noise @ mixing + 0.1 + shift, 0).astype(np.float32)


def all_distances(a, b):
    """Squared distances of all pairs by differences, float64."""
    return np.stack([((b.astype(np.float64) - row) ** 2).sum(1) for row in a.astype(np.float64)])
