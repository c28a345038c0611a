"""Trains a model: python -m diffussm_jax.main --config=configs/digits.py --workdir=runs/digits

Flags override config values, --config.optimizer.learning_rate=3e-4. Repeat the command to resume the run.
"""

import signal

import jax
from absl import app, flags
from ml_collections import ConfigDict

from diffussm_jax import cli
from diffussm_jax.build import Parts
from diffussm_jax.data_config import complete_from_data
from diffussm_jax.experiment import build_experiment
from diffussm_jax.io import check_path
from diffussm_jax.models.costs import Costs, modules, table
from diffussm_jax.parallel.mesh import make_mesh, platform_of
from diffussm_jax.training.loop import train
from diffussm_jax.validation import per_device_microbatch, validate

_FLAGS = flags.FlagValues()  # of its own, so that several programs can be imported together
_CONFIG = cli.define_config(_FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for config, metrics, checkpoints and samples of the run; may be gs://.",
    flag_values=_FLAGS,
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "auto",
    "auto, none, or COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID (`cli.join_hosts`).",
    flag_values=_FLAGS,
)
_COMPILATION_CACHE = cli.define_compilation_cache(_FLAGS)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps",
    None,
    "Steps to trace for XProf into WORKDIR/profile: FIRST:LAST, such as 100:105.",
    flag_values=_FLAGS,
)
_WANDB_PROJECT = flags.DEFINE_string(
    "wandb_project", None, "Weights & Biases project for the metrics (extra wandb).", flag_values=_FLAGS
)
_DESCRIBE = flags.DEFINE_bool(
    "describe",
    False,
    "Print the model's modules with their parameters, multiply-adds and activations, and exit; needs no workdir.",
    flag_values=_FLAGS,
)


def describe(config: ConfigDict) -> str:
    """A line about the model: parameters, sequence length, multiply-adds; and one about the machine. No arrays."""
    devices, parts = jax.devices(), Parts(config, make_mesh(**config.mesh.to_dict()), is_abstract=True)
    axes = ", ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items())
    machine = f"{len(devices)} x {devices[0].device_kind} ({platform_of(devices[0])}), mesh: {axes}"
    if not parts.trains_model:
        costs = getattr(parts.task, "costs", None)
        return f"task {config.task.name}{f': {_described(costs)}' if costs else ''}\n{machine}"
    H, W, C = parts.input_shape
    costs = parts.model.costs(parts.input_shape, per_device_microbatch(config, parts.mesh.shape))
    model = (
        f"{type(parts.model).__name__}: {sum(costs.parameters.values()):,} parameters, {H} x {W} x {C} input, "
        f"L = {H * W:,} positions"
    )
    if costs.multiply_adds:
        model += f", {costs.total / 1e9:.3f} G multiply-adds per image in the linear layers (forward)"
    if "dtype" in config.model:
        machine += f", {config.model.dtype}"
    if costs.mixer_method:
        machine += f", SSM: {costs.mixer_method}"
    return f"{model}\n{machine}"


def _described(costs: Costs) -> str:
    """The parameters of each part, and the multiply-adds of one image."""
    parts = ", ".join(f"{name} {count:,}" for name, count in costs.parameters.items())
    return f"parameters: {parts}; {costs.total / 1e9:.3f} G multiply-adds per image of a step (forward)"


def module_table(config: ConfigDict) -> str:
    """A table of the model's modules (`models.costs.table`), for one image of a microbatch of a device."""
    parts = Parts(config, make_mesh(**config.mesh.to_dict()))
    if not parts.trains_model:
        return f"task {config.task.name} trains no backbone"
    return table(modules(parts.model, parts.input_shape, per_device_microbatch(config, parts.mesh.shape)))


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """Parses "100:105" to (100, 105). Raises ValueError if malformed."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ValueError(f"--profile_steps must be FIRST:LAST, such as 100:105, got {text!r}")
    return int(first), int(last)


def main() -> int:
    """Trains, and returns the exit code: 0 when done, 130 after Ctrl-C, 75 after SIGTERM."""
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config is None or not (workdir or _DESCRIBE.value):
        raise app.UsageError("give --config=configs/digits.py (or another file of configs/) and --workdir=FOLDER")
    if workdir:
        check_path(workdir)
    profile_steps = parse_steps(_PROFILE_STEPS.value)
    cli.join_hosts(_DISTRIBUTED.value)
    cli.keep_freed_memory()
    cli.use_compilation_cache(_COMPILATION_CACHE.value)
    is_first_process = jax.process_index() == 0
    config, found = complete_from_data(config)
    if found and is_first_process:
        print("\n".join(found), flush=True)
    validate(config, jax.device_count())
    if is_first_process:
        print(describe(config), flush=True)
    if _DESCRIBE.value:
        if is_first_process:
            print(module_table(config), flush=True)
        return 0
    stopped_by = train(
        build_experiment(config), workdir, profile_steps=profile_steps, wandb_project=_WANDB_PROJECT.value
    )
    if stopped_by is None:
        message = f"Done. Samples, metrics and checkpoints are in {workdir}."
    else:
        name = signal.Signals(stopped_by).name
        message = f"Stopped by {name}, saved in {workdir}. Repeat the command to resume."
    if is_first_process:
        print(message, flush=True)
    if stopped_by == signal.SIGTERM:
        return cli.PREEMPTED
    return 128 + stopped_by if stopped_by else 0


if __name__ == "__main__":
    cli.run(main, _FLAGS)
