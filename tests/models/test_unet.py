"""The U-Net without PyTorch: its options, conditions, gradients, sharding, and a step and samples by the task."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from oracles import relative_error
from tiny import tiny_config
from unet_problems import Given

from diffussm_jax.build import Parts
from diffussm_jax.config import choose, load_config
from diffussm_jax.io import path_of, shapes_by_path
from diffussm_jax.models import UNET_SIZES, UNet
from diffussm_jax.models.backbone import class_labels
from diffussm_jax.models.conditioners import LabelEmbed
from diffussm_jax.models.unet_blocks import convolve
from diffussm_jax.parallel.sharding import spec_of

SHAPE, NUM_CLASSES = (8, 4, 1), 3
SMALL = {"width": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 2, "norm_num_groups": 4}
WITHOUT_ATTENTION = {"attention_resolutions": (), "has_middle_attention": False}


def small(**options):
    return UNet(**SMALL | {"conditioners": class_labels(NUM_CLASSES)} | options)


ONE_LEVEL = small(channel_mult=(1,), attention_resolutions=(8,))


def random_params(model, shape=SHAPE):
    """Parameters with nothing left at zero."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        spread = 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        mean = float(path[-1].key == "scale")
        return rng.normal(mean, spread, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params(shape))


def inputs(shape=SHAPE, B=2):
    return jax.random.normal(jax.random.key(5), (B, *shape)), jnp.array([3, 97])[:B], jnp.arange(B) % NUM_CLASSES


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_convolution_are_those_of_jax_bit_for_bit(stride):
    rng = np.random.default_rng(0)
    x, kernel, dy = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((3, 8, 6, 4), (3, 3, 4, 5), (3, 8 // stride, 6 // stride, 5))
    )

    def of_jax(x, kernel):
        options = {"padding": ((1, 1), (1, 1)), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), **options)

    @jax.jit
    def run(x, kernel, dy):
        both = [jax.vjp(f, x, kernel) for f in (lambda x, kernel: convolve(x, kernel, stride), of_jax)]
        return [(y, *pull_back(dy)) for y, pull_back in both]

    for found, expected in zip(*run(x, kernel, dy), strict=True):
        np.testing.assert_array_equal(found, expected)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                yield from equations(inner)


def test_every_convolution_of_a_gradient_has_the_layout_that_is_fast_in_loops_on_cpus():
    model = small(resblock_updown=False, **WITHOUT_ATTENTION)
    params, arguments = model.abstract_params(SHAPE), model.abstract_arguments(SHAPE, 2)
    gradient = jax.make_jaxpr(jax.grad(lambda params, *batch: model.apply_params(params, *batch).sum()))
    layouts = [
        eqn.params["dimension_numbers"]
        for eqn in equations(gradient(params, *arguments).jaxpr)
        if eqn.primitive.name == "conv_general_dilated"
    ]
    channels_last = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    assert len(layouts) > 3 * 12 and {tuple(map(tuple, layout)) for layout in layouts} == {channels_last}


def test_a_fresh_model_predicts_zero():
    params = ONE_LEVEL.init_params(SHAPE, 0)
    assert not np.any(jax.jit(ONE_LEVEL.apply_params)(params, *inputs()))
    assert np.any(params["down_0"]["block_0"]["conv1"]["kernel"])


@pytest.mark.slow
def test_options_that_only_change_the_computation_change_no_gradient():
    params, arguments = random_params(ONE_LEVEL), inputs()

    def gradient(model, params):
        return jax.grad(lambda p: jnp.sum(model.apply_params(p, *arguments) ** 2))(params)

    changed = ONE_LEVEL.clone(remat="block", attention="blockwise")
    expected, found = jax.jit(lambda p: [gradient(m, p) for m in (ONE_LEVEL, changed)])(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = functools.reduce(lambda tree, key: tree[key.key], path, found)
        assert relative_error(other, leaf) <= 1e-4, path_of(path)


def test_bfloat16_keeps_parameters_norms_and_output_in_float32():
    model = small(attention_resolutions=(8,))
    params = random_params(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    arguments = inputs()
    out, expected = jax.jit(lambda p: [m.apply_params(p, *arguments) for m in (model.clone(dtype="bfloat16"), model)])(
        params
    )
    assert out.dtype == jnp.float32 and out.shape == (2, 8, 4, 2)
    assert 0 < relative_error(out, expected) <= 3e-2


def test_attention_is_where_it_is_asked_for():
    def attended(**options):
        paths = shapes_by_path(small(**options).abstract_params(SHAPE))
        return {path.split("/attention_0/")[0] for path in paths if "/attention_0/" in path}

    assert attended(**WITHOUT_ATTENTION) == set()
    assert attended(attention_resolutions=()) == {"middle"}
    assert attended(attention_resolutions=(4, 16)) == {"down_1", "middle", "up_1"}


def test_conditions_give_vectors_tokens_and_channels():
    H, W, _ = SHAPE
    given = {
        "label": functools.partial(LabelEmbed, num_classes=NUM_CLASSES, token_width=6),
        "text": functools.partial(Given, gives="tokens", shape=(5, 6)),
        "picture": functools.partial(Given, gives="channels", shape=(H, W, 2)),
        "vector": functools.partial(LabelEmbed, num_classes=NUM_CLASSES),
    }
    model = small(conditioners=given, attention_resolutions=())
    params, (x_t, t, y) = random_params(model), inputs()
    assert params["conv_in"]["kernel"].shape == (3, 3, 1 + 2, 16)
    assert params["label_embed"]["table"]["embedding"].shape == (NUM_CLASSES + 1, 6)
    assert params["vector_embed"]["table"]["embedding"].shape == (NUM_CLASSES + 1, 4 * 16)
    assert params["middle"]["attention_0"]["block_0"]["attn2"]["to_k"]["kernel"].shape == (6, 32)
    noise = functools.partial(jax.random.normal, jax.random.key(1))
    condition = {"label": y, "text": noise((2, 5, 6)), "picture": noise((2, H, W, 2)), "vector": y}
    run = jax.jit(model.apply_params)
    out = run(params, x_t, t, condition)
    for key in given:
        assert relative_error(run(params, x_t, t, condition | {key: model.null(condition)[key]}), out) > 1e-3, key
    backwards = condition | {"text": condition["text"][:, ::-1]}  # tokens have no order
    assert relative_error(run(params, x_t, t, backwards), out) <= 1e-5


@pytest.mark.parametrize(
    "options,message",
    [
        ({"width": 15}, "width must be even, .* got 15"),
        ({"channel_mult": ()}, r"channel_mult .*width = 16, got \(\)"),
        ({"channel_mult": (1, 0.01)}, r"channel_mult .*width = 16, got \(1, 0.01\)"),
        ({"channel_mult": (1, 2, 2, 2)}, "4 levels need H and W that are multiples of 8, got 8, 4"),
        ({"num_heads": 3}, "num_heads = 3 must divide the 16 channels"),
        ({"num_head_channels": 7}, "num_head_channels = 7 must divide the 16 channels"),
        ({"channel_mult": (1, "2")}, r"channel_mult must be numbers, got \(1, '2'\)"),
        ({"attention_resolutions": 8}, "attention_resolutions must be a tuple, got 8"),
        ({"qkv_order": "old"}, "qkv_order is 'old'; choose one of new, legacy"),
        ({"remat": "dots"}, "remat is 'dots'; choose one of none, block"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options).check(SHAPE)


AXES = ("data", "fsdp", "tensor")


def test_fsdp_splits_every_kernel_and_tensor_is_refused():
    model = small(attention_resolutions=(4,), use_scale_shift_norm=False)
    for path, shape in shapes_by_path(model.abstract_params(SHAPE)).items():
        spec = spec_of(f"opt_state/mu/{path}", shape, model.sharding_rules, AbstractMesh((1, 8, 1), AXES))
        assert ("fsdp" in spec) == path.endswith("/kernel"), path
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1, 2), AXES)):
        with pytest.raises(ValueError, match="mesh axis tensor, which has 2 devices"):
            model.check(SHAPE)


COMPILE = """
import dataclasses, json, jax
from diffussm_jax.models import UNet
from diffussm_jax.models.backbone import class_labels
from diffussm_jax.parallel.hlo import collectives
from diffussm_jax.parallel.mesh import make_mesh, over_batch
from diffussm_jax.parallel.sharding import shardings
mesh, shape = make_mesh(2, 4, 1), (8, 8, 1)
labels = class_labels(3, token_width=6)
model = UNet(width=32, channel_mult=(1, 2), num_res_blocks=1, remat="block", conditioners=labels)
params, batch = model.abstract_params(shape), model.abstract_arguments(shape, 24)
layout = shardings(params, model.sharding_rules, mesh)
def loss(params, *batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return (model.apply_params(params, *batch) ** 2).mean()
step = jax.jit(jax.value_and_grad(loss), in_shardings=(layout, *[over_batch(mesh)] * 3), out_shardings=(None, layout))
found = collectives(step.lower(params, *batch).compile().as_text(), 8)
leaves = zip(jax.tree.leaves(params), jax.tree.leaves(layout))
kernels = [4 * leaf.size for leaf, where in leaves if "fsdp" in where.spec]
print(json.dumps([kernels, [dataclasses.asdict(collective) for collective in found]]))
"""


@pytest.mark.slow
def test_data_and_fsdp_meshes_communicate_parameters_and_gradients_only():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        + os.environ.get("XLA_FLAGS", ""),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels, found = json.loads(done.stdout)
    by_kind = {"all-gather": [], "all-reduce": []}
    for fields in found:
        by_kind[fields["kind"]] += [fields["result_bytes"]] * fields["count"]
    # No activation of a batch of 24 has the size of a kernel. Each kernel is gathered twice at most: remat repeats it.
    assert set(by_kind["all-gather"]) == set(kernels)
    assert sum(kernels) <= sum(by_kind["all-gather"]) <= 2 * sum(kernels)
    assert sum(kernels) <= sum(by_kind["all-reduce"]) <= 1.25 * sum(kernels)


def test_dropout_acts_where_there_are_random_numbers():
    model = small(dropout=0.5, remat="block")
    params, rng = random_params(model), np.random.default_rng(1)
    arguments = rng.normal(size=(2, *SHAPE)).astype(np.float32), np.arange(2), np.arange(2)

    @jax.jit
    def outputs(params):
        keys = [jax.random.key(seed) for seed in (0, 0, 1)]
        random = [model.apply({"params": params}, *arguments, rngs={"dropout": key}) for key in keys]
        return model.apply({"params": params}, *arguments), small().apply({"params": params}, *arguments), *random

    plain, without, one, again, other = outputs(params)
    np.testing.assert_allclose(plain, without, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(one, again)
    assert min(relative_error(a, b) for a, b in ((one, plain), (other, plain), (one, other))) > 0.05


def test_a_training_step_and_samples():
    config = tiny_config()
    choose(config, "model.name", "unet")
    config.model.update(channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(), norm_num_groups=4)
    config.model.dropout = 0.1
    parts = Parts(config)
    task = parts.task
    state = task.create_state()
    before = jax.tree.map(np.array, state.params)
    batch = {"image": np.full((8, 8, 8, 1), 100, np.uint8), "label": np.arange(8, dtype=np.int32)}
    state, metrics = task.train_step(state, batch)
    assert np.isfinite(metrics["loss"]) and state.step == 1
    assert np.abs(state.params["conv_out"]["kernel"] - before["conv_out"]["kernel"]).max() > 0
    samples = parts.generator(state.params, np.arange(4), 4, jax.random.key(0))
    assert samples.shape == (4, 8, 8, 1) and np.abs(samples).max() <= 1


@pytest.mark.parametrize("file,size", [("adm_imagenet.py:64", "ADM-64"), ("ldm_cin256.py", "LDM-4")])
def test_configs_describe_the_published_networks(file, size):
    parts = Parts(load_config(f"configs/{file}"))
    for option, value in UNET_SIZES[size].items():
        assert getattr(parts.model, option) == value
    assert parts.model.num_outputs == (2 if size.startswith("ADM") else 1)
    assert ("label" in parts.model.conditioners) and parts.input_shape == (64, 64, 3)
    assert (parts.model.conditioners["label"](width=1, parent=None).token_width > 0) == (size == "LDM-4")
