"""The interface of conditioners."""

from typing import Any, NamedTuple, Protocol

import jax


class Conditioning(NamedTuple):
    """What a conditioner gives to a backbone; None where it gives nothing of the kind.

    Attributes:
      vector: [B, width], added to the time embedding.
      tokens: [B, T, width], for cross-attention or to be put before the sequence.
      channels: [B, H, W, c], concatenated to x_t.
    """

    vector: jax.Array | None = None
    tokens: jax.Array | None = None
    channels: jax.Array | None = None


class Conditioner(Protocol):
    """A Flax module with the fields `width` and `dtype`. `value` is the batch's entry, an array or a pytree."""

    width: int
    dtype: Any

    def __call__(self, value: Any) -> Conditioning:
        """Embeds a value, null values included."""

    def null(self, value: Any) -> Any:
        """The value that stands for no condition, in the shape of `value`."""

    def drop(self, value: Any, stream: str) -> Any:
        """`value` with rows replaced by null ones at random, from `self.make_rng(stream)`."""

    def example(self, batch_size: int) -> Any:
        """A value of the right shape and dtype."""
