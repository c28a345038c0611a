"""Squared Euclidean distances of feature vectors, block by block on the devices of this host.

    d(u, v) = |u|**2 + |v|**2 - 2 u.v

in float32, with products of full precision. The rounding error is about 1e-6 times |u|**2 + |v|**2, so the mean is
subtracted from both sides first, and distances below that error become 0. No array is larger than a block of N x M
distances. Several devices split the rows of a block.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BLOCK_ROWS = 8192
_BLOCK_BYTES = 2**28  # of the rows of a block: images have fewer rows
_ROUNDING = 2e-6  # relative to |u|**2 + |v|**2
_ROWS_FOR_MEAN = 1024


class Block(NamedTuple):
    """Rows on the devices.

    Attributes:
      rows: [b, d] float32.
      norms: [b] float32, their squares; infinite for rows of padding.
      slice: of the rows in the whole array; shorter than b if padded.
    """

    rows: jax.Array
    norms: jax.Array
    slice: slice

    @property
    def num_rows(self) -> int:
        return self.slice.stop - self.slice.start


class Blocks:
    """Rows of an array as blocks of one size, the last one padded.

    Args:
      array: [N, ...] of any real dtype, which may be memory-mapped; all but the first dimension are flattened.
      center: [d], subtracted from the rows, or None.
      block_size: rows in a block at most, or None.
      is_split: whether devices split the rows of a block; otherwise each has all of them.
      is_even: whether blocks are as equal as possible, which needs the least padding; otherwise all but the last have
        block_size rows.
    """

    def __init__(self, array, center: np.ndarray | None, block_size: int | None, *, is_split=False, is_even=True):
        self._array, self._center = array, center
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), ("rows",))
        self._sharding = NamedSharding(mesh, PartitionSpec("rows" if is_split else None))
        num_rows = len(array)
        size = min(num_rows, block_size or default_block_size(array))
        if is_even:
            size = -(-num_rows // -(-num_rows // size))
        self.size = -(-size // len(devices)) * len(devices) if is_split else size

    def __len__(self) -> int:
        return -(-len(self._array) // self.size)

    def __getitem__(self, i: int) -> Block:
        start, stop = i * self.size, min((i + 1) * self.size, len(self._array))
        rows = flat(self._array[start:stop])
        if self._center is not None:
            rows = rows - self._center.astype(np.result_type(rows.dtype, np.float32))
        padding = self.size - len(rows)
        rows = np.pad(rows.astype(np.float32), ((0, padding), (0, 0)))
        norms = np.einsum("nd,nd->n", rows, rows, dtype=np.float64).astype(np.float32)
        norms[self.size - padding :] = np.inf
        rows, norms = jax.device_put((rows, norms), self._sharding)
        return Block(rows, norms, slice(start, stop))

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))


def flat(array) -> np.ndarray:
    """[N, ...] -> [N, d]."""
    array = np.asarray(array)
    return array.reshape(len(array), -1)


def default_block_size(array) -> int:
    """Rows of a block, for blocks of at most 256 MB of rows and of distances."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * max(1, int(np.prod(np.shape(array)[1:]))))))


def center_of(array) -> np.ndarray:
    """The mean of up to 1024 rows: [d] float64. Any point near all rows serves."""
    return flat(array[:: -(-len(array) // _ROWS_FOR_MEAN)]).mean(axis=0, dtype=np.float64)


def check_features(array, name: str) -> None:
    """Checks that an array is [N, d] or [N, H, W, C], of real numbers, all finite.

    Raises:
      ValueError: it is not.
    """
    if np.ndim(array) < 2 or not len(array) or not (array.dtype.kind in "fiu" or array.dtype == jnp.bfloat16):
        raise ValueError(f"{name} must be a non-empty array [N, d] of real numbers, got {array.dtype}{array.shape}")
    if array.dtype.kind in "iu":
        return
    size = default_block_size(array)
    for start in range(0, len(array), size):
        is_finite = np.isfinite(flat(array[start : start + size])).all(axis=1)
        if not is_finite.all():
            raise ValueError(f"{name}: values are not finite, the first in row {start + is_finite.argmin()}")


def check_same_dimension(a, b, names: tuple[str, str]) -> None:
    """Checks both arrays, and that their rows have the same shape.

    Raises:
      ValueError: they do not, or one of them is no array of features.
    """
    for array, name in zip((a, b), names, strict=True):
        check_features(array, name)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"{names[0]} have the shape {a.shape[1:]} a row, {names[1]} {b.shape[1:]}")


# Two ways to compute a block of distances.


def float32_distances(u: jax.Array, u_norms: jax.Array, v: jax.Array, v_norms: jax.Array) -> jax.Array:
    """Squared distances of two blocks' rows: [b, c] float32, infinite to rows of padding."""
    sums = u_norms[:, None] + v_norms
    distances = sums - 2 * jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(distances < _ROUNDING * sums, 0, distances)


def adm_float16_distances(u: jax.Array, u_norms: jax.Array, v: jax.Array, v_norms: jax.Array) -> jax.Array:
    """The same with the rounding of ADM's evaluator; in float32 if one of the block is not finite in float16.

    Features, squares, norms, products and sums are each rounded to float16. Sums over d are accumulated in float32, as
    on a GPU. `reduce_precision` rounds where XLA would leave out a conversion to float16 and back.
    """
    half = functools.partial(jax.lax.reduce_precision, exponent_bits=5, mantissa_bits=10)
    is_padding = jnp.isinf(u_norms)[:, None] | jnp.isinf(v_norms)

    def rounded(u, v, half):
        u_norms, v_norms = (half(half(jnp.square(x)).sum(axis=1)) for x in (u, v))
        products = half(jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST))
        return jnp.maximum(half(half(u_norms[:, None] - half(2 * products)) + v_norms), 0)

    distances = rounded(half(u), half(v), half)
    is_finite = (jnp.isfinite(distances) | is_padding).all()
    distances = jax.lax.cond(is_finite, lambda: distances, lambda: rounded(u, v, lambda x: x))
    return jnp.where(is_padding, jnp.inf, distances)


class Metric(NamedTuple):
    """How distances are computed.

    Attributes:
      distances: of two blocks.
      is_centred: whether the mean is subtracted from both sides, and blocks have equal sizes; d(u, v) = d(v, u).
    """

    distances: Callable[..., jax.Array]
    is_centred: bool


FLOAT32 = Metric(float32_distances, True)
ADM_FLOAT16 = Metric(adm_float16_distances, False)


def squared_distances(queries, candidates) -> jax.Array:
    """Squared Euclidean distances of all pairs of rows, for arrays of at most a block: [N, M] float32.

    Args:
      queries: [N, ...].
      candidates: [M, ...].
    """
    center = center_of(candidates)
    (u,), (v,) = Blocks(queries, center, len(queries)), Blocks(candidates, center, len(candidates))
    return jax.jit(float32_distances)(u.rows, u.norms, v.rows, v.norms)


# Loops over blocks. Each waits for the step before the last one, so that one block is loaded while another is used.


def smallest(
    queries, candidates, k: int, *, block_size: int | None = None, metric: Metric = FLOAT32
) -> tuple[np.ndarray, np.ndarray]:
    """The k smallest squared distances of each query in ascending order: [N, k] float32, and indices [N, k] int32.

    The caller checks the arrays, and that k <= M.
    """
    center = center_of(candidates) if metric.is_centred else None
    of_queries = Blocks(queries, center, block_size, is_split=True, is_even=metric.is_centred)
    of_candidates = Blocks(candidates, center, block_size, is_even=metric.is_centred)
    distances = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int32)
    for u in of_queries:
        best = jnp.full((of_queries.size, k), jnp.inf), jnp.zeros((of_queries.size, k), jnp.int32)
        for v in of_candidates:
            found = _update_smallest(best, u[:2], v[:2], v.slice.start, metric.distances)
            jax.block_until_ready(best)
            best = found
        distances[u.slice], indices[u.slice] = (np.asarray(values)[: u.num_rows] for values in best)
    return distances, indices


def radii(features, k: int, *, block_size: int | None = None, metric: Metric = FLOAT32) -> np.ndarray:
    """The squared distance of each row to its k-th nearest other row: [N] float32.

    The caller checks the array, and that k < N. A row itself counts as the nearest, as in ADM's evaluator, which takes
    the (k + 1)-th smallest distance. On one device each pair of blocks is multiplied once, for both.
    """
    if len(jax.local_devices()) > 1 or not metric.is_centred:
        return smallest(features, features, k + 1, block_size=block_size, metric=metric)[0][:, k]
    blocks = Blocks(features, center_of(features), block_size)
    best = [jnp.full((blocks.size, k + 1), jnp.inf) for _ in range(len(blocks))]
    for i in range(len(blocks)):
        u = blocks[i]
        for j in range(i, len(blocks)):
            v = u if j == i else blocks[j]
            found = _update_both(best[i], best[j], u[:2], v[:2], metric.distances)
            jax.block_until_ready(best[i])
            best[i], best[j] = found
    return np.concatenate([np.asarray(distances)[:, k] for distances in best])[: len(features)]


class BallCounts(NamedTuple):
    """Which points lie in which balls.

    Attributes:
      reference_balls: [N] int, around references, that contain each sample.
      sample_balls: [M] int, around samples, that contain each reference.
      samples_inside: [M] int, samples in the ball around each reference.
    """

    reference_balls: np.ndarray
    sample_balls: np.ndarray
    samples_inside: np.ndarray


def ball_counts(
    samples,
    reference,
    sample_radii: np.ndarray,
    reference_radii: np.ndarray,
    *,
    block_size: int | None = None,
    metric: Metric = FLOAT32,
) -> BallCounts:
    """Counts the points in closed balls; the caller checks the arrays.

    Args:
      samples: [N, ...].
      reference: [M, ...].
      sample_radii: [N] float32, squared; negative for an empty ball.
      reference_radii: [M] float32, likewise.
      block_size: rows of a block.
      metric: of the distances.
    """
    center = center_of(reference) if metric.is_centred else None
    of_reference = Blocks(reference, center, block_size, is_split=True, is_even=metric.is_centred)
    of_samples = Blocks(samples, center, block_size, is_even=metric.is_centred)
    counts = BallCounts(*(np.zeros(len(of), np.int64) for of in (samples, reference, reference)))
    for u in of_reference:
        u_radii = _padded(reference_radii[u.slice], of_reference.size)
        before = None
        for v in of_samples:
            v_radii = _padded(sample_radii[v.slice], of_samples.size)
            found = u, v, _count(u[:2], v[:2], u_radii, v_radii, metric.distances)
            if before is not None:
                _add_counts(counts, *before)
            before = found
        _add_counts(counts, *before)
    return counts


def kernel_sum(a, b, kernel: Callable[[jax.Array], jax.Array], *, block_size: int | None = None) -> float:
    """The sum of kernel(squared distance) over all pairs of rows of a and b, float64.

    Args:
      a: [N, ...].
      b: [M, ...]; if it is a itself, each pair of blocks is computed once.
      kernel: elementwise.
      block_size: rows of a block.
    """
    center = center_of(b)
    of_a, of_b = Blocks(a, center, block_size, is_split=True), Blocks(b, center, block_size)
    is_symmetric = a is b and of_a.size == of_b.size
    total, before = 0.0, None
    for i in range(len(of_a)):
        u = of_a[i]
        for j in range(i if is_symmetric else 0, len(of_b)):
            found = 1 + (is_symmetric and j > i), _sum_kernel(u[:2], of_b[j][:2], kernel)
            if before is not None:
                total += before[0] * np.asarray(before[1], np.float64).sum()
            before = found
    return float(total + before[0] * np.asarray(before[1], np.float64).sum())


# Steps on the devices.


@functools.partial(jax.jit, static_argnames="distances")
def _update_smallest(best, u, v, first, distances):
    """The k smallest of those before, best, and of block v, whose first row has the index `first`."""
    old, old_indices = best
    k = old.shape[1]
    new, new_indices = jax.lax.top_k(-distances(*u, *v), min(k, len(v[1])))
    merged, positions = jax.lax.top_k(jnp.concatenate([-old, new], axis=1), k)  # of equal ones the first
    indices = jnp.concatenate([old_indices, first + new_indices], axis=1)
    return -merged, jnp.take_along_axis(indices, positions, axis=1)


@functools.partial(jax.jit, static_argnames="distances")
def _update_both(best_u, best_v, u, v, distances):
    """The smallest distances of u's rows to v's, and of v's to u's, together with those before."""

    def update(best, d):
        k = best.shape[1]
        new, _ = jax.lax.top_k(-d, min(k, d.shape[1]))
        return -jax.lax.top_k(jnp.concatenate([-best, new], axis=1), k)[0]

    d = distances(*u, *v)
    return update(best_u, d), update(best_v, d.T)


@functools.partial(jax.jit, static_argnames="distances")
def _count(u, v, u_radii, v_radii, distances):
    """[c] balls of u that contain each of v, [b] balls of v that contain each of u, [b] rows of v in each of u's."""
    d = distances(*u, *v)
    is_in_u, is_in_v = d <= u_radii[:, None], d <= v_radii
    return is_in_u.sum(axis=0), is_in_v.sum(axis=1), is_in_u.sum(axis=1)


@functools.partial(jax.jit, static_argnames="kernel")
def _sum_kernel(u, v, kernel):
    d = float32_distances(*u, *v)
    return jnp.where(jnp.isinf(d), 0, kernel(d)).sum(axis=1)


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    return np.pad(values, (0, size - len(values)), constant_values=-1)


def _add_counts(counts: BallCounts, u: Block, v: Block, found) -> None:
    of_v, of_u, inside_u = (np.asarray(values) for values in found)
    counts.reference_balls[v.slice] += of_v[: v.num_rows]
    counts.sample_balls[u.slice] += of_u[: u.num_rows]
    counts.samples_inside[u.slice] += inside_u[: u.num_rows]
