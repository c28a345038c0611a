"""Every score of a set of samples against real images, each with a 95 % interval of drawing other samples.

Names say which network's features they are computed on: "FID", "sFID", "IS", "precision" are of the FID Inception
alone; with other features they have its name behind them, "FD-digits", "precision-digits".
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffussm_jax.evaluation.bootstrap import Interval, bootstrap, from_halves, proportion_interval
from diffussm_jax.evaluation.extractor import FEATURES, PROBABILITIES, SPATIAL, Extractor
from diffussm_jax.evaluation.fidelity import density_coverage, gaussian_mmd, inception_score, kid, precision_recall
from diffussm_jax.evaluation.frechet import FewSamplesWarning, Moments, frechet_distance, frechet_infinity

_MAX_KID_SUBSET = 1000
LARGE_DIMENSION = 256  # above it a Frechet distance takes seconds, and fewer resamples are drawn
_NUM_RESAMPLES = {False: 200, True: 10}  # by whether features are large
_NUM_HALVES = {False: 20, True: 5}
# Behind the names of precision and recall in each arithmetic.
_SUFFIXES = {"float32": "", "adm_float16": "_adm_float16"}
_NO_INTERVAL = (math.nan, math.nan, math.nan)
_ANY, _NOT_NEGATIVE = (-math.inf, math.inf), (0.0, math.inf)  # values that a score may have


class Score(NamedTuple):
    """A score with its 95 % interval and the standard deviation of the noise of drawing other samples.

    Attributes:
      value: NaN is never one.
      low, high, deviation: NaN where intervals were not asked for.
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
      features: [M, d] of up to 10,000 images, for what compares single images. May be empty.
      labels: [M] int, of `features`; None if unknown.
      about: "extractor" and "extractor_sha256" of the network if they are known, and what reports say of the source.
      images: [M, H, W, C] uint8, of `features`; None if there are none.
    """

    moments: Moments
    spatial_moments: Moments | None
    features: np.ndarray
    labels: np.ndarray | None
    about: dict[str, Any]
    images: np.ndarray | None = None

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
    """What the functions of `SCORES` are given."""

    outputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    reference: Reference
    mode: str
    num_resamples: int
    seed: int

    @property
    def features(self) -> np.ndarray:
        return self.outputs[FEATURES]

    @property
    def fewest(self) -> int:
        """The number of samples or of single reference images, whichever is smaller."""
        return min(len(self.features), len(self.reference.features))

    def resampled(
        self, value: float, score: Callable[[np.ndarray], float], is_better: str, allowed: tuple[float, float] = _ANY
    ) -> Score:
        """With the interval of the bootstrap, cut to what is allowed."""
        if not self.num_resamples:
            return Score(value, *_NO_INTERVAL, is_better)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, of the samples themselves
            found = bootstrap(score, len(self.features), num_resamples=self.num_resamples, seed=self.seed)
        return _cut(value, found, is_better, allowed)

    def from_halves(
        self, value: float, score: Callable[[np.ndarray], float], is_better: str, allowed: tuple[float, float] = _ANY
    ) -> Score:
        """With the interval from halves of the samples, for scores that duplicates change; cut likewise."""
        N, d = self.features.shape
        if not self.num_resamples or N < 4:
            return Score(value, *_NO_INTERVAL, is_better)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            num_halves = _NUM_HALVES[d > LARGE_DIMENSION]
            found = from_halves(score, N, value, num_halves=num_halves, seed=self.seed)
        return _cut(value, found, is_better, allowed)


def _cut(value: float, interval: Interval, is_better: str, allowed: tuple[float, float]) -> Score:
    low, high, deviation = interval
    return Score(value, max(low, allowed[0]), min(high, allowed[1]), deviation, is_better)


def _distance(c: _Context, key: str, moments: Moments) -> Score:
    features = c.outputs[key]
    value = frechet_distance(features, moments)
    return c.resampled(value, lambda rows: frechet_distance(features[rows], moments), "lower", _NOT_NEGATIVE)


def _frechet(c: _Context) -> dict[str, Score]:
    return {"FD": _distance(c, FEATURES, c.reference.moments)}


def _spatial_frechet(c: _Context) -> dict[str, Score]:
    if SPATIAL not in c.outputs or c.reference.spatial_moments is None:
        return {}
    return {"sFD": _distance(c, SPATIAL, c.reference.spatial_moments)}


def _infinity(c: _Context) -> dict[str, Score]:
    """The interval is from halves, each extrapolated from three sizes."""
    N, d = c.features.shape
    min_size = max(N // 10, d + 1)
    if N < 4 * min_size:
        return {}

    def extrapolated(rows, num_sizes=3):
        options = {"num_sizes": num_sizes, "min_size": min_size, "seed": c.seed}
        return frechet_infinity(c.features[rows], c.reference.moments, **options).value

    return {"FD_infinity": c.from_halves(extrapolated(np.arange(N), 15), extrapolated, "lower")}


def _inception_score(c: _Context) -> dict[str, Score]:
    if PROBABILITIES not in c.outputs:
        return {}
    probabilities = c.outputs[PROBABILITIES]
    value = inception_score(probabilities, labels=c.labels).mean
    return {"IS": c.resampled(value, lambda rows: inception_score(probabilities[rows]).mean, "higher")}


def _precision_recall(c: _Context) -> dict[str, Score]:
    if c.fewest < 8:
        return {}
    scores = {}
    for mode in dict.fromkeys(("float32", c.mode)):

        def found(rows, mode=mode):
            return precision_recall(c.features[rows], c.reference.features, mode=mode)

        of_all, suffix = found(np.arange(len(c.features))), _SUFFIXES[mode]
        scores[f"precision{suffix}"] = _proportion(of_all.is_sample_inside)
        recall = c.from_halves(of_all.recall, lambda rows, found=found: found(rows).recall, "higher", (0, 1))
        scores[f"recall{suffix}"] = recall
    return scores


def _proportion(is_inside: np.ndarray) -> Score:
    return Score(float(is_inside.mean()), *proportion_interval(is_inside.sum(), len(is_inside)), "higher")


def _density_coverage(c: _Context) -> dict[str, Score]:
    if c.fewest < 12:
        return {}
    found = density_coverage(c.features, c.reference.features)

    def coverage(rows):
        return density_coverage(c.features[rows], c.reference.features).coverage

    return {
        "density": c.resampled(found.density, lambda rows: float(found.num_balls[rows].mean()), "higher"),
        "coverage": c.from_halves(found.coverage, coverage, "higher", (0, 1)),
    }


def _kid(c: _Context) -> dict[str, Score]:
    size = min(_MAX_KID_SUBSET, c.fewest // 2)
    if size < 4:
        return {}
    value = kid(c.features, c.reference.features, subset_size=size, seed=c.seed).mean

    def of_half(rows):
        return kid(c.features[rows], c.reference.features, subset_size=size, num_subsets=25, seed=c.seed).mean

    return {"KID": c.from_halves(value, of_half, "lower")}


def _mmd(c: _Context) -> dict[str, Score]:
    if c.fewest < 4:
        return {}
    value = gaussian_mmd(c.features, c.reference.features)

    def of_rows(rows):
        return gaussian_mmd(c.features[rows], c.reference.features)

    return {"MMD": c.from_halves(value, of_rows, "lower", _NOT_NEGATIVE)}


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

    return {"diversity": c.resampled(ratio(np.arange(len(c.features))), ratio, "higher")}


def _variance_within(features: np.ndarray, labels: np.ndarray) -> float:
    """The trace of the covariance within classes, averaged over the classes that have two rows."""
    of_classes = [features[labels == label] for label in np.unique(labels)]
    return float(np.mean([rows.var(0, ddof=1).sum() for rows in of_classes if len(rows) > 1] or [0.0]))


# What --scores chooses from: how it is computed, and the names of its scores without that of the network.
SCORES: dict[str, tuple[Callable[[_Context], dict[str, Score]], tuple[str, ...]]] = {
    "frechet": (_frechet, ("FD",)),
    "spatial": (_spatial_frechet, ("sFD",)),
    "inception_score": (_inception_score, ("IS",)),
    "precision_recall": (_precision_recall, ("precision", "recall")),
    "density_coverage": (_density_coverage, ("density", "coverage")),
    "kid": (_kid, ("KID",)),
    "mmd": (_mmd, ("MMD",)),
    "infinity": (_infinity, ("FD_infinity",)),
    "accuracy": (_accuracy, ("accuracy",)),
    "diversity": (_diversity, ("diversity",)),
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
    """The chosen scores that the network, the labels and the numbers of images permit, by name.

    Args:
      extractor: that made `outputs`.
      outputs: of the samples, in their order: the Inception Score takes chunks of 5,000 of them.
      labels: [N] int; None if unknown.
      reference: the real images.
      chosen: keys of `SCORES`.
      mode: of `precision_recall`; "adm_float16" adds that arithmetic's to those in float32.
      num_resamples: of the bootstrap; by default 200, or 10 for features of more than 256 dimensions; 0: no intervals.
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
    if num_resamples is None:
        num_resamples = _NUM_RESAMPLES[d > LARGE_DIMENSION]
    context = _Context(outputs, labels, reference, mode, num_resamples, seed)
    found = {}
    for key in chosen:
        compute, _ = SCORES[key]
        found |= {name_of(name, extractor.distance): score for name, score in compute(context).items()}
    return found


def name_of(score: str, distance: str) -> str:
    """The name of a score in reports, by that of the Frechet distance: "recall" with "FID", else "recall-digits"."""
    return score.replace("FD", "FID") if distance == "FID" else f"{score}-{distance.removeprefix('FD-')}"


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
