"""What a model is trained to predict, and how its prediction gives both x_0 and the noise.

    Noise     noise                                   DDPM (arXiv 2006.11239)
    X0        x_0
    V         alpha noise - sigma x_0                 progressive distillation (arXiv 2202.00512)
    Velocity  alpha' x_0 + sigma' noise               rectified flow (arXiv 2209.03003), SiT (arXiv 2401.08740)

`predict` returns both, because computing one from the other divides by alpha or sigma and loses digits where that is
small.
"""

import dataclasses
from typing import Protocol

import jax

from diffussm_jax.diffusion.processes import Process, columns, scales


class Target(Protocol):
    """A quantity made of x_0 and noise; x_0, noise and x_t are [B, ...] float32, t is [B].

    Attributes:
      divides_by_alpha: whether `predict` needs alpha(t) > 0 everywhere.
    """

    divides_by_alpha: bool

    def make(self, process: Process, x_0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """The value that the model should output."""

    def predict(self, process: Process, output: jax.Array, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x_0 and noise, linear in output and x_t, such that x_t = alpha x_0 + sigma noise."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise itself."""

    divides_by_alpha = True

    def make(self, process, x_0, noise, t):
        return noise

    def predict(self, process, output, x_t, t):
        alpha, sigma = scales(process, t, x_t.ndim)
        return (x_t - sigma * output) / alpha, output


@dataclasses.dataclass(frozen=True)
class X0:
    """The data."""

    divides_by_alpha = False

    def make(self, process, x_0, noise, t):
        return x_0

    def predict(self, process, output, x_t, t):
        alpha, sigma = scales(process, t, x_t.ndim)
        return output, (x_t - alpha * output) / sigma


@dataclasses.dataclass(frozen=True)
class V:
    """alpha noise - sigma x_0."""

    divides_by_alpha = False

    def make(self, process, x_0, noise, t):
        alpha, sigma = scales(process, t, x_0.ndim)
        return alpha * noise - sigma * x_0

    def predict(self, process, output, x_t, t):
        alpha, sigma = scales(process, t, x_t.ndim)
        total = alpha**2 + sigma**2  # 1 if the process preserves the variance
        return (alpha * x_t - sigma * output) / total, (sigma * x_t + alpha * output) / total


@dataclasses.dataclass(frozen=True)
class Velocity:
    """dx_t/dt = alpha' x_0 + sigma' noise (SiT), which is noise - x_0 for rectified flow.

    In discrete time it is noise - x_0 too (`Process.slopes`).
    """

    divides_by_alpha = False

    def make(self, process, x_0, noise, t):
        alpha_slope, sigma_slope = columns(process.slopes(t), x_0.ndim)
        return alpha_slope * x_0 + sigma_slope * noise

    def predict(self, process, output, x_t, t):
        alpha, sigma = scales(process, t, x_t.ndim)
        alpha_slope, sigma_slope = columns(process.slopes(t), x_t.ndim)
        determinant = alpha * sigma_slope - sigma * alpha_slope  # alpha + sigma for rectified flow, pi / 2 for GVP
        x_0 = (sigma_slope * x_t - sigma * output) / determinant
        return x_0, (alpha * output - alpha_slope * x_t) / determinant
