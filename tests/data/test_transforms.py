"""Pixels go to model values and back unchanged, crops are ADM's, and grids show every image in its place."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffussm_jax.data import transforms
from diffussm_jax.data.transforms import (
    center_crop,
    image_grid,
    random_crop,
    random_flip,
    save_png,
    to_uint8,
    to_unit_range,
)


def test_pixels_survive_the_way_there_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = np.asarray(to_unit_range(pixels))
    assert (x.min(), x.max(), x.dtype) == (-1, 1, np.float32)
    np.testing.assert_array_equal(to_uint8(x), pixels)
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, 7.0])), [0, 255])


def test_grid_shows_every_image_in_raster_order(tmp_path):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    save_png(tmp_path / "grid.png", image_grid(images, 3))
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    tile = 4 * 43  # 3 of them are the first to make 512 pixels
    step = tile + 2
    assert grid.shape == (2 * step + 2, 3 * step + 2, 3)
    for i in range(5):
        row, column = divmod(i, 3)
        top, left = row * step + 2, column * step + 2
        assert (grid[top : top + tile, left : left + tile] == i).all()
    assert (grid[:2] == 255).all() and (grid[step + 2 :, 2 * step + 2 :] == 255).all()
    assert image_grid(np.zeros((2, 300, 300, 1), np.uint8), 2).shape == (304, 606, 1)  # large ones stay as they are


@pytest.mark.parametrize(
    ("labels", "shape", "where"),
    [
        ([0, 1, 2, 0, 1, 2], (18 + 2 * 174 + 2, 3 * 174 + 2), "above the first row"),
        (["cat", "cat", "cat", "dog", "dog", "dog"], (2 * 174 + 2, None), "beside the rows"),
        ([0, 1, 2, 3, 4, 5], (2 * 192 + 2, 3 * 174 + 2), "above each image"),
    ],
)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_grid_shows_labels_where_they_are_shared(labels, shape, where, num_channels):
    images = np.full((6, 4, 4, num_channels), 255, np.uint8)
    grid = image_grid(images, 3, labels)
    assert grid.shape[0] == shape[0] and (shape[1] or grid.shape[1]) == grid.shape[1] and grid.shape[2] == num_channels
    rows, columns = np.nonzero(grid.min(-1) < 128)  # text alone is dark
    if where == "above the first row":
        assert rows.max() < 20 and {int(c) // 174 for c in columns} == {0, 1, 2}
    elif where == "beside the rows":
        assert columns.max() < grid.shape[1] - 3 * 174 and {int(r) // 174 for r in rows} == {0, 1}
    else:
        assert {(int(r) // 192, int(c) // 174) for r, c in zip(rows, columns, strict=True)} == {
            (r, c) for r in (0, 1) for c in (0, 1, 2)
        }
        assert (rows % 192 < 20).all()


def adm_center_crop(image, size):
    """As guided-diffusion's image_datasets.py has it."""
    picture = Image.fromarray(image)
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.BICUBIC)
    pixels = np.array(picture)
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y : y + size, x : x + size]


def adm_random_crop(image, size, side, y, x):
    picture = Image.fromarray(image)
    while min(*picture.size) >= 2 * side:
        picture = picture.resize(tuple(n // 2 for n in picture.size), resample=Image.BOX)
    scale = side / min(*picture.size)
    picture = picture.resize(tuple(round(n * scale) for n in picture.size), resample=Image.BICUBIC)
    return np.array(picture)[y : y + size, x : x + size]


SIZES = [(1, 1), (1, 300), (300, 1), (31, 33), (32, 32), (64, 64), (63, 200), (65, 64), (500, 375), (129, 1000), (7, 9)]


@pytest.mark.parametrize("size", [8, 32, 33])
@pytest.mark.parametrize("height,width", SIZES)
def test_crops_are_adms(height, width, size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    expected = adm_center_crop(image, size)
    np.testing.assert_array_equal(center_crop(image, size), expected)
    np.testing.assert_array_equal(center_crop(Image.fromarray(image), size), expected)
    gray = center_crop(image[..., :1], size)
    assert gray.dtype == np.uint8
    np.testing.assert_array_equal(gray[..., 0], adm_center_crop(image[..., 0], size))

    found = random_crop(image, size, np.random.default_rng(5))
    draws = np.random.default_rng(5)
    side = int(draws.integers(size, math.ceil(size / 0.8) + 1))
    halvings = 0
    while min(height, width) >> halvings >= 2 * side:
        halvings += 1
    shape = np.array([height >> halvings, width >> halvings])
    y, x = (int(draws.integers(0, round(n * (side / shape.min())) - size + 1)) for n in shape)
    np.testing.assert_array_equal(found, adm_random_crop(image, size, side, y, x))
    assert random_crop(image[..., :1], size, np.random.default_rng(5)).shape == (size, size, 1)


def test_a_long_strip_is_cropped_without_scaling_all_of_it(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (3, 400, 3), np.uint8)
    expected = [f(image, 32) for f in (center_crop, lambda *a: random_crop(*a, np.random.default_rng(2)))]
    monkeypatch.setattr(transforms, "MAX_SCALED_PIXELS", 0)
    found = [f(image, 32) for f in (center_crop, lambda *a: random_crop(*a, np.random.default_rng(2)))]
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 2
    assert center_crop(np.zeros((1, 4000, 3), np.uint8), 256).shape == (256, 256, 3)


def test_random_crops_reach_every_place_and_size():
    """Of an image as large as the crop, scaling is all that is left; of one that is not scaled, the offset."""
    gradient = np.arange(12, dtype=np.uint8)[:, None, None] * 16 + np.arange(15, dtype=np.uint8)[:, None]
    rng = np.random.default_rng(0)
    corners = [int(random_crop(gradient, 12, rng, min_crop_fraction=1)[0, 0, 0]) for _ in range(300)]
    assert set(corners) == {0, 1, 2, 3}
    sides = []
    for _ in range(300):
        draws = Recorder(rng)
        random_crop(gradient, 8, draws, min_crop_fraction=0.5, max_crop_fraction=0.9)
        (low, high), drawn = draws.calls[0]
        assert (low, high) == (9, 17)
        sides.append(drawn)
    assert set(sides) == set(range(9, 17))
    with pytest.raises(ValueError, match="min_crop_fraction <= max_crop_fraction"):
        random_crop(gradient, 8, rng, min_crop_fraction=0.9, max_crop_fraction=0.5)


class Recorder:
    """A generator that remembers what it was asked and what it gave."""

    def __init__(self, rng):
        self.rng, self.calls = rng, []

    def integers(self, low, high):
        self.calls.append(((low, high), int(self.rng.integers(low, high))))
        return self.calls[-1][1]


def test_half_of_the_images_are_mirrored():
    images = jnp.arange(4000 * 6, dtype=jnp.int32).reshape(4000, 2, 3, 1).astype(jnp.uint8)
    flipped = jax.jit(random_flip)(images, jax.random.key(0))
    assert flipped.dtype == jnp.uint8
    is_same = np.asarray((flipped == images).all((1, 2, 3)))
    is_mirrored = np.asarray((flipped == images[:, :, ::-1]).all((1, 2, 3)))
    assert (is_same ^ is_mirrored).all()
    assert abs(is_mirrored.mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    assert (np.asarray(random_flip(images, jax.random.key(1))) != np.asarray(flipped)).any()
