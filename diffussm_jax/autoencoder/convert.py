"""Conversion of `AutoencoderKL` and `VQModel` from and to diffusers.

Each is a folder with `config.json` and `diffusion_pytorch_model.safetensors`.
`decoder.up_blocks.0.resnets.1.norm1.weight` is named `decoder/up_blocks_0/resnets_1/norm1/scale` here. Kernels are
transposed: convolutions from [out, in, height, width] to [height, width, in, out], linear layers from [out, in] to
[in, out]. The codebook stays as it is. Pickle files (.bin, .pt, .ckpt) are not read, because reading a pickle can run
code.
"""

import functools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from diffussm_jax.autoencoder.kl import DTYPES, Autoencoder, AutoencoderKL
from diffussm_jax.autoencoder.vq import VQModel
from diffussm_jax.io import check_same_shapes, path_of, read_json, read_safetensors, shapes_by_path, weights_hash

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"

_FOLDERS = ("vae", "vqvae")  # of an autoencoder in a pipeline; a run writes the first
_CODEBOOK = "quantize.embedding.weight"
_STATISTICS = {"mean": "_latents_mean", "std": "_latents_std"}  # diffusers passes over keys that begin with "_"


class _Format(NamedTuple):
    """What the two files of a class hold.

    Attributes:
      model: the class.
      defaults: of diffusers, for missing keys.
      supported: the values that the class supports, of keys that are not its fields. The first is written.
    """

    model: type[Autoencoder]
    defaults: Mapping[str, Any]
    supported: Mapping[str, tuple]


_BLOCK_TYPES = {  # of a level without and with attention
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
_SUPPORTED = {"act_fn": ("silu", "swish"), "mid_block_add_attention": (True,)}
_FORMATS = {
    "AutoencoderKL": _Format(
        AutoencoderKL,
        _DEFAULTS | {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True},
        _SUPPORTED | {"shift_factor": (None, 0), "latents_mean": (None,), "latents_std": (None,)},
    ),
    "VQModel": _Format(
        VQModel,
        _DEFAULTS | {"latent_channels": 3, "num_vq_embeddings": 256},
        # Or vq_embed_dim is latent_channels. lookup_from_codebook is for latents that are indices.
        _SUPPORTED | {"norm_type": ("group",), "vq_embed_dim": (None,), "lookup_from_codebook": (False, True)},
    ),
}
_IGNORED = ("sample_size", "force_upcast")  # the tile size and the dtype policy of diffusers
# A config may claim any size, and JAX would trace a network of any depth.
_MAX_LEVELS, _MAX_COUNT = 16, 1 << 16
_MIN_TENSORS_OF_BLOCK = 8  # two convolutions and two norms
# By the number of dimensions: of convolutions and linear layers.
_KERNEL_AXES_HERE, _KERNEL_AXES_THERE = {4: (2, 3, 1, 0), 2: (1, 0)}, {4: (3, 2, 0, 1), 2: (1, 0)}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_diffusers(path: epath.PathLike, *, dtype: str = "float32") -> tuple[Autoencoder, dict[str, Any]]:
    """Reads an `AutoencoderKL` or a `VQModel` that diffusers or `to_diffusers` saved.

    Args:
      path: a directory with `config.json` and `diffusion_pytorch_model.safetensors`; or a directory with them in its
        folder `vae` or `vqvae`: a pipeline's, or the work directory of a run that trained an autoencoder. If the
        directory does not exist, the name of a repository of the Hugging Face hub, such as
        "stabilityai/sd-vae-ft-ema".
      dtype: "float32" or "bfloat16", the model's compute dtype.

    Returns:
      The model and its parameters. Parameters are float32; the file may hold float32, float16 or bfloat16.

    Raises:
      FileNotFoundError: the directory or repository does not exist, or lacks one of the two files.
      ValueError: a file is damaged, the class does not support the config, or the tensors do not match it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    directory = _find(path)
    model_class, fields = _read_config(directory / CONFIG)
    model = model_class(**fields, dtype=jnp.dtype(dtype))
    tensors = _rename_attention(read_safetensors(directory / WEIGHTS)[0])
    _check_kind(model, tensors, directory)
    try:
        shapes = _param_shapes(model)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error
    check_same_shapes(
        {_diffusers_name(p): _diffusers_shape(p, leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)},
        {name: tensor.shape for name, tensor in tensors.items()},
        f"{directory / WEIGHTS} does not hold the tensors of the model in {CONFIG}",
    )

    def to_param(path, _):
        tensor = tensors[_diffusers_name(path)].astype(np.float32)
        return jnp.asarray(tensor.transpose(_KERNEL_AXES_HERE[tensor.ndim]) if _is_kernel(path) else tensor)

    return model, jax.tree_util.tree_map_with_path(to_param, shapes)


def to_diffusers(
    model: Autoencoder,
    params: Any,
    path: epath.PathLike,
    *,
    sample_size: int = 512,
    statistics: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Writes a directory that `from_pretrained` of diffusers' class of the same name, and `from_diffusers`, can read.

    Both files are written to a temporary directory and then moved, `config.json` last, so that no file is incomplete.

    Args:
      params: written as float32.
      path: the directory; created if missing, files are replaced.
      sample_size: pixels; the tile size of diffusers.
      statistics: "mean" and "std" of unscaled latents, one number for each channel. They are recorded in the config as
        "_latents_mean" and "_latents_std", which no program needs.

    Raises:
      ValueError: the parameters do not match the model, or the statistics its channels.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    check_same_shapes(
        shapes_by_path(_param_shapes(model)), shapes_by_path(params), "these are not the model's parameters"
    )
    tensors = {}
    for leaf_path, leaf in leaves:
        array = np.asarray(leaf, np.float32)
        if _is_kernel(leaf_path):
            array = array.transpose(_KERNEL_AXES_THERE[array.ndim])
        tensors[_diffusers_name(leaf_path)] = np.ascontiguousarray(array)  # safetensors writes a view's base array
    class_name = type(model).__name__
    _, defaults, supported = _FORMATS[class_name]
    config = {
        "_class_name": class_name,
        **{key: getattr(model, key) for key in defaults},
        **_block_types(len(model.block_out_channels), model.attention_levels),
        **{key: values[0] for key, values in supported.items()},
        **(_statistics_keys(statistics, model.latent_channels) if statistics else {}),
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


def _statistics_keys(statistics: Mapping[str, Sequence[float]], num_channels: int) -> dict[str, list[float]]:
    """Statistics of latents as keys of the config."""
    lists = {name: [float(x) for x in values] for name, values in statistics.items()}
    if lists.keys() != _STATISTICS.keys() or not all(
        len(values) == num_channels and np.all(np.isfinite(values)) for values in lists.values()
    ):
        raise ValueError(
            f"statistics must be mean and std, each of {num_channels} finite numbers (latent_channels), got {lists}"
        )
    return {_STATISTICS[name]: values for name, values in lists.items()}


def encoder_hash(params: Any) -> str:
    """`weights_hash` of what makes latents: the encoder and `quant_conv`.

    Further training of the decoder does not change it. Nor does that of a codebook, since latents of a `VQModel` are
    stored before quantization.
    """
    return weights_hash({name: params[name] for name in ("encoder", "quant_conv") if name in params})


def _find(path: epath.PathLike) -> epath.Path:
    """The directory of the two files, downloaded if necessary."""
    directory = epath.Path(path)
    if not directory.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
            raise FileNotFoundError(f"there is no directory {path}")
        directory = epath.Path(_download(str(path)))
    if not (directory / WEIGHTS).exists():
        inner = [directory / name for name in _FOLDERS if (directory / name).is_dir()]
        if inner:
            directory = inner[0]
        elif (directory / CONFIG).exists():
            _check_not_a_run(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).exists():
            found = sorted(file.name for file in directory.iterdir())
            raise FileNotFoundError(
                f"{directory} holds no {name}, only {found}. Weights are read from safetensors only, never from "
                "pickles such as .bin, .pt or .ckpt; diffusers' save_pretrained(…, safe_serialization=True) writes them"
            )
    return directory


def _check_not_a_run(directory: epath.Path) -> None:
    """Raises FileNotFoundError for a run that wrote no autoencoder, with what its config says that it trains."""
    try:
        task = read_json(directory / CONFIG).get("task")
    except ValueError:  # reported later
        return
    if isinstance(task, dict):
        raise FileNotFoundError(
            f"{directory} is the work directory of a run of the task {task.get('name')!r}, without a folder "
            f"{_FOLDERS[0]}. A run of the task 'autoencoder' writes that folder when it is finished"
        )


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
    files = [f"{folder}{name}" for folder in ("", *(f"{f}/" for f in _FOLDERS)) for name in (CONFIG, WEIGHTS)]
    try:
        return huggingface_hub.snapshot_download(repository, allow_patterns=files)
    except Exception as error:  # the types change with the client's version
        raise FileNotFoundError(
            f"there is no directory {repository}, and the download of that repository from the Hugging Face hub failed "
            f"({type(error).__name__}: {error}). Check the name and the connection, {remedy}"
        ) from error


def _read_config(file: epath.Path) -> tuple[type[Autoencoder], dict[str, Any]]:
    """Reads the class and its arguments, except dtype."""
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # from JSON or UTF-8
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {config!r:.80}")

    def check(key, is_fine, supported):
        if not is_fine:
            raise ValueError(f"{file}: {key} is {config.get(key)!r:.200}; supported is {supported}")

    class_name = str(config.get("_class_name"))
    check("_class_name", class_name in _FORMATS, " or ".join(map(repr, _FORMATS)))
    model_class, defaults, supported = _FORMATS[class_name]
    fields = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in fields.items():
        check(key, *_field_rule(key, value))
    attention_levels = _attention_levels(config, len(fields["block_out_channels"]), check)
    for key, values in supported.items():
        values += (fields["latent_channels"],) if key == "vq_embed_dim" else ()
        check(key, key not in config or config[key] in values, " or ".join(map(repr, values)))
    known = {*fields, *_BLOCK_TYPES, *supported, *_IGNORED}
    for key, value in config.items():
        is_fine = key in known or key.startswith("_") or value is None
        check(key, is_fine, f"nothing of that name, only {sorted(known)}")
    sizes = {"block_out_channels": tuple(fields["block_out_channels"]), "attention_levels": attention_levels}
    return model_class, fields | sizes


def _block_types(num_levels: int, attention_levels: Iterable[int]) -> dict[str, list[str]]:
    """The types of blocks of a config, in the order of the encoder and of the decoder."""
    (down, attention_down), (up, attention_up) = _BLOCK_TYPES.values()
    has_attention = [i in attention_levels for i in range(num_levels)]
    return {
        "down_block_types": [attention_down if has else down for has in has_attention],
        "up_block_types": [attention_up if has else up for has in reversed(has_attention)],
    }


def _attention_levels(
    config: Mapping[str, Any], num_levels: int, check: Callable[[str, bool, str], None]
) -> tuple[int, ...]:
    """The levels whose types of blocks have attention, the same in the encoder and the decoder."""
    (down, attention_down), (up, _) = _BLOCK_TYPES.values()
    types = config.get("down_block_types", [down])
    is_fine = isinstance(types, list) and len(types) == num_levels and all(t in (down, attention_down) for t in types)
    check("down_block_types", is_fine, f"{down!r} or {attention_down!r} for each of block_out_channels")
    levels = tuple(i for i, block_type in enumerate(types) if block_type == attention_down)
    expected = _block_types(num_levels, levels)["up_block_types"]
    check("up_block_types", config.get("up_block_types", [up]) == expected, f"{expected}, as of down_block_types")
    return levels


def _field_rule(key: str, value: Any) -> tuple[bool, str]:
    """Whether a value is valid for a field, and the allowed values."""

    def is_count(x):
        return type(x) is int and 0 < x <= _MAX_COUNT

    if key == "block_out_channels":
        is_fine = isinstance(value, list | tuple) and 0 < len(value) <= _MAX_LEVELS and all(map(is_count, value))
        return is_fine, f"a list of counts, at most {_MAX_LEVELS}, each at most {_MAX_COUNT:,}"
    if key == "scaling_factor":
        return type(value) in (int, float) and 0 < value < 1e38, "a positive number"
    if key.startswith("use_"):
        return isinstance(value, bool), "true or false"
    return is_count(value), f"a positive whole number, at most {_MAX_COUNT:,}"


def _check_kind(model: Autoencoder, tensors: Mapping[str, Any], directory: epath.Path) -> None:
    """Checks the class, the factor and roughly the depth. Small differences are listed by name later."""

    def check(is_fine, stated, found):
        if not is_fine:
            raise ValueError(f"{directory / CONFIG}: {stated}; {WEIGHTS} holds {found}")

    class_name, is_vq = type(model).__name__, isinstance(model, VQModel)
    found = "VQModel" if _CODEBOOK in tensors else "AutoencoderKL"
    check(
        is_vq == (_CODEBOOK in tensors),
        f"_class_name is {class_name!r}",
        f"{'a' if _CODEBOOK in tensors else 'no'} codebook {_CODEBOOK}, as of {found!r}",
    )
    num_levels = len(model.block_out_channels)
    num_blocks = num_levels * (2 * model.layers_per_block + 1) + 4  # two in each middle
    num_tensors = _MIN_TENSORS_OF_BLOCK * num_blocks
    check(
        num_tensors <= 2 * len(tensors),
        f"layers_per_block is {model.layers_per_block} with {num_levels} levels, which takes {num_tensors:,} tensors "
        "and more",
        len(tensors),
    )
    levels = {int(m[1]) for m in (re.match(r"encoder\.down_blocks\.(\d{1,9})\.", name) for name in tensors) if m}
    check(
        len(levels) in (0, num_levels),
        f"block_out_channels is {list(model.block_out_channels)}, of downsampling {model.downsampling}",
        f"{len(levels)} levels, of downsampling {2 ** (len(levels) - 1)}",
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
def _param_shapes(model: Autoencoder) -> Any:
    images = jax.ShapeDtypeStruct((1, model.downsampling, model.downsampling, model.in_channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def _diffusers_name(path: Iterable[Any]) -> str:
    """encoder/down_blocks_0/resnets_1/norm1/scale -> encoder.down_blocks.0.resnets.1.norm1.weight."""
    *modules, leaf = path_of(path).split("/")
    last = {"bias": "bias", "embedding": "embedding.weight"}.get(leaf, "weight")
    return ".".join([*(re.sub(r"_(\d+)$", r".\1", m) for m in modules), last])


def _is_kernel(path: Iterable[Any]) -> bool:
    """Whether a parameter is transposed."""
    return path_of(path).endswith("/kernel")


def _diffusers_shape(path: Iterable[Any], leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape[i] for i in _KERNEL_AXES_THERE[leaf.ndim]) if _is_kernel(path) else leaf.shape
