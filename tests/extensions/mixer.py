"""A mixer: a short depthwise convolution, one output for each channel."""

from typing import Annotated

import flax.linen as nn

from diffussm_jax.options import Range
from diffussm_jax.registry import register


class ShortConvolution(nn.Module):
    kernel_size: Annotated[int, Range(1, 99)] = 3

    @nn.compact
    def __call__(self, u, grid=None):  # [B, L, D] -> [B, L, D]
        D = u.shape[-1]
        return nn.Conv(D, (self.kernel_size,), feature_group_count=D, dtype=u.dtype)(u)


register("mixer", "short_convolution", ShortConvolution)
