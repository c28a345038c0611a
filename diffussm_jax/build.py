"""From a config to objects. Only here are a config's strings turned into models, data, schedules and optimizers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffussm_jax.config import validate
from diffussm_jax.data.loader import Loader
from diffussm_jax.data.sources import Digits
from diffussm_jax.data.transforms import to_uint8, to_unit_range
from diffussm_jax.diffusion import SAMPLERS, SCHEDULES, Schedule, classifier_free, respace
from diffussm_jax.models import DiffuSSM
from diffussm_jax.parallel.mesh import make_mesh
from diffussm_jax.training.loop import Experiment, Intervals
from diffussm_jax.training.optimizer import adamw, learning_rate_schedule

_GUIDED_CHANNELS = {"all": None, "first_three": 3}
_DIGITS_SHAPE = {"image_size": 8, "num_channels": 1, "downsampling": 1}
_MAX_GRID_COLUMNS = 10


def input_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(H, W, C) of what the model sees, pixels or latents."""
    size = config.data.image_size // config.data.downsampling
    return size, size, config.data.num_channels


def build_model(config: ConfigDict) -> nn.Module:
    """The backbone that `config.model` and `config.data.num_classes` describe."""
    options = config.model.to_dict()
    options.pop("name")
    options["dtype"] = jnp.dtype(options["dtype"])
    return DiffuSSM(num_classes=config.data.num_classes, **options)


def build_schedule(config: ConfigDict) -> Schedule:
    """The noise schedule of `config.diffusion`."""
    return SCHEDULES[config.diffusion.schedule](config.diffusion.num_steps)


def build_loaders(config: ConfigDict) -> tuple[Loader, Loader]:
    """The training and the held-out data of `config.data`.

    Raises:
      ValueError: the data cannot be had, or the config's sizes are not the data's.
    """
    data = config.data
    if data.source == "latents":
        raise ValueError(
            f"config.data.source = 'latents' (config.data.path = {data.path!r}): this version can build and count the "
            "model but does not read latents yet; to train, use --config=configs/digits.py (source 'digits')"
        )
    wrong = [f"config.data.{k} = {data[k]} (must be {v})" for k, v in _DIGITS_SHAPE.items() if data[k] != v]
    if data.num_classes not in (0, 10):
        wrong.append(f"config.data.num_classes = {data.num_classes} (must be 10, or 0 for unconditional)")
    if wrong:
        raise ValueError("the digits are 8 x 8 x 1 in 10 classes, which does not fit " + ", ".join(wrong))
    return (
        Loader(Digits("train"), config.batch_size, config.seed),
        Loader(Digits("eval"), config.batch_size, None),
    )


def build_sampler(config: ConfigDict, model: nn.Module, schedule: Schedule):
    """The sampler of `config.sampling`: a jitted (params, labels [B] int, key) -> x_0 [B, H, W, C] float32.

    An unconditional model takes its labels, too, for their number alone.

    Raises:
      ValueError: more steps are asked for than the model was trained with.
    """
    sampling = config.sampling
    short = respace(schedule, sampling.num_steps)
    shape = input_shape(config)
    options = {"clip_x_0": config.diffusion.clip_x_0}
    if sampling.sampler == "ddim":
        options["eta"] = sampling.eta

    def sample(params, labels, key):
        noise_key, sampler_key = jax.random.split(key)
        x_T = jax.random.normal(noise_key, (len(labels), *shape))

        def apply(x_t, t, y=None):
            return model.apply({"params": params}, x_t, t, y)

        denoise = apply
        if model.num_classes:
            denoise = classifier_free(
                apply,
                labels,
                null_label=model.num_classes,
                scale=sampling.guidance_scale,
                num_guided_channels=_GUIDED_CHANNELS[sampling.guided_channels],
                interval=tuple(sampling.guidance_interval),
            )
        return SAMPLERS[sampling.sampler](denoise, short, x_T, sampler_key, **options)

    return jax.jit(sample)


def build_experiment(config: ConfigDict) -> Experiment:
    """All that `training.loop.train` needs.

    Raises:
      ValueError: the config is wrong (`config.validate`), or its data cannot be had (`build_loaders`).
    """
    validate(config, jax.device_count())
    model, schedule = build_model(config), build_schedule(config)
    train_loader, eval_loader = build_loaders(config)
    o = config.optimizer
    learning_rate = learning_rate_schedule(
        o.learning_rate, warmup_steps=o.warmup_steps, decay=o.decay, num_steps=config.num_steps
    )
    sampler = build_sampler(config, model, schedule)
    num_columns = min(max(config.data.num_classes, 1), _MAX_GRID_COLUMNS)
    grid_labels = np.arange(config.sampling.num_grid_rows * num_columns, dtype=np.int32) % num_columns
    return Experiment(
        config=to_plain(config),
        model=model,
        input_shape=input_shape(config),
        schedule=schedule,
        optimizer=adamw(learning_rate, weight_decay=o.weight_decay, max_grad_norm=o.max_grad_norm),
        learning_rate=learning_rate,
        ema_decay=o.ema_decay,
        has_ema_warmup=o.has_ema_warmup,
        encode=lambda batch, key: to_unit_range(batch["image"]),
        sample_grid=lambda params, key: to_uint8(sampler(params, grid_labels, key)),
        num_grid_columns=num_columns,
        train_loader=train_loader,
        eval_loader=eval_loader,
        num_steps=config.num_steps,
        intervals=Intervals(
            log=config.log_every,
            eval=config.eval_every,
            sample=config.sample_every,
            checkpoint=config.checkpoint_every,
        ),
        seed=config.seed,
        mesh=make_mesh(config.mesh.data),
    )


def to_plain(config: ConfigDict) -> dict:
    """The config as JSON can hold it; infinity becomes the string "inf"."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return "inf" if value == math.inf else value

    return plain(config.to_dict())


def from_plain(values: dict) -> ConfigDict:
    """The config that `to_plain` wrote down."""

    def rich(value):
        if isinstance(value, dict):
            return {k: rich(v) for k, v in value.items()}
        if isinstance(value, list):
            return tuple(rich(v) for v in value)
        return math.inf if value == "inf" else value

    return ConfigDict(rich(values))
