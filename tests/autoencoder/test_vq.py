"""The vector-quantized autoencoder without PyTorch: lookup, losses and codebook against NumPy float64; see
test_parity_vq.py too."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.autoencoder import VQModel, init_params, sample_latents, tiled_decode, vq
from diffussm_jax.autoencoder.vq import (
    Quantizer,
    codebook_losses,
    codebook_usage,
    init_codebook_state,
    nearest_codes,
    straight_through,
    update_codebook,
)

SMALL = VQModel(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, num_vq_embeddings=24)
DECAY = 0.9


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def small_params():
    return init_params(SMALL, seed=0)


@functools.cache
def jitted(method):
    return jax.jit(lambda params, x: SMALL.apply({"params": params}, x, method=method))


def apply(x, method, params=None):
    return jitted(method)(small_params() if params is None else params, x)


def squared_distances(z, codebook):
    return np.sum((np.float64(z)[..., None, :] - np.float64(codebook)) ** 2, -1)


def test_the_default_is_latent_diffusions_vq_f4():
    model = VQModel()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 55_322_782
    assert model.downsampling == 4 and shapes["quantize"]["embedding"].shape == (8192, 3)


@pytest.mark.parametrize("channels", [(8,), (4, 4, 8, 8, 12)])
def test_any_number_of_levels(channels):
    model = VQModel(block_out_channels=channels, layers_per_block=1, norm_num_groups=4, latent_channels=5)
    f = model.downsampling
    x = jnp.zeros((2, 2 * f, 3 * f, 3))
    (latents, log_std), images = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, method=lambda m, x: (m.encode(x), m(x)))[0], x
    )
    assert f == 2 ** (len(channels) - 1)
    assert latents.shape == log_std.shape == (2, 2, 3, 5) and images.shape == x.shape
    assert latents.dtype == log_std.dtype == images.dtype == jnp.float32


def test_the_codebook_starts_uniform():
    variables = Quantizer(1000).init(jax.random.key(3), jnp.zeros((1, 1, 1, 3)))
    codebook = np.asarray(variables["params"]["embedding"])
    assert codebook.shape == (1000, 3) and codebook.dtype == np.float32
    assert 0.99e-3 < codebook.max() <= 1e-3 and -1e-3 <= codebook.min() < -0.99e-3
    assert abs(codebook.mean()) < 4e-3 / math.sqrt(12 * 3000) * 2
    np.testing.assert_allclose(codebook.std(), 1e-3 / math.sqrt(3), rtol=0.05)


def test_a_call_encodes_quantizes_and_decodes():
    x = np.tanh(normal(2, 8, 12, 3))

    @jax.jit
    def run(params):
        def apply(x, method=None):
            return SMALL.apply({"params": params}, x, method=method)

        latents, log_std = apply(x, "encode")
        quantized = apply(latents, "quantize")
        decoded = apply(latents, "decode"), apply(quantized.latents, "decode_quantized"), apply(x)
        return latents, log_std, quantized, decoded, apply(latents, "decode_quantized")

    latents, log_std, (quantized, indices), (decoded, *others), without_lookup = run(small_params())
    np.testing.assert_array_equal(log_std, np.full((2, 4, 6, 3), -15, np.float32))
    # Latents drawn from the Gaussian are the latents, to float16's precision and far below.
    np.testing.assert_allclose(sample_latents(latents, log_std, jax.random.key(0)), latents, atol=3e-6, rtol=0)
    assert indices.dtype == jnp.int32 and indices.shape == (2, 4, 6) and quantized.dtype == jnp.float32
    np.testing.assert_array_equal(quantized, np.asarray(small_params()["quantize"]["embedding"])[indices])
    for other in others:
        np.testing.assert_allclose(other, decoded, atol=1e-5, rtol=0)
    assert np.abs(without_lookup - decoded).max() > 1e-3


@pytest.mark.parametrize(("num_codes", "block"), [(1, 1024), (50, 1024), (50, 16), (48, 16), (50, 1)])
def test_the_nearest_code(num_codes, block, monkeypatch):
    monkeypatch.setattr(vq, "_CODES_AT_A_TIME", block)
    z, codebook = normal(3, 5, 7, 4), normal(num_codes, 4, seed=1)
    found = jax.jit(nearest_codes)(z, codebook)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, squared_distances(z, codebook).argmin(-1))


def test_latents_far_from_small_codes_are_told_apart():
    # As at the start of training: distances of about 30 that differ in the fourth digit.
    z, codebook = 3 * normal(4000, 3), np.random.default_rng(1).uniform(-1 / 512, 1 / 512, (512, 3)).astype(np.float32)
    distances = squared_distances(z, codebook)
    found = np.asarray(jax.jit(nearest_codes)(z, codebook))
    chosen = np.take_along_axis(distances, found[:, None], 1)[:, 0]
    assert np.mean(found == distances.argmin(-1)) > 0.999
    rounding = 1e-6 * (np.linalg.norm(z, axis=-1) + 2e-3) * 4e-3
    assert np.all(chosen - distances.min(-1) <= rounding)


@pytest.mark.parametrize("block", [1024, 2])
def test_of_equal_codes_the_first_is_taken(block, monkeypatch):
    monkeypatch.setattr(vq, "_CODES_AT_A_TIME", block)
    codebook = np.float32([[5, 5], [1, 0], [0, 1], [1, 0], [-1, 0]])
    z = np.float32([[2, 0], [1, 1], [0, 0], [np.nan, 0], [5, 4]])
    np.testing.assert_array_equal(jax.jit(nearest_codes)(z, codebook), [1, 1, 1, 0, 0])


def test_not_a_number_stays_visible():
    latents = normal(1, 2, 2, 3)
    latents[0, 0, 0, 0] = np.nan
    assert np.isnan(apply(latents, "decode")).any()


def test_bfloat16_latents_are_compared_in_float32():
    z, codebook = jnp.asarray(normal(200, 3), jnp.bfloat16), normal(64, 3, seed=1) / 100
    found = jax.jit(nearest_codes)(z, codebook)
    np.testing.assert_array_equal(found, squared_distances(np.float32(z), codebook).argmin(-1))


def test_where_gradients_go():
    z, weights = normal(2, 3, 4, 3), normal(2, 3, 4, 3, seed=1)
    codebook = normal(24, 3, seed=2)
    k = squared_distances(z, codebook).argmin(-1)

    def of(loss):
        def with_codebook(z, codebook):
            z_q = SMALL.apply({"params": {"quantize": {"embedding": codebook}}}, z, method="quantize").latents
            return loss(z, z_q)

        return jax.grad(with_codebook, (0, 1))(z, codebook)

    def summed(x):  # over the latents of each code
        total = np.zeros_like(codebook)
        np.add.at(total, k, x)
        return total

    error = 2 * (z - codebook[k]) / z.size
    decoded, codebook_term, commitment = jax.jit(
        lambda: (
            of(lambda z, z_q: jnp.sum(weights * straight_through(z, z_q))),
            of(lambda z, z_q: codebook_losses(z, z_q)[0]),
            of(lambda z, z_q: codebook_losses(z, z_q)[1]),
        )
    )()
    for found, expected in [
        (decoded, (weights, 0 * codebook)),
        (codebook_term, (0 * z, -summed(error))),
        (commitment, (error, 0 * codebook)),
    ]:
        for actual, e in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual, e, rtol=1e-5, atol=1e-7)


def test_codebook_losses_are_means_in_float32():
    z, z_q = normal(2, 3, 4, 3), normal(2, 3, 4, 3, seed=1)
    expected = np.mean((np.float64(z) - z_q) ** 2)
    for found in codebook_losses(z, z_q):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert all(x.dtype == jnp.float32 for x in codebook_losses(jnp.bfloat16(z), jnp.bfloat16(z_q)))


@pytest.mark.parametrize(
    ("indices", "usage", "perplexity"),
    [
        (np.zeros((2, 3, 4), int), 1 / 8, 1),
        (np.arange(8).repeat(5).reshape(2, 4, 5), 1, 8),
        ([2, 2, 7, 7], 2 / 8, 2),
        ([0, 1, 1, 1], 2 / 8, 4 * 3**-0.75),  # exp of ln 4 / 4 + 3 ln (4/3) / 4
    ],
)
def test_usage_and_perplexity(indices, usage, perplexity):
    found = codebook_usage(jnp.asarray(indices), 8)
    np.testing.assert_allclose(found, (usage, perplexity), rtol=1e-6)
    assert found.usage.dtype == found.perplexity.dtype == jnp.float32


def numpy_update(codebook, sizes, sums, z, indices):
    """One step of the moving averages, code by code, in float64; nothing is revived."""
    sizes, sums, new = np.array(sizes), np.array(sums), np.empty_like(codebook)
    for k in range(len(codebook)):
        mine = z[indices == k]
        sizes[k] = DECAY * sizes[k] + (1 - DECAY) * len(mine)
        sums[k] = DECAY * sums[k] + (1 - DECAY) * mine.sum(0)
    total = sizes.sum()
    for k in range(len(codebook)):
        new[k] = sums[k] / ((sizes[k] + 1e-5) / (total + len(codebook) * 1e-5) * total)
    return new, sizes, sums


update = jax.jit(functools.partial(update_codebook, decay=DECAY), static_argnames="min_usage")


def test_the_moving_average():
    codebook = normal(6, 3)
    found, state = codebook, init_codebook_state(codebook)
    assert state.sums is not codebook
    expected, sizes, sums = np.float64(codebook), np.ones(6), np.float64(codebook)
    for step in range(30):
        z = normal(2, 4, 5, 3, seed=step) + 1
        indices = np.random.default_rng(step).integers(0, 5, (2, 4, 5))  # code 5 is never used
        found, state = update(found, state, z, indices, min_usage=0.0, key=jax.random.key(step))
        expected, sizes, sums = numpy_update(expected, sizes, sums, np.float64(z), indices)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.sizes, sizes, rtol=1e-5)
    np.testing.assert_allclose(state.sums, sums, rtol=1e-5, atol=1e-6)


def test_codes_hardly_used_start_again_at_latents_of_the_batch():
    codebook = normal(6, 3)
    state = init_codebook_state(codebook)._replace(sizes=jnp.float32([4, 0.1, 4, 0.4, 4, 0.6]))
    z, indices = normal(40, 3, seed=1), np.random.default_rng(2).choice([0, 2, 4], 40)
    expected, sizes, _ = numpy_update(np.float64(codebook), state.sizes, state.sums, np.float64(z), indices)
    found, new = update(codebook, state, z, indices, min_usage=0.5, key=jax.random.key(0))
    dead = sizes < 0.5
    np.testing.assert_array_equal(dead, [False, True, False, True, False, False])
    np.testing.assert_allclose(found[~dead], expected[~dead], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.sizes, np.where(dead, sizes.mean(), sizes), rtol=1e-5)
    rows = [np.flatnonzero((z == code).all(-1)) for code in np.asarray(found)[dead]]
    assert all(len(row) == 1 for row in rows) and rows[0] != rows[1]
    np.testing.assert_allclose(new.sums[dead], sizes.mean() * np.asarray(found)[dead], rtol=1e-5)
    # The next step moves them from there: they are neither dead at once nor back where they were.
    again, after = update(found, new, z, indices, min_usage=0.5, key=jax.random.key(1))
    np.testing.assert_allclose(again[dead], np.asarray(found)[dead], rtol=1e-4)
    assert np.all(np.asarray(after.sizes)[dead] > 0.5)


@pytest.mark.parametrize("num_latents", [1, 4, 30])
def test_many_codes_start_again_at_few_latents(num_latents):
    z = normal(num_latents, 2, seed=1)
    codebook = normal(10, 2)
    state = init_codebook_state(codebook)
    found, _ = update(codebook, state, z, np.zeros(num_latents, int), min_usage=1e3, key=jax.random.key(0))
    rows = np.argmax((np.asarray(found)[:, None] == z).all(-1), 1)
    np.testing.assert_array_equal(z[rows], found)
    assert len(set(rows)) == min(10, num_latents)


def test_a_codebook_that_follows_its_latents_comes_to_use_all_codes():
    # Clusters far from the codes: by the moving average alone one code would take all, for ever.
    centres = jnp.asarray(5 + 3 * normal(16, 2))
    codebook = np.random.default_rng(0).uniform(-1 / 16, 1 / 16, (16, 2)).astype(np.float32)

    @jax.jit
    def train(min_usage):
        def step(carry, key):
            keys = jax.random.split(key, 3)
            z = centres[jax.random.randint(keys[0], 256, 0, 16)] + 0.05 * jax.random.normal(keys[1], (256, 2))
            indices = nearest_codes(z, carry[0])
            options = {"decay": DECAY, "min_usage": min_usage, "key": keys[2]}
            return update_codebook(*carry, z, indices, **options), codebook_usage(indices, 16)

        carry = jnp.asarray(codebook), init_codebook_state(codebook)
        _, usages = jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), 150))
        return usages.usage[-1], usages.perplexity[-1]

    usage, perplexity = train(4.0)
    assert usage > 0.9 and perplexity > 12
    assert train(0.0)[0] < 0.5


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 9, 8, 3), r"multiples of 2 .*got H = 9, W = 8"),
        ("encode", (1, 8, 8, 1), r"images must be \[B, H, W, 3\] of floats, got float32 \[1, 8, 8, 1\]"),
        ("quantize", (1, 4, 4, 4), r"latents must be \[B, H, W, 3\] of floats, got float32 \[1, 4, 4, 4\]"),
        ("decode", (1, 4, 4, 4), r"latents must be \[B, H, W, 3\] of floats, got float32 \[1, 4, 4, 4\]"),
        ("decode_quantized", (4, 4, 3), r"got float32 \[4, 4, 3\]"),
    ],
)
def test_arrays_of_a_wrong_shape(method, shape, message):
    with pytest.raises(ValueError, match=message):
        SMALL.apply({"params": small_params()}, jnp.zeros(shape), method=method)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_vq_embeddings": 0}, "num_vq_embeddings must be positive, got 0"),
        ({"norm_num_groups": 3}, r"got 3 and \(4, 8\)"),
        ({"dtype": jnp.float16}, "one of float32, bfloat16, got float16"),
    ],
)
def test_models_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SMALL.clone(**fields).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_tiles_are_quantized_too():
    latents = normal(1, 4, 4, 3)
    np.testing.assert_allclose(
        tiled_decode(SMALL, small_params(), latents, tile=4), apply(latents, "decode"), atol=1e-5, rtol=0
    )


def test_bfloat16_keeps_latents_and_codebook_in_float32():
    half = SMALL.clone(dtype=jnp.bfloat16)
    x = np.tanh(normal(1, 8, 8, 3))
    latents, _ = jax.jit(lambda x: half.apply({"params": small_params()}, x, method="encode"))(x)
    decoded = jax.jit(lambda z: half.apply({"params": small_params()}, z, method="decode"))(latents)
    expected = apply(x, "encode")[0]
    assert latents.dtype == decoded.dtype == jnp.float32 and np.any(latents != expected)
    np.testing.assert_allclose(latents, expected, rtol=0, atol=0.04 * np.abs(expected).max())
