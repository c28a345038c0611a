"""LSSL (Gu et al., arXiv 2110.13985) as a sequence mixer: a dense state matrix, the historic reference for small N."""

from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp

from diffussm_jax.models.mixers.long_convolution import LongConvolution
from diffussm_jax.options import Range
from diffussm_jax.ssm import init_lssl, lssl_kernel, to_lssl


class LSSL(LongConvolution):
    """LSSL in one direction or both: u [B, L, D] -> [B, L, R * D], the forward outputs and then the backward ones.

    Each channel and direction has an SSM with the dense HiPPO-LegS matrix, which is fixed, and the generalised bilinear
    transform. B, C, dt and the skip D are learned in float32. See `ssm.lssl` for how this compares with the paper.

    Attributes:
      state_size: N, at most 64, because the kernel takes N^2 numbers and N^3 operations for each channel.
      alpha: of the transform; 0.5 is bilinear, 1 backward Euler.
      dt_min: smallest initial step.
      dt_max: largest initial step.
    """

    state_size: Annotated[int, Range(1, 64)] = 16
    alpha: Annotated[float, Range(0.5, 1)] = 0.5
    dt_min: Annotated[float, Range(1e-12)] = 1e-3
    dt_max: Annotated[float, Range(1e-12)] = 1e-1

    def init_direction(self, key: jax.Array, width: int, length: int) -> dict[str, jax.Array]:
        """As `init_lssl`."""
        return init_lssl(key, width, self.state_size, dt_min=self.dt_min, dt_max=self.dt_max)

    def taps(self, real: Mapping[str, jax.Array], length: int) -> jax.Array:
        """As `lssl_kernel`, with the skip."""
        kernel = lssl_kernel(to_lssl(real), length, alpha=self.alpha)
        return kernel + jnp.pad(real["D"][:, None], ((0, 0), (0, length - 1)))
