"""DiffuSSM is the paper's model: its parameters, its multiply-adds, and its block against the equations in float64."""

import functools
import importlib.util
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from ssm_problems import run_apart

from diffussm_jax.models import DIFFUSSM_SIZES, S4D, DiffuSSM
from diffussm_jax.models.backbone import class_labels
from diffussm_jax.models.conditioners import Conditioning
from diffussm_jax.ssm import s4d_inv, s4d_legs, s4d_lin

NUM_CLASSES, STATE_SIZE = 3, 4


def small(*, num_classes=NUM_CLASSES, label_dropout=0.1, mixer=S4D, state_size=STATE_SIZE, **options):
    """A narrow model of two blocks; options that it does not have itself are the mixer's."""
    own = {name: options.pop(name) for name in list(options) if name in DiffuSSM.__dataclass_fields__}
    mixer = functools.partial(mixer, state_size=state_size, **options)
    conditioners = class_labels(num_classes, dropout=label_dropout)
    return DiffuSSM(**{"width": 16, "depth": 2, "mixer": mixer, "conditioners": conditioners} | own)


def applied(model):
    """The jitted model: (params, x_t, t, condition) -> its output."""
    return jax.jit(lambda params, *arguments: model.apply({"params": params}, *arguments))


SMALL = small()
apply_small = applied(SMALL)


def random_params(model, shape, scale=0.3):
    """Parameters with nothing left at zero, so that every path through the model counts."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        mean = {"log_neg_re": -0.7, "log_dt": -1.5, "im": 3.0}.get(name, 0.0)
        spread = scale if name in ("bias", "embedding") else scale / np.sqrt(max(leaf.shape[-2:])) * 2
        return jnp.asarray(rng.normal(mean, spread, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: model.init_params(shape, 0)))


def inputs(B=2, H=4, W=4, C=1, num_classes=3):
    x_t = jax.random.normal(jax.random.key(5), (B, H, W, C))
    t = jnp.array([3, 97])[:B]
    return x_t, t, (jnp.arange(B) % num_classes if num_classes else None)


@functools.cache
def costs_of_xl(scan="raster"):
    mixer = functools.partial(S4D, scan=scan)
    return DiffuSSM(**DIFFUSSM_SIZES["XL"], mixer=mixer).costs((32, 32, 4))


def test_xl_has_the_papers_parameters():
    model = DiffuSSM(**DIFFUSSM_SIZES["XL"])
    shapes = jax.eval_shape(lambda: model.init_params((32, 32, 4), 0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 673_088_272
    assert sum(costs_of_xl().parameters.values()) == 673_088_272


def test_a_2d_scan_doubles_the_parameters_of_the_ssms_and_nothing_else():
    depth, D, N = 29, 1152, 64
    an_ssm = D * (N // 2 * (1 + 1 + 2 + 2) + 1 + 1)  # log_neg_re, im, B and C for each pair, log_dt and D
    expected = 673_088_272 + depth * 2 * an_ssm
    raster, both = costs_of_xl(), costs_of_xl("2d")
    assert sum(both.parameters.values()) == expected == 686_050_576
    assert both.multiply_adds == raster.multiply_adds
    assert both.mixer == pytest.approx(2 * raster.mixer, rel=1e-9)


def test_xl_has_the_papers_multiply_adds():
    D, J, L = 1152, 512, 1024
    at_256 = costs_of_xl()
    blocks = {part: count for part, count in at_256.multiply_adds.items() if part.startswith("blocks/")}
    modulation = blocks.pop("blocks/modulation")
    assert sum(blocks.values()) == 29 * (13 * J * D**2 + L * D**2) == 295_572_602_880
    assert modulation == 29 * 2 * D**2
    assert round(at_256.total / 1e9, 3) == 295.668


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
    options = {"patch_size": 2, "has_gate": True} if M == 4 else {}
    model = small(hourglass_ratio=M, bidirectional=bidirectional, scan=scan, method="recurrent", **options)
    H, W, C = 4, 8, 3
    params = jax.eval_shape(lambda: model.init_params((H, W, C), 0))
    x_t, t, y = inputs(1, H, W, C)
    jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, x_t, t, y))(params)
    assert count_dot_multiply_adds(jaxpr.jaxpr) == model.costs((H, W, C)).total


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_what_the_backward_pass_computes_again_is_counted(remat):
    """The traced gradient has the forward pass, two products for each of its own, and what is computed again."""
    shape = (4, 8, 3)
    model = small(remat=remat, method="recurrent", has_position_embedding=False)
    params = jax.eval_shape(lambda: model.init_params(shape, 0))
    x_t, t, y = inputs(1, *shape)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: model.apply({"params": p}, x_t, t, y).sum()))(params)
    costs = model.costs(shape)
    assert count_dot_multiply_adds(jaxpr.jaxpr) == 3 * costs.total + costs.recomputed


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
    out = (left * right) @ p["W3"]["kernel"] + p["W3"]["bias"]
    if "gate" in p:
        out *= (silu(c) @ p["gate"]["kernel"] + p["gate"]["bias"])[:, None]
    return x + out


def model_oracle(p, x_t, t, y, M, depth, P=1):
    B, H, W, C = x_t.shape
    if P > 1:  # each patch becomes the channels of a position, and each position a patch again
        patches = np.zeros((B, H // P, W // P, P * P * C))
        for h, w, i, j in itertools.product(range(H // P), range(W // P), range(P), range(P)):
            k = (i * P + j) * C
            patches[:, h, w, k : k + C] = x_t[:, h * P + i, w * P + j]
        of_patches, out = model_oracle(p, patches, t, y, M, depth), np.zeros((B, H, W, 2 * C))
        for h, w, i, j in itertools.product(range(H // P), range(W // P), range(P), range(P)):
            k = 2 * (i * P + j) * C
            out[:, h * P + i, w * P + j] = of_patches[:, h, w, k : k + 2 * C]
        return out
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


@pytest.mark.parametrize(
    "M,scan",
    [
        (2, "raster"),
        (2, "2d"),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, "raster"), (4, "raster"), (1, "2d"))),
    ],
)
def test_forward_pass_is_the_equations_in_float64(M, scan):
    model = small(hourglass_ratio=M, scan=scan)
    params = random_params(model, (3, 4, 1))
    x_t, t, y = inputs(H=3)
    out = applied(model)(params, x_t, t, y)
    params64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = model_oracle(params64, np.asarray(x_t, np.float64), np.asarray(t, np.float64), np.asarray(y), M, 2)
    assert np.linalg.norm(out - expected) <= 2e-5 * np.linalg.norm(expected)


def test_patches_and_gates_are_the_equations_in_float64():
    model, shape = small(patch_size=2, has_gate=True, has_position_embedding=True), (4, 8, 3)
    params = random_params(model, shape)
    x_t, t, y = inputs(1, *shape)
    params64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = model_oracle(params64, np.asarray(x_t, np.float64), np.asarray(t, np.float64), np.asarray(y), 2, 2, 2)
    assert np.linalg.norm(applied(model)(params, x_t, t, y) - expected) <= 2e-5 * np.linalg.norm(expected)
    with pytest.raises(ValueError, match=r"patch_size P = 2 must divide height and width of the input \(5, 8\)"):
        model.check((5, 8, 3))


def test_a_gate_starts_at_zero_in_place_of_the_last_layer():
    params = small(has_gate=True).init_params((4, 4, 1), 0)["blocks"]
    assert not np.any(params["gate"]["kernel"]) and np.any(params["W3"]["kernel"])


def test_fresh_model_predicts_zero_and_fresh_blocks_are_the_identity():
    params = SMALL.init_params((4, 4, 1), 0)
    assert not np.any(apply_small(params, *inputs()))
    assert not np.any(params["blocks"]["W3"]["kernel"]) and not np.any(params["blocks"]["norm"]["modulation"]["kernel"])


def gradients(model):
    x_t, t, y = inputs()
    params = random_params(SMALL, (4, 4, 1))
    return jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x_t, t, y) ** 2)))(params)


@functools.cache
def expected_gradients():
    return gradients(SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"remat": "block", "scan_unroll": 2},
        pytest.param({"remat": "dots", "method": "chunked"}, marks=pytest.mark.slow),
        pytest.param({"method": "associative"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_options_that_only_change_the_computation_change_no_gradient(change):
    found = gradients(small(**change))
    for a, b in zip(jax.tree.leaves(expected_gradients()), jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)


@pytest.mark.parametrize("change", [{"has_position_embedding": False}, {"discretization": "bilinear"}], ids=str)
def test_options_of_the_model_change_its_output(change):
    params = random_params(SMALL, (4, 4, 1))
    out, other = apply_small(params, *inputs()), applied(small(**change))(params, *inputs())
    assert np.linalg.norm(out - other) > 1e-5 * np.linalg.norm(out)


def test_ssms_start_at_the_named_scheme():
    """One of the directions in a model, and the others as the mixer starts by itself."""
    u = jnp.zeros((1, 4, SMALL.width))
    starts = [(small(initialization="legs").init_params((4, 4, 1), 0)["blocks"]["ssm"], s4d_legs, (SMALL.depth,))]
    for name, scheme in (("lin", s4d_lin), ("inv", s4d_inv), ("legs", s4d_legs)):
        mixer = S4D(STATE_SIZE, initialization=name)
        starts.append((jax.jit(mixer.init)(jax.random.key(0), u)["params"], scheme, ()))
    for params, scheme, depth in starts:
        params, (Lambda, B) = params["backward"], scheme(STATE_SIZE)
        shape = (*depth, SMALL.width, STATE_SIZE // 2)
        np.testing.assert_allclose(params["im"], np.broadcast_to(Lambda.imag, shape), rtol=1e-6)
        np.testing.assert_allclose(params["B"][..., 0], np.broadcast_to(B.real, shape), rtol=1e-6)
        assert (params["log_dt"] >= np.log(1e-3)).all() and (params["log_dt"] <= np.log(1e-1) + 1e-6).all()


def test_one_direction_sees_no_later_token():
    model = small(bidirectional=False)
    params = random_params(model, (4, 4, 1))
    x_t, t, y = inputs()
    later = x_t.at[:, 2:].add(1.0)
    apply = applied(model)
    out, changed = (apply(params, x, t, y) for x in (x_t, later))
    np.testing.assert_allclose(out[:, :2], changed[:, :2], atol=1e-4 * np.abs(out).max())  # the FFT rounds across time
    assert np.abs(out[:, 2:] - changed[:, 2:]).max() > 1e-2 * np.abs(out).max()


def test_bfloat16_keeps_ssm_parameters_and_output_in_float32():
    model = small(dtype="bfloat16")
    params = random_params(model, (4, 4, 1), scale=0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out, reference = applied(model)(params, *inputs()), apply_small(params, *inputs())
    assert out.dtype == jnp.float32
    assert 0 < np.linalg.norm(out - reference) <= 3e-2 * np.linalg.norm(reference)


def test_labels_are_dropped_at_the_given_rate():
    model, y = small(label_dropout=0.25), jnp.full(4000, 1)
    dropped = model.drop(y, jax.random.key(0))["label"]
    assert set(np.unique(dropped)) == {1, NUM_CLASSES}
    assert abs((dropped == NUM_CLASSES).mean() - 0.25) < 0.03
    np.testing.assert_array_equal(model.drop({"label": y}, jax.random.key(0))["label"], dropped)
    assert (model.drop(y, jax.random.key(1))["label"] != dropped).any()
    np.testing.assert_array_equal(small(label_dropout=0.0).drop(y, jax.random.key(0))["label"], y)


def test_a_dropped_label_is_the_null_one_and_training_drops_none_by_itself():
    params = random_params(SMALL, (4, 4, 1))
    x_t, t, y = inputs()
    null = SMALL.null(y)
    np.testing.assert_array_equal(null["label"], [NUM_CLASSES] * 2)
    out, without, with_zeros = (apply_small(params, x_t, t, c) for c in (y, null, jnp.zeros(2, int)))
    assert np.abs(out - without).max() > 1e-3 and np.abs(with_zeros - without).max() > 1e-3
    trained = jax.jit(functools.partial(SMALL.apply, train=True))({"params": params}, x_t, t, y)
    np.testing.assert_array_equal(trained, out)


class OldLabelDropout(nn.Module):
    """As the model dropped labels when it did so itself: the key's stream and the submodule's name decide."""

    dropout: float

    class Inner(nn.Module):
        dropout: float

        @nn.compact
        def __call__(self, y):
            is_dropped = jax.random.bernoulli(self.make_rng("label_dropout"), self.dropout, y.shape)
            return jnp.where(is_dropped, NUM_CLASSES, y)

    @nn.compact
    def __call__(self, y):
        return self.Inner(self.dropout, name="label_embed")(y)


def test_labels_are_dropped_as_they_were_by_the_model_itself():
    y = jnp.arange(64) % NUM_CLASSES
    expected = OldLabelDropout(0.5).apply({}, y, rngs={"label_dropout": jax.random.key(7)})
    np.testing.assert_array_equal(small(label_dropout=0.5).drop(y, jax.random.key(7))["label"], expected)


def test_unconditional_model_has_no_label_table():
    model = small(num_classes=0)
    params = random_params(model, (4, 4, 1))
    assert "label_embed" not in params
    x_t, t, _ = inputs()
    assert applied(model)(params, x_t, t).shape == (2, 4, 4, 2)
    assert model.drop(None, jax.random.key(0)) == model.null(None) == model.example_condition(2) == {}
    with pytest.raises(ValueError, match=r"takes the conditions \[\], it was called with \['label'\]"):
        model.apply({"params": params}, x_t, t, jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"takes the conditions \['label'\], it was called with \[\]"):
        SMALL.as_condition(None)


class Picture(nn.Module):
    """A conditioner that gives channels, or tokens."""

    width: int
    dtype: jnp.dtype = jnp.float32
    gives: str = "channels"

    def __call__(self, value):
        return Conditioning(**{self.gives: value})

    def null(self, value):
        return jnp.zeros_like(value)

    def drop(self, value, stream):
        return value

    def example(self, batch_size):
        return jnp.zeros((batch_size, 4, 4, 5))


def test_other_conditioners_give_channels_beside_the_vector_of_the_label():
    picture = {"picture": Picture}
    model = small(conditioners=class_labels(NUM_CLASSES) | picture)
    params = random_params(model, (4, 4, 1))
    assert params["embed"]["kernel"].shape == (2 * (1 + 5), 16)  # M positions of x_t and of the picture
    x_t, t, y = inputs()
    condition = {"label": y, "picture": jnp.ones((2, 4, 4, 5))}
    without = condition | {"picture": model.null(condition)["picture"]}
    apply = applied(model)
    out, changed = (apply(params, x_t, t, c) for c in (condition, without))
    assert out.shape == (2, 4, 4, 2) and np.abs(out - changed).max() > 1e-3
    assert jax.tree.map(jnp.shape, model.example_condition(3)) == {"label": (3,), "picture": (3, 4, 4, 5)}
    with_tokens = small(conditioners={"words": functools.partial(Picture, gives="tokens")})
    with pytest.raises(ValueError, match="cannot use the tokens of the condition 'words'"):
        with_tokens.init_params((4, 4, 1), 0)


class Sequence(nn.Module):
    """S4D as a mixer of sequences [B, L, D] alone, which knows nothing of phases."""

    state_size: int

    @nn.compact
    def __call__(self, u, grid=None):
        return S4D(self.state_size, name="inner")(u, grid=grid)


def test_a_mixer_of_plain_sequences_serves_too():
    model = small(mixer=Sequence)
    params = random_params(SMALL, (4, 4, 1))
    of_model = params | {"blocks": params["blocks"] | {"ssm": {"inner": params["blocks"]["ssm"]}}}
    shapes = jax.eval_shape(lambda: model.init_params((4, 4, 1), 0))
    assert jax.tree.map(jnp.shape, of_model) == jax.tree.map(jnp.shape, shapes)
    found, expected = applied(model)(of_model, *inputs()), apply_small(params, *inputs())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert model.costs((4, 4, 1)).mixer is None  # it does not say


@pytest.mark.parametrize(
    "options,message",
    [
        ({"hourglass_ratio": 3}, "M = 3 must divide the width W = 4"),
        ({"scan": "3d"}, "scan.*'3d'; choose one of raster, 2d"),
        ({"remat": "all"}, "remat.*'all'; choose one of none, dots, block"),
        ({"method": "fftt"}, "method.*'fftt'; choose one of"),
        ({"width": 18}, "multiple of 4.*got 18"),
        ({"state_size": 5}, "even.*got 5"),
        ({"initialization": "noise"}, "initialization.*'noise'; choose one of legs, lin, inv, random"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options).init_params((4, 4, 1), 0)


COPIES = r"""
import functools, math, re
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from diffussm_jax.models import S4D
from diffussm_jax.models.diffussm import Block
from diffussm_jax.parallel.topology import compile_only_devices, parse_machine

M, D, B, J = 2, 256, 16, 512
block = Block(M, functools.partial(S4D, method="pallas", platform="tpu"), (32, 32), jnp.bfloat16)
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
