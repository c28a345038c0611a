"""DiffuSSM is the paper's model: its parameters, its multiply-adds, and its block against the equations in float64."""

import importlib.util
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from ssm_problems import run_apart

from diffussm_jax.models import DIFFUSSM_SIZES, DiffuSSM
from diffussm_jax.ssm import s4d_inv, s4d_legs, s4d_lin
from diffussm_jax.training.state import init_params

SMALL = {"width": 16, "depth": 2, "num_classes": 3, "state_size": 4}


def random_params(model, shape, scale=0.3):
    """Parameters with nothing left at zero, so that every path through the model counts."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        mean = {"log_neg_re": -0.7, "log_dt": -1.5, "im": 3.0}.get(name, 0.0)
        spread = scale if name in ("bias", "embedding") else scale / np.sqrt(max(leaf.shape[-2:])) * 2
        return jnp.asarray(rng.normal(mean, spread, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_params(model, shape, 0)))


def inputs(B=2, H=4, W=4, C=1, num_classes=3):
    x_t = jax.random.normal(jax.random.key(5), (B, H, W, C))
    t = jnp.array([3, 97])[:B]
    return x_t, t, (jnp.arange(B) % num_classes if num_classes else None)


def test_xl_has_the_papers_parameters():
    model = DiffuSSM(**DIFFUSSM_SIZES["XL"])
    shapes = jax.eval_shape(lambda: init_params(model, (32, 32, 4), 0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 673_088_272


def test_a_2d_scan_doubles_the_parameters_of_the_ssms_and_nothing_else():
    raster, both = DiffuSSM(**DIFFUSSM_SIZES["XL"]), DiffuSSM(**DIFFUSSM_SIZES["XL"], scan="2d")
    shapes = jax.eval_shape(lambda: init_params(both, (32, 32, 4), 0))
    depth, D, N = 29, 1152, 64
    an_ssm = D * (N // 2 * (1 + 1 + 2 + 2) + 1 + 1)  # log_neg_re, im, B and C for each pair, log_dt and D
    expected = 673_088_272 + depth * 2 * an_ssm
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected == 686_050_576
    assert both.multiply_adds(32, 32, 4) == raster.multiply_adds(32, 32, 4)


def test_xl_has_the_papers_multiply_adds():
    model = DiffuSSM(**DIFFUSSM_SIZES["XL"])
    D, J, L = 1152, 512, 1024
    at_256 = model.multiply_adds(32, 32, 4)
    assert at_256["blocks"] == 29 * (13 * J * D**2 + L * D**2) == 295_572_602_880
    assert round(at_256["total"] / 1e9, 3) == 295.668


def count_dot_multiply_adds(jaxpr):
    """Multiply-adds of all dot_generals in a jaxpr, those in a scan times its length."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), (batch, _) = eqn.params["dimension_numbers"]
            lhs, rhs = (v.aval.shape for v in eqn.invars)
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracting)
            assert batch == () or lhs[batch[0]] <= max(rhs)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += eqn.params.get("length", 1) * count_dot_multiply_adds(inner)
    return total


@pytest.mark.parametrize(
    "M,bidirectional,scan", [(1, True, "raster"), (2, True, "raster"), (4, True, "2d"), (2, False, "raster")]
)
def test_multiply_adds_are_those_of_the_traced_model(M, bidirectional, scan):
    # The recurrent SSM has no matrix products, so only the linear layers are counted.
    model = DiffuSSM(**SMALL, hourglass_ratio=M, bidirectional=bidirectional, scan=scan, ssm_method="recurrent")
    H, W, C = 4, 8, 3
    params = jax.eval_shape(lambda: init_params(model, (H, W, C), 0))
    x_t, t, y = inputs(1, H, W, C)
    jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, x_t, t, y))(params)
    assert count_dot_multiply_adds(jaxpr.jaxpr) == model.multiply_adds(H, W, C)["total"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def ada_layer_norm(p, x, c):
    shift, scale = np.split(silu(c) @ p["modulation"]["kernel"] + p["modulation"]["bias"], 2, -1)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


def block_oracle(p, x, c, M, H):
    """The block's six equations (paper, section 3) with explicit loops over positions; H rows of them."""
    B, J, D = x.shape
    I = ada_layer_norm(p["norm"], x, c)
    h = gelu(I @ p["W0"]["kernel"] + p["W0"]["bias"])
    U = np.zeros((B, J * M, D))
    for j, k in itertools.product(range(J), range(M)):
        U[:, j * M + k] = gelu(h[:, j] @ p["W_up"]["kernel"][k] + p["W_up"]["bias"][k])
    Y = np.concatenate(
        [
            oracles.recurrence(p["ssm"]["forward"], U, reverse=False),
            oracles.recurrence(p["ssm"]["backward"], U, reverse=True),
        ],
        -1,
    )
    if "column_forward" in p["ssm"]:
        W = J * M // H
        by_columns = [h * W + w for w in range(W) for h in range(H)]
        Y[:, by_columns, :D] += oracles.recurrence(p["ssm"]["column_forward"], U[:, by_columns], reverse=False)
        Y[:, by_columns, D:] += oracles.recurrence(p["ssm"]["column_backward"], U[:, by_columns], reverse=True)
    I_down = np.zeros((B, J, 2 * D))
    for j, k in itertools.product(range(J), range(M)):
        down = gelu(Y[:, j * M + k] @ p["W_down"]["kernel"][k].reshape(2 * D, -1) + p["W_down"]["bias"][k])
        I_down[:, j, k * (2 * D // M) : (k + 1) * (2 * D // M)] = down
    left = gelu(I_down @ p["W2"]["kernel"] + p["W2"]["bias"])
    right = gelu(I @ p["W1"]["kernel"] + p["W1"]["bias"])
    return x + (left * right) @ p["W3"]["kernel"] + p["W3"]["bias"]


def model_oracle(p, x_t, t, y, M, depth):
    B, H, W, C = x_t.shape
    D = p["embed"]["bias"].shape[0]
    x = x_t.reshape(B, H * W // M, M * C) @ p["embed"]["kernel"] + p["embed"]["bias"]
    quarter = D // 4
    frequencies = 1 / 10_000 ** (np.arange(quarter) / quarter)
    for j in range(H * W // M):
        row, column = divmod(j, W // M)
        angles = [np.sin(column * frequencies), np.cos(column * frequencies)]
        x[:, j] += np.concatenate([*angles, np.sin(row * frequencies), np.cos(row * frequencies)])
    angles = t[:, None] * np.exp(-np.log(10_000) * np.arange(128) / 128)
    hidden = np.concatenate([np.cos(angles), np.sin(angles)], -1) @ p["time_embed"]["hidden"]["kernel"]
    hidden = silu(hidden + p["time_embed"]["hidden"]["bias"])
    c = hidden @ p["time_embed"]["out"]["kernel"] + p["time_embed"]["out"]["bias"]
    c = c + p["label_embed"]["table"]["embedding"][y]
    for i in range(depth):
        x = block_oracle(jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"]), x, c, M, H)
    x = ada_layer_norm(p["final_norm"], x, c) @ p["final"]["kernel"] + p["final"]["bias"]
    return x.reshape(B, H, W, 2 * C)


@pytest.mark.parametrize("M,scan", [(1, "raster"), (2, "raster"), (4, "raster"), (1, "2d"), (2, "2d")])
def test_forward_pass_is_the_equations_in_float64(M, scan):
    model = DiffuSSM(**SMALL, hourglass_ratio=M, scan=scan)
    params = random_params(model, (3, 4, 1))
    x_t, t, y = inputs(H=3)
    out = jax.jit(model.apply)({"params": params}, x_t, t, y)
    params64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = model_oracle(params64, np.asarray(x_t, np.float64), np.asarray(t, np.float64), np.asarray(y), M, 2)
    assert np.linalg.norm(out - expected) <= 2e-5 * np.linalg.norm(expected)


def test_fresh_model_predicts_zero_and_fresh_blocks_are_the_identity():
    model = DiffuSSM(**SMALL)
    params = init_params(model, (4, 4, 1), 0)
    x_t, t, y = inputs()
    assert not np.any(model.apply({"params": params}, x_t, t, y))
    assert not np.any(params["blocks"]["W3"]["kernel"]) and not np.any(params["blocks"]["norm"]["modulation"]["kernel"])


@pytest.mark.parametrize(
    "change",
    [
        {"remat": "block"},
        {"remat": "dots"},
        {"scan_unroll": 2},
        {"ssm_method": "chunked"},
        {"ssm_method": "associative"},
    ],
    ids=str,
)
def test_options_that_only_change_the_computation_change_no_gradient(change):
    x_t, t, y = inputs()
    params = random_params(DiffuSSM(**SMALL), (4, 4, 1))

    def gradients(model):
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x_t, t, y) ** 2)))(params)

    expected, found = gradients(DiffuSSM(**SMALL)), gradients(DiffuSSM(**SMALL, **change))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)


@pytest.mark.parametrize("change", [{"has_position_embedding": False}, {"discretization": "bilinear"}], ids=str)
def test_options_of_the_model_change_its_output(change):
    x_t, t, y = inputs()
    params = random_params(DiffuSSM(**SMALL), (4, 4, 1))
    out, other = (DiffuSSM(**SMALL, **c).apply({"params": params}, x_t, t, y) for c in ({}, change))
    assert np.linalg.norm(out - other) > 1e-5 * np.linalg.norm(out)


@pytest.mark.parametrize("name,scheme", [("legs", s4d_legs), ("lin", s4d_lin), ("inv", s4d_inv)])
def test_ssms_start_at_the_named_scheme(name, scheme):
    params = init_params(DiffuSSM(**SMALL, initialization=name), (4, 4, 1), 0)["blocks"]["ssm"]["backward"]
    Lambda, B = scheme(SMALL["state_size"])
    shape = (SMALL["depth"], SMALL["width"], SMALL["state_size"] // 2)
    np.testing.assert_allclose(params["im"], np.broadcast_to(Lambda.imag, shape), rtol=1e-6)
    np.testing.assert_allclose(params["B"][..., 0], np.broadcast_to(B.real, shape), rtol=1e-6)
    assert (params["log_dt"] >= np.log(1e-3)).all() and (params["log_dt"] <= np.log(1e-1) + 1e-6).all()


def test_one_direction_sees_no_later_token():
    model = DiffuSSM(**SMALL, bidirectional=False)
    params = random_params(model, (4, 4, 1))
    x_t, t, y = inputs()
    later = x_t.at[:, 2:].add(1.0)
    out, changed = (model.apply({"params": params}, x, t, y) for x in (x_t, later))
    np.testing.assert_allclose(out[:, :2], changed[:, :2], atol=1e-4 * np.abs(out).max())  # the FFT rounds across time
    assert np.abs(out[:, 2:] - changed[:, 2:]).max() > 1e-2 * np.abs(out).max()


def test_bfloat16_keeps_ssm_parameters_and_output_in_float32():
    model = DiffuSSM(**SMALL, dtype=jnp.bfloat16)
    params = random_params(model, (4, 4, 1), scale=0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x_t, t, y = inputs()
    out = model.apply({"params": params}, x_t, t, y)
    reference = DiffuSSM(**SMALL).apply({"params": params}, x_t, t, y)
    assert out.dtype == jnp.float32
    assert 0 < np.linalg.norm(out - reference) <= 3e-2 * np.linalg.norm(reference)


def test_training_drops_labels_at_the_given_rate():
    num = 4000
    model = DiffuSSM(**{**SMALL, "depth": 1}, label_dropout=0.25)
    params = random_params(model, (1, 2, 1))
    x_t, t, y = jnp.zeros((num, 1, 2, 1)), jnp.zeros(num), jnp.ones(num, jnp.int32)
    rngs = {"label_dropout": jax.random.key(0)}
    trained = model.apply({"params": params}, x_t, t, y, train=True, rngs=rngs)
    null = model.apply({"params": params}, x_t[:1], t[:1], jnp.full(1, model.num_classes))
    is_null = np.isclose(trained, null, rtol=1e-4, atol=1e-4).all((1, 2, 3))
    assert abs(is_null.mean() - 0.25) < 0.03


def test_unconditional_model_has_no_label_table():
    model = DiffuSSM(**{**SMALL, "num_classes": 0})
    params = random_params(model, (4, 4, 1))
    assert "label_embed" not in params
    x_t, t, _ = inputs()
    assert model.apply({"params": params}, x_t, t, train=True).shape == (2, 4, 4, 2)
    with pytest.raises(ValueError, match="0 classes was called with labels"):
        model.apply({"params": params}, x_t, t, jnp.zeros(2, int))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"hourglass_ratio": 3}, "M = 3 and W = 4"),
        ({"scan": "3d"}, "unknown scan '3d'; choose one of raster, 2d"),
        ({"remat": "all"}, "unknown remat 'all'; choose one of none, dots, block"),
        ({"ssm_method": "fftt"}, "unknown SSM method 'fftt'; choose one of"),
        ({"width": 18}, "multiple of 4, got 18"),
        ({"state_size": 5}, "even and at least 2.*got 5"),
        ({"initialization": "random"}, "unknown initialization 'random'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        init_params(DiffuSSM(**{**SMALL, **options}), (4, 4, 1), 0)


COPIES = r"""
import math, re, sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from diffussm_jax.models.diffussm import Block
from diffussm_jax.parallel.topology import compile_only_devices, parse_machine

M, D, B, J = 2, 256, 16, 512
block = Block(M, {"method": "pallas", "platform": "tpu"}, jnp.bfloat16)
sharding = SingleDeviceSharding(compile_only_devices(parse_machine("v5e:1x1"))[0])
x, c = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in ((B, J, D), (B, D)))
params = jax.eval_shape(block.init, jax.random.key(0), x, c)["params"]
params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), params)

def gradients(params, x, c, d_x):
    y, pull_back = jax.vjp(lambda *of: block.apply({"params": of[0]}, *of[1:])[0], params, x, c)
    return y, pull_back(d_x)

text = jax.jit(gradients).lower(params, x, c, x).compile().as_text()
entry = text[text.index("\nENTRY"):]
for shape, operation in re.findall(r" = bf16\[([\d,]+)\]\S* (copy|transpose|reshape)\(", entry):
    if math.prod(map(int, shape.split(","))) >= M * D * B * J:
        print(operation, shape)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra plan)")
def test_a_block_that_compiles_for_tpus_copies_u_and_y_once():
    """U and dY change their layout on the way to the kernels, and what W_down gives on the way to W2: nothing else."""
    copies = run_apart(COPIES).splitlines()
    assert len(copies) <= 3 and all(copy.startswith("copy ") for copy in copies), copies
