"""What a training run needs of a machine, without the machine: compiles the real step for it, ahead of time.

    python -m diffussm_jax.plan --config=configs/imagenet256.py:XL --topology=v5e:16x16
    python -m diffussm_jax.plan --config=configs/imagenet512.py:XL --topology=h100:8 --config.model.ssm_method=chunked

For each device: what parameters, their average and the optimizer take, the peak of memory against what there is, and
the collectives with their bytes, all from the compiled program; multiply-adds counted from the model's sizes, since XLA
counts the body of a scan once; and what follows for the time of a run at a stated share of the peak (--mfu). Where the
step does not fit, the changes that save memory are tried one after the other: `model.remat`,
`optimizer.accumulation_steps`, `mesh.fsdp`, then these two together. docs/plan.md explains each figure.

Machines are named as in `parallel.topology`. Compiling for TPUs needs the extra `plan` (libtpu), for NVIDIA GPUs the
extra `plan-gpu` or `cuda12`; either works on any Linux computer.
"""

import copy
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from diffussm_jax import cli
from diffussm_jax.build import build_model, build_train_step, input_shape
from diffussm_jax.config import CHOICES, images_at_a_time, validate
from diffussm_jax.parallel.hlo import Collective, collectives
from diffussm_jax.parallel.mesh import make_mesh, platform_of
from diffussm_jax.parallel.topology import Machine, compile_only_devices, parse_machine
from diffussm_jax.ssm.auto import fastest_method
from diffussm_jax.ssm.chunked import chunk_size
from diffussm_jax.ssm.fft import transform_length

_FLAGS = flags.FlagValues()  # apart, so that any of the programs can be imported beside another
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The machine: v5e:16x16, v4-8, v6e-64, h100, h100:8, ...", flag_values=_FLAGS
)
_MFU = flags.DEFINE_float(
    "mfu", 0.4, "Share of the peak to reckon times with.", lower_bound=1e-6, upper_bound=1, flag_values=_FLAGS
)
_IMAGES = flags.DEFINE_float(
    "images", None, "Images of the run; by default the paper's 660e6, and 302e6 at 512 pixels.", flag_values=_FLAGS
)
_NO_SEARCH = flags.DEFINE_boolean(
    "no_search", False, "Whether to leave it at that where the step does not fit.", flag_values=_FLAGS
)
_MAX_TRIES = flags.DEFINE_integer(
    "max_tries", 8, "Changes to compile at most in search of one that fits.", lower_bound=1, flag_values=_FLAGS
)
_FULL_EFFORT = flags.DEFINE_boolean(
    "full_effort",
    False,
    "Whether the compiler works as long on the program as for a run: minutes; memory differs by some 0.5 GiB.",
    flag_values=_FLAGS,
)
_JSON = flags.DEFINE_string("json", None, "A file to write the figures to, too.", flag_values=_FLAGS)

_GIB = 2**30
_PAPER_IMAGES = {512: 302e6}
_DEFAULT_IMAGES = 660e6
# JAX 0.12 replaced the first option by the second, of which 9 is O0.
_LITTLE_EFFORT = (
    {"exec_time_optimization_effort": -1.0}
    if hasattr(jax.config, "jax_exec_time_optimization_effort")
    else {"optimization_level": 9}
)
_STATE_NAMES = {"params": "parameters", "ema_params": "EMA", "opt_state": "optimizer", "power_ema": "post-hoc EMA"}


class DoesNotFitError(ValueError):
    """The step needs more memory than a device has; the message has the figures."""


class StateDoesNotFitError(DoesNotFitError):
    """The training state alone does, so that nothing needed compiling."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A step compiled for a machine.

    Attributes:
      machine: what it was compiled for.
      mesh: devices along each axis.
      batch_size: images of a step, over all devices.
      settings: the config's values that decide on memory and time.
      state_bytes: of the training state on a device, by part.
      batch_bytes: of the batch on a device.
      peak_bytes: the most that the program holds at once on a device: state, batch, gradients, activations and all.
      multiply_adds: of the linear layers in the forward pass of one image.
      recomputed_multiply_adds: the part of them that the backward pass computes again.
      ssm_multiply_adds: likewise of the SSMs' matrix products or FFTs; None where they are not counted.
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
    multiply_adds: int
    recomputed_multiply_adds: int
    ssm_multiply_adds: int | None
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
        """What a step's linear layers, recomputed ones included, take at the peak."""
        return 2 * self.batch_size * (3 * self.multiply_adds + self.recomputed_multiply_adds) / self.peak_flops

    def images_per_second(self, mfu: float) -> float:
        """At a model FLOPs utilisation: 3 * 2 * multiply-adds * images/s / peak, SSM and recomputation excluded."""
        return mfu * self.peak_flops / (6 * self.multiply_adds)


def make_plan(config: ConfigDict, machine: Machine, *, has_full_effort: bool = False) -> Plan:
    """Compiles the training step of a config for a machine.

    Args:
      config: of the run.
      machine: to compile for.
      has_full_effort: whether the compiler works as long on the program's speed as it does for a run.

    Raises:
      DoesNotFitError: a device's memory is too small.
      ValueError: the config is wrong for that many devices, or what the compiler needs is not installed.
    """
    validate(config, machine.num_devices)
    mesh = make_mesh(**config.mesh.to_dict(), devices=compile_only_devices(machine))
    train_step, state, batch = build_train_step(config, mesh)
    state_bytes = {name: _device_bytes(getattr(state, field)) for field, name in _STATE_NAMES.items()}
    available = machine.chip.memory_bytes
    if sum(state_bytes.values()) > available:
        raise StateDoesNotFitError(_too_much("the training state alone takes", sum(state_bytes.values()), available))
    started = time.perf_counter()
    try:
        compiled = train_step.lower(state, batch).compile(None if has_full_effort else _LITTLE_EFFORT)
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, available) from error
    compile_seconds = time.perf_counter() - started
    peak_bytes = compiled.memory_analysis().peak_memory_in_bytes
    if peak_bytes > available:  # for GPUs XLA leaves it to the run to fail
        raise DoesNotFitError(_too_much("the step takes", peak_bytes, available))
    platform = platform_of(mesh.devices.flat[0])
    return Plan(
        machine=machine,
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        settings={
            "remat": config.model.remat,
            "accumulation_steps": config.optimizer.accumulation_steps,
            "ssm_method": ssm_method(config, platform),
            "dtype": config.model.dtype,
        },
        state_bytes={name: size for name, size in state_bytes.items() if size},
        batch_bytes=_device_bytes(batch),
        peak_bytes=peak_bytes,
        multiply_adds=build_model(config).multiply_adds(*input_shape(config))["total"],
        recomputed_multiply_adds=recomputed_multiply_adds(config),
        ssm_multiply_adds=ssm_multiply_adds(config, platform, images_at_a_time(config, mesh.shape)),
        collectives=collectives(compiled.as_text(), mesh.size),
        compile_seconds=compile_seconds,
    )


def _device_bytes(tree) -> int:
    """What one device holds of abstract arrays that know their shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _too_much(what: str, needed: int, available: int) -> str:
    return f"{what} {needed / _GIB:.2f} GiB of a device's memory, there are {available / _GIB:.2f}"


def _explained(error: Exception, available: int) -> ValueError:
    """The ValueError that a compiler's error stands for."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" in message and re.search(r"\bHBM\b", message, re.IGNORECASE):
        figures = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message)
        figures = figures or re.search(r"Used ([\d.]+)G of ([\d.]+)G", message)
        if figures:
            return DoesNotFitError(_too_much("the step takes", *(int(float(x) * _GIB) for x in figures.groups())))
        return DoesNotFitError(f"the step takes more than the {available / _GIB:.2f} GiB of a device's memory")
    return ValueError(f"the step does not compile: {message[:1000]}")


def recomputed_multiply_adds(config: ConfigDict) -> int:
    """Of the linear layers, those that the backward pass computes again, for one image."""
    H, W, C = input_shape(config)
    depth, D, J = config.model.depth, config.model.width, H * W // config.model.hourglass_ratio
    again = {"none": 0, "dots": depth * 2 * D * D}  # the blocks' modulation, once an image
    # All of a block but W3, whose output the backward pass has no use for.
    again["block"] = again["dots"] + build_model(config).multiply_adds(H, W, C)["blocks"] - depth * J * 2 * D * D
    return again[config.model.remat]


def ssm_method(config: ConfigDict, platform: str) -> str:
    """How a platform computes the SSMs of a config: the method that "auto" stands for there."""
    model, (H, W, _) = config.model, input_shape(config)
    if model.ssm_method != "auto":
        return model.ssm_method
    return fastest_method(platform, model.dtype, H * W, model.width, model.state_size)


def ssm_multiply_adds(config: ConfigDict, platform: str, num_images: int) -> int | None:
    """Multiply-adds of all SSMs in the forward pass of one image, of the `num_images` that a device computes together.

    None for the methods that are not counted.

    "chunked": the matrix products inside and between chunks, those of both directions as one with zeros between. "fft":
    transforms of n real points at 5/4 n log2 n, one of the input and one back for each direction, and the products of
    their spectra at 3 a complex one. Making kernels and operators, once for a whole batch, is not counted.
    """
    model, method = config.model, ssm_method(config, platform)
    H, W, _ = input_shape(config)
    L, R = H * W, 2 if model.bidirectional else 1
    if method == "chunked":
        c = min(L, chunk_size(num_images * L))
        K = math.ceil(L / c)
        a_channel = R * K * c * (c + ((1 + R) * model.state_size if K > 1 else 0))
    elif method == "fft":
        n = transform_length(L, platform)
        a_channel = (1 + R) * 5 / 4 * n * math.log2(n) + 3 * R * (n // 2 + 1)
    else:
        return None
    scans = 2 if model.scan == "2d" else 1
    return round(model.depth * model.width * scans * a_channel)


def smaller_changes(config: ConfigDict, num_devices: int) -> Iterator[dict[str, object]]:
    """Changes of a config that save memory, under dotted keys, the smallest first; only such as are valid.

    Recomputation, parts of a batch, sharding, then the latter two together; all with the most recomputation that was
    tried before.
    """
    policies = CHOICES["model.remat"]
    remats = [{"model.remat": remat} for remat in policies[policies.index(config.model.remat) + 1 :]]
    doublings = [2**i for i in range(1, max(config.batch_size, num_devices).bit_length())]
    parts = [{"optimizer.accumulation_steps": n * config.optimizer.accumulation_steps} for n in doublings]
    shards = [{"mesh.data": -1, "mesh.fsdp": n * config.mesh.fsdp} for n in doublings]
    both = sorted(
        (shard | part for shard in shards for part in parts),
        key=lambda change: change["mesh.fsdp"] * change["optimizer.accumulation_steps"],
    )
    most = remats[-1] if remats else {}
    for change in [*remats, *(most | change for change in (*parts, *shards, *both))]:
        try:
            validate(changed(config, change), num_devices)
        except ValueError:
            continue
        yield change


def changed(config: ConfigDict, change: dict[str, object]) -> ConfigDict:
    """A copy of the config with other values under dotted keys."""
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(change)
    return config


def search(
    config: ConfigDict, machine: Machine, *, max_tries: int = 8, has_full_effort: bool = False
) -> tuple[Plan, dict[str, object]] | None:
    """The plan of the first of `smaller_changes` that fits, and that change; None if none does of those tried.

    Prints each try. At most `max_tries` are compiled; where the training state alone is too large, none is.
    """
    for change in smaller_changes(config, machine.num_devices):
        print(f"trying {as_flags(change)}", flush=True)
        try:
            return make_plan(changed(config, change), machine, has_full_effort=has_full_effort), change
        except DoesNotFitError as error:
            print(f"  does not fit: {error}", flush=True)
            max_tries -= not isinstance(error, StateDoesNotFitError)
        if max_tries == 0:
            break
    return None


def as_flags(change: dict[str, object]) -> str:
    """A change as it is given on the command line."""
    return " ".join(f"--config.{key}={value}" for key, value in change.items())


# What is printed.


def report(plan: Plan, *, mfu: float, num_images: float) -> str:
    """The plan as text, each figure with its unit."""
    machine, chip = plan.machine, plan.machine.chip
    rest = plan.peak_bytes - sum(plan.state_bytes.values()) - plan.batch_bytes
    memory = [*plan.state_bytes.items(), ("batch", plan.batch_bytes), ("gradients, activations, rest", rest)]
    rate, ssm = plan.images_per_second(mfu), plan.ssm_multiply_adds
    hours = num_images / rate / 3600
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
        "multiply-adds, G",
        f"  {'linear layers, forward, an image':<36}{plan.multiply_adds / 1e9:10.1f}",
        f"  {'SSMs, forward, an image':<36}" + ("not counted" if ssm is None else f"{ssm / 1e9:10.1f}"),
        f"  {'linear layers, a step':<36}{plan.batch_size * 3 * plan.multiply_adds / 1e9:10.0f}",
        f"  {'recomputed beside them':<36}{plan.batch_size * plan.recomputed_multiply_adds / 1e9:10.0f}",
        "",
        f"{'collectives of a step':<25}{'devices':>8}{'times':>8}{'result, GB':>12}{'sent by each, GB':>18}",
        *_collective_rows(plan.collectives),
        "",
        "time, linear layers alone",
        f"  {f'a step at the peak, {plan.peak_flops / 1e12:.0f} TFLOP/s':<36}{plan.floor_seconds:10.4f} s",
        f"  {f'images/s at an MFU of {mfu:.0%}':<36}{rate:10.1f}",
        f"  {f'{num_images / 1e6:.0f} M images':<36}{hours / 24:10.1f} days, "
        f"{hours * plan.num_devices / chip.devices_per_chip:.0f} chip-hours",
    ]
    if chip.platform == "cuda" and plan.peak_bytes > 0.75 / 0.95 * chip.memory_bytes:
        lines += ["", "This needs XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment: by itself JAX takes 75 %."]
    return "\n".join(lines)


def _collective_rows(found: list[Collective]) -> list[str]:
    if not found:
        return ["  none"]
    rows = []
    for kind, group_size in dict.fromkeys((c.kind, c.group_size) for c in found):
        same = [c for c in found if (c.kind, c.group_size) == (kind, group_size)]
        result = sum(c.count * c.result_bytes for c in same) / 1e9
        sent = sum(c.sent_bytes for c in same) / 1e9
        unknown = "" if all(c.is_count_known for c in same) else "  at least: a loop's turns are not known"
        times = sum(c.count for c in same)
        rows.append(f"  {kind:<23}{group_size:8}{times:8}{result:12.3f}{sent:18.3f}{unknown}")
    return rows


def as_dict(plan: Plan, *, mfu: float, num_images: float) -> dict:
    """The plan, and what follows from it at an MFU, as JSON can hold it."""
    rate = plan.images_per_second(mfu)
    values = dataclasses.asdict(plan)
    for entry, collective in zip(values["collectives"], plan.collectives, strict=True):
        entry["sent_bytes"] = collective.sent_bytes
    values |= {"floor_seconds": plan.floor_seconds, "mfu": mfu, "num_images": num_images}
    return values | {"images_per_second": rate, "days": num_images / rate / 86400}


def main() -> int:
    """Prints the plan of the flags; returns the exit code: 0 if the step fits, perhaps after a change, else 1."""
    config = flags.FLAGS.config
    if config is None or _TOPOLOGY.value is None:
        raise app.UsageError("give --config=configs/imagenet256.py:XL (or another file of configs/) and --topology=...")
    jax.config.update("jax_platforms", "cpu")  # this computer's accelerator, if it has one, stays free
    machine = parse_machine(_TOPOLOGY.value)
    num_images = _IMAGES.value or _PAPER_IMAGES.get(config.data.image_size, _DEFAULT_IMAGES)
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
    print(report(plan, mfu=_MFU.value, num_images=num_images))
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            values = as_dict(plan, mfu=_MFU.value, num_images=num_images)
            json.dump(values | {"change": change}, file, indent=2)
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/, such as configs/imagenet256.py:XL.", lock_config=True
    )
    cli.run(main, _FLAGS)
