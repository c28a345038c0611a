"""From a config to the `Experiment` that the training loop runs: checks first, then everything that is needed."""

import copy

import jax
from ml_collections import ConfigDict

from diffussm_jax.build import Parts
from diffussm_jax.config import best_checkpoint, complete, to_plain
from diffussm_jax.data_config import complete_from_data
from diffussm_jax.finetune import starting_from
from diffussm_jax.training.loop import Experiment
from diffussm_jax.validation import check_same_experiment, validate


def build_experiment(config: ConfigDict) -> Experiment:
    """All that `training.loop.train` needs.

    Raises:
      ValueError: the config is wrong (`validation.validate`), or its data do not fit it.
      FileNotFoundError: its data cannot be had.
    """
    config, _ = complete_from_data(complete(copy.deepcopy(config).unlock()))
    validate(config, jax.device_count())
    plain = to_plain(config)
    parts = Parts(config, has_decoder=config.sample_every > 0 or config.eval_scores_every > 0)
    if parts.trains_model and (missing := sorted(parts.model.conditioners.keys() - parts.train_records[0].keys())):
        raise ValueError(
            f"config.conditioners has {missing}, but a record of config.data.source = {config.data.source!r} has only "
            f"{sorted(parts.train_records[0])}"
        )
    hooks = parts.hooks
    if config.eval_scores_every and parts.trains_model:
        from diffussm_jax.evaluate_training import score_hook  # some seconds of imports

        hooks.append(score_hook(parts))
    return Experiment(
        train_loader=parts.train_loader,  # first: data that are not there should be found before an autoencoder is read
        hooks=hooks,
        task=starting_from(parts.task, config) if config.init_from else parts.task,
        num_steps=config.num_steps,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        keep_every=config.keep_every,
        best=best_checkpoint(config),
        config=plain,
        check_config=lambda saved, where: check_same_experiment(saved, plain, where),
    )
