"""DiT agrees with PyTorch on converted random weights: `bench.torch_dit` and diffusers' DiTTransformer2DModel.

Weights are random where a fresh DiT has zeros, so that no two tensors can be swapped unseen.

| quantity, float32, relative in the Euclidean norm | tolerance | measured |
|---|---|---|
| output | 1e-5 | 4e-7; diffusers, whose frequencies are rounded, 5e-6 |
| gradient of a parameter or of x_t | 1e-5 | 7e-7 |
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

from diffussm_jax.io import path_of
from diffussm_jax.layers import sincos_2d
from diffussm_jax.models import DiT
from diffussm_jax.models.backbone import class_labels
from diffussm_jax.models.dit_convert import from_pytorch, to_pytorch

torch = pytest.importorskip("torch", reason="parity with PyTorch needs PyTorch")

from diffussm_jax.bench.torch_dit import DiTBlock, TorchDiT, position_table

RTOL = 1e-5
SIZE, NUM_CLASSES, NUM_CHANNELS = 8, 5, 3
OPTIONS = {"width": 24, "depth": 3, "num_heads": 4, "patch_size": 2, "mlp_ratio": 3.0}
MODEL = DiT(**OPTIONS, conditioners=class_labels(NUM_CLASSES))


@pytest.fixture(scope="module")
def reference():
    model = TorchDiT(**OPTIONS, latent_size=SIZE, num_classes=NUM_CLASSES, num_channels=NUM_CHANNELS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                spread = p[0].numel() ** -0.5 if name.endswith("weight") and "table" not in name else 0.3
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return model


def arrays(state_dict):
    return {name: tensor.detach().numpy() for name, tensor in state_dict.items()}


def inputs():
    rng = np.random.default_rng(0)
    x_t, weights = (rng.normal(size=(2, SIZE, SIZE, n)).astype(np.float32) for n in (NUM_CHANNELS, 2 * NUM_CHANNELS))
    return x_t, np.array([7, 930]), np.array([1, NUM_CLASSES]), weights


def channels_first(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def test_the_position_table_is_that_of_pytorch_bit_for_bit():
    for size, width in ((4, 24), (16, 1152)):
        np.testing.assert_array_equal(position_table(size, width)[0].numpy(), sincos_2d(size, size, width))


def test_values_and_gradients(reference):
    x_t, t, y, weights = inputs()
    params = from_pytorch(arrays(reference.state_dict()))

    @jax.jit
    def run(params, x_t):
        out, pull_back = jax.vjp(lambda params, x_t: MODEL.apply_params(params, x_t, t, {"label": y}), params, x_t)
        return out, pull_back(weights)

    out, (by_params, by_x_t) = run(params, x_t)
    torch_x_t = channels_first(x_t).requires_grad_()
    expected = reference(torch_x_t, torch.from_numpy(t), torch.from_numpy(y))
    reference.zero_grad()
    expected.backward(channels_first(weights))
    assert relative_error(out, expected.detach().permute(0, 2, 3, 1).numpy()) <= RTOL
    assert relative_error(by_x_t, torch_x_t.grad.permute(0, 2, 3, 1).numpy()) <= RTOL
    gradients = {name: p.grad for name, p in reference.named_parameters() if name != "pos_embed"}
    gradients["pos_embed"] = reference.pos_embed
    expected = dict(flat(from_pytorch(arrays(gradients))))
    for path, gradient in flat(by_params):
        assert relative_error(gradient, expected[path]) <= RTOL, path


def flat(tree):
    return [(path_of(path), np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def test_pytorch_reads_what_is_written_bit_for_bit(reference):
    published = arrays(reference.state_dict())
    written = to_pytorch(jax.tree.map(jnp.asarray, from_pytorch(published)), latent_size=(SIZE, SIZE))
    assert written.keys() == published.keys()
    for name, array in published.items():
        assert (written[name].dtype, written[name].tobytes()) == (array.dtype, array.tobytes()), name
    reference.load_state_dict({name: torch.tensor(array) for name, array in written.items()})


def test_a_block_alone(reference):
    rng = np.random.default_rng(1)
    block, (J, D) = MODEL.block((SIZE, SIZE, NUM_CHANNELS))
    x, c = (rng.normal(size=shape).astype(np.float32) for shape in ((2, J, D), (2, D)))
    stacked = from_pytorch(arrays(reference.state_dict()))["blocks"]
    params = jax.tree.map(lambda leaf: leaf[1], stacked)
    expected = reference.blocks[1](torch.from_numpy(x), torch.from_numpy(c)).detach().numpy()
    assert isinstance(reference.blocks[1], DiTBlock)
    assert relative_error(jax.jit(block.apply)({"params": params}, x, c)[0], expected) <= RTOL


# diffusers' name -> the published one. Each block has embeddings of its own there, all of the same values.
RENAMED = {
    r"pos_embed\.proj\.": "x_embedder.proj.",
    r"proj_out_1\.": "final_layer.adaLN_modulation.1.",
    r"proj_out_2\.": "final_layer.linear.",
    r"transformer_blocks\.(\d+)\.norm1\.emb\.timestep_embedder\.linear_1\.": "t_embedder.mlp.0.",
    r"transformer_blocks\.(\d+)\.norm1\.emb\.timestep_embedder\.linear_2\.": "t_embedder.mlp.2.",
    r"transformer_blocks\.(\d+)\.norm1\.emb\.class_embedder\.": "y_embedder.",
    r"transformer_blocks\.(\d+)\.norm1\.linear\.": r"blocks.\1.adaLN_modulation.1.",
    r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.": r"blocks.\1.attn.proj.",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.": r"blocks.\1.mlp.fc1.",
    r"transformer_blocks\.(\d+)\.ff\.net\.2\.": r"blocks.\1.mlp.fc2.",
}


def renamed(name):
    for pattern, new in RENAMED.items():
        name = re.sub(f"^{pattern}", new, name)
    return name


def of_diffusers(published, names):
    """Tensors for diffusers' names: queries, keys and values apart."""
    tensors = {}
    for name in names:
        if match := re.match(r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])\.(weight|bias)$", name):
            number, which, leaf = match.groups()
            tensors[name] = published[f"blocks.{number}.attn.qkv.{leaf}"].chunk(3)["qkv".index(which)]
        else:
            tensors[name] = published["pos_embed" if name == "pos_embed.pos_embed" else renamed(name)]
    return tensors


def test_diffusers_agrees(reference):
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=OPTIONS["num_heads"],
        attention_head_dim=OPTIONS["width"] // OPTIONS["num_heads"],
        in_channels=NUM_CHANNELS,
        out_channels=2 * NUM_CHANNELS,
        num_layers=OPTIONS["depth"],
        sample_size=SIZE,
        patch_size=OPTIONS["patch_size"],
        num_embeds_ada_norm=NUM_CLASSES,
        norm_eps=1e-6,  # DiT's; the default is another
    )
    for block in model.transformer_blocks:
        block.ff.net[0].proj = torch.nn.Linear(24, 72)  # diffusers' MLP is four times as wide, and has no option for it
        block.ff.net[2] = torch.nn.Linear(72, 24)
        # diffusers spaces the frequencies of t as the transformer of 2017 does, DiT as ADM does.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    model.load_state_dict(of_diffusers(reference.state_dict(), model.state_dict()))
    x_t, t, y, _ = inputs()
    with torch.no_grad():
        expected = model.eval()(channels_first(x_t), torch.from_numpy(t), torch.from_numpy(y)).sample
    params = from_pytorch(arrays(reference.state_dict()))
    out = jax.jit(MODEL.apply_params)(params, x_t, t, {"label": y})
    assert relative_error(out, expected.permute(0, 2, 3, 1).numpy()) <= RTOL
