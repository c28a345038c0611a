"""A backbone: a multilayer perceptron on the flattened image."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from diffussm_jax.layers import TimeEmbed
from diffussm_jax.models import Backbone
from diffussm_jax.options import Range
from diffussm_jax.registry import register


class MLP(Backbone):
    width: Annotated[int, Range(1)] = 32
    depth: Annotated[int, Range(1)] = 2

    @nn.compact
    def __call__(self, x_t, t, condition=None, *, train=False):
        c = TimeEmbed(self.width, name="time_embed")(t)
        for embedded in self.embed(condition, self.width, jnp.float32).values():
            c = c + embedded.vector
        h = nn.Dense(self.width)(x_t.reshape(x_t.shape[0], -1)) + c
        for _ in range(self.depth):
            h = h + nn.Dense(self.width)(nn.gelu(nn.LayerNorm()(h)))
        out = nn.Dense(self.num_outputs * x_t[0].size, kernel_init=nn.initializers.zeros)(h)
        return out.reshape(*x_t.shape[:-1], -1)


register("model", "mlp", MLP)
