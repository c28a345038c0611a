"""Name -> component, for every choice that a config can make. Nothing else knows names.

A package adds its own components with one line each, and `config.imports = ("my.module",)` makes every program of a run
import it, sampling in a fresh process included:

    from diffussm_jax.registry import register

    register("sampler", "heun", Heun)

What a component of each kind is called with, beside its options, and what it must be:

    kind         called with                  is
    task         parts (`build.Parts`)         `training.task.Task`
    model        conditioners, num_outputs    `models.Backbone`
    mixer        platform, name               Flax module (`models.mixers`), made inside the model
    conditioner  num_classes, width, dtype    `models.conditioners.Conditioner`, made inside the model
    process                                   `diffusion.Process`
    target                                    `diffusion.Target`
    weighting                                 `diffusion.Weighting` of the loss, or None
    sampler                                   `diffusion.Sampler`
    source       path, split                  `data.sources.Source` of images; or records of latents with a
                                              `card` and `holds_latents = True`, as `data.latents.Latents`
    hook         context                      `training.task.Hook`
    autoencoder  num_channels                 `autoencoder.first_stage.FirstStage`, made inside the task

A task component that trains `parts.model` says so by an attribute `trains_model = True`; then the run can be sampled.
It may have two more: `check`, called with `parts` before anything is read, which raises ValueError where the config's
values do not fit; and `hooks`, called with `parts`, which returns hooks of its own.

Only those of the listed arguments are passed that the component accepts. Its options are described in `options`.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffussm_jax.autoencoder.first_stage import KLStage, VQStage
from diffussm_jax.build_autoencoder import autoencoder
from diffussm_jax.data.latents import Latents
from diffussm_jax.data.sources import Digits, open_source
from diffussm_jax.diffusion import (
    DDIM,
    DDPM,
    GVP,
    P2,
    X0,
    DPMSolverPP,
    Euler,
    Heun,
    MinSNR,
    Noise,
    RectifiedFlow,
    UniPC,
    V,
    Velocity,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
    unweighted,
)
from diffussm_jax.models import DiffuSSM, DiT, UNet
from diffussm_jax.models.conditioners import LabelEmbed
from diffussm_jax.models.mixers import LSSL, S4, S4D, S6, Attention, Conv
from diffussm_jax.options import Option, check_names, options_of
from diffussm_jax.training.diffusion_task import diffusion

KINDS = (
    "task",
    "model",
    "mixer",
    "conditioner",
    "process",
    "target",
    "weighting",
    "sampler",
    "source",
    "hook",
    "autoencoder",
)
_COMPONENTS: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str, component: Any) -> None:
    """Adds a component; a name that is taken is replaced.

    Raises:
      ValueError: there is no such kind.
    """
    check_names([kind], KINDS, "kind of component")
    _COMPONENTS[kind][name] = component


def names(kind: str) -> list[str]:
    """The names of a kind, in the order of registration."""
    return list(_COMPONENTS[kind])


def component(kind: str, name: str, key: str = "") -> Any:
    """The component of a name.

    Raises:
      ValueError: there is none; the message lists the names, and names the config key if one is given.
    """
    if not isinstance(name, str) or name not in _COMPONENTS[kind]:
        raise ValueError(f"{f'config.{key}' if key else kind} is {name!r}; choose one of {', '.join(names(kind))}")
    return _COMPONENTS[kind][name]


def options(kind: str, name: str) -> dict[str, Option]:
    """The options of a component."""
    return options_of(component(kind, name))


def group(kind: str, name: str, **values: Any) -> ConfigDict:
    """A config group {"name", **options} with the component's defaults, and with `values` in their place.

    Raises:
      ValueError: the component has no such option.
    """
    known = options(kind, name)
    check_names(values, known, f"option of {kind} {name!r}:")
    defaults = {
        key: group(option.component.kind, option.component.default) if option.component else option.default
        for key, option in known.items()
    }
    return ConfigDict({"name": name, **defaults, **values})


def create(kind: str, name: str, values: Mapping[str, Any], **context: Any) -> Any:
    """Calls a component with its options and with those arguments of `context` that it accepts.

    Args:
      kind: of the component.
      name: of the component.
      values: of its options; the default where one is missing, and other keys are ignored.
      context: further arguments, also for components inside this one.
    """
    return factory(kind, name, values, **context)()


def factory(kind: str, name: str, values: Mapping[str, Any], **context: Any) -> functools.partial:
    """As `create`, but not called yet."""
    found = component(kind, name)
    arguments = {}
    for key, option in options_of(found).items():
        if option.component:
            inner = values[key] if key in values else {"name": option.component.default}
            arguments[key] = factory(option.component.kind, inner["name"], inner, **context)
        elif key in values:
            arguments[key] = values[key]
    accepted = inspect.signature(found).parameters
    arguments |= {key: value for key, value in context.items() if key in accepted}
    return functools.partial(found, **arguments)


register("task", "diffusion", diffusion)
register("task", "autoencoder", autoencoder)
register("autoencoder", "kl", KLStage)
register("autoencoder", "vq", VQStage)
register("model", "diffussm", DiffuSSM)
register("model", "dit", DiT)
register("model", "unet", UNet)
register("mixer", "s4d", S4D)
register("mixer", "s4", S4)
register("mixer", "lssl", LSSL)
register("mixer", "s6", S6)
register("mixer", "attention", Attention)
register("mixer", "conv", Conv)
register("conditioner", "label", LabelEmbed)
register("process", "linear", linear_schedule)
register("process", "scaled_linear", scaled_linear_schedule)
register("process", "cosine", cosine_schedule)
register("process", "rectified_flow", RectifiedFlow)
register("process", "gvp", GVP)
register("target", "noise", Noise)
register("target", "x_0", X0)
register("target", "v", V)
register("target", "velocity", Velocity)
register("weighting", "none", unweighted)
register("weighting", "min_snr", MinSNR)
register("weighting", "p2", P2)
register("sampler", "ddpm", DDPM)
register("sampler", "ddim", DDIM)
register("sampler", "heun", Heun)
register("sampler", "euler", Euler)
register("sampler", "dpm_solver", DPMSolverPP)
register("sampler", "unipc", UniPC)
register("source", "digits", Digits)
register("source", "images", open_source)
register("source", "latents", Latents)
