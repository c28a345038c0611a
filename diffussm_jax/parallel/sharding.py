"""Sharding of parameters and activations: rules for paths, and constraints inside a model.

A rule is (regular expression, mesh axes of each dimension). The first rule whose expression matches a parameter's path
("blocks/W0/kernel") applies. Optimizer state has the parameter's path at its end, and so gets the same sharding. Arrays
without a rule are replicated.
"""

import re
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffussm_jax.io import path_of
from diffussm_jax.parallel.mesh import BATCH

Axes = None | str | tuple[str, ...]
Rules = Sequence[tuple[str, tuple[Axes, ...]]]


def spec_of(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> PartitionSpec:
    """The partition spec of one array.

    Raises:
      ValueError: a dimension is not a multiple of its number of devices, or the rule has too many dimensions.
    """
    for pattern, axes in rules:
        if not re.search(pattern, path):
            continue
        if len(axes) > len(shape):
            raise ValueError(f"the sharding rule {pattern!r} -> {axes} does not fit {path} of shape {shape}")
        for size, names in zip(shape, axes, strict=False):
            names = (names,) if isinstance(names, str) else names or ()
            split = 1
            for name in names:
                split *= mesh.shape[name]
            if size % split:
                raise ValueError(
                    f"{path} of shape {shape} cannot be split: {size} is not a multiple of the {split} devices along "
                    f"{' x '.join(names)}; choose a smaller config.mesh.{names[-1]}"
                )
        return PartitionSpec(*axes)
    return PartitionSpec()


def shardings(tree, rules: Rules, mesh: Mesh):
    """The sharding of every leaf (anything with a shape) of a tree; raises as `spec_of`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_of(path), leaf.shape, rules, mesh)), tree
    )


def _has_mesh() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def replicate_channels(x: jax.Array) -> jax.Array:
    """Constrains an activation [B, ...] to be split along the batch only. Without a mesh it returns `x`."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH)) if _has_mesh() else x


def split_channels(x: jax.Array, *, batch: int = 0, channels: int = -1) -> jax.Array:
    """Constrains an activation to be split along its batch and channels. Without a mesh it returns `x`."""
    axes: list[Axes] = [None] * x.ndim
    axes[batch], axes[channels] = BATCH, "tensor"
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes)) if _has_mesh() else x


def replicate_kernel(kernel: jax.Array) -> jax.Array:
    """Constrains a parameter to be replicated on every device. Without a mesh it returns the parameter."""
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec()) if _has_mesh() else kernel


def over_channels(apply: Callable, params, u: jax.Array) -> jax.Array:
    """Runs `apply(params, u)` on the batch rows and channels of each device, without communication.

    XLA by itself would gather the batch for an FFT, and the channels for a concatenation along them.

    Args:
      apply: (params, u [M, d, b, J]) -> [M, R, d, b, J], with independent channels.
      params: a pytree of arrays [D, ...].
      u: [M, D, B, J].

    Returns:
      [M, R, D, B, J].
    """
    if not _has_mesh():
        return apply(params, u)
    sharded = jax.shard_map(
        apply,
        in_specs=(PartitionSpec("tensor"), PartitionSpec(None, "tensor", BATCH)),
        out_specs=PartitionSpec(None, None, "tensor", BATCH),
        check_vma=False,
    )
    return sharded(params, u)


def sum_over_channels(x: jax.Array) -> jax.Array:
    """Inside `over_channels`, the sum of `x` over the devices among which the channels are split."""
    return jax.lax.psum(x, "tensor") if _has_mesh() else x
