"""How fast a run is and how its parameters move: the clock, the trace for XProf, and what is logged from them."""

import contextlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from etils import epath

from diffussm_jax.data.loader import Batch
from diffussm_jax.parallel.topology import peak_flops
from diffussm_jax.training.state import TrainState


class Clock:
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
        """What happens inside, once the state is there, does not count."""
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


def mfu(images_per_second: float, multiply_adds: int) -> float | None:
    """Model FLOPs utilisation: 3 * 2 * multiply-adds of the forward's linear layers * images/s / peak; SSM excluded.

    The peak is that of all devices in dense bfloat16; None where it is not known, as for CPUs.
    """
    peak = peak_flops(jax.devices()[0].device_kind)
    return 6 * multiply_adds * images_per_second / (peak * jax.device_count()) if peak else None


def peak_memory_gb() -> float:
    """The most memory that was in use so far, in 1e9 bytes: of the first local device, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def speed_metrics(clock: Clock, num_steps: int, batch_size: int, multiply_adds: int) -> dict[str, float]:
    """What a lap of the clock says: "images_per_second", "step_ms", of which "compute_ms", the share "data_wait",
    "peak_memory_gb", and "mfu" where the device's peak is known."""
    seconds, waited = clock.lap()
    images_per_second = num_steps * batch_size / seconds
    metrics = {
        "images_per_second": images_per_second,
        "step_ms": 1e3 * seconds / num_steps,
        "compute_ms": 1e3 * (seconds - waited) / num_steps,
        "data_wait": waited / seconds,
        "peak_memory_gb": peak_memory_gb(),
    }
    utilisation = mfu(images_per_second, multiply_adds)
    return metrics if utilisation is None else metrics | {"mfu": utilisation}


@jax.jit
def state_norms(params, ema_params) -> dict[str, jax.Array]:
    """ "param_norm", and "ema_distance" between the parameters and their average: Euclidean, over all of them."""
    difference = jax.tree.map(jnp.subtract, params, ema_params)
    return {"param_norm": optax.tree.norm(params), "ema_distance": optax.tree.norm(difference)}


class Profile:
    """A trace of some steps for XProf, in the folder "profile" of a work directory.

    Args:
      workdir: of the run.
      steps: (first, last), or None for no trace; a run that resumes after the first traces nothing.
    """

    def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None):
        self._target, self._steps, self._folder = workdir / "profile", steps, None

    def before(self, step: int, state: TrainState) -> None:
        """Starts or ends the trace, if it is time; `step` steps were made."""
        if self._steps is None or step not in self._steps:
            return
        jax.block_until_ready(state)
        if step == self._steps[0]:
            self._folder = tempfile.mkdtemp(prefix="profile_")  # XProf writes to local disks only
            jax.profiler.start_trace(self._folder)
        else:
            self.close()

    def close(self) -> None:
        """Ends a trace that has begun, and puts it in its place."""
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
