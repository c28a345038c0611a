"""The attention mixer is the float64 layer, in values and in the gradients of u and of every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from mixer_problems import outputs, product_multiply_adds, value_and_gradients

from diffussm_jax.layers import ATTENTION
from diffussm_jax.models.mixers import Attention, num_outputs

B, D, HEADS = 2, 12, 3
EPSILON = 1e-6  # of the norms


def mixer_and_input(length, dtype=jnp.float32, **options):
    """With biases and scales that are not zero and one."""
    model = Attention(**{"num_heads": HEADS} | options)
    u = jnp.asarray(oracles.normal(0, B, length, D), dtype)
    params = jax.jit(model.init)(jax.random.key(1), u)["params"]
    return model, jax.tree.map(lambda x: x + 0.5 * oracles.normal(3, *x.shape) * (x.ndim == 1), params), u


def norm(x, scale):
    """x / sqrt(mean of x^2 + epsilon) * scale, and its adjoint: dy -> dx, dscale."""
    root = np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON)

    def pull_back(dy):
        dx = dy * scale / root - x * np.mean(dy * scale * x, -1, keepdims=True) / root**3
        return dx, np.einsum("blhc,blhc->c", dy, x / root)

    return x / root * scale, pull_back


def oracle(params, u, dy=None):
    """y [B, L, D], or the gradients of sum(dy * y) by parameters and u: by hand, from the output back to u."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    u = np.asarray(u, np.float64)
    qkv = np.einsum("bld,dke->kble", u, p["qkv"]["kernel"]) + p["qkv"]["bias"][:, None, None]
    q, k, v = qkv.reshape(3, B, -1, HEADS, D // HEADS)
    norms = {}
    if "q_norm" in p:
        q, norms["q_norm"] = norm(q, p["q_norm"]["scale"])
        k, norms["k_norm"] = norm(k, p["k_norm"]["scale"])
    scale = (D // HEADS) ** -0.5
    logits = scale * np.einsum("blhc,bshc->bhls", q, k)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhls,bshc->blhc", weights, v).reshape(u.shape)
    if dy is None:
        return mixed @ p["proj"]["kernel"] + p["proj"]["bias"]

    d_mixed = (dy @ p["proj"]["kernel"].T).reshape(v.shape)
    d_weights = np.einsum("blhc,bshc->bhls", d_mixed, v)
    d_logits = scale * weights * (d_weights - np.sum(d_weights * weights, -1, keepdims=True))
    d_q, d_k = np.einsum("bhls,bshc->blhc", d_logits, k), np.einsum("bhls,blhc->bshc", d_logits, q)
    gradients = {"proj": {"kernel": np.einsum("bld,ble->de", mixed, dy), "bias": dy.sum((0, 1))}}
    if norms:
        d_q, d_q_scale = norms["q_norm"](d_q)
        d_k, d_k_scale = norms["k_norm"](d_k)
        gradients |= {"q_norm": {"scale": d_q_scale}, "k_norm": {"scale": d_k_scale}}
    d_qkv = np.stack([d_q, d_k, np.einsum("bhls,blhc->bshc", weights, d_mixed)]).reshape(qkv.shape)
    gradients["qkv"] = {"kernel": np.einsum("bld,kble->dke", u, d_qkv), "bias": d_qkv.sum((1, 2))}
    return gradients, np.einsum("kble,dke->bld", d_qkv, p["qkv"]["kernel"])


@pytest.mark.parametrize(
    ("length", "num_phases", "options"),
    [(1, 1, {}), (7, 1, {"has_qk_norm": True}), (64, 4, {"attention": "blockwise"}), (100, 2, {"attention": "xla"})],
)
def test_values_and_gradients(length, num_phases, options):
    model, params, u = mixer_and_input(length, **options)
    assert num_outputs(model) == 1
    dy = oracles.normal(2, B, length, 1, D)
    y, gradients, du = value_and_gradients(model, num_phases, params, u, jnp.asarray(dy))
    np.testing.assert_allclose(outputs(model, params, u), y[:, :, 0], rtol=1e-5, atol=1e-5)
    assert oracles.relative_error(y[:, :, 0], oracle(params, u)) <= 2e-6
    expected, expected_du = oracle(params, u, dy[:, :, 0].astype(np.float64))
    assert jax.tree.map(np.shape, expected) == jax.tree.map(np.shape, gradients)
    for (path, d_expected), found in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(gradients), strict=True
    ):
        # By the keys' bias the gradient is zero without norms, and by queries of one position too.
        scale = max(np.linalg.norm(d_expected), 1e-2 * np.linalg.norm(dy))
        assert np.linalg.norm(found - d_expected) <= 1e-5 * scale, path
    assert oracles.relative_error(du, expected_du) <= 1e-5


def test_bfloat16_stays_near_float32():
    model, params, u = mixer_and_input(64, jnp.bfloat16, has_qk_norm=True)
    y = outputs(model, params, u)
    assert y.dtype == jnp.bfloat16
    assert oracles.relative_error(np.asarray(y, np.float32), oracle(params, np.asarray(u, np.float32))) <= 1e-2


def test_initial_values_are_those_of_one_matrix():
    width = 96
    params = jax.jit(Attention().init)(jax.random.key(0), jnp.zeros((1, 2, width)))["params"]
    for kernel, fans in ((params["qkv"]["kernel"], 4 * width), (params["proj"]["kernel"], 2 * width)):
        assert np.abs(kernel).max() <= np.sqrt(6 / fans) and np.var(kernel) == pytest.approx(2 / fans, rel=0.05)


def test_costs_are_the_products_of_the_trace():
    for attention in ("xla", "blockwise"):
        method, multiply_adds = Attention(attention=attention).costs(32, 48, "float32")
        assert method == attention and multiply_adds == product_multiply_adds(Attention(attention=attention), 32, 48)
    assert [Attention().costs(length, 64, "float32")[0] for length in (1024, 1025)] == ["xla", "blockwise"]


def test_what_cannot_be_used_is_named():
    def init(width, **options):
        return jax.eval_shape(Attention(**options).init, jax.random.key(0), jnp.zeros((1, 4, width)))

    with pytest.raises(ValueError, match="num_heads = 5 must divide the width 16"):
        init(16, num_heads=5)
    with pytest.raises(ValueError, match=f"'flash'; choose one of {', '.join(ATTENTION)}"):
        init(16, attention="flash")
