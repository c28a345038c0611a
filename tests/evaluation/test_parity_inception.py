"""The FID Inception agrees with the same network in PyTorch, block by block and as a whole, on random weights.

The PyTorch network is `bench.torch_inception`; its BatchNorm is unfolded. Tolerances are fractions of the largest
value; measured is 2e-6 for blocks and the spatial features, 4e-7 for the features, 1e-6 for the probabilities.
"""

import functools

import jax
import numpy as np
import pytest
from random_tensors import assert_close, random_tensors

from diffussm_jax.evaluation import inception
from diffussm_jax.evaluation.inception import Inception, inception_extractor

torch = pytest.importorskip("torch", reason="parity of Inception needs PyTorch")

from diffussm_jax.bench import bench_inception
from diffussm_jax.bench.torch_inception import TorchInception

TOLERANCE = 1e-5
WHOLE_TOLERANCE = 3e-5
BLOCKS = {
    "Conv2d_1a_3x3": (inception.Conv(32, 3, 2, "VALID"), (19, 21, 3)),
    "Conv2d_2b_3x3": (inception.Conv(64, 3), (10, 12, 32)),
    "Conv2d_4a_3x3": (inception.Conv(192, 3, 1, "VALID"), (9, 9, 80)),
    "Mixed_5b": (inception.BlockA(32), (9, 8, 192)),
    "Mixed_5c": (inception.BlockA(64), (9, 8, 256)),
    "Mixed_6a": (inception.BlockB(), (9, 11, 288)),
    "Mixed_6b": (inception.BlockC(128), (9, 8, 768)),
    "Mixed_6e": (inception.BlockC(192), (5, 8, 768)),
    "Mixed_7a": (inception.BlockD(), (9, 7, 768)),
    "Mixed_7b": (inception.BlockE(False), (5, 4, 1280)),
    "Mixed_7c": (inception.BlockE(True), (5, 4, 2048)),
}


@pytest.fixture(scope="module")
def tensors():
    tensors = random_tensors(inception.tensor_shapes())
    tensors["fc.weight"] *= 0.1  # no class takes all the probability
    return tensors


@pytest.fixture(scope="module")
def reference(tensors):
    network = TorchInception().eval()
    named = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    missing, unexpected = network.load_state_dict(named, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return network


@pytest.fixture(scope="module")
def params(tensors):
    return inception.params_of(tensors)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, reference, params):
    block, shape = BLOCKS[name]
    x = np.random.default_rng(1).standard_normal((2, *shape), np.float32) - 0.5  # pools must not take zeros for padding
    with torch.no_grad():
        expected = getattr(reference, name)(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_close(jax.jit(block.apply)({"params": params[name]}, x), expected, TOLERANCE)


def test_all_kinds_of_blocks_were_compared():
    kinds = {type(block) for block, _ in BLOCKS.values()}
    assert kinds == {inception.Conv, *(getattr(inception, f"Block{letter}") for letter in "ABCDE")}


@functools.cache
def images():
    """Noise, and a smooth image."""
    noise = np.random.default_rng(0).integers(0, 256, (299, 299, 3))
    y, x, c = np.mgrid[:299, :299, :3]
    return np.stack([noise, 127 + 120 * np.sin(x / 9 + y / 31 + c)]).astype(np.uint8)


@pytest.fixture(scope="module")
def outputs(params):
    # Of images of twice the size: TensorFlow 1's resize takes every other pixel, and no other resize does.
    larger = np.random.default_rng(1).integers(0, 256, (2, 598, 598, 3), np.uint8)
    larger[:, ::2, ::2] = images()
    return jax.jit(Inception().apply)({"params": params}, larger)


@pytest.fixture(scope="module")
def expected(reference):
    with torch.no_grad():
        features = reference((torch.from_numpy(images()).permute(0, 3, 1, 2).float() - 128) / 128)
        return {
            "features": features,
            "spatial": reference.spatial,
            "probabilities": reference.probabilities(features),
        }


@pytest.mark.parametrize("name", ["features", "spatial", "probabilities"])
def test_whole(name, outputs, expected):
    assert outputs.keys() == expected.keys()
    # Features differ between images by much more than the tolerance, so that it says something.
    assert np.abs(np.diff(expected[name], axis=0)).max() > 1000 * WHOLE_TOLERANCE * np.abs(expected[name]).max()
    assert_close(outputs[name], expected[name], WHOLE_TOLERANCE)


def test_from_a_file_of_pytorch(reference, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(reference.state_dict(), path)  # with num_batches_tracked, which is ignored
    extractor = inception_extractor(path)
    jax.tree.map(
        np.testing.assert_array_equal,
        extractor.params,
        inception.params_of({name: tensor.numpy() for name, tensor in reference.state_dict().items() if tensor.ndim}),
    )


@pytest.mark.slow
def test_bench_inception():
    ours, theirs = bench_inception(batch_size=1, image_size=32, repeats=1)
    assert (ours["program"], theirs["program"]) == ("jax", "torch")
    assert theirs["difference"] < TOLERANCE
    assert np.isclose(theirs["ratio"], ours["images_per_second"] / theirs["images_per_second"])
