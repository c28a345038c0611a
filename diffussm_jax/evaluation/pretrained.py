"""Published weights of the networks that scores are computed with: finding, reading and converting their files.

All formats of `tensor_files` give the same tensors, by the names of one published layout, and the same SHA-256.
`convert` writes them once as safetensors into the user's cache, where PyTorch is no longer needed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from diffussm_jax.io import cache_folder, check_same_shapes, file_sha256, weights_hash, write_whole
from diffussm_jax.tensor_files import Tensors, read_tensors

_FORMAT = "diffussm_jax.pretrained"
_IGNORED = ".num_batches_tracked"  # PyTorch's counter in BatchNorm


class Published(NamedTuple):
    """The weights of a network as its authors published them.

    Attributes:
      name: of the network, such as "inception".
      tensor_shapes: () -> the names and shapes of all tensors.
      where: to get them.
      renamed: tensors of any known layout -> the same by the names above.
      other_network: names and shapes of a file that does not fit -> what it holds, or "".
    """

    name: str
    tensor_shapes: Callable[[], dict[str, tuple[int, ...]]]
    where: str
    renamed: Callable[[Tensors], Tensors] = dict
    other_network: Callable[[Mapping[str, tuple[int, ...]]], str] = lambda shapes: ""


def read_published(network: Published, path: epath.PathLike | None = None) -> tuple[Tensors, str]:
    """Reads the weights of a network.

    Args:
      network: `inception.PUBLISHED` or `dinov2.PUBLISHED`.
      path: a .pth, .safetensors or .npz file. By default the file that `convert` wrote.

    Returns:
      the tensors, float32, and the SHA-256 of their names, shapes and values, which does not depend on the format.

    Raises:
      FileNotFoundError: there is no such file. The message says where to get it.
      ValueError: the file is damaged, of an unknown format, needs PyTorch, or holds another network.
    """
    path = find_weights(network, path)
    tensors, metadata = read_tensors(path)
    tensors = network.renamed({k: x for k, x in tensors.items() if not k.endswith(_IGNORED)})
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    expected = network.tensor_shapes()
    if shapes != expected:
        other = network.other_network(shapes)
        message = f"{path} does not hold the weights of {network.name}" + (f": {other}" if other else "")
        check_same_shapes(expected, shapes, message)
    not_floats = [name for name, tensor in tensors.items() if not jnp.issubdtype(tensor.dtype, jnp.floating)]
    if not_floats:
        raise ValueError(f"{path}: these tensors are not of floating-point numbers: {sorted(not_floats)}")
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    sha256 = weights_hash(tensors)
    if metadata.get("format") == _FORMAT and metadata.get("sha256") != sha256:
        raise ValueError(f"{path} is damaged: its tensors have the SHA-256 {sha256}, not {metadata.get('sha256')}")
    return tensors, sha256


def find_weights(network: Published, path: epath.PathLike | None = None) -> epath.Path:
    """The file of a network's weights: the given one, or the one that `convert` wrote.

    Raises:
      FileNotFoundError: there is no such file. The message says where to get it.
    """
    found = epath.Path(path or converted_path(network))
    if found.is_file():
        return found
    missing = f"there is no file {found}" if path else f"the weights of {network.name} are not at {found}"
    raise FileNotFoundError(
        f"{missing}. Get {network.where}. Then pass it as --weights=FILE, or convert it once: "
        f"python -m diffussm_jax.evaluate --features={network.name} --convert=FILE"
    )


def convert(source: epath.PathLike, network: Published) -> Path:
    """Writes the weights of a network as safetensors into the user's cache, where `find_weights` finds them.

    Args:
      source: as `read_published`.
      network: `inception.PUBLISHED` or `dinov2.PUBLISHED`.

    Returns:
      The path of the file. Its metadata name the network, the source and the SHA-256 of both.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: as `read_published`.
    """
    tensors, sha256 = read_published(network, source)
    metadata = {
        "format": _FORMAT,
        "network": network.name,
        "source": epath.Path(source).name,
        "source_sha256": file_sha256(epath.Path(source)),
        "sha256": sha256,
    }
    path = converted_path(network)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.numpy.save(_contiguous(tensors), metadata=metadata))
    return path


def converted_path(network: Published) -> Path:
    """Where `convert` writes, in `io.cache_folder`."""
    return cache_folder() / "weights" / f"{network.name}.safetensors"


def _contiguous(tensors: Tensors) -> Tensors:
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # safetensors writes a view's base
