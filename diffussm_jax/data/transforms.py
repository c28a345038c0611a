"""Between 8-bit pixels and the values that a model sees, and pictures of many images."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

_MAX_SCALED_PIXELS = 1 << 26  # 200 MB


def to_unit_range(images: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: jax.Array | np.ndarray) -> np.ndarray:
    """Values in [-1, 1] (beyond, clipped) to uint8 pixels."""
    return np.round((np.clip(np.asarray(x, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image of [B, H, W, C] left to right with probability 1/2."""
    is_mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(is_mirrored, jnp.flip(images, 2), images)


def _halved(image: np.ndarray | Image.Image, size: int) -> Image.Image:
    """The image halved by box means while its shorter side stays at least `size`."""
    pixels = np.asarray(image)
    picture = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return picture


def _scaled_size(picture: Image.Image, size: int) -> tuple[int, int]:
    """(width, height) at which the shorter side is `size`."""
    scale = size / min(picture.size)
    return round(picture.width * scale), round(picture.height * scale)


def _cut(picture: Image.Image, scaled: tuple[int, int], left: int, top: int, size: int) -> np.ndarray:
    """The square at (left, top) of the picture scaled, bicubic, to (width, height) `scaled`: [size, size, C] uint8.

    Of a long strip (1 x 4000 pixels would grow to a gigabyte) only the square is computed, which Pillow does with
    float32 coordinates: it may be off by a level or two of 255.
    """
    if scaled[0] * scaled[1] <= _MAX_SCALED_PIXELS:
        pixels = np.asarray(picture.resize(scaled, Image.Resampling.BICUBIC))[top : top + size, left : left + size]
    else:
        x, y = picture.width / scaled[0], picture.height / scaled[1]
        box = (left * x, top * y, min((left + size) * x, picture.width), min((top + size) * y, picture.height))
        pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def center_crop(image: np.ndarray | Image.Image, size: int) -> np.ndarray:
    """The square in the middle of a scaled image, exactly as ADM crops (Dhariwal & Nichol, arXiv 2105.05233).

    Args:
      image: [H, W, C] uint8, C = 1 or 3; or an image of Pillow's.
      size: pixels.

    Returns:
      [size, size, C] uint8.
    """
    picture = _halved(image, size)
    width, height = _scaled_size(picture, size)
    return _cut(picture, (width, height), (width - size) // 2, (height - size) // 2, size)


def random_crop(
    image: np.ndarray | Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    min_crop_fraction: float = 0.8,
    max_crop_fraction: float = 1.0,
) -> np.ndarray:
    """A random square of an image scaled at random, as ADM's random crop.

    Args:
      image: [H, W, C] uint8, C = 1 or 3; or an image of Pillow's.
      size: pixels.
      rng: of the draws.
      min_crop_fraction: the least part of the shorter side that is kept.
      max_crop_fraction: the greatest.

    Returns:
      [size, size, C] uint8.

    Raises:
      ValueError: not 0 < min_crop_fraction <= max_crop_fraction <= 1.
    """
    if not 0 < min_crop_fraction <= max_crop_fraction <= 1:
        raise ValueError(
            "crop fractions must be 0 < min_crop_fraction <= max_crop_fraction <= 1, got "
            f"{min_crop_fraction} and {max_crop_fraction}"
        )
    shortest, longest = math.ceil(size / max_crop_fraction), math.ceil(size / min_crop_fraction)
    side = int(rng.integers(shortest, longest + 1))
    picture = _halved(image, side)
    width, height = _scaled_size(picture, side)
    top, left = (int(rng.integers(0, length - size + 1)) for length in (height, width))
    return _cut(picture, (width, height), left, top, size)


def image_grid(images: np.ndarray, num_columns: int, *, min_tile: int = 32) -> np.ndarray:
    """Images side by side, in raster order, on white.

    Args:
      images: [B, H, W, C] uint8.
      num_columns: images in a row.
      min_tile: images smaller than this many pixels are enlarged, each pixel to a square.

    Returns:
      [rows * (H' + 2) + 2, num_columns * (W' + 2) + 2, C] uint8.
    """
    zoom = max(1, math.ceil(min_tile / images.shape[1]))
    images = images.repeat(zoom, 1).repeat(zoom, 2)
    B, H, W, C = images.shape
    num_rows = -(-B // num_columns)
    grid = np.full((num_rows * (H + 2) + 2, num_columns * (W + 2) + 2, C), 255, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, num_columns)
        top, left = row * (H + 2) + 2, column * (W + 2) + 2
        grid[top : top + H, left : left + W] = image
    return grid


def save_png(path, image: np.ndarray) -> None:
    """Writes [H, W, C] uint8, C = 1 or 3, to a PNG at a path (an `epath.Path` or a string)."""
    from etils import epath

    with epath.Path(path).open("wb") as file:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")
