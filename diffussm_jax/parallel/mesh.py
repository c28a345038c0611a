"""The device mesh. It has one axis, `data`, along the batch; every device holds all parameters."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(data: int = -1) -> Mesh:
    """A mesh of `data` devices, or of all of them if -1.

    Raises:
      ValueError: there are not that many devices.
    """
    num_devices = jax.device_count()
    size = num_devices if data == -1 else data
    if not 1 <= size <= num_devices:
        raise ValueError(f"the mesh's data axis must be -1 or from 1 to the {num_devices} devices, got {data}")
    return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters and everything that follows them."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first dimension is the batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, in order: [b] int."""
    rows = over_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in rows]))


def batch_to_devices(mesh: Mesh, batch):
    """A pytree of this process's rows, host arrays [b, ...], as global arrays [B, ...] over the mesh."""
    sharding = over_batch(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
