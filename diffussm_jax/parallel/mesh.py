"""The device mesh. It has one axis, `data`, along the batch; every device holds all parameters."""

import jax
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
