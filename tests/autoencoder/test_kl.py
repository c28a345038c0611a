"""The KL autoencoder without PyTorch: its size, its parts against NumPy, bfloat16, tiles; see test_parity_vae.py too.

bfloat16 keeps 8 binary digits, and dozens of layers round: outputs of the small model here are within 4 % of the
largest value of float32's, those of the full model were 1.4 % (mean), 0.8 % (log_std) and 1.9 % (images) off.
"""

import dataclasses
import functools
import itertools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.autoencoder import AutoencoderKL, sample_latents, tiled_decode, tiled_encode
from diffussm_jax.autoencoder.first_stage import KLStage
from diffussm_jax.autoencoder.kl import Level, Resample, ResnetBlock
from diffussm_jax.autoencoder.tiling import blend_weights
from diffussm_jax.layers import group_norm

BFLOAT16_RTOL = 0.04
SMOOTH_RTOL = 0.3  # of tiles against the whole, here with random weights; an unrelated image would be at 1.4
SMALL = AutoencoderKL(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)


def param_shapes(model):
    f = model.downsampling
    images = jax.ShapeDtypeStruct((1, f, f, model.in_channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def random_params(model, seed=0):
    return random_params_of(param_shapes(model), seed)


def random_params_of(shapes, seed=0):
    """Parameters of which none, norms' and biases included, is what it starts at."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        spread = 1 / math.sqrt(math.prod(leaf.shape[:-1])) if name == "kernel" else 0.2
        return rng.normal(float(name == "scale"), spread, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


PARAMS = random_params(SMALL)


def images(B=2, H=16, W=24, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (B, H, W, 3)).astype(np.float32)


@functools.cache
def jitted(model, method):
    return jax.jit(lambda params, x: model.apply({"params": params}, x, method=method))


def apply(model, params, x, method):
    return jitted(model, method)(params, x)


def assert_close(actual, expected, rtol):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def test_the_default_is_stable_diffusions():
    model = AutoencoderKL()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(model))) == 83_653_863
    assert model.downsampling == 8 and model.scaling_factor == 0.18215


@pytest.mark.parametrize(
    ("channels", "layers_per_block", "attention_levels"),
    [((8,), 1, (0,)), ((4, 8), 2, ()), ((4, 8, 8, 12), 1, (1, 3))],
)
def test_any_number_of_levels(channels, layers_per_block, attention_levels):
    options = {"latent_channels": 3, "norm_num_groups": 4, "use_quant_conv": False}
    sizes = {"block_out_channels": channels, "layers_per_block": layers_per_block, "attention_levels": attention_levels}
    model = AutoencoderKL(**sizes, **options)
    params = random_params(model)
    assert "quant_conv" not in params and "post_quant_conv" in params
    last = len(channels) - 1
    for coder, blocks, number in (("encoder", "down_blocks", 0), ("decoder", "up_blocks", 1)):
        for i in range(len(channels)):
            names = [name for name in params[coder][f"{blocks}_{i}"] if "attentions" in name]
            has_attention = abs(i - number * last) in attention_levels  # the decoder begins at the last level
            assert len(names) == (layers_per_block + number if has_attention else 0)
    f = model.downsampling
    assert f == 2 ** (len(channels) - 1)
    mean, log_std = apply(model, params, images(2, 2 * f, 3 * f), "encode")
    assert mean.shape == log_std.shape == (2, 2, 3, 3)
    decoded = apply(model, params, mean, "decode")
    assert decoded.shape == (2, 2 * f, 3 * f, 3)
    assert mean.dtype == log_std.dtype == decoded.dtype == jnp.float32


def test_a_level_with_attention():
    level = Level(8, 2, 4, None, jnp.float32, has_attention=True)
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    params = random_params_of(jax.eval_shape(level.init, jax.random.key(0), x)["params"])

    def attend(x, p):
        groups = x.reshape(2, 15, 4, 2).astype(np.float64)
        h = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
        h = h.reshape(2, 15, 8) * p["group_norm"]["scale"] + p["group_norm"]["bias"]
        q, k, v = (h @ p[name]["kernel"] + p[name]["bias"] for name in ("to_q", "to_k", "to_v"))
        weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(8))
        h = weights / weights.sum(-1, keepdims=True) @ v
        return x + (h @ p["to_out_0"]["kernel"] + p["to_out_0"]["bias"]).reshape(x.shape)

    expected = x
    for i in range(2):
        block = ResnetBlock(8, 4, jnp.float32).apply({"params": params[f"resnets_{i}"]}, jnp.float32(expected))
        expected = attend(np.asarray(block), params[f"attentions_{i}"])
    assert_close(jax.jit(level.apply)({"params": params}, x), expected, 1e-5)


@pytest.mark.parametrize("tap", [(0, 0), (1, 1), (2, 1), (2, 2)])
def test_halving_pads_behind_only(tap):
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 1)).astype(np.float32)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[tap] = 1
    params = {"conv": {"kernel": kernel, "bias": np.zeros(1)}}
    actual = Resample(False, jnp.float32).apply({"params": params}, x)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    np.testing.assert_array_equal(actual, padded[:, tap[0] :: 2, tap[1] :: 2][:, :3, :2])


def test_doubling_repeats_pixels():
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 1)).astype(np.float32)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    actual = Resample(True, jnp.float32).apply({"params": {"conv": {"kernel": kernel, "bias": np.zeros(1)}}}, x)
    np.testing.assert_array_equal(actual, np.kron(x, np.ones((1, 2, 2, 1))))


@pytest.mark.parametrize(("dtype", "mean", "std"), [("float32", 1000, 1), ("bfloat16", 300, 8), ("float32", 0, 1)])
def test_norms_are_float32_and_bear_a_large_mean(dtype, mean, std):
    x = jnp.asarray(np.random.default_rng(0).normal(mean, std, (2, 16, 16, 8)), dtype)
    scale, bias = np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8)
    params = {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}
    groups = np.asarray(x, np.float64).reshape(2, 256, 2, 4)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    actual = jax.jit(group_norm(2).apply)({"params": params}, x)
    assert actual.dtype == jnp.float32
    assert_close(actual, expected.reshape(x.shape) * scale + bias, 1e-4)


def test_log_std_is_half_the_clipped_log_variance():
    params = jax.tree.map(np.zeros_like, PARAMS)
    params["quant_conv"]["bias"] = np.array([1, 2, 3, 4, -100, 100, 0, 3], np.float32)
    mean, log_std = apply(SMALL, params, images(), "encode")
    np.testing.assert_array_equal(mean[0, 0, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(log_std[1, 2, 3], [-15, 10, 0, 1.5])


def test_samples_have_the_mean_and_the_deviation():
    mean, log_std = np.full((64, 16, 16, 1), 3.0, np.float32), np.full((64, 16, 16, 1), -1.0, np.float32)
    sample = np.asarray(jax.jit(sample_latents)(mean, log_std, jax.random.key(0)))
    assert abs(sample.mean() - 3) < 4 * math.exp(-1) / 128
    assert abs(sample.std() - math.exp(-1)) < 4 * math.exp(-1) / 128 / math.sqrt(2)
    np.testing.assert_array_equal(jax.jit(sample_latents)(mean, np.full_like(mean, -np.inf), jax.random.key(0)), mean)


def test_bfloat16_is_near_float32():
    half = SMALL.clone(dtype=jnp.bfloat16)
    expected = apply(SMALL, PARAMS, images(), "encode")
    actual = apply(half, PARAMS, images(), "encode")
    expected += (apply(SMALL, PARAMS, expected[0], "decode"),)
    actual += (apply(half, PARAMS, expected[0], "decode"),)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float32 and jnp.any(a != e)
        assert_close(a, e, BFLOAT16_RTOL)


def test_bfloat16_holds_for_convs_but_not_for_norms_and_last_layers():
    half = SMALL.clone(dtype=jnp.bfloat16, attention_levels=(1,))
    params = param_shapes(half)

    def is_layer(module, method):
        return method == "__call__" and isinstance(module, nn.GroupNorm | nn.Conv | nn.Dense)

    _, state = jax.eval_shape(
        lambda p, x: half.apply({"params": p}, x, capture_intermediates=is_layer, mutable=["intermediates"]),
        params,
        images(),
    )
    outputs = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    dtypes = {path[:-2]: leaf.dtype for path, leaf in outputs if path[-2].key == "__call__"}
    assert dtypes.keys() == {path[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for path, dtype in dtypes.items():
        name = path[-1].key
        is_float32 = "norm" in name or name in ("conv_out", "quant_conv", "post_quant_conv")
        assert dtype == (jnp.float32 if is_float32 else jnp.bfloat16), path


def test_the_last_convolutions_input_can_be_had():
    x = images(1, 8, 12)
    variables = {"params": PARAMS}
    found, state = jax.jit(lambda x: SMALL.apply(variables, x, mutable="intermediates"))(x)
    (last_input,) = state["intermediates"]["decoder"]["conv_out_input"]
    kernel, bias = (PARAMS["decoder"]["conv_out"][name] for name in ("kernel", "bias"))
    expected = sum(
        np.pad(last_input, ((0, 0), (1, 1), (1, 1), (0, 0)))[:, i : i + 8, j : j + 12] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    assert_close(found, expected + bias, 1e-5)
    np.testing.assert_array_equal(found, apply(SMALL, PARAMS, x, None))
    assert len(jax.make_jaxpr(lambda x: SMALL.apply(variables, x))(x).out_avals) == 1


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_gradients_reach_every_parameter(dtype):
    sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "attention_levels": (1,)}
    model = AutoencoderKL(**sizes, dtype=jnp.dtype(dtype))
    x = images(2, 8, 12)

    def loss(params):
        mean, log_std = model.apply({"params": params}, x, method="encode")
        latents = sample_latents(mean, log_std, jax.random.key(1))
        return jnp.mean((model.apply({"params": params}, latents, method="decode") - x) ** 2)

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(random_params(model))):
        assert gradient.dtype == jnp.float32 and np.all(np.isfinite(gradient)), path
        # Moving all keys by the same vector changes no softmax.
        assert np.any(np.asarray(gradient)) or path[-2].key == "to_k", path


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 18, 16, 3), "float32", r"multiples of 4 .*got H = 18, W = 16"),
        ((1, 16, 17, 3), "float32", r"multiples of 4 .*got H = 16, W = 17"),
        ((1, 0, 16, 3), "float32", r"got H = 0"),
        ((1, 16, 16, 4), "float32", r"\[B, H, W, 3\] of floats, got float32 \[1, 16, 16, 4\]"),
        ((16, 16, 3), "float32", r"got float32 \[16, 16, 3\]"),
        ((1, 16, 16, 3), "uint8", r"of floats, got uint8"),
    ],
)
def test_images_of_a_wrong_shape(shape, dtype, message):
    for encode in (lambda x: SMALL.apply({"params": PARAMS}, x, method="encode"), lambda x: tiled_encode(SMALL, {}, x)):
        with pytest.raises(ValueError, match=message):
            encode(jnp.zeros(shape, dtype))


def test_latents_of_a_wrong_shape():
    for decode in (lambda x: SMALL.apply({"params": PARAMS}, x, method="decode"), lambda x: tiled_decode(SMALL, {}, x)):
        with pytest.raises(ValueError, match=r"latents must be \[B, H, W, 4\] of floats, got float32 \[1, 4, 4, 3\]"):
            decode(jnp.zeros((1, 4, 4, 3)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"block_out_channels": (8, 12), "norm_num_groups": 8},
            r"divide each of block_out_channels, got 8 and \(8, 12\)",
        ),
        ({"block_out_channels": ()}, r"got 32 and \(\)"),
        ({"dtype": jnp.float16}, r"one of float32, bfloat16, got float16"),
        *[
            (
                {"attention_levels": levels},
                f"attention_levels must be levels from 0 .* to 3,.* got {re.escape(str(levels))}",
            )
            for levels in ((4,), (-1,), (3, 1), (2, 2), ("3",), (True,), (1.0,))
        ],
    ],
)
def test_models_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(AutoencoderKL(**fields).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("levels", [(2,), (1, 0), ("0",)])
def test_stages_name_the_key_of_wrong_levels(levels):
    stage = KLStage(block_out_channels=(32, 64), attention_levels=levels)
    with pytest.raises(ValueError, match=r"config\.task\.autoencoder\.attention_levels must be levels from 0 .* to 1,"):
        stage.check()
    good = KLStage(block_out_channels=(32, 64), attention_levels=(0, 1))
    good.check()
    assert good.model.attention_levels == (0, 1)


# Tiles.

TRACES = []


@dataclasses.dataclass(frozen=True)
class Blocks:
    """In place of an autoencoder, one without borders: each latent is the mean of 4 x 4 pixels, and no more."""

    in_channels: int = 3
    latent_channels: int = 3
    downsampling: int = 4

    def apply(self, variables, x, *, method):
        TRACES.append((method, x.shape))
        B, H, W, C = x.shape
        if method == "decode":
            return x.repeat(4, 1).repeat(4, 2) + variables["params"]
        mean = x.reshape(B, H // 4, 4, W // 4, 4, C).mean((2, 4)) + variables["params"]
        return mean, -2 * mean


@dataclasses.dataclass(frozen=True)
class TileMeans(Blocks):
    """Every output is the mean of the whole tile, so that the blending is seen bare."""

    def apply(self, variables, x, *, method):
        mean = jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)
        return super().apply(variables, mean, method=method)


@pytest.mark.parametrize("size", [8, 9, 10, 13, 31, 40])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [1, 4])
def test_blend_weights_sum_to_one(size, overlap, scale):
    starts, weights = blend_weights(size, 8, overlap, scale)
    assert starts[0] == 0 and starts[-1] == size - 8 and weights.shape == (len(starts), 8 * scale)
    assert all(0 < b - a <= max(1, 8 - round(8 * overlap)) for a, b in itertools.pairwise(starts))
    total = np.zeros(size * scale)
    for start, w in zip(starts, weights, strict=True):
        total[start * scale : (start + 8) * scale] += w
    assert weights.min() > 0
    np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.parametrize(("H", "W"), [(64, 64), (36, 100), (16, 44), (68, 32)])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.6])
def test_tiles_of_a_local_model_leave_no_trace(H, W, overlap):
    x, model = images(2, H, W), Blocks()
    expected = model.apply({"params": 0.5}, x, method="encode")
    actual = tiled_encode(model, 0.5, x, tile=32, overlap=overlap)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5), actual, expected)
    decoded = tiled_decode(model, 0.5, expected[0], tile=8, overlap=overlap)
    np.testing.assert_allclose(
        decoded, model.apply({"params": 0.5}, expected[0], method="decode"), rtol=1e-5, atol=1e-5
    )


def test_tiles_blend_linearly():
    # Two tiles of 8 columns that share 4: latents 0 ... 7 and 4 ... 11, whose means are 3.5 and 7.5.
    latents = jnp.broadcast_to(jnp.arange(12.0)[:, None], (1, 8, 12, 3))
    decoded = tiled_decode(TileMeans(), 0.0, latents, tile=8, overlap=0.5)
    pixels = np.arange(48) + 0.5
    np.testing.assert_allclose(decoded[0, 5, :, 1], np.interp(pixels, [16, 32], [3.5, 7.5]), rtol=1e-6)


def test_one_program_serves_all_tiles_of_all_images():
    model = Blocks(downsampling=4)
    TRACES.clear()
    for H, W in ((100, 100), (40, 72), (200, 44)):
        tiled_encode(model, jnp.zeros(()), images(1, H, W), tile=40, overlap=0.3)
        tiled_decode(model, jnp.zeros(()), images(1, H, W), tile=40, overlap=0.3)
    assert TRACES == [("encode", (1, 40, 40, 3)), ("decode", (1, 40, 40, 3))]


def test_an_image_of_one_tile_is_encoded_whole():
    x = images(2, 16, 24)
    whole = apply(SMALL, PARAMS, x, "encode")
    jax.tree.map(np.testing.assert_array_equal, tiled_encode(SMALL, PARAMS, x, tile=24), whole)
    decoded = tiled_decode(SMALL, PARAMS, whole[0], tile=6)
    np.testing.assert_array_equal(decoded, apply(SMALL, PARAMS, whole[0], "decode"))


def test_tiles_of_a_smooth_image_are_near_the_whole():
    row, column = np.meshgrid(np.linspace(0, 40, 96), np.linspace(0, 50, 112), indexing="ij")
    x = jnp.float32(np.stack([np.sin(row), np.cos(column), np.sin(row + column)], -1))[None]
    whole = apply(SMALL, PARAMS, x, "encode")
    tiled = tiled_encode(SMALL, PARAMS, x, tile=64, overlap=0.25)
    for actual, expected in zip(tiled, whole, strict=True):
        assert actual.shape == expected.shape and jnp.any(actual != expected)
        assert error(actual, expected) < SMOOTH_RTOL
    decoded = tiled_decode(SMALL, PARAMS, whole[0], tile=16, overlap=0.25)
    expected = apply(SMALL, PARAMS, whole[0], "decode")
    assert decoded.shape == expected.shape == (1, 96, 112, 3)
    assert error(decoded, expected) < SMOOTH_RTOL


def error(actual, expected):
    """Root mean square, as a fraction of the expected values' deviation."""
    return np.sqrt(np.mean((np.asarray(actual) - expected) ** 2)) / np.std(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 30}, "tile must be a positive multiple of 4, got 30"),
        ({"tile": 0}, "tile must be a positive multiple of 4, got 0"),
        ({"tile": -4}, "got -4"),
        ({"tile": 32.5}, "got 32.5"),
        ({"tile": 32, "overlap": 1}, "0 <= overlap < 1, got 1"),
        ({"tile": 32, "overlap": -0.1}, "0 <= overlap < 1, got -0.1"),
        ({"tile": 32, "overlap": math.nan}, "0 <= overlap < 1, got nan"),
    ],
)
def test_tiles_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiled_encode(SMALL, PARAMS, images(), **arguments)
    if arguments["tile"] != 30:
        with pytest.raises(ValueError, match=message.replace("of 4", "of 1")):
            tiled_decode(SMALL, PARAMS, jnp.zeros((1, 8, 8, 4)), **arguments)
