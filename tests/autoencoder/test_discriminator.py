"""The patch discriminator against float64 NumPy, its initial values, and the images that it is too deep for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal
from oracles_adversarial import patch_discriminator
from random_tensors import assert_close

from diffussm_jax.autoencoder.discriminator import PatchDiscriminator, check_size, output_size

# Groups of 4 channels, 32 at most.
NUM_GROUPS = {16: 4, 32: 8, 64: 16, 256: 32, 12: 1}


def random_params(model, shape):
    """Parameters in which norms and biases differ from what they start as."""
    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))["params"]
    rng = np.random.default_rng(0)

    def param(path, leaf):
        if leaf.ndim == 4:
            return rng.normal(size=leaf.shape, scale=np.prod(leaf.shape[:3]) ** -0.5).astype(np.float32)
        return rng.normal(size=leaf.shape, loc="scale" in str(path), scale=0.3).astype(np.float32)

    return jax.tree_util.tree_map_with_path(param, params)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (PatchDiscriminator(width=8), (2, 33, 40, 3)),
        (PatchDiscriminator(width=8, num_layers=2, norm="group"), (3, 16, 17, 3)),
        (PatchDiscriminator(width=6, num_layers=1, norm="group"), (1, 6, 8, 1)),
        (PatchDiscriminator(width=4, num_layers=4), (2, 48, 48, 1)),
    ],
)
def test_values(model, shape):
    params, x = random_params(model, shape), normal(1, *shape)
    num_groups = NUM_GROUPS.get if model.norm == "group" else None
    expected = patch_discriminator(params, x, model.num_layers, num_groups)
    actual = jax.jit(model.apply)({"params": params}, x)
    assert actual.dtype == jnp.float32
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_layers_and_initial_values(norm):
    params = jax.jit(PatchDiscriminator(norm=norm).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    shapes = [params[f"conv_{n}"]["kernel"].shape for n in range(5)]
    assert shapes == [(4, 4, 3, 64), (4, 4, 64, 128), (4, 4, 128, 256), (4, 4, 256, 512), (4, 4, 512, 1)]
    for n in range(5):
        conv = params[f"conv_{n}"]
        np.testing.assert_allclose([conv["kernel"].std(), conv["kernel"].mean()], [0.02, 0], atol=1e-3)
        assert ("bias" in conv) == (norm == "group" or n in (0, 4))
        if "bias" in conv:  # PyTorch's, which taming-transformers leaves as they are
            assert 0.7 < abs(conv["bias"]).max() * np.sqrt(16 * shapes[n][2]) <= 1 or n == 4
    for n in (1, 2, 3):
        scale, bias = params[f"norm_{n}"]["scale"], params[f"norm_{n}"]["bias"]
        np.testing.assert_allclose([scale.mean(), scale.std()], [1, 0.02 if norm == "batch" else 0], atol=5e-3)
        assert not bias.any()
    # pix2pix prints 2.769 M for six channels, which is 3,072 more.
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == 2_765_633 + (128 + 256 + 512 if norm == "group" else 0)


def test_batch_norm_sees_the_whole_batch_and_group_norm_one_image():
    x = normal(0, 3, 16, 16, 1)
    for norm, depends in (("batch", True), ("group", False)):
        model = PatchDiscriminator(width=8, num_layers=2, norm=norm)
        params = random_params(model, x.shape)
        apply = jax.jit(lambda x, m=model, p=params: m.apply({"params": p}, x))
        assert np.allclose(apply(x)[:2], apply(x[[0, 1, 1]])[:2], atol=1e-5) != depends


def test_bfloat16_convolutions_of_float32_parameters():
    x = normal(0, 2, 32, 32, 3)
    logits, gradients = {}, {}
    for dtype in ("float32", "bfloat16"):
        model = PatchDiscriminator(width=16, dtype=dtype)
        params = random_params(model, x.shape)
        apply = jax.jit(jax.value_and_grad(lambda p, x, m=model: jnp.square(m.apply({"params": p}, x)).mean()))
        logits[dtype], gradients[dtype] = apply(params, x)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves([logits, gradients]))
    norm = {d: np.sqrt(sum((np.square(leaf)).sum() for leaf in jax.tree.leaves(gradients[d]))) for d in gradients}
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], rtol=0.05)
    np.testing.assert_allclose(norm["bfloat16"], norm["float32"], rtol=0.05)
    assert logits["bfloat16"] != logits["float32"]


def test_sizes():
    for num_layers in (1, 2, 3):
        model = PatchDiscriminator(width=4, num_layers=num_layers)
        for size in range(4, 36):
            expected = output_size(size, num_layers)
            image = jax.ShapeDtypeStruct((1, size, size + 9, 1), jnp.float32)
            if expected < 1:
                with pytest.raises(ValueError, match=f"num_layers = {num_layers} leaves nothing of {size} pixels"):
                    jax.eval_shape(model.init, jax.random.key(0), image)
            else:
                logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
                assert logits.shape == (1, expected, output_size(size + 9, num_layers), 1)


def test_too_many_layers():
    assert [output_size(size, 3) for size in (256, 32, 24, 16)] == [30, 2, 1, 0]
    for size, num_layers, most in ((16, 3, 2), (23, 3, 2), (47, 5, 3), (11, 2, 1)):
        with pytest.raises(ValueError, match=f"{num_layers} leaves nothing of {size} pixels; at most {most} fit"):
            check_size(size, num_layers)
        check_size(size, most)
    with pytest.raises(ValueError, match="leaves nothing of 5 pixels; images must have at least 6"):
        check_size(5, 1)
    check_size(6, 1)


@pytest.mark.parametrize("wrong", [{"norm": "layer"}, {"dtype": "float16"}, {"num_layers": 0}, {"width": 0}])
def test_wrong_options(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        jax.eval_shape(PatchDiscriminator(**wrong).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
