"""DINOv2 without PyTorch: its structure, both layouts of its weights, and what it refuses.

tests/evaluation/test_parity_dinov2.py compares values.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from random_tensors import assert_close, random_tensors

from diffussm_jax.evaluation import dinov2
from diffussm_jax.evaluation.dinov2 import DINOv2, dinov2_extractor, tensor_shapes
from diffussm_jax.evaluation.pretrained import convert, read_published

SMALL = DINOv2(width=48, depth=2, num_heads=4)
TENSORS = random_tensors(tensor_shapes(SMALL))


def meta_layout():
    """Written here anew: the same tensors as Meta's files have them."""
    E, tensors = "embeddings.", TENSORS
    found = {
        "cls_token": tensors[E + "cls_token"],
        "pos_embed": tensors[E + "position_embeddings"],
        "mask_token": np.zeros((1, 48), np.float32),
        "norm.weight": tensors["layernorm.weight"],
        "norm.bias": tensors["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = tensors[f"{E}patch_embeddings.projection.{kind}"]
    for i in range(2):
        a, b = f"encoder.layer.{i}.", f"blocks.{i}."
        for k in (1, 2):
            found[f"{b}ls{k}.gamma"] = tensors[f"{a}layer_scale{k}.lambda1"]
        for kind in ("weight", "bias"):
            qkv = [tensors[f"{a}attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            found[f"{b}attn.qkv.{kind}"] = np.concatenate(qkv)
            found[f"{b}attn.proj.{kind}"] = tensors[f"{a}attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{b}{name}.{kind}"] = tensors[f"{a}{name}.{kind}"]
    return found


LAYOUTS = {
    "transformers": TENSORS | {"embeddings.mask_token": np.zeros((1, 48), np.float32)},
    "transformers, with a head": {f"dinov2.{name}": tensor for name, tensor in TENSORS.items()},
    "meta": meta_layout(),
}


def test_the_tensors_of_the_large_one():
    shapes = tensor_shapes(DINOv2())
    assert sum(np.prod(shape) for shape in shapes.values()) == 304_367_616  # the mask token has 1,024 more
    assert shapes["encoder.layer.23.mlp.fc1.weight"] == (4096, 1024)
    assert shapes["embeddings.position_embeddings"] == (1, 1370, 1024)
    assert shapes["embeddings.patch_embeddings.projection.weight"] == (1024, 3, 14, 14)
    assert shapes == dinov2.PUBLISHED.tensor_shapes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_the_same_weights(layout, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(LAYOUTS[layout], path)
    tensors, _ = read_published(dinov2.published(SMALL), path)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, TENSORS[name])


def test_extractor(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="facebook/dinov2-large"):
        dinov2_extractor(model=SMALL)
    safetensors.numpy.save_file(meta_layout(), tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", dinov2.published(SMALL))
    extractor = dinov2_extractor(model=SMALL)
    assert (extractor.name, extractor.distance, extractor.num_channels) == ("dinov2", "FD-DINOv2", 3)
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    found = extractor(images, batch_size=2)
    assert found.keys() == {"features"} and found["features"].shape == (3, 48)
    assert np.abs(found["features"][0] - found["features"][1]).max() > 0.01
    assert_close(extractor(images)["features"], found["features"], 1e-5)
    for wrong, word in ((images / 255, "uint8"), (images[..., :1], "colour")):
        with pytest.raises(ValueError, match=word):
            extractor(wrong)


def test_positions_are_those_of_the_table_where_sizes_agree():
    table = jnp.arange(37 * 37 * 2.0).reshape(-1, 2)
    np.testing.assert_array_equal(dinov2.resize_positions(table, 37), table)


def position_by_loops(column, i):
    """Entry i of 16 of a column of 37: cubic convolution with a = -3/4 at (i + 1/2) 37 / 16.1 - 1/2."""
    position, total = (i + 0.5) * 37 / 16.1 - 0.5, 0
    for j in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
        d = abs(position - j)
        weight = 1.25 * d**3 - 2.25 * d**2 + 1 if d < 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        total += weight * column[min(max(j, 0), 36)]
    return total


def test_positions_by_hand():
    column, row = np.random.default_rng(0).standard_normal((2, 37, 1), np.float32)
    found = dinov2.resize_positions((column[:, None] * row).reshape(-1, 1), 16).reshape(16, 16)
    expected = np.outer(*([position_by_loops(x[:, 0], i) for i in range(16)] for x in (column, row)))
    assert_close(found, expected, 1e-5)


def test_products_are_exact_on_any_device():
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    text = str(jax.make_jaxpr(lambda x: SMALL.init_with_output(jax.random.key(0), x)[0])(images))
    products = text.count("conv_general_dilated[") + text.count("dot_general[")
    assert products == 2 + 1 + 2 + 8 == text.count("Precision.HIGHEST") / 2


@pytest.mark.parametrize(("width", "words"), [(384, "ViT-S/14"), (768, "ViT-B/14"), (1536, "ViT-g/14")])
def test_other_sizes(width, words, tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {"cls_token": np.zeros((1, 1, width), np.float32), "pos_embed": np.zeros((1, 1370, width), np.float32)}
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"{words}(.|\n)*cls_token: \(1, 1, {width}\), not \(1, 1, 1024\)"):
        dinov2_extractor(path)


def test_registers(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(meta_layout() | {"register_tokens": np.zeros((1, 4, 48), np.float32)}, path)
    with pytest.raises(ValueError, match="registers"):
        dinov2_extractor(path, model=SMALL)
