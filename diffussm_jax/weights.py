"""Exported weights: the averaged parameters of a run as one safetensors file, which other programs can read too.

A tensor's name is its path in the parameter tree, "blocks/W0/kernel"; shapes and dtypes are those of the tree. The
blocks of DiffuSSM are stacked along the first dimension. The metadata hold the step of the checkpoint.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from diffussm_jax.io import check_same_shapes, path_of, shapes_by_path, write_whole

WEIGHTS = "model.safetensors"


def write_weights(folder: epath.PathLike, params: Any, step: int) -> epath.Path:
    """Writes FOLDER/model.safetensors whole or not at all. Returns its path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    tensors = {path_of(path): np.ascontiguousarray(leaf) for path, leaf in leaves}
    path = epath.Path(folder) / WEIGHTS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.numpy.save(tensors, metadata={"format": "diffussm_jax", "step": str(step)}))
    return path


def read_weights(folder: epath.PathLike, like: Any) -> tuple[Any, int]:
    """Reads exported weights, with the shapes and shardings of `like` (ShapeDtypeStructs). Executes nothing.

    Returns:
      the parameters, and the step of the checkpoint.

    Raises:
      ValueError: the file is damaged, or is of another model. The message lists the differences.
    """
    path = epath.Path(folder) / WEIGHTS
    try:
        content = path.read_bytes()
        tensors = safetensors.numpy.load(content)
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        step = int(json.loads(header)["__metadata__"]["step"])
        if step < 0 or not all(jnp.issubdtype(tensor.dtype, jnp.floating) for tensor in tensors.values()):
            raise ValueError("a negative step, or tensors that are not of floating-point numbers")
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no export of a run: {error}") from error
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_same_shapes(shapes_by_path(like), found, f"{path} does not hold the parameters of this model")
    params = jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: jax.device_put(tensors[path_of(key_path)].astype(leaf.dtype), leaf.sharding), like
    )
    return params, step
