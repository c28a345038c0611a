"""Records for training in pixel space."""

import numpy as np

from diffussm_jax.data.images import BrokenImage
from diffussm_jax.data.sources import Source
from diffussm_jax.data.transforms import center_crop, random_crop


class Pixels:
    """A source's images as records {"image": [size, size, C] uint8, "label": int32, **conditions}.

    Reading a broken image raises a ValueError with its name.

    Args:
      size: in pixels.
      num_channels: C: 1 for gray, 3 for colour.
      is_cropped: centre-crop images; False returns whole images, for `crop_at_random`.

    Raises:
      ValueError: the first image does not have `num_channels` channels.
    """

    def __init__(self, source: Source, size: int, num_channels: int, *, is_cropped: bool = True):
        self.class_names = source.class_names
        self._source, self._size, self._is_cropped = source, size, is_cropped
        found = source[0].image.shape[-1]
        if found != num_channels:
            raise ValueError(
                f"{source.description}: images have {found} channels, config.data.num_channels = {num_channels}"
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            image, label, _, conditions = self._source[index]
        except BrokenImage as error:
            raise ValueError(f"{self._source.description}: {error}; remove it to train") from error
        if self._is_cropped and image.shape[:2] != (self._size, self._size):
            image = center_crop(image, self._size)
        return {"image": image, "label": np.int32(label), **conditions}

    def crop_at_random(self, record: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Crops the image of an uncropped record to a random square; the `augment` of `Loader`."""
        return record | {"image": random_crop(record["image"], self._size, rng)}
