"""Gaussian diffusion in plain JAX. Nothing here knows a model, a label or Flax.

    processes   x_t = alpha(t) x_0 + sigma(t) noise: DDPM with a noise schedule, rectified flow
    targets     what a model predicts: noise, x_0, v, velocity
    objective   the training loss, and a model's output as a `Prediction` of x_0 and noise
    guidance    wraps a denoiser: classifier-free guidance, autoguidance, clipping
    weightings  weights of the loss by the signal-to-noise ratio
    samplers    from noise to data, with any denoiser
    time_grids  where samplers evaluate it

A denoiser is a function (x_t [B, ..., C], t [B]) -> `Prediction`. Times are those of the process. Names follow DDPM
(arXiv 2006.11239) and Improved DDPM (arXiv 2102.09672).
"""

from diffussm_jax.diffusion.guidance import both, check_guidance, clipped, guided, pair, thresholded
from diffussm_jax.diffusion.objective import Denoise, Drawn, Objective, Prediction
from diffussm_jax.diffusion.processes import (
    GVP,
    ContinuousProcess,
    DiscreteProcess,
    Process,
    RectifiedFlow,
    Reverse,
    cosine_schedule,
    linear_schedule,
    q_posterior,
    q_sample,
    scaled_linear_schedule,
    zero_terminal_snr,
)
from diffussm_jax.diffusion.samplers import (
    DDIM,
    DDPM,
    DPMSolverPP,
    Euler,
    Heun,
    Sampler,
    UniPC,
    num_evaluations,
    sample,
)
from diffussm_jax.diffusion.targets import X0, Noise, Target, V, Velocity
from diffussm_jax.diffusion.time_grids import TIME_GRIDS
from diffussm_jax.diffusion.weightings import P2, MinSNR, Weighting, unweighted

__all__ = [
    "DDIM",
    "DDPM",
    "GVP",
    "P2",
    "TIME_GRIDS",
    "X0",
    "ContinuousProcess",
    "DPMSolverPP",
    "Denoise",
    "DiscreteProcess",
    "Drawn",
    "Euler",
    "Heun",
    "MinSNR",
    "Noise",
    "Objective",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "Reverse",
    "Sampler",
    "Target",
    "UniPC",
    "V",
    "Velocity",
    "Weighting",
    "both",
    "check_guidance",
    "clipped",
    "cosine_schedule",
    "guided",
    "linear_schedule",
    "num_evaluations",
    "pair",
    "q_posterior",
    "q_sample",
    "sample",
    "scaled_linear_schedule",
    "thresholded",
    "unweighted",
    "zero_terminal_snr",
]
