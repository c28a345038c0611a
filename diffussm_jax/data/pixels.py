"""Records for training in pixel space."""

import numpy as np
from PIL import Image

from diffussm_jax.data.decoding import DECODING, BrokenImage, crop_bytes, reserve_until_cropped
from diffussm_jax.data.sources import Source
from diffussm_jax.data.transforms import center_crop, random_crop


class Pixels:
    """A source's images as records {"image": [size, size, C] uint8, "label": int32, **conditions}.

    With one channel, colour images become gray (luma, ITU-R 601-2, as Pillow's mode "L"). Reading a broken image raises
    a ValueError with its name.

    Args:
      size: in pixels.
      num_channels: C: 1 for gray, 3 for colour.
      is_cropped: centre-crop images; False returns whole images, for `crop_at_random`.

    Raises:
      ValueError: the first image does not have `num_channels` channels, and is not in colour with one channel wanted.
    """

    def __init__(self, source: Source, size: int, num_channels: int, *, is_cropped: bool = True):
        self.class_names = source.class_names
        self._source, self._size, self._is_cropped = source, size, is_cropped
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
                    image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
                if self._is_cropped and image.shape[:2] != (self._size, self._size):
                    image = center_crop(image, self._size)
        except BrokenImage as error:
            raise ValueError(f"{self._source.description}: {error}; remove it to train") from error
        return {"image": image, "label": np.int32(label), **conditions}

    def crop_at_random(self, record: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Crops the image of an uncropped record to a random square; the `augment` of `Loader`."""
        height, width = record["image"].shape[:2]
        with DECODING.reserve(crop_bytes(width, height, self._size)):
            return record | {"image": random_crop(record["image"], self._size, rng)}
