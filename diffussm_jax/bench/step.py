"""`bench step`: a whole training step of random latents, as `main` runs it, on all devices.

MFU is 3 * 2 * multiply-adds of the forward's linear layers * images/s / peak in dense bfloat16, the SSM excluded
(`training.telemetry.mfu`); none where the peak is not known, as on a CPU.

The SSM's share is estimated: the SSM alone is timed at what a device holds of the batch, forward with all gradients,
and once more forward where `config.model.remat` computes it again; times depth and accumulation steps, over the step.
Fused into the step, the SSM may cost less or more.
"""

import functools
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffussm_jax.bench.measure import median_seconds, memory_limit, planned_bytes
from diffussm_jax.bench.ssm import ssm_arguments, ssm_functions
from diffussm_jax.build import build_model, build_recipe, build_train_step, input_shape
from diffussm_jax.config import images_at_a_time
from diffussm_jax.parallel.mesh import make_mesh
from diffussm_jax.plan import DoesNotFitError
from diffussm_jax.training.telemetry import mfu

COLUMNS = {"images_per_second": ".4g", "step_ms": ".1f", "mfu": ".1%", "peak_memory_gb": ".2f", "ssm_share": ".1%"}


def bench_step(config: ConfigDict, *, repeats: int = 5) -> dict[str, float | str | None]:
    """Times a training step.

    Args:
      config: as for a run; no data are read.
      repeats: timed steps, after two that are not.

    Returns:
      images_per_second, step_ms, mfu (None where the peak is not known), ssm_share (None unless the SSM is
      bidirectional by zero-order hold), peak_memory_gb of a device, and memory_from, "device" or "plan": the device's
      own peak where it has one, and this step made it, else what XLA plans.

    Raises:
      DoesNotFitError: the step needs more memory than there is.
      ValueError: the config is wrong for the devices.
    """
    mesh = make_mesh(**config.mesh.to_dict())
    train_step, abstract_state, batch_shapes = build_train_step(config, mesh)
    compiled = train_step.lower(abstract_state, batch_shapes).compile()
    planned = planned_bytes(compiled)
    if planned > memory_limit():
        needed, available = planned / 1e9, memory_limit() / 1e9
        raise DoesNotFitError(f"the step needs {needed:.1f} GB of a device, there are {available:.1f}")
    before = _peak_in_use()
    state = build_recipe(config, mesh).create_state()
    batch = {name: _random(shape) for name, shape in batch_shapes.items()}
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        state = compiled(state, batch)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    step_seconds = sorted(times[2:])[repeats // 2]
    peak = _peak_in_use()
    del state, batch
    images_per_second = config.batch_size / step_seconds
    multiply_adds = build_model(config).multiply_adds(*input_shape(config))["total"]
    ssm = ssm_seconds(config, dict(mesh.shape), repeats=repeats)
    return {
        "images_per_second": images_per_second,
        "step_ms": 1e3 * step_seconds,
        "mfu": mfu(images_per_second, multiply_adds),
        "ssm_share": None if ssm is None else ssm / step_seconds,
        "peak_memory_gb": (peak if peak > before else planned) / 1e9,
        "memory_from": "device" if peak > before else "plan",
    }


def _peak_in_use() -> int:
    """The most bytes of the first device that were in use so far; 0 where it does not say, as a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _random(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """A batch's array: random numbers for floats, zeros for labels and pixels."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        x = jax.random.normal(jax.random.key(0), shape.shape, jnp.float32).astype(shape.dtype)
    else:
        x = jnp.zeros(shape.shape, shape.dtype)
    return jax.device_put(x, shape.sharding)


def ssm_seconds(config: ConfigDict, mesh: dict[str, int], *, repeats: int = 5) -> float | None:
    """What the SSMs of a training step take by themselves on one device; None where they are of another kind.

    Args:
      config: of the run.
      mesh: devices along each axis.
      repeats: timed repetitions.
    """
    model = config.model
    if not model.bidirectional or model.discretization != "zoh":
        return None
    H, W, _ = input_shape(config)
    parts, B = config.optimizer.accumulation_steps, images_at_a_time(config, mesh)
    arguments = ssm_arguments((B, H * W, model.width // mesh["tensor"], model.state_size), model.dtype)
    scans = 2 if model.scan == "2d" else 1
    forward_pass, with_gradients = (jax.jit(f) for f in ssm_functions(model.ssm_method))
    programs = {"gradient": functools.partial(with_gradients, *arguments)}
    if model.remat != "none":
        programs["again"] = functools.partial(forward_pass, *arguments[:3])
    return model.depth * scans * parts * sum(median_seconds(programs, repeats).values())
