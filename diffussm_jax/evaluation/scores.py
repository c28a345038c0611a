"""Every score of a set of samples against real images, each with a 95 % interval.

Names say which network's features they are computed on: "FID", "sFID", "IS", "precision" are of the FID Inception
alone; with other features they have its name behind them, "FD-digits", "precision-digits".
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffussm_jax.evaluation.bootstrap import Interval, bootstrap, proportion_interval
from diffussm_jax.evaluation.extractor import FEATURES, PROBABILITIES, SPATIAL, Extractor
from diffussm_jax.evaluation.fidelity import density_coverage, gaussian_mmd, inception_score, kid, precision_recall
from diffussm_jax.evaluation.frechet import FewSamplesWarning, Moments, frechet_distance, frechet_infinity

_MAX_KID_SUBSET = 1000
_NUM_MMD_GROUPS = 10
# Behind the names of precision and recall in each arithmetic.
_SUFFIXES = {"float32": "", "adm_float16": "_adm_float16"}
_LARGE_DIMENSION = 256  # from here on a Fréchet distance takes seconds, and fewer resamples are drawn


class Score(NamedTuple):
    """A score with its 95 % interval and the standard deviation of its sampling noise.

    Attributes:
      is_better: "lower" or "higher".
    """

    value: float
    low: float
    high: float
    deviation: float
    is_better: str


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Real images, as an extractor sees them.

    Attributes:
      moments: of the features.
      spatial_moments: of the spatial features, for sFID.
      features: [M, d], for what compares single images; ADM's references have those of 10,000 images. May be empty.
      labels: [M] int, of `features`; None if unknown.
      about: "extractor" and "sha256" of the network if they are known, and what the report says of the source.
    """

    moments: Moments
    spatial_moments: Moments | None
    features: np.ndarray
    labels: np.ndarray | None
    about: dict[str, Any]

    def check_extractor(self, extractor: Extractor) -> None:
        """Raises ValueError if the statistics are of another network."""
        name, sha256 = self.about.get("extractor"), self.about.get("extractor_sha256")
        if name not in (None, extractor.name):
            raise ValueError(f"the reference was made with the extractor {name!r}, the samples' is {extractor.name!r}")
        if sha256 not in (None, extractor.sha256):
            raise ValueError(
                f"the reference was made with other weights of {name}: their SHA-256 is {sha256}, now "
                f"{extractor.sha256}; make the reference again"
            )


class _Context(NamedTuple):
    """What the functions of `_SCORES` are given."""

    outputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    reference: Reference
    mode: str
    num_resamples: int
    seed: int

    @property
    def features(self) -> np.ndarray:
        return self.outputs[FEATURES]

    def resampled(self, score: Callable[[np.ndarray], float]) -> Interval:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, of the samples themselves
            return bootstrap(score, len(self.features), num_resamples=self.num_resamples, seed=self.seed)


def _distance(c: _Context, key: str, moments: Moments) -> Score:
    features = c.outputs[key]
    value = frechet_distance(features, moments)
    return Score(value, *c.resampled(lambda rows: frechet_distance(features[rows], moments)), "lower")


def _frechet(c: _Context) -> dict[str, Score]:
    return {"FD": _distance(c, FEATURES, c.reference.moments)}


def _spatial_frechet(c: _Context) -> dict[str, Score]:
    if SPATIAL not in c.outputs or c.reference.spatial_moments is None:
        return {}
    return {"sFD": _distance(c, SPATIAL, c.reference.spatial_moments)}


def _infinity(c: _Context) -> dict[str, Score]:
    """The interval is that of the line's intercept."""
    N, d = c.features.shape
    min_size = max(N // 10, d + 1)
    if N < 2 * min_size:
        return {}
    found = frechet_infinity(c.features, c.reference.moments, min_size=min_size, seed=c.seed)
    _, covariance = np.polyfit(1 / found.sizes, found.distances, 1, cov=True)
    deviation = float(np.sqrt(covariance[1, 1]))
    return {"FD_infinity": _around(found.value, deviation, "lower")}


def _around(value: float, deviation: float, is_better: str) -> Score:
    return Score(value, value - 1.96 * deviation, value + 1.96 * deviation, deviation, is_better)


def _inception_score(c: _Context) -> dict[str, Score]:
    if PROBABILITIES not in c.outputs:
        return {}
    probabilities = c.outputs[PROBABILITIES]
    value = inception_score(probabilities, labels=c.labels).mean
    return {"IS": Score(value, *c.resampled(lambda rows: inception_score(probabilities[rows]).mean), "higher")}


def _precision_recall(c: _Context) -> dict[str, Score]:
    if len(c.reference.features) < 4:
        return {}
    scores = {}
    for mode in dict.fromkeys(("float32", c.mode)):
        found, suffix = precision_recall(c.features, c.reference.features, mode=mode), _SUFFIXES[mode]
        scores[f"precision{suffix}"] = _proportion(found.is_sample_inside)
        scores[f"recall{suffix}"] = _proportion(found.is_reference_inside)
    return scores


def _proportion(is_inside: np.ndarray) -> Score:
    return Score(float(is_inside.mean()), *proportion_interval(is_inside.sum(), len(is_inside)), "higher")


def _density_coverage(c: _Context) -> dict[str, Score]:
    if len(c.reference.features) < 6:
        return {}
    density, coverage = density_coverage(c.features, c.reference.features)
    groups = [density_coverage(rows, c.reference.features).density for rows in _groups(c)]
    M = len(c.reference.features)
    return {
        "density": _around(density, float(np.std(groups, ddof=1) / np.sqrt(len(groups))), "higher"),
        "coverage": Score(coverage, *proportion_interval(coverage * M, M), "higher"),
    }


def _groups(c: _Context) -> list[np.ndarray]:
    """The samples in ten random groups, for the noise of scores that are means over samples."""
    order = np.random.default_rng(c.seed).permutation(len(c.features))
    return [c.features[rows] for rows in np.array_split(order, min(_NUM_MMD_GROUPS, len(order) // 6))]


def _kid(c: _Context) -> dict[str, Score]:
    """The deviation is that over subsets of m of N samples, times sqrt(m / N)."""
    size = min(_MAX_KID_SUBSET, len(c.features) // 2, len(c.reference.features) // 2)
    if size < 2:
        return {}
    mean, deviation = kid(c.features, c.reference.features, subset_size=size, seed=c.seed)
    num_rows = min(len(c.features), len(c.reference.features))
    return {"KID": _around(mean, float(deviation * np.sqrt(size / num_rows)), "lower")}


def _mmd(c: _Context) -> dict[str, Score]:
    if not len(c.reference.features):
        return {}
    value = gaussian_mmd(c.features, c.reference.features)
    groups = [gaussian_mmd(rows, c.reference.features) for rows in _groups(c)]
    return {"MMD": _around(value, float(np.std(groups, ddof=1) / np.sqrt(len(groups))), "lower")}


def _accuracy(c: _Context) -> dict[str, Score]:
    """The share of samples that the network recognises as their label; for classifiers of the labels alone."""
    if c.labels is None or PROBABILITIES not in c.outputs or c.reference.about.get("num_classes") is None:
        return {}
    return {"accuracy": _proportion(c.outputs[PROBABILITIES].argmax(-1) == c.labels)}


def _diversity(c: _Context) -> dict[str, Score]:
    """The variance of features within a class, relative to real images': 1 is as diverse."""
    if c.labels is None or c.reference.labels is None:
        return {}
    of_reference = _variance_within(c.reference.features, c.reference.labels)
    if not of_reference > 0 or not np.isin(c.labels, c.reference.labels).all():
        return {}

    def ratio(rows):
        return _variance_within(c.features[rows], c.labels[rows]) / of_reference

    value = ratio(np.arange(len(c.features)))
    return {"diversity": Score(value, *c.resampled(ratio), "higher")}


def _variance_within(features: np.ndarray, labels: np.ndarray) -> float:
    """The trace of the covariance within classes, averaged over the classes that have two rows."""
    of_classes = [features[labels == label] for label in np.unique(labels)]
    return float(np.mean([rows.var(0, ddof=1).sum() for rows in of_classes if len(rows) > 1] or [0.0]))


# What --scores chooses from.
SCORES: dict[str, Callable[[_Context], dict[str, Score]]] = {
    "frechet": _frechet,
    "spatial": _spatial_frechet,
    "inception_score": _inception_score,
    "precision_recall": _precision_recall,
    "density_coverage": _density_coverage,
    "kid": _kid,
    "mmd": _mmd,
    "infinity": _infinity,
    "accuracy": _accuracy,
    "diversity": _diversity,
}


def compute_scores(
    extractor: Extractor,
    outputs: dict[str, np.ndarray],
    labels: np.ndarray | None,
    reference: Reference,
    *,
    chosen: Sequence[str] = tuple(SCORES),
    mode: str = "float32",
    num_resamples: int | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """The chosen scores that the network, the labels and the reference permit, by name.

    Args:
      extractor: that made `outputs`.
      outputs: of the samples, in their order: the Inception Score takes chunks of 5,000 of them.
      labels: [N] int; None if unknown.
      reference: the real images.
      chosen: keys of `SCORES`.
      mode: of `precision_recall`; "adm_float16" adds that arithmetic's to those in float32.
      num_resamples: of the bootstrap; by default 200, or 10 for features of more than 256 dimensions.
      seed: of resamples and subsets.

    Raises:
      ValueError: the reference is of another network, or as the functions that compute the scores.
    """
    reference.check_extractor(extractor)
    d = outputs[FEATURES].shape[-1]
    if d != len(reference.moments.mean):
        raise ValueError(
            f"the reference has features of d = {len(reference.moments.mean)}, the extractor {extractor.name!r} has "
            f"d = {d}: it was made with another network"
        )
    num_resamples = num_resamples or (10 if d > _LARGE_DIMENSION else 200)
    context = _Context(outputs, labels, reference, mode, num_resamples, seed)
    found = {}
    for key in chosen:
        found |= {name_of(name, extractor): score for name, score in SCORES[key](context).items()}
    return found


def name_of(score: str, extractor: Extractor) -> str:
    """The name of a score in reports: "FID" and "precision" for Inception, else "FD-digits" and "precision-digits"."""
    if extractor.distance == "FID":
        return score.replace("FD", "FID")
    return f"{score}-{extractor.distance.removeprefix('FD-')}"


class EqualSize(NamedTuple):
    """The Fréchet distance of a set at a number of images that other sets share.

    Attributes:
      name: of the set.
      num_images: n of each side's comparison.
      mean: over random splits.
      deviation: over them.
    """

    name: str
    num_images: int
    mean: float
    deviation: float


def at_equal_size(
    sets: dict[str, np.ndarray], real: np.ndarray, *, num_splits: int = 10, seed: int = 0
) -> list[EqualSize]:
    """The Fréchet distances of sets of features to a random half of the real ones, at one number of images.

    The other half is the floor: what real images themselves reach at that number. The distance depends on the number of
    images, so that only distances at one number can be compared.

    Args:
      sets: features [N, d] by name.
      real: [M, d].
      num_splits: random halves and subsets.
      seed: of them.
    """
    rng, half = np.random.default_rng(seed), len(real) // 2
    n = min(half, *(len(features) for features in sets.values()))
    found: dict[str, list[float]] = {name: [] for name in (*sets, "real")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewSamplesWarning)
        for _ in range(num_splits):
            order = rng.permutation(len(real))
            reference = Moments.of(real[order[:half]])
            found["real"].append(frechet_distance(real[order[half:]][:n], reference))
            for name, features in sets.items():
                found[name].append(frechet_distance(features[rng.permutation(len(features))[:n]], reference))
    return [EqualSize(name, n, float(np.mean(v)), float(np.std(v, ddof=1))) for name, v in found.items()]
