"""A hook: logs the largest absolute value of all parameters."""

from typing import Annotated

import jax
import jax.numpy as jnp

from diffussm_jax.options import Range
from diffussm_jax.registry import register
from diffussm_jax.training.task import Hook


def largest_parameter(context, *, every: Annotated[int, Range(0)] = 100) -> Hook:
    def run(state, step):
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state.params))
        return {"largest_parameter": largest}

    return Hook("largest_parameter", every, run)


register("hook", "largest_parameter", largest_parameter)
