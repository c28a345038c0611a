"""Samplers: from x_T to x_0 with any denoiser. Each is a frozen dataclass whose fields are its options.

    x_0 = sample(DDIM(eta=0.0), denoise, process, x_T, process.times(50), key)

| sampler | order | evaluations in S steps | adds noise |
|---|---|---|---|
| DDPM | | S | yes |
| DDIM | 1 | S | if eta > 0 |
| Euler | 1 | S | if churn > 0 |
| Heun | 2 | 2 S - 1 | |
| DPMSolverPP: 2m, 2s, sde_2m | 2 | S, 2 S - 1, S | sde_2m |
| UniPC: order p = 1, 2, 3 | p + 1 | S | |

A sampler plans all its coefficients in float64 on the host, one row for each step; `sample` is one scan over the rows.
"""

from diffussm_jax.diffusion.samplers.base import Sampler, num_evaluations, sample
from diffussm_jax.diffusion.samplers.ddim import DDIM
from diffussm_jax.diffusion.samplers.ddpm import DDPM
from diffussm_jax.diffusion.samplers.dpm_solver import DPMSolverPP
from diffussm_jax.diffusion.samplers.euler import Euler
from diffussm_jax.diffusion.samplers.heun import Heun
from diffussm_jax.diffusion.samplers.unipc import UniPC

__all__ = ["DDIM", "DDPM", "DPMSolverPP", "Euler", "Heun", "Sampler", "UniPC", "num_evaluations", "sample"]
