"""The training loop: steps, and at intervals metrics, hooks and checkpoints. It knows no model and no diffusion.

    state = resume or start
    for each batch, from that step on: state, metrics = task.train_step(state, batch)

Running the same command again resumes from the newest checkpoint; the losses are those of a run that was never stopped.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from diffussm_jax.data.loader import Batch, Loader, prefetch
from diffussm_jax.io import folder_lock, write_whole
from diffussm_jax.parallel.hosts import barrier_on_all_hosts
from diffussm_jax.parallel.mesh import batch_to_devices
from diffussm_jax.training.checkpoint import EVAL_LOSS, Best, Checkpointer
from diffussm_jax.training.hooks import HookContext, HookFactory
from diffussm_jax.training.metrics import MetricsLog
from diffussm_jax.training.signals import stop_on_signal
from diffussm_jax.training.task import Hook, Task
from diffussm_jax.training.telemetry import Clock, Profile, speed_metrics
from diffussm_jax.training.window import Window

CONFIG_NAME = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run is made of.

    Attributes:
      task: what is trained.
      train_loader: the data.
      hooks: what happens at intervals beside logging and saving.
      num_steps: steps to make.
      log_every: interval of the rows of metrics.
      checkpoint_every: interval of checkpoints.
      keep_every: checkpoints of multiples of it are kept for good; 0: none.
      best: the metric by which one checkpoint more is kept.
      config: plain values, kept in the work directory and in each checkpoint.
      check_config: (saved config, where it was saved) raises ValueError if it is another experiment's.
    """

    task: Task
    train_loader: Loader
    hooks: Sequence[HookFactory] = ()
    num_steps: int
    log_every: int = 100
    checkpoint_every: int = 1000
    keep_every: int = 0
    best: Best = EVAL_LOSS
    config: dict = dataclasses.field(default_factory=dict)
    check_config: Callable[[dict, str], None] = lambda saved, where: None


def train(
    experiment: Experiment,
    workdir: epath.PathLike,
    *,
    profile_steps: tuple[int, int] | None = None,
    wandb_project: str | None = None,
) -> int | None:
    """Trains to `num_steps`, from the newest undamaged checkpoint in `workdir` if there is one.

    SIGINT (Ctrl-C) and SIGTERM, in any of the processes, end it after the current step, with a checkpoint.

    Args:
      experiment: what to train.
      workdir: gets config.json, metrics.csv, checkpoints/, samples/ and TensorBoard event files. With several hosts it
        must be visible to all of them.
      profile_steps: first and last step of a trace for XProf, written to the folder "profile".
      wandb_project: of Weights & Biases, to send the metrics to as well.

    Returns:
      None when all steps are done, or the number of the signal that ended it.

    Raises:
      ValueError: `workdir` holds a run of another config, or one of more steps, or another process trains in it
        (`io.folder_lock`).
      FloatingPointError: more than `task.max_skipped_steps` steps in a row had a loss or gradient that is not finite.
    """
    e, workdir = experiment, epath.Path(workdir)
    with contextlib.ExitStack() as stack:
        with barrier_on_all_hosts():
            if jax.process_index() == 0:
                stack.enter_context(folder_lock(workdir, "train"))
        checkpointer = Checkpointer(workdir, config=e.config, keep_every=e.keep_every, best=e.best)
        stack.enter_context(contextlib.closing(checkpointer))
        state, step, window = _start(e, checkpointer)
        if jax.process_index() == 0:
            write_whole(workdir / CONFIG_NAME, json.dumps(e.config, indent=2))
        log = stack.enter_context(contextlib.closing(MetricsLog(workdir, step, wandb_project, e.config)))
        profile = stack.enter_context(contextlib.closing(Profile(workdir, profile_steps)))
        hooks = []
        for make in e.hooks:
            hooks.append(make(HookContext(workdir, log, e.task)))
            stack.callback(hooks[-1].close)
        return _Run(e, checkpointer, hooks, log, profile, window).run(state, step)


def _start(e: Experiment, checkpointer: Checkpointer) -> tuple[Any, int, Window]:
    """The state to start from, its step, and the metrics since the last row."""
    step = checkpointer.latest_valid_step()
    if step is None:
        return e.task.create_state(), 0, Window()
    path, about = checkpointer.directory / str(step), checkpointer.about(step)
    e.check_config(about["config"], str(path))
    if step > e.num_steps:
        raise ValueError(f"config.num_steps is {e.num_steps}, but {path} is the checkpoint of step {step}")
    if jax.process_index() == 0:
        print(f"Resuming from the checkpoint of step {step}, {path}.", flush=True)
    state = checkpointer.restore(step, e.task.abstract_state)
    return state, step, Window(about.get("window"))


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        experiment: Experiment,
        checkpointer: Checkpointer,
        hooks: Sequence[Hook],
        log: MetricsLog,
        profile: Profile,
        window: Window,
    ):
        self._experiment, self._task = experiment, experiment.task
        self._checkpointer, self._hooks, self._log, self._profile = checkpointer, hooks, log, profile
        self._window, self._clock = window, Clock()
        self._multiply_adds = self._task.multiply_adds  # asked once: counting traces the model
        self._is_first_process = jax.process_index() == 0
        self._warned: set[str] = set()

    def _to_devices(self, batch: Batch) -> Batch:
        return batch_to_devices(self._task.mesh, batch)

    def run(self, state: Any, step: int) -> int | None:
        e, saved_step = self._experiment, step
        batches = prefetch(self._clock.waiting_for(e.train_loader.iterate(step)), self._to_devices)
        bar_options = {"unit": "step", "dynamic_ncols": True, "disable": not self._is_first_process}
        with stop_on_signal() as stopped_by, tqdm(total=e.num_steps, initial=step, **bar_options) as bar:
            signum, is_compiled = None, False
            bar.set_postfix_str("compiling")
            while step < e.num_steps and (signum := stopped_by(step)) is None:
                self._profile.before(step, state)
                try:
                    batch = next(batches)
                except Exception:  # damaged data; with several processes the others could not save
                    if saved_step != step and jax.process_count() == 1:
                        self._save(state, step, {})
                    raise
                state, metrics = self._task.train_step(state, batch)
                step += 1
                self._window.add(metrics)
                self._clock.step_made(state)
                if not is_compiled:  # the rate and the time left are those of the other steps
                    is_compiled, bar.initial, bar.start_t = True, step, time.time()
                    bar.last_print_t = bar.start_t
                    bar.set_postfix_str("", refresh=False)
                bar.update()
                row = self._measure(state, step, bar) if self._is_due(e.log_every, step) else {}
                of_hooks = self._run_hooks(state, step)
                if row or of_hooks:
                    self._log.write(step, row | of_hooks)
                if self._is_due(e.checkpoint_every, step):
                    with self._clock.paused(state):
                        self._save(state, step, of_hooks)
                    saved_step = step
            if saved_step != step:
                self._save(state, step, {})
            return signum

    def _is_due(self, every: int, step: int) -> bool:
        return bool(every) and (step == self._experiment.num_steps or step % every == 0)

    def _run_hooks(self, state: Any, step: int) -> dict[str, float]:
        due = [hook for hook in self._hooks if self._is_due(hook.every, step)]
        metrics: dict[str, float] = {}
        if due:
            with self._clock.paused(state):
                for hook in due:
                    try:
                        metrics |= {name: float(value) for name, value in hook.run(state, step).items()}
                    except Exception as error:
                        error.add_note(f"in the hook {hook.name!r}, step {step}")
                        raise
        return metrics

    def _measure(self, state: Any, step: int, bar: tqdm) -> dict[str, float]:
        """The row of a step: means of the metrics since the last row, and the speed."""
        e = self._experiment
        metrics, num_skipped = self._window.close()  # waits for the devices
        self._check_not_diverged(state, step)
        speed = speed_metrics(
            self._clock.lap(),
            batch_size=e.train_loader.batch_size,
            multiply_adds=self._multiply_adds,
            num_devices=self._task.mesh.size,
        )
        shown = {"loss": f"{metrics.get('loss', np.nan):.4f}"}
        if "images_per_second" in speed:
            shown["images_per_s"] = f"{speed['images_per_second']:.0f}"
        bar.set_postfix(shown)
        if num_skipped:
            bar.write(f"step {step}: skipped {num_skipped} steps since the last row: loss or gradient not finite")
        self._warn(metrics, step, bar)
        return metrics | {"skipped_steps": num_skipped} | speed

    def _warn(self, metrics: dict[str, float], step: int, bar: tqdm) -> None:
        """Prints what the task says of a row, unless it said the same of the row before."""
        found = getattr(self._task, "warnings", lambda metrics: {})(metrics)
        if found.keys() - self._warned and self._is_first_process:
            bar.write("\n".join(f"step {step}: {found[name]}" for name in found if name not in self._warned))
        self._warned = {*found}

    def _check_not_diverged(self, state: Any, step: int) -> None:
        skipped, allowed = int(state.skipped_in_a_row), self._task.max_skipped_steps
        if skipped > allowed:
            steps = self._checkpointer.steps()
            last = f"{self._checkpointer.directory / str(steps[-1])}" if steps else "none: no checkpoint was saved yet"
            raise FloatingPointError(
                f"the loss or its gradient was not finite from step {step - skipped + 1} on, more than "
                f"config.optimizer.max_skipped_steps = {allowed} times in a row. The last good checkpoint is {last}. "
                "Try a lower config.optimizer.learning_rate, config.optimizer.max_grad_norm, or float32"
            )

    def _save(self, state: Any, step: int, metrics: dict[str, float]) -> None:
        self._check_not_diverged(state, step)
        self._checkpointer.save(state, self._task.eval_params(state), metrics=metrics, window=self._window.to_json())
