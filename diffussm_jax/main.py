"""Trains: python -m diffussm_jax.main --config=configs/digits.py --workdir=runs/digits

Any value of the config may be given after it, --config.optimizer.learning_rate=3e-4. The same command again resumes
the run.
"""

import signal

import jax
from absl import app, flags
from ml_collections import ConfigDict

from diffussm_jax import cli
from diffussm_jax.build import Parts
from diffussm_jax.experiment import build_experiment
from diffussm_jax.training.loop import train
from diffussm_jax.validation import validate

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the run: config, metrics, checkpoints and samples; may be gs://."
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed", "auto", "auto, none, or COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID (`cli.join_hosts`)."
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "FIRST:LAST, steps to trace for XProf into WORKDIR/profile, such as 100:105."
)
_WANDB_PROJECT = flags.DEFINE_string(
    "wandb_project", None, "A project of Weights & Biases to send the metrics to (extra wandb)."
)


def describe(config: ConfigDict) -> str:
    """One line on the config's model: its parameters, sequence, and multiply-adds, without building any array."""
    parts = Parts(config)
    if not parts.trains_model:
        return f"task {config.task.name}"
    H, W, C = parts.input_shape
    costs = parts.model.costs(parts.input_shape)
    line = (
        f"{type(parts.model).__name__}: {sum(costs.parameters.values()):,} parameters, {H} x {W} x {C} input, "
        f"L = {H * W:,} positions"
    )
    if not costs.multiply_adds:
        return line
    return f"{line}, {costs.total / 1e9:.3f} G multiply-adds a forward pass of one image in the linear layers"


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """100:105 to (100, 105); ValueError for anything else but None."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ValueError(f"--profile_steps must be FIRST:LAST, such as 100:105, got {text!r}")
    return int(first), int(last)


def main() -> int:
    """Trains as the flags say; returns the exit code: 0 when done, 130 when stopped by Ctrl-C, 75 by SIGTERM."""
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config is None or workdir is None:
        raise app.UsageError("give --config=configs/digits.py (or another file of configs/) and --workdir=FOLDER")
    profile_steps = parse_steps(_PROFILE_STEPS.value)
    cli.join_hosts(_DISTRIBUTED.value)
    cli.keep_freed_memory()
    validate(config, jax.device_count())
    is_first_process = jax.process_index() == 0
    if is_first_process:
        print(describe(config), flush=True)
    stopped_by = train(
        build_experiment(config), workdir, profile_steps=profile_steps, wandb_project=_WANDB_PROJECT.value
    )
    if stopped_by is None:
        message = f"Done. Samples, metrics and checkpoints are in {workdir}."
    else:
        name = signal.Signals(stopped_by).name
        message = f"Stopped by {name}, saved in {workdir}; the same command goes on from there."
    if is_first_process:
        print(message, flush=True)
    if stopped_by == signal.SIGTERM:
        return cli.PREEMPTED
    return 128 + stopped_by if stopped_by else 0


if __name__ == "__main__":
    cli.run(main)
