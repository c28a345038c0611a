"""AdamW with warm-up, decay and clipping. The learning rate is a function of the step, skipped steps included."""

import jax
import jax.numpy as jnp
import optax

DECAYS = ("constant", "cosine")


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
        raise ValueError(f"unknown decay {decay!r}; choose one of {', '.join(DECAYS)}")
    return optax.join_schedules([optax.linear_schedule(0, learning_rate, max(warmup_steps, 1)), after], [warmup_steps])


def scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by -schedule(step), where `step` is passed to `update`.

    optax counts only the updates that it makes. Skipped steps would delay the schedule, and a cosine would not reach
    its end.
    """

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, step, **extra_args):
        rate = schedule(step)
        updates = jax.tree.map(lambda u: jnp.array(-rate, u.dtype) * u, updates)
        return updates, optax.ScaleByScheduleState(count=step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def adamw(
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> optax.GradientTransformationExtraArgs:
    """AdamW, after clipping the gradient's global norm to `max_grad_norm` (0: not clipped); `update` takes `step`.

    Weight decay acts on the kernels of linear layers and on embedding tables alone, not on vectors and SSMs.
    """

    def is_decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

    optimizer = optax.chain(
        optax.scale_by_adam(*betas),
        optax.add_decayed_weights(weight_decay, is_decayed),
        scale_by_learning_rate(schedule),
    )
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer) if max_grad_norm > 0 else optimizer
