"""Backbones: Flax modules of the form model(x_t, t, condition, *, train) -> [B, H, W, C or 2C]."""

from diffussm_jax.models.backbone import Backbone, Costs
from diffussm_jax.models.diffussm import DIFFUSSM_SIZES, DiffuSSM
from diffussm_jax.models.dit import DIT_SIZES, DiT
from diffussm_jax.models.mixers import S4D
from diffussm_jax.models.unet import UNET_SIZES, UNet

__all__ = ["DIFFUSSM_SIZES", "DIT_SIZES", "S4D", "UNET_SIZES", "Backbone", "Costs", "DiT", "DiffuSSM", "UNet"]
