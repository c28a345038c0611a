"""Parameters of `DiT` from and to the published state dicts of PyTorch (`DiT-XL-2-256x256.pt`).

`blocks.7.attn.qkv.weight` [3 D, D] is number 7 of `blocks/self_attention/qkv/kernel` [depth, D, 3, D] here: kernels are
transposed, blocks are stacked, and dimensions that PyTorch flattens stand apart. Patches have their channels last in
both, but PyTorch's convolution kernel [D, C, P, P] has them first. No number is rounded, either way.

The layout holds neither the number of heads nor the size of the latent: both are the caller's to know. `pos_embed` is
the fixed table of `layers.sincos_2d`. It is no parameter here: it is compared, left out, and made again.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from diffussm_jax.io import check_same_shapes, path_of
from diffussm_jax.layers import NUM_TIME_FEATURES, sincos_2d

NUM_MODULATIONS = 3  # shift, scale and gate of a residual branch
# Our module -> PyTorch's. Of a module of the blocks, PyTorch has one for each block, blocks.0.attn.qkv and so on.
_MODULES = {
    "embed": "x_embedder.proj",
    "time_embed/hidden": "t_embedder.mlp.0",
    "time_embed/out": "t_embedder.mlp.2",
    "label_embed/table": "y_embedder.embedding_table",
    "final_norm/modulation": "final_layer.adaLN_modulation.1",
    "final": "final_layer.linear",
}
_BLOCK_MODULES = {
    "blocks/modulation": "adaLN_modulation.1",
    "blocks/self_attention/qkv": "attn.qkv",
    "blocks/self_attention/proj": "attn.proj",
    "blocks/fc1": "mlp.fc1",
    "blocks/fc2": "mlp.fc2",
}
_POSITIONS = "pos_embed"


def is_dit(names: Iterable[str]) -> bool:
    """Whether these are names of the published layout of DiT."""
    return {"x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.adaLN_modulation.1.weight"} <= {*names}


def from_pytorch(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of a DiT from a published state dict.

    Args:
      state_dict: NumPy arrays by name, float32 or of a dtype that float32 can hold.

    Returns:
      The tree of float32 NumPy arrays of `DiT` with conditioning = "adaln_zero", label conditions, and the state dict's
      width, depth, patch_size, mlp_ratio and numbers of channels and classes.

    Raises:
      ValueError: names or shapes are not those of the layout, or `pos_embed` is not the fixed table.
    """
    if not is_dit(state_dict):
        raise ValueError(f"this is not the published layout of DiT; names start with {sorted(state_dict)[:5]}")
    found = {name: tuple(array.shape) for name, array in state_dict.items()}
    D, C, P, *_ = _four(found["x_embedder.proj.weight"])
    blocks = {match[0] for name in found if (match := re.match(r"blocks\.\d+\.", name))}
    shapes = _param_shapes(
        depth=len(blocks),
        width=D,
        patch_size=P,
        num_channels=C,
        num_hidden=_first(found.get("blocks.0.mlp.fc1.weight")),
        num_labels=_first(found.get("y_embedder.embedding_table.weight")),
        num_outputs=_first(found.get("final_layer.linear.weight")) // max(P, 1) ** 2,
    )
    expected = {name: _tensor_shape(path, shape) for path, shape in shapes.items() for name in _names(path, shape)}
    expected[_POSITIONS] = (1, _four(found.get(_POSITIONS))[1], D)
    check_same_shapes(expected, found, "the state dict does not hold the tensors of a DiT")
    _check_positions(np.asarray(state_dict[_POSITIONS]))
    tree: dict[str, Any] = {}
    for path, shape in shapes.items():
        arrays = [_from_tensor(path, state_dict[name]) for name in _names(path, shape)]
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = np.stack(arrays).reshape(shape)
    return tree


def to_pytorch(params: Mapping[str, Any], *, latent_size: tuple[int, int] = (32, 32)) -> dict[str, np.ndarray]:
    """The published state dict of the parameters of a DiT, as float32 NumPy arrays.

    Args:
      params: of a `DiT` with conditioning = "adaln_zero" and label conditions.
      latent_size: (H, W) of the latent, for `pos_embed`.

    Raises:
      ValueError: the parameters are not those of such a model; qk-norm and registers have no place in the layout.
    """
    arrays = {path_of(path): np.asarray(leaf, np.float32) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    found = {path: array.shape for path, array in arrays.items()}
    P, _, C, D = _four(found.get("embed/kernel"))
    expected = _param_shapes(
        depth=_first(found.get("blocks/fc1/bias")),
        width=D,
        patch_size=P,
        num_channels=C,
        num_hidden=_four(found.get("blocks/fc1/bias"))[1],
        num_labels=_first(found.get("label_embed/table/embedding")),
        num_outputs=_four(found.get("final/kernel"))[3],
    )
    check_same_shapes(expected, found, "the published layout of DiT has no place for these parameters")
    H, W = latent_size
    if H % P or W % P:
        raise ValueError(f"latent_size must be a multiple of the patches of {P}, got {latent_size}")
    tensors = {_POSITIONS: sincos_2d(H // P, W // P, D)[None]}
    for path, array in arrays.items():
        names = _names(path, array.shape)
        blocks = array if path.startswith("blocks/") else [array]
        tensors |= {name: _to_tensor(path, block) for name, block in zip(names, blocks, strict=True)}
    return tensors


def _first(shape: tuple[int, ...] | None) -> int:
    return _four(shape)[0]


def _four(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The first four sizes, 0 where there are none: a wrong shape is reported with all others later."""
    return (*(shape or ()), 0, 0, 0, 0)[:4]


def _param_shapes(
    *, depth: int, width: int, patch_size: int, num_channels: int, num_hidden: int, num_labels: int, num_outputs: int
) -> dict[str, tuple[int, ...]]:
    """The shape of each of our parameters by its path."""
    D, P = width, patch_size
    kernels = {
        "embed": (P, P, num_channels, D),
        "time_embed/hidden": (NUM_TIME_FEATURES, D),
        "time_embed/out": (D, D),
        "final_norm/modulation": (D, 2 * D),
        "final": (D, P, P, num_outputs),
        "blocks/modulation": (D, 2 * NUM_MODULATIONS, D),
        "blocks/self_attention/qkv": (D, 3, D),
        "blocks/self_attention/proj": (D, D),
        "blocks/fc1": (D, num_hidden),
        "blocks/fc2": (num_hidden, D),
    }
    shapes: dict[str, tuple[int, ...]] = {"label_embed/table/embedding": (num_labels, D)}
    for module, kernel in kernels.items():
        stack = (depth,) if module in _BLOCK_MODULES else ()
        shapes[f"{module}/kernel"] = (*stack, *kernel)
        shapes[f"{module}/bias"] = (*stack, *(kernel[-1:] if module == "embed" else kernel[1:]))
    return shapes


def _names(path: str, shape: tuple[int, ...]) -> list[str]:
    """PyTorch's names of a parameter; one for each block, if it is one of the blocks."""
    module, _, leaf = path.rpartition("/")
    suffix = "bias" if leaf == "bias" else "weight"
    if module in _MODULES:
        return [f"{_MODULES[module]}.{suffix}"]
    return [f"blocks.{i}.{_BLOCK_MODULES[module]}.{suffix}" for i in range(shape[0])]


def _tensor_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of PyTorch's tensor, or of that of each block."""
    first, *rest = shape[1:] if path.startswith("blocks/") else shape
    if path == "embed/kernel":
        return rest[2], rest[1], first, rest[0]
    if path.endswith("/kernel"):
        return math.prod(rest), first
    return (first, *rest) if path.endswith("/embedding") else (first * math.prod(rest),)


def _from_tensor(path: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor with the dimensions of our parameter in order, those that PyTorch flattens still in one."""
    tensor = np.asarray(tensor).astype(np.float32)
    if path == "embed/kernel":
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T if path.endswith("/kernel") else tensor


def _to_tensor(path: str, array: np.ndarray) -> np.ndarray:
    """The tensor of our parameter, or of that of one block."""
    if path == "embed/kernel":
        array = array.transpose(3, 2, 0, 1)
    elif path.endswith("/kernel"):
        array = array.reshape(len(array), -1).T
    elif path.endswith("/bias"):
        array = array.ravel()
    return np.ascontiguousarray(array)


def _check_positions(table: np.ndarray) -> None:
    """Raises ValueError unless the table [1, J, D] is the fixed one of some grid of J patches."""
    _, J, D = table.shape
    for height in range(1, J + 1):
        if J % height == 0 and np.abs(sincos_2d(height, J // height, D) - table[0]).max() <= 1e-5:
            return
    raise ValueError(f"pos_embed of {J} positions is not the fixed sin-cos table of DiT, which is all that is read")
