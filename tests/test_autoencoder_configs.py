"""The configs of LDM's first stages have the values that LDM publishes, written here in its terms."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax import registry
from diffussm_jax.config import load_config
from diffussm_jax.options import flatten
from diffussm_jax.validation import validate

CONFIGS = Path(__file__).parent.parent / "configs"
# ch_mult, attn_resolutions, z_channels, n_embed; disc_start, disc_weight, disc_num_layers; images of a batch.
LDM = {
    "kl-f4": ([1, 2, 4], [], 3, 0, 50_001, 0.5, 3, 10),
    "kl-f8": ([1, 2, 4, 4], [], 4, 0, 50_001, 0.5, 3, 4),
    "kl-f16": ([1, 1, 2, 2, 4], [16], 16, 0, 50_001, 0.5, 3, 6),
    "vq-f4": ([1, 2, 4], [], 3, 8192, 0, 0.75, 3, 8),
    "vq-f8": ([1, 2, 2, 4], [32], 4, 16384, 1, 0.6, 2, 10),
    "vq-f16": ([1, 1, 2, 2, 4], [16], 8, 16384, 250_001, 0.75, 2, 14),
}


@pytest.mark.parametrize("data", ["imagenet", "openimages"])
@pytest.mark.parametrize("kind", LDM)
def test_values_are_those_of_ldm(kind, data):
    config = load_config(f"{CONFIGS}/autoencoder_{kind.replace('-', '_')}.py:{data}")
    validate(config)
    ch_mult, attn_resolutions, z_channels, n_embed, *discriminator, batch_size = LDM[kind]
    task, autoencoder = config.task, config.task.autoencoder
    assert f"{autoencoder.name}-f{2 ** (len(ch_mult) - 1)}" == kind
    assert autoencoder.block_out_channels == tuple(128 * m for m in ch_mult)
    assert [config.data.image_size >> level for level in autoencoder.attention_levels] == attn_resolutions
    assert (autoencoder.layers_per_block, autoencoder.latent_channels) == (2, z_channels)
    assert [task.disc_start, task.disc_weight, task.disc_layers] == discriminator
    assert (task.disc_width, task.disc_norm, task.disc_warmup, task.disc_ramp) == (64, "batch", 0, 0)
    assert (task.perceptual, task.perceptual_weight, task.beta1, task.beta2) == ("lpips", 1.0, 0.5, 0.9)
    if n_embed:
        assert autoencoder.num_vq_embeddings == n_embed
        assert (autoencoder.beta, autoencoder.beta_term, autoencoder.codebook_weight) == (0.25, "codebook", 1.0)
    else:
        assert (autoencoder.kl_weight, autoencoder.learns_logvar) == (1e-6, False)
        batch_size = {"imagenet": 2 * 12, "openimages": batch_size}[data]
    assert config.batch_size == batch_size
    np.testing.assert_allclose(config.optimizer.learning_rate, 4.5e-6 * batch_size)
    assert (config.data.num_classes, config.data.random_flip) == ({"imagenet": 1000, "openimages": 0}[data], False)
    assert math.ceil(256 / config.data.min_crop_fraction) == {"imagenet": 512, "openimages": 384}[data]
    assert flatten(config) == flatten(load_config(f"{CONFIGS}/autoencoder.py:{kind}:{data}"))


@pytest.mark.parametrize("kind", LDM)
def test_numbers_of_parameters_are_those_of_the_docstrings(kind):
    file = CONFIGS / f"autoencoder_{kind.replace('-', '_')}.py"
    options = load_config(str(file)).task.autoencoder
    model = registry.create("autoencoder", options.name, options, num_channels=3).model
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    number = f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)):,}"
    assert f"{number} parameters" in file.read_text()
    (row,) = (
        line for line in (CONFIGS / "autoencoder.py").read_text().splitlines() if line.startswith(f"    `{kind}`")
    )
    assert number in row and f" {load_config(str(file)).num_steps:,} " in row


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "autoencoder.py:kl-f2",
            "unknown autoencoder 'kl-f2'; choose one of kl-f4, kl-f8, kl-f16, vq-f4, vq-f8, vq-f16",
        ),
        ("autoencoder.py:kl-f8:lsun", "unknown data 'lsun'; choose one of imagenet, openimages"),
        ("autoencoder_vq_f4.py:lsun", "unknown data 'lsun'"),
    ],
)
def test_unknown_kinds_and_data(file, message):
    with pytest.raises(ValueError, match=message):
        load_config(f"{CONFIGS}/{file}")
    assert load_config(f"{CONFIGS}/autoencoder.py:") == load_config(f"{CONFIGS}/autoencoder_kl_f8.py:")
