"""A condition that is given to a model as it is, for the tests of the U-Net."""

import flax.linen as nn
import jax.numpy as jnp

from diffussm_jax.models.conditioners import Conditioning


class Given(nn.Module):
    """A conditioner that gives its value, as channels or tokens."""

    gives: str
    shape: tuple
    width: int = 1
    dtype: jnp.dtype = jnp.float32

    def __call__(self, value):
        return Conditioning(**{self.gives: value})

    def null(self, value):
        return jnp.zeros_like(value)

    def drop(self, value, stream):
        return value

    def example(self, batch_size):
        return jnp.zeros((batch_size, *self.shape))
