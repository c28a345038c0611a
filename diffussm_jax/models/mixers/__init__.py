"""Sequence mixers: Flax modules mixer(u [B, L, D], grid=(H, W)) -> [B, L, R * D], R outputs for each channel.

`grid` is the shape of the image whose L = H W positions come row by row; most mixers ignore it. A mixer that prefers
the layout in phases of the hourglass (`ssm.phases`) also has a method phases(U [M, D, B, J], grid=) -> [M, R, D, B, J].

R is 2 unless a mixer has an attribute `bidirectional` that is false. A mixer that counts its work has a method
costs(length, width, dtype, num_images) -> (method, multiply-adds of a sequence or None), as `S4D.costs`.
"""

import flax.linen as nn
import jax

from diffussm_jax.models.mixers.attention import Attention
from diffussm_jax.models.mixers.conv import Conv
from diffussm_jax.models.mixers.lssl import LSSL
from diffussm_jax.models.mixers.s4 import S4
from diffussm_jax.models.mixers.s4d import S4D
from diffussm_jax.models.mixers.s6 import S6
from diffussm_jax.ssm import from_phases, to_phases

__all__ = ["LSSL", "S4", "S4D", "S6", "Attention", "Conv", "mix_phases", "num_outputs"]


def num_outputs(mixer: nn.Module) -> int:
    """R, the outputs for each channel."""
    return 2 if getattr(mixer, "bidirectional", True) else 1


def mix_phases(mixer: nn.Module, U: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Runs any mixer on a sequence in phases: U [M, D, B, J] -> [M, R, D, B, J]."""
    if hasattr(mixer, "phases"):
        return mixer.phases(U, grid=grid)
    M, D, B, J = U.shape
    y = mixer(from_phases(U), grid=grid)
    return to_phases(y.reshape(B, M * J, -1, D), M)
