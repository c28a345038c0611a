"""Feature extractors: from uint8 images to the features that scores are computed on.

`Extractor` runs a network over batches on all devices. `evaluation.inception`, `evaluation.dinov2` and
`evaluation.classifier` make one; any function (params, images) -> features can be another.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffussm_jax.parallel.mesh import BATCH, make_mesh, over_batch, replicated

FEATURES = "features"
SPATIAL = "spatial"
PROBABILITIES = "probabilities"
# The names of the Frechet distance on the features of each network.
DISTANCES = {"inception": "FID", "dinov2": "FD-DINOv2", "digits": "FD-digits", "cifar10": "FD-cifar10"}


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A network as a function of images.

    Attributes:
      name: of the network, such as "inception". Statistics of different extractors are never compared.
      apply: (params, images [B, H, W, C] uint8) -> dict of float32 arrays: "features" [B, d], and where there are such
        "spatial" [B, k] for sFID and "probabilities" [B, K] for the Inception Score and class accuracy.
      params: of the network.
      sha256: of the weights.
      num_channels: C of the images that it takes.
      distance: the name of the Fréchet distance on its features: "FID" for the FID Inception alone.
      image_size: pixels of the images that `apply` takes; those of a multiple of it are averaged over blocks before.
        None: any size.
      mesh: the devices; all if None.
    """

    name: str
    apply: Callable[[Any, jax.Array], dict[str, jax.Array]]
    params: Any
    sha256: str
    num_channels: int
    distance: str
    image_size: int | None = None
    mesh: Mesh | None = None

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return self.mesh or make_mesh()

    @functools.cached_property
    def _params(self) -> Any:
        return jax.device_put(self.params, replicated(self._mesh))

    @functools.cached_property
    def _apply(self) -> Callable:
        one = replicated(self._mesh)
        return jax.jit(self.apply, in_shardings=(one, over_batch(self._mesh)), out_shardings=one)

    def __call__(
        self, images: np.ndarray, batch_size: int = 64, progress: Callable[[int], None] = lambda num_images: None
    ) -> dict[str, np.ndarray]:
        """The features of images [N, H, W, C] uint8, as `apply` names them, on the host.

        With several processes all of them pass the same images and get the same features.

        Args:
          images: all of one size.
          batch_size: images at a time, over all devices; rounded up to a multiple of them.
          progress: called with the number of images of each batch that is done.

        Raises:
          ValueError: as `check_images`.
          FloatingPointError: a feature is not finite.
        """
        check_images(images, self.num_channels, self.image_size)
        images = images if self.image_size is None else block_means(images, self.image_size)
        num_parts = math.prod(self._mesh.shape[axis] for axis in BATCH)
        batch_size = min(batch_size, 1 << (len(images) - 1).bit_length())  # few sizes, few compilations
        batch_size = -(-batch_size // num_parts) * num_parts
        found = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            rows = np.arange(batch_size) % len(batch)  # one shape, one compilation
            filled = jax.make_array_from_callback(
                (batch_size, *images.shape[1:]), over_batch(self._mesh), lambda index, b=batch, r=rows: b[r[index[0]]]
            )
            outputs = jax.device_get(self._apply(self._params, filled))
            found.append({key: np.asarray(value)[: len(batch)] for key, value in outputs.items()})
            progress(len(batch))
        features = {key: np.concatenate([of_batch[key] for of_batch in found]) for key in found[0]}
        for key, values in features.items():
            if not np.isfinite(values).all():
                raise FloatingPointError(f"{key} of the extractor {self.name} are not finite: are its weights whole?")
        return features


def check_images(images: np.ndarray, num_channels: int | None = None, image_size: int | None = None) -> None:
    """Checks that images can be scored.

    Raises:
      ValueError: they are not uint8, not [N, H, W, C] with 1 or 3 channels (or `num_channels`), not of `image_size` or
        a multiple, or there are none.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        hint = "; this looks like [N, C, H, W]: transpose it to channels last" if _is_channels_first(images) else ""
        raise ValueError(f"images must be [N, H, W, C] with 1 or 3 channels, got the shape {list(images.shape)}{hint}")
    if images.dtype != np.uint8:
        raise ValueError(
            f"images must be uint8 from 0 to 255, got {images.dtype}; scale them as the generator that made them says "
            "and round, for instance (127.5 * (x + 1)).round().clip(0, 255).astype('uint8') for x in [-1, 1]"
        )
    if not len(images):
        raise ValueError("there are no images")
    if num_channels is not None and images.shape[-1] != num_channels:
        kinds = {1: "grayscale", 3: "colour"}
        raise ValueError(
            f"the extractor takes {kinds[num_channels]} images with C = {num_channels}, got C = {images.shape[-1]}"
        )
    H, W = images.shape[1:3]
    if image_size is not None and (H != W or H < image_size or H % image_size):
        raise ValueError(
            f"the extractor takes images of {image_size} x {image_size} pixels, got {H} x {W}; of a multiple it takes "
            "the means of blocks"
        )


def block_means(images: np.ndarray, size: int) -> np.ndarray:
    """The means over blocks of images [N, k size, k size, C] uint8, rounded: [N, size, size, C] uint8."""
    N, H, _, C = images.shape
    k = H // size
    if k == 1:
        return images
    sums = images.reshape(N, size, k, size, k, C).sum((2, 4), dtype=np.uint32)
    return ((sums + k * k // 2) // (k * k)).astype(np.uint8)


def check_range(largest: int) -> None:
    """Raises ValueError if the largest value of all images says that they are not from 0 to 255."""
    if largest <= 1:
        raise ValueError(
            f"images must be uint8 from 0 to 255, and the largest value is {largest}: were they scaled to 0 ... 1?"
        )


def _is_channels_first(images: np.ndarray) -> bool:
    return images.ndim == 4 and images.shape[1] in (1, 3)
