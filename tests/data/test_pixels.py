"""Records in pixel space: random crops of each kind, and digits of any size."""

import numpy as np
import pytest
from PIL import Image

from diffussm_jax.build_data import DataParts
from diffussm_jax.config import default_config
from diffussm_jax.data import pixels
from diffussm_jax.data.decoding import crop_bytes
from diffussm_jax.data.images import Example
from diffussm_jax.data.pixels import Pixels
from diffussm_jax.data.sources import Digits
from diffussm_jax.data.transforms import random_crop
from diffussm_jax.validation import validate


class OneImage:
    class_names, description = (), "one image"

    def __init__(self, image):
        self.image = image

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Example(self.image, 0, "0")


def crops(image, size, fraction, num):
    records = Pixels(OneImage(image), size, image.shape[-1], is_cropped=False, min_crop_fraction=fraction)
    rng = np.random.default_rng(0)
    return [records.crop_at_random(records[0], rng)["image"] for _ in range(num)]


def test_crops_of_latent_diffusion_are_as_wide_as_the_shorter_side():
    """An image of the crop's height is only moved; nothing is scaled."""
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    places = set()
    for crop in crops(image, 32, 1.0, 100):
        places |= {left for left in range(9) if (image[:, left : left + 32] == crop).all()}
    assert places == set(range(9))
    for crop in crops(image[:, :32], 32, 1.0, 5):  # one place, one size: nothing moves
        np.testing.assert_array_equal(crop, image[:, :32])


def test_crops_keep_the_fraction_that_is_asked_for():
    """Of a gradient from 0 to 250 a crop spans about the fraction of its side."""
    image = np.repeat(np.linspace(0, 250, 64).round().astype(np.uint8)[None, :, None], 64, 0)
    spans = {f: [np.ptp(c.astype(int)) / 250 for c in crops(image, 16, f, 100)] for f in (0.25, 0.8, 1.0)}
    for fraction, found in spans.items():
        assert fraction - 0.1 < min(found) < fraction + 0.05 and 0.9 < max(found) <= 1
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(crops(image, 16, 0.8, 1)[0], random_crop(image, 16, rng))  # the default is ADM's


@pytest.mark.parametrize(("fraction", "largest"), [(1.0, 20), (0.8, 20), (0.25, 64)])
def test_memory_is_reserved_for_the_largest_scale(fraction, largest, monkeypatch):
    reserved = []
    monkeypatch.setattr(pixels, "crop_bytes", lambda w, h, size: reserved.append(size) or crop_bytes(w, h, size))
    crops(np.zeros((8, 8, 1), np.uint8), 16, fraction, 1)
    assert 1.25 * reserved[0] >= largest and reserved[0] >= 16


def test_the_config_chooses_the_crops():
    config = default_config()
    config.data.image_size = 8
    config.data.min_crop_fraction = 1.0
    validate(config, num_devices=1)
    assert DataParts(config).train_records._min_crop_fraction == 1.0
    config.data.min_crop_fraction = 0.0
    with pytest.raises(ValueError, match="config.data.min_crop_fraction must be from 0.01 to 1.0, got 0.0"):
        validate(config, num_devices=1)


def test_digits_are_upsampled_to_the_image_size():
    config = default_config()
    config.data.image_size = 32
    validate(config, num_devices=1)
    records, originals = DataParts(config).train_records, Digits("train")
    images = np.stack([records[i]["image"] for i in range(50)])
    assert images.shape == (50, 32, 32, 1) and images.dtype == np.uint8
    assert [records[i]["label"] for i in range(50)] == [originals[i].label for i in range(50)]
    for i in range(50):
        upsampled = Image.fromarray(originals[i].image[..., 0]).resize((32, 32), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(images[i, ..., 0], np.asarray(upsampled))
