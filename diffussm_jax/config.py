"""Configs: the keys of a run, their defaults, and how a config file or a saved config is read.

A file in `configs/` starts from `default_config()` or `paper_config()` and sets values. The command line overrides any
of them, `--config.model.depth=2`.

Some keys choose a component of the registry, such as `model.name`, `diffusion.schedule` or `sampling.sampler`. The
options of the chosen component are further keys of the same group. To choose another one use `choose`, or give the
key on the command line, `--config.sampling.sampler=heun`.
"""

import copy
import dataclasses
import importlib
import importlib.util
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from etils import epath
from ml_collections import ConfigDict

from diffussm_jax import migrations, registry
from diffussm_jax.models import DIFFUSSM_SIZES
from diffussm_jax.options import CHANGEABLE_ON_RESUME, Choices, Range, check_names, flatten, options_of
from diffussm_jax.training.checkpoint import EVAL_LOSS
from diffussm_jax.training.optimizer import DECAYS

# Channels that classifier-free guidance acts on, by the values of config.sampling.guided_channels.
GUIDED_CHANNELS = {"all": None, "first_three": 3}
FROM_DATA = -1  # in place of a number of config.data: found in the data when training starts (`data_config`)
AUTO_SPLIT = "auto"  # likewise in place of a split
MAX_SEED = 2**32 - 1  # JAX's keys are made of 32 bits unless it computes with 64


@dataclasses.dataclass
class General:
    """Keys of the config itself."""

    seed: Annotated[int, Range(0, MAX_SEED)] = 0
    init_from: str = ""  # initial weights (`finetune`): the WORKDIR[:STEP] of another run, or an export; "": fresh
    batch_size: Annotated[int, Range(1)] = 256  # global, over all devices
    num_steps: Annotated[int, Range(1)] = 400_000
    log_every: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = 100
    eval_every: Annotated[int, Range(0), CHANGEABLE_ON_RESUME] = 5_000  # the EMA weights' held-out loss; 0: never
    sample_every: Annotated[int, Range(0), CHANGEABLE_ON_RESUME] = 5_000  # a grid of samples; 0: never
    checkpoint_every: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = 5_000  # the newest two and the best are kept
    keep_every: Annotated[int, Range(0), CHANGEABLE_ON_RESUME] = 0  # checkpoints of its multiples are kept; 0: none
    posthoc_ema_every: Annotated[int, Range(0)] = 0  # averages are stored for post-hoc EMA; 0: never
    best_metric: Annotated[str, CHANGEABLE_ON_RESUME] = EVAL_LOSS.metric  # by which the best checkpoint is kept
    best_mode: Annotated[str, Choices(("min", "max")), CHANGEABLE_ON_RESUME] = EVAL_LOSS.mode
    imports: Annotated[tuple, CHANGEABLE_ON_RESUME] = ()  # modules that register more components


@dataclasses.dataclass
class Data:
    """Keys of `config.data`."""

    source: str = "digits"
    path: Annotated[str, CHANGEABLE_ON_RESUME] = ""  # of "images" (see data.sources.open_source) and "latents"
    split: str = "train"
    eval_split: Annotated[str, CHANGEABLE_ON_RESUME] = "eval"  # held out; "": none
    holdout: Annotated[float, Range(0, 0.5)] = 0.0  # fraction of `split` that is held out, by a hash of the keys
    image_size: Annotated[int, Range(1)] = 8  # pixels
    num_channels: Annotated[int, Range(1)] = 1  # of what the model sees: pixels or latents
    num_classes: Annotated[int, Range(0, 2**31 - 2)] = 10  # 0: unconditional
    random_crop: bool = False  # crops of pixels are placed and scaled at random, as ADM's; else at the centre
    random_flip: bool = False  # mirrors half of the images (latents: always)
    num_threads: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = 4  # that read ahead, a batch each
    verify: Annotated[bool, CHANGEABLE_ON_RESUME] = False  # compares latents with their checksums at the start
    # Of the autoencoder of latents; a data set's card must agree.
    downsampling: Annotated[int, Range(1)] = 1  # pixels per latent position
    scaling_factor: Annotated[float, Range(1e-6, 1e6)] = 1.0
    vae: Annotated[str, CHANGEABLE_ON_RESUME] = ""  # a diffusers folder or repository, to decode samples


@dataclasses.dataclass
class Diffusion:
    """Keys of `config.diffusion`."""

    schedule: str = "linear"  # the forward process
    target: str = "noise"  # what the model predicts
    has_learned_variance: bool = True  # the model returns 2C channels
    clip_x_0: bool = False  # in sampling; True for pixels, False for latents


@dataclasses.dataclass
class Optimizer:
    """Keys of `config.optimizer`."""

    learning_rate: Annotated[float, Range(0)] = 1e-4
    warmup_steps: Annotated[int, Range(0)] = 0
    decay: Annotated[str, Choices(DECAYS)] = "constant"  # "cosine": to zero at num_steps
    weight_decay: Annotated[float, Range(0)] = 0.0
    max_grad_norm: Annotated[float, Range(0)] = 0.0  # 0: no clipping
    ema_decay: Annotated[float, Range(0, 1)] = 0.9999
    has_ema_warmup: bool = False  # decay of at most (1 + step) / (10 + step)
    accumulation_steps: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = 1  # microbatches, to save memory
    max_skipped_steps: Annotated[int, Range(0), CHANGEABLE_ON_RESUME] = 10  # in a row, for a loss that is not finite


@dataclasses.dataclass
class Sampling:
    """Keys of `config.sampling`."""

    sampler: str = "ddpm"
    num_steps: Annotated[int, Range(1, 100_000)] = 250
    guidance_scale: Annotated[float, Range(0)] = 1.0  # 1: none
    guided_channels: Annotated[str, Choices(GUIDED_CHANNELS)] = "all"
    guidance_interval: tuple = (0.0, math.inf)  # in t
    num_grid_rows: Annotated[int, Range(1)] = 8  # of the grid that training draws


@dataclasses.dataclass
class Mesh:
    """Keys of `config.mesh`: devices along each axis; -1: as many as the others leave."""

    data: int = -1  # copies of the model, each with its part of the batch
    fsdp: int = 1  # the batch, and parameters and optimizer state too
    tensor: int = 1  # the width


GROUPS = {"data": Data, "diffusion": Diffusion, "optimizer": Optimizer, "sampling": Sampling, "mesh": Mesh}
# Keys that choose a component whose options stand beside them, and its kind.
_FLAT_CHOICES = {
    "diffusion.schedule": "process",
    "diffusion.target": "target",
    "sampling.sampler": "sampler",
    "data.source": "source",
}
# Groups {"name", **options}; below the last two any number of them, under any key.
_NAMED_GROUPS = {"task": "task", "model": "model", "conditioners.": "conditioner", "hooks.": "hook"}


def default_config() -> ConfigDict:
    """Every key of a run, with its default."""
    config = ConfigDict({name: option.default for name, option in options_of(General).items()})
    config.task = registry.group("task", "diffusion")
    config.model = registry.group("model", "diffussm")
    config.conditioners = ConfigDict({"label": registry.group("conditioner", "label")})
    config.hooks = ConfigDict()
    for name, keys in GROUPS.items():
        config[name] = ConfigDict({key: option.default for key, option in options_of(keys).items()})
    return complete(config)


def complete(config: ConfigDict) -> ConfigDict:
    """Adds missing keys, those of the chosen components included, with their defaults; returns the same config."""
    for path, keys in {"": General, **GROUPS}.items():
        group = config[path] if path else config
        for name, option in options_of(keys).items():
            if name not in group:
                group[name] = option.default
    for key, kind, group in chosen(config):
        name = value_at(config, key)
        registry.component(kind, name, key)
        defaults = registry.group(kind, name)
        for option, value in defaults.items():
            if option != "name" and option not in group:
                group[option] = value
    return config


def value_at(config: Mapping, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def chosen(config: ConfigDict) -> list[tuple[str, str, ConfigDict]]:
    """(key that chooses, kind, group that holds the options) of every choice, outer ones first."""
    found = [(key, kind, value_at(config, key.rpartition(".")[0])) for key, kind in _FLAT_CHOICES.items()]
    stack = []
    for prefix, kind in _NAMED_GROUPS.items():
        if prefix.endswith("."):
            stack += [(f"{prefix}{key}", kind, group) for key, group in config[prefix[:-1]].items()]
        else:
            stack.append((prefix, kind, config[prefix]))
    while stack:
        path, kind, group = stack.pop(0)
        found.append((f"{path}.name", kind, group))
        for name, option in registry.options_of(registry.component(kind, group.name, f"{path}.name")).items():
            if option.component:
                if name not in group:
                    group[name] = registry.group(option.component.kind, option.component.default)
                stack.append((f"{path}.{name}", option.component.kind, group[name]))
    return found


def choose(config: ConfigDict, key: str, name: str) -> None:
    """Chooses another component, `choose(config, "sampling.sampler", "heun")`, and replaces the options of the old one.

    Options of the same name keep their values. Groups of conditioners and hooks that do not exist yet are made.

    Raises:
      ValueError: the key chooses nothing, or there is no such component.
    """
    path, _, last = key.rpartition(".")
    if is_choice(key) and key in {found for found, *_ in chosen(config)} and value_at(config, key) == name:
        return
    if key in _FLAT_CHOICES:
        kind, group = _FLAT_CHOICES[key], value_at(config, path)
        old, new = registry.options(kind, group[last]), registry.component(kind, name, key)
        keep = {k: v for k, v in group.items() if k not in old or k in options_of(GROUPS[path])}
        values = {k: group.get(k, option.default) for k, option in options_of(new).items()}
        config[path] = ConfigDict({**keep, **values, last: name})
        return
    kind = _kind_of_group(config, path) if last == "name" else None
    if kind is None:
        check_keys([key], [found for found, *_ in chosen(config)])
    registry.component(kind, name, key)
    parent, _, own = path.rpartition(".")
    parent = value_at(config, parent) if parent else config
    group = registry.group(kind, name)
    old = parent.get(own, ConfigDict())
    for option, value in group.items():
        # Nested components are kept as a whole.
        if option in old and option != "name" and isinstance(value, ConfigDict) == isinstance(old[option], ConfigDict):
            group[option] = old[option]
    parent[own] = group


def _kind_of_group(config: ConfigDict, path: str) -> str | None:
    for prefix, kind in _NAMED_GROUPS.items():
        if path == prefix or (prefix.endswith(".") and path.startswith(prefix) and "." not in path[len(prefix) :]):
            return kind
    kinds = {key.removesuffix(".name"): kind for key, kind, _ in chosen(config) if key.endswith(".name")}
    return kinds.get(path)


def is_choice(key: str) -> bool:
    """Whether a dotted key chooses a component."""
    return key in _FLAT_CHOICES or key.endswith(".name")


def make_choices(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Chooses the components that `changes`, values under dotted keys, name; returns the same config, completed.

    Outer choices come before inner ones, and `imports`, given as a tuple or as text, before both.

    Raises:
      ValueError: there is no such component, or a module cannot be imported.
    """
    if "imports" in changes:
        config.imports = tuple(re.findall(r"[\w.]+", str(changes["imports"])))
        import_modules(config)
    for key in sorted(filter(is_choice, changes), key=lambda key: key.count(".")):
        choose(config, key, changes[key])
    return complete(config)


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with other values, under dotted keys as on the command line; old names of keys work too.

    Raises:
      ValueError: a key is unknown, a value has another type, or as `make_choices`.
    """
    changes = {migrations.today(key): value for key, value in changes.items()}
    config = make_choices(copy.deepcopy(config).unlock(), changes)
    values = {key: value for key, value in changes.items() if key != "imports" and not is_choice(key)}
    check_keys(values, flatten(config))
    for key, value in values.items():
        kind = type(flatten(config)[key])
        try:
            if kind is ConfigDict or isinstance(value, bool) != (kind is bool):
                raise TypeError("a group, or a truth value for a number")
            config.update_from_flattened_dict({key: value})
        except (TypeError, OverflowError) as error:
            raise ValueError(f"config.{key} must be of type {kind.__name__}, got {value!r}") from error
    return config


def sampling_name(config: ConfigDict, seed: int) -> str:
    """The sampler, its steps, the guidance scale and the seed, for the names of files: "ddim50_scale1.5_seed0"."""
    sampling = config.sampling
    return f"{sampling.sampler}{sampling.num_steps}_scale{sampling.guidance_scale:g}_seed{seed}"


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError, with the nearest known key, if one of the dotted keys is not known."""
    check_names((f"config.{key}" for key in keys), [f"config.{key}" for key in known], "key")


def apply_size(config: ConfigDict, size: str) -> None:
    """Sets the model's width and depth to those of a named size; ValueError for another name."""
    if size not in DIFFUSSM_SIZES:
        raise ValueError(f"unknown model size {size!r}; choose one of {', '.join(DIFFUSSM_SIZES)}")
    config.model.update(DIFFUSSM_SIZES[size])


def use_latents(config: ConfigDict, *, vae: str = "stabilityai/sd-vae-ft-ema", holdout: float = 0.002) -> None:
    """Sets the data to latents of the f8, 4-channel autoencoder of latent diffusion, a fraction `holdout` held out."""
    choose(config, "data.source", "latents")
    config.data.update(num_channels=4, downsampling=8, scaling_factor=0.18215, vae=vae, eval_split="", holdout=holdout)


def paper_config(size: str, *, image_size: int, num_classes: int) -> ConfigDict:
    """The paper's training setting on latents (arXiv 2311.18257, section 4.1; where it is silent, as DiT and ADM).

    Args:
      size: "S", "L" or "XL".
      image_size: pixels.
      num_classes: 0 for unconditional.

    Raises:
      ValueError: the size is unknown.
    """
    config = default_config()
    apply_size(config, size)
    config.model.remat = "block"
    config.model.dtype = "bfloat16"
    use_latents(config)
    config.data.update(image_size=image_size, num_classes=num_classes)
    return config


def load_config(file: str) -> ConfigDict:
    """The config of a file of configs/, as --config gives it to the programs: "configs/imagenet256.py:XL".

    This runs the file, which is Python.

    Raises:
      ValueError: there is no such file, or it defines no get_config.
    """
    path, colon, argument = file.partition(":")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or not epath.Path(path).exists():
        raise ValueError(f"there is no config file {path!r}; give a Python file such as configs/digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} defines no get_config()")
    config = module.get_config(argument) if colon else module.get_config()
    import_modules(config)
    migrations.rename(config)
    return complete(config)


def import_modules(config: Mapping) -> None:
    """Imports `config.imports`, which registers further components.

    Raises:
      ValueError: a module cannot be imported.
    """
    for name in config.get("imports", ()):
        try:
            importlib.import_module(name)
        except (ImportError, TypeError, AttributeError, ValueError) as error:  # the last three for what is no name
            raise ValueError(f"config.imports: the module {name!r} cannot be imported: {error}") from error


def to_plain(config: ConfigDict) -> dict:
    """The config as JSON can hold it, with the number of its format; infinity becomes the string "inf"."""

    def plain(value):
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return "inf" if value == math.inf else value

    return migrations.stamp(plain(complete(copy.deepcopy(config)).to_dict()))


def from_plain(values: dict) -> ConfigDict:
    """The config that `to_plain` wrote down, in this version or an older one.

    Raises:
      ValueError: it is damaged, or of a newer version.
    """

    def rich(value):
        if isinstance(value, dict):
            return {k: rich(v) for k, v in value.items()}
        if isinstance(value, list):
            return tuple(math.inf if v == "inf" else rich(v) for v in value)
        return value

    try:
        config = ConfigDict(rich(migrations.migrate(values)))
        import_modules(config)
        config = complete(config)
        for path, keys in {"": General, **GROUPS}.items():
            for name, option in options_of(keys).items():
                key = f"{path}.{name}".lstrip(".")
                option.check(f"config.{key}", value_at(config, key))
    except (AttributeError, KeyError, TypeError) as error:  # a group is missing, or is none
        raise ValueError(f"the config is damaged: {type(error).__name__}: {error}") from error
    return config
