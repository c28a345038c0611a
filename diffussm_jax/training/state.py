"""The training state: everything that a step reads and writes, and that a checkpoint holds."""

import flax
import jax
import jax.numpy as jnp
import optax
from flax import struct

METRICS = ("loss", "mse", "vlb", "grad_norm")


class TrainState(struct.PyTreeNode):
    """The state after `step` updates.

    Data order and all randomness follow from `step`, so nothing else is needed to go on exactly.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: the model's parameters, float32.
      ema_params: their exponential moving average, float32.
      opt_state: the optimizer's.
      window: sums over the steps since metrics were last logged, one float32 scalar for each of METRICS, and "count".
    """

    step: jax.Array
    params: flax.core.FrozenDict
    ema_params: flax.core.FrozenDict
    opt_state: optax.OptState
    window: dict[str, jax.Array]


def empty_window() -> dict[str, jax.Array]:
    """The window of metrics before the first step after logging."""
    return {name: jnp.zeros((), jnp.float32) for name in (*METRICS, "count")}


def create_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the EMA starts at the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),  # of its own: the step donates both
        opt_state=optimizer.init(params),
        window=empty_window(),
    )
