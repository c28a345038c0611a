"""Post-hoc EMA: choose the EMA length of the parameters after training.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), arXiv 2312.02696, section 3.

A power-function EMA weights the parameters of time tau in [0, t] by p(tau) = (gamma + 1) tau**gamma / t**(gamma+1). Its
length is sigma_rel, the standard deviation of p relative to t. Training keeps two of them and stores snapshots at
intervals. Any other profile is approximated by the least-squares combination of the snapshots.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diffussm_jax.training.checkpoint import Store

SIGMAS = ("0.05", "0.10")  # sigma_rel of the two averages that training keeps
DIRECTORY = "ema_snapshots"


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma of the profile with this relative standard deviation (EDM2, algorithm 2).

    sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 (gamma + 3)).

    Raises:
      ValueError: sigma_rel is not in (0, 0.288]. The widest profile is the plain mean, gamma = 0.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        widest = f"{12**-0.5:.4f} (the mean of all steps)"
        raise ValueError(f"sigma_rel must be above 0 and at most {widest}, got {sigma_rel}")
    inverse = sigma_rel**-2.0
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_ema_update(ema, params, step: jax.Array, *, sigma_rel: float):
    """Updates the power-function average at step number `step` (from 1): ema <- beta ema + (1 - beta) params.

    With beta = (1 - 1 / step)**(gamma + 1) the weights are exactly the profile's integrals over each step.
    """
    beta = jnp.exp((gamma_of(sigma_rel) + 1) * jnp.log1p(-1 / step.astype(jnp.float32)))
    return jax.tree.map(lambda e, p: beta * e + (1 - beta) * p, ema, params)


def coefficients(snapshots: Sequence[tuple[float, float]], target: tuple[float, float]) -> np.ndarray:
    """The least-squares weights of the snapshots for a target profile (EDM2, algorithm 3): [snapshots] float64.

    Their sum is constrained to 1 (ours). With few snapshots it would be off by some thousandths, which would scale the
    parameters.

    Args:
      snapshots: (step, sigma_rel) of each snapshot.
      target: (step, sigma_rel) of the target.
    """

    def inner_products(a, b):  # of two profiles: the integral of their product over the shorter time
        (t_a, sigma_a), (t_b, sigma_b) = a, b
        if t_a > t_b:
            (t_a, sigma_a), (t_b, sigma_b) = b, a
        g_a, g_b = gamma_of(sigma_a), gamma_of(sigma_b)
        return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * (t_a / t_b) ** g_b / t_b

    # In units of the target's time all products are about 1. The last row and column are the constraint.
    units = [(t / target[0], sigma) for t, sigma in snapshots]
    left, right = np.ones((len(units) + 1, len(units) + 1)), np.ones(len(units) + 1)
    left[:-1, :-1] = [[inner_products(a, b) for b in units] for a in units]
    left[-1, -1] = 0
    right[:-1] = [inner_products(a, (1.0, target[1])) for a in units]
    return np.linalg.lstsq(left, right, rcond=None)[0][:-1]


class Snapshots:
    """The power-function averages in a work directory, stored apart from the checkpoints and never deleted."""

    def __init__(self, workdir: epath.PathLike, *, is_read_only: bool = False):
        self._store = Store(epath.Path(workdir).absolute() / DIRECTORY, SIGMAS, is_read_only=is_read_only)

    def save(self, step: int, power_ema: dict) -> None:
        """Starts to save the averages of a step, unless they exist (a resumed run repeats steps)."""
        if step not in self._store.steps():
            self._store.save(step, power_ema)

    def resolve(self, step: int | None) -> int:
        """The step, or the last stored one if None. Raises as `reconstruct`."""
        steps = self._store.steps()
        if not steps:
            raise FileNotFoundError(f"no averages in {self._store.directory}: train with config.posthoc_ema_every")
        if step is not None and step not in steps:
            raise ValueError(f"no averages of step {step} in {self._store.directory}; choose one of {steps}")
        return steps[-1] if step is None else step

    def reconstruct(self, sigma_rel: float, like, *, step: int | None = None):
        """Reconstructs the average of another length.

        Args:
          sigma_rel: its relative standard deviation; 0.01 to 0.25 is useful.
          like: the parameters' shapes, as ShapeDtypeStructs with shardings.
          step: a stored step, at which the average ends; the last if None.

        Returns:
          The parameters, float32, sharded as `like`.

        Raises:
          FileNotFoundError: nothing is stored.
          ValueError: sigma_rel is out of range, the step is not stored, or a file is damaged.
        """
        step = self.resolve(step)
        stored = [(s, sigma) for s in self._store.steps() if s <= step for sigma in SIGMAS]
        weights = coefficients([(s, float(sigma)) for s, sigma in stored], (step, sigma_rel))
        total = None
        for (s, sigma), weight in zip(stored, weights, strict=True):
            average = self._store.restore(s, {sigma: like})[sigma]
            part = jax.tree.map(lambda x, w=weight: jnp.float32(w) * x, average)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return total

    def close(self) -> None:
        """Waits for pending writes."""
        self._store.close()
