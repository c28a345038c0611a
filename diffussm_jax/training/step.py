"""One step of training, and the loss on held-out data; both pure functions, jitted here.

All randomness of step s comes from fold_in(seed, s): timesteps, noise and label dropout. How state and batch lie on the
devices comes from the mesh and from the model's sharding rules.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from diffussm_jax.diffusion import Schedule, training_losses
from diffussm_jax.parallel.mesh import BATCH, over_batch, replicated
from diffussm_jax.parallel.sharding import shardings
from diffussm_jax.training.optimizer import ema_update
from diffussm_jax.training.posthoc_ema import power_ema_update
from diffussm_jax.training.state import METRICS, TrainState, create_state, init_params

Batch = dict[str, jax.Array]
Encode = Callable[[Batch, jax.Array], jax.Array]
_EVAL_SALT = 0x5EED  # keeps evaluation's noise apart from any training step's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step is made of; data come in with each batch.

    Attributes:
      model: the backbone; its `sharding_rules` lay its parameters over the mesh.
      input_shape: (H, W, C) of what the model sees.
      schedule: of the diffusion.
      encode: (batch, key) -> x_0 [B, H, W, C] float32.
      optimizer: an optax transformation.
      ema_decay: of the parameters' average.
      has_ema_warmup: whether that decay starts lower.
      power_emas: sigma_rel of each power-function average to keep, as text.
      accumulation_steps: into how many parts a batch is cut, one after the other; divides what a device holds of it.
      max_skipped_steps: after more than so many in a row none is taken any more.
      seed: of all randomness.
      mesh: the devices.
    """

    model: nn.Module
    input_shape: tuple[int, int, int]
    schedule: Schedule
    encode: Encode
    optimizer: optax.GradientTransformation
    ema_decay: float
    has_ema_warmup: bool
    power_emas: tuple[str, ...] = ()
    accumulation_steps: int = 1
    max_skipped_steps: int = 10
    seed: int
    mesh: Mesh

    def create_state(self) -> TrainState:
        """The state before the first step, in its `layout`."""
        return jax.jit(self._create, out_shardings=self.layout)()

    @functools.cached_property
    def layout(self) -> TrainState:
        """The sharding of each array of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; ValueError where a parameter cannot be split so."""
        shapes = jax.eval_shape(self._create)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings(shapes, self.model.sharding_rules, self.mesh),
        )

    def _create(self) -> TrainState:
        params = init_params(self.model, self.input_shape, self.seed)
        return create_state(params, self.optimizer, self.power_emas)


def _draw(recipe: Recipe, batch: Batch, key: jax.Array) -> tuple[Batch, jax.Array]:
    """x_0, t, noise and labels of a batch, and the key of label dropout."""
    t_key, noise_key, encode_key, label_key = jax.random.split(key, 4)
    x_0 = recipe.encode(batch, encode_key)
    drawn = {
        "x_0": x_0,
        "t": jax.random.randint(t_key, x_0.shape[:1], 0, len(recipe.schedule)),
        "noise": jax.random.normal(noise_key, x_0.shape, x_0.dtype),
    }
    if recipe.model.num_classes:
        drawn["y"] = batch["label"]
    return drawn, label_key


def _losses(recipe: Recipe, params, drawn: Batch, label_key: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """The means of `training_losses`' fields; with `train`, labels are dropped."""

    def denoise(x_t, t):
        rngs = {"label_dropout": label_key}
        return recipe.model.apply({"params": params}, x_t, t, drawn.get("y"), train=train, rngs=rngs)

    return jax.tree.map(jnp.mean, training_losses(recipe.schedule, denoise, drawn["x_0"], drawn["t"], drawn["noise"]))


def _gradients(recipe: Recipe, params, batch: Batch, key: jax.Array) -> tuple[dict, dict[str, jax.Array]]:
    """The gradient of the mean loss of a batch, and its losses; part by part, if it is to be cut.

    Everything but label dropout is drawn for the whole batch, so that cutting it changes no x_0, time or noise.
    """

    def loss_fn(params, drawn, label_key):
        losses = _losses(recipe, params, drawn, label_key, train=True)
        return losses["loss"], losses

    gradient = jax.grad(loss_fn, has_aux=True)
    drawn, label_key = _draw(recipe, batch, key)
    num_parts = recipe.accumulation_steps
    if num_parts == 1:
        return gradient(params, drawn, label_key)

    def cut(x):  # every num_parts-th row, so that each device cuts what it holds
        parts = x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, PartitionSpec(None, BATCH))

    def add_part(total, part_and_key):
        return jax.tree.map(jnp.add, total, gradient(params, *part_and_key)), None

    parts = jax.tree.map(cut, drawn), jax.random.split(label_key, num_parts)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient, params, drawn, label_key)
    )
    total, _ = jax.lax.scan(add_part, zeros, parts)
    return jax.tree.map(lambda x: x / num_parts, total)


def make_train_step(recipe: Recipe) -> Callable[[TrainState, Batch], TrainState]:
    """A jitted (state, batch) -> state that makes one update, and adds its metrics to the state's window.

    A step whose loss or gradient is not finite changes nothing but the counters. After more than
    `recipe.max_skipped_steps` of them in a row all further steps are skipped too, so that whoever looks at
    `skipped_in_a_row` later finds the state as it was then. The state is donated: what is passed cannot be used again.
    """
    r = recipe

    def update(state: TrainState, grads) -> TrainState:
        updates, opt_state = r.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(
            params=params,
            ema_params=ema_update(state.ema_params, params, state.step, decay=r.ema_decay, has_warmup=r.has_ema_warmup),
            power_ema={
                name: power_ema_update(ema, params, state.step + 1, sigma_rel=float(name))
                for name, ema in state.power_ema.items()
            },
            opt_state=opt_state,
        )

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        with jax.sharding.use_abstract_mesh(r.mesh.abstract_mesh):
            key = jax.random.fold_in(jax.random.key(r.seed), state.step)
            grads, metrics = _gradients(r, state.params, batch, key)
            metrics["grad_norm"] = optax.tree.norm(grads)
            is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            is_taken = is_finite & (state.skipped_in_a_row <= r.max_skipped_steps)
            taken = jax.tree.map(lambda new, old: jnp.where(is_taken, new, old), update(state, grads), state)
            window = {name: state.window[name] + jnp.where(is_taken, metrics[name], 0) for name in METRICS}
            return taken.replace(
                step=state.step + 1,
                skipped_in_a_row=jnp.where(is_taken, 0, state.skipped_in_a_row + 1),
                window=window
                | {"count": state.window["count"] + is_taken, "skipped": state.window["skipped"] + ~is_taken},
            )

    return jax.jit(train_step, donate_argnums=0, in_shardings=(r.layout, over_batch(r.mesh)), out_shardings=r.layout)


def make_eval_step(recipe: Recipe) -> Callable[[dict, Batch, int], jax.Array]:
    """A jitted (params, batch, index) -> loss, whose noise depends on the seed and the batch's index alone.

    So the losses of two checkpoints differ by the checkpoints, and not by the draws.
    """
    r = recipe

    def eval_step(params, batch: Batch, index: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(r.mesh.abstract_mesh):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(r.seed), _EVAL_SALT), index)
            return _losses(r, params, *_draw(r, batch, key), train=False)["loss"]

    return jax.jit(
        eval_step,
        in_shardings=(r.layout.ema_params, over_batch(r.mesh), replicated(r.mesh)),
        out_shardings=replicated(r.mesh),
    )
