"""Samplers: from x_T to x_0 with any denoiser. Each is a frozen dataclass whose fields are its options.

    x_0 = sample(DDIM(eta=0.0), denoise, process, x_T, process.times(50), key)

A sampler plans all its coefficients in float64 on the host, one row for each step; `sample` is one scan over the rows.
"""

from diffussm_jax.diffusion.samplers.base import Sampler, sample
from diffussm_jax.diffusion.samplers.ddim import DDIM
from diffussm_jax.diffusion.samplers.ddpm import DDPM
from diffussm_jax.diffusion.samplers.heun import Heun

__all__ = ["DDIM", "DDPM", "Heun", "Sampler", "sample"]
