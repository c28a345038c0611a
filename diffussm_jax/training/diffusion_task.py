"""The task of training a diffusion model.

All randomness of step s comes from fold_in(key(seed), s): augmentation, times, noise and dropped conditions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffussm_jax.diffusion import Objective
from diffussm_jax.models import Backbone
from diffussm_jax.parallel.mesh import over_batch, replicated
from diffussm_jax.parallel.sharding import shardings
from diffussm_jax.training.ema import EMA
from diffussm_jax.training.state import TrainState
from diffussm_jax.training.step import Losses, apply_gradients, create_state, gradients, norms

Batch = dict[str, jax.Array]
# Sets the noise of evaluation apart. It is also the key of step 24,301; another salt would change the held-out loss of
# runs that resume.
_EVAL_SALT = 0x5EED
_DROPOUT_SALT = 0xD409


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionTask:
    """Trains a backbone on an objective; see `training.task.Task`.

    Attributes:
      model: its `sharding_rules` lay its parameters over the mesh, the keys of its `conditioners` are read from the
        batch.
      input_shape: (H, W, C) of what the model sees.
      objective: process, target and loss.
      encode: (batch, key) -> x_0 [B, H, W, C] float32.
      optimizer: as `optimizer.adamw`, whose `update` takes the step.
      ema: averages of the parameters.
      batch_spec: shapes, dtypes and shardings of a global batch.
      accumulation_steps: number of microbatches.
      max_skipped_steps: more steps in a row with a loss or gradient that is not finite end the run.
      seed: of all randomness.
      mesh: the devices.
      initialize: (fresh parameters) -> those that training starts from; if None, the fresh ones.
    """

    model: Backbone
    input_shape: tuple[int, int, int]
    objective: Objective
    encode: Callable[[Batch, jax.Array], jax.Array]
    optimizer: optax.GradientTransformation
    ema: EMA
    batch_spec: dict[str, jax.ShapeDtypeStruct]
    accumulation_steps: int
    max_skipped_steps: int
    seed: int
    mesh: Mesh
    initialize: Callable[[Any], Any] | None = None

    def create_state(self) -> TrainState:
        """The state before the first step, laid over the mesh."""
        if self.initialize is None:
            return jax.jit(self._create, out_shardings=self._layout)()
        params = self.initialize(jax.jit(self._init_params, out_shardings=self._layout.params)())
        return jax.jit(self._with_params, out_shardings=self._layout)(params)

    def _init_params(self):
        return self.model.init_params(self.input_shape, self.seed)

    def _with_params(self, params) -> TrainState:
        return create_state(params, self.optimizer, self.ema)

    def _create(self) -> TrainState:
        return self._with_params(self._init_params())

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; ValueError where a parameter cannot be split."""
        shapes = jax.eval_shape(self._create)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings(shapes, self.model.sharding_rules, self.mesh),
        )

    @functools.cached_property
    def _layout(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def eval_params(self, state: TrainState):
        """The averaged parameters."""
        return state.ema_params

    def state_metrics(self, state: TrainState) -> Losses:
        """The norm of the parameters, and their distance to the average."""
        return norms(state.params, state.ema_params)

    @property
    def multiply_adds(self) -> int:
        """Of the model's linear layers, in one forward pass of one example."""
        return self.model.costs(self.input_shape).total

    def _draw(self, batch: Batch, key: jax.Array, *, train: bool):
        """What is drawn for a whole batch: x_0, times, noise; the condition, in training with some rows dropped; and
        numbers [B], the first of which seeds the dropout inside of the model, in each microbatch another one."""
        t_key, noise_key, encode_key, drop_key = jax.random.split(key, 4)
        drawn = self.objective.draw(t_key, noise_key, self.encode(batch, encode_key))
        condition = {name: batch[name] for name in self.model.conditioners}
        seeds = jax.random.bits(jax.random.fold_in(key, _DROPOUT_SALT), drawn.x_0.shape[:1])
        return drawn, self.model.drop(condition, drop_key) if train else condition, seeds

    def _losses(self, params, draws, *, train: bool) -> Losses:
        """The losses [B] of each example."""
        drawn, condition, seeds = draws
        rngs = {"dropout": jax.random.key(seeds[0])} if train else None

        def apply(x_t, t):
            return self.model.apply({"params": params}, x_t, t, condition, train=train, rngs=rngs)

        return self.objective.losses(apply, drawn)

    @functools.cached_property
    def train_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, Losses]]:
        """The jitted step; donates the state."""

        def mean_losses(params, batch):
            return jax.tree.map(jnp.mean, self._losses(params, batch, train=True))

        def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Losses]:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                key = jax.random.fold_in(jax.random.key(self.seed), state.step)
                batch = self._draw(batch, key, train=True)
                grads, losses = gradients(mean_losses, state.params, batch, self.accumulation_steps)
                return apply_gradients(
                    state,
                    grads,
                    losses,
                    optimizer=self.optimizer,
                    ema=self.ema,
                    max_skipped_steps=self.max_skipped_steps,
                )

        return jax.jit(
            train_step,
            donate_argnums=0,
            in_shardings=(self._layout, over_batch(self.mesh)),
            out_shardings=(self._layout, replicated(self.mesh)),
        )

    @functools.cached_property
    def eval_step(self) -> Callable[..., Losses]:
        """The jitted (params, batch, index, num_rows) -> {"loss"}, the mean over the first rows.

        Its noise depends on the seed and the batch's index alone, so that the losses of two checkpoints differ by the
        checkpoints and not by the draws.
        """

        def eval_step(params, batch: Batch, index: jax.Array, num_rows: jax.Array) -> Losses:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), _EVAL_SALT), index)
                loss = self._losses(params, self._draw(batch, key, train=False), train=False)["loss"]
                return {"loss": jnp.sum(jnp.where(jnp.arange(loss.size) < num_rows, loss, 0)) / num_rows}

        one = replicated(self.mesh)
        return jax.jit(
            eval_step,
            in_shardings=(self._layout.ema_params, over_batch(self.mesh), one, one),
            out_shardings=one,
        )


def diffusion(parts) -> DiffusionTask:
    """The task that a config describes, from `build.Parts`."""
    optimizer = parts.config.optimizer
    return DiffusionTask(
        model=parts.model,
        input_shape=parts.input_shape,
        objective=parts.objective,
        encode=parts.codec.encode,
        optimizer=parts.optimizer,
        ema=parts.ema,
        batch_spec=parts.batch_spec,
        accumulation_steps=optimizer.accumulation_steps,
        max_skipped_steps=optimizer.max_skipped_steps,
        seed=parts.config.seed,
        mesh=parts.mesh,
    )


diffusion.trains_model = True
