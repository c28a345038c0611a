"""A source of images: stripes, vertical or horizontal, of a brightness that is a condition too."""

from typing import Annotated

import numpy as np

from diffussm_jax.data.sources import Example
from diffussm_jax.options import Range
from diffussm_jax.registry import register


class Stripes:
    class_names = ("horizontal", "vertical")

    def __init__(self, split: str, *, num_images: Annotated[int, Range(1)] = 64):
        self.description = f"stripes, split {split}"
        self._num_images, self._seed = num_images, {"train": 0, "eval": 1}[split]

    def __len__(self):
        return self._num_images

    def __getitem__(self, index):
        brightness = np.random.default_rng([self._seed, index]).uniform(0.2, 1)
        image = np.zeros((8, 8, 1), np.uint8)
        image[::2] = round(255 * brightness)
        label = index % 2
        image = image.swapaxes(0, 1) if label else image
        return Example(image, label, str(index), {"brightness": np.float32(brightness)})

    def fingerprint(self):
        return f"stripes {self._seed} {self._num_images}"


register("source", "stripes", Stripes)
