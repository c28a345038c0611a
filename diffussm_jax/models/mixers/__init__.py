"""Sequence mixers: Flax modules mixer(u [B, L, D], grid=(H, W)) -> [B, L, R * D], R outputs for each channel.

`grid` is the shape of the image whose L = H W positions come row by row; most mixers ignore it. A mixer that prefers
the layout in phases of the hourglass (`ssm.phases`) also has a method phases(U [M, D, B, J], grid=) -> [M, R, D, B, J].
"""

import flax.linen as nn
import jax

from diffussm_jax.models.mixers.s4d import S4D
from diffussm_jax.ssm import from_phases, to_phases

__all__ = ["S4D", "mix_phases"]


def mix_phases(mixer: nn.Module, U: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Runs any mixer on a sequence in phases: U [M, D, B, J] -> [M, R, D, B, J]."""
    if hasattr(mixer, "phases"):
        return mixer.phases(U, grid=grid)
    M, D, B, J = U.shape
    y = mixer(from_phases(U), grid=grid)
    return to_phases(y.reshape(B, M * J, -1, D), M)
