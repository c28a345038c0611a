"""Trains: python -m diffussm_jax.main --config=configs/digits.py --workdir=runs/digits

Any value of the config may be given after it, --config.optimizer.learning_rate=3e-4. The same command again resumes
the run.
"""

import signal

import jax
from absl import app, flags
from clu import parameter_overview
from ml_collections import ConfigDict, config_flags

from diffussm_jax import cli
from diffussm_jax.build import build_experiment, build_model, input_shape
from diffussm_jax.config import validate
from diffussm_jax.training.loop import init_params, train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, such as configs/digits.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run: config, metrics, checkpoints and samples.")


def describe(config: ConfigDict) -> str:
    """One line on the config's model: its parameters, sequence, and multiply-adds, without building any array."""
    model, shape = build_model(config), input_shape(config)
    H, W, C = shape
    params = jax.eval_shape(lambda: init_params(model, shape, 0))
    num_parameters = parameter_overview.count_parameters(params)
    multiply_adds = model.multiply_adds(H, W, C)["total"]
    return (
        f"{type(model).__name__}: {num_parameters:,} parameters, {H} x {W} x {C} input, L = {H * W:,} positions, "
        f"{multiply_adds / 1e9:.3f} G multiply-adds a forward pass of one image in the linear layers"
    )


def main() -> int:
    """Trains as the flags say; returns the exit code: 0 when done, 130 or 143 when stopped by SIGINT or SIGTERM."""
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config is None or workdir is None:
        raise app.UsageError("give --config=configs/digits.py (or another file of configs/) and --workdir=FOLDER")
    validate(config, jax.device_count())
    cli.keep_freed_memory()
    print(describe(config), flush=True)
    stopped_by = train(build_experiment(config), workdir)
    if stopped_by is not None:
        print(f"Stopped by {signal.Signals(stopped_by).name}, saved in {workdir}; the same command goes on from there.")
        return 128 + stopped_by
    print(f"Done. Samples, metrics and checkpoints are in {workdir}.")
    return 0


if __name__ == "__main__":
    cli.run(main)
