"""DiT is the paper's model: its parameters, its multiply-adds, and all conditionings against an oracle in float64.

| quantity, float32 | tolerance |
|---|---|
| output against float64 | 1e-5 |
| gradient of a parameter along a direction | 1e-4 |
"""

import functools
import importlib.util
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error
from tiny import tiny_config

from diffussm_jax.build import Parts
from diffussm_jax.config import choose, load_config
from diffussm_jax.io import path_of, shapes_by_path
from diffussm_jax.models import DIT_SIZES, DiT
from diffussm_jax.models.backbone import class_labels
from diffussm_jax.models.conditioners import Conditioning
from diffussm_jax.models.costs import count_products
from diffussm_jax.models.dit import CONDITIONINGS
from diffussm_jax.models.dit_convert import from_pytorch, is_dit, to_pytorch
from diffussm_jax.parallel.mesh import batch_to_devices, make_mesh

NUM_CLASSES, HEADS, PATCH, DEPTH = 3, 2, 2, 2
SHAPE = (4, 6, 3)


class Given(nn.Module):
    """A conditioner that repeats what it is given, as tokens [B, 5, width] or as channels [B, H, W, 2]."""

    width: int
    dtype: jnp.dtype = jnp.float32
    as_tokens: bool = True

    def __call__(self, value):
        return Conditioning(tokens=jnp.tile(value, self.width // 4)) if self.as_tokens else Conditioning(channels=value)

    def null(self, value):
        return jnp.zeros_like(value)

    def drop(self, value, stream):
        return value

    def example(self, batch_size):
        return jnp.zeros((batch_size, 5, 4) if self.as_tokens else (batch_size, *SHAPE[:2], 2))


LABEL = class_labels(NUM_CLASSES)
TOKENS, CHANNELS = {"text": Given}, {"image": functools.partial(Given, as_tokens=False)}


def small(**options):
    defaults = {"width": 16, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH, "conditioners": LABEL}
    return DiT(**defaults | options)


def random_params(model):
    """Parameters with nothing left at zero, so that every path through the model counts."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        inputs = math.prod(leaf.shape[1:-1] if "blocks" in path_of(path) else leaf.shape[:-1])
        spread = 0.5 / np.sqrt(max(inputs, 1)) if path[-1].key == "kernel" else 0.3
        return jnp.asarray(rng.normal(float(path[-1].key == "scale"), spread, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params(SHAPE))


def inputs(model):
    keys = jax.random.split(jax.random.key(5), 3)
    condition = {"label": jnp.array([0, 2])}
    for key, name in zip(keys, ("text", "image"), strict=False):
        if name in model.conditioners:
            condition[name] = jax.random.normal(key, model.example_condition(2)[name].shape)
    return jax.random.normal(keys[2], (2, *SHAPE)), jnp.array([3, 97]), condition


# The oracle


def dense(p, x):
    inputs = p["kernel"].shape[0]
    return x @ p["kernel"].reshape(inputs, -1) + p["bias"].ravel()


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x, p=None):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x if p is None else x * p["scale"] + p["bias"]


def rms_norm(x, p):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def attention(p, x, context=None):
    """One head of one image at a time."""
    D = x.shape[-1]
    if context is None:
        q, k, v = np.split(dense(p["qkv"], x), 3, -1)
    else:
        q, (k, v) = dense(p["q"], x), np.split(dense(p["kv"], context), 2, -1)
    out = np.zeros_like(x)
    for b, head in np.ndindex(len(x), HEADS):
        channels = slice(head * D // HEADS, (head + 1) * D // HEADS)
        queries, keys, values = (array[b, :, channels] for array in (q, k, v))
        if "q_norm" in p:
            queries, keys = rms_norm(queries, p["q_norm"]), rms_norm(keys, p["k_norm"])
        weights = np.exp(queries @ keys.T / np.sqrt(D // HEADS))
        out[b, :, channels] = weights / weights.sum(-1, keepdims=True) @ values
    return dense(p["proj"], out)


def block_oracle(p, x, c, kind):
    """The blocks of the paper's figure 3."""

    def mlp(x):
        return dense(p["fc2"], gelu(dense(p["fc1"], x)))

    if kind in ("in_context", "cross_attention"):
        x = x + attention(p["self_attention"], layer_norm(x, p["norm1"]))
        if kind == "cross_attention":
            x = x + attention(p["cross_attention"], layer_norm(x, p["cross_norm"]), c)
        return x + mlp(layer_norm(x, p["norm2"]))
    of_c = dense(p["modulation"], silu(c))[:, None]
    if kind == "adaln":
        shift_1, scale_1, shift_2, scale_2 = np.split(of_c, 4, -1)
        gate_1 = gate_2 = 1
    else:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = np.split(of_c, 6, -1)
    x = x + gate_1 * attention(p["self_attention"], layer_norm(x) * (1 + scale_1) + shift_1)
    return x + gate_2 * mlp(layer_norm(x) * (1 + scale_2) + shift_2)


def position(row, column, D):
    frequencies = 1 / 10_000 ** (np.arange(D // 4) / (D // 4))
    angles = [column * frequencies, row * frequencies]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)])


def model_oracle(p, x_t, t, condition, kind, has_positions):
    """The whole model, patch by patch."""
    if "image" in condition:
        x_t = np.concatenate([x_t, condition["image"]], -1)
    B, H, W, _ = x_t.shape
    D, rows, columns = p["embed"]["bias"].shape[0], H // PATCH, W // PATCH
    tokens = np.zeros((B, rows * columns, D))
    for j in range(rows * columns):
        row, column = divmod(j, columns)
        patch = x_t[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        tokens[:, j] = patch.reshape(B, -1) @ p["embed"]["kernel"].reshape(-1, D) + p["embed"]["bias"]
        tokens[:, j] += position(row, column, D) if has_positions else 0
    angles = t[:, None] * np.exp(-np.log(10_000) * np.arange(128) / 128)
    features = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    of_t = dense(p["time_embed"]["out"], silu(dense(p["time_embed"]["hidden"], features)))
    of_label = p["label_embed"]["table"]["embedding"][condition["label"]]
    text = np.tile(condition.get("text", np.zeros((B, 0, 4))), D // 4)
    sequence = np.concatenate([of_t[:, None], of_label[:, None], text], 1)
    c = of_t + of_label if kind in ("adaln", "adaln_zero") else sequence
    x = tokens
    if "registers" in p:
        x = np.concatenate([np.broadcast_to(p["registers"], (B, *p["registers"].shape)), x], 1)
    if kind == "in_context":
        x = np.concatenate([sequence, x], 1)  # the order of tokens does not matter: ours are at the end
    for i in range(DEPTH):
        x = block_oracle(jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"]), x, c, kind)
    x = x[:, -rows * columns :]
    if kind in ("adaln", "adaln_zero"):
        shift, scale = np.split(dense(p["final_norm"]["modulation"], silu(c))[:, None], 2, -1)
        x = layer_norm(x) * (1 + scale) + shift
    else:
        x = layer_norm(x, p["final_norm"])
    patches, out = dense(p["final"], x), np.zeros((B, H, W, 2 * SHAPE[-1]))
    for j in range(rows * columns):
        row, column = divmod(j, columns)
        patch = patches[:, j].reshape(B, PATCH, PATCH, -1)
        out[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = patch
    return out


CASES = {
    "adaln_zero": {"conditioning": "adaln_zero", "conditioners": LABEL | CHANNELS},
    "adaln": {"conditioning": "adaln", "has_qk_norm": True},
    "cross_attention": {
        "conditioning": "cross_attention",
        "conditioners": LABEL | TOKENS,
        "has_qk_norm": True,
        "mlp_ratio": 1.5,
    },
    "in_context": {
        "conditioning": "in_context",
        "conditioners": LABEL | TOKENS | CHANNELS,
        "num_registers": 3,
        "has_position_embedding": False,
    },
}


@functools.cache
def values_and_gradients(case, **changes):
    """The output of a case, and the gradients of its sum with random weights by parameters and x_t."""
    model = small(**CASES[case] | changes)
    x_t, t, condition = inputs(model)
    weights = jax.random.normal(jax.random.key(9), (2, *SHAPE[:2], 2 * SHAPE[2]))

    @jax.jit
    def run(params, x_t):
        out, pull_back = jax.vjp(lambda params, x_t: model.apply_params(params, x_t, t, condition), params, x_t)
        return out, pull_back(weights)

    params = random_params(model)
    return (params, x_t, t, condition, weights), *run(params, x_t)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_equations_in_float64(case):
    (params, x_t, t, condition, weights), out, (by_params, by_x_t) = values_and_gradients(case)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x_t, t))
    condition = {key: np.asarray(value) for key, value in condition.items()}

    def oracle(params, x_t):
        kind, has_positions = CASES[case]["conditioning"], CASES[case].get("has_position_embedding", True)
        return model_oracle(params, x_t, exact[2], condition, kind, has_positions)

    assert relative_error(out, oracle(*exact[:2])) <= 1e-5
    # Each leaf is moved along a direction of its own.
    rng, step = np.random.default_rng(1), 1e-5
    leaves, tree = jax.tree.flatten(exact[:2])
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path((params, x_t))]
    for i, gradient in enumerate(jax.tree.leaves((by_params, by_x_t))):
        gradient = np.asarray(gradient, np.float64)
        direction = rng.normal(size=gradient.shape) + 3 * gradient / np.linalg.norm(gradient)
        moved = [
            oracle(*jax.tree.unflatten(tree, [*leaves[:i], leaves[i] + sign * step * direction, *leaves[i + 1 :]]))
            for sign in (1, -1)
        ]
        expected = np.sum((moved[0] - moved[1]) * np.asarray(weights, np.float64)) / (2 * step)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(gradient.size)
        assert abs(np.sum(gradient * direction) - expected) <= 1e-4 * scale, paths[i]


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("adaln_zero", {"remat": "block", "attention": "blockwise"}),
        ("cross_attention", {"remat": "dots", "scan_unroll": 2, "attention": "xla"}),
    ],
    ids=str,
)
def test_options_that_only_change_the_computation_change_no_gradient(case, changes):
    _, *expected = values_and_gradients(case)
    _, *found = values_and_gradients(case, **changes)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert relative_error(b, a) <= 1e-5


def test_long_inputs_are_computed_blockwise():
    """Of 64 x 64 patches no array has all logits."""
    model, shape = small(patch_size=1), (64, 64, 1)
    params, arguments = model.abstract_params(shape), model.abstract_arguments(shape, 1)
    text = str(jax.make_jaxpr(model.apply_params)(params, *arguments))
    assert f"{HEADS},1024,4096]" in text and f"{HEADS},4096,4096]" not in text


# Sizes


@pytest.mark.parametrize(
    ("size", "parameters", "with_table", "printed"),
    [
        ("S/2", 32_865_056, 32_963_360, "6.06"),
        ("B/4", 130_426_496, 130_475_648, None),
        ("L/2", 457_840_672, 458_102_816, "80.71"),
        ("XL/2", 674_834_720, 675_129_632, "118.64"),
    ],
)
def test_sizes_have_the_papers_parameters_and_multiply_adds(size, parameters, with_table, printed):
    """Table 4 of the paper; its Gflops are G multiply-adds."""
    model = DiT(**DIT_SIZES[size])
    costs = model.costs((32, 32, 4))
    assert sum(costs.parameters.values()) == parameters
    assert with_table - parameters == (32 // model.patch_size) ** 2 * model.width
    assert printed is None or f"{costs.total / 1e9:.2f}" == printed


@pytest.mark.parametrize(
    ("side", "options", "printed"),
    [
        (64, {}, "524.6"),
        (32, {"conditioning": "adaln"}, "118.6"),
        (32, {"conditioning": "in_context"}, "119.4"),
        (32, {"conditioning": "cross_attention"}, "137.6"),
    ],
    ids=str,
)
def test_multiply_adds_of_xl_2_are_those_that_the_paper_prints(side, options, printed):
    """Sections 5 and 5.1."""
    assert f"{DiT(**DIT_SIZES['XL/2'], **options).costs((side, side, 4)).total / 1e9:.1f}" == printed


@pytest.mark.parametrize("case", CASES)
def test_multiply_adds_are_those_of_the_jaxpr(case):
    model = small(**CASES[case])
    params, arguments = model.abstract_params(SHAPE), model.abstract_arguments(SHAPE, 1)
    counted = count_products(jax.make_jaxpr(model.apply_params)(params, *arguments).jaxpr, params).by_module
    by_formula = dict(model.costs(SHAPE).multiply_adds)
    sums = by_formula.pop("blocks/residual_sums")
    assert {name: count for name, count in by_formula.items() if count} == counted
    tokens = 6 + {"in_context": 2 + 5 + 3}.get(case, 0)
    assert sums == DEPTH * (3 if case == "cross_attention" else 2) * tokens * model.width


@pytest.mark.parametrize(
    ("case", "attention"),
    [("cross_attention", "blockwise"), pytest.param("adaln_zero", "xla", marks=pytest.mark.slow)],
)
def test_what_the_backward_pass_computes_again_is_counted(case, attention):
    """The traced gradient has the forward pass, two products for each of its own, and what is computed again."""
    for remat in ("none", "dots", "block"):
        model = small(**CASES[case], remat=remat, attention=attention, has_position_embedding=False)
        params, (x_t, *arguments) = model.abstract_params(SHAPE), model.abstract_arguments(SHAPE, 1)

        def loss(params, x_t, *arguments):
            return model.apply_params(params, x_t, *arguments).sum()  # noqa: B023

        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x_t, *arguments).jaxpr
        costs = model.costs(SHAPE)
        products = costs.total - costs.multiply_adds["blocks/residual_sums"]
        counted = count_products(jaxpr, params).by_module.total()
        assert counted == 3 * products + costs.recomputed, remat


# Values and errors


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity():
    model = small()
    params = model.init_params(SHAPE, 0)
    assert not np.any(params["final"]["kernel"]) and np.any(params["blocks"]["fc2"]["kernel"])
    block, (J, D) = model.block(SHAPE)
    x, c = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((2, J, D), (2, D))))
    of_block = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    np.testing.assert_array_equal(jax.jit(block.apply)({"params": of_block}, x, c)[0], x)


def test_blocks_of_all_conditionings_can_be_measured_alone():
    for conditioning in CONDITIONINGS:
        block, (J, D) = small(conditioning=conditioning).block(SHAPE)
        x, c = jnp.zeros((2, J, D)), jnp.zeros((2, D))
        (y, _), variables = jax.eval_shape(functools.partial(block.init_with_output, jax.random.key(0)), x, c)
        assert y.shape == x.shape
        stacked = shapes_by_path(small(conditioning=conditioning).abstract_params(SHAPE)["blocks"])
        assert {path: (DEPTH, *shape) for path, shape in shapes_by_path(variables["params"]).items()} == stacked


def test_bfloat16_keeps_parameters_and_output_in_float32():
    _, expected, _ = values_and_gradients("cross_attention")
    (params, *_), out, gradients = values_and_gradients("cross_attention", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves((params, out, gradients))} == {jnp.dtype("float32")}
    assert 0 < relative_error(out, expected) <= 3e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 4}, "patch_size P = 4 must divide the height H = 4 and the width W = 6"),
        ({"num_heads": 3}, "width must be a multiple of num_heads = 3, got 16"),
        ({"width": 18}, "width must be a multiple of 4 for the position embedding, got 18"),
        ({"mlp_ratio": 1.3}, r"mlp_ratio must give a whole number of channels, got 1.3 \* width = 16"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must give a whole number of channels"),
        ({"conditioning": "film"}, "'film'; choose one of adaln_zero, adaln, cross_attention, in_context"),
        ({"attention": "flash"}, "'flash'; choose one of auto, xla, blockwise, cudnn"),
        ({"conditioners": TOKENS}, "cannot use the tokens of the condition 'text'; choose cross_attention or in_cont"),
        (
            {"conditioners": class_labels(3, token_width=8), "conditioning": "in_context"},
            "tokens of the condition 'label' must have the model's width = 16, got 8",
        ),
    ],
    ids=str,
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options).abstract_params(SHAPE)


# The published layout


@functools.cache
def state_dict():
    return to_pytorch(random_params(small()), latent_size=SHAPE[:2])


def test_state_dicts_round_trip_bit_for_bit():
    tensors = state_dict()
    assert is_dit(tensors) and not is_dit(name for name in tensors if not name.startswith("x_embedder"))
    params = from_pytorch(tensors)
    assert shapes_by_path(params) == shapes_by_path(small().abstract_params(SHAPE))
    jax.tree.map(np.testing.assert_array_equal, params, random_params(small()))
    again = to_pytorch(params, latent_size=SHAPE[:2])
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (again[name].dtype, again[name].tobytes()) == (np.float32, tensor.tobytes()), name


def test_a_state_dict_of_another_network_is_refused_with_the_differences():
    tensors = state_dict()
    with pytest.raises(ValueError, match=r"not the published layout of DiT; names start with \['conv.weight'\]"):
        from_pytorch({"conv.weight": np.zeros(3)})
    changed = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.attn.proj.bias"}
    changed |= {"blocks.0.attn.q_norm.weight": np.ones(8), "t_embedder.mlp.2.bias": np.zeros(3)}
    with pytest.raises(ValueError) as error:
        from_pytorch(changed)
    for line in (
        "missing: ['blocks.1.attn.proj.bias (16,)']",
        "unexpected: ['blocks.0.attn.q_norm.weight (8,)']",
        "of another shape: ['t_embedder.mlp.2.bias: (3,), not (16,)']",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match="pos_embed of 6 positions is not the fixed sin-cos table"):
        from_pytorch(tensors | {"pos_embed": tensors["pos_embed"] + 1e-3})
    for name in tensors:  # any one of them may be missing, or a number
        for other in ({}, {name: np.float32(0)}):
            with pytest.raises(ValueError, match=f"{re.escape(name)}|not the published layout of DiT"):
                from_pytorch({key: value for key, value in tensors.items() if key != name} | other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "adaln"}, r"blocks/modulation/kernel: \(2, 16, 4, 16\), not \(2, 16, 6, 16\)"),
        ({"conditioning": "cross_attention"}, "missing: .*blocks/modulation/bias"),
        ({"has_qk_norm": True}, r"unexpected: \['blocks/self_attention/k_norm/scale"),
        ({"num_registers": 2}, r"unexpected: \['registers \(2, 16\)"),
        ({"conditioners": {}}, "missing: .*label_embed/table/embedding"),
    ],
    ids=str,
)
def test_parameters_without_a_place_in_the_layout_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        to_pytorch(random_params(small(**options)))
    with pytest.raises(ValueError, match=r"latent_size must be a multiple of the patches of 2, got \(5, 4\)"):
        to_pytorch(random_params(small()), latent_size=(5, 4))


# Training and sampling


def test_the_config_is_the_papers_model():
    root = importlib.util.find_spec("diffussm_jax").submodule_search_locations[0]
    file = f"{root}/../configs/dit_imagenet256.py"
    for size, expected in (("XL/2", (1152, 28, 16, 2)), ("S/8", (384, 12, 6, 8))):
        config = load_config(f"{file}:{size}")
        model = Parts(config).model
        assert (model.width, model.depth, model.num_heads, model.patch_size) == expected
        assert model.conditioners.keys() == {"label"} and model.num_outputs == 2
    with pytest.raises(ValueError, match="unknown model size 'XL'; choose one of S/1, S/2, S/4, S/8, B/1"):
        load_config(f"{file}:XL")


@pytest.mark.parametrize("conditioning", ["adaln_zero", pytest.param("in_context", marks=pytest.mark.slow)])
def test_a_config_that_chooses_dit_is_trained_and_sampled(conditioning):
    config = tiny_config()
    choose(config, "model.name", "dit")
    assert (config.model.width, config.model.depth) == (16, 2)
    config.model.update(num_heads=2, conditioning=conditioning, remat="dots")
    parts = Parts(config, make_mesh(1))
    task, rng = parts.task, np.random.default_rng(0)
    batch = {"image": rng.integers(0, 255, (8, 8, 8, 1), np.uint8), "label": rng.integers(0, 10, 8).astype(np.int32)}
    before = jax.device_get(task.create_state().params)
    state, metrics = task.train_step(task.create_state(), batch_to_devices(task.mesh, batch))
    assert np.isfinite(metrics["loss"]) and task.multiply_adds == parts.model.costs((8, 8, 1)).total
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
    assert changed["final"] == {"kernel": True, "bias": True}
    samples = parts.generator(state.params, {"label": np.arange(2)}, 2, jax.random.key(0))
    assert samples.shape == (2, 8, 8, 1) and np.isfinite(samples).all()
