"""From a config to the task "autoencoder", and what happens beside its training: grids, and a report at its end."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import optax

from diffussm_jax.autoencoder import Perceptual, feature_distance, read_lpips
from diffussm_jax.autoencoder.discriminator import NORMS, PatchDiscriminator, check_size
from diffussm_jax.autoencoder.first_stage import FirstStage, KLStage
from diffussm_jax.autoencoder.losses import DISCRIMINATOR_LOSSES
from diffussm_jax.autoencoder.lpips import lpips_distance, param_shapes
from diffussm_jax.autoencoder_report import final_report, reconstruction_grid
from diffussm_jax.evaluation.classifier import (
    CLASSIFIERS,
    classifier_shapes,
    extractor_of_params,
    layer_features,
)
from diffussm_jax.evaluation.extractor import DISTANCES, Extractor
from diffussm_jax.io import path_of
from diffussm_jax.options import CHANGEABLE_ON_RESUME, Choices, Component, Range
from diffussm_jax.parallel.mesh import platform_of
from diffussm_jax.training.adversary import Adversary
from diffussm_jax.training.autoencoder_task import DISCRIMINATOR, GENERATOR, AutoencoderTask
from diffussm_jax.training.hooks import HookFactory
from diffussm_jax.training.optimizer import adamw

NONE, LPIPS_NAME = "none", "lpips"
PERCEPTUAL = (NONE, LPIPS_NAME, *CLASSIFIERS)
_FROZEN = "frozen"
_ENCODER = ("encoder", "quant_conv")


def autoencoder(
    parts,
    *,
    autoencoder: Annotated[Callable[..., FirstStage], Component("autoencoder", "kl")] = KLStage,
    trains_encoder: bool = True,
    perceptual: Annotated[str, Choices(PERCEPTUAL)] = NONE,
    perceptual_weight: Annotated[float, Range(0)] = 1.0,
    vgg_weights: Annotated[str, CHANGEABLE_ON_RESUME] = "",
    lpips_weights: Annotated[str, CHANGEABLE_ON_RESUME] = "",
    disc_weight: Annotated[float, Range(0)] = 0.5,
    disc_start: Annotated[int, Range(0)] = 50_001,
    disc_warmup: Annotated[int, Range(0)] = 0,
    disc_ramp: Annotated[int, Range(0)] = 0,
    disc_loss: Annotated[str, Choices(DISCRIMINATOR_LOSSES)] = "hinge",
    disc_width: Annotated[int, Range(1, 65536)] = 64,
    disc_layers: Annotated[int, Range(1, 16)] = 3,
    disc_norm: Annotated[str, Choices(NORMS)] = "batch",
    r1_weight: Annotated[float, Range(0)] = 0.0,
    beta1: Annotated[float, Range(0, 1)] = 0.5,
    beta2: Annotated[float, Range(0, 1)] = 0.9,
    report_features: Annotated[str, Choices((NONE, *DISTANCES)), CHANGEABLE_ON_RESUME] = NONE,
) -> AutoencoderTask:
    """The task of training the autoencoder that a config describes.

    Args:
      parts: `build.Parts`.
      autoencoder: its kind and sizes, "kl" or "vq", with the weights of the regularizer.
      trains_encoder: False trains the decoder alone, as Stable Diffusion's ft-EMA and ft-MSE decoders were; with
        `config.init_from`.
      perceptual: "lpips", which needs weights; or the features of a small classifier that is trained on the data,
        "digits" or "cifar10"; or "none".
      perceptual_weight: of that distance, beside |x - x_hat|.
      vgg_weights: torchvision's state dict of VGG16, for LPIPS.
      lpips_weights: the state dict of LPIPS' heads.
      disc_weight: of the adversarial loss; 0 trains without a discriminator.
      disc_start: the step at which the autoencoder begins to see the discriminator.
      disc_warmup: number of steps before that in which the discriminator is trained alone.
      disc_ramp: number of steps over which the weight grows from 0.
      disc_loss: "hinge" or "vanilla".
      disc_width: channels of the discriminator's first layer.
      disc_layers: its layers of stride 2.
      disc_norm: "batch" or "group".
      r1_weight: of the gradient penalty on real images; 0: none.
      beta1: of Adam, as is beta2.
      beta2: see beta1.
      report_features: the network of the Frechet distance in the report at the end; "none": no such distance.
    """
    config, stage = parts.config, autoencoder(num_channels=parts.config.data.num_channels)
    adversary = Adversary(
        model=PatchDiscriminator(width=disc_width, num_layers=disc_layers, norm=disc_norm, dtype=stage.dtype),
        loss=disc_loss,
        weight=disc_weight,
        start=disc_start,
        warmup=disc_warmup,
        ramp=disc_ramp,
        r1_weight=r1_weight,
        is_conditional=platform_of(parts.mesh.devices.flat[0]) != "cpu",
    )
    o = config.optimizer
    adam = adamw(parts.learning_rate, weight_decay=o.weight_decay, max_grad_norm=o.max_grad_norm, betas=(beta1, beta2))
    frozen = stage.frozen if trains_encoder else (*stage.frozen, *_ENCODER)
    return AutoencoderTask(
        stage=stage,
        adversary=adversary if disc_weight else None,
        perceptual=make_perceptual(parts, perceptual, vgg_weights, lpips_weights),
        perceptual_weight=perceptual_weight,
        image_shape=parts.input_shape,
        encode=parts.codec.encode,
        optimizer=optax.partition(
            {GENERATOR: adam, DISCRIMINATOR: adam, _FROZEN: optax.set_to_zero()},
            functools.partial(_labels, frozen=frozen),
        ),
        ema=dataclasses.replace(parts.ema, part=GENERATOR),
        batch_spec=parts.batch_spec,
        accumulation_steps=o.accumulation_steps,
        max_skipped_steps=o.max_skipped_steps,
        seed=config.seed,
        mesh=parts.mesh,
    )


def _labels(params: Any, frozen: tuple[str, ...]) -> Any:
    """The optimizer of each parameter: of the discriminator, of all others, or none."""

    def label(path, _):
        part, *rest = path_of(path).split("/")
        if part == GENERATOR and rest[0] in frozen:
            return _FROZEN
        return DISCRIMINATOR if part == DISCRIMINATOR else GENERATOR

    return jax.tree_util.tree_map_with_path(label, params)


def check(parts) -> None:
    """Checks the values of the task against those of the data, before anything is read.

    Raises:
      ValueError: they do not fit; the values are named.
    """
    from diffussm_jax import registry  # which names this task

    config, o = parts.config, parts.config.task
    size = config.data.image_size
    if parts.has_latents:
        raise ValueError(f"config.task.name = 'autoencoder' needs images, got data.source = {config.data.source!r}")
    if config.mesh.tensor != 1:
        raise ValueError(f"config.mesh.tensor must be 1 for an autoencoder, got {config.mesh.tensor}")
    if not o.trains_encoder and not config.init_from:
        raise ValueError("config.task.trains_encoder = False needs config.init_from, an autoencoder to start from")
    if o.disc_warmup > o.disc_start:
        raise ValueError(
            f"config.task.disc_warmup = {o.disc_warmup} must be at most config.task.disc_start = {o.disc_start}"
        )
    if o.perceptual == LPIPS_NAME and not (o.vgg_weights and o.lpips_weights):
        raise ValueError(
            "config.task.perceptual = 'lpips' needs config.task.vgg_weights and config.task.lpips_weights, got "
            f"{o.vgg_weights!r} and {o.lpips_weights!r}"
        )
    stage = registry.create("autoencoder", o.autoencoder.name, o.autoencoder, num_channels=config.data.num_channels)
    f = stage.model.downsampling
    if size % f:
        raise ValueError(f"config.data.image_size = {size} is not a multiple of f = {f}, 2**(number of levels - 1)")
    stage.check()
    if o.disc_weight:
        check_size(size, o.disc_layers)


def make_perceptual(parts, name: str, vgg_weights: str, lpips_weights: str) -> Perceptual | None:
    """The perceptual distance of that name.

    Raises:
      FileNotFoundError: its weights, or the data of its classifier, cannot be had.
      ValueError: its weights are damaged or of another network.
    """
    if name == NONE:
        return None
    if name == LPIPS_NAME:
        if parts.is_abstract:
            return Perceptual("LPIPS", param_shapes(), lpips_distance, sha256="")
        return read_lpips(vgg_weights, lpips_weights)

    def distance(params, x, x_hat):
        layers = layer_features(name, params)
        return feature_distance(layers(x), layers(x_hat))

    if parts.is_abstract:
        return Perceptual(f"distance-{name}", classifier_shapes(name), distance, sha256="")
    extractor = extractor_of(parts, name)
    return Perceptual(f"distance-{name}", extractor.params, distance, extractor.sha256)


def report_extractor(parts) -> Extractor | None:
    """The network of `config.task.report_features`; None for none."""
    name, perceptual = parts.config.task.report_features, parts.config.task.perceptual
    if name == NONE:
        return None
    if name == perceptual and name in CLASSIFIERS:  # reading its data once more takes long
        return extractor_of_params(name, parts.task.perceptual.params)
    return extractor_of(parts, name)


def extractor_of(parts, name: str) -> Extractor:
    """A pretrained network, or the classifier of that name, trained on these data."""
    from diffussm_jax.evaluate_real import open_extractor, open_real_data  # some seconds of imports

    log = print if jax.process_index() == 0 else lambda line: None
    real = open_real_data("digits" if parts.config.data.source == "digits" else "", run_config=parts.config)
    return open_extractor(name, "", real, log)


def hooks(parts) -> list[HookFactory]:
    """Grids of originals and reconstructions every `config.sample_every` steps, and the report after the last one."""
    found = [final_report(parts, report_extractor(parts))]
    return [*found, reconstruction_grid(parts)] if parts.config.sample_every else found


autoencoder.check = check
autoencoder.hooks = hooks
