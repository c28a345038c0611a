"""Between 8-bit pixels and the values that a model sees, and pictures of many images."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def to_unit_range(images: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: jax.Array | np.ndarray) -> np.ndarray:
    """Values in [-1, 1] (beyond, clipped) to uint8 pixels."""
    return np.round((np.clip(np.asarray(x, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


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
    from PIL import Image

    with epath.Path(path).open("wb") as file:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")
