"""The interface of samplers, and the loop that runs one."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.diffusion.objective import Denoise
from diffussm_jax.diffusion.processes import Process


class Sampler(Protocol):
    """One step of a solver. `Row` is a NamedTuple of scalars, `carry` a pytree whose first element is x_t.

    Attributes:
      is_stochastic: whether `step` uses its key.
    """

    is_stochastic: bool

    def plan(self, process: Process, times: np.ndarray) -> Any:
        """The rows of all S steps: a NamedTuple of arrays [S], float64 or integer, made on the host."""

    def init(self, x_T: jax.Array) -> tuple:
        """The carry before the first step: (x_T, and what a multistep method remembers)."""

    def step(self, denoise: Denoise, carry: tuple, row: Any, key: jax.Array) -> tuple:
        """The carry after one step. `denoise(x_t, t)` takes a scalar t here; nothing is evaluated at `clean`."""


def sample(
    sampler: Sampler,
    denoise: Denoise,
    process: Process,
    x_T: jax.Array,
    times: np.ndarray,
    key: jax.Array | None = None,
) -> jax.Array:
    """Runs a sampler along a grid of times.

    Args:
      sampler: such as `DDIM()`.
      denoise: (x_t [B, ..., C], t [B]) -> `Prediction`.
      process: the forward process.
      x_T: [B, ..., C], such as `process.prior(key, shape)`.
      times: [S + 1], decreasing, ending at `process.clean`, such as `process.times(S)`.
      key: for the noise added at each step; None is allowed if the sampler adds none.

    Returns:
      x_0 [B, ..., C] float32.

    Raises:
      ValueError: the times do not decrease to `clean`, or a stochastic sampler has no key.
    """
    times = np.asarray(times)
    if len(times) < 2 or times[-1] != process.clean or not (np.diff(times) < 0).all():
        raise ValueError(f"times must decrease and end at {process.clean}, got {times}")
    if key is None:
        if sampler.is_stochastic:
            raise ValueError(f"{sampler} adds noise, and needs a key")
        key = jax.random.key(0)

    def at_scalar_time(x_t, t):
        return denoise(x_t, jnp.broadcast_to(t, x_t.shape[:1]))

    def body(carry, of_step):
        row, steps_left = of_step
        return sampler.step(at_scalar_time, carry, row, jax.random.fold_in(key, steps_left)), None

    # Keys are counted down, so that samples equal those of earlier versions.
    rows = jax.tree.map(_to_device, sampler.plan(process, times))
    steps_left = jnp.arange(len(times) - 2, -1, -1, dtype=jnp.int32)
    carry, _ = jax.lax.scan(body, sampler.init(x_T.astype(jnp.float32)), (rows, steps_left))
    return carry[0]


def num_evaluations(sampler: Sampler, num_steps: int) -> int:
    """How often a sampler evaluates the denoiser.

    A method that evaluates more than once a step has an attribute `evaluations_per_step`, and evaluates once in the
    last step.
    """
    return getattr(sampler, "evaluations_per_step", 1) * (num_steps - 1) + 1


def _to_device(values: np.ndarray) -> jax.Array:
    """float64 as float32, integers as int32, booleans as they are."""
    narrow = {"f": jnp.float32, "i": jnp.int32, "b": bool}
    return jnp.asarray(values, narrow[values.dtype.kind])
