"""The FID Inception without PyTorch: its structure, its weights, and what it refuses.

tests/evaluation/test_parity_inception.py compares values.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from random_tensors import assert_close, random_tensors

from diffussm_jax.evaluation import inception
from diffussm_jax.evaluation.inception import Inception, inception_extractor, params_of, tensor_shapes
from diffussm_jax.evaluation.pretrained import convert


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(tensor_shapes())


@pytest.fixture(scope="module")
def extractor(tensors, tmp_path_factory):
    """From a converted file in the cache."""
    folder = tmp_path_factory.mktemp("inception")
    safetensors.numpy.save_file(tensors, folder / "w.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        with pytest.raises(FileNotFoundError, match="pytorch-fid/releases/download"):
            inception_extractor()
        convert(folder / "w.safetensors", inception.PUBLISHED)
        return inception_extractor()


def shapes_of_outputs(size):
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8)
    outputs, _ = jax.eval_shape(Inception().init_with_output, jax.random.key(0), images)
    return {name: (x.shape, x.dtype) for name, x in outputs.items()}


def test_shapes():
    for size in (32, 299, 512):
        assert shapes_of_outputs(size) == {
            "features": ((2, 2048), np.float32),
            "spatial": ((2, 7 * 17 * 17), np.float32),
            "probabilities": ((2, 1008), np.float32),
        }


def test_the_tensors_are_those_of_pytorch_fid():
    shapes = tensor_shapes()
    assert len(shapes) == 94 * 5 + 2
    assert sum(np.prod(shape) for shape in shapes.values()) == 23_885_392
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_6d.branch7x7dbl_5.conv.weight"] == (192, 160, 1, 7)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["Mixed_7c.branch_pool.bn.running_var"] == (192,)
    assert shapes["fc.weight"] == (1008, 2048) and shapes["fc.bias"] == (1008,)


def test_batch_norm_is_folded(tensors):
    params = params_of(tensors)["Mixed_6b"]["branch7x7_2"]
    x = np.random.default_rng(0).standard_normal((1, 1, 7, 128))
    t = {key: tensors[f"Mixed_6b.branch7x7_2.{key}"].astype(np.float64) for key in ("conv.weight", *NORM)}
    y = np.einsum("bhwi,oihw->bo", x, t["conv.weight"])
    y = (y - t["bn.running_mean"]) / np.sqrt(t["bn.running_var"] + 1e-3) * t["bn.weight"] + t["bn.bias"]
    actual = jax.jit(inception.Conv(128, (1, 7)).apply)({"params": params}, x.astype(np.float32))
    assert_close(actual[:, 0, 3], np.maximum(y, 0), 1e-6)


NORM = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def test_average_pools_do_not_count_padding():
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 2), np.float32) + 3
    expected = np.zeros_like(x)
    for i in range(4):
        for j in range(5):
            expected[:, i, j] = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((1, 2))
    assert_close(inception.average_pool(x), expected, 1e-6)


def test_the_whole_network():
    def run(images):
        return Inception().init_with_output(jax.random.key(0), images)[0]

    text = str(jax.make_jaxpr(run)(jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.uint8)))
    # Products are exact on any device.
    assert text.count("conv_general_dilated[") == 94 and text.count("dot_general[") == 1
    assert text.count("Precision.HIGHEST") == 2 * 95
    # The last block alone has a max pool in its pool branch. An average pool sums ones as well.
    pools = re.findall(r"reduce_window_(max|sum)", text)
    averages = ["sum", "sum"]
    assert pools == ["max"] * 2 + averages * 3 + ["max"] + averages * 4 + ["max"] + averages + ["max"]


def test_extractor(extractor, tensors):
    assert (extractor.name, extractor.distance, extractor.num_channels) == ("inception", "FID", 3)
    assert len(extractor.sha256) == 64
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 40, 3), np.uint8)
    found = extractor(images, batch_size=2)
    assert found["features"].shape == (3, 2048) and found["spatial"].shape == (3, 2023)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, rtol=1e-5)
    logits = found["features"] @ tensors["fc.weight"].T  # without the bias
    expected = np.exp(logits - logits.max(1, keepdims=True))
    assert_close(found["probabilities"], expected / expected.sum(1, keepdims=True), 1e-4)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 64, 64, 3), np.float32), "uint8"),
        (np.full((2, 3, 64, 64), 9, np.uint8), "[N, C, H, W]"),
        (np.full((2, 64, 64, 1), 9, np.uint8), "grayscale|colour"),
        (np.full((64, 64, 3), 9, np.uint8), "[N, H, W, C]"),
        (np.zeros((0, 64, 64, 3), np.uint8), "no images"),
    ],
)
def test_wrong_images(extractor, images, words):
    with pytest.raises(ValueError) as info:
        extractor(images)
    assert any(word in str(info.value) for word in words.split("|"))


def test_the_weights_of_torchvision(tensors, tmp_path):
    path = tmp_path / "inception_v3_google.safetensors"
    others = dict(tensors) | {"fc.weight": np.zeros((1000, 2048), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    for more in ({}, {"AuxLogits.fc.bias": np.zeros(1000, np.float32)}):
        safetensors.numpy.save_file(others | more, path)
        with pytest.raises(ValueError, match=r"torchvision(.|\n)*fc.bias: \(1000,\), not \(1008,\)"):
            inception_extractor(path)
