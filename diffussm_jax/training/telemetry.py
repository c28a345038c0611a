"""Speed of a run: the clock, speed metrics, and profiling for XProf."""

import contextlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from etils import epath

from diffussm_jax.data.loader import Batch
from diffussm_jax.parallel.topology import peak_flops


class Lap(NamedTuple):
    """A time span: seconds in training steps, seconds of these spent waiting for data, and the number of steps."""

    seconds: float
    waited: float
    num_steps: int


class Clock:
    """Measures training steps, without evaluation, sampling, saving, and the first step, which compiles."""

    def __init__(self):
        self._is_compiled = False
        self._restart()

    def _restart(self) -> None:
        self._seconds, self._waited, self._num_steps, self._started = 0.0, 0.0, 0, time.perf_counter()

    def waiting_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the same batches, and counts the time until each arrives as waiting for data."""
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - started
            yield batch

    def step_made(self, state) -> None:
        """Counts a step. The first step of a process is awaited, and restarts the clock."""
        if self._is_compiled:
            self._num_steps += 1
            return
        jax.block_until_ready(state)
        self._is_compiled = True
        self._restart()

    @contextlib.contextmanager
    def paused(self, state):
        """Waits for the state, then excludes the time inside the context."""
        jax.block_until_ready(state)
        self._seconds += time.perf_counter() - self._started
        yield
        self._started = time.perf_counter()

    def lap(self) -> Lap:
        """The time and the steps since the last lap."""
        lap = Lap(self._seconds + time.perf_counter() - self._started, self._waited, self._num_steps)
        self._restart()
        return lap


def mfu(images_per_second: float, multiply_adds: int, num_devices: int) -> float | None:
    """Model FLOPs utilisation: 3 * 2 * multiply-adds of the forward's linear layers * images/s / peak; SSM excluded.

    The peak is dense bfloat16 of `num_devices` devices. Returns None if it is unknown, as for CPUs.
    """
    peak = peak_flops(jax.devices()[0].device_kind)
    return 6 * multiply_adds * images_per_second / (peak * num_devices) if peak else None


def peak_memory_gb() -> float:
    """Peak memory in 1e9 bytes: of the first local device, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def speed_metrics(lap: Lap, *, batch_size: int, multiply_adds: int, num_devices: int) -> dict[str, float]:
    """ "images_per_second", "step_ms", of which "compute_ms", the fraction "data_wait", "peak_memory_gb", and "mfu".

    Without a timed step only the memory. "mfu" only if the peak of the device is known.
    """
    metrics = {"peak_memory_gb": peak_memory_gb()}
    if not lap.num_steps:
        return metrics
    images_per_second = lap.num_steps * batch_size / lap.seconds
    utilisation = mfu(images_per_second, multiply_adds, num_devices)
    speed = {
        "images_per_second": images_per_second,
        "step_ms": 1e3 * lap.seconds / lap.num_steps,
        "compute_ms": 1e3 * (lap.seconds - lap.waited) / lap.num_steps,
        "data_wait": lap.waited / lap.seconds,
    }
    return speed | metrics | ({} if utilisation is None else {"mfu": utilisation})


class Profile:
    """Traces some steps for XProf, to the folder "profile" of a work directory.

    Args:
      steps: (first, last), or None for no trace. A run that resumes after the first traces nothing.
    """

    def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None):
        self._target, self._steps, self._folder = workdir / "profile", steps, None

    def before(self, step: int, state) -> None:
        """Starts or stops the trace if `step`, the number of completed steps, is its first or last."""
        if self._steps is None or step not in self._steps:
            return
        jax.block_until_ready(state)
        if step == self._steps[0]:
            self._folder = tempfile.mkdtemp(prefix="profile_")  # XProf writes to local disks only
            jax.profiler.start_trace(self._folder)
        else:
            self.close()

    def close(self) -> None:
        """Stops a running trace, and moves it to the work directory."""
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        for file in Path(self._folder).rglob("*"):
            if file.is_file():
                target = self._target / file.relative_to(self._folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        shutil.rmtree(self._folder)
        self._folder = None
