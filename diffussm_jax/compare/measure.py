"""What each config of a suite costs on this machine: time of a step and of sampling, memory, parameters, multiply-adds.

The configs take turns, a few steps each, so that a machine that slows down for a while slows all of them.
"""

import datetime
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffussm_jax.bench.measure import machine_name, planned_bytes, seconds
from diffussm_jax.build import Parts
from diffussm_jax.compare.suite import Suite, run_identity
from diffussm_jax.config import to_plain
from diffussm_jax.data_config import complete_from_data
from diffussm_jax.diffusion.samplers.base import num_evaluations
from diffussm_jax.io import read_json, write_whole
from diffussm_jax.parallel.mesh import batch_to_devices
from diffussm_jax.validation import per_device_microbatch

MEASURED = "measured.json"
_TURN_SECONDS = 0.25
_NUM_SAMPLING_TURNS = 3


def config_hash(config: ConfigDict) -> str:
    """What a measurement depends on."""
    return hashlib.sha256(json.dumps(run_identity(to_plain(config)), sort_keys=True).encode()).hexdigest()


class _Measured:
    """A config with its compiled training step and its state."""

    def __init__(self, config: ConfigDict):
        self.config, _ = complete_from_data(config)
        self.parts = parts = Parts(self.config, has_decoder=False)
        task = parts.task
        batch = next(parts.train_loader.iterate(0))
        self._step = task.train_step.lower(task.abstract_state, task.batch_spec).compile()
        self._batch = batch_to_devices(task.mesh, batch)
        self._state = task.create_state()
        self._num_images = self.config.batch_size
        self._run_steps(1)  # the first call of a program takes longer
        self._sample()
        self._turn = max(1, round(_TURN_SECONDS / seconds(lambda: self._run_steps(1))))
        self.step_ms: list[float] = []
        self.sampling_ms: list[float] = []

    def _run_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)

    def time_steps(self) -> None:
        self.step_ms.append(1e3 * seconds(lambda: self._run_steps(self._turn)) / self._turn)

    def _sample(self) -> None:
        condition = self.parts.model.example_condition(self._num_images)
        params = self.parts.task.eval_params(self._state)
        self.parts.generator(params, condition, self._num_images, jax.random.key(0))

    def time_sampling(self) -> None:
        self.sampling_ms.append(1e3 * seconds(self._sample) / self._num_images)

    def entry(self) -> dict[str, Any]:
        """The figures, as JSON can hold them."""
        config, parts = self.config, self.parts
        costs = parts.model.costs(parts.input_shape, per_device_microbatch(config, parts.mesh.shape))
        step_ms = statistics.median(self.step_ms)
        return {
            "batch_size": config.batch_size,
            "parameters": sum(costs.parameters.values()),
            "multiply_adds": costs.total + (costs.mixer or 0),
            "mixer_multiply_adds": costs.mixer,
            "mixer_method": costs.mixer_method,
            "step_ms": step_ms,
            "step_ms_of_turns": self.step_ms,
            "images_per_second": 1e3 * config.batch_size / step_ms,
            "sampling_ms_per_image": statistics.median(self.sampling_ms),
            "sampling_evaluations": num_evaluations(parts.generator.sampler, config.sampling.num_steps),
            "memory_mb": planned_bytes(self._step) / 1e6,
        }


def measure(
    suite: Suite, workdir: epath.PathLike, *, num_turns: int = 9, say: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Measures the configs of a suite, and saves the figures in WORKDIR/measured.json. What is there is not repeated.

    Args:
      suite: all of whose configs are measured.
      workdir: of the comparison.
      num_turns: how often each config has its turn; times are medians over them.
      say: called with lines about the progress.

    Returns:
      Figures by name; {"error": message} for a config that does not run. Memory is what XLA plans for the training
      step: state, batch and temporaries of a device.
    """
    path = epath.Path(workdir) / MEASURED
    found = read_measured(path) if path.exists() else {}
    hashes = {name: config_hash(config) for name, config in suite.configs.items()}
    missing = [name for name in suite.configs if found.get(name, {}).get("config_sha256") != hashes[name]]
    if not missing:
        return found
    about = {"machine": machine_name(), "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    ready: dict[str, _Measured] = {}
    for name in missing:
        started = time.perf_counter()
        try:
            ready[name] = _Measured(suite.configs[name])
        except Exception as error:  # of any type: the others shall be compared
            found[name] = {"error": error_line(error)}
            say(f"{name}: does not run: {found[name]['error']}")
        else:
            say(f"{name}: compiled in {time.perf_counter() - started:.0f} s")
    say(f"timing steps: {num_turns} turns")
    for _ in range(num_turns):
        for of_config in ready.values():
            of_config.time_steps()
    say("timing samplers")
    for _ in range(_NUM_SAMPLING_TURNS):
        for of_config in ready.values():
            of_config.time_sampling()
    for name, of_config in ready.items():
        entry = found[name] = of_config.entry() | about | {"config_sha256": hashes[name]}
        say(f"{name}: {entry['step_ms']:.4g} ms a step, {entry['memory_mb']:.4g} MB")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found, indent=1))
    ready.clear()
    jax.clear_caches()
    return found


def error_line(error: BaseException) -> str:
    """An error in one line."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:500]


def read_measured(path: epath.PathLike) -> dict[str, dict[str, Any]]:
    """Reads measured.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    found = read_json(epath.Path(path))
    if not all(isinstance(entry, Mapping) and ("error" in entry or "step_ms" in entry) for entry in found.values()):
        raise ValueError(f"{path} is damaged: an entry has no step_ms")
    return found


def ratios(entry: Mapping[str, Any], baseline: Mapping[str, Any]) -> np.ndarray | None:
    """The time of a step to the baseline's in each turn; None if they did not take turns with each other."""
    if entry.get("at") != baseline.get("at") or entry.get("machine") != baseline.get("machine"):
        return None
    return np.divide(entry["step_ms_of_turns"], baseline["step_ms_of_turns"])
