"""S6, the selective state-space layer of Mamba (Gu and Dao, arXiv 2312.00752), as a Flax module."""

from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffussm_jax.options import CHANGEABLE_ON_RESUME, Choices, Range, check_options
from diffussm_jax.parallel.sharding import Rules, over_channels, sum_over_channels
from diffussm_jax.ssm import from_phases, selective_scan, to_phases
from diffussm_jax.ssm.selective import SELECTIVE_CHUNK, SELECTIVE_DISCRETIZATIONS, init_s6


class S6(nn.Module):
    """S6 in one direction or both: u [B, L, D] -> [B, L, R * D], the forward outputs and then the backward ones.

    Each direction has its own parameters, float32, and all of its work is float32; the result has the dtype of u:

        low, B, C = split(x_proj u)        of all channels, for each position
        dt        = softplus(dt_proj low + dt_bias)
        y         = selective_scan(u, dt, -exp(A_log), B, C, D)

    This is the SSM of a Mamba block alone. The block's projections, its gate and its short convolution are not here:
    DiffuSSM's block has projections and a gate of its own.

    On a mesh every device computes its own batch rows and channels. The only communication along `tensor` is the sum of
    x_proj u, dt_rank + 2N numbers for each position, and as many in the backward pass.

    Attributes:
      state_size: N.
      dt_rank: rank of the projection to dt; 0 is D / 16, rounded up.
      bidirectional: whether a second SSM runs backwards; R is 2 then, else 1.
      discretization: of the input, "euler" (as Mamba) or "zoh".
      dt_min: smallest initial step.
      dt_max: largest initial step.
      chunk: positions of the associative scan (`ssm.selective_scan`).
    """

    state_size: Annotated[int, Range(1)] = 16
    dt_rank: Annotated[int, Range(0)] = 0
    bidirectional: bool = True
    discretization: Annotated[str, Choices(SELECTIVE_DISCRETIZATIONS)] = "euler"
    dt_min: Annotated[float, Range(1e-12)] = 1e-3
    dt_max: Annotated[float, Range(1e-12)] = 1e-1
    chunk: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = SELECTIVE_CHUNK
    sharding_rules: ClassVar[Rules] = ((r".", (("tensor", "fsdp"),)),)

    def check(self) -> None:
        """Raises ValueError if an option is not allowed."""
        check_options(self)

    def __call__(self, u: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """Mixes along L; `grid` is ignored."""
        return from_phases(self.phases(to_phases(u, 1), grid)).reshape(*u.shape[:2], -1)

    @nn.compact
    def phases(self, u: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """The same in the layout of the hourglass: u [M, D, B, J] -> [M, R, D, B, J] (`ssm.phases`)."""
        self.check()
        M, D, _, _ = u.shape
        names = ("forward", "backward") if self.bidirectional else ("forward",)
        options = {"dt_rank": self._rank(D), "dt_min": self.dt_min, "dt_max": self.dt_max}
        directions = [self.param(name, init_s6, D, self.state_size, **options) for name in names]

        def apply(directions, u):
            x = from_phases(u).astype(jnp.float32)
            outputs = [self._direction(p, x, reverse=i == 1) for i, p in enumerate(directions)]
            return to_phases(jnp.stack(outputs, 2).astype(u.dtype), M)

        return over_channels(apply, directions, u)

    def _direction(self, p: dict[str, jax.Array], u: jax.Array, reverse: bool) -> jax.Array:
        """u [B, L, D] float32 -> [B, L, D], with those channels that a device has."""
        rank = p["dt_proj"].shape[1]
        projected = sum_over_channels(jnp.einsum("bld,dr->blr", u, p["x_proj"]))
        low, B, C = jnp.split(projected, [rank, rank + self.state_size], -1)
        dt = nn.softplus(jnp.einsum("blr,dr->bld", low, p["dt_proj"]) + p["dt_bias"])
        options = {"reverse": reverse, "discretization": self.discretization, "chunk": self.chunk}
        return selective_scan(u, dt, -jnp.exp(p["A_log"]), B, C, p["D"], **options)

    def _rank(self, width: int) -> int:
        return self.dt_rank or -(-width // 16)

    def costs(self, length: int, width: int, dtype: str, num_images: int = 1) -> tuple[str, float | None]:
        """ "scan", and the multiply-adds of a sequence.

        Counted are the projections, and 3N for each position and channel: to write the state, to advance it and to read
        it. What an associative scan does beyond the recurrence is not.

        Args:
          length: L.
          width: D.
          dtype: has no effect, nor has `num_images`.
        """
        N, rank = self.state_size, self._rank(width)
        num_directions = 2 if self.bidirectional else 1
        return "scan", num_directions * length * width * (2 * rank + 2 * N + 3 * N)
