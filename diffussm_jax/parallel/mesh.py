"""The device mesh: its axes, and the sharding of a batch.

    data    replicates the model and splits the batch
    fsdp    splits the batch, the parameters, their EMA and the optimizer's state
    tensor  splits the channels D of the hourglass and of the SSMs

`sharding` has the rules for parameters and activations.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split a batch


def mesh_shape(data: int, fsdp: int, tensor: int, *, num_devices: int) -> tuple[int, int, int]:
    """The sizes of the mesh's axes. A -1 is replaced so that all devices are used.

    If the product is smaller than the number of devices, only the first devices are used.

    Raises:
      ValueError: a size is neither -1 nor positive, or the sizes do not fit the devices.
    """
    sizes = (data, fsdp, tensor)
    named = f"data = {data}, fsdp = {fsdp}, tensor = {tensor}"
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"the axes must be positive, and one of them may be -1 to fill; got {named}")
    product = math.prod(size for size in sizes if size != -1)
    if product > num_devices:
        raise ValueError(f"{named} needs {product} devices, there are {num_devices}")
    if -1 in sizes and num_devices % product:
        raise ValueError(f"{named} does not divide the {num_devices} devices")
    return tuple(num_devices // product if size == -1 else size for size in sizes)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of three axes, with `tensor` along the nearest neighbours.

    Args:
      data, fsdp, tensor: devices along the axis; one may be -1, for all that the others leave.
      devices: all devices if None.

    Raises:
      ValueError: as for `mesh_shape`, or the mesh does not use all devices of several hosts.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(data, fsdp, tensor, num_devices=len(devices))
    used = math.prod(shape)
    if used < len(devices) and jax.process_count() > 1:
        raise ValueError(f"the mesh {shape} must use all {len(devices)} devices of the {jax.process_count()} processes")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:used])


def platform_of(device: jax.Device) -> str:
    """The platform of a device: "cpu", "gpu" or "tpu"."""
    platform = device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of replicated arrays."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays with the batch as first dimension."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, in order: [b] int."""
    rows = over_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in rows]))


def batch_to_devices(mesh: Mesh, batch):
    """Converts a pytree of this process's rows, host arrays [b, ...], to global arrays [B, ...] on the mesh."""
    sharding = over_batch(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
