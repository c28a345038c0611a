"""Records for training in pixel space."""

import math

import numpy as np

from diffussm_jax.data.decoding import DECODING, BrokenImage, crop_bytes, reserve_until_cropped
from diffussm_jax.data.sources import Source
from diffussm_jax.data.transforms import center_crop, random_crop, to_gray

_MIN_CROP_FRACTION = 0.8  # ADM's; `crop_bytes` counts on it


class Pixels:
    """A source's images as records {"image": [size, size, C] uint8, "label": int32, **conditions}.

    With one channel, colour images become gray (`to_gray`). Reading a broken image raises a ValueError with its name.

    Args:
      size: in pixels.
      num_channels: C: 1 for gray, 3 for colour.
      is_cropped: centre-crop images; False returns whole images, for `crop_at_random`.
      min_crop_fraction: random crops keep a part of the shorter side between this one and 1: 0.8 in ADM. With 1 the
        shorter side is scaled to `size` and a random square is cut, as latent diffusion (LDM) does.

    Raises:
      ValueError: the first image does not have `num_channels` channels, and is not in colour with one channel wanted.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        num_channels: int,
        *,
        is_cropped: bool = True,
        min_crop_fraction: float = _MIN_CROP_FRACTION,
    ):
        self.class_names = source.class_names
        self._source, self._size, self._is_cropped = source, size, is_cropped
        self._min_crop_fraction = min_crop_fraction
        found = source[0].image.shape[-1]
        self._becomes_gray = (found, num_channels) == (3, 1)
        if found != num_channels and not self._becomes_gray:
            raise ValueError(
                f"{source.description}: images have {found} channels, config.data.num_channels = {num_channels}"
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            with reserve_until_cropped(self._size):
                image, label, _, conditions = self._source[index]
                if self._becomes_gray:
                    image = to_gray(image)
                if self._is_cropped and image.shape[:2] != (self._size, self._size):
                    image = center_crop(image, self._size)
        except BrokenImage as error:
            raise ValueError(f"{self._source.description}: {error}; remove it to train") from error
        return {"image": image, "label": np.int32(label), **conditions}

    def crop_at_random(self, record: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Crops the image of an uncropped record to a random square; the `augment` of `Loader`."""
        height, width = record["image"].shape[:2]
        scaled = math.ceil(self._size * max(1, _MIN_CROP_FRACTION / self._min_crop_fraction))
        with DECODING.reserve(crop_bytes(width, height, scaled)):
            image = random_crop(record["image"], self._size, rng, min_crop_fraction=self._min_crop_fraction)
        return record | {"image": image}
