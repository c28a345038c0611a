"""Gaussian diffusion in plain JAX: schedules, losses, samplers and guidance. Nothing here knows a model.

Names follow DDPM (arXiv 2006.11239) and Improved DDPM (arXiv 2102.09672): x_0 is data, x_T noise, and with
alpha_t = 1 - beta_t, `alpha_bar` is the product of the alphas up to t. Images are [B, H, W, C]; a learned-range model
returns [B, H, W, 2C], the predicted noise and then the interpolation between the two bounds of the reverse variance.
"""

from diffussm_jax.diffusion.gaussian import (
    Prediction,
    p_mean_variance,
    q_posterior,
    q_sample,
    training_losses,
)
from diffussm_jax.diffusion.guidance import classifier_free
from diffussm_jax.diffusion.samplers import SAMPLERS, ddim, ddpm
from diffussm_jax.diffusion.schedule import SCHEDULES, Schedule, cosine_schedule, linear_schedule, respace

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Prediction",
    "Schedule",
    "classifier_free",
    "cosine_schedule",
    "ddim",
    "ddpm",
    "linear_schedule",
    "p_mean_variance",
    "q_posterior",
    "q_sample",
    "respace",
    "training_losses",
]
