"""Checks of a whole config before anything is built, and of a config against the one of the run that it resumes."""

import copy
import json
from collections.abc import Mapping

from ml_collections import ConfigDict

from diffussm_jax import config as config_lib
from diffussm_jax import migrations, registry
from diffussm_jax.build import Parts
from diffussm_jax.config_keys import GROUPS, GUIDED_CHANNELS, General
from diffussm_jax.data_config import left_to_data
from diffussm_jax.diffusion import TIME_GRIDS, check_guidance
from diffussm_jax.options import Option, flatten, options_of
from diffussm_jax.parallel.mesh import mesh_shape
from diffussm_jax.parallel.sharding import spec_of

# Groups whose keys may all change on resume.
_CHANGEABLE_GROUPS = ("sampling", "scores", "mesh", "hooks")


def known_options(config: ConfigDict) -> dict[str, Option]:
    """Every key that the config may have, by its dotted name; the keys that choose components among them.

    Raises:
      ValueError: there is no component of a chosen name.
    """
    found = {key: option for key, option in options_of(General).items()}
    for group, keys in GROUPS.items():
        found |= {f"{group}.{key}": option for key, option in options_of(keys).items()}
    for key, kind, group in config_lib.chosen(config):
        path = key.rpartition(".")[0]
        component = registry.component(kind, group[key.rpartition(".")[2]], key)
        for name, option in options_of(component).items():
            if not option.component:
                found[f"{path}.{name}"] = option
        found.setdefault(key, Option(default="", type=str))
    return found


def validate(config: ConfigDict, num_devices: int = 1, *, has_guide: bool = False) -> None:
    """Checks a whole config, in milliseconds; a mesh that splits parameters takes a second.

    Args:
      config: in the form of `default_config()`; keys that are missing have their defaults.
      num_devices: how many devices there are.
      has_guide: whether samples are guided by another model, which needs no null condition.

    Raises:
      ValueError: a key is unknown, or a value is not allowed or does not fit another or the devices. The
        message names the key, the value and what is allowed.
    """
    config_lib.import_modules(config)
    config = config_lib.complete(copy.deepcopy(config).unlock())
    if left := left_to_data(config):
        raise ValueError(
            "these values are found in the data when training starts, and must be given here: "
            + ", ".join(f"config.{key}" for key in left)
        )
    known, values = known_options(config), flatten(config)
    values = {key: value for key, value in values.items() if not isinstance(value, ConfigDict)}  # empty groups
    _check_keys(config, values, known)
    for key, option in known.items():
        if key not in values:
            raise ValueError(f"config.{key} must be a {option.type.__name__}, and is a group")
        option.check(f"config.{key}", values[key])
    _check_combinations(config, num_devices, has_guide)


def _check_keys(config: ConfigDict, values: Mapping, known: Mapping) -> None:
    """ValueError for an unknown key; if it is an option of another component, the message says how to choose one."""
    for key in values.keys() - known.keys():
        path, _, name = key.rpartition(".")
        for choice, kind, group in config_lib.chosen(config):
            own, _, last = choice.rpartition(".")
            if own == path and any(name in registry.options(kind, other) for other in registry.names(kind)):
                raise ValueError(
                    f"config.{key} is no option of config.{choice} = {group[last]!r}; to choose another component with "
                    f"its options, use diffussm_jax.config.choose or --config.{choice}={group[last]}"
                )
    config_lib.check_keys(values, known)


def _check_combinations(config: ConfigDict, num_devices: int, has_guide: bool) -> None:
    data, sampling = config.data, config.sampling
    if config.eval_every and not (data.eval_split or data.holdout):
        raise ValueError(
            "config.eval_every needs held-out data: set config.data.eval_split or holdout, or eval_every to 0"
        )
    if data.eval_split and data.holdout:
        raise ValueError(
            f"config.data.holdout = {data.holdout} holds out a part of the split {data.split!r}, and eval_split = "
            f"{data.eval_split!r} is held out already: set holdout to 0 or eval_split to ''"
        )
    if data.image_size % data.downsampling:
        raise ValueError(
            f"config.data.image_size = {data.image_size} is not a multiple of "
            f"config.data.downsampling = {data.downsampling}"
        )
    parts = Parts(config)
    if not parts.has_latents and (data.downsampling, data.scaling_factor) != (1, 1):
        raise ValueError(
            f"config.data.downsampling and scaling_factor must be 1 for pixels, got {data.downsampling} and "
            f"{data.scaling_factor}"
        )
    if data.random_crop and not getattr(registry.component("source", data.source), "is_croppable", True):
        raise ValueError(f"config.data.random_crop is for the source images, not {data.source}")
    if sampling.guidance_scale != 1 and not has_guide:
        dropouts = {key: group.get("dropout", 1) for key, group in parts.condition_groups.items()}
        if not dropouts or not all(dropouts.values()):
            raise ValueError(
                f"config.sampling.guidance_scale = {sampling.guidance_scale} needs a null condition: classes and "
                f"dropout, got config.data.num_classes = {data.num_classes} and dropouts {dropouts} in "
                "config.conditioners"
            )
    _explain("config.diffusion", lambda: parts.objective)
    _explain("config.sampling", lambda: TIME_GRIDS[sampling.time_grid](parts.objective.process, sampling.num_steps))
    channels = GUIDED_CHANNELS[sampling.guided_channels]
    guidance = (sampling.guidance_scale, sampling.guidance_interval, channels, data.num_channels)
    _explain("config.sampling", lambda: check_guidance(*guidance))
    if parts.trains_model:
        _explain("config.model", lambda: parts.model.check(parts.input_shape))
    getattr(registry.component("task", config.task.name), "check", lambda parts: None)(parts)
    _explain("config.optimizer", lambda: parts.learning_rate)
    mesh = _explain("config.mesh", lambda: mesh_shape(**config.mesh.to_dict(), num_devices=num_devices))
    _check_mesh(config, parts, dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))


def _explain(key: str, check):
    """The result of `check`, with the key in front of its ValueError."""
    try:
        return check()
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


class _Sizes:
    """A mesh of which only the sizes are known."""

    def __init__(self, shape: Mapping[str, int]):
        self.shape = shape


def _check_mesh(config: ConfigDict, parts: Parts, mesh: Mapping[str, int]) -> None:
    accumulation_steps = config.optimizer.accumulation_steps
    num_parts = mesh["data"] * mesh["fsdp"] * accumulation_steps
    if config.batch_size % num_parts:
        raise ValueError(
            f"config.batch_size = {config.batch_size} is not a multiple of {num_parts}: config.mesh.data = "
            f"{mesh['data']} x fsdp = {mesh['fsdp']} devices x config.optimizer.accumulation_steps = "
            f"{accumulation_steps}"
        )
    if mesh["fsdp"] * mesh["tensor"] > 1 and parts.trains_model:
        for path, shape in parts.parameter_shapes.items():
            spec_of(path, shape, parts.model.sharding_rules, _Sizes(mesh))


def check_same_experiment(saved: dict, config: dict, where: str) -> None:
    """Checks that a run may go on with another config; both as `config.to_plain` gives them.

    Keys that change nothing that was computed so far may differ: intervals, paths, the mesh, how gradients are stored.
    The number of steps may differ unless the learning rate follows it.

    Raises:
      ValueError: the configs are of different experiments; every key that differs is listed.
    """
    today = config_lib.from_plain(config)
    try:
        saved = migrations.migrate(saved)
        changed = {key: config[key] for key in (*_CHANGEABLE_GROUPS, "imports")}  # which may be gone
        saved = config_lib.from_plain(migrations.stamp(saved | changed))
    except ValueError as error:
        raise ValueError(f"the config saved in {where} cannot be read: {error}") from error
    changeable = {key for key, option in known_options(today).items() if option.is_changeable_on_resume}
    if today.optimizer.decay == "constant":
        changeable.add("num_steps")
    old = flatten(json.loads(json.dumps(config_lib.to_plain(saved))))
    new = flatten(json.loads(json.dumps(config)))
    differing = [
        f"config.{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key not in changeable and key.partition(".")[0] not in _CHANGEABLE_GROUPS and old.get(key) != new.get(key)
    ]
    if differing:
        reason = " (with config.optimizer.decay = 'cosine' the learning rate follows num_steps)"
        raise ValueError(
            f"{where} holds a run of another config; choose another workdir or the same values:\n  "
            + "\n  ".join(line + (reason if line.startswith("config.num_steps:") else "") for line in differing)
        )


def per_device_microbatch(config: ConfigDict, mesh: Mapping[str, int]) -> int:
    """Images that a device computes together: its part of a microbatch."""
    return config.batch_size // (mesh["data"] * mesh["fsdp"] * config.optimizer.accumulation_steps)
