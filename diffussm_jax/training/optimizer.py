"""AdamW with warm-up, decay and clipping, and the exponential moving average of the parameters."""

import jax
import jax.numpy as jnp
import optax


def learning_rate_schedule(learning_rate: float, *, warmup_steps: int, decay: str, num_steps: int) -> optax.Schedule:
    """Linear from 0 over `warmup_steps`, then constant, or a half cosine to 0 at `num_steps`.

    Raises:
      ValueError: `decay` is neither "constant" nor "cosine", or the warm-up is longer than a cosine run.
    """
    if decay == "cosine":
        if warmup_steps >= num_steps:
            raise ValueError(f"warmup_steps = {warmup_steps} must be fewer than num_steps = {num_steps}")
        after = optax.cosine_decay_schedule(learning_rate, num_steps - warmup_steps)
    elif decay == "constant":
        after = optax.constant_schedule(learning_rate)
    else:
        raise ValueError(f"unknown decay {decay!r}; choose one of constant, cosine")
    return optax.join_schedules([optax.linear_schedule(0, learning_rate, max(warmup_steps, 1)), after], [warmup_steps])


def adamw(
    schedule: optax.Schedule, *, weight_decay: float = 0.0, max_grad_norm: float = 0.0
) -> optax.GradientTransformation:
    """AdamW, after clipping the gradient's global norm to `max_grad_norm` (0: not clipped).

    Weight decay spares vectors and the SSMs: it acts on the kernels of linear layers and on embedding tables alone.
    """

    def is_decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

    optimizer = optax.adamw(schedule, weight_decay=weight_decay, mask=is_decayed)
    if max_grad_norm > 0:
        return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)
    return optimizer


def ema_update(ema_params, params, step: jax.Array, *, decay: float, has_warmup: bool):
    """ema <- decay * ema + (1 - decay) * params; with warm-up, decay is at most (1 + step) / (10 + step)."""
    if has_warmup:
        decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda ema, p: decay * ema + (1 - decay) * p, ema_params, params)
