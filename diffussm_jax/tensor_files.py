"""Files of tensors by name: PyTorch's .pt, .pth and .ckpt, .safetensors and .npz; and published weights in them.

Nothing that a file holds is executed: PyTorch's files are read by `torch.load(weights_only=True)`, .npz without
pickles, and safetensors cannot hold code.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from diffussm_jax.io import check_same_shapes, file_sha256, read_npz, read_safetensors, weights_hash, write_whole

Tensors = dict[str, np.ndarray]

_PYTORCH = (".pth", ".pt", ".ckpt")
SUFFIXES = (*_PYTORCH, ".safetensors", ".npz")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth?")  # the convention of torch.hub
_DTYPES = ("F32", "F16", "BF16", "F64")  # of safetensors files
_ERRORS_OF_TORCH = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, TypeError),
    *(OSError, EOFError, KeyError, IndexError, AttributeError),
)
_STATE_DICTS = ("ema", "state_dict", "model")  # of training checkpoints, the best first
_CONVERTED = "diffussm_jax.pretrained"  # the format in the metadata of converted files
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


def read_tensors(path: epath.PathLike) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file and its metadata, which only safetensors have.

    A hash in the file's name, as in name-6726825d.pth, must be the file's. PyTorch's floating-point tensors come as
    float32. Of a training checkpoint that holds several state dicts, `ema` is read, or `state_dict`, or `model`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, of an unknown format, or needs PyTorch.
    """
    path = epath.Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights are read from {', '.join(SUFFIXES)} files, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    in_name = _HASH_IN_NAME.search(path.name)
    if in_name and not (found := file_sha256(path)).startswith(in_name[1]):
        raise ValueError(
            f"{path} is damaged, or another file: its SHA-256 is {found}, and its name says {in_name[1]}...; "
            "if that is no hash, rename it"
        )
    if path.suffix == ".safetensors":
        return read_safetensors(path, _DTYPES)
    return (_read_pytorch(path) if path.suffix in _PYTORCH else read_npz(path)), {}


def _read_pytorch(path: epath.Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs PyTorch, which is not installed: `pip install torch`, or convert the file to "
            "safetensors where PyTorch is"
        ) from error
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file) and (broken := zipfile.ZipFile(file).testzip()):  # PyTorch does not check it
                raise ValueError(f"the checksum of {broken} is wrong")
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
    except _ERRORS_OF_TORCH as error:
        first_line = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is damaged, or holds pickled objects other than tensors, which are not read: {first_line}"
        ) from error
    for name in _STATE_DICTS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    is_state_dict = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not is_state_dict or not all(isinstance(x, torch.Tensor) for x in found.values()):
        raise ValueError(f"{path} must hold a state dict, tensors by name, got {found!r:.80}")
    return {name: (x.float() if x.is_floating_point() else x).numpy() for name, x in found.items()}


def read_weights(network: Published, path: epath.PathLike) -> tuple[Tensors, str]:
    """Reads the weights of a network from a .pth, .safetensors or .npz file.

    Returns:
      the tensors, float32, and the SHA-256 of their names, shapes and values, which does not depend on the format.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, of an unknown format, needs PyTorch, or holds another network.
    """
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
    if metadata.get("format") == _CONVERTED and metadata.get("sha256") != sha256:
        raise ValueError(f"{path} is damaged: its tensors have the SHA-256 {sha256}, not {metadata.get('sha256')}")
    return tensors, sha256


def convert_weights(network: Published, source: epath.PathLike, path: epath.PathLike) -> None:
    """Writes the weights of a network as safetensors, where PyTorch is no longer needed.

    The metadata name the network, the source and the SHA-256 of both.

    Args:
      network: whose weights they are.
      source: as `path` of `read_weights`.
      path: the new file. Its folder is made.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: as `read_weights`.
    """
    tensors, sha256 = read_weights(network, source)
    metadata = {
        "format": _CONVERTED,
        "network": network.name,
        "source": epath.Path(source).name,
        "source_sha256": file_sha256(epath.Path(source)),
        "sha256": sha256,
    }
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}  # safetensors writes a view's base
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.numpy.save(contiguous, metadata=metadata))
