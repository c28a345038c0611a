"""Post-hoc EMA (Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", EDM2,
arXiv 2312.02696, section 3): the length of the parameters' average is chosen after training.

A power-function average weighs the parameters of time tau in [0, t] by p(tau) = (gamma + 1) tau**gamma / t**(gamma+1).
Its length is told by sigma_rel, the standard deviation of p relative to t. Training keeps two of them and stores both
at intervals. Any other profile is then the combination of the stored ones whose weights are nearest to it in the sense
of least squares.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diffussm_jax.training.checkpoint import Store

SIGMAS = ("0.05", "0.10")  # sigma_rel of the two averages that are kept
DIRECTORY = "ema_snapshots"


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma whose profile has that relative standard deviation (EDM2, algorithm 2).

    sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 (gamma + 3)).

    Raises:
      ValueError: sigma_rel is not in (0, 0.288], where the widest profile is the plain mean, gamma = 0.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        widest = f"{12**-0.5:.4f} (the mean of all steps)"
        raise ValueError(f"sigma_rel must be above 0 and at most {widest}, got {sigma_rel}")
    inverse = sigma_rel**-2.0
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_ema_update(ema, params, step: jax.Array, *, sigma_rel: float):
    """The power-function average after step number `step` (from 1): ema <- beta ema + (1 - beta) params.

    beta = (1 - 1 / step)**(gamma + 1): then the average's weights are exactly the profile's integrals over each step.
    """
    beta = jnp.exp((gamma_of(sigma_rel) + 1) * jnp.log1p(-1 / step.astype(jnp.float32)))
    return jax.tree.map(lambda e, p: beta * e + (1 - beta) * p, ema, params)


def coefficients(snapshots: Sequence[tuple[float, float]], target: tuple[float, float]) -> np.ndarray:
    """What to multiply stored averages with to come nearest to another (EDM2, algorithm 3).

    Their sum is held at 1 (ours): with few snapshots it would be off by some thousandths, and the parameters with it.

    Args:
      snapshots: (step, sigma_rel) of each stored average.
      target: (step, sigma_rel) of the one that is wanted.

    Returns:
      [number of snapshots] float64.
    """

    def inner_products(a, b):  # of two profiles: the integral of their product over the shorter time
        (t_a, sigma_a), (t_b, sigma_b) = a, b
        if t_a > t_b:
            (t_a, sigma_a), (t_b, sigma_b) = b, a
        g_a, g_b = gamma_of(sigma_a), gamma_of(sigma_b)
        return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * (t_a / t_b) ** g_b / t_b

    # In units of the target's time, where all products are of about 1; the last row and column are the condition's.
    units = [(t / target[0], sigma) for t, sigma in snapshots]
    left, right = np.ones((len(units) + 1, len(units) + 1)), np.ones(len(units) + 1)
    left[:-1, :-1] = [[inner_products(a, b) for b in units] for a in units]
    left[-1, -1] = 0
    right[:-1] = [inner_products(a, (1.0, target[1])) for a in units]
    return np.linalg.lstsq(left, right, rcond=None)[0][:-1]


class Snapshots:
    """The power-function averages stored in a work directory, apart from the checkpoints and never deleted.

    Args:
      workdir: of the run.
      is_read_only: whether they are only read.
    """

    def __init__(self, workdir: epath.PathLike, *, is_read_only: bool = False):
        self._store = Store(epath.Path(workdir).absolute() / DIRECTORY, SIGMAS, is_read_only=is_read_only)

    def save(self, step: int, power_ema: dict) -> None:
        """Starts to store the averages of a step, if they are not stored yet (a run that resumed comes by again)."""
        if step not in self._store.steps():
            self._store.save(step, power_ema)

    def reconstruct(self, sigma_rel: float, like, *, step: int | None = None):
        """The average of another length.

        Args:
          sigma_rel: its relative standard deviation; 0.01 to 0.25 is what makes sense, the stored ones lie within.
          like: the parameters' shapes, as ShapeDtypeStructs with shardings.
          step: that it ends at, one of the stored; the last if None.

        Returns:
          The parameters, float32, laid out as `like`.

        Raises:
          FileNotFoundError: nothing is stored.
          ValueError: sigma_rel is out of range, the step is not stored, or a file is damaged.
        """
        steps = self._store.steps()
        if not steps:
            raise FileNotFoundError(
                f"no averages in {self._store.directory}: train with config.optimizer.posthoc_ema_every"
            )
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"no averages of step {step} in {self._store.directory}; choose one of {steps}")
        stored = [(s, sigma) for s in steps if s <= step for sigma in SIGMAS]
        weights = coefficients([(s, float(sigma)) for s, sigma in stored], (step, sigma_rel))
        total = None
        for (s, sigma), weight in zip(stored, weights, strict=True):
            average = self._store.restore(s, {sigma: like})[sigma]
            part = jax.tree.map(lambda x, w=weight: jnp.float32(w) * x, average)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return total

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._store.close()
