"""Parameters of `UNet` from and to state dicts of PyTorch: those of guided-diffusion, latent diffusion and diffusers.

Here blocks are named by level, `down_1/block_0`. guided-diffusion and latent diffusion number all blocks on the way
(`input_blocks.4.0`), diffusers those of a level (`down_blocks.1.resnets.0`). Kernels are transposed, convolutions from
[out, in, height, width] to [height, width, in, out]; 1 x 1 convolutions are linear layers here. q, k and v are one
layer, as in guided-diffusion. No number is rounded, either way.

A state dict shows neither the heads nor the order of q, k and v, nor the size of the image: they are the caller's.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diffussm_jax.io import check_same_shapes, path_of, shapes_by_path
from diffussm_jax.models.backbone import class_labels
from diffussm_jax.models.unet import UNet

LAYOUTS = ("guided_diffusion", "diffusers")  # latent diffusion has the names of the first

# Our module -> its name in guided-diffusion and in diffusers. q, k and v are three modules in diffusers.
_ENDS = {
    "time_hidden": ("time_embed.0", "time_embedding.linear_1"),
    "time_out": ("time_embed.2", "time_embedding.linear_2"),
    "label_embed/table": ("label_emb", "class_embedding"),
    "conv_in": ("input_blocks.0.0", "conv_in"),
    "norm_out": ("out.0", "conv_norm_out"),
    "conv_out": ("out.2", "conv_out"),
}
_RESIDUAL = {
    "norm1": ("in_layers.0", "norm1"),
    "conv1": ("in_layers.2", "conv1"),
    "modulation": ("emb_layers.1", "time_emb_proj"),
    "norm2": ("out_layers.0", "norm2"),
    "conv2": ("out_layers.3", "conv2"),
    "shortcut": ("skip_connection", "conv_shortcut"),
}
_ATTENTION = {"norm": ("norm", "group_norm"), "qkv": ("qkv", "to_q to_k to_v"), "proj_out": ("proj_out", "to_out.0")}
_TRANSFORMER = {"to_out": "to_out.0", "ff_in": "ff.net.0.proj", "ff_out": "ff.net.2"}  # others are named alike

_LDM_PREFIX, _LDM_LABELS = "model.diffusion_model.", "cond_stage_model.embedding"


class _Structure(NamedTuple):
    """What decides on the names of modules."""

    is_diffusers: bool
    num_levels: int
    num_blocks: int
    has_transformer: bool
    attended: tuple[int, ...]  # levels with attention

    def block(self, stage: str, block: str) -> str:
        """The name of our block, "down_1", "block_0"."""
        kind, _, number = block.partition("_")
        i = int(number) if number else self.num_blocks
        if stage == "middle":
            if self.is_diffusers:
                return f"mid_block.{'resnets' if kind == 'block' else 'attentions'}.{i}"
            return f"middle_block.{1 if kind == 'attention' else 2 * i}"
        way, level = stage.split("_")
        blocks, first = {"down": ("input_blocks", 1), "up": ("output_blocks", 0)}[way]
        turn = int(level) if way == "down" else self.num_levels - 1 - int(level)
        if self.is_diffusers:
            part = {"block": "resnets", "attention": "attentions"}.get(kind, f"{kind}rs")
            return f"{way}_blocks.{turn}.{part}.{i if number else 0}"
        place = {"block": 0, "attention": 1, "downsample": 0, "upsample": 1 + (int(level) in self.attended)}[kind]
        return f"{blocks}.{first + turn * (self.num_blocks + 1) + i}.{place}"

    def modules(self, module: str) -> list[str]:
        """The names of our module, "down_1/block_0/conv1": in diffusers three for q, k, v, and none for label tokens.

        Raises:
          KeyError, ValueError: there is no such module.
        """
        if module == "label_embed/table" and self.has_transformer:
            return [] if self.is_diffusers else [_LDM_LABELS]
        if module in _ENDS:
            return [_ENDS[module][self.is_diffusers]]
        stage, block, *inner = module.split("/")
        name = self.block(stage, block)
        if not inner:
            return [f"{name}.{'op' if block == 'downsample' and not self.is_diffusers else 'conv'}"]
        if block.startswith("attention") and self.has_transformer:
            part = ".".join(_TRANSFORMER.get(part, part) for part in inner)
            return [f"{name}.{re.sub(r'^block_', 'transformer_blocks.', part)}"]
        table = _ATTENTION if block.startswith("attention") else _RESIDUAL
        return [f"{name}.{part}" for part in table["/".join(inner)][self.is_diffusers].split()]

    def names(self, path: str) -> list[str]:
        """The names of the tensors of our parameter, "down_1/block_0/conv1/kernel"."""
        module, _, leaf = path.rpartition("/")
        return [f"{name}.{'bias' if leaf == 'bias' else 'weight'}" for name in self.modules(module)]

    def ones(self, path: str) -> int:
        """How many further dimensions of 1 the tensor has, since the linear layer is a convolution in PyTorch."""
        *parents, module = path.split("/")[:-1]
        is_attention = any(parent.startswith("attention") for parent in parents)
        if module == "shortcut" or (is_attention and self.has_transformer and module in ("proj_in", "proj_out")):
            return 2
        return int(is_attention and not self.has_transformer and not self.is_diffusers)


def _in_unet(names: Iterable[str]) -> dict[str, str]:
    """The names of the U-Net's tensors, by their names without the prefix; with those of latent diffusion's labels."""
    names = list(names)
    if not any(name.startswith(_LDM_PREFIX) for name in names):
        return {name: name for name in names}
    kept = [name for name in names if name.startswith((_LDM_PREFIX, f"{_LDM_LABELS}."))]
    return {name.removeprefix(_LDM_PREFIX): name for name in kept}


def is_unet(names: Iterable[str]) -> bool:
    """Whether these are names of a layout that `from_pytorch` reads."""
    found = _in_unet(names).keys()
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= found or {
        "time_embedding.linear_1.weight",
        "conv_in.weight",
        "conv_out.weight",
    } <= found


def from_pytorch(state_dict: Mapping[str, np.ndarray], *, has_null_label: bool = False) -> dict[str, Any]:
    """The parameters of a U-Net from the state dict of guided-diffusion, latent diffusion or diffusers' `UNet2DModel`.

    Of a whole checkpoint of latent diffusion, the tensors of the U-Net and of the class labels are read. diffusers'
    models must have downsample_padding = 1, and sines and cosines of the time in its default order.

    Args:
      state_dict: NumPy arrays by name, float32 or of a dtype that float32 can hold.
      has_null_label: whether the last row of the table of labels stands for no label. If not, a row of zeros is added,
        which does not change the embedding of the time. Latent diffusion's tokens always have it.

    Returns:
      The tree of float32 NumPy arrays of `UNet` with the state dict's width, channel_mult and so on. qkv_order is the
      caller's in guided-diffusion's layout, and "new" in diffusers'.

    Raises:
      ValueError: names or shapes are not those of a layout.
    """
    if not is_unet(state_dict):
        raise ValueError(f"this is no known layout of a U-Net; names start with {sorted(state_dict)[:5]}")
    tensors = {name: np.asarray(state_dict[full], np.float32) for name, full in _in_unet(state_dict).items()}
    structure, shapes = _check({name: tensor.shape for name, tensor in tensors.items()}, has_null_label)
    tree: dict[str, Any] = {}
    for path, shape in shapes.items():
        array = np.concatenate([tensors[name] for name in structure.names(path)])
        if path.endswith("/embedding"):
            array = np.concatenate([array, np.zeros((shape[0] - len(array), shape[1]), np.float32)])
        elif path.endswith("/kernel"):
            array = array.transpose(2, 3, 1, 0) if len(shape) == 4 else array.reshape(array.shape[:2]).T
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = np.ascontiguousarray(array)
    return tree


def to_pytorch(
    params: Mapping[str, Any], *, layout: str = "guided_diffusion", has_null_label: bool = False
) -> dict[str, np.ndarray]:
    """The state dict of a U-Net's parameters, as float32 NumPy arrays.

    Args:
      params: of a `UNet`.
      layout: "guided_diffusion", whose names latent diffusion has too; or "diffusers", of a model with qkv_order =
        "new".
      has_null_label: whether the table of labels gets the row of the null label.

    Raises:
      ValueError: the layout is unknown, or has no place for these parameters; or a null label that is not zero would
        be left out.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    arrays = {path_of(path): np.asarray(leaf, np.float32) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    structure = _structure_of_params(arrays, layout == "diffusers")
    tensors: dict[str, np.ndarray] = {}
    for path, array in arrays.items():
        try:
            names = structure.names(path)
        except (KeyError, ValueError):
            names = []
        if not names:
            raise ValueError(f"the layout {layout!r} has no place for {path} {array.shape}")
        if path == "label_embed/table/embedding" and not (has_null_label or names[0].startswith(_LDM_LABELS)):
            if array[-1].any():
                raise ValueError("the row of the null label is not zero, and has_null_label is False: it would be lost")
            array = array[:-1]
        elif path.endswith("/kernel"):
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
            array = array.reshape(*array.shape, *(1,) * structure.ones(path))
        parts = np.split(array, len(names))
        tensors |= {name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}
    _check({name: tensor.shape for name, tensor in tensors.items()}, has_null_label)
    if f"{_LDM_LABELS}.weight" not in tensors:
        return tensors
    return {name if name.startswith(_LDM_LABELS) else _LDM_PREFIX + name: t for name, t in tensors.items()}


def _structure_of_params(paths: Iterable[str], is_diffusers: bool) -> _Structure:
    paths = list(paths)
    attended = _numbers(r"down_(\d+)/attention_0/", paths)
    return _Structure(
        is_diffusers,
        num_levels=len(_numbers(r"down_(\d+)/", paths)),
        num_blocks=len(_numbers(r"down_0/block_(\d+)/", paths)),
        has_transformer=any("/attn2/" in path for path in paths),
        attended=tuple(attended),
    )


def _structure_of_tensors(names: Iterable[str]) -> _Structure:
    names, is_diffusers = list(names), "conv_in.weight" in names
    if is_diffusers:
        num_levels = len(_numbers(r"down_blocks\.(\d+)\.", names))
        num_blocks = len(_numbers(r"down_blocks\.0\.resnets\.(\d+)\.", names))
    else:
        num_outputs = len(_numbers(r"output_blocks\.(\d+)\.", names))
        upsampled = _numbers(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers)\.", names)  # the last block of each level
        num_blocks = max(upsampled[0] if upsampled else num_outputs - 1, 1)
        num_levels = num_outputs // (num_blocks + 1)
    has_transformer = any(".transformer_blocks." in name for name in names)
    found = _Structure(is_diffusers, max(num_levels, 1), max(num_blocks, 1), has_transformer, ())
    of_levels = {found.block(f"down_{level}", "attention_0"): level for level in range(found.num_levels)}
    attended = (level for prefix, level in of_levels.items() if any(name.startswith(f"{prefix}.") for name in names))
    return found._replace(attended=tuple(attended))


def _numbers(pattern: str, names: Iterable[str]) -> list[int]:
    """The different numbers at the start of names, in order."""
    return sorted({int(match[1]) for name in names if (match := re.match(pattern, name))})


def _check(found: Mapping[str, tuple[int, ...]], has_null_label: bool) -> tuple[_Structure, dict[str, tuple[int, ...]]]:
    """The structure of a state dict, and the shapes of our parameters; ValueError if it lacks some or has others."""
    structure = _structure_of_tensors(found)
    shapes = _param_shapes(structure, found, has_null_label)
    expected = {}
    for path, shape in shapes.items():
        names = structure.names(path)
        if path.endswith("/embedding"):
            shape = (shape[0] - (not has_null_label and not names[0].startswith(_LDM_LABELS)), shape[1])
        elif path.endswith("/kernel"):
            shape = (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else (*shape[::-1], *(1,) * structure.ones(path))
        expected |= {name: (shape[0] // len(names), *shape[1:]) for name in names}
    check_same_shapes(expected, dict(found), "the state dict does not hold the tensors of a U-Net")
    return structure, shapes


def _param_shapes(
    structure: _Structure, found: Mapping[str, tuple[int, ...]], has_null_label: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of the model that a state dict is of."""

    def tensor(module: str) -> tuple[int, ...] | None:
        return next((found[name] for name in structure.names(f"{module}/kernel") if name in found), None)

    def size(module: str, axis: int = 0) -> int:  # 1 where a tensor is missing, which is reported later
        return (*(tensor(module) or ()), 1, 1)[axis]

    width, height = size("time_hidden", 1), 2**structure.num_levels
    features = [size(f"down_{level}/block_0/conv2") for level in range(structure.num_levels)]
    blocks = {int(match[1]) for name in found if (match := re.search(r"\.transformer_blocks\.(\d+)\.", name))}
    token_width = next((shape[-1] for name, shape in found.items() if name.endswith("attn2.to_k.weight")), 0)
    has_labels, has_null_row = tensor("label_embed/table") is not None, has_null_label or bool(token_width)
    labels = class_labels(max(size("label_embed/table") - has_null_row, 1), token_width=token_width)
    model = UNet(
        width=width,
        # Half a channel more keeps the product's whole part where the quotient is rounded down.
        channel_mult=tuple(C // width if C % width == 0 else (C + 0.5) / width for C in features),
        num_res_blocks=structure.num_blocks,
        attention_resolutions=tuple(height >> level for level in structure.attended),
        has_middle_attention=any(name.startswith(structure.block("middle", "attention_0") + ".") for name in found),
        num_heads=1,
        transformer_depth=max(len(blocks), 1),
        use_scale_shift_norm=size("middle/block_0/modulation") == 2 * features[-1],
        resblock_updown=tensor("down_0/downsample/conv1") is not None,
        conditioners=labels if has_labels or token_width else {},
        num_outputs=1,
        parent=None,  # `UNet.from_pytorch` calls this, and would be the parent
    )
    shapes = shapes_by_path(model.abstract_params((height, height, size("conv_in", 1))))
    # Conditions can add channels to the inputs.
    shapes["conv_out/kernel"] = (*shapes["conv_out/kernel"][:3], size("conv_out"))
    shapes["conv_out/bias"] = (size("conv_out"),)
    if not has_labels:  # tokens come from elsewhere
        shapes.pop("label_embed/table/embedding", None)
    return shapes
