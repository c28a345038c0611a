"""Autoencoders between images and latents, and conversion of their weights from and to diffusers."""

from diffussm_jax.autoencoder.convert import encoder_hash, from_diffusers, to_diffusers
from diffussm_jax.autoencoder.kl import Autoencoder, AutoencoderKL, init_params, make_decoder, sample_latents
from diffussm_jax.autoencoder.tiling import tiled_decode, tiled_encode
from diffussm_jax.autoencoder.vq import VQModel

__all__ = [
    "Autoencoder",
    "AutoencoderKL",
    "VQModel",
    "encoder_hash",
    "from_diffusers",
    "init_params",
    "make_decoder",
    "sample_latents",
    "tiled_decode",
    "tiled_encode",
    "to_diffusers",
]
