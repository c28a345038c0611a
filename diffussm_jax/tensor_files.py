"""Files of tensors by name: PyTorch's .pt, .pth and .ckpt, .safetensors and .npz.

Nothing that a file holds is executed: PyTorch's files are read by `torch.load(weights_only=True)`, .npz without
pickles, and safetensors cannot hold code.
"""

import pickle
import re
import zipfile

import numpy as np
from etils import epath

from diffussm_jax.io import file_sha256, read_npz, read_safetensors

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
