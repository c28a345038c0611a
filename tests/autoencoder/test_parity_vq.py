"""The vector-quantized autoencoder agrees with diffusers' VQModel in PyTorch, in values, gradients and files.

Weights are random. Tolerances are fractions of the largest value, and of each parameter's largest gradient.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.autoencoder import VQModel, from_diffusers, to_diffusers
from diffussm_jax.autoencoder.vq import codebook_losses, straight_through

torch = pytest.importorskip("torch", reason="parity with diffusers needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers")

from torch_autoencoders import assert_close, params_of, random_autoencoder, to_numpy, to_torch

RTOL = 1e-5
BETA = 0.25  # of diffusers, on the codebook term
SIZES = {
    "f4": {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "num_vq_embeddings": 50},
    "f2, other channels": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 8,
        "layers_per_block": 2,
        "latent_channels": 4,
        "vq_embed_dim": 4,
        "in_channels": 1,
        "out_channels": 2,
        "num_vq_embeddings": 1100,  # more than are compared at a time
        "attention_levels": (0, 1),
        "lookup_from_codebook": True,
        "act_fn": "swish",
    },
}


@pytest.fixture(scope="module", params=SIZES)
def pair(request, tmp_path_factory):
    """The PyTorch model, and ours from the files that it saved."""
    reference = random_autoencoder(diffusers.VQModel, **SIZES[request.param])
    path = tmp_path_factory.mktemp("vq")
    reference.save_pretrained(path)
    return reference, *from_diffusers(path)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_config_is_understood(pair):
    reference, model, params = pair
    assert type(model) is VQModel
    for key in ("in_channels", "latent_channels", "layers_per_block", "norm_num_groups", "scaling_factor"):
        assert getattr(model, key) == reference.config[key]
    assert model.num_vq_embeddings == reference.config.num_vq_embeddings
    jax.tree.map(np.testing.assert_array_equal, params, params_of(reference.state_dict()))


def test_encode_quantize_and_decode(pair):
    reference, model, params = pair

    @jax.jit
    def run(params, x, z):
        latents, (quantized, indices), images = (
            model.apply({"params": params}, inputs, method=method)
            for method, inputs in (("encode", x), ("quantize", z), ("decode", z))
        )
        return latents[0], quantized, indices, codebook_losses(z, quantized), images

    x, z = np.tanh(random(2, 8, 12, model.in_channels)), random(2, 5, 7, model.latent_channels, seed=1)
    latents, quantized, indices, (codebook, commitment), images = run(params, x, z)
    assert_close(latents, to_numpy(reference.encode(to_torch(x)).latents), RTOL)
    z_q, loss, (_, _, expected) = reference.quantize(to_torch(z))
    np.testing.assert_array_equal(indices.ravel(), expected.numpy())
    assert_close(quantized, to_numpy(z_q), RTOL)
    np.testing.assert_allclose(commitment + BETA * codebook, loss.item(), rtol=RTOL)
    assert_close(images, to_numpy(reference.decode(to_torch(z)).sample), RTOL)


def test_gradients_of_all_parameters():
    """Of a loss of the images and of diffusers' loss of the codebook: straight through to the encoder."""
    sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "num_vq_embeddings": 50}
    sizes["attention_levels"] = (1,)
    reference, model = random_autoencoder(diffusers.VQModel, **sizes), VQModel(**sizes)
    x, weights = np.tanh(random(2, 8, 12, 3)), random(2, 8, 12, 3, seed=1)
    decoded, loss = reference(to_torch(x), return_dict=False)
    (torch.mean(decoded * to_torch(weights)) + loss).backward()
    expected = params_of({name: p.grad for name, p in reference.named_parameters()})

    @jax.jit
    @jax.grad
    def gradients(params):
        latents, _ = model.apply({"params": params}, x, method="encode")
        quantized = model.apply({"params": params}, latents, method="quantize").latents
        images = model.apply({"params": params}, straight_through(latents, quantized), method="decode_quantized")
        codebook, commitment = codebook_losses(latents, quantized)
        return jnp.mean(images * weights) + commitment + BETA * codebook

    found = jax.tree_util.tree_leaves_with_path(gradients(params_of(reference.state_dict())))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, actual), e in zip(found, jax.tree.leaves(expected), strict=True):
        # The gradient of a bias of a key is zero but for rounding.
        atol = max(RTOL * np.abs(e).max(), 1e-7 * largest)
        np.testing.assert_allclose(actual, e, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
        assert np.any(e) or "to_k" in jax.tree_util.keystr(path)


def test_diffusers_reads_what_was_written(pair, tmp_path):
    reference, model, params = pair
    mean, std = [0.5] * model.latent_channels, [2.0] * model.latent_channels
    to_diffusers(model, params, tmp_path / "vq", sample_size=64, statistics={"mean": mean, "std": std})
    found = diffusers.VQModel.from_pretrained(tmp_path / "vq", low_cpu_mem_usage=False)
    for key, value in reference.config.items():
        if key in ("vq_embed_dim", "lookup_from_codebook", "act_fn", "sample_size", "force_upcast") or key[0] == "_":
            continue
        assert found.config[key] == (list(value) if isinstance(value, tuple) else value), key
    assert found.config["_latents_mean"] == mean and found.config["_latents_std"] == std
    expected = reference.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    z = to_torch(random(1, 4, 4, model.latent_channels))
    assert torch.equal(found.decode(z).sample, reference.decode(z).sample)
    found.save_pretrained(tmp_path / "again")  # and what diffusers writes after that is read here
    again, same = from_diffusers(tmp_path / "again")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_statistics_do_not_disturb_the_kl_autoencoder(tmp_path):
    reference = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    reference.save_pretrained(tmp_path / "vae")
    model, params = from_diffusers(tmp_path / "vae")
    to_diffusers(model, params, tmp_path / "with", statistics={"mean": [0, 0, 0, 1], "std": [1, 2, 3, 4]})
    assert json.loads((tmp_path / "with" / "config.json").read_text())["_latents_std"] == [1, 2, 3, 4]
    found = diffusers.AutoencoderKL.from_pretrained(tmp_path / "with", low_cpu_mem_usage=False)
    expected = reference.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert from_diffusers(tmp_path / "with")[0] == model


def test_latent_diffusions_vq_f4_has_as_many_parameters():
    with torch.device("meta"):
        reference = diffusers.VQModel(
            block_out_channels=(128, 256, 512),
            layers_per_block=2,
            num_vq_embeddings=8192,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        )
    assert sum(p.numel() for p in reference.parameters()) == 55_322_782
