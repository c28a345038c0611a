"""Scores of sets of samples beside the Fréchet distance: Inception score, precision and recall, KID, and others.

Inception score                  Salimans et al., "Improved Techniques for Training GANs", arXiv 1606.03498
precision and recall             Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative
                                 Models", arXiv 1904.06991
density and coverage             Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models",
                                 arXiv 2002.09797
kernel distance, KID             Bińkowski et al., "Demystifying MMD GANs", arXiv 1801.01401
Gaussian MMD, as CMMD            Jayasumana et al., "Rethinking FID", arXiv 2401.09603

ADM's evaluator is `evaluations/evaluator.py` of openai/guided-diffusion. Its precision and recall are those of 10,000
reference images.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.evaluation.distances import (
    ADM_FLOAT16,
    FLOAT32,
    ball_counts,
    check_same_dimension,
    kernel_sum,
    radii,
)

_ADM_BLOCK = 10_000
_MODES = {"float32": FLOAT32, "adm_float16": ADM_FLOAT16}


class ClassSortedWarning(UserWarning):
    """Samples are sorted by class, which changes the Inception score."""


class InceptionScore(NamedTuple):
    """Mean and standard deviation of the scores of chunks; the deviation is not that of the mean."""

    mean: float
    deviation: float


def inception_score(probabilities, chunk_size: int = 5000, *, labels=None) -> InceptionScore:
    """exp of the mean KL divergence between p(class | sample) and its mean over a chunk, averaged over the chunks.

    As in ADM's evaluator, chunks are consecutive, samples are not shuffled, and a last partial chunk is a chunk like
    the others. Sums are in float64.

    Args:
      probabilities: [N, K] of the classes, after the softmax.
      chunk_size: samples in a chunk.
      labels: [N] of the samples, only to warn with a `ClassSortedWarning` if they are sorted: a chunk then has samples
        of few classes, and the score is far lower.

    Raises:
      ValueError: the probabilities are not [N, K], are negative, or do not sum to 1 within 1 %.
    """
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or not probabilities.size or chunk_size < 1:
        raise ValueError(f"probabilities must be [N, K], chunks not empty; got {probabilities.shape}, {chunk_size}")
    if labels is not None:
        _warn_if_sorted(np.asarray(labels), len(probabilities), chunk_size)
    scores = []
    for start in range(0, len(probabilities), chunk_size):
        p = probabilities[start : start + chunk_size].astype(np.float64)
        if not ((p >= 0).all() and np.abs(p.sum(axis=1) - 1).max() < 0.01):
            raise ValueError(f"rows {start} to {start + len(p) - 1} have values that are no probabilities, or no sum 1")
        mean = p.mean(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, p * (np.log(p) - np.log(mean)), 0)
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _warn_if_sorted(labels: np.ndarray, num_samples: int, chunk_size: int) -> None:
    if labels.shape != (num_samples,):
        raise ValueError(f"labels must be [N] for {num_samples} samples, got {labels.shape}")
    steps = np.diff(labels.astype(np.int64))
    is_sorted = steps.any() and ((steps >= 0).all() or (steps <= 0).all())
    if is_sorted and num_samples > chunk_size:
        warnings.warn(
            f"the samples are sorted by class, so a chunk of {chunk_size} has few classes and the Inception score is "
            "too low; draw labels at random, or shuffle the samples once",
            ClassSortedWarning,
            stacklevel=3,
        )


class PrecisionRecall(NamedTuple):
    """Improved precision and recall.

    Attributes:
      is_sample_inside: [N] bool, whether a sample lies in the manifold of the reference.
      is_reference_inside: [M] bool, whether a reference lies in the manifold of the samples.
    """

    is_sample_inside: np.ndarray
    is_reference_inside: np.ndarray

    @property
    def precision(self) -> float:
        return float(self.is_sample_inside.mean())

    @property
    def recall(self) -> float:
        return float(self.is_reference_inside.mean())


def precision_recall(
    samples, reference, *, k: int = 3, mode: str = "float32", block_size: int | None = None
) -> PrecisionRecall:
    """Improved precision and recall: a manifold is the union of balls with radii to the k-th nearest neighbour.

    Args:
      samples: [N, d].
      reference: [M, d]; ADM uses 10,000.
      k: the neighbour that a ball reaches, the point itself not counted.
      mode: "float32", or "adm_float16" for the rounding of ADM's evaluator: distances in float16, in float32 where a
        block of 10,000 x 10,000 has one that is not finite. Its features are not centred, so its error is larger.
      block_size: rows of a block in mode "float32"; by default at most 8192.

    Raises:
      ValueError: shapes do not agree, values are not finite, a set has at most k rows, or the mode is unknown.
    """
    if mode not in _MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(_MODES)}")
    _check_sets(samples, reference, k)
    options = {"metric": _MODES[mode], "block_size": block_size if mode == "float32" else _ADM_BLOCK}
    of_samples, of_reference = (radii(features, k, **options) for features in (samples, reference))
    counts = ball_counts(samples, reference, of_samples, of_reference, **options)
    return PrecisionRecall(counts.reference_balls > 0, counts.sample_balls > 0)


def _check_sets(samples, reference, k: int) -> None:
    check_same_dimension(samples, reference, ("samples", "reference"))
    if k < 1 or min(len(samples), len(reference)) <= k:
        raise ValueError(
            f"the {k}-th nearest neighbour needs k >= 1 and more than k rows; got {len(samples)} samples and "
            f"{len(reference)} references"
        )


class DensityCoverage(NamedTuple):
    """Density and coverage.

    Attributes:
      num_balls: [N] float, of the reference around each sample, over k; its mean is the density.
      is_covered: [M] bool, whether the ball of a reference has a sample inside; its mean is the coverage.
    """

    num_balls: np.ndarray
    is_covered: np.ndarray

    @property
    def density(self) -> float:
        return float(self.num_balls.mean())

    @property
    def coverage(self) -> float:
        return float(self.is_covered.mean())


def density_coverage(samples, reference, *, k: int = 5, block_size: int | None = None) -> DensityCoverage:
    """Density and coverage, with open balls around the reference, in float32.

    Args:
      samples: [N, d].
      reference: [M, d].
      k: the neighbour that a ball reaches, the point itself not counted.
      block_size: rows of a block.

    Raises:
      ValueError: as for `precision_recall`.
    """
    _check_sets(samples, reference, k)
    of_reference = radii(reference, k, block_size=block_size)
    is_open = np.where(of_reference > 0, np.nextafter(of_reference, np.float32(0)), np.float32(-1))
    empty = np.full(len(samples), -1, np.float32)
    counts = ball_counts(samples, reference, empty, is_open, block_size=block_size)
    return DensityCoverage(counts.reference_balls / k, counts.samples_inside > 0)


class KernelDistance(NamedTuple):
    """Mean and standard deviation over the subsets."""

    mean: float
    deviation: float


def kid(samples, reference, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> KernelDistance:
    """The kernel distance: the unbiased MMD**2 of the kernel (x.y / d + 1)**3, averaged over random subsets.

    Products are in float32, which gives an absolute error of about 1e-6.

    Args:
      samples: [N, d].
      reference: [M, d].
      num_subsets: pairs of subsets.
      subset_size: rows of a subset, drawn without replacement.
      seed: of the subsets.

    Raises:
      ValueError: shapes do not agree, values are not finite, or a set is smaller than a subset.
    """
    check_same_dimension(samples, reference, ("samples", "reference"))
    if num_subsets < 1 or not 2 <= subset_size <= min(len(samples), len(reference)):
        raise ValueError(
            f"KID needs subsets of 2 rows or more, and as many rows in both sets; got {num_subsets} subsets of "
            f"{subset_size}, {len(samples)} samples, {len(reference)} references"
        )
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        x, y = (rows[generator.permutation(len(rows))[:subset_size]] for rows in (samples, reference))
        within, across = _cubic_sums(np.asarray(x, np.float32), np.asarray(y, np.float32))
        n = subset_size
        within, across = np.asarray(within, np.float64).sum(), np.asarray(across, np.float64).sum()
        values.append(within / (n * (n - 1)) - 2 * across / n**2)
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


@jax.jit
def _cubic_sums(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows' sums of the kernel minus 1, which cancels: within x and y without the diagonal, and between them."""

    def kernel(a, b):
        t = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST) / a.shape[1]
        return t * (3 + t * (3 + t))

    off_diagonal = 1 - jnp.eye(len(x), dtype=x.dtype)
    return ((kernel(x, x) + kernel(y, y)) * off_diagonal).sum(axis=1), kernel(x, y).sum(axis=1)


def gaussian_mmd(samples, reference, *, sigma: float = 10.0, block_size: int | None = None) -> float:
    """1000 times the biased MMD**2 of the kernel exp(-|x - y|**2 / (2 sigma**2)).

    CMMD is this with CLIP's features of ViT-L/14 at 336 pixels and sigma = 10.

    Args:
      samples: [N, d].
      reference: [M, d].
      sigma: of the kernel.
      block_size: rows of a block.

    Raises:
      ValueError: shapes do not agree, values are not finite, or sigma is not positive.
    """
    check_same_dimension(samples, reference, ("samples", "reference"))
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    kernel = _gaussian_minus_1(float(sigma))
    means = [
        kernel_sum(a, b, kernel, block_size=block_size) / (len(a) * len(b))
        for a, b in ((samples, samples), (reference, reference), (samples, reference))
    ]
    return 1000 * (means[0] + means[1] - 2 * means[2])


@functools.cache  # one function a sigma, which jit compiles once
def _gaussian_minus_1(sigma: float):
    """The 1 cancels in the MMD. Without it, digits of kernels near 1 are kept."""
    return lambda d: jnp.expm1(d * (-0.5 / sigma**2))
