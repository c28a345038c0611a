"""The training state: everything that a step reads and writes, and that a checkpoint holds."""

from collections.abc import Sequence

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

METRICS = ("loss", "mse", "vlb", "grad_norm")
COUNTS = ("count", "skipped")


class TrainState(struct.PyTreeNode):
    """The state after `step` steps.

    Data order and all randomness follow from `step`, so nothing else is needed to go on exactly.

    Attributes:
      step: int32 scalar, the number of steps made, skipped ones included.
      params: the model's parameters, float32.
      ema_params: their exponential moving average, float32.
      power_ema: their power-function averages (`posthoc_ema`), float32, by sigma_rel; empty if none is kept.
      opt_state: the optimizer's.
      skipped_in_a_row: int32 scalar, the steps skipped since the last one that was taken.
      window: over the steps since metrics were last logged, float32 scalars: for each of METRICS its sum over the steps
        taken, "count" of those, and "skipped", of the others.
    """

    step: jax.Array
    params: flax.core.FrozenDict
    ema_params: flax.core.FrozenDict
    power_ema: dict[str, flax.core.FrozenDict]
    opt_state: optax.OptState
    skipped_in_a_row: jax.Array
    window: dict[str, jax.Array]


def init_params(model: nn.Module, input_shape: tuple[int, int, int], seed: int) -> dict:
    """A model's parameters before training; under `jax.eval_shape`, their shapes alone."""

    def init():
        x_t, t = np.zeros((1, *input_shape), np.float32), np.zeros(1, np.int32)
        y = np.zeros(1, np.int32) if model.num_classes else None
        return model.init(jax.random.key(seed), x_t, t, y)["params"]

    return jax.jit(init)()


def empty_window() -> dict[str, jax.Array]:
    """The window of metrics before the first step after logging."""
    return {name: jnp.zeros((), jnp.float32) for name in (*METRICS, *COUNTS)}


def create_state(params, optimizer: optax.GradientTransformation, power_emas: Sequence[str] = ()) -> TrainState:
    """The state before the first step; all averages start at the parameters.

    Args:
      params: the model's.
      optimizer: an optax transformation.
      power_emas: names of the power-function averages to keep.
    """

    def copy():  # of its own for each, since the step donates them all
        return jax.tree.map(jnp.copy, params)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=copy(),
        power_ema={name: copy() for name in power_emas},
        opt_state=optimizer.init(params),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        window=empty_window(),
    )
