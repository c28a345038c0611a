"""Conversion from a batch of records to the model's x_0, and from x_0 to images."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from diffussm_jax.data.latents import draw_latents
from diffussm_jax.data.transforms import random_flip, to_uint8, to_unit_range


class Codec(NamedTuple):
    """The conversions in which pixels and latents differ.

    Attributes:
      encode: (batch, key) -> x_0 [B, H, W, C] float32, under jit.
      decode: x_0 -> images [B, H', W', C'] uint8.
    """

    encode: Callable[[dict[str, jax.Array], jax.Array], jax.Array]
    decode: Callable[[jax.Array], np.ndarray]


def pixel_codec(*, is_flipped: bool = False) -> Codec:
    """The codec of pixels in [-1, 1]. With `is_flipped`, half of the images are mirrored at random."""

    def encode(batch, key):
        images = random_flip(batch["image"], key) if is_flipped else batch["image"]
        return to_unit_range(images)

    return Codec(encode, to_uint8)


def latent_codec(scaling_factor: float, decode: Callable[[jax.Array], jax.Array] | None) -> Codec:
    """The codec of latents: x_0 is a drawn latent times the autoencoder's `scaling_factor`.

    Args:
      decode: unscaled latents -> images in [-1, 1]; None if there is no decoder.
    """

    def encode(batch, key):
        return draw_latents(batch, key, scaling_factor)

    def to_images(x_0):
        if decode is None:
            raise ValueError("this run has no decoder for its latents: set config.data.vae and config.sample_every")
        return to_uint8(decode(x_0 / scaling_factor))

    return Codec(encode, to_images)
