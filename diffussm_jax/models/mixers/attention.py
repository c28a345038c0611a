"""Self-attention as a sequence mixer: what the SSM replaces, in the same block."""

from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffussm_jax.layers import ATTENTION, QUERY_CHUNK, Linear, attend
from diffussm_jax.options import CHANGEABLE_ON_RESUME, Choices, Range, check_options
from diffussm_jax.parallel.sharding import Rules, replicate_channels, split_channels

CHANNELS_OF_HEAD = 64


class Attention(nn.Module):
    """Multi-head self-attention over the L positions: u [B, L, D] -> [B, L, D], so R = 1.

    It adds no position embedding; the backbones have one. Linear layers are in the dtype of u, norms and softmax in
    float32. On a mesh the heads are split along `tensor`: u is gathered, and the output's channels are summed.

    Attributes:
      num_heads: divides D; 0 is one head for every 64 channels.
      has_qk_norm: whether queries and keys have an RMSNorm each, over the channels of a head.
      attention: how it is computed (`layers.attend`).
    """

    num_heads: Annotated[int, Range(0)] = 0
    has_qk_norm: bool = False
    attention: Annotated[str, Choices(ATTENTION), CHANGEABLE_ON_RESUME] = "auto"

    bidirectional: ClassVar[bool] = False  # R = 1: one output sees both sides
    sharding_rules: ClassVar[Rules] = (
        (r"qkv/kernel$", ("fsdp", None, "tensor")),
        (r"qkv/bias$", (None, "tensor")),
        (r"proj/kernel$", ("tensor", "fsdp")),
    )

    def check(self) -> None:
        """Raises ValueError if an option is not allowed."""
        check_options(self)

    @nn.compact
    def __call__(self, u: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """Mixes along L; `grid` is ignored.

        Raises:
          ValueError: D is not a multiple of num_heads, or num_heads not of the devices along `tensor`.
        """
        self.check()
        D, num_heads = u.shape[-1], self._num_heads(u.shape[-1])

        def keep(x):  # for remat = "dots"
            return checkpoint_name(x, "dense")

        def heads(x, norm=None):
            x = x.reshape(*x.shape[:2], num_heads, -1)
            if norm and self.has_qk_norm:
                x = nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=norm)(x).astype(u.dtype)
            return split_channels(x, channels=2)

        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", (0,), (1, 2))
        qkv = Linear("bld,dke->kble", (D, 3, D), u.dtype, kernel_init=init, name="qkv")
        q, k, v = keep(split_channels(qkv(replicate_channels(u)), batch=1))
        y = attend(heads(q, "q_norm"), heads(k, "k_norm"), heads(v), self.attention)
        proj = Linear("bld,de->ble", (D, D), u.dtype, name="proj")
        return keep(split_channels(proj(split_channels(y.reshape(u.shape)))))

    def _num_heads(self, width: int) -> int:
        num_heads = self.num_heads or max(1, width // CHANNELS_OF_HEAD)
        if width % num_heads:
            raise ValueError(f"the attention mixer's num_heads = {num_heads} must divide the width {width}")
        num_devices = dict(jax.sharding.get_abstract_mesh().shape).get("tensor", 1)
        if num_heads % num_devices:
            raise ValueError(
                f"the attention mixer's num_heads = {num_heads} is not a multiple of the {num_devices} devices along "
                "tensor; choose a smaller config.mesh.tensor"
            )
        return num_heads

    def costs(self, length: int, width: int, dtype: str, num_images: int = 1) -> tuple[str, float | None]:
        """How attention is computed, "auto" resolved, and the multiply-adds of a sequence: 4 L D^2 + 2 L^2 D.

        Args:
          length: L.
          width: D.
          dtype: has no effect, nor has `num_images`.
        """
        method = self.attention
        if method == "auto":
            method = "xla" if length <= QUERY_CHUNK else "blockwise"
        return method, 4 * length * width**2 + 2 * length**2 * width
