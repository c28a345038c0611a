"""Images as the records that training in pixel space reads."""

import numpy as np

from diffussm_jax.data.images import BrokenImage
from diffussm_jax.data.sources import Source
from diffussm_jax.data.transforms import center_crop, random_crop


class Pixels:
    """A source's images as records {"image": [size, size, C] uint8, "label": int32, **conditions}.

    A broken image is a ValueError that names it.

    Args:
      source: of images.
      size: in pixels.
      num_channels: C; 1 keeps gray images, 3 is colour.
      is_cropped: whether images are cropped at the centre; False leaves them whole, for `crop_at_random`.

    Raises:
      ValueError: the first image is not of so many channels.
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
        """A record whose image is a random square of the one that was not cropped; for `Loader`'s `augment`."""
        return record | {"image": random_crop(record["image"], self._size, rng)}
