"""S4 (Gu, Goel and Ré, arXiv 2111.00396) as a sequence mixer: a diagonal plus low-rank state matrix."""

from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp

from diffussm_jax.models.mixers.long_convolution import LongConvolution
from diffussm_jax.options import Range
from diffussm_jax.ssm import dplr_kernel, init_s4, to_dplr


class S4(LongConvolution):
    """S4 in one direction or both: u [B, L, D] -> [B, L, R * D], the forward outputs and then the backward ones.

    Each channel and direction has an SSM with A = diag(Lambda) - P P*, from HiPPO-LegS, and the bilinear transform.
    Lambda, P, B, C, dt and the skip D are learned in float32. The parameters do not depend on L (`ssm.dplr`).

    Attributes:
      state_size: N, even.
      dt_min: smallest initial step.
      dt_max: largest initial step.
    """

    state_size: Annotated[int, Range(2)] = 64
    dt_min: Annotated[float, Range(1e-12)] = 1e-3
    dt_max: Annotated[float, Range(1e-12)] = 1e-1

    def check(self) -> None:
        """Raises ValueError if an option is not allowed or the state size is odd."""
        super().check()
        if self.state_size % 2:
            raise ValueError(f"state_size must be even, got {self.state_size}")

    def init_direction(self, key: jax.Array, width: int, length: int) -> dict[str, jax.Array]:
        """As `init_s4`."""
        return init_s4(key, width, self.state_size, dt_min=self.dt_min, dt_max=self.dt_max)

    def taps(self, real: Mapping[str, jax.Array], length: int) -> jax.Array:
        """As `dplr_kernel`, with the skip."""
        return dplr_kernel(to_dplr(real), length) + jnp.pad(real["D"][:, None], ((0, 0), (0, length - 1)))
