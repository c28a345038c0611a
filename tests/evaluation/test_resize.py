"""Resizes against their definitions, written down by hand, and against Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from diffussm_jax.evaluation.resize import (
    PILLOW_CUBIC,
    PYTORCH_CUBIC,
    antialiased_matrix,
    interpolating_matrix,
    keys_cubic,
    resize_bicubic,
    resize_tf1_bilinear,
)

ULP_OF_255 = np.spacing(np.float32(255))


def tf1(image, height, width):
    """One image [H, W] of uint8."""
    image = np.array(image, np.uint8)
    return np.asarray(resize_tf1_bilinear(image[None, ..., None], height, width))[0, ..., 0]


# Output i samples the input at i * (input / output), with the last pixel repeated: by hand.
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([10, 30], [10, 20, 30, 30]),  # at 0, 0.5, 1, 1.5
        ([10, 30], [10, 15, 20, 25, 30, 30, 30, 30]),  # at multiples of 0.25
        ([10, 20, 30, 80], [10, 30]),  # at 0 and 2: nothing is averaged
        ([10, 20, 30, 80, 100, 7], [10, 25, 80, 53.5]),  # at 0, 1.5, 3, 4.5
        ([10, 20, 31], [10, 25.5]),  # at 0 and 1.5
        ([7], [7, 7, 7]),
        ([255, 0, 128], [255, 0, 128]),
    ],
)
def test_tf1_in_one_direction_by_hand(row, expected):
    num = len(expected)
    np.testing.assert_array_equal(tf1([row], 1, num), [expected])
    np.testing.assert_array_equal(tf1([[x] for x in row], num, 1), [[x] for x in expected])


def test_tf1_in_both_directions_by_hand():
    # Rows at 0, 0.5, 1, 1.5 of two; columns at 0 and 1.5 of three.
    expected = [[0, 150], [50, 90], [100, 30], [100, 30]]
    np.testing.assert_array_equal(tf1([[0, 100, 200], [100, 40, 20]], 4, 2), expected)


def test_tf1_where_thirds_are_rounded():
    # Columns at 0, 2/3 and 4/3 of two, in float32: 30 + 60 * 0.6666667 = 70.
    np.testing.assert_allclose(tf1([[30, 90]], 1, 3), [[30, 70, 90]], rtol=0, atol=ULP_OF_255)


def tf1_by_loops(image, height, width):
    """The kernel of TensorFlow 1 for one image [H, W], as its definition reads: in float32, pixel by pixel."""
    H, W = image.shape
    out = np.zeros((height, width), np.float32)
    y_scale, x_scale = np.float32(H) / np.float32(height), np.float32(W) / np.float32(width)
    for i in range(height):
        y = np.float32(i) * y_scale
        top, bottom = int(y), min(int(y) + 1, H - 1)
        for j in range(width):
            x = np.float32(j) * x_scale
            left, right = int(x), min(int(x) + 1, W - 1)
            x_weight, y_weight = x - np.float32(left), y - np.float32(top)
            a, b, c, d = (np.float32(image[k]) for k in ((top, left), (top, right), (bottom, left), (bottom, right)))
            above, below = a + (b - a) * x_weight, c + (d - c) * x_weight
            out[i, j] = above + (below - above) * y_weight
    return out


@pytest.mark.parametrize("shape", [(32, 32), (64, 50), (299, 299), (300, 512)])
def test_tf1_to_the_size_of_inception(shape):
    image = np.random.default_rng(0).integers(0, 256, shape)
    actual = tf1(image, 299, 37)
    # Compilers may contract a * b + c to one rounding: two interpolations differ by at most two roundings.
    np.testing.assert_allclose(actual, tf1_by_loops(image, 299, 37), rtol=0, atol=2 * ULP_OF_255)


def test_tf1_keeps_images_of_the_same_size():
    image = np.random.default_rng(0).integers(0, 256, (299, 299))
    np.testing.assert_array_equal(tf1(image, 299, 299), image)


def test_tf1_keeps_batch_and_channels_apart():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    found = resize_tf1_bilinear(images, 8, 9)
    assert found.shape == (2, 8, 9, 3) and found.dtype == jnp.float32
    for b in range(2):
        for c in range(3):
            np.testing.assert_array_equal(found[b, ..., c], tf1(images[b, ..., c], 8, 9))


@pytest.mark.parametrize("shape", [(256, 256), (32, 32), (512, 300), (224, 224), (40, 1)])
def test_bicubic_is_that_of_pillow(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    expected = PIL.Image.fromarray(image).resize((224, 224), PIL.Image.Resampling.BICUBIC)  # of floats: not rounded
    actual = resize_bicubic(image[None, ..., None], 224, 224)[0, ..., 0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3)


def test_bicubic_is_antialiased():
    stripes = np.tile(np.array([0, 255], np.uint8), (1, 8, 32))[..., None]
    assert np.ptp(resize_bicubic(stripes, 8, 16)[:, :, 2:-2]) < 1


def test_kernels_by_hand():
    # Keys: k(1/2) = 9/16 and k(3/2) = -1/16 for a = -1/2; 19/32 and -3/32 for a = -3/4.
    x = np.array([0, 0.5, 1, 1.5, 2, 3])
    np.testing.assert_allclose(keys_cubic(x, PILLOW_CUBIC), [1, 9 / 16, 0, -1 / 16, 0, 0], atol=1e-15)
    np.testing.assert_allclose(keys_cubic(-x, PYTORCH_CUBIC), [1, 19 / 32, 0, -3 / 32, 0, 0], atol=1e-15)


def test_bicubic_without_antialiasing_by_hand():
    # Outputs are at 0.5 and 2.5; the pixel before the first is the first.
    expected = [[16 / 32, 19 / 32, -3 / 32, 0], [0, -3 / 32, 19 / 32, 16 / 32]]
    np.testing.assert_allclose(interpolating_matrix(4, 2, 2.0), expected, atol=1e-15)


@pytest.mark.parametrize("num_out", [3, 16, 37, 224])
def test_weights_sum_to_one(num_out):
    for matrix in (antialiased_matrix(37, num_out), interpolating_matrix(37, num_out, 37 / (num_out + 0.1))):
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(antialiased_matrix(num_out, num_out), np.eye(num_out), atol=1e-12)


def test_resizes_are_compiled():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    for resize in (resize_tf1_bilinear, resize_bicubic):
        assert jax.jit(resize, static_argnums=(1, 2))(images, 4, 5).shape == (1, 4, 5, 3)
