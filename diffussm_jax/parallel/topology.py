"""Names of machines, specifications of chips, and devices for ahead-of-time compilation.

A TPU slice is named by its shape in chips, "v5e:16x16" or "v4:2x2x1", or by Google's accelerator type: "v5e-256" (also
"v5litepod-256") and "v6e-64" count chips; "v2-8", "v3-8", "v4-8" and "v5p-8" count TensorCores, two per chip. GPUs are
"h100", or "h100:16" for several, in machines of eight.

JAX compiles for a TPU with `libtpu` installed, and for a GPU with its CUDA plugin. Neither needs the device.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
from jax.experimental import topologies

from diffussm_jax.parallel.mesh import make_mesh

_GIB = 2**30
_GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published specifications of a chip. If JAX shows several devices per chip, peaks and memory are per device.

    Attributes:
      platform: "tpu" or "cuda".
      device_kinds: JAX's `device_kind` of the device.
      peak_flops: dense bfloat16, FLOP/s.
      memory_bytes: memory available to a program. TPUs: the compiler's limit in libtpu 0.0.42, found by exceeding it.
        GPUs: about 95 % of the memory that CUDA reports, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
      memory_bandwidth: byte/s.
      devices_per_chip: JAX devices per chip.
      cores_per_chip: cores counted by Google's names; 1 if they count chips.
      num_axes: axes of the shape of a slice; 0 for GPUs.
      max_chips: of a slice; None for GPUs, without limit.
    """

    name: str
    platform: str = "tpu"
    device_kinds: tuple[str, ...]
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    devices_per_chip: int = 1
    cores_per_chip: int = 1
    num_axes: int = 0
    max_chips: int | None = None


class _Gpu(NamedTuple):
    """Further specifications for XLA's description of a GPU."""

    description: str
    memory_gib: float  # as CUDA reports it
    capability: str
    num_cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_mib: int
    shared_kib: int


def _tpu(
    name, device_kinds, tera_flops, gib, gb_per_s, num_axes, max_chips, *, devices_per_chip=1, cores_per_chip=1
) -> Chip:
    return Chip(
        name=name,
        device_kinds=device_kinds,
        peak_flops=tera_flops * 1e12 / devices_per_chip,
        memory_bytes=int(gib * _GIB),
        memory_bandwidth=gb_per_s * 1e9 / devices_per_chip,
        devices_per_chip=devices_per_chip,
        cores_per_chip=cores_per_chip,
        num_axes=num_axes,
        max_chips=max_chips,
    )


def _gpu(name, tera_flops, gb_per_s) -> Chip:
    return Chip(
        name=name,
        platform="cuda",
        device_kinds=(_GPUS[name].description,),
        peak_flops=tera_flops * 1e12,
        memory_bytes=int(0.95 * _GPUS[name].memory_gib * _GIB),
        memory_bandwidth=gb_per_s * 1e9,
    )


_HOPPER = ("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128, 1.98, 50, 228)
_GPUS = {
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 79.1, *_HOPPER),
    "h200": _Gpu("NVIDIA H200", 139.8, *_HOPPER),
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", 79.1, "major: 8", 108, 64, 1.41, 40, 164),
}
# Peaks and bandwidths per chip: cloud.google.com/tpu/docs (system architecture), NVIDIA's data sheets (SXM, dense).
_ALL_CHIPS = (
    _tpu("v2", ("TPU v2",), 46, 7.48, 700, 2, 256, devices_per_chip=2, cores_per_chip=2),
    _tpu("v3", ("TPU v3",), 123, 15.48, 900, 2, 1024, devices_per_chip=2, cores_per_chip=2),
    _tpu("v4", ("TPU v4",), 275, 30.75, 1228, 3, 4096, cores_per_chip=2),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 15.75, 819, 2, 256),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 459, 95.74, 2765, 3, 8960, cores_per_chip=2),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 31.25, 1638, 2, 256),
    _tpu("tpu7x", ("TPU7x",), 2307, 94.75, 7380, 3, 9216, devices_per_chip=2, cores_per_chip=2),
    _gpu("h100", 989, 3350),
    _gpu("h200", 989, 4800),
    _gpu("a100", 312, 2039),
)
CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in _ALL_CHIPS})
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}


def peak_flops(device_kind: str) -> float | None:
    """The peak of a device in dense bfloat16 FLOP/s, by its `device_kind`; None if unknown."""
    return next((chip.peak_flops for chip in _ALL_CHIPS if device_kind in chip.device_kinds), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Chips of one kind in one program.

    Attributes:
      name: as passed to `parse_machine`.
      shape: chips along each axis of a slice; for GPUs (hosts, GPUs per host).
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip


def parse_machine(name: str) -> Machine:
    """Parses the name of a machine; the module docstring has the syntax.

    Raises:
      ValueError: the chip is unknown, or the slice cannot have that shape.
    """
    match = re.fullmatch(r"([a-z]\w*?)(?::(\d+(?:x\d+)*)|-(\d+))?", name.lower())
    chip = CHIPS.get(_ALIASES.get(match[1], match[1])) if match else None
    if chip is None:
        raise ValueError(
            f"unknown machine {name!r}; give a TPU slice, such as v4-8, v5e:16x16 or v6e-64, or GPUs, such as h100 or "
            f"h100:8; chips are {', '.join(CHIPS)}"
        )
    shape = tuple(int(size) for size in match[2].split("x")) if match[2] else None
    count = int(match[3]) if match[3] else None
    if 0 in (shape or ()) or count == 0:
        raise ValueError(f"a machine has at least one chip, got {name!r}")
    if chip.platform == "cuda":
        return Machine(name=name, chip=chip, shape=_hosts(name, shape, count))
    if shape is None:
        shape = _default_shape(name, chip, count)
    if len(shape) != chip.num_axes:
        example = "x".join("224"[-chip.num_axes :])
        raise ValueError(
            f"slices of {chip.name} have {chip.num_axes} axes, such as {chip.name}:{example}; got {name!r}"
        )
    if math.prod(shape) > chip.max_chips:
        raise ValueError(f"the largest slices of {chip.name} have {chip.max_chips} chips; got {name!r}")
    return Machine(name=name, chip=chip, shape=shape)


def _hosts(name: str, shape: tuple[int, ...] | None, count: int | None) -> tuple[int, int]:
    if count is not None or len(shape or (1,)) != 1:
        raise ValueError(f"several GPUs are written h100:8; got {name!r}")
    num_gpus = shape[0] if shape else 1
    if num_gpus > _GPUS_PER_HOST and num_gpus % _GPUS_PER_HOST:
        raise ValueError(f"more than {_GPUS_PER_HOST} GPUs must be a multiple of {_GPUS_PER_HOST}, got {name!r}")
    return max(1, num_gpus // _GPUS_PER_HOST), min(num_gpus, _GPUS_PER_HOST)


def _default_shape(name: str, chip: Chip, count: int | None) -> tuple[int, ...]:
    """The default shape of a slice named by its size, as even as possible: 8x16 for 128 chips, 2x4x4 for 32."""
    unit = "TensorCores" if chip.cores_per_chip > 1 else "chips"
    num_chips, rest = divmod(count or 0, chip.cores_per_chip)
    if rest or num_chips < 1 or num_chips & (num_chips - 1):
        raise ValueError(
            f"a slice named by its size has a power of two {unit}, such as {chip.name}-{4 * chip.cores_per_chip}, got "
            f"{name!r}; name others by their shape, {chip.name}:{'x'.join('2' * chip.num_axes)}"
        )
    if chip.num_axes == 3 and num_chips == 4:
        return 2, 2, 1
    exponent = num_chips.bit_length() - 1
    return tuple(2 ** ((exponent + i) // chip.num_axes) for i in range(chip.num_axes))


def compile_only_devices(machine: Machine) -> list[jax.Device]:
    """Devices of a machine for ahead-of-time compilation. Programs cannot run on them.

    Raises:
      ValueError: libtpu or the CUDA plugin is missing, or libtpu refuses the shape. The message says what to do.
    """
    if machine.chip.platform == "cuda":
        return _cuda_devices(machine)
    # These keep libtpu from searching for a TPU on this machine. Any slice works.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(key, value)
    shape = "x".join(map(str, machine.shape))
    hosts = tuple(2 if size % 2 == 0 else 1 for size in (*machine.shape, 1))[:3]
    options = {"chip_config_name": "megacore"} if machine.chip.name == "v4" else {}
    try:
        topology = topologies.get_topology_desc(
            f"{machine.chip.name}:{shape}", "tpu", chips_per_host_bounds=hosts, **options
        )
    except RuntimeError as error:
        if "support not installed" in str(error):
            raise ValueError(
                "compiling for TPUs needs libtpu: pip install -e '.[plan]', or pip install 'jax[tpu]'"
            ) from error
        raise ValueError(f"libtpu has no slice {machine.name!r}: {error}") from error
    return topology.devices


def lowering_for(device: jax.Device) -> contextlib.AbstractContextManager:
    """The context for tracing and lowering a program for one of `compile_only_devices`.

    Pallas needs the kind of the GPU to lower a kernel. Since JAX 0.11 it reads it from the current abstract mesh;
    without a mesh it searches for a GPU on this machine.
    """
    return jax.sharding.use_abstract_mesh(make_mesh(1, 1, 1, devices=[device]).abstract_mesh)


def _cuda_devices(machine: Machine) -> list[jax.Device]:
    hosts, gpus = machine.shape
    try:
        topology = topologies.get_topology_desc(
            machine.chip.name, "cuda", target_config=_target_config(machine.chip), topology=f"1x{hosts}x{gpus}"
        )
    except NotImplementedError as error:
        raise ValueError(
            "compiling for NVIDIA GPUs needs JAX's CUDA plugin: pip install -e '.[plan-gpu]' to compile only, or "
            "'.[cuda12]' or '.[cuda13]'; the plugin must have jax's version, "
            f"{jax.__version__}; without a GPU also set JAX_PLATFORMS=cpu"
        ) from error
    return topology.devices


def _target_config(chip: Chip) -> str:
    """XLA's GpuTargetConfigProto of a GPU, as text. Limits are from CUDA's table of compute capabilities."""
    gpu, kib = _GPUS[chip.name], 2**10
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.description}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          cuda_compute_capability {{ {gpu.capability} }}
          core_count: {gpu.num_cores}
          fpus_per_core: {gpu.fpus_per_core}
          clock_rate_ghz: {gpu.clock_ghz}
          memory_bandwidth: {int(chip.memory_bandwidth)}
          device_memory_size: {int(gpu.memory_gib * _GIB)}
          l2_cache_size: {gpu.l2_mib * kib**2}
          shared_memory_per_core: {gpu.shared_kib * kib}
          shared_memory_per_block: {48 * kib}
          shared_memory_per_block_optin: {(gpu.shared_kib - 1) * kib}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_core_limit: 2048
          threads_per_block_limit: 1024
          threads_per_warp: 32
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}"""
