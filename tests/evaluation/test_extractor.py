"""Extractors: batches, devices, and images that cannot be scored."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.evaluation.extractor import Extractor, block_means, check_images, check_range


def moments(params, images):
    """Two features of an image, a function as a user may write it."""
    x = images.astype(jnp.float32)
    return {"features": params * jnp.stack([x.mean((1, 2, 3)), (x**2).mean((1, 2, 3))], 1)}


def make(apply=moments, **kwargs):
    return Extractor("moments", apply, np.float32(2), "0" * 64, num_channels=3, distance="FD", **kwargs)


def random_images(num, size=6):
    return np.random.default_rng(0).integers(0, 256, (num, size, size + 1, 3), np.uint8)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_batches_do_not_matter(batch_size):
    images = random_images(7)
    x = images.astype(np.float64)
    expected = 2 * np.stack([x.mean((1, 2, 3)), (x**2).mean((1, 2, 3))], 1)
    done = []
    found = make()(images, batch_size, done.append)
    assert found.keys() == {"features"} and found["features"].dtype == np.float32
    np.testing.assert_allclose(found["features"], expected, rtol=1e-5)
    assert sum(done) == 7 and max(done) <= batch_size


def test_one_compilation_for_all_batches():
    traced = []
    make(lambda params, images: traced.append(images.shape) or moments(params, images))(random_images(7), 3)
    assert traced == [(3, 6, 7, 3)]


def test_any_callable():
    found = make(lambda params, images: {"features": images[:, 0, 0].astype(jnp.float32)})(random_images(3))
    np.testing.assert_array_equal(found["features"], random_images(3)[:, 0, 0])


def test_features_that_are_not_finite():
    extractor = make(lambda params, images: {"features": jnp.log(images[:, 0, 0].astype(jnp.float32))})
    with pytest.raises(FloatingPointError, match=r"features.*moments"):
        extractor(random_images(3) * (np.arange(3) > 0)[:, None, None, None].astype(np.uint8))


ON_EIGHT_DEVICES = """
import jax, numpy as np, test_extractor as t
from diffussm_jax.parallel.mesh import make_mesh

assert jax.device_count() == 8
images = t.random_images(13)
sizes = []
def apply(params, images):
    sizes.append(len(images))
    return t.moments(params, images)
found = t.make(apply)(images, 5)["features"]  # rounded up to 8
on_two = t.make(mesh=make_mesh(data=2, devices=jax.devices()[:2]))(images, 5)["features"]
expected = np.asarray(t.moments(np.float32(2), images)["features"])
np.testing.assert_allclose(found, expected, rtol=1e-6)
np.testing.assert_allclose(on_two, expected, rtol=1e-6)
assert sizes == [8], sizes
"""


def test_on_eight_devices():
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.getcwd()]),
    }
    command = [sys.executable, "-c", ON_EIGHT_DEVICES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "uint8 from 0 to 255, got float32"),
        (np.full((2, 8, 8, 3), 9, np.int32), "got int32"),
        (np.full((2, 3, 8, 8), 9, np.uint8), "[N, C, H, W]"),
        (np.full((2, 1, 8, 8), 9, np.uint8), "transpose"),
        (np.full((2, 8, 8), 9, np.uint8), "[2, 8, 8]"),
        (np.full((2, 8, 8, 4), 9, np.uint8), "[2, 8, 8, 4]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no images"),
    ],
)
def test_images_that_cannot_be_scored(images, words):
    with pytest.raises(ValueError) as info:
        check_images(images)
    assert words in str(info.value)


def test_images_from_0_to_1_are_found_by_their_largest_value():
    check_range(2)
    for largest in (0, 1):
        with pytest.raises(ValueError, match=f"the largest value is {largest}.*0 ... 1"):
            check_range(largest)


def test_an_extractor_may_take_one_size():
    for size in (8, 24):
        check_images(np.full((2, size, size, 3), 9, np.uint8), image_size=8)
    for height, width in ((9, 8), (16, 8), (4, 4), (12, 12), (0, 0)):
        with pytest.raises(ValueError, match=f"8 x 8 pixels, got {height} x {width}"):
            check_images(np.full((2, height, width, 3), 9, np.uint8), image_size=8)


def test_images_of_a_multiple_are_averaged_over_blocks():
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), np.uint8)
    expected = np.zeros((5, 4, 4, 3))
    for i in range(4):
        for j in range(4):
            expected[:, i, j] = np.floor(images[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].mean((1, 2)) + 0.5)
    found = block_means(images, 4)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(block_means(np.repeat(images, 2, 1).repeat(2, 2), 12), images)
    np.testing.assert_array_equal(block_means(np.full((1, 64, 64, 1), 255, np.uint8), 1), [[[[255]]]])
    shrinking = make(image_size=4)
    np.testing.assert_array_equal(shrinking(images)["features"], shrinking(found)["features"])


def test_channels_of_the_extractor():
    for channels, other in ((1, 3), (3, 1)):
        images = np.full((2, 8, 8, channels), 9, np.uint8)
        check_images(images)
        check_images(images, channels)
        with pytest.raises(ValueError, match=f"C = {other}, got C = {channels}"):
            check_images(images, other)
