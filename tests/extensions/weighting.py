"""A weighting of the loss: a sigmoid of the log-SNR, as a weight of the noise's squared error."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from diffussm_jax.options import Range
from diffussm_jax.registry import register


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    sigmoid_bias: Annotated[float, Range(-10, 10)] = 0.0

    def __call__(self, snr):  # the weight of x_0 is SNR times that of the noise
        return snr * jax.nn.sigmoid(self.sigmoid_bias - jnp.log(snr))


register("weighting", "sigmoid", Sigmoid)
