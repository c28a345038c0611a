"""Class labels, as DiT embeds them (arXiv 2212.09748), or as a token of LDM (arXiv 2112.10752)."""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffussm_jax.models.conditioners.base import Conditioning
from diffussm_jax.options import NOT_AN_OPTION, Range
from diffussm_jax.parallel.sharding import replicate_channels


class LabelEmbed(nn.Module):
    """A table of num_classes + 1 rows, the last for the null label: [B] int -> a vector [B, width], or one token.

    Attributes:
      num_classes: labels are 0 ... num_classes - 1.
      dropout: probability of the null label in training.
      token_width: 0 for a vector; else that of the token [B, 1, token_width], for cross-attention.
      width: of the vector.
      dtype: of the vector or the token.
    """

    num_classes: int
    dropout: Annotated[float, Range(0, 1)] = 0.1
    token_width: Annotated[int, Range(0)] = 0
    width: Annotated[int, NOT_AN_OPTION] = 1
    dtype: Annotated[jnp.dtype, NOT_AN_OPTION] = jnp.float32

    @nn.compact
    def __call__(self, y: jax.Array) -> Conditioning:
        table = nn.Embed(
            self.num_classes + 1,
            self.token_width or self.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            name="table",
        )
        embedded = replicate_channels(table(y))
        return Conditioning(tokens=embedded[:, None]) if self.token_width else Conditioning(vector=embedded)

    def null(self, y: jax.Array) -> jax.Array:
        return jnp.full_like(y, self.num_classes)

    def drop(self, y: jax.Array, stream: str) -> jax.Array:
        if self.dropout == 0:
            return y
        is_dropped = jax.random.bernoulli(self.make_rng(stream), self.dropout, y.shape)
        return jnp.where(is_dropped, self.num_classes, y)

    def example(self, batch_size: int) -> jax.Array:
        return jnp.zeros(batch_size, jnp.int32)
