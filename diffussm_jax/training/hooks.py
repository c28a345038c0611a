"""The hooks that come with the package: held-out loss, sample grids, scores, learning rate, post-hoc EMA.

A hook is made by a function of a `HookContext` and its options, so that a config can choose it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
from etils import epath

from diffussm_jax.data.loader import Loader
from diffussm_jax.data.transforms import image_grid, save_png
from diffussm_jax.parallel.mesh import batch_to_devices
from diffussm_jax.training.metrics import MetricsLog
from diffussm_jax.training.posthoc_ema import Snapshots
from diffussm_jax.training.task import Hook, Task

# Keeps the grid's noise apart from the training steps', whose numbers are int32 and stay below it.
_SAMPLE_SALT = np.uint32(0xFFFF_5A4D)


class HookContext(NamedTuple):
    """What a hook may use: the run's folder, its log and its task."""

    workdir: epath.Path
    log: MetricsLog
    task: Task


HookFactory = Callable[[HookContext], Hook]


def eval_loss(context: HookContext, *, loader: Loader, every: int) -> Hook:
    """Logs the mean loss over all held-out records, each counted once, as "eval_loss"."""
    task = context.task

    def run(state, step):
        params, num_rows = task.eval_params(state), [loader.num_rows(i) for i in range(len(loader))]
        metrics = [
            task.eval_step(params, batch_to_devices(task.mesh, loader.batch(i)), i, rows)
            for i, rows in enumerate(num_rows)
        ]
        found = jax.device_get(metrics)
        return {
            f"eval_{name}": float(np.average([float(m[name]) for m in found], weights=num_rows)) for name in found[0]
        }

    return Hook("eval_loss", every, run)


def sample_grid(
    context: HookContext,
    *,
    draw: Callable[[dict, jax.Array], np.ndarray],
    num_columns: int,
    labels: Sequence[int] | None,
    name: str,
    seed: int,
    every: int,
    tag: str = "samples",
) -> Hook:
    """Draws images with the averaged parameters, and writes them as a grid to samples/step_NNNNNNNN_NAME.png.

    Where an image has values that are not finite, it says so and writes nothing.

    Args:
      context: of the run.
      draw: (params, key) -> images [B, H, W, C] uint8.
      num_columns: of the grid.
      labels: the class of each column, or the text of each image; None without.
      name: how the images are sampled, for the file's name.
      seed: of the noise, which is the same every time.
      every: interval in steps.
      tag: of the images in the log.
    """
    key = jax.random.fold_in(jax.random.key(seed), _SAMPLE_SALT)

    def run(state, step):
        try:
            images = draw(context.task.eval_params(state), key)
        except FloatingPointError as error:  # a weak model's samples are no reason to stop its training
            if jax.process_index() == 0:
                print(f"step {step}: no grid of samples: {error}", flush=True)
            return {}
        if jax.process_index() == 0:
            of_images = None if labels is None else np.resize(labels, len(images))
            grid, folder = image_grid(images, num_columns, of_images), context.workdir / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            save_png(folder / f"step_{step:08d}_{name}.png", grid)
            context.log.image(step, tag, grid)
        return {}

    return Hook("sample_grid", every, run)


def scores(context: HookContext, *, score: Callable[[dict], dict[str, float]], every: int) -> Hook:
    """Logs scores of samples, such as "FID". Samples that are not finite give no scores.

    Args:
      context: of the run.
      score: averaged parameters -> scores by name, the same in all processes.
      every: interval in steps.
    """

    def run(state, step):
        try:
            return score(context.task.eval_params(state))
        except FloatingPointError as error:
            if jax.process_index() == 0:
                print(f"step {step}: no scores: {error}", flush=True)
            return {}

    return Hook("scores", every, run)


def posthoc_ema(context: HookContext, *, every: int) -> Hook:
    """Stores the power-function averages of the parameters, from which others can be computed after training."""
    snapshots = Snapshots(context.workdir)

    def run(state, step):
        snapshots.save(step, state.power_ema)
        return {}

    return Hook("posthoc_ema", every, run, snapshots.close)


def learning_rate(context: HookContext, *, schedule: optax.Schedule, every: int) -> Hook:
    """Logs "learning_rate", as used in the last step, and the task's metrics of the state."""

    def run(state, step):
        return {"learning_rate": schedule(step - 1), **jax.device_get(context.task.state_metrics(state))}

    return Hook("learning_rate", every, run)
