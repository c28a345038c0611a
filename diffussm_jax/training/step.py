"""One step of training, and the loss on held-out data; both pure functions, jitted here.

All randomness of step s comes from fold_in(seed, s): timesteps, noise and label dropout.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffussm_jax.diffusion import Schedule, training_losses
from diffussm_jax.parallel.mesh import over_batch, replicated
from diffussm_jax.training.optimizer import ema_update
from diffussm_jax.training.state import METRICS, TrainState

Batch = dict[str, jax.Array]
Encode = Callable[[Batch, jax.Array], jax.Array]
_EVAL_SALT = 0x5EED  # keeps evaluation's noise apart from any training step's


def batch_losses(
    params,
    batch: Batch,
    key: jax.Array,
    *,
    model: nn.Module,
    schedule: Schedule,
    encode: Encode,
    train: bool,
) -> dict[str, jax.Array]:
    """The diffusion losses of a batch at random times, each a scalar: the means of `training_losses`' fields.

    Args:
      params: of the model.
      batch: what the loader gives; its "label" is used if the model has classes.
      key: for times, noise, encoding and label dropout.
      model: a backbone.
      schedule: of T steps.
      encode: (batch, key) -> x_0 [B, H, W, C] float32.
      train: whether labels are dropped.
    """
    t_key, noise_key, encode_key, label_key = jax.random.split(key, 4)
    x_0 = encode(batch, encode_key)
    t = jax.random.randint(t_key, x_0.shape[:1], 0, len(schedule))
    noise = jax.random.normal(noise_key, x_0.shape, x_0.dtype)
    y = batch["label"] if model.num_classes else None

    def denoise(x_t, time):
        return model.apply({"params": params}, x_t, time, y, train=train, rngs={"label_dropout": label_key})

    return jax.tree.map(jnp.mean, training_losses(schedule, denoise, x_0, t, noise))


def make_train_step(
    *,
    model: nn.Module,
    schedule: Schedule,
    encode: Encode,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    has_ema_warmup: bool,
    seed: int,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], TrainState]:
    """A jitted (state, batch) -> state that makes one update, and adds its metrics to the state's window.

    The state is donated: the one passed in cannot be used again.
    """

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params):
            losses = batch_losses(params, batch, key, model=model, schedule=schedule, encode=encode, train=True)
            return losses["loss"], losses

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "grad_norm": optax.global_norm(grads), "count": jnp.float32(1)}
        return TrainState(
            step=state.step + 1,
            params=params,
            ema_params=ema_update(state.ema_params, params, state.step, decay=ema_decay, has_warmup=has_ema_warmup),
            opt_state=opt_state,
            window={name: state.window[name] + metrics[name] for name in (*METRICS, "count")},
        )

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(replicated(mesh), over_batch(mesh)),
        out_shardings=replicated(mesh),
    )


def make_eval_step(
    *, model: nn.Module, schedule: Schedule, encode: Encode, seed: int, mesh: Mesh
) -> Callable[[dict, Batch, int], jax.Array]:
    """A jitted (params, batch, index) -> loss, whose noise depends on the seed and the batch's index alone.

    So the losses of two checkpoints differ by the checkpoints, and not by the draws.
    """

    def eval_step(params, batch: Batch, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _EVAL_SALT), index)
        return batch_losses(params, batch, key, model=model, schedule=schedule, encode=encode, train=False)["loss"]

    return jax.jit(
        eval_step,
        in_shardings=(replicated(mesh), over_batch(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )
