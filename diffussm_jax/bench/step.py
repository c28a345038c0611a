"""`bench step`: a whole training step on random data, as `main` runs it, on all devices of the mesh.

MFU is 3 * 2 * multiply-adds of the forward's linear layers * images/s / peak in dense bfloat16, without the SSM
(`training.telemetry.mfu`). It is missing where the peak is unknown, as on a CPU.

The SSM's share is an estimate. The SSM alone is timed on a device's part of the batch, forward with all gradients, and
once more forward if `config.model.remat` recomputes it. That time, multiplied by depth and microbatches, is divided by
the time of the step. Fused into the step, the SSM may take less or more.
"""

import functools
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffussm_jax.bench.configs import check_fits
from diffussm_jax.bench.measure import median_seconds, memory_limit, planned_bytes
from diffussm_jax.bench.ssm import ssm_arguments, ssm_functions
from diffussm_jax.build import Parts
from diffussm_jax.training.telemetry import mfu
from diffussm_jax.validation import per_device_microbatch, validate

COLUMNS = {"images_per_second": ".4g", "step_ms": ".1f", "mfu": ".1%", "peak_memory_gb": ".2f", "ssm_share": ".1%"}


def bench_step(config: ConfigDict, *, repeats: int = 5) -> dict[str, float | str | None]:
    """Times a training step.

    Args:
      config: of a run; no data are read.
      repeats: timed steps, after two that are not timed.

    Returns:
      images_per_second, step_ms, mfu (None if the peak is unknown), ssm_share (None unless the mixer is a bidirectional
      S4D with zero-order hold), peak_memory_gb of a device, and memory_from. The latter is "device" if the device
      reports its peak and this step raised it; else it is "plan", and the memory is what XLA plans.

    Raises:
      DoesNotFitError: the step needs more memory than the device has.
      ValueError: the config does not fit the number of devices.
    """
    validate(config, jax.device_count())
    parts = Parts(config, has_decoder=False)
    task, mesh = parts.task, parts.mesh
    compiled = task.train_step.lower(task.abstract_state, task.batch_spec).compile()
    planned = planned_bytes(compiled)
    check_fits("the step", planned, memory_limit())
    before = _peak_in_use()
    state = task.create_state()
    batch = {name: _random(shape) for name, shape in task.batch_spec.items()}
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    step_seconds = sorted(times[2:])[repeats // 2]
    peak = _peak_in_use()
    del state, batch
    images_per_second = config.batch_size / step_seconds
    ssm = ssm_seconds(config, dict(mesh.shape), repeats=repeats)
    return {
        "images_per_second": images_per_second,
        "step_ms": 1e3 * step_seconds,
        "mfu": mfu(images_per_second, parts.model.costs(parts.input_shape).total, mesh.size),
        "ssm_share": None if ssm is None else ssm / step_seconds,
        "peak_memory_gb": (peak if peak > before else planned) / 1e9,
        "memory_from": "device" if peak > before else "plan",
    }


def _peak_in_use() -> int:
    """Peak bytes in use of the first device so far; 0 if it does not report them, as a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _random(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of a batch: random floats, or zeros for labels and pixels."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        x = jax.random.normal(jax.random.key(0), shape.shape, jnp.float32).astype(shape.dtype)
    else:
        x = jnp.zeros(shape.shape, shape.dtype)
    return jax.device_put(x, shape.sharding)


def ssm_seconds(config: ConfigDict, mesh: dict[str, int], *, repeats: int = 5) -> float | None:
    """Seconds of the SSMs of a training step alone, on one device; None for mixers that `bench ssm` does not time.

    Args:
      config: of the run.
      mesh: devices along each axis.
      repeats: timed repetitions.
    """
    model, mixer = config.model, config.model.get("mixer", {})
    if mixer.get("name") != "s4d" or not mixer.bidirectional or mixer.discretization != "zoh":
        return None
    H, W, _ = Parts(config).input_shape
    shape = (per_device_microbatch(config, mesh), H * W, model.width // mesh["tensor"], mixer.state_size)
    arguments = ssm_arguments(shape, model.dtype)
    num_scans = 2 if mixer.scan == "2d" else 1
    forward_pass, with_gradients = (jax.jit(f) for f in ssm_functions(mixer.method))
    programs = {"gradient": functools.partial(with_gradients, *arguments)}
    if model.remat != "none":
        programs["again"] = functools.partial(forward_pass, *arguments[:3])
    num_calls = model.depth * num_scans * config.optimizer.accumulation_steps
    return num_calls * sum(median_seconds(programs, repeats).values())
