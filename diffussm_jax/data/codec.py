"""Between what a data source holds and the x_0 that a model sees, and back to images."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from diffussm_jax.data.latents import draw_latents
from diffussm_jax.data.transforms import random_flip, to_uint8, to_unit_range


class Codec(NamedTuple):
    """All in which pixels and latents differ for training and sampling.

    Attributes:
      encode: (batch, key) -> x_0 [B, H, W, C] float32, under jit.
      decode: x_0 -> images [B, H', W', C'] uint8.
    """

    encode: Callable[[dict[str, jax.Array], jax.Array], jax.Array]
    decode: Callable[[jax.Array], np.ndarray]


def pixel_codec(*, is_flipped: bool = False) -> Codec:
    """Pixels in [-1, 1]; half of the images mirrored if `is_flipped`."""

    def encode(batch, key):
        images = random_flip(batch["image"], key) if is_flipped else batch["image"]
        return to_unit_range(images)

    return Codec(encode, to_uint8)


def latent_codec(scaling_factor: float, decode: Callable[[jax.Array], jax.Array] | None) -> Codec:
    """Latents times `scaling_factor`.

    Args:
      scaling_factor: of the autoencoder.
      decode: latents, not scaled -> images in [-1, 1]; None if there is no decoder.
    """

    def encode(batch, key):
        return draw_latents(batch, key, scaling_factor)

    def to_images(x_0):
        if decode is None:
            raise ValueError("this run has no decoder for its latents: set config.data.vae and config.sample_every")
        return to_uint8(decode(x_0 / scaling_factor))

    return Codec(encode, to_images)
