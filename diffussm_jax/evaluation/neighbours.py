"""Nearest neighbours of samples among training images, in features or pixels, and a test for copies.

Such tests detect little. A copy that is shifted, cropped or recoloured is far away in pixels, and features of a
classifier call images of the same content near. Stein et al., "Exposing flaws of generative model evaluation metrics
and their unfair treatment of diffusion models", arXiv 2306.04675, find that the usual metrics miss memorization, and
that its detection depends on the features. So a result near 0.5 is no proof that nothing was copied. Look at the
nearest pairs, too.
"""

from typing import NamedTuple

import numpy as np

from diffussm_jax.evaluation.distances import check_same_dimension, default_block_size, flat, smallest

_SPARE = 4  # further candidates, so that rounding does not decide which of near ones is the nearest


def nearest(queries, candidates, k: int = 1, *, block_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest candidates of each query.

    Candidates are found in float32, block by block on the devices. The distances of those found, and of a few more, are
    then computed from differences in float64 on the host, so that a copy has the distance 0.

    Args:
      queries: [N, d] features or [N, H, W, C] images.
      candidates: [M, ...] with rows of the same shape; it may be memory-mapped.
      k: neighbours, at most M.
      block_size: rows in a block; by default as many as fit in 256 MB, at most 8192.

    Returns:
      Squared distances [N, k] float64, in ascending order, and indices of candidates [N, k] int64. Of equal distances
      the lower index comes first.

    Raises:
      ValueError: shapes do not agree, values are not finite, or k is not in 1 … M.
    """
    check_same_dimension(queries, candidates, ("queries", "candidates"))
    if not 1 <= k <= len(candidates):
        raise ValueError(f"k must be 1 to the number of candidates, {len(candidates)}; got {k}")
    _, found = smallest(queries, candidates, min(k + _SPARE, len(candidates)), block_size=block_size)
    found = np.sort(found.astype(np.int64), axis=1)
    distances = np.empty(found.shape, np.float64)
    size = max(1, default_block_size(queries) // 16)
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        block = flat(queries[rows]).astype(np.float64)
        for j in range(found.shape[1]):
            difference = block - flat(candidates[found[rows, j]])
            distances[rows, j] = np.einsum("nd,nd->n", difference, difference)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(found, order, axis=1)


class CopyTest(NamedTuple):
    """Whether samples are nearer to training images than to others.

    Attributes:
      fraction_nearer_to_training: of the samples; ties count one half. 0.5 is expected without copies.
      low, high: its 95 % interval.
      p_value: the probability of a fraction at least as large without copies.
      num_held_out: held-out images used, and training images used.
      num_samples: compared.
      num_ties: samples at the same distance from both.
    """

    fraction_nearer_to_training: float
    low: float
    high: float
    p_value: float
    num_held_out: int
    num_samples: int
    num_ties: int


def copy_test(
    samples, training, held_out, *, seed: int = 0, num_permutations: int = 2000, block_size: int | None = None
) -> CopyTest:
    """Compares the distance of each sample to its nearest training image and to its nearest held-out image.

    After Meehan, Chaudhuri and Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models", arXiv
    2004.05675. The larger of the two sets is subsampled to the size of the other. Without copies training and held-out
    images are exchangeable, so half of the samples are nearer to either. The interval and the p-value come from random
    exchanges of the two (a permutation test): a binomial test would take samples with the same nearest image as
    independent. A sample at the same distance from both counts one half for each.

    The test detects copies of many training images only, and only copies that are near in the features that are given;
    the module docstring has more. It needs held-out images of the training images' distribution: other crops, another
    source or duplicates of training images in the held-out set move the fraction without any copies.

    Args:
      samples: [N, ...] features or images.
      training: [M, ...] those of training images.
      held_out: [m, ...] those of images of the same distribution that were not trained on.
      seed: of the subsample and of the permutations.
      num_permutations: the smallest p-value is about its inverse.
      block_size: as for `nearest`.

    Raises:
      ValueError: as for `nearest`, or fewer than 2 images in a set.
    """
    generator = np.random.default_rng(seed)
    num_images = min(len(training), len(held_out))
    if num_images < 2:
        raise ValueError(f"the copy test needs 2 images of each set, got {len(training)} and {len(held_out)}")
    training, held_out = (
        images if len(images) == num_images else images[np.sort(generator.permutation(len(images))[:num_images])]
        for images in (training, held_out)
    )
    (to_training, i), (to_held_out, j) = (
        (distances[:, 0], indices[:, 0])
        for distances, indices in (nearest(samples, images, block_size=block_size) for images in (training, held_out))
    )
    weight = np.where(to_training == to_held_out, 0.5, to_training < to_held_out)
    # Samples of which each image, training ones first, is the nearest of all.
    counts = np.bincount(i, weight, 2 * num_images) + np.bincount(num_images + j, 1 - weight, 2 * num_images)
    fractions = np.array([generator.permutation(counts)[:num_images].sum() for _ in range(num_permutations)]) / len(
        samples
    )
    fraction = weight.mean()
    low, high = np.clip(fraction + np.quantile(fractions, [0.025, 0.975]) - 0.5, 0, 1)
    return CopyTest(
        fraction_nearer_to_training=float(fraction),
        low=float(low),
        high=float(high),
        p_value=float((1 + (fractions >= fraction - 1e-12).sum()) / (1 + num_permutations)),
        num_held_out=num_images,
        num_samples=len(samples),
        num_ties=int((to_training == to_held_out).sum()),
    )
