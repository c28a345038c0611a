"""The training state: everything that a step reads and writes, and that a checkpoint holds."""

import flax
import jax
import optax
from flax import struct


class TrainState(struct.PyTreeNode):
    """The state after `step` steps. Data order and all randomness follow from `step`.

    Attributes:
      step: int32 scalar, the number of steps made, skipped ones included.
      params: the model's parameters, float32.
      ema_params: their exponential moving average, float32.
      power_ema: their power-function averages (`posthoc_ema`), float32, by sigma_rel; empty if none is kept.
      opt_state: the optimizer's.
      skipped_in_a_row: int32 scalar, the steps skipped since the last one that was taken.
    """

    step: jax.Array
    params: flax.core.FrozenDict
    ema_params: flax.core.FrozenDict
    power_ema: dict[str, flax.core.FrozenDict]
    opt_state: optax.OptState
    skipped_in_a_row: jax.Array
