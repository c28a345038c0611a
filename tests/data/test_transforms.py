"""Pixels go to model values and back unchanged, and grids show every image in its place."""

import numpy as np
from PIL import Image

from diffussm_jax.data.transforms import image_grid, save_png, to_uint8, to_unit_range


def test_pixels_survive_the_way_there_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = np.asarray(to_unit_range(pixels))
    assert (x.min(), x.max(), x.dtype) == (-1, 1, np.float32)
    np.testing.assert_array_equal(to_uint8(x), pixels)
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, 7.0])), [0, 255])


def test_grid_shows_every_image_in_raster_order(tmp_path):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    save_png(tmp_path / "grid.png", image_grid(images, 3, min_tile=8))
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    for i in range(5):
        row, column = divmod(i, 3)
        assert (grid[row * 10 + 2 : row * 10 + 10, column * 10 + 2 : column * 10 + 10] == i).all()
    assert (grid[:2] == 255).all() and (grid[12:, 22:] == 255).all()
