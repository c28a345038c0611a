"""A task without a model, for tests of the training loop: nothing is compiled, and its losses are the batch's means."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffussm_jax.data.loader import Loader
from diffussm_jax.parallel.mesh import make_mesh, replicated
from diffussm_jax.training.loop import Experiment

BATCH_SIZE = 4


class State(struct.PyTreeNode):
    """The sum of all losses so far, beside what the loop reads."""

    step: jax.Array
    skipped_in_a_row: jax.Array
    total: jax.Array


class Counting:
    """A `training.task.Task`; `before_step(step)` is called first, so that a test may let time pass or fail."""

    max_skipped_steps = 10

    def __init__(self, before_step: Callable[[int], None] = lambda step: None, multiply_adds: int = 0):
        self.mesh = make_mesh(1)
        self.multiply_adds = multiply_adds
        self._before_step = before_step
        self.abstract_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(self.mesh)), self.create_state()
        )

    def create_state(self):
        return State(step=jnp.int32(0), skipped_in_a_row=jnp.int32(0), total=jnp.float32(0))

    def train_step(self, state, batch):
        self._before_step(int(state.step))
        loss = batch["x"].mean()
        state = state.replace(step=state.step + 1, total=state.total + loss)
        return state, {"loss": loss, "twice": 2 * loss, "skipped": jnp.float32(0)}

    def eval_params(self, state):
        return {"total": state.total}


class Numbers:
    """Records of one number each."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": np.float32(np.sqrt(index))}


def counting_experiment(*of_task, **options):
    """An experiment of 12 steps."""
    loader = Loader(Numbers(), BATCH_SIZE, seed=0)
    return Experiment(**{"task": Counting(*of_task), "train_loader": loader, "num_steps": 12} | options)
