"""Backbones: Flax modules of the form model(x_t, t, y, *, train) -> [B, H, W, 2C]."""

from diffussm_jax.config import DIFFUSSM_SIZES
from diffussm_jax.models.diffussm import DiffuSSM

__all__ = ["DIFFUSSM_SIZES", "DiffuSSM"]
