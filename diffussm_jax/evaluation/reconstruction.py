"""Scores of an autoencoder: how far reconstructions are from their originals.

    PSNR     10 log10(255^2 / mean squared error), in dB
    SSIM     structural similarity; Wang et al., "Image Quality Assessment", IEEE TIP 13 (2004), equation 13
    rFID     Frechet distance between the features of reconstructions and of originals; "rFD-cifar10" with others

In each 11 x 11 window, weighted by a Gaussian w of standard deviation 1.5,

    SSIM = (2 mu_x mu_y + C_1) (2 sigma_xy + C_2) / ((mu_x^2 + mu_y^2 + C_1) (sigma_x^2 + sigma_y^2 + C_2)),
    sigma_xy = sum w (x - mu_x) (y - mu_y),   C_1 = (0.01 * 255)^2,   C_2 = (0.03 * 255)^2.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.evaluation.bootstrap import proportion_interval
from diffussm_jax.evaluation.extractor import FEATURES, Extractor, check_images
from diffussm_jax.evaluation.frechet import frechet_distance
from diffussm_jax.evaluation.scores import Score

WINDOW = 11  # pixels
_GAUSSIAN = np.exp(-np.square(np.arange(WINDOW) - WINDOW // 2) / (2 * 1.5**2))
_GAUSSIAN = (_GAUSSIAN / _GAUSSIAN.sum()).astype(np.float32)
_C_1, _C_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_VALUES_PER_BATCH = 1 << 20  # 4 MB in float32
_MAX_BATCH_SIZE = 64
_NORMAL_95 = 1.96
_UNITS = {"PSNR": "dB"}

NamedDistance = tuple[str, Callable[[jax.Array, jax.Array], jax.Array]]


def psnr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of pairs of images.

    Args:
      x, y: [N, H, W, C] uint8.

    Returns:
      [N] float64, in dB, with a peak of 255; infinite where the images are equal.

    Raises:
      ValueError: the images are not uint8, or their shapes differ.
    """
    check_pairs(x, y)
    errors = _in_batches(_squared_errors, x, y)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / (errors.sum((1, 2), dtype=np.float64) / x[0].size))


@jax.jit
def _squared_errors(x: jax.Array, y: jax.Array) -> jax.Array:
    """[B, H, C] int32, exact sums over rows of up to 33,000 pixels; in float32 the sum over an image loses digits."""
    return jnp.square(x.astype(jnp.int32) - y.astype(jnp.int32)).sum(2)


def ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The structural similarity of pairs of images: the mean over the windows that lie inside, and over channels.

    Args:
      x, y: [N, H, W, C] uint8.

    Returns:
      [N] float64, at most 1.

    Raises:
      ValueError: the images are not uint8, their shapes differ, or they are smaller than a window.
    """
    check_pairs(x, y)
    if min(x.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM has windows of {WINDOW} x {WINDOW} pixels, got images of {x.shape[1]} x {x.shape[2]}")
    return _in_batches(_ssim_of_rows, x, y).mean(1, dtype=np.float64)


@jax.jit
def _ssim_of_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """[B, H - 10], means over a row of windows and over channels."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    zero = jnp.zeros_like(x)
    mean_x, mean_y, var_x, var_y, cov = _windowed(_windowed((x, y, zero, zero, zero), 2), 1)
    of_means = (2 * mean_x * mean_y + _C_1) / (mean_x**2 + mean_y**2 + _C_1)
    of_variances = (2 * cov + _C_2) / (var_x + var_y + _C_2)
    return (of_means * of_variances).mean((2, 3))


def _windowed(moments: tuple[jax.Array, ...], axis: int) -> tuple[jax.Array, ...]:
    """The means, variances and covariance of windows along an axis, from those of their elements.

    By the law of total covariance, the mean of the elements' covariances plus the covariance of their means. Nothing
    large is subtracted from something large, as it is in E[x^2] - E[x]^2.
    """
    mean_x, mean_y, var_x, var_y, cov = (_slices(moment, axis) for moment in moments)
    x, y = _weighted(mean_x), _weighted(mean_y)
    dx, dy = [m - x for m in mean_x], [m - y for m in mean_y]
    return (
        x,
        y,
        _weighted([v + d * d for v, d in zip(var_x, dx, strict=True)]),
        _weighted([v + d * d for v, d in zip(var_y, dy, strict=True)]),
        _weighted([c + a * b for c, a, b in zip(cov, dx, dy, strict=True)]),
    )


def _slices(x: jax.Array, axis: int) -> list[jax.Array]:
    """The k-th elements of all windows along an axis, for each k."""
    num_windows = x.shape[axis] - WINDOW + 1
    return [jax.lax.slice_in_dim(x, k, k + num_windows, axis=axis) for k in range(WINDOW)]


def _weighted(slices: list[jax.Array]) -> jax.Array:
    return sum(weight * x for weight, x in zip(_GAUSSIAN, slices, strict=True))


def check_pairs(x: np.ndarray, y: np.ndarray) -> None:
    """Raises ValueError if images are not pairs of uint8 images."""
    if x.shape != y.shape:
        raise ValueError(f"originals and reconstructions differ in shape: {list(x.shape)} and {list(y.shape)}")
    check_images(x)
    check_images(y)


def _in_batches(function: Callable, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """function(x, y) of all pairs, on the host."""
    batch_size = max(1, min(len(x), _MAX_BATCH_SIZE, _VALUES_PER_BATCH // x[0].size))
    found = []
    for start in range(0, len(x), batch_size):
        rows = (start + np.arange(batch_size)) % len(x)  # one shape, one compilation
        found.append(np.asarray(function(x[rows], y[rows])))
    return np.concatenate(found)[: len(x)]


def reconstruction_scores(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    extractor: Extractor | None,
    perceptual: NamedDistance | None = None,
) -> dict[str, Score]:
    """Scores of reconstructions by name. Means over images have their standard error as `deviation`.

    Images whose reconstruction is exact have no finite PSNR. The mean leaves them out, and their share is the score
    "exact". If all are exact, PSNR is infinite. Images smaller than 11 pixels have no SSIM.

    Args:
      originals, reconstructions: [N, H, W, C] uint8.
      extractor: of the features for the Frechet distance, "r" before its name; None: no such distance.
      perceptual: a name such as "LPIPS", and a function of x and y, float32 [B, H, W, C] in [-1, 1], to distances [B].
        It is called as it is, with batches of one size: pass a jitted one.

    Raises:
      ValueError: as `psnr`, the extractor does not take such images, or there are fewer than 2 for it.
    """
    decibels = psnr(originals, reconstructions)
    is_exact = np.isinf(decibels)
    scores = {"PSNR": _mean(decibels if is_exact.all() else decibels[~is_exact], "higher")}
    if is_exact.any():
        interval = proportion_interval(int(is_exact.sum()), len(is_exact))
        scores["exact"] = Score(float(is_exact.mean()), *interval, "higher")
    if min(originals.shape[1:3]) >= WINDOW:
        scores["SSIM"] = _mean(ssim(originals, reconstructions), "higher")
    if perceptual is not None:
        name, function = perceptual
        distances = _in_batches(lambda x, y: function(_to_unit_range(x), _to_unit_range(y)), originals, reconstructions)
        scores[name] = _mean(distances.astype(np.float64), "lower")
    if extractor is not None:
        features = [extractor(images)[FEATURES] for images in (reconstructions, originals)]
        distance = max(frechet_distance(*features), 0.0)  # rounding makes some of 0 negative
        scores[f"r{extractor.distance}"] = Score(distance, math.nan, math.nan, math.nan, "lower")
    return scores


def _to_unit_range(images: np.ndarray) -> jax.Array:
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def _mean(values: np.ndarray, is_better: str) -> Score:
    """The mean over images, its 95 % interval and its standard error; NaN for a single image."""
    mean = float(values.mean())
    has_error = len(values) > 1 and math.isfinite(mean)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if has_error else math.nan
    return Score(mean, mean - _NORMAL_95 * error, mean + _NORMAL_95 * error, error, is_better)


def as_json(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """Scores as JSON can hold them, under "value", "standard_error" and "is_better"; null where none is finite."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        name: {
            "value": finite(score.value),
            "standard_error": finite(score.deviation),
            "is_better": score.is_better,
        }
        for name, score in scores.items()
    }


def markdown_table(scores: Mapping[str, Score]) -> str:
    """Scores as a table in Markdown."""
    rows = [("score", "value", "standard error", "better"), ("---",) * 4]
    for name, score in scores.items():
        label = f"{name} ({_UNITS[name]})" if name in _UNITS else name
        error = f"{score.deviation:.2g}" if math.isfinite(score.deviation) else ""
        rows.append((label, f"{score.value:.4g}", error, score.is_better))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
