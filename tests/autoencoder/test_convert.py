"""Weights survive the way to diffusers' files and back bit by bit, and files that cannot be right say so."""

import hashlib
import json
import re
import struct
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffussm_jax.autoencoder import AutoencoderKL, VQModel, encoder_hash, from_diffusers, to_diffusers
from diffussm_jax.io import weights_hash

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
MODEL = AutoencoderKL(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=0.13025)
VQ = VQModel(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, num_vq_embeddings=6)
CODEBOOK = "quantize.embedding.weight"
QUERY = "encoder.mid_block.attentions.0.to_q.weight"


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    f = model.downsampling
    images = jax.ShapeDtypeStruct((1, f, f, model.in_channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


PARAMS = random_params(MODEL)
VQ_PARAMS = random_params(VQ)


@pytest.fixture
def saved(tmp_path):
    to_diffusers(MODEL, PARAMS, tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def saved_vq(tmp_path):
    to_diffusers(VQ, VQ_PARAMS, tmp_path / "vq")
    return tmp_path / "vq"


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(e).view(np.uint8))


def edit_config(directory, **changes):
    config = json.loads((directory / CONFIG).read_text()) | changes
    (directory / CONFIG).write_text(json.dumps(config))


def edit_tensors(directory, edit):
    tensors = load_file(directory / WEIGHTS)
    tensors = edit(tensors) or tensors
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, directory / WEIGHTS)


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        AutoencoderKL(
            in_channels=1,
            out_channels=2,
            block_out_channels=[4, 4, 8],
            latent_channels=3,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        MODEL.clone(attention_levels=(1,)),
        VQ,
        VQModel(
            in_channels=1,
            out_channels=2,
            block_out_channels=[4, 4, 8],
            latent_channels=5,
            norm_num_groups=4,
            scaling_factor=2.0,
            num_vq_embeddings=5,  # square: a transposed codebook would not be seen by its shape
            attention_levels=[0, 2],
        ),
    ],
    ids=["two levels", "three levels", "attention", "VQ", "VQ, three levels with attention"],
)
def test_params_return_from_diffusers(model, tmp_path):
    params = random_params(model)
    to_diffusers(model, params, tmp_path / "made" / "vae")
    found_model, found = from_diffusers(str(tmp_path / "made" / "vae"))
    assert found_model == model
    assert_same_bits(found, params)
    assert sorted(path.name for path in (tmp_path / "made").rglob("*")) == [CONFIG, WEIGHTS, "vae"]


def test_tensors_return_from_here(saved, tmp_path):
    original = load_file(saved / WEIGHTS)
    to_diffusers(*from_diffusers(saved), tmp_path / "again")
    found = load_file(tmp_path / "again" / WEIGHTS)
    assert found.keys() == original.keys() and len(found) == len(jax.tree.leaves(PARAMS))
    assert_same_bits(found, original)
    assert (tmp_path / "again" / CONFIG).read_bytes() == (saved / CONFIG).read_bytes()


def test_kernels_are_transposed(saved):
    tensors = load_file(saved / WEIGHTS)
    conv = np.asarray(PARAMS["encoder"]["conv_in"]["kernel"])
    assert conv.shape == (3, 3, 3, 4)
    for out, into, row, column in np.ndindex(4, 3, 3, 3):
        assert tensors["encoder.conv_in.weight"][out, into, row, column] == conv[row, column, into, out]
    dense = np.asarray(PARAMS["decoder"]["mid_block"]["attentions_0"]["to_out_0"]["kernel"])
    np.testing.assert_array_equal(tensors["decoder.mid_block.attentions.0.to_out.0.weight"], dense.T)


def test_the_codebook_is_not_transposed(saved_vq):
    tensors = load_file(saved_vq / WEIGHTS)
    np.testing.assert_array_equal(tensors[CODEBOOK], VQ_PARAMS["quantize"]["embedding"])
    assert "quant_conv.weight" in tensors and len(tensors) == len(jax.tree.leaves(VQ_PARAMS))


def test_files_are_replaced_whole(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            to_diffusers(MODEL, random_params(MODEL, 1), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["vae"]
    to_diffusers(MODEL, random_params(MODEL, 1), saved)
    assert_same_bits(from_diffusers(saved)[1], random_params(MODEL, 1))


def test_config_lacking_what_diffusers_lacked(saved):
    keys = ("_class_name", "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels")
    keys += ("layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types")
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({key: config[key] for key in keys} | {"_diffusers_version": "0.4.2"}))
    model, params = from_diffusers(saved)
    assert model == MODEL.clone(scaling_factor=0.18215)
    assert_same_bits(params, PARAMS)


@pytest.mark.parametrize("rank", [2, 4])
def test_old_names_of_attention(saved, rank):
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def edit(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for new, former in old.items():
                if f"attentions.0.{new}" in name:
                    name = name.replace(new, former)
                    tensor = tensor[..., None, None] if rank == 4 and tensor.ndim == 2 else tensor
            renamed[name] = tensor
        assert len(renamed.keys() - tensors.keys()) == 16
        return renamed

    edit_tensors(saved, edit)
    assert_same_bits(from_diffusers(saved)[1], PARAMS)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_files_become_float32(saved, dtype):
    edit_tensors(saved, lambda tensors: {name: t.astype(dtype) for name, t in tensors.items()})
    _, params = from_diffusers(saved)
    assert_same_bits(params, jax.tree.map(lambda p: jnp.asarray(np.asarray(p).astype(dtype), jnp.float32), PARAMS))


def test_the_model_computes_in_the_dtype_asked_for(saved):
    model, params = from_diffusers(saved, dtype="bfloat16")
    assert model.dtype == jnp.bfloat16 and {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    with pytest.raises(ValueError, match="one of float32, bfloat16, got 'float16'"):
        from_diffusers(saved, dtype="float16")


@pytest.mark.parametrize("folder", ["vae", "vqvae"])
def test_a_whole_pipeline(saved, folder):
    saved.rename(saved.parent / folder)
    (saved.parent / "model_index.json").write_text("{}")
    assert_same_bits(from_diffusers(saved.parent)[1], PARAMS)


def test_the_work_directory_of_a_run(saved):
    config = saved.parent / CONFIG
    config.write_text('{"task": {"name": "autoencoder"}, "num_steps": 3}')
    assert_same_bits(from_diffusers(saved.parent)[1], PARAMS)
    saved.rename(saved.parent / "other")
    with pytest.raises(FileNotFoundError, match=r"task 'autoencoder', without a folder vae\. .* when it is finished"):
        from_diffusers(saved.parent)
    for content in ("{", '{"task": 3}'):  # damaged, or no run
        config.write_text(content)
        with pytest.raises(
            FileNotFoundError, match=rf"{saved.parent} holds no {WEIGHTS}, only \['config.json', 'other'\]"
        ):
            from_diffusers(saved.parent)


def test_statistics_are_recorded(saved):
    to_diffusers(MODEL, PARAMS, saved, statistics={"mean": np.arange(4), "std": (1, 2.5, 3, 4)})
    config = json.loads((saved / CONFIG).read_text())
    assert config["_latents_mean"] == [0, 1, 2, 3] and config["_latents_std"] == [1, 2.5, 3, 4]
    model, params = from_diffusers(saved)
    assert model == MODEL
    assert_same_bits(params, PARAMS)


@pytest.mark.parametrize(
    "statistics",
    [{"mean": [0.0] * 4}, {"mean": [0.0] * 4, "std": [1.0] * 3}, {"mean": [0.0] * 4, "std": [1.0, 1, 1, np.inf]}],
)
def test_wrong_statistics(statistics, tmp_path):
    with pytest.raises(ValueError, match=r"mean and std, each of 4 finite numbers \(latent_channels\), got \{'mean'"):
        to_diffusers(MODEL, PARAMS, tmp_path / "vae", statistics=statistics)
    assert not list(tmp_path.iterdir())


def test_missing_unexpected_and_reshaped_tensors_are_all_named(saved):
    def edit(tensors):
        tensors["decoder.extra.weight"] = np.zeros((2, 7), np.float32)
        del tensors["quant_conv.bias"]
        tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"][:, :2]

    edit_tensors(saved, edit)
    with pytest.raises(ValueError, match="does not hold the tensors of the model") as caught:
        from_diffusers(saved)
    message = str(caught.value)
    assert re.search(r"missing: \['quant_conv.bias \(8,\)'\]", message)
    assert re.search(r"unexpected: \['decoder.extra.weight \(2, 7\)'\]", message)
    assert "encoder.conv_in.weight: (4, 2, 3, 3), not (4, 3, 3, 3)" in message and str(saved / WEIGHTS) in message


def test_a_tensor_under_both_names_is_unexpected(saved):
    former = QUERY.replace("to_q", "query")
    edit_tensors(saved, lambda tensors: tensors | {former: tensors[QUERY] + 1})
    with pytest.raises(ValueError, match=rf"unexpected: \['{former} "):
        from_diffusers(saved)


def test_tensors_of_another_dtype(saved):
    edit_tensors(saved, lambda tensors: tensors | {"quant_conv.bias": np.zeros(8, np.int32)})
    with pytest.raises(ValueError, match=r"tensor quant_conv\.bias is of dtype I32; supported is F32, F16, BF16"):
        from_diffusers(saved)


def test_params_of_another_model_are_not_written(tmp_path):
    params = dict(PARAMS)
    params["quant"] = params.pop("quant_conv")
    with pytest.raises(ValueError, match=r"not the model's.*\n.*missing: \['quant_conv/bias .*\n.*'quant/bias \(8,\)'"):
        to_diffusers(MODEL, params, tmp_path / "vae")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(saved, keep):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{re.escape(str(saved / WEIGHTS))} is damaged"):
        from_diffusers(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"act_fn": "si', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"", "is not JSON"),
        (b"[1]", "object, got"),
    ],
)
def test_damaged_config(saved, content, message):
    (saved / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(saved / CONFIG))} .*{message}"):
        from_diffusers(saved)


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("_class_name", "AsymmetricAutoencoderKL", "'AutoencoderKL' or 'VQModel'"),
        ("_class_name", ["VQModel"], "'AutoencoderKL' or 'VQModel'"),
        ("act_fn", "gelu", "'silu' or 'swish'"),
        ("mid_block_add_attention", False, "True"),
        ("shift_factor", 0.0609, "None or 0"),
        ("latents_mean", [0.0] * 4, "None"),
        ("latents_std", [1.0] * 4, "None"),
        (
            "down_block_types",
            ["DownEncoderBlock2D", "DownBlock2D"],
            "'DownEncoderBlock2D' or 'AttnDownEncoderBlock2D' for",
        ),
        ("down_block_types", ["DownEncoderBlock2D"] * 3, "'DownEncoderBlock2D' or .* for each of block_out_channels"),
        ("down_block_types", "DownEncoderBlock2D", "'DownEncoderBlock2D' or .* for each of block_out_channels"),
        ("up_block_types", ["UpDecoderBlock2D"], r"\['UpDecoderBlock2D', 'UpDecoderBlock2D'\], as of down_block_types"),
        (
            "up_block_types",
            ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
            r"\['UpDecoderBlock2D', 'UpDecoderBlock2D'\], as",
        ),
        ("block_out_channels", [4, 0], "a list of counts"),
        ("block_out_channels", [], "a list of counts"),
        ("layers_per_block", [1, 1], "a positive whole number"),
        ("latent_channels", True, "a positive whole number"),
        ("scaling_factor", "0.18", "a positive number"),
        ("use_quant_conv", None, "true or false"),
        ("spatial_norm", 3, "nothing of that name"),
        ("num_vq_embeddings", 256, "nothing of that name"),
    ],
)
def test_configs_of_other_models(saved, key, value, supported):
    edit_config(saved, **{key: value})
    with pytest.raises(ValueError, match=rf"config\.json: {key} is {re.escape(repr(value))}; supported is {supported}"):
        from_diffusers(saved)


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("norm_type", "spatial", "'group'"),
        ("vq_embed_dim", 4, "None or 3"),
        ("num_vq_embeddings", 0, "a positive whole number, at most 65,536"),
        ("num_vq_embeddings", 10**6, "a positive whole number, at most 65,536"),
        ("mid_block_add_attention", False, "True"),
        ("use_quant_conv", False, "nothing of that name"),
        ("shift_factor", 0.1, "nothing of that name"),
    ],
)
def test_vq_configs_of_other_models(saved_vq, key, value, supported):
    edit_config(saved_vq, **{key: value})
    with pytest.raises(ValueError, match=rf"config\.json: {key} is {re.escape(repr(value))}; supported is {supported}"):
        from_diffusers(saved_vq)


def test_vq_config_lacking_what_diffusers_lacked(saved_vq):
    keys = ("_class_name", "act_fn", "block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups")
    keys += ("num_vq_embeddings", "up_block_types")
    config = json.loads((saved_vq / CONFIG).read_text())
    extras = {"vq_embed_dim": 3, "_diffusers_version": "0.4.2"}
    (saved_vq / CONFIG).write_text(json.dumps({key: config[key] for key in keys} | extras))
    model, params = from_diffusers(saved_vq)
    assert model == VQ.clone(scaling_factor=0.18215)
    assert_same_bits(params, VQ_PARAMS)


def test_attention_is_at_the_same_levels_of_encoder_and_decoder(saved):
    edit_config(saved, down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"])
    with pytest.raises(ValueError, match=r"supported is \['AttnUpDecoderBlock2D', 'UpDecoderBlock2D'\], as of down_bl"):
        from_diffusers(saved)
    edit_config(saved, up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"])
    with pytest.raises(
        ValueError, match=r"missing: \[.*'encoder\.down_blocks\.1\.attentions\.0\.to_q\.weight \(8, 8\)'"
    ):
        from_diffusers(saved)


def test_weights_of_the_other_class(saved, saved_vq):
    (saved / WEIGHTS).replace(saved.parent / "kl")
    (saved_vq / WEIGHTS).replace(saved / WEIGHTS)
    (saved.parent / "kl").replace(saved_vq / WEIGHTS)
    with pytest.raises(ValueError, match=r"config\.json: _class_name is 'AutoencoderKL'; .* a codebook .*'VQModel'"):
        from_diffusers(saved)
    with pytest.raises(ValueError, match=r"config\.json: _class_name is 'VQModel'; .* no codebook .*'AutoencoderKL'"):
        from_diffusers(saved_vq)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_vq_embeddings": 7}, rf"of another shape: \['{CODEBOOK}: \(6, 3\), not \(7, 3\)'\]"),
        ({"latent_channels": 4}, rf"'{CODEBOOK}: \(6, 3\), not \(6, 4\)'"),
        (
            {"block_out_channels": [4, 8, 8]},
            r"block_out_channels is \[4, 8, 8\], of downsampling 4; .* holds 2 levels, of downsampling 2",
        ),
        ({"block_out_channels": [4]}, r"is \[4\], of downsampling 1; .* holds 2 levels, of downsampling 2"),
    ],
)
def test_weights_of_another_codebook_or_factor(saved_vq, changes, message):
    levels = len(changes.get("block_out_channels", [4, 8]))
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    edit_config(saved_vq, **types, **changes)
    with pytest.raises(ValueError, match=message):
        from_diffusers(saved_vq)


def test_vq_params_of_another_codebook_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"of another shape: \['quantize/embedding: \(6, 3\), not \(8, 3\)'\]"):
        to_diffusers(VQ.clone(num_vq_embeddings=8), VQ_PARAMS, tmp_path / "vq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layers_per_block": 3000},
            r"layers_per_block is 3000 with 2 levels, which takes 96,048 tensors .* holds 124",
        ),
        (
            {"block_out_channels": [4] * 3000},
            r"block_out_channels is \[4, .*; supported is a list of counts, at most 16",
        ),
        ({"latent_channels": 10**30}, r"latent_channels is 10+; supported is a positive whole number, at most 65,536"),
        ({"scaling_factor": 10**400}, r"scaling_factor is 10+; supported is a positive number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_of_any_size_are_refused_at_once(saved, changes, message):
    if "block_out_channels" in changes:
        changes |= {"down_block_types": ["DownEncoderBlock2D"] * 3000, "up_block_types": ["UpDecoderBlock2D"] * 3000}
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: {message}") as caught:
        from_diffusers(saved)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_config_nested_too_deeply(saved):
    (saved / CONFIG).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        from_diffusers(saved)


def test_groups_that_do_not_divide(saved):
    edit_config(saved, norm_num_groups=3)
    with pytest.raises(ValueError, match=r"config\.json: norm_num_groups must divide .* got 3 and \(4, 8\)"):
        from_diffusers(saved)


def test_pickles_are_not_read(saved):
    (saved / WEIGHTS).rename(saved / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors, .* from safetensors only"):
        from_diffusers(saved)


def test_directories_that_are_not_there(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no directory {tmp_path}/none"):
        from_diffusers(tmp_path / "none")
    (saved / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json, only \['diffusion"):
        from_diffusers(saved)
    (tmp_path / "model_index.json").write_text("{}")
    saved.rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json, only \['model_index\.json', 'other'\]"):
        from_diffusers(tmp_path)


def test_the_hub_is_asked_for_two_files(saved, monkeypatch):
    def snapshot_download(repository, *, allow_patterns):
        assert repository == "stabilityai/sd-vae-ft-ema"
        assert {CONFIG, WEIGHTS, f"vae/{WEIGHTS}", f"vqvae/{CONFIG}"} < set(allow_patterns) and "*" not in "".join(
            allow_patterns
        )
        return str(saved)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_same_bits(from_diffusers("stabilityai/sd-vae-ft-ema")[1], PARAMS)


def test_without_the_hub(monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(FileNotFoundError, match=r"ConnectionError: offline.*or download config\.json"):
        from_diffusers("stabilityai/sd-vae-ft-mse")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"`pip install diffussm_jax\[hub\]`, or download config\.json"):
        from_diffusers("stabilityai/sd-vae-ft-mse")


def test_hash_is_what_it_says():
    params = {"b": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "a": jnp.ones(2, jnp.bfloat16)}
    expected = hashlib.sha256()
    expected.update(b"a [2] bfloat16\n" + struct.pack("<2f", 1, 1))
    expected.update(b"b/kernel [2, 3] float32\n" + struct.pack("<6f", *range(6)))
    assert weights_hash(params) == expected.hexdigest()


def test_hash_tells_weights_apart_and_not_places(saved):
    digest = weights_hash(PARAMS)
    assert weights_hash(jax.tree.map(np.asarray, PARAMS)) == digest == weights_hash(from_diffusers(saved)[1])
    reordered = {key: PARAMS[key] for key in reversed(PARAMS)}
    assert weights_hash(reordered) == digest
    conv = PARAMS["quant_conv"]
    nudged = conv["bias"].at[0].set(jnp.nextafter(conv["bias"][0], jnp.inf))
    others = [
        PARAMS | {"quant_conv": conv | {"bias": nudged}},
        PARAMS | {"quant_conv": conv | {"bias": conv["bias"].reshape(2, 4)}},
        {("other" if key == "quant_conv" else key): value for key, value in PARAMS.items()},
    ]
    assert len({digest, *map(weights_hash, others)}) == 4


def test_only_safetensors_is_needed_to_import():
    """The hub's client is optional: only `from_diffusers` on a repository may import it."""
    code = "import sys; sys.modules['huggingface_hub'] = sys.modules['torch'] = None; import diffussm_jax.autoencoder"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("params", [PARAMS, VQ_PARAMS], ids=["KL", "VQ"])
def test_the_encoders_hash_knows_nothing_of_the_decoder(params):
    digest = encoder_hash(params)
    assert digest != weights_hash(params)
    for name in params:
        other = params | {name: jax.tree.map(lambda leaf: leaf + 1, params[name])}
        assert (encoder_hash(other) == digest) == (name in ("decoder", "post_quant_conv", "quantize")), name
