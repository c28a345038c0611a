"""Autoencoders between images and latents, what they are trained with, and their weights from and to diffusers."""

from diffussm_jax.autoencoder.convert import encoder_hash, from_diffusers, to_diffusers
from diffussm_jax.autoencoder.discriminator import PatchDiscriminator
from diffussm_jax.autoencoder.kl import Autoencoder, AutoencoderKL, init_params, make_decoder, sample_latents
from diffussm_jax.autoencoder.lpips import LPIPS, Perceptual, feature_distance, read_lpips
from diffussm_jax.autoencoder.tiling import tiled_decode, tiled_encode
from diffussm_jax.autoencoder.vq import VQModel

__all__ = [
    "LPIPS",
    "Autoencoder",
    "AutoencoderKL",
    "PatchDiscriminator",
    "Perceptual",
    "VQModel",
    "encoder_hash",
    "feature_distance",
    "from_diffusers",
    "init_params",
    "make_decoder",
    "read_lpips",
    "sample_latents",
    "tiled_decode",
    "tiled_encode",
    "to_diffusers",
]
