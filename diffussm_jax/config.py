"""Configs: the keys of a run, their defaults, and how a config file or a saved config is read.

A file in `configs/` starts from `default_config()` or `paper_config()` and sets values. The command line overrides any
of them, `--config.model.depth=2`.

Some keys choose a component of the registry, such as `model.name`, `diffusion.schedule` or `sampling.sampler`. The
options of the chosen component are further keys of the same group. To choose another one use `choose`, or give the
key on the command line, `--config.sampling.sampler=heun`.
"""

import copy
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from diffussm_jax import migrations, registry
from diffussm_jax.config_keys import AUTO_METRIC, GROUPS, General, Sampling
from diffussm_jax.evaluation.extractor import DISTANCES
from diffussm_jax.options import check_names, flatten, options_of
from diffussm_jax.training.checkpoint import EVAL_LOSS, Best

# Keys that choose a component whose options stand beside them, and its kind.
_FLAT_CHOICES = {
    "diffusion.schedule": "process",
    "diffusion.target": "target",
    "diffusion.weighting": "weighting",
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
        if path and path not in config:  # a group that older versions did not have
            config[path] = ConfigDict()
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


def best_checkpoint(config: ConfigDict) -> Best:
    """The metric by which the best checkpoint is kept."""
    if config.best_metric != AUTO_METRIC:
        return Best(config.best_metric, config.best_mode)
    return Best(DISTANCES[config.scores.features]) if config.eval_scores_every else EVAL_LOSS


def sampling_name(config: ConfigDict, seed: int) -> str:
    """How samples are drawn, for the names of files: "ddim50_scale1.5_seed0".

    Other keys of `config.sampling` are named where they do not have their defaults: "ddim50_scale1.5_eta0.5_seed0".
    """
    sampling = config.sampling
    defaults = options_of(Sampling) | registry.options("sampler", sampling.sampler)
    others = "".join(
        f"_{key}{value}"
        for key, value in sampling.items()
        if key not in ("sampler", "num_steps", "guidance_scale", "num_grid_rows") and value != defaults[key].default
    )
    others = re.sub(r"[^\w.+-]", "", others)
    return f"{sampling.sampler}{sampling.num_steps}_scale{sampling.guidance_scale:g}{others}_seed{seed}"


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError, with the nearest known key, if one of the dotted keys is not known."""
    check_names((f"config.{key}" for key in keys), [f"config.{key}" for key in known], "key")


def apply_size(config: ConfigDict, size: str) -> None:
    """Sets the options of the chosen model, such as width and depth, to a named size of it.

    Raises:
      ValueError: there is no such size.
    """
    sizes = registry.component("model", config.model.name).sizes
    if size not in sizes:
        raise ValueError(f"unknown model size {size!r}; choose one of {', '.join(sizes)}")
    config.model.update(sizes[size])


def use_latents(config: ConfigDict, *, vae: str = "stabilityai/sd-vae-ft-ema", holdout: float = 0.002) -> None:
    """Sets the data to latents of the f8, 4-channel autoencoder of latent diffusion, a fraction `holdout` held out."""
    choose(config, "data.source", "latents")
    config.data.update(num_channels=4, downsampling=8, scaling_factor=0.18215, vae=vae, eval_split="", holdout=holdout)


def paper_config(size: str, *, image_size: int, num_classes: int, model: str = "diffussm") -> ConfigDict:
    """The paper's training setting on latents (arXiv 2311.18257, section 4.1; where it is silent, as DiT and ADM).

    Args:
      size: of the model, such as "S", "L" or "XL".
      image_size: pixels.
      num_classes: 0 for unconditional.
      model: a name of the registry.

    Raises:
      ValueError: the size is unknown.
    """
    config = default_config()
    choose(config, "model.name", model)
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
    config = call_in_file(file, "get_config", "config file", "configs/digits.py")
    import_modules(config)
    migrations.rename(config)
    return complete(config)


def call_in_file(file: str, function: str, what: str, example: str) -> Any:
    """What a function of a Python file returns; "FILE.py:ARGUMENT" calls it with an argument. This runs the file.

    Args:
      file: path and argument.
      function: its name.
      what: the file is, for messages.
      example: of such a file.

    Raises:
      ValueError: there is no such file, or it defines no such function, or one that takes no argument.
    """
    path, colon, argument = file.partition(":")
    spec = importlib.util.spec_from_file_location(function, path)
    if spec is None or not epath.Path(path).exists():
        raise ValueError(f"there is no {what} {path!r}; give a Python file such as {example}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"{path} defines no {function}()")
    found = getattr(module, function)
    if colon and not inspect.signature(found).parameters:
        raise ValueError(f"{function}() of {path} takes no argument, got {argument!r}")
    return found(argument) if colon else found()


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
