"""LPIPS against float64 NumPy on random weights, its epsilon, and the files that it reads and refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from oracles import normal
from oracles_adversarial import lpips as expected_lpips
from oracles_adversarial import vgg16_maps
from random_tensors import assert_close, random_tensors

from diffussm_jax.autoencoder import lpips
from diffussm_jax.autoencoder.lpips import EPSILON, LPIPS, SHIFT, feature_distance, read_lpips, tensor_shapes
from diffussm_jax.io import file_sha256, weights_hash

BACKBONE = {
    **{f"features.{i}": (64, 64) for i in (0, 2)},
    **{f"features.{i}": (128, 128) for i in (5, 7)},
    **{f"features.{i}": (256, 256) for i in (10, 12, 14)},
    **{f"features.{i}": (512, 512) for i in (17, 19, 21, 24, 26, 28)},
}


@pytest.fixture(scope="module")
def tensors():
    found = random_tensors(tensor_shapes())
    return {name: np.abs(x) * (1 if name.startswith("lin") else np.sign(x)) for name, x in found.items()}


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory):
    """Files of VGG16, with a classifier, and of the heads."""
    folder = tmp_path_factory.mktemp("lpips")
    save(folder / "vgg16.safetensors", tensors, "features", **{"classifier.0.weight": np.zeros((3, 4), np.float32)})
    save(folder / "heads.safetensors", tensors, "lin")
    return folder / "vgg16.safetensors", folder / "heads.safetensors"


def save(path, tensors, prefix, **others):
    named = {name: x for name, x in tensors.items() if name.startswith(prefix)} | others
    if path.suffix == ".npz":
        np.savez(path, **named)
    else:
        safetensors.numpy.save_file(named, path)


@pytest.fixture(scope="module")
def network(files, tmp_path_factory):
    return read_lpips(*files, tmp_path_factory.mktemp("cache"))


def images():
    """A smooth image and noise; and both a little changed."""
    i, j, c = np.mgrid[:32, :32, :3]
    x = np.stack([np.sin(i / 5 + j / 9 + c), np.clip(normal(0, *i.shape), -1, 1)]).astype(np.float32)
    return x, np.clip(x + 0.1 * normal(1, *x.shape), -1, 1)


def test_tensors_are_those_of_torchvision_and_lpips():
    shapes = tensor_shapes()
    assert sum(np.prod(shape) for name, shape in shapes.items() if name.startswith("features")) == 14_714_688
    names = {f"{name}.{kind}" for name in BACKBONE for kind in ("weight", "bias")}
    assert shapes.keys() == names | {f"lin{i}.model.1.weight" for i in range(5)}
    assert shapes["features.5.weight"] == (128, 64, 3, 3) and shapes["lin2.model.1.weight"] == (1, 256, 1, 1)


def ours(f, norm):
    return f / np.sqrt(norm**2 + EPSILON)


def test_values_and_gradients(tensors, network):
    x, y = images()
    first, second = (np.stack(pairs) for pairs in ((*x, y[1], x[0]), (*y, x[1], x[0])))

    def total(x, y, params):
        distances = network.distance(params, x, y)
        return distances.sum(), distances

    both = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, values), (of_first, of_second) = both(first, second, network.params)
    assert values.shape == (4,) and values.dtype == of_first.dtype == of_second.dtype == jnp.float32

    maps_x, maps_y = (vgg16_maps(tensors, z) for z in (x, y))
    assert_close(values[:2], expected_lpips(tensors, maps_x, maps_y, ours), 1e-5)
    assert_close(values[:2], expected_lpips(tensors, maps_x, maps_y, lambda f, norm: f / (norm + 1e-10)), 1e-5)
    direction = y - x
    ahead, behind = (vgg16_maps(tensors, y + step * direction) for step in (1e-4, -1e-4))
    slope = sum(sign * expected_lpips(tensors, maps_x, m, ours).sum() for sign, m in ((1, ahead), (-1, behind))) / 2e-4
    np.testing.assert_allclose((np.float64(of_second[:2]) * direction).sum(), slope, rtol=1e-3)  # ReLU has kinks
    np.testing.assert_allclose(values[2], values[1], rtol=1e-5)
    assert_close(of_first[2], of_second[1], 1e-4)
    assert values[3] < 1e-9 and abs(of_second[3]).max() < 1e-5 * abs(of_second[0]).max()


def test_feature_distance():
    shapes = [(2, 5, 3, 4), (2, 2, 1, 7)]
    f_x, f_y = ([normal(10 * i + j, *shape) for j, shape in enumerate(shapes)] for i in (0, 1))
    heads = [np.abs(normal(20 + i, shape[-1])) for i, shape in enumerate(shapes)]
    terms = []
    for a, b in zip(f_x, f_y, strict=True):
        a, b = (np.float64(f) / np.linalg.norm(np.float64(f), axis=-1, keepdims=True) for f in (a, b))
        terms.append((a - b) ** 2)
    weighted = sum((term @ head).mean((1, 2)) for term, head in zip(terms, heads, strict=True))
    assert_close(feature_distance(f_x, f_y, heads), weighted, 1e-6)
    assert_close(feature_distance(f_x, f_y), sum(term.mean((1, 2, 3)) for term in terms), 1e-6)
    low = feature_distance([jnp.asarray(f, jnp.bfloat16) for f in f_x], f_y, heads)
    assert low.dtype == jnp.float32
    assert_close(low, weighted, 1e-2)


def test_what_epsilon_changes():
    """Little where features are not tiny; and gradients stay finite where they vanish, unlike the original's."""
    ones, f_y = [np.ones(8)], normal(0, 4, 1, 1, 8)
    f_y /= np.linalg.norm(f_y, axis=-1, keepdims=True)
    f_x = np.roll(f_y, 1, -1) * np.array([1, 1e-2, 1e-4, 0], np.float32)[:, None, None, None]  # by their norms
    exact = np.square(np.roll(np.float64(f_y), 1, -1) - f_y).sum((1, 2, 3))
    exact[3] = 1  # a unit vector from nothing
    changes = abs(feature_distance([f_x], [f_y], ones) / exact - 1)
    assert changes[0] < 3e-7 and changes[1] < 1e-4 and changes[2] > 1e-2 and changes[3] < 3e-7

    def gradient(distance):
        return jax.grad(lambda f: distance(f).sum())(f_x)

    def with_norm(norm):
        return lambda f: jnp.square(f / norm(jnp.square(f).sum(-1, keepdims=True)) - f_y)

    largest = abs(gradient(lambda f: feature_distance([f], [f_y], ones))).max()
    assert largest <= 2 * EPSILON**-0.5
    assert np.isnan(gradient(with_norm(lambda squared: jnp.sqrt(squared) + 1e-10))[3]).all()  # the original
    assert abs(gradient(with_norm(lambda squared: jnp.sqrt(squared + 1e-20)))).max() > 1e9  # finite, and no use


def test_gradients_where_features_vanish(monkeypatch):
    """An image that is zero after scaling, and biases of zero: no feature of it is left."""
    monkeypatch.setattr(lpips, "WIDTHS", (8, 8, 16, 16, 16))
    x = images()[0][0]
    constant = np.broadcast_to(np.float32(SHIFT), x.shape)
    first, second = np.stack([constant, x, constant, constant + 1e-7 * x]), np.stack([x, constant, constant, x])

    def total(x, y, params):
        distances = LPIPS().apply(params, x, y)
        return distances.sum(), distances

    params = jax.jit(LPIPS().init)(jax.random.key(0), first, second)  # the initial biases are zero
    (_, values), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(first, second, params)
    assert values[0] > 0.1 and values[1] > 0.1 and values[2] == 0
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    assert abs(gradients[0][3]).max() > 0


def test_weights_are_no_constants_of_the_program(network):
    x, y = images()
    lowered = jax.jit(network.distance).lower(network.params, x, y)
    assert len(lowered.as_text()) < 100_000
    assert sum(p.size for p in jax.tree.leaves(network.params)) == 14_716_160


def test_wrong_images():
    for x, y in (((2, 32, 32, 1),) * 2, ((2, 15, 32, 3),) * 2, ((2, 32, 32, 3), (1, 32, 32, 3)), ((32, 32, 3),) * 2):
        with pytest.raises(ValueError, match=r"\[B, H, W, 3\].*16 x 16") as error:
            jax.eval_shape(LPIPS().init, jax.random.key(0), jnp.zeros(x), jnp.zeros(y))
        assert f"{list(x)} and {list(y)}" in str(error.value)


# Files


def test_conversion_into_the_cache(tensors, network, tmp_path):
    cache, vgg, heads = tmp_path / "cache", tmp_path / "vgg16.npz", tmp_path / "vgg.npz"
    save(vgg, tensors, "features", **{"classifier.6.bias": np.zeros(1000, np.float32)})
    save(heads, tensors, "lin")
    found = read_lpips(vgg, heads, cache)
    assert found.name == "LPIPS" and found.sha256 == network.sha256 == weights_hash(network.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, network.params)
    names = [f"{name}_{file_sha256(file)[:16]}.safetensors" for name, file in (("vgg16", vgg), ("lpips_vgg16", heads))]
    assert sorted(file.name for file in cache.iterdir()) == sorted(names)
    before = [(cache / name).stat().st_mtime_ns for name in names]
    assert read_lpips(*(cache / name for name in names), tmp_path / "none").sha256 == network.sha256
    assert read_lpips(vgg, heads, cache).sha256 == network.sha256
    assert before == [(cache / name).stat().st_mtime_ns for name in names] and not (tmp_path / "none").exists()
    content = bytearray((cache / names[0]).read_bytes())
    content[-1] ^= 1
    (cache / names[0]).write_bytes(content)
    with pytest.raises(ValueError, match=f"{names[0]} is damaged"):
        read_lpips(vgg, heads, cache)


def test_cache_in_the_users_folder(tensors, files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save(tmp_path / "vgg.npz", tensors, "lin")
    read_lpips(files[0], tmp_path / "vgg.npz")
    assert [file.name[:12] for file in (tmp_path / "diffussm_jax/weights").iterdir()] == ["lpips_vgg16_"]


def test_missing_files_say_where_to_get_them(files, tmp_path):
    for pair, words in (
        ((tmp_path / "no.pth", files[1]), "torchvision"),
        ((files[0], tmp_path / "no.pth"), "LPIPS 0.1"),
    ):
        with pytest.raises(FileNotFoundError, match=f"no.pth.*{words}.*https://"):
            read_lpips(*pair, tmp_path)


def refused(pair, *words):
    with pytest.raises(ValueError) as error:
        read_lpips(*pair, pair[0].parent / "cache")
    for word in words:
        assert word in str(error.value), error.value


HEADS = {"AlexNet": (64, 192, 384, 256, 256), "SqueezeNet": (64, 128, 256, 384, 384, 512, 512)}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_another_backbone(name, files, tmp_path):
    heads = {f"lin{i}.model.1.weight": np.ones((1, C, 1, 1), np.float32) for i, C in enumerate(HEADS[name])}
    save(tmp_path / "heads.safetensors", heads, "lin")
    refused((files[0], tmp_path / "heads.safetensors"), "heads.safetensors", "lpips_vgg16", f"shapes of {name}", "lin3")


VGG19 = [(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)]
KERNELS = {
    "AlexNet": (64, 192, 384, 256, 256),
    "VGG19": [width for width, count in VGG19 for _ in range(count)],
    "SqueezeNet": (64, 16),
    "a network with BatchNorm": (64, 64),
}


@pytest.mark.parametrize("name", KERNELS)
def test_another_backbone(name, files, tmp_path):
    kernels = {f"features.{i}.weight": np.ones((C, 1, 1, 1), np.float32) for i, C in enumerate(KERNELS[name])}
    kernels |= {"features.9.squeeze.weight": np.ones((16, 1, 1, 1), np.float32)} if name == "SqueezeNet" else {}
    kernels |= {"features.1.running_mean": np.ones(64, np.float32)} if "BatchNorm" in name else {}
    save(tmp_path / "vgg.safetensors", kernels, "features")
    refused((tmp_path / "vgg.safetensors", files[1]), "vgg.safetensors", "weights of vgg16", f"shapes of {name}")


def test_both_files_swapped(files):
    refused(files[::-1], "does not hold the weights of vgg16", "lin0.model.1.weight")


def test_heads_that_no_distance_has(tensors, files, tmp_path, monkeypatch):
    path = tmp_path / "heads.safetensors"
    save(path, tensors, "lin", **{"lin3.model.1.weight": tensors["lin3.model.1.weight"] - 0.5})
    refused((files[0], path), str(path), "negative", "-0.")
    heads = {name: x for name, x in tensors.items() if name.startswith("lin")}
    monkeypatch.setattr(lpips, "_HEADS_OF_0_0", weights_hash(heads))
    refused(files, str(files[1]), "LPIPS 0.0", "0.1")
