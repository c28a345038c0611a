"""All scores together: names, intervals, what is left out, and sets at equal numbers of images.

The scores' own values are tested in test_frechet.py and test_fidelity.py.
"""

import numpy as np
import pytest

from diffussm_jax.evaluation.bootstrap import proportion_interval
from diffussm_jax.evaluation.extractor import FEATURES, PROBABILITIES, SPATIAL, Extractor
from diffussm_jax.evaluation.frechet import Moments, frechet_distance
from diffussm_jax.evaluation.scores import Reference, at_equal_size, compute_scores, name_of

N, M, D, CLASSES = 400, 300, 6, 3
RNG = np.random.default_rng(0)


def make_extractor(name="digits", distance="FD-digits", sha256="a"):
    return Extractor(name, lambda params, images: {}, {}, sha256, 1, distance)


def draw(num_rows, shift=0.0, spread=1.0):
    labels = np.arange(num_rows) % CLASSES
    centres = 4 * np.eye(D)[labels]
    return (centres + shift + spread * RNG.normal(size=(num_rows, D))).astype(np.float32), labels


REAL, REAL_LABELS = draw(M)
FEATURES_OF, LABELS = draw(N, spread=0.5)
PROBABILITIES_OF = RNG.dirichlet(np.full(CLASSES, 0.2), N)
OUTPUTS = {FEATURES: FEATURES_OF, PROBABILITIES: PROBABILITIES_OF, SPATIAL: FEATURES_OF[:, :2]}


def make_reference(**about):
    about = {"extractor": "digits", "num_classes": CLASSES} | about
    return Reference(Moments.of(REAL), Moments.of(REAL[:, :2]), REAL, REAL_LABELS, about)


@pytest.fixture(scope="module")
def scores():
    return compute_scores(make_extractor(), OUTPUTS, LABELS, make_reference(), num_resamples=20)


def test_all_scores_are_named_after_the_network(scores):
    names = ("FD", "sFD", "IS", "precision", "recall", "density", "coverage", "KID", "MMD", "FD_infinity")
    assert list(scores) == [f"{name}-digits" for name in (*names, "accuracy", "diversity")]
    assert [name_of(name, "FID") for name in ("FD", "sFD", "IS", "FD_infinity")] == [
        "FID",
        "sFID",
        "IS",
        "FID_infinity",
    ]


def test_every_score_has_an_interval_around_it(scores):
    for name, score in scores.items():
        assert score.low <= score.value <= score.high and score.deviation >= 0, name
        assert score.is_better == ("lower" if any(k in name for k in ("FD", "KID", "MMD")) else "higher"), name


def test_values_are_those_of_the_functions(scores):
    assert scores["FD-digits"].value == frechet_distance(FEATURES_OF, REAL)
    assert scores["sFD-digits"].value == pytest.approx(frechet_distance(FEATURES_OF[:, :2], REAL[:, :2]))
    right = PROBABILITIES_OF.argmax(1) == LABELS
    assert scores["accuracy-digits"][:4] == (right.mean(), *proportion_interval(right.sum(), N))


def test_diversity_is_the_ratio_of_variances_within_classes(scores):
    """Half the spread: a quarter of the variance."""
    expected = np.mean([FEATURES_OF[c::3].var(0, ddof=1).sum() for c in range(3)])
    expected /= np.mean([REAL[c::3].var(0, ddof=1).sum() for c in range(3)])
    assert scores["diversity-digits"].value == pytest.approx(expected)
    assert expected == pytest.approx(0.25, abs=0.05)


def test_what_cannot_be_computed_is_left_out():
    reference = Reference(Moments.of(REAL), None, np.zeros((0, D), np.float32), None, {})
    found = compute_scores(make_extractor(), {FEATURES: FEATURES_OF}, None, reference, num_resamples=3)
    assert list(found) == ["FD-digits", "FD_infinity-digits"]
    unlabelled = compute_scores(make_extractor(), OUTPUTS, None, make_reference(), num_resamples=3)
    assert not {"accuracy-digits", "diversity-digits"} & unlabelled.keys()


def test_the_arithmetic_of_adm_is_added_beside_float32():
    found = compute_scores(
        make_extractor("inception", "FID"),
        OUTPUTS,
        LABELS,
        make_reference(extractor="inception"),
        chosen=["precision_recall"],
        mode="adm_float16",
    )
    assert list(found) == ["precision", "recall", "precision_adm_float16", "recall_adm_float16"]
    assert found["precision"].value == pytest.approx(found["precision_adm_float16"].value, abs=0.02)


@pytest.mark.parametrize(
    ("about", "message"),
    [({"extractor": "inception"}, "inception.*digits"), ({"extractor_sha256": "b"}, "other weights.* b, now a")],
)
def test_statistics_of_another_network_are_refused(about, message):
    with pytest.raises(ValueError, match=message):
        compute_scores(make_extractor(), OUTPUTS, LABELS, make_reference(**about))


def test_statistics_of_another_dimension_are_refused():
    other = Reference(Moments.of(REAL[:, :4]), None, REAL[:, :4], None, {})
    with pytest.raises(ValueError, match="d = 4.*d = 6"):
        compute_scores(make_extractor(), OUTPUTS, LABELS, other)


def test_sets_are_compared_at_one_number_of_images():
    """Real images are the floor; a shifted set is above it by about the square of its shift."""
    shifted, _ = draw(N, shift=1.0)
    rows = {row.name: row for row in at_equal_size({"shifted": shifted, "like": draw(N)[0]}, REAL)}
    assert {row.num_images for row in rows.values()} == {M // 2}
    assert rows["like"].mean == pytest.approx(rows["real"].mean, abs=0.3)
    assert rows["shifted"].mean - rows["real"].mean == pytest.approx(D, rel=0.2)
    few = at_equal_size({"few": shifted[:40]}, REAL)
    assert {row.num_images for row in few} == {40}
