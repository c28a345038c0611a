"""Scores during training, `config.eval_scores_every`."""

import functools
import warnings

import jax

from diffussm_jax.build import Parts
from diffussm_jax.evaluate_real import open_extractor, open_real_data, open_reference
from diffussm_jax.evaluation.classifier import CLASSIFIERS
from diffussm_jax.evaluation.scores import Reference, compute_scores
from diffussm_jax.run import Run
from diffussm_jax.training.hooks import HookFactory, scores

_CHOSEN = ("frechet", "spatial", "inception_score", "precision_recall", "accuracy")
_BATCH_SIZE = 256


def score_hook(parts: Parts) -> HookFactory:
    """The hook of `config.eval_scores_every`. Weights and reference are read, or made, at once.

    Raises:
      FileNotFoundError: there are no weights, or no reference.
      ValueError: they do not fit each other.
    """
    config = parts.config
    keys, log = config.scores, print if jax.process_index() == 0 else lambda line: None
    is_classifier = keys.features in CLASSIFIERS
    real = open_real_data("", run_config=config) if is_classifier or not keys.reference else None
    extractor = open_extractor(keys.features, keys.weights, real, log)
    reference = open_reference(keys.reference, extractor, real, _BATCH_SIZE)
    score = functools.partial(_score, parts, extractor, reference, config.scores.num_samples)
    return functools.partial(scores, score=score, every=config.eval_scores_every)


def _score(parts: Parts, extractor, reference: Reference, num_samples: int, params: dict) -> dict[str, float]:
    """Scores of samples that are drawn by `config.sampling`, with the same noise every time and balanced labels."""
    images, labels = Run(parts, params, 0).sample(num_samples, seed=parts.config.seed, batch_size=_BATCH_SIZE)
    outputs = extractor(images, _BATCH_SIZE)
    labels = labels if parts.config.data.num_classes else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said by `diffussm_jax.evaluate`
        found = compute_scores(extractor, outputs, labels, reference, chosen=_CHOSEN, num_resamples=0)
    return {name: score.value for name, score in found.items()}
