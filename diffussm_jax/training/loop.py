"""The training loop: steps, and at their intervals metrics, evaluation, samples and checkpoints.

    state = resume or start
    for each batch, from that step on: state = train_step(state, batch)

Running the same command again resumes from the newest checkpoint; the losses are those of a run that was never stopped.
"""

import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable

import jax
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from diffussm_jax.config import flatten
from diffussm_jax.data.loader import Batch, Loader, prefetch
from diffussm_jax.data.transforms import image_grid, save_png
from diffussm_jax.parallel.mesh import batch_to_devices, replicated
from diffussm_jax.training.checkpoint import Checkpointer
from diffussm_jax.training.metrics import MetricsLog
from diffussm_jax.training.posthoc_ema import Snapshots
from diffussm_jax.training.state import TrainState, empty_window
from diffussm_jax.training.step import Recipe, make_eval_step, make_train_step
from diffussm_jax.training.telemetry import Clock, Profile, speed_metrics, state_norms

CONFIG_NAME = "config.json"
# What may change between a run and its resumption without making another experiment of it.
_FREE_KEYS = (
    *("num_steps", "log_every", "eval_every", "sample_every", "checkpoint_every", "keep_every", "sampling", "mesh"),
    *("data.path", "data.vae", "data.num_threads", "data.eval_split"),
    # These change what is stored and in which order numbers are added, not what is computed.
    *("model.remat", "model.scan_unroll", "model.ssm_method", "optimizer.accumulation_steps"),
    "optimizer.max_skipped_steps",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervals:
    """Every how many steps something happens; 0: never."""

    log: int
    eval: int
    sample: int
    checkpoint: int
    keep: int  # that checkpoint is kept for good
    posthoc_ema: int  # averages for post-hoc EMA are stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run is made of.

    Attributes:
      config: its config as plain values, kept in the work directory.
      recipe: of a step.
      learning_rate: the optimizer's schedule, to log.
      multiply_adds: of one forward pass of one image, for the MFU.
      sample_grid: (params, key) -> images [B, H, W, C] uint8 for the grid.
      num_grid_columns: of that grid.
      train_loader: the data.
      eval_loader: the held-out data, if any.
      num_steps: steps to make.
      intervals: of everything else.
    """

    config: dict
    recipe: Recipe
    learning_rate: optax.Schedule
    multiply_adds: int
    sample_grid: Callable[[dict, jax.Array], np.ndarray]
    num_grid_columns: int
    train_loader: Loader
    eval_loader: Loader | None
    num_steps: int
    intervals: Intervals


def _check_same_config(old: dict, new: dict, where: str) -> None:
    """ValueError, which names what differs, where two configs are not of the same experiment."""
    old, new = flatten(old), flatten(json.loads(json.dumps(new)))
    differing = [
        f"config.{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if not {key, key.partition(".")[0]} & set(_FREE_KEYS) and old.get(key) != new.get(key)
    ]
    if differing:
        raise ValueError(
            f"{where} holds a run of another config; choose another workdir or the same values:\n  "
            + "\n  ".join(differing)
        )


def _keep_config(config: dict, workdir: epath.Path) -> None:
    """Checks that the run being resumed has the same config, and writes config.json, whole or not at all."""
    path = workdir / CONFIG_NAME
    if path.exists():
        _check_same_config(json.loads(path.read_text()), config, str(workdir))
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = workdir / (CONFIG_NAME + ".partial")
        partial.write_text(json.dumps(config, indent=2))
        partial.replace(path)


@contextlib.contextmanager
def _stop_on_signal():
    """Yields a function of the step that tells which of SIGINT and SIGTERM has come, or None.

    Several processes agree: JAX's coordinator hears of a SIGTERM that any of them gets, and names a step before which
    all of them stop; Ctrl-C in one of them is passed on as SIGTERM. Alone, a second signal is obeyed at once.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda step: None
        return
    is_alone = jax.process_count() == 1

    def handler(signum, frame):
        if received:
            raise KeyboardInterrupt
        received.append(signum)
        if not is_alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped(step):
        if is_alone or not multihost_utils.reached_preemption_sync_point(step):
            return received[0] if is_alone and received else None
        return received[0] if received else signal.SIGTERM

    # With several processes SIGTERM already has JAX's handler, which must stay.
    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM) if is_alone or s == signal.SIGINT}
    try:
        yield stopped
    finally:
        for s, old in previous.items():
            signal.signal(s, old)


def train(
    experiment: Experiment,
    workdir: epath.PathLike,
    *,
    profile_steps: tuple[int, int] | None = None,
    wandb_project: str | None = None,
) -> int | None:
    """Trains, from the newest checkpoint in `workdir` that is not damaged, if there is one, to `num_steps`.

    SIGINT (Ctrl-C) and SIGTERM, in any of the processes, end it after the current step, with a checkpoint.

    Args:
      experiment: what to train.
      workdir: gets config.json, metrics.csv, checkpoints/, samples/ and TensorBoard event files. On several hosts one
        that all of them see.
      profile_steps: first and last step of a trace for XProf, written to the folder "profile".
      wandb_project: of Weights & Biases, to send the metrics to as well.

    Returns:
      None when all steps are done, or the number of the signal that ended it before.

    Raises:
      ValueError: `workdir` holds a run of another config.
      FloatingPointError: more than `recipe.max_skipped_steps` steps in a row had a loss or gradient that is not finite.
    """
    workdir = epath.Path(workdir)
    _keep_config(experiment.config, workdir)
    has_snapshots = bool(experiment.recipe.power_emas)
    with (
        contextlib.closing(
            Checkpointer(workdir, config=experiment.config, keep_every=experiment.intervals.keep)
        ) as checkpointer,
        contextlib.closing(Snapshots(workdir)) if has_snapshots else contextlib.nullcontext() as snapshots,
    ):
        state, step = _start(experiment, checkpointer)
        with (
            contextlib.closing(MetricsLog(workdir, step, wandb_project, experiment.config)) as log,
            contextlib.closing(Profile(workdir, profile_steps)) as profile,
        ):
            return _Run(experiment, workdir, checkpointer, snapshots, log, profile).run(state, step)


def _start(experiment: Experiment, checkpointer: Checkpointer) -> tuple[TrainState, int]:
    step = checkpointer.newest_sound_step()
    if step is None:
        return experiment.recipe.create_state(), 0
    path = checkpointer.directory / str(step)
    _check_same_config(checkpointer.about(step)["config"], experiment.config, str(path))
    if jax.process_index() == 0:
        print(f"Resuming from the checkpoint of step {step}, {path}.", flush=True)
    return checkpointer.restore(step, experiment.recipe.abstract_state), step


class _Run:
    """One call of `train`: the jitted steps, and what happens at each interval."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: epath.Path,
        checkpointer: Checkpointer,
        snapshots: Snapshots | None,
        log: MetricsLog,
        profile: Profile,
    ):
        self._experiment, self._workdir, self._log, self._profile = experiment, workdir, log, profile
        self._checkpointer, self._snapshots = checkpointer, snapshots
        self._mesh = experiment.recipe.mesh
        self._train_step = make_train_step(experiment.recipe)
        self._eval_step = make_eval_step(experiment.recipe)
        self._clock = Clock()
        self._is_first_process = jax.process_index() == 0

    def _to_devices(self, batch: Batch) -> Batch:
        return batch_to_devices(self._mesh, batch)

    def run(self, state: TrainState, step: int) -> int | None:
        e = self._experiment
        saved_step = step
        batches = prefetch(self._clock.waiting_for(e.train_loader.iterate(step)), self._to_devices)
        bar_options = {"unit": "step", "dynamic_ncols": True, "disable": not self._is_first_process}
        with (
            _stop_on_signal() as stopped_by,
            tqdm(total=e.num_steps, initial=step, **bar_options) as bar,
        ):
            signum = None
            while step < e.num_steps and (signum := stopped_by(step)) is None:
                self._profile.before(step, state)
                state = self._train_step(state, next(batches))
                step += 1
                bar.update()
                is_last = step == e.num_steps

                def is_due(interval, step=step, is_last=is_last):
                    return interval and (is_last or step % interval == 0)

                if is_due(e.intervals.log):
                    state = self._write_metrics(state, step, bar)
                eval_loss = None
                if is_due(e.intervals.eval):
                    with self._clock.paused(state):
                        eval_loss = self._evaluate(state, step)
                if is_due(e.intervals.sample):
                    with self._clock.paused(state):
                        self._draw_samples(state, step)
                if is_due(e.intervals.posthoc_ema):
                    with self._clock.paused(state):
                        self._snapshots.save(step, state.power_ema)
                if is_due(e.intervals.checkpoint):
                    with self._clock.paused(state):
                        self._save(state, step, eval_loss)
                    saved_step = step
            if saved_step != step:
                self._save(state, step)
            return signum

    def _check_not_diverged(self, state: TrainState, step: int) -> None:
        skipped, allowed = int(state.skipped_in_a_row), self._experiment.recipe.max_skipped_steps
        if skipped > allowed:
            steps = self._checkpointer.steps()
            last = f"{self._checkpointer.directory / str(steps[-1])}" if steps else "none: no checkpoint was saved yet"
            raise FloatingPointError(
                f"the loss or its gradient was not finite from step {step - skipped + 1} on, more than "
                f"config.optimizer.max_skipped_steps = {allowed} times in a row. The last good checkpoint is {last}. "
                "Try a lower config.optimizer.learning_rate, config.optimizer.max_grad_norm, or float32"
            )

    def _save(self, state: TrainState, step: int, eval_loss: float | None = None) -> None:
        self._check_not_diverged(state, step)
        self._checkpointer.save(state, eval_loss)

    def _write_metrics(self, state: TrainState, step: int, bar: tqdm) -> TrainState:
        e = self._experiment
        window = jax.device_get(state.window)  # waits for the device
        self._check_not_diverged(state, step)
        count, skipped = window.pop("count"), window.pop("skipped")
        metrics = {name: total / count if count else np.nan for name, total in window.items()}
        metrics |= {"skipped_steps": skipped, "learning_rate": e.learning_rate(step - 1)}
        metrics |= state_norms(state.params, state.ema_params)
        metrics |= speed_metrics(self._clock, int(count + skipped), e.train_loader.batch_size, e.multiply_adds)
        self._log.write(step, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", images_per_s=f"{metrics['images_per_second']:.0f}")
        if skipped:
            made = count + skipped
            bar.write(f"step {step}: {skipped:.0f} of the last {made:.0f} steps skipped: loss or gradient not finite")
        return state.replace(window=jax.device_put(empty_window(), replicated(self._mesh)))

    def _evaluate(self, state: TrainState, step: int) -> float:
        loader = self._experiment.eval_loader
        losses = [self._eval_step(state.ema_params, self._to_devices(loader.batch(i)), i) for i in range(len(loader))]
        eval_loss = float(np.mean(jax.device_get(losses)))
        self._log.write(step, {"eval_loss": eval_loss})
        return eval_loss

    def _draw_samples(self, state: TrainState, step: int) -> None:
        e = self._experiment
        images = e.sample_grid(state.ema_params, jax.random.key(e.recipe.seed))
        if not self._is_first_process:
            return
        grid = image_grid(images, e.num_grid_columns)
        (self._workdir / "samples").mkdir(parents=True, exist_ok=True)
        save_png(self._workdir / "samples" / f"step_{step:08d}.png", grid)
        self._log.image(step, "samples", grid)
