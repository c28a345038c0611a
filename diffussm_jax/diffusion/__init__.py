"""Gaussian diffusion in plain JAX. Nothing here knows a model, a label or Flax.

    processes   x_t = alpha(t) x_0 + sigma(t) noise: DDPM with a noise schedule, rectified flow
    targets     what a model predicts: noise, x_0, v, velocity
    objective   the training loss, and a model's output as a `Prediction` of x_0 and noise
    guidance    wraps a denoiser: classifier-free guidance, clipping
    samplers    from noise to data, with any denoiser

A denoiser is a function (x_t [B, ..., C], t [B]) -> `Prediction`. Times are those of the process. Names follow DDPM
(arXiv 2006.11239) and Improved DDPM (arXiv 2102.09672).
"""

from diffussm_jax.diffusion.guidance import both, check_guidance, clipped, guided, pair
from diffussm_jax.diffusion.objective import Denoise, Drawn, Objective, Prediction
from diffussm_jax.diffusion.processes import (
    DiscreteProcess,
    Process,
    RectifiedFlow,
    Reverse,
    cosine_schedule,
    linear_schedule,
    q_posterior,
    q_sample,
)
from diffussm_jax.diffusion.samplers import DDIM, DDPM, Heun, Sampler, sample
from diffussm_jax.diffusion.targets import X0, Noise, Target, V, Velocity

__all__ = [
    "DDIM",
    "DDPM",
    "X0",
    "Denoise",
    "DiscreteProcess",
    "Drawn",
    "Heun",
    "Noise",
    "Objective",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "Reverse",
    "Sampler",
    "Target",
    "V",
    "Velocity",
    "both",
    "check_guidance",
    "clipped",
    "cosine_schedule",
    "guided",
    "linear_schedule",
    "pair",
    "q_posterior",
    "q_sample",
    "sample",
]
