"""Scores during training: the rows of metrics, the best checkpoint, and a resumed run."""

import csv

import numpy as np
import pytest
from tiny import tiny_config

from diffussm_jax import evaluate_training, load_run
from diffussm_jax.config import best_checkpoint, choose
from diffussm_jax.data.sources import Digits
from diffussm_jax.evaluation.extractor import FEATURES, Extractor
from diffussm_jax.evaluation.frechet import Moments, frechet_distance
from diffussm_jax.evaluation.scores import Reference
from diffussm_jax.experiment import build_experiment
from diffussm_jax.training.checkpoint import EVAL_LOSS, Best
from diffussm_jax.training.loop import train

EXTRACTOR = Extractor(
    "digits", lambda params, images: {FEATURES: images.mean((2, 3)) / 255.0}, {}, "a" * 64, 1, "FD-digits"
)
SOURCE = Digits("train")
REAL = np.stack([SOURCE[i].image for i in range(100)])


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    features = EXTRACTOR(REAL)[FEATURES]
    reference = Reference(Moments.of(features), None, features, None, {})
    monkeypatch.setattr(evaluate_training, "open_extractor", lambda *arguments: EXTRACTOR)
    monkeypatch.setattr(evaluate_training, "open_reference", lambda *arguments: reference)


def scored_config():
    config = tiny_config()
    config.eval_every = config.sample_every = 0
    config.eval_scores_every = config.checkpoint_every = 4
    config.scores.num_samples = 20
    return config


@pytest.mark.slow
def test_scores_are_logged_and_choose_the_best_checkpoint(tmp_path):
    config = scored_config()
    assert train(build_experiment(config), tmp_path) is None
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    scores = {step: float(row["FD-digits"]) for step, row in rows.items() if row["FD-digits"]}
    assert list(scores) == [4, 8, 12]
    run = load_run(tmp_path, "best")
    assert run.step == min(scores, key=scores.get)
    images, _ = load_run(tmp_path, 12).sample(20)
    assert scores[12] == pytest.approx(frechet_distance(*(EXTRACTOR(x)[FEATURES] for x in (images, REAL))), rel=1e-5)


def test_the_best_checkpoint_is_chosen_by_what_is_measured():
    config = tiny_config()
    assert best_checkpoint(config) == EVAL_LOSS
    config.eval_scores_every = 5
    assert best_checkpoint(config) == Best("FD-digits", "min")
    config.scores.features = "inception"
    assert best_checkpoint(config) == Best("FID", "min")
    config.best_metric, config.best_mode = "recall", "max"
    assert best_checkpoint(config) == Best("recall", "max")


@pytest.mark.slow
def test_samples_that_are_not_finite_give_no_scores(tmp_path, capsys, monkeypatch):
    config = scored_config()
    config.num_steps = 4
    choose(config, "sampling.sampler", "ddim")
    monkeypatch.setattr(evaluate_training.Run, "sample", broken_sample)
    assert train(build_experiment(config), tmp_path) is None
    assert "step 4: no scores: values that are not finite" in capsys.readouterr().out
    assert "FD-digits" not in (tmp_path / "metrics.csv").read_text()


def broken_sample(*arguments, **options):
    raise FloatingPointError("values that are not finite")
