"""The training loop: steps, and at their intervals metrics, evaluation, samples and checkpoints.

    state = resume or start
    for each batch, from that step on: state = train_step(state, batch)

Running the same command again resumes from the newest checkpoint; the losses are those of a run that was never stopped.
"""

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from diffussm_jax.data.loader import Batch, Loader, prefetch
from diffussm_jax.data.transforms import image_grid, save_png
from diffussm_jax.diffusion import Schedule
from diffussm_jax.parallel.mesh import batch_to_devices, replicated
from diffussm_jax.training.checkpoint import Checkpointer
from diffussm_jax.training.metrics import MetricsLog
from diffussm_jax.training.state import TrainState, create_state, empty_window
from diffussm_jax.training.step import Encode, make_eval_step, make_train_step

CONFIG_NAME = "config.json"
# What may change between a run and its resumption without making another experiment of it.
_FREE_KEYS = (
    *("num_steps", "log_every", "eval_every", "sample_every", "checkpoint_every", "sampling", "mesh"),
    *("data.path", "data.vae", "data.num_threads", "data.eval_split"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervals:
    """Every how many steps something happens; 0: never."""

    log: int
    eval: int
    sample: int
    checkpoint: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run is made of.

    Attributes:
      config: its config as plain values, kept in the work directory.
      model: the backbone.
      input_shape: (H, W, C) of what the model sees.
      schedule: of the diffusion.
      optimizer: an optax transformation.
      learning_rate: its schedule, to log.
      ema_decay: of the parameters' average.
      has_ema_warmup: whether that decay starts lower.
      encode: (batch, key) -> x_0, jitted with the step.
      sample_grid: (params, key) -> images [B, H, W, C] uint8 for the grid.
      num_grid_columns: of that grid.
      train_loader: the data.
      eval_loader: the held-out data, if any.
      num_steps: updates to make.
      intervals: of everything else.
      seed: of all randomness.
      mesh: the devices.
    """

    config: dict
    model: nn.Module
    input_shape: tuple[int, int, int]
    schedule: Schedule
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    ema_decay: float
    has_ema_warmup: bool
    encode: Encode
    sample_grid: Callable[[dict, jax.Array], np.ndarray]
    num_grid_columns: int
    train_loader: Loader
    eval_loader: Loader | None
    num_steps: int
    intervals: Intervals
    seed: int
    mesh: Mesh


def init_params(model: nn.Module, input_shape: tuple[int, int, int], seed: int) -> dict:
    """A model's parameters before training; under `jax.eval_shape`, their shapes alone."""

    def init():
        x_t, t = np.zeros((1, *input_shape), np.float32), np.zeros(1, np.int32)
        y = np.zeros(1, np.int32) if model.num_classes else None
        return model.init(jax.random.key(seed), x_t, t, y)["params"]

    return jax.jit(init)()


def _flat(config: dict) -> dict:
    """The values of all groups, under dotted keys."""
    flat = {}
    for key, value in config.items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat


def _keep_config(config: dict, workdir: epath.Path) -> None:
    """Writes config.json, or checks that the run being resumed has the same; ValueError names what differs."""
    path = workdir / CONFIG_NAME
    if path.exists():
        old = _flat(json.loads(path.read_text()))
        new = _flat(json.loads(json.dumps(config)))
        differing = [
            f"config.{key}: was {old.get(key)!r}, is {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if not {key, key.partition(".")[0]} & set(_FREE_KEYS) and old.get(key) != new.get(key)
        ]
        if differing:
            raise ValueError(
                f"{workdir} holds a run of another config; choose another workdir or the same values:\n  "
                + "\n  ".join(differing)
            )
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2))


@contextlib.contextmanager
def _stop_on_signal():
    """Yields a function that tells which of SIGINT and SIGTERM has come, or None. A second one is obeyed at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda: None
        return

    def handler(signum, frame):
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for s, old in previous.items():
            signal.signal(s, old)


class _Clock:
    """Counts the seconds spent in training steps, and not those spent in evaluation, sampling or saving."""

    def __init__(self):
        self._seconds, self._waited, self._started = 0.0, 0.0, time.perf_counter()

    def waiting_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, and how long each was waited for counts as waiting for data."""
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - started
            yield batch

    @contextlib.contextmanager
    def paused(self, state: TrainState):
        jax.block_until_ready(state.step)
        self._seconds += time.perf_counter() - self._started
        yield
        self._started = time.perf_counter()

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and how many of them were spent waiting for data."""
        now = time.perf_counter()
        lap = self._seconds + now - self._started, self._waited
        self._seconds, self._waited, self._started = 0.0, 0.0, now
        return lap


def train(experiment: Experiment, workdir: epath.PathLike) -> int | None:
    """Trains, from the newest checkpoint in `workdir` if there is one, to `num_steps`.

    SIGINT (Ctrl-C) and SIGTERM end it after the current step, with a checkpoint.

    Args:
      experiment: what to train.
      workdir: gets config.json, metrics.csv, checkpoints/, samples/ and TensorBoard event files.

    Returns:
      None when all steps are done, or the number of the signal that ended it before.

    Raises:
      ValueError: `workdir` holds a run of another config.
    """
    workdir = epath.Path(workdir)
    _keep_config(experiment.config, workdir)
    with contextlib.closing(Checkpointer(workdir)) as checkpointer:
        state, step = _start(experiment, checkpointer)
        with contextlib.closing(MetricsLog(workdir, step)) as log:
            return _Run(experiment, workdir, checkpointer, log).run(state, step)


def _start(experiment: Experiment, checkpointer: Checkpointer) -> tuple[TrainState, int]:
    def create() -> TrainState:
        params = init_params(experiment.model, experiment.input_shape, experiment.seed)
        return create_state(params, experiment.optimizer)

    sharding = replicated(experiment.mesh)
    step = checkpointer.latest_step()
    if step is None:
        return jax.jit(create, out_shardings=sharding)(), 0
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(create)
    )
    print(f"Resuming from the checkpoint of step {step} in {checkpointer.directory}.", flush=True)
    return checkpointer.restore(step, like), step


class _Run:
    """One call of `train`: the jitted steps, and what happens at each interval."""

    def __init__(self, experiment: Experiment, workdir: epath.Path, checkpointer: Checkpointer, log: MetricsLog):
        e = experiment
        self._experiment, self._workdir, self._checkpointer, self._log = e, workdir, checkpointer, log
        shared = {"model": e.model, "schedule": e.schedule, "encode": e.encode, "seed": e.seed, "mesh": e.mesh}
        self._train_step = make_train_step(
            **shared, optimizer=e.optimizer, ema_decay=e.ema_decay, has_ema_warmup=e.has_ema_warmup
        )
        self._eval_step = make_eval_step(**shared)
        self._clock = _Clock()

    def _to_devices(self, batch: Batch) -> Batch:
        return batch_to_devices(self._experiment.mesh, batch)

    def run(self, state: TrainState, step: int) -> int | None:
        e = self._experiment
        saved_step = step
        batches = prefetch(self._clock.waiting_for(e.train_loader.iterate(step)), self._to_devices)
        with (
            _stop_on_signal() as stopped,
            tqdm(total=e.num_steps, initial=step, unit="step", dynamic_ncols=True) as bar,
        ):
            while step < e.num_steps and not stopped():
                state = self._train_step(state, next(batches))
                step += 1
                bar.update()
                is_last = step == e.num_steps
                if is_last or step % e.intervals.log == 0:
                    state = self._write_metrics(state, step, bar)
                eval_loss = None
                if e.intervals.eval and (is_last or step % e.intervals.eval == 0):
                    with self._clock.paused(state):
                        eval_loss = self._evaluate(state, step)
                if e.intervals.sample and (is_last or step % e.intervals.sample == 0):
                    with self._clock.paused(state):
                        self._draw_samples(state, step)
                if is_last or step % e.intervals.checkpoint == 0:
                    with self._clock.paused(state):
                        self._checkpointer.save(state, eval_loss)
                    saved_step = step
            if saved_step != step:
                self._checkpointer.save(state)
            return stopped() if step < e.num_steps else None

    def _write_metrics(self, state: TrainState, step: int, bar: tqdm) -> TrainState:
        e = self._experiment
        window = jax.device_get(state.window)  # waits for the device
        count = window.pop("count")
        metrics = {name: total / count for name, total in window.items()}
        metrics["learning_rate"] = float(e.learning_rate(step - 1))
        seconds, waited = self._clock.lap()
        metrics["images_per_second"] = float(count) * e.train_loader.batch_size / seconds
        metrics["data_wait"] = waited / seconds
        self._log.write(step, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", images_per_s=f"{metrics['images_per_second']:.0f}")
        return state.replace(window=jax.device_put(empty_window(), replicated(e.mesh)))

    def _evaluate(self, state: TrainState, step: int) -> float:
        loader = self._experiment.eval_loader
        losses = [self._eval_step(state.ema_params, self._to_devices(loader.batch(i)), i) for i in range(len(loader))]
        eval_loss = float(np.mean(jax.device_get(losses)))
        self._log.write(step, {"eval_loss": eval_loss})
        return eval_loss

    def _draw_samples(self, state: TrainState, step: int) -> None:
        e = self._experiment
        images = e.sample_grid(state.ema_params, jax.random.key(e.seed))
        grid = image_grid(images, e.num_grid_columns)
        (self._workdir / "samples").mkdir(parents=True, exist_ok=True)
        save_png(self._workdir / "samples" / f"step_{step:08d}.png", grid)
        self._log.image(step, "samples", grid)
