"""From a config to objects. Only here are a config's strings turned into models, data, schedules and optimizers."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffussm_jax.autoencoder import AutoencoderKL, encoder_hash, from_diffusers
from diffussm_jax.config import validate
from diffussm_jax.data.latents import Latents, draw_latents, read_card
from diffussm_jax.data.loader import Loader
from diffussm_jax.data.pixels import Pixels
from diffussm_jax.data.sources import Digits, open_source
from diffussm_jax.data.transforms import random_flip, to_uint8, to_unit_range
from diffussm_jax.diffusion import SAMPLERS, SCHEDULES, Schedule, classifier_free, respace
from diffussm_jax.models import DiffuSSM
from diffussm_jax.parallel.mesh import BATCH, local_rows, make_mesh, over_batch, platform_of, replicated
from diffussm_jax.training.loop import Experiment, Intervals
from diffussm_jax.training.optimizer import adamw, learning_rate_schedule
from diffussm_jax.training.posthoc_ema import SIGMAS
from diffussm_jax.training.state import TrainState
from diffussm_jax.training.step import Encode, Recipe, make_train_step

_GUIDED_CHANNELS = {"all": None, "first_three": 3}
_MAX_GRID_COLUMNS = 10
_DECODED_AT_ONCE = 16


def input_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(H, W, C) of what the model sees, pixels or latents."""
    size = config.data.image_size // config.data.downsampling
    return size, size, config.data.num_channels


def build_model(config: ConfigDict, platform: str | None = None) -> nn.Module:
    """The backbone of `config.model` and `config.data.num_classes`, for a platform: JAX's default backend if None."""
    options = config.model.to_dict()
    options.pop("name")
    options["dtype"] = jnp.dtype(options["dtype"])
    return DiffuSSM(num_classes=config.data.num_classes, platform=platform, **options)


def build_schedule(config: ConfigDict) -> Schedule:
    """The noise schedule of `config.diffusion`."""
    return SCHEDULES[config.diffusion.schedule](config.diffusion.num_steps)


def build_records(config: ConfigDict, split: str, *, is_cropped: bool = True) -> Latents | Pixels:
    """One split of the data that `config.data` names; images cropped, or as large as they are.

    Raises:
      ValueError: the data do not fit the config; both values are named.
      FileNotFoundError: there are no such data.
    """
    data = config.data
    if data.source != "digits" and not data.path:
        raise ValueError(f"config.data.source = {data.source!r} needs a path: give --config.data.path=...")
    if data.source == "latents":
        latents = Latents(data.path, split)
        _check_card(data, latents.card)
        return latents
    source = Digits(split) if data.source == "digits" else open_source(data.path, split)
    if data.num_classes not in (0, len(source.class_names)):
        raise ValueError(
            f"config.data.num_classes = {data.num_classes}, but {source.description} has {len(source.class_names)} "
            "classes (0 trains without them)"
        )
    return Pixels(source, data.image_size, data.num_channels, is_cropped=is_cropped)


def _check_card(data: ConfigDict, card: dict) -> None:
    H, _, C = card["latent_shape"]
    expected = {
        "image_size": card["image_size"],
        "num_channels": C,
        "downsampling": card["image_size"] // H,
        "scaling_factor": card["vae"]["scaling_factor"],
    }
    if data.num_classes:
        expected["num_classes"] = len(card["class_names"])
    wrong = [f"config.data.{k} = {data[k]}, the card has {v}" for k, v in expected.items() if data[k] != v]
    if wrong:
        raise ValueError(f"the latents of {data.path} do not fit the config: " + "; ".join(wrong))


def build_loaders(config: ConfigDict, mesh: Mesh) -> tuple[Loader, Loader | None]:
    """The training data of `config.data`, and the held-out data if there are any; errors as `build_records`."""
    data, options = config.data, {"num_threads": config.data.num_threads, "rows": local_rows(mesh, config.batch_size)}
    training = build_records(config, data.split, is_cropped=not data.random_crop)
    augment = training.crop_at_random if data.random_crop else None
    loader = Loader(training, config.batch_size, config.seed, augment=augment, **options)
    if not data.eval_split:
        return loader, None
    held_out = build_records(config, data.eval_split)
    if held_out.class_names != training.class_names:
        raise ValueError(
            f"the classes of split {data.split!r} are {training.class_names}, those of {data.eval_split!r} are "
            f"{held_out.class_names}: their labels do not agree"
        )
    return loader, Loader(held_out, config.batch_size, None, **options)


class Codec(NamedTuple):
    """The way from data to what the model sees, and back; all in which pixels and latents differ.

    Attributes:
      encode: (batch, key) -> x_0 [B, H, W, C] float32, under jit.
      decode: x_0 -> images [B, H', W', C'] uint8.
    """

    encode: Encode
    decode: Callable[[jax.Array], np.ndarray]


def build_codec(config: ConfigDict, *, has_decoder: bool = True) -> Codec:
    """The codec of `config.data`. Without a decoder the autoencoder of latents is not read.

    Raises:
      ValueError: the autoencoder is not that of the latents.
      FileNotFoundError: it cannot be had.
    """
    data = config.data
    if data.source != "latents":

        def encode(batch, key):
            images = random_flip(batch["image"], key) if data.random_flip else batch["image"]
            return to_unit_range(images)

        return Codec(encode, to_uint8)

    scaling_factor = data.scaling_factor

    def encode_latents(batch, key):
        return draw_latents(batch, key, scaling_factor)

    if not has_decoder:
        return Codec(encode_latents, _cannot_decode)
    vae, params = build_autoencoder(config)
    decode = jax.jit(lambda x_0: vae.apply({"params": params}, x_0 / scaling_factor, method="decode"))

    def decode_latents(x_0):
        parts = [x_0[i : i + _DECODED_AT_ONCE] for i in range(0, len(x_0), _DECODED_AT_ONCE)]
        return np.concatenate([to_uint8(decode(part)) for part in parts])

    return Codec(encode_latents, decode_latents)


def _cannot_decode(x_0):
    raise ValueError("this run has no decoder for its latents: set config.data.vae and config.sample_every")


def build_autoencoder(config: ConfigDict) -> tuple[AutoencoderKL, dict]:
    """The autoencoder `config.data.vae` and its parameters, checked against the config and the card of the latents.

    Only its encoder must be the one that made the latents: decoders trained further for the same encoder are welcome.

    Raises:
      ValueError: none is named, or it is another one than the config or the card says.
      FileNotFoundError: it cannot be had.
    """
    data = config.data
    if not data.vae:
        raise ValueError(
            "decoding samples needs the autoencoder that made the latents: give --config.data.vae=... (or "
            "--config.sample_every=0 to train without samples; or --vae=... to diffussm_jax.sample)"
        )
    vae, params = from_diffusers(data.vae)
    found = {
        "num_channels": vae.latent_channels,
        "downsampling": vae.downsampling,
        "scaling_factor": vae.scaling_factor,
    }
    wrong = [f"config.data.{k} = {data[k]}, it has {v}" for k, v in found.items() if data[k] != v]
    if wrong:
        raise ValueError(f"the autoencoder {data.vae} does not fit the config: " + "; ".join(wrong))
    try:
        card = read_card(data.path, data.split)
    except FileNotFoundError:  # sampling elsewhere than where the latents are
        return vae, params
    if encoder_hash(params) != card["vae"]["encoder_sha256"]:
        raise ValueError(
            f"the autoencoder {data.vae} has not the encoder that made the latents of {data.path}: its SHA-256 is "
            f"{encoder_hash(params)}, that of {card['vae']['name']} was {card['vae']['encoder_sha256']}"
        )
    return vae, params


def build_sampler(config: ConfigDict, model: nn.Module, schedule: Schedule, mesh: Mesh):
    """The sampler of `config.sampling`: (params on the mesh, labels [B] int, key) -> x_0 [B, H, W, C] float32, host.

    An unconditional model takes its labels, too, for their number alone. Any B: the batch is filled up to a multiple of
    the devices that it is split over.

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
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return SAMPLERS[sampling.sampler](denoise, short, x_T, sampler_key, **options)

    jitted = jax.jit(sample, out_shardings=replicated(mesh))
    split = math.prod(mesh.shape[axis] for axis in BATCH)

    def generate(params, labels: np.ndarray, key: jax.Array) -> np.ndarray:
        filled = np.resize(labels, -(-len(labels) // split) * split)
        return jax.device_get(jitted(params, filled, key))[: len(labels)]

    return generate


def build_recipe(config: ConfigDict, mesh: Mesh, encode: Encode | None = None) -> Recipe:
    """What a training step is made of; needs no data.

    Args:
      config: of the run.
      mesh: the devices.
      encode: of the run's codec; made from the config if None.
    """
    o = config.optimizer
    return Recipe(
        model=build_model(config, platform_of(mesh.devices.flat[0])),
        input_shape=input_shape(config),
        schedule=build_schedule(config),
        encode=encode or build_codec(config, has_decoder=False).encode,
        optimizer=adamw(build_learning_rate(config), weight_decay=o.weight_decay, max_grad_norm=o.max_grad_norm),
        ema_decay=o.ema_decay,
        has_ema_warmup=o.has_ema_warmup,
        power_emas=SIGMAS if config.posthoc_ema_every else (),
        accumulation_steps=o.accumulation_steps,
        max_skipped_steps=o.max_skipped_steps,
        seed=config.seed,
        mesh=mesh,
    )


def build_learning_rate(config: ConfigDict) -> optax.Schedule:
    """The learning rate's schedule of `config.optimizer`."""
    o = config.optimizer
    return learning_rate_schedule(
        o.learning_rate, warmup_steps=o.warmup_steps, decay=o.decay, num_steps=config.num_steps
    )


def build_train_step(config: ConfigDict, mesh: Mesh) -> tuple[Callable, TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """The jitted training step, and shapes, dtypes and shardings of its state and batch: to compile it without data.

    Raises:
      ValueError: the config is wrong for the devices of the mesh (`config.validate`).
    """
    validate(config, mesh.size)
    recipe = build_recipe(config, mesh)
    H, W, C = input_shape(config)
    B = config.batch_size
    shapes: dict[str, tuple] = {"label": ((B,), jnp.int32)}
    if config.data.source == "latents":
        shapes |= {name: ((B, 2, H, W, C), jnp.float16) for name in ("mean", "log_std")}
    else:
        shapes["image"] = (B, H, W, C), jnp.uint8
    batch = {k: jax.ShapeDtypeStruct(*of, sharding=over_batch(mesh)) for k, of in shapes.items()}
    return make_train_step(recipe), recipe.abstract_state, batch


def build_experiment(config: ConfigDict) -> Experiment:
    """All that `training.loop.train` needs.

    Raises:
      ValueError: the config is wrong (`config.validate`), or its data cannot be had (`build_loaders`).
    """
    validate(config, jax.device_count())
    mesh = make_mesh(**config.mesh.to_dict())
    train_loader, eval_loader = build_loaders(config, mesh)
    codec = build_codec(config, has_decoder=config.sample_every > 0)
    recipe = build_recipe(config, mesh, codec.encode)
    sampler = build_sampler(config, recipe.model, recipe.schedule, mesh)
    num_columns = min(max(config.data.num_classes, 1), _MAX_GRID_COLUMNS)
    grid_labels = np.arange(config.sampling.num_grid_rows * num_columns, dtype=np.int32) % num_columns
    return Experiment(
        config=to_plain(config),
        recipe=recipe,
        learning_rate=build_learning_rate(config),
        multiply_adds=recipe.model.multiply_adds(*recipe.input_shape)["total"],
        sample_grid=lambda params, key: codec.decode(sampler(params, grid_labels, key)),
        num_grid_columns=num_columns,
        train_loader=train_loader,
        eval_loader=eval_loader,
        num_steps=config.num_steps,
        intervals=Intervals(
            log=config.log_every,
            eval=config.eval_every,
            sample=config.sample_every,
            checkpoint=config.checkpoint_every,
            keep=config.keep_every,
            posthoc_ema=config.posthoc_ema_every,
        ),
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
