"""Compiles the training step of a run ahead of time for another machine, and prints what the run needs of it.

    python -m diffussm_jax.plan --config=configs/imagenet256.py:XL --topology=v5e:16x16
    python -m diffussm_jax.plan --config=configs/imagenet512.py:XL --topology=h100:8 --config.model.mixer.method=chunked

Printed are, for each device: the bytes of parameters, their average and the optimizer; the peak of memory; and the
collectives with their bytes. They are read from the compiled program. Multiply-adds are counted from the model's sizes,
because XLA counts the body of a scan once. The time of a run follows at an assumed MFU (--mfu).

If the step does not fit, changes that save memory are tried in turn: `model.remat`, `optimizer.accumulation_steps`,
`mesh.fsdp`, then the last two together. docs/plan.md explains each figure.

`parallel.topology` names the machines. Compiling for TPUs needs the extra `plan` (libtpu), for NVIDIA GPUs the extra
`plan-gpu` or `cuda12`. Both work on any Linux computer.
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator

import jax
from absl import app, flags
from ml_collections import ConfigDict

from diffussm_jax import cli, registry
from diffussm_jax.build import Parts
from diffussm_jax.config import override
from diffussm_jax.data_config import complete_from_data
from diffussm_jax.models import Costs
from diffussm_jax.parallel.hlo import Collective, collectives
from diffussm_jax.parallel.mesh import make_mesh
from diffussm_jax.parallel.topology import Machine, compile_only_devices, parse_machine
from diffussm_jax.validation import per_device_microbatch, validate

_FLAGS = flags.FlagValues()  # apart, so that any of the programs can be imported beside another
_CONFIG = cli.define_config(_FLAGS)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The machine: v5e:16x16, v4-8, v6e-64, h100, h100:8, ...", flag_values=_FLAGS
)
_MFU = flags.DEFINE_float(
    "mfu", 0.4, "The MFU assumed for the time of the run.", lower_bound=1e-6, upper_bound=1, flag_values=_FLAGS
)
_IMAGES = flags.DEFINE_float(
    "images", None, "Images of the run; by default the paper's 660e6, and 302e6 at 512 pixels.", flag_values=_FLAGS
)
_NO_SEARCH = flags.DEFINE_boolean(
    "no_search", False, "Whether to try no changes if the step does not fit.", flag_values=_FLAGS
)
_MAX_TRIES = flags.DEFINE_integer(
    "max_tries", 8, "Maximum number of changes to compile.", lower_bound=1, flag_values=_FLAGS
)
_FULL_EFFORT = flags.DEFINE_boolean(
    "full_effort",
    False,
    "Whether to optimize the program's speed as for a run: takes minutes, and memory differs by about 0.5 GiB.",
    flag_values=_FLAGS,
)
_JSON = flags.DEFINE_string("json", None, "A file to write the figures to as well.", flag_values=_FLAGS)

_GIB = 2**30
_PAPER_IMAGES = {512: 302e6}
_DEFAULT_IMAGES = 660e6
# Compiler options. JAX 0.12 replaced the first option by the second, of which 9 is O0.
LITTLE_EFFORT = (
    {"exec_time_optimization_effort": -1.0}
    if hasattr(jax.config, "jax_exec_time_optimization_effort")
    else {"optimization_level": 9}
)
_STATE_NAMES = {"params": "parameters", "ema_params": "EMA", "opt_state": "optimizer", "power_ema": "post-hoc EMA"}
_COUNTER_BYTES = 4  # of state.step and its like, which are not listed


class DoesNotFitError(ValueError):
    """The step needs more memory than a device has; the message has the figures."""


class StateDoesNotFitError(DoesNotFitError):
    """The training state alone does not fit, so nothing was compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A training step compiled for a machine.

    Attributes:
      machine: the target of the compilation.
      mesh: devices along each axis.
      batch_size: images of a step, over all devices.
      settings: values of the config that decide on memory and time.
      state_bytes: of the training state on a device, by part.
      batch_bytes: of the batch on a device.
      peak_bytes: peak memory of the program on a device, including state, batch, gradients and activations.
      costs: of the model, for one image.
      collectives: of the program.
      compile_seconds: on this computer.
    """

    machine: Machine
    mesh: dict[str, int]
    batch_size: int
    settings: dict[str, object]
    state_bytes: dict[str, int]
    batch_bytes: int
    peak_bytes: int
    costs: Costs
    collectives: list[Collective]
    compile_seconds: float

    @property
    def num_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def peak_flops(self) -> float:
        """Of all devices, FLOP/s."""
        return self.num_devices * self.machine.chip.peak_flops

    @property
    def floor_seconds(self) -> float:
        """Time of a step's linear layers at the peak, recomputation included."""
        return 2 * self.batch_size * (3 * self.costs.total + self.costs.recomputed) / self.peak_flops

    def images_per_second(self, mfu: float) -> float:
        """At an MFU: 3 * 2 * multiply-adds * images/s / peak, without mixers and recomputation."""
        return mfu * self.peak_flops / (6 * self.costs.total)


def make_plan(config: ConfigDict, machine: Machine, *, has_full_effort: bool = False) -> Plan:
    """Compiles the training step of a config for a machine.

    Args:
      config: of the run.
      machine: to compile for.
      has_full_effort: whether the compiler optimizes the program's speed as it does for a run.

    Raises:
      DoesNotFitError: a device's memory is too small.
      ValueError: the config does not fit the number of devices, or the compiler is not installed.
    """
    validate(config, machine.num_devices)
    mesh = make_mesh(**config.mesh.to_dict(), devices=compile_only_devices(machine))
    parts = Parts(config, mesh, has_decoder=False, is_abstract=True)
    task, available = parts.task, machine.chip.memory_bytes
    if parts.trains_model:
        costs = parts.model.costs(parts.input_shape, per_device_microbatch(config, mesh.shape))
    else:
        costs = getattr(task, "costs", Costs({}, {}))
    state_bytes = _state_bytes(task.abstract_state)
    if sum(state_bytes.values()) > available:
        raise StateDoesNotFitError(_too_much("the training state alone takes", sum(state_bytes.values()), available))
    started = time.perf_counter()
    try:
        lowered = task.train_step.lower(task.abstract_state, task.batch_spec)
        compiled = lowered.compile(None if has_full_effort else LITTLE_EFFORT)
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, available) from error
    compile_seconds = time.perf_counter() - started
    peak_bytes = compiled.memory_analysis().peak_memory_in_bytes
    if peak_bytes > available:  # XLA compiles programs for GPUs that do not fit
        raise DoesNotFitError(_too_much("the step takes", peak_bytes, available))
    return Plan(
        machine=machine,
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        settings={
            **{key: config.model[key] for key in ("remat", "dtype") if key in config.model and parts.trains_model},
            "accumulation_steps": config.optimizer.accumulation_steps,
            **({"mixer_method": costs.mixer_method} if costs.mixer_method else {}),
        },
        state_bytes=state_bytes,
        batch_bytes=_device_bytes(task.batch_spec),
        peak_bytes=peak_bytes,
        costs=costs,
        collectives=collectives(compiled.as_text(), mesh.size),
        compile_seconds=compile_seconds,
    )


def _state_bytes(state) -> dict[str, int]:
    """Bytes of each part of a training state on one device."""
    sizes = {field.name: _device_bytes(getattr(state, field.name)) for field in dataclasses.fields(state)}
    return {_STATE_NAMES.get(name, name): size for name, size in sizes.items() if size > _COUNTER_BYTES}


def _device_bytes(tree) -> int:
    """Bytes on one device of abstract arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _too_much(what: str, needed: int, available: int) -> str:
    return f"{what} {needed / _GIB:.2f} GiB of a device's memory, there are {available / _GIB:.2f}"


def _explained(error: Exception, available: int) -> ValueError:
    """A compiler's error as a ValueError."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" in message and re.search(r"\bHBM\b", message, re.IGNORECASE):
        figures = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message)
        figures = figures or re.search(r"Used ([\d.]+)G of ([\d.]+)G", message)
        if figures:
            return DoesNotFitError(_too_much("the step takes", *(int(float(x) * _GIB) for x in figures.groups())))
        return DoesNotFitError(f"the step takes more than the {available / _GIB:.2f} GiB of a device's memory")
    return ValueError(f"the step does not compile: {message[:1000]}")


def smaller_changes(config: ConfigDict, num_devices: int) -> Iterator[dict[str, object]]:
    """Valid changes of a config that save memory, under dotted keys, the smallest first.

    These are more recomputation, more microbatches, more sharding, then the last two together. All but the first come
    with the most recomputation.
    """
    model, changes = config.model, []
    if Parts(config).trains_model and (remat := registry.options("model", model.name).get("remat")):
        policies = remat.choices.names
        changes = [{"model.remat": policy} for policy in policies[policies.index(model.remat) + 1 :]]
    most = changes[-1] if changes else {}
    doublings = [2**i for i in range(1, max(config.batch_size, num_devices).bit_length())]
    microbatches = [{"optimizer.accumulation_steps": n * config.optimizer.accumulation_steps} for n in doublings]
    shards = [{"mesh.data": -1, "mesh.fsdp": n * config.mesh.fsdp} for n in doublings]
    both = sorted(
        (shard | parts for shard in shards for parts in microbatches),
        key=lambda change: change["mesh.fsdp"] * change["optimizer.accumulation_steps"],
    )
    for change in [*changes, *(most | change for change in (*microbatches, *shards, *both))]:
        try:
            validate(override(config, change), num_devices)
        except ValueError:
            continue
        yield change


def search(
    config: ConfigDict, machine: Machine, *, max_tries: int = 8, has_full_effort: bool = False
) -> tuple[Plan, dict[str, object]] | None:
    """The plan of the first of `smaller_changes` that fits, and that change; None if none of those tried fits.

    Prints each try. At most `max_tries` are compiled; if the training state alone is too large, nothing is compiled.
    """
    for change in smaller_changes(config, machine.num_devices):
        print(f"trying {as_flags(change)}", flush=True)
        try:
            return make_plan(override(config, change), machine, has_full_effort=has_full_effort), change
        except DoesNotFitError as error:
            print(f"  does not fit: {error}", flush=True)
            max_tries -= not isinstance(error, StateDoesNotFitError)
        if max_tries == 0:
            break
    return None


def as_flags(change: dict[str, object]) -> str:
    """A change in the form of the command line."""
    return " ".join(f"--config.{key}={value}" for key, value in change.items())


# What is printed.


def report(plan: Plan, *, mfu: float, num_images: float) -> str:
    """The plan as text, each figure with its unit."""
    machine, chip = plan.machine, plan.machine.chip
    rest = plan.peak_bytes - sum(plan.state_bytes.values()) - plan.batch_bytes
    memory = [*plan.state_bytes.items(), ("batch", plan.batch_bytes), ("gradients, activations, rest", rest)]
    lines = [
        f"{machine.name}: {machine.num_chips} x {chip.device_kinds[0]}, {'x'.join(map(str, machine.shape))}",
        f"mesh: {', '.join(f'{axis} {size}' for axis, size in plan.mesh.items())}; batch {plan.batch_size}",
        ", ".join(f"{key} {value}" for key, value in plan.settings.items()),
        f"compiled in {plan.compile_seconds:.0f} s",
        "",
        "memory of a device, GiB",
        *(f"  {name:<36}{size / _GIB:10.3f}" for name, size in memory),
        f"  {'peak':<36}{plan.peak_bytes / _GIB:10.3f}  of {chip.memory_bytes / _GIB:.2f}: it fits",
        "",
        f"{'collectives of a step':<25}{'devices':>8}{'times':>8}{'result, GB':>12}{'sent by each, GB':>18}",
        *_collective_rows(plan.collectives),
        "",
        *(_time_rows(plan, mfu, num_images) if plan.costs.total else ["multiply-adds: this model does not count them"]),
    ]
    if chip.platform == "cuda" and plan.peak_bytes > 0.75 / 0.95 * chip.memory_bytes:
        lines += ["", "This needs XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment: by default JAX takes 75 %."]
    return "\n".join(lines)


def _time_rows(plan: Plan, mfu: float, num_images: float) -> list[str]:
    costs, batch_size, rate = plan.costs, plan.batch_size, plan.images_per_second(mfu)
    hours = num_images / rate / 3600
    chip_hours = hours * plan.num_devices / plan.machine.chip.devices_per_chip
    mixers = "not counted" if costs.mixer is None else f"{costs.mixer / 1e9:10.1f}"
    return [
        "multiply-adds, G",
        f"  {'linear layers, forward, an image':<36}{costs.total / 1e9:10.1f}",
        f"  {'sequence mixers, forward, an image':<36}{mixers}",
        f"  {'linear layers, a step':<36}{batch_size * 3 * costs.total / 1e9:10.0f}",
        f"  {'recomputed beside them':<36}{batch_size * costs.recomputed / 1e9:10.0f}",
        "",
        "time, linear layers alone",
        f"  {f'a step at the peak, {plan.peak_flops / 1e12:.0f} TFLOP/s':<36}{plan.floor_seconds:10.4f} s",
        f"  {f'images/s at an MFU of {mfu:.0%}':<36}{rate:10.1f}",
        f"  {f'{num_images / 1e6:.0f} M images':<36}{hours / 24:10.1f} days, {chip_hours:.0f} chip-hours",
    ]


def _collective_rows(found: list[Collective]) -> list[str]:
    if not found:
        return ["  none"]
    rows = []
    for kind, group_size in dict.fromkeys((c.kind, c.group_size) for c in found):
        same = [c for c in found if (c.kind, c.group_size) == (kind, group_size)]
        result = sum(c.count * c.result_bytes for c in same) / 1e9
        sent = sum(c.sent_bytes for c in same) / 1e9
        unknown = "" if all(c.is_count_known for c in same) else "  at least: a loop's number of iterations is unknown"
        times = sum(c.count for c in same)
        rows.append(f"  {kind:<23}{group_size:8}{times:8}{result:12.3f}{sent:18.3f}{unknown}")
    return rows


def as_dict(plan: Plan, *, mfu: float, num_images: float) -> dict:
    """The plan, and the speed and time at an MFU, as JSON can hold it."""
    values = dataclasses.asdict(plan)
    for entry, collective in zip(values["collectives"], plan.collectives, strict=True):
        entry["sent_bytes"] = collective.sent_bytes
    values["costs"] = plan.costs._asdict() | {"total": plan.costs.total}
    if not plan.costs.total:
        return values
    rate = plan.images_per_second(mfu)
    values |= {"floor_seconds": plan.floor_seconds, "mfu": mfu, "num_images": num_images}
    return values | {"images_per_second": rate, "days": num_images / rate / 86400}


def main() -> int:
    """Prints the plan that the flags describe; returns 0 if the step fits, perhaps after a change, else 1."""
    config = _CONFIG.value
    if config is None or _TOPOLOGY.value is None:
        raise app.UsageError("give --config=configs/imagenet256.py:XL (or another file of configs/) and --topology=...")
    jax.config.update("jax_platforms", "cpu")  # leaves this computer's accelerator free
    machine = parse_machine(_TOPOLOGY.value)
    config, _ = complete_from_data(config)
    figures = {"mfu": _MFU.value}
    figures["num_images"] = _IMAGES.value or _PAPER_IMAGES.get(config.data.image_size, _DEFAULT_IMAGES)
    change: dict[str, object] = {}
    effort = {"has_full_effort": _FULL_EFFORT.value}
    try:
        plan = make_plan(config, machine, **effort)
    except DoesNotFitError as error:
        print(f"DOES NOT FIT {machine.name}: {error}", flush=True)
        found = None if _NO_SEARCH.value else search(config, machine, max_tries=_MAX_TRIES.value, **effort)
        if found is None:
            print("no change was found that fits" + (" (--no_search)" if _NO_SEARCH.value else ""), flush=True)
            return 1
        plan, change = found
        print(f"\nIt fits with {as_flags(change)}:\n")
    print(report(plan, **figures))
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(as_dict(plan, **figures) | {"change": change}, file, indent=2)
    return 0


if __name__ == "__main__":
    cli.run(main, _FLAGS)
