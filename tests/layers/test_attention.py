"""Attention is the softmax of float64, in values and gradients, whatever number of queries is taken at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffussm_jax.layers import QUERY_CHUNK, attend

B, L, S, HEADS, C = 2, 13, 9, 3, 6


def oracle(q, k, v):
    logits = np.einsum("blhc,bshc->bhls", q, k) / np.sqrt(C)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhls,bshc->blhc", weights / weights.sum(-1, keepdims=True), v)


def tensors():
    rng = np.random.default_rng(0)
    return [2 * rng.normal(size=(B, n, HEADS, C)) for n in (L, S, S)]


@pytest.mark.parametrize("query_chunk", [1, 5, 12, 13, 64])
def test_values_and_gradients(query_chunk):
    exact = tensors()
    given = [jnp.asarray(x, jnp.float32) for x in exact]
    implementations = {"xla": {}, "blockwise": {"query_chunk": query_chunk}}

    @jax.jit
    def run(*given):
        values = {name: attend(*given, name, **options) for name, options in implementations.items()}
        gradients = {
            name: jax.grad(lambda *x: jnp.sum(attend(*x, name, **options) ** 3), (0, 1, 2))(*given)  # noqa: B023
            for name, options in implementations.items()
        }
        return values, gradients

    values, gradients = run(*given)
    for value in values.values():
        assert oracles.relative_error(value, oracle(*exact)) <= 1e-6
    for actual, whole in zip(gradients["blockwise"], gradients["xla"], strict=True):
        assert oracles.relative_error(actual, whole) <= 1e-5


def largest_array(jaxpr):
    """Elements of the largest array that is computed in a jaxpr."""
    sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values()]
    return max(sizes + [largest_array(sub) for sub in inner if hasattr(sub, "eqns")])


@pytest.mark.parametrize("what", ["values", "gradients"])
def test_memory_is_linear_in_positions(what):
    def values(q, k, v, **options):
        return attend(q, k, v, **options)

    def gradients(q, k, v, **options):
        return jax.grad(lambda *x: attend(*x, **options).sum(), (0, 1, 2))(q, k, v)

    function = values if what == "values" else gradients
    num_positions = 9216  # 96 x 96 latents, of 768 px
    x = jax.ShapeDtypeStruct((1, num_positions, 1, 16), jnp.float32)

    def largest(**options):
        return largest_array(jax.make_jaxpr(lambda *x: function(*x, **options))(x, x, x).jaxpr)

    assert largest() == largest(implementation="blockwise") == QUERY_CHUNK * num_positions
    assert largest(implementation="xla") == num_positions**2


def test_what_cannot_be_used_is_refused():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in tensors())
    with pytest.raises(ValueError, match="attention 'flash'; choose one of auto, xla, blockwise, cudnn"):
        attend(q, k, v, "flash")
