"""What the tests of mixers share: a mixer's outputs and gradients, and the products in its trace."""

import functools

import jax
import jax.numpy as jnp

from diffussm_jax.models.costs import count_products
from diffussm_jax.models.mixers import mix_phases, num_outputs
from diffussm_jax.ssm import from_phases, to_phases


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params, u):
    """y [B, L, R * D]."""
    return model.apply({"params": params}, u)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(model, num_phases, params, u, dy):
    """y [B, L, R, D], by phases as a block computes it, and the gradients of sum(dy * y) by parameters and by u."""

    def apply(params, u):
        bound = model.bind({"params": params})
        return from_phases(mix_phases(bound, to_phases(u, num_phases), None))

    y, pull_back = jax.vjp(apply, params, u)
    return y, *pull_back(dy)


def directions_of(model):
    """The names of the parameters of each direction, in the order of the outputs."""
    return ("forward", "backward")[: num_outputs(model)]


def product_multiply_adds(model, length, width):
    """Multiply-adds of the matrix products in the trace of a sequence."""
    u = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), u)
    return count_products(jax.make_jaxpr(model.apply)(variables, u).jaxpr, {}).by_module.total()
