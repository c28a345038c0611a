"""What the training steps of all tasks share: gradients of a batch in parts, and skipping what is not finite."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from diffussm_jax.parallel.mesh import BATCH
from diffussm_jax.training.ema import EMA
from diffussm_jax.training.state import TrainState

Losses = dict[str, jax.Array]


def mean_over_microbatches(function: Callable[[Any, Any], tuple[Any, Any]], params, batch, num_microbatches: int = 1):
    """Applies a function to a batch in parts, one after the other, to save memory.

    Args:
      function: (params, batch) -> what is averaged over the parts, and arrays [B, ...] of each example.
      params: pytree.
      batch: pytree of arrays [B, ...].
      num_microbatches: number of parts; more than one need a mesh, as `jax.sharding.use_abstract_mesh` sets it.

    Returns:
      the mean over the parts, and the arrays of the whole batch.
    """
    if num_microbatches == 1:
        return function(params, batch)

    def cut(x):  # every num_microbatches-th row, so that each device cuts what it holds
        parts = x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, PartitionSpec(None, BATCH))

    def joined(parts):
        return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])

    def add_part(total, part):
        summed, of_examples = function(params, part)
        return jax.tree.map(jnp.add, total, summed), of_examples

    shapes, _ = jax.eval_shape(function, params, batch)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, of_examples = jax.lax.scan(add_part, zeros, jax.tree.map(cut, batch))
    return jax.tree.map(lambda x: x / num_microbatches, total), jax.tree.map(joined, of_examples)


def gradients(loss_fn: Callable[[Any, Any], Losses], params, batch, num_microbatches: int = 1) -> tuple[Any, Losses]:
    """The gradient of the mean loss of a batch, and its mean losses.

    Args:
      loss_fn: (params, batch) -> mean losses by name; "loss" is differentiated.
      params: pytree of parameters.
      batch: pytree of arrays [B, ...].
      num_microbatches: as in `mean_over_microbatches`.
    """

    def loss_and_rest(params, batch):
        losses = loss_fn(params, batch)
        return losses["loss"], losses

    gradient = jax.grad(loss_and_rest, has_aux=True)
    means, _ = mean_over_microbatches(lambda *of: (gradient(*of), ()), params, batch, num_microbatches)
    return means


class WithConstants:
    """A jitted function that is passed further arrays, so that they are no constants of its program.

    Args:
      jitted: function of some arguments and those arrays.
      constants: pytree of arrays.
      sharding: of the arrays.
    """

    def __init__(self, jitted: Callable, constants: Any, sharding: jax.sharding.Sharding):
        self._jitted, self._constants, self._sharding = jitted, constants, sharding

    @functools.cached_property
    def _on_devices(self) -> Any:
        return jax.device_put(self._constants, self._sharding)

    def __call__(self, *args):
        return self._jitted(*args, self._on_devices)

    def lower(self, *args):
        """Lowers the function ahead of time, with the shapes of the arrays."""
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), self._constants
        )
        return self._jitted.lower(*args, shapes)


@jax.jit
def norms(params, averaged) -> Losses:
    """ "param_norm", and "ema_distance" between parameters and their average: Euclidean norms over all of them."""
    difference = jax.tree.map(jnp.subtract, params, averaged)
    return {"param_norm": optax.tree.norm(params), "ema_distance": optax.tree.norm(difference)}


def create_state(
    params, optimizer: optax.GradientTransformation, ema: EMA, kind: type[TrainState] = TrainState, **fields
) -> TrainState:
    """The state before the first step; `fields` are those that `kind` adds to `TrainState`."""
    return kind(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        **ema.init(params),
        **fields,
    )


def apply_gradients(
    state: TrainState,
    grads,
    losses: Losses,
    *,
    optimizer: optax.GradientTransformation,
    ema: EMA,
    max_skipped_steps: int,
    after_update: Callable[[Any], tuple[Any, dict]] = lambda params: (params, {}),
) -> tuple[TrainState, Losses]:
    """The state after a step, and its metrics: the losses, "grad_norm", and "skipped", 0 or 1.

    A step whose loss or gradient is not finite changes nothing but the counters. After more than `max_skipped_steps` of
    them in a row every later step is skipped too, so that the state stays as it was then.

    Args:
      state: before the step.
      grads: of its parameters.
      losses: scalars, "loss" among them.
      optimizer: whose `update` takes the step.
      ema: averages of the parameters.
      max_skipped_steps: in a row.
      after_update: (updated parameters) -> parameters, and other fields of the state; what no gradient changes.
    """
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(grad_norm)
    is_taken = is_finite & (state.skipped_in_a_row <= max_skipped_steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
    params, fields = after_update(optax.apply_updates(state.params, updates))
    new = state.replace(params=params, opt_state=opt_state, **ema.update(state, params), **fields)
    kept = jax.tree.map(lambda new, old: jnp.where(is_taken, new, old), new, state)
    state = kept.replace(step=state.step + 1, skipped_in_a_row=jnp.where(is_taken, 0, state.skipped_in_a_row + 1))
    return state, losses | {"grad_norm": grad_norm, "skipped": 1 - is_taken.astype(jnp.float32)}
