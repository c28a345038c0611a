"""The KL autoencoder agrees with diffusers' AutoencoderKL in PyTorch, module by module and through both file formats.

Weights are random, norms' scales and all biases too, so that no two tensors can be swapped unseen. Tolerances are
fractions of the largest value; what was measured is a tenth of each or less. The full model, random weights, at 64 x 64
pixels: mean 4e-6, log_std 3e-6, images 5e-6.

| quantity, float32 | tolerance |
|---|---|
| output of a submodule | 1e-5 |
| mean and log standard deviation | 2e-5 |
| decoded images | 2e-5 |
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.autoencoder import AutoencoderKL, from_diffusers, to_diffusers
from diffussm_jax.autoencoder.kl import Attention, Level, MidBlock, ResnetBlock
from diffussm_jax.layers import attend

torch = pytest.importorskip("torch", reason="parity with diffusers needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers")

from torch_autoencoders import assert_close, params_of, random_autoencoder, to_numpy, to_torch

MODULE_RTOL = 1e-5
MODEL_RTOL = 2e-5
CONFIGS = {
    "f4": {"block_out_channels": (8, 16, 16), "norm_num_groups": 4},
    "f2, other channels": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "latent_channels": 3,
        "in_channels": 1,
        "out_channels": 2,
    },
    "f4, attention in levels": {
        "block_out_channels": (8, 16, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_levels": (0, 2),
    },
    "f1, no quant conv": {
        "block_out_channels": (8,),
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The PyTorch model, and ours from the files that it saved."""
    reference = random_autoencoder(diffusers.AutoencoderKL, **CONFIGS[request.param])
    path = tmp_path_factory.mktemp("vae")
    reference.save_pretrained(path)
    return reference, *from_diffusers(path)


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def apply(model, params, x, method):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, x)


def test_config_is_understood(pair, request):
    reference, model, params = pair
    assert model.attention_levels == CONFIGS[request.node.callspec.params["pair"]].get("attention_levels", ())
    for key in ("in_channels", "latent_channels", "layers_per_block", "norm_num_groups", "scaling_factor"):
        assert getattr(model, key) == reference.config[key]
    assert list(model.block_out_channels) == list(reference.config.block_out_channels)
    assert sum(p.numel() for p in reference.parameters()) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_encode(pair):
    reference, model, params = pair
    x = jnp.tanh(random(2, 16, 24, model.in_channels))
    mean, log_std = apply(model, params, x, "encode")
    posterior = reference.encode(to_torch(x)).latent_dist
    assert_close(mean, to_numpy(posterior.mean), MODEL_RTOL)
    assert_close(log_std, to_numpy(posterior.logvar) / 2, MODEL_RTOL)
    assert_close(jnp.exp(log_std), to_numpy(posterior.std), MODEL_RTOL)


def test_decode(pair):
    reference, model, params = pair
    z = 2 * random(2, 5, 7, model.latent_channels, seed=1)
    assert_close(apply(model, params, z, "decode"), to_numpy(reference.decode(to_torch(z)).sample), MODEL_RTOL)


def test_call_decodes_the_mean(pair):
    reference, model, params = pair
    x = jnp.tanh(random(1, 8, 12, model.in_channels))
    assert_close(apply(model, params, x, None), to_numpy(reference(to_torch(x)).sample), MODEL_RTOL)


def test_log_variances_are_clipped_alike():
    reference = random_autoencoder(diffusers.AutoencoderKL, **CONFIGS["f4"])
    model = AutoencoderKL(**CONFIGS["f4"])
    with torch.no_grad():
        reference.quant_conv.bias.copy_(torch.tensor([0.0, 1, 2, 3, -70, 70, -10, 10]))
    params = params_of(reference.state_dict())
    x = random(1, 8, 8, 3)
    _, log_std = apply(model, params, x, "encode")
    expected = to_numpy(reference.encode(to_torch(x)).latent_dist.logvar) / 2
    assert np.all(expected[..., 0] == -15) and np.all(expected[..., 1] == 10)
    assert_close(log_std, expected, MODEL_RTOL)


def test_conversion_as_written_here(pair):
    reference, _, params = pair
    jax.tree.map(np.testing.assert_array_equal, params, params_of(reference.state_dict()))


@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("encoder.down_blocks.0.resnets.1", ResnetBlock(8, 4, jnp.float32), (2, 6, 10, 8)),
        ("encoder.down_blocks.1.resnets.0", ResnetBlock(16, 4, jnp.float32), (2, 6, 10, 8)),
        ("encoder.down_blocks.0", Level(8, 2, 4, "downsamplers", jnp.float32), (2, 6, 10, 8)),
        ("encoder.down_blocks.0", Level(8, 2, 4, "downsamplers", jnp.float32), (1, 7, 5, 8)),
        ("encoder.mid_block.attentions.0", Attention(4, jnp.float32), (2, 6, 10, 16)),
        ("encoder.mid_block", MidBlock(4, jnp.float32), (2, 6, 10, 16)),
        ("decoder.up_blocks.1", Level(16, 3, 4, "upsamplers", jnp.float32), (2, 3, 5, 16)),
        ("decoder.up_blocks.2", Level(8, 3, 4, None, jnp.float32), (2, 6, 10, 16)),
    ],
)
def test_submodules(name, module, shape):
    reference = random_autoencoder(diffusers.AutoencoderKL, **CONFIGS["f4"]).get_submodule(name)
    x = random(*shape) + 1
    actual = jax.jit(module.apply)({"params": params_of(reference.state_dict())}, x)
    arguments = (None,) if isinstance(module, ResnetBlock) else ()  # no time embedding
    assert_close(actual, to_numpy(reference(to_torch(x), *arguments)), MODULE_RTOL)


def test_attention_in_chunks(monkeypatch):
    # More positions than are computed at a time, and no multiple of that.
    monkeypatch.setitem(attend.__kwdefaults__, "query_chunk", 100)
    reference = random_autoencoder(diffusers.AutoencoderKL, **CONFIGS["f4"]).encoder.mid_block.attentions[0]
    x = 2 * random(2, 17, 19, 16)
    variables = {"params": params_of(reference.state_dict())}
    assert "scan" in str(jax.make_jaxpr(Attention(4, jnp.float32).apply)(variables, x))
    actual = Attention(4, jnp.float32).apply(variables, x)
    assert_close(actual, to_numpy(reference(to_torch(x))), MODULE_RTOL)


def test_diffusers_reads_what_was_written(pair, tmp_path):
    reference, model, params = pair
    to_diffusers(model, params, tmp_path / "vae", sample_size=64)
    found = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    config = {key: value for key, value in reference.config.items() if not key.startswith("_")}
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()} | {
        "sample_size": 64
    } == {key: value for key, value in found.config.items() if not key.startswith("_")}
    expected = reference.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_old_names_of_attention_that_diffusers_reads(tmp_path):
    from safetensors.torch import load_file, save_file

    reference = random_autoencoder(diffusers.AutoencoderKL, **CONFIGS["f4"])
    reference.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        tensors[name] = tensor
    save_file(tensors, file)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    found = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in found.state_dict().items())
    jax.tree.map(np.testing.assert_array_equal, from_diffusers(tmp_path)[1], params_of(reference.state_dict()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    reference = random_autoencoder(diffusers.AutoencoderKL, **CONFIGS["f4"]).to(getattr(torch, dtype))
    reference.save_pretrained(tmp_path)
    params = from_diffusers(tmp_path)[1]
    jax.tree.map(np.testing.assert_array_equal, params, params_of(reference.float().state_dict()))
