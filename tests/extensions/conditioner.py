"""A conditioner: one number for each image, such as its brightness; a negative one stands for none."""

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffussm_jax.layers import TimeEmbed
from diffussm_jax.models.conditioners import Conditioning
from diffussm_jax.options import NOT_AN_OPTION, Range
from diffussm_jax.registry import register


class NumberEmbed(nn.Module):
    dropout: Annotated[float, Range(0, 1)] = 0.1
    width: Annotated[int, NOT_AN_OPTION] = 1
    dtype: Annotated[Any, NOT_AN_OPTION] = jnp.float32

    @nn.compact
    def __call__(self, value):
        return Conditioning(vector=TimeEmbed(self.width, self.dtype)(1000 * value))

    def null(self, value):
        return jnp.full_like(value, -1)

    def drop(self, value, stream):
        is_dropped = jax.random.bernoulli(self.make_rng(stream), self.dropout, value.shape)
        return jnp.where(is_dropped, -1, value)

    def example(self, batch_size):
        return jnp.full(batch_size, 0.5)


register("conditioner", "number", NumberEmbed)
