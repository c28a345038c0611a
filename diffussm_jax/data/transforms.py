"""Conversion between 8-bit pixels and model values, crops, and grids of images."""

import math
from collections.abc import Sequence
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MIN_GRID_WIDTH, _FONT_SIZE, _LINE = 512, 14, 18  # pixels
MAX_SCALED_PIXELS = 1 << 26  # 200 MB


def to_unit_range(images: jax.Array) -> jax.Array:
    """Converts uint8 pixels to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: jax.Array | np.ndarray) -> np.ndarray:
    """Converts values [B, ...] in [-1, 1] to uint8 pixels. Values outside are clipped.

    Raises:
      FloatingPointError: a value is not finite. The message says how many of the images hold such values.
    """
    x = np.asarray(x, np.float32)
    if num_bad := sum(not np.isfinite(image).all() for image in x):
        raise FloatingPointError(f"{num_bad} of {len(x)} images have values that are not finite")
    return np.round((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


def to_gray(image: np.ndarray) -> np.ndarray:
    """Converts [H, W, 3] uint8 to [H, W, 1]: luma, ITU-R 601-2, as Pillow's mode "L"."""
    return np.asarray(Image.fromarray(image).convert("L"))[..., None]


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image of [B, H, W, C] left to right with probability 1/2."""
    is_mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(is_mirrored, jnp.flip(images, 2), images)


def _halve(image: np.ndarray | Image.Image, size: int) -> Image.Image:
    """Halves the image by box means while its shorter side stays at least `size`."""
    pixels = np.asarray(image)
    picture = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return picture


def _scaled_size(picture: Image.Image, size: int) -> tuple[int, int]:
    """(width, height) at which the shorter side is `size`."""
    scale = size / min(picture.size)
    return round(picture.width * scale), round(picture.height * scale)


def _scale_and_crop(picture: Image.Image, scaled: tuple[int, int], left: int, top: int, size: int) -> np.ndarray:
    """Scales (bicubic) to (width, height) `scaled` and cuts the square at (left, top): [size, size, C] uint8.

    For a long strip (1 x 4000 pixels would scale to a gigabyte) only the square is computed. Pillow does this with
    float32 coordinates, which may change values by one or two levels of 255.
    """
    if scaled[0] * scaled[1] <= MAX_SCALED_PIXELS:
        pixels = np.asarray(picture.resize(scaled, Image.Resampling.BICUBIC))[top : top + size, left : left + size]
        pixels = pixels.copy()  # a view would keep the scaled image
    else:
        x, y = picture.width / scaled[0], picture.height / scaled[1]
        box = (left * x, top * y, min((left + size) * x, picture.width), min((top + size) * y, picture.height))
        pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def center_crop(image: np.ndarray | Image.Image, size: int) -> np.ndarray:
    """Scales an image and crops its centre, exactly as ADM (Dhariwal & Nichol, arXiv 2105.05233).

    Args:
      image: [H, W, C] uint8, C = 1 or 3; or a Pillow image.

    Returns:
      [size, size, C] uint8.
    """
    picture = _halve(image, size)
    width, height = _scaled_size(picture, size)
    return _scale_and_crop(picture, (width, height), (width - size) // 2, (height - size) // 2, size)


def random_crop(
    image: np.ndarray | Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    min_crop_fraction: float = 0.8,
    max_crop_fraction: float = 1.0,
) -> np.ndarray:
    """Scales an image at random and crops a random square, as ADM's random crop.

    Args:
      image: [H, W, C] uint8, C = 1 or 3; or a Pillow image.
      min_crop_fraction, max_crop_fraction: range of the part of the shorter side to keep.

    Returns:
      [size, size, C] uint8.

    Raises:
      ValueError: the fractions violate 0 < min_crop_fraction <= max_crop_fraction <= 1.
    """
    if not 0 < min_crop_fraction <= max_crop_fraction <= 1:
        raise ValueError(
            "crop fractions must be 0 < min_crop_fraction <= max_crop_fraction <= 1, got "
            f"{min_crop_fraction} and {max_crop_fraction}"
        )
    shortest, longest = math.ceil(size / max_crop_fraction), math.ceil(size / min_crop_fraction)
    side = int(rng.integers(shortest, longest + 1))
    picture = _halve(image, side)
    width, height = _scaled_size(picture, side)
    top, left = (int(rng.integers(0, length - size + 1)) for length in (height, width))
    return _scale_and_crop(picture, (width, height), left, top, size)


def image_grid(images: np.ndarray, num_columns: int, labels: Sequence | None = None) -> np.ndarray:
    """Arranges images in raster order on white, at least 512 pixels wide: small images by repeating their pixels.

    Args:
      images: [B, H, W, C] uint8.
      num_columns: images in a row.
      labels: [B], written above the columns if all images of a column have the same one, else to the left of the rows
        if all of a row have, else above each image. None: no text.

    Returns:
      [H', W', C] uint8.
    """
    zoom = max(1, math.ceil(_MIN_GRID_WIDTH / (num_columns * images.shape[2])))
    images = images.repeat(zoom, 1).repeat(zoom, 2)
    B, H, W, C = images.shape
    rows, columns = np.divmod(np.arange(B), num_columns)
    font, texts, place = ImageFont.load_default(_FONT_SIZE), [], ""
    if labels is not None:
        texts = [str(label) for label in labels]
        is_shared = {"columns": _is_shared(texts, columns), "rows": _is_shared(texts, rows), "images": True}
        place = next(name for name, value in is_shared.items() if value)
    top = _LINE if place == "columns" else 0
    left = math.ceil(max(font.getlength(text) for text in texts)) + 4 if place == "rows" else 0
    tile_height = H + 2 + (_LINE if place == "images" else 0)
    width, height = left + num_columns * (W + 2) + 2, top + int(rows[-1] + 1) * tile_height + 2
    grid = Image.new("L" if C == 1 else "RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for i, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        x, bottom = left + column * (W + 2) + 2, top + (row + 1) * tile_height
        grid.paste(Image.fromarray(images[i, ..., 0] if C == 1 else images[i]), (x, bottom - H))
        if place == "images" or (place == "columns" and row == 0):
            draw.text((x + W / 2, bottom - H - 2), texts[i], "black", font, "ms")
        elif place == "rows" and column == 0:
            draw.text((left, bottom - H / 2), texts[i], "black", font, "rm")
    return np.asarray(grid).reshape(height, width, C)


def _is_shared(texts: Sequence[str], groups: np.ndarray) -> bool:
    """Whether the images of each group have one text."""
    return len(set(zip(groups.tolist(), texts, strict=False))) == len(set(groups.tolist()))


def save_png(path, image: np.ndarray) -> None:
    """Writes [H, W, C] uint8, C = 1 or 3, as PNG to a path (an `epath.Path` or a string)."""
    from etils import epath

    with epath.Path(path).open("wb") as file:
        write_png(file, image)


def write_png(file: BinaryIO, image: np.ndarray) -> None:
    """Writes [H, W, C] uint8, C = 1 or 3, as PNG to an open file."""
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")
