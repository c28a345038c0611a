"""Backbones: Flax modules of the form model(x_t, t, condition, *, train) -> [B, H, W, C or 2C]."""

from diffussm_jax.models.backbone import Backbone, Costs
from diffussm_jax.models.diffussm import DIFFUSSM_SIZES, DiffuSSM
from diffussm_jax.models.mixers import S4D

__all__ = ["DIFFUSSM_SIZES", "S4D", "Backbone", "Costs", "DiffuSSM"]
