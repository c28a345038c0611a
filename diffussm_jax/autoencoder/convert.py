"""Conversion of `AutoencoderKL` from and to diffusers: `config.json` and `diffusion_pytorch_model.safetensors`.

`decoder.up_blocks.0.resnets.1.norm1.weight` is named `decoder/up_blocks_0/resnets_1/norm1/scale` here. Kernels are
transposed: convolutions from [out, in, height, width] to [height, width, in, out], linear layers from [out, in] to
[in, out]. Pickle files (.bin, .pt, .ckpt) are not read, because reading a pickle can run code.
"""

import functools
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from diffussm_jax.autoencoder.kl import DTYPES, AutoencoderKL
from diffussm_jax.io import check_same_shapes, path_of, read_safetensors, shapes_by_path, weights_hash

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"

_CLASS_NAME = "AutoencoderKL"
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# The defaults of diffusers for missing keys.
_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
# The values that kl.py supports. The first is written.
_SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0),
    "latents_mean": (None,),
    "latents_std": (None,),
}
_IGNORED = ("sample_size", "force_upcast")  # the tile size and the dtype policy of diffusers
# A config may claim any size, and JAX would trace a network of any depth.
_MAX_LEVELS, _MAX_COUNT = 16, 1 << 16
_MIN_TENSORS_OF_BLOCK = 8  # two convolutions and two norms
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_diffusers(path: epath.PathLike, *, dtype: str = "float32") -> tuple[AutoencoderKL, dict[str, Any]]:
    """Reads an `AutoencoderKL` that diffusers saved.

    Args:
      path: a directory with `config.json` and `diffusion_pytorch_model.safetensors`, or a pipeline's directory with
        them in its folder `vae`. If the directory does not exist, the name of a repository of the Hugging Face hub,
        such as "stabilityai/sd-vae-ft-ema".
      dtype: "float32" or "bfloat16", the model's compute dtype.

    Returns:
      The model and its parameters. Parameters are float32; the file may hold float32, float16 or bfloat16.

    Raises:
      FileNotFoundError: the directory or repository does not exist, or lacks one of the two files.
      ValueError: a file is damaged, `AutoencoderKL` does not support the config, or the tensors do not match it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    directory = _find(path)
    model = AutoencoderKL(**_read_config(directory / CONFIG), dtype=jnp.dtype(dtype))
    tensors = _rename_attention(read_safetensors(directory / WEIGHTS)[0])
    _check_depth(model, len(tensors), directory)
    try:
        shapes = _param_shapes(model)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error
    check_same_shapes(
        {_diffusers_name(p): _diffusers_shape(leaf.shape) for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)},
        {name: tensor.shape for name, tensor in tensors.items()},
        f"{directory / WEIGHTS} does not hold the tensors of the model in {CONFIG}",
    )

    def to_param(path, _):
        tensor = tensors[_diffusers_name(path)]
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim)
        return jnp.asarray(tensor.astype(np.float32).transpose(axes))

    return model, jax.tree_util.tree_map_with_path(to_param, shapes)


def to_diffusers(model: AutoencoderKL, params: Any, path: epath.PathLike, *, sample_size: int = 512) -> None:
    """Writes a directory that diffusers' `AutoencoderKL.from_pretrained` and `from_diffusers` can read.

    Both files are written to a temporary directory and then moved, `config.json` last, so that no file is incomplete.

    Args:
      params: written as float32.
      path: the directory; created if missing, files are replaced.
      sample_size: pixels; the tile size of diffusers.

    Raises:
      ValueError: the parameters do not match the model.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    check_same_shapes(
        shapes_by_path(_param_shapes(model)), shapes_by_path(params), "these are not the model's parameters"
    )
    tensors = {}
    for leaf_path, leaf in leaves:
        array = np.asarray(leaf, np.float32)
        array = array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim))
        tensors[_diffusers_name(leaf_path)] = np.ascontiguousarray(array)  # safetensors writes a view's base array
    num_levels = len(model.block_out_channels)
    config = {
        "_class_name": _CLASS_NAME,
        **{key: getattr(model, key) for key in _DEFAULTS},
        **{key: [block_type] * num_levels for key, block_type in _BLOCK_TYPES.items()},
        **{key: values[0] for key, values in _SUPPORTED.items()},
        "sample_size": sample_size,
        "force_upcast": True,
    }
    path = epath.Path(path)
    staging = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    try:
        (staging / WEIGHTS).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        path.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            (staging / name).replace(path / name)
    finally:
        staging.rmtree()


def encoder_hash(params: Any) -> str:
    """`weights_hash` of the encoder of an AutoencoderKL. Further training of the decoder does not change it."""
    return weights_hash({name: params[name] for name in ("encoder", "quant_conv") if name in params})


def _find(path: epath.PathLike) -> epath.Path:
    """The directory of the two files, downloaded if necessary."""
    directory = epath.Path(path)
    if not directory.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
            raise FileNotFoundError(f"there is no directory {path}")
        directory = epath.Path(_download(str(path)))
    if (directory / "model_index.json").exists():
        directory = directory / "vae"
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).exists():
            found = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else "no such directory"
            raise FileNotFoundError(
                f"{directory} holds no {name}, only {found}. Weights are read from safetensors only, never from "
                "pickles such as .bin, .pt or .ckpt; diffusers' save_pretrained(…, safe_serialization=True) writes them"
            )
    return directory


def _download(repository: str) -> str:
    """Downloads the two files of a repository of the Hugging Face hub."""
    remedy = f"or download {CONFIG} and {WEIGHTS} of {repository} and pass the directory that holds them"
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"there is no directory {repository}, and the Hugging Face hub needs a package that is not installed: "
            f"`pip install diffussm_jax[hub]`, {remedy}"
        ) from error
    files = ["model_index.json", *(folder + name for folder in ("", "vae/") for name in (CONFIG, WEIGHTS))]
    try:
        return huggingface_hub.snapshot_download(repository, allow_patterns=files)
    except Exception as error:  # the types change with the client's version
        raise FileNotFoundError(
            f"there is no directory {repository}, and the download of that repository from the Hugging Face hub failed "
            f"({type(error).__name__}: {error}). Check the name and the connection, {remedy}"
        ) from error


def _read_config(file: epath.Path) -> dict[str, Any]:
    """Reads the arguments of `AutoencoderKL`, except dtype."""
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # from JSON or UTF-8
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {config!r:.80}")

    def check(key, is_fine, supported):
        if not is_fine:
            raise ValueError(f"{file}: {key} is {config.get(key)!r:.200}; supported is {supported}")

    check("_class_name", config.get("_class_name") == _CLASS_NAME, repr(_CLASS_NAME))
    fields = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    for key, value in fields.items():
        check(key, *_field_rule(key, value))
    num_levels = len(fields["block_out_channels"])
    for key, block_type in _BLOCK_TYPES.items():
        block_types = [block_type] * num_levels
        check(key, config.get(key, [block_type]) == block_types, f"{block_types}, one for each of block_out_channels")
    for key, values in _SUPPORTED.items():
        check(key, key not in config or config[key] in values, " or ".join(map(repr, values)))
    known = {*fields, *_BLOCK_TYPES, *_SUPPORTED, *_IGNORED}
    for key, value in config.items():
        is_fine = key in known or key.startswith("_") or value is None
        check(key, is_fine, f"nothing of that name, only {sorted(known)}")
    return fields | {"block_out_channels": tuple(fields["block_out_channels"])}


def _field_rule(key: str, value: Any) -> tuple[bool, str]:
    """Whether a value is valid for a field, and the allowed values."""

    def is_count(x):
        return type(x) is int and 0 < x <= _MAX_COUNT

    if key == "block_out_channels":
        is_fine = isinstance(value, list | tuple) and 0 < len(value) <= _MAX_LEVELS and all(map(is_count, value))
        return is_fine, f"a list of counts, at most {_MAX_LEVELS}, each at most {_MAX_COUNT:,}"
    if key == "scaling_factor":
        return type(value) in (int, float) and 0 < value < 1e38, "a positive number"
    if isinstance(_DEFAULTS[key], bool):
        return isinstance(value, bool), "true or false"
    return is_count(value), f"a positive whole number, at most {_MAX_COUNT:,}"


def _check_depth(model: AutoencoderKL, num_tensors: int, directory: epath.Path) -> None:
    """Checks that a model is not much deeper than its weights. Small differences are listed by name later."""
    num_levels = len(model.block_out_channels)
    num_blocks = num_levels * (2 * model.layers_per_block + 1) + 4  # two in each middle
    if _MIN_TENSORS_OF_BLOCK * num_blocks > 2 * num_tensors:
        raise ValueError(
            f"{directory / CONFIG}: layers_per_block is {model.layers_per_block} with {num_levels} levels, which takes "
            f"{_MIN_TENSORS_OF_BLOCK * num_blocks:,} tensors and more; {WEIGHTS} holds {num_tensors}"
        )


def _rename_attention(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames attention to the names since diffusers 0.17, and reshapes its weights from 1x1 convs to matrices."""

    def new_name(match):
        return match[1] + _OLD_ATTENTION[match[2]]

    renamed = {}
    for name, tensor in tensors.items():
        new = re.sub(rf"(\.attentions\.\d+\.)({'|'.join(_OLD_ATTENTION)})(?=\.)", new_name, name)
        if new != name and new in tensors:  # both exist: keep the old name, to be reported as unexpected
            new = name
        if re.search(r"\.attentions\.\d+\.to_\w+(\.0)?\.weight$", new) and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        renamed[new] = tensor
    return renamed


@functools.lru_cache(maxsize=8)
def _param_shapes(model: AutoencoderKL) -> Any:
    images = jax.ShapeDtypeStruct((1, model.downsampling, model.downsampling, model.in_channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def _diffusers_name(path: Iterable[Any]) -> str:
    """encoder/down_blocks_0/resnets_1/norm1/scale -> encoder.down_blocks.0.resnets.1.norm1.weight."""
    *modules, leaf = path_of(path).split("/")
    return ".".join([*(re.sub(r"_(\d+)$", r".\1", m) for m in modules), "bias" if leaf == "bias" else "weight"])


def _diffusers_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return {4: (*shape[:1:-1], *shape[:2]), 2: shape[::-1]}.get(len(shape), shape)
