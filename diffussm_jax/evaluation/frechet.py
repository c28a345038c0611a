"""The Fréchet distance of two sets of features, with each set as a Gaussian, and means and covariances in float64.

    FD = |m_1 - m_2|**2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)**(1/2)

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500. With Inception features this is FID, or
sFID for the spatial features. Covariances divide by N - 1, as in ADM's evaluator.

For any A with A^T A = S_1, tr (S_1 S_2)**(1/2) is the sum of the square roots of the eigenvalues of A S_2 A^T. With
B^T B = S_2 it is the sum of the singular values of A B^T, which is also accurate for singular covariances. N rows of
features have such an A with N - 1 rows.
"""

import dataclasses
import functools
import warnings
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

_ROWS = 4096  # converted to float64 at a time
_EPS = np.finfo(np.float64).eps


class FewSamplesWarning(UserWarning):
    """There are fewer samples than feature dimensions, so the score depends strongly on their number."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of features.

    Attributes:
      mean: [d] float64.
      covariance: [d, d] float64, the sum of squares over N - 1.
      count: N; None if unknown, as for published statistics.

    Raises:
      ValueError: shapes do not agree, a value is not finite, or the covariance is not symmetric.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    def __post_init__(self):
        mean, covariance = np.asarray(self.mean, np.float64), np.asarray(self.covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise ValueError(f"moments need a mean [d] and a covariance [d, d], got {mean.shape}, {covariance.shape}")
        _check_finite(mean, "the mean")
        _check_finite(covariance, "the covariance")
        if np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
            raise ValueError("the covariance is not symmetric")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)

    @classmethod
    def of(cls, features) -> "Moments":
        """Of features [N, d], N >= 2."""
        return RunningMoments().add(features).moments()

    @functools.cached_property
    def root(self) -> np.ndarray:
        """A with A^T A = covariance: [rank, d] float64. Eigenvalues below the rounding error are left out."""
        eigenvalues, vectors = np.linalg.eigh(self.covariance)
        is_kept = eigenvalues > 4 * _EPS * eigenvalues[-1]
        return np.sqrt(eigenvalues[is_kept])[:, None] * vectors[:, is_kept].T


class RunningMoments:
    """Mean and covariance of features that arrive in parts, in float64.

    Parts are merged by Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances" (1979). The result equals that of all rows at once up to rounding, about 1e-13.

    Attributes:
      count: rows so far, N.
      mean: [d] float64; None before the first row.
      scatter: [d, d] float64, the sum of (x - mean)(x - mean)^T; None before the first row.
    """

    def __init__(self):
        self.count = 0
        self.mean: np.ndarray | None = None
        self.scatter: np.ndarray | None = None

    def add(self, features) -> "RunningMoments":
        """Adds features [n, d]; of a global array of several hosts, the rows that this host's devices hold.

        Each row of a global array is added on one host only, also where devices hold copies.

        Returns:
          self.

        Raises:
          ValueError: the features are not [n, d], have another d than those before, or are not finite.
        """
        for rows in _local_parts(features):
            if rows.ndim != 2:
                raise ValueError(f"features must be [n, d], got {rows.shape}")
            for start in range(0, len(rows), _ROWS):
                block = np.asarray(rows[start : start + _ROWS], np.float64)
                _check_finite(block, f"features (rows {self.count} to {self.count + len(block) - 1})")
                mean = block.mean(axis=0)
                centred = block - mean
                self._merge(len(block), mean, centred.T @ centred)
        return self

    def merge(self, other: "RunningMoments") -> "RunningMoments":
        """Adds the rows of other moments; returns self."""
        if other.count:
            self._merge(other.count, other.mean, other.scatter)
        return self

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if self.mean is None:
            self.count, self.mean, self.scatter = count, mean.copy(), scatter.copy()
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"features have d = {len(mean)}, those before had {len(self.mean)}")
        total = self.count + count
        difference = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(difference, difference * (self.count * count / total))
        self.mean += difference * (count / total)
        self.count = total

    def merge_over_hosts(self) -> "RunningMoments":
        """Replaces the moments by those of all processes' rows, the same bits on each; returns self.

        All processes must call this, once. Values cross hosts as pairs of uint32, because JAX would round float64 to
        float32. One process sends at a time, so a process holds two copies of the scatter.
        """
        if jax.process_count() == 1:
            return self
        own = np.array([self.count, 0 if self.mean is None else len(self.mean)], np.int64)
        sizes = np.asarray(multihost_utils.process_allgather(own.view(np.uint32))).view(np.int64)
        if len({dimension for count, dimension in sizes.tolist() if count}) > 1:
            raise ValueError(f"hosts have features of different d: {', '.join(map(str, sizes[:, 1]))}")
        total, dimension = RunningMoments(), sizes[:, 1].max()
        for process, (count, _) in enumerate(sizes.tolist()):
            if not count:
                continue
            is_source = jax.process_index() == process
            rows = np.vstack([self.mean, self.scatter]) if is_source else np.zeros((dimension + 1, dimension))
            sent = multihost_utils.broadcast_one_to_all(rows.view(np.uint32), is_source=is_source)
            rows = np.ascontiguousarray(sent).view(np.float64)
            total._merge(count, rows[0], rows[1:])
        self.count, self.mean, self.scatter = total.count, total.mean, total.scatter
        return self

    def moments(self) -> Moments:
        """The mean and covariance so far.

        Raises:
          ValueError: there are fewer than 2 rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return Moments(self.mean.copy(), self.scatter / (self.count - 1), self.count)


def warn_if_few_samples(count: int | None, dimension: int, name: str = "samples") -> bool:
    """Warns with a `FewSamplesWarning` if N <= d, where covariances are singular; returns whether it does."""
    is_few = count is not None and count <= dimension
    if is_few:
        warnings.warn(
            f"{count} {name} for features of {dimension} dimensions: the covariance is singular and the Fréchet "
            "distance is biased upwards; compare it only with distances of as many samples",
            FewSamplesWarning,
            stacklevel=3,
        )
    return is_few


def frechet_distance(samples, reference) -> float:
    """The Fréchet distance, float64.

    Features with N <= d are not turned into a covariance: the result is exact for singular cases. The root of the
    reference's covariance is kept in its `Moments`, so further distances to the same object take less time.

    Args:
      samples: `Moments`, or features [N, d].
      reference: likewise.

    Raises:
      ValueError: not [N, d], fewer than 2 samples, different d, or values that are not finite.
    """
    a, b = _Side.of(samples), _Side.of(reference)
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"samples have features of d = {len(a.mean)}, the reference has d = {len(b.mean)}")
    warn_if_few_samples(a.count, len(a.mean))
    warn_if_few_samples(b.count, len(b.mean), "reference samples")
    difference = a.mean - b.mean
    traces = a.trace + b.trace
    return float(difference @ difference + traces - 2 * _trace_of_root(a, b, noise=1e-9 * traces))


class _Side(NamedTuple):
    """One set: its covariance is in `moments`, or is factor^T factor."""

    mean: np.ndarray
    count: int | None
    trace: float
    moments: Moments | None
    factor: np.ndarray | None

    @classmethod
    def of(cls, values) -> "_Side":
        if not isinstance(values, Moments):
            shape = np.shape(values)
            if len(shape) != 2:
                raise ValueError(f"features must be [N, d], got {shape}")
            if 2 <= shape[0] <= shape[1]:
                return cls._of_few(np.asarray(values, np.float64))
            values = Moments.of(values)
        return cls(values.mean, values.count, np.trace(values.covariance), values, None)

    @classmethod
    def _of_few(cls, features: np.ndarray) -> "_Side":
        """N <= d rows. The factor [N - 1, d] has the rows sqrt(n / (n + 1) / (N - 1)) (x_n - mean of x_0 … x_{n-1})."""
        _check_finite(features, "features")
        n = np.arange(1, len(features))[:, None]
        centred = features - features.mean(axis=0)
        factor = (centred[1:] - np.cumsum(centred[:-1], axis=0) / n) * np.sqrt(n / (n + 1) / n[-1])
        return cls(features.mean(axis=0), len(features), np.square(factor).sum(), None, factor)


def _trace_of_root(a: _Side, b: _Side, noise: float) -> float:
    """tr (S_a S_b)**(1/2)."""
    if a.factor is not None and b.factor is not None:
        return _nuclear_norm(a.factor @ b.factor.T)
    if b.factor is not None:
        a, b = b, a
    # At least b has a covariance.
    root, covariance = (b.moments.root, a.moments.covariance) if a.factor is None else (a.factor, b.moments.covariance)
    product = root @ covariance @ root.T
    eigenvalues = np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)
    roots = np.sqrt(eigenvalues)
    # Rounding turns eigenvalues of 0 into some of eps times the largest, whose roots may matter.
    if roots[eigenvalues <= len(eigenvalues) * _EPS * eigenvalues[-1]].sum() <= noise:
        return roots.sum()
    return _nuclear_norm(root @ (b.moments if a.factor is not None else a.moments).root.T)


def _nuclear_norm(matrix: np.ndarray) -> float:
    return np.linalg.svd(matrix, compute_uv=False).sum()


class FrechetInfinity(NamedTuple):
    """The Fréchet distance extrapolated to infinitely many samples.

    Attributes:
      value: the intercept of the line through the distances over 1 / N.
      sizes: [num_sizes] int, the numbers of samples N.
      distances: [num_sizes] float64.
    """

    value: float
    sizes: np.ndarray
    distances: np.ndarray


def frechet_infinity(
    features, reference, *, num_sizes: int = 15, min_size: int = 5000, seed: int = 0
) -> FrechetInfinity:
    """Extrapolates the Fréchet distance linearly in 1 / N to infinitely many samples.

    Chong and Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them", arXiv 1911.07023. Each
    size has a random subset of its own, without replacement. The bias that is left is that of the reference.

    Args:
      features: [N, d].
      reference: `Moments`, or features [M, d].
      num_sizes: sizes from min_size to N, evenly spaced.
      min_size: the smallest size; it should be above d.
      seed: of the subsets.

    Raises:
      ValueError: as for `frechet_distance`, or there are not more than min_size samples.
    """
    if not isinstance(reference, Moments):
        reference = Moments.of(reference)
    if num_sizes < 2 or not 2 <= min_size < len(features):
        raise ValueError(
            f"FID infinity needs at least 2 sizes between min_size and the number of samples; got {num_sizes} sizes, "
            f"min_size = {min_size} and {len(features)} samples"
        )
    warn_if_few_samples(min_size, len(reference.mean), "samples in the smallest subset")
    generator = np.random.default_rng(seed)
    sizes = np.linspace(min_size, len(features), num_sizes).round().astype(int)
    distances = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewSamplesWarning)
        for size in sizes:
            rows = np.sort(generator.permutation(len(features))[:size])
            distances.append(frechet_distance(features[rows], reference))
    _, value = np.polyfit(1 / sizes, distances, 1)
    return FrechetInfinity(float(value), sizes, np.array(distances))


def _local_parts(features) -> list:
    """The rows on this host: the array itself, or one copy of each part of a global array."""
    if isinstance(features, jax.Array) and not features.is_fully_addressable:
        parts = [np.asarray(shard.data) for shard in features.addressable_shards if shard.replica_id == 0]
        if any(part.shape[1:] != features.shape[1:] for part in parts):
            raise ValueError(f"features of several hosts must be split by rows only, got {features.sharding}")
        return parts
    return [features if hasattr(features, "ndim") else np.asarray(features)]


def _check_finite(array: np.ndarray, name: str) -> None:
    if not np.isfinite(array).all():
        first = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{name}: {(~np.isfinite(array)).sum()} values are not finite, the first at {first}")
