"""Shared by all benchmarks: timing in turns, memory and costs from XLA, and the machine's peak rates."""

import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffussm_jax.bench.counts import pallas_counts


class Costs(NamedTuple):
    """XLA's figures for a compiled program, plus those of its Pallas calls (`counts`).

    Attributes:
      memory_bytes: peak memory: arguments, results and temporaries.
      bytes: that cross the memory bus; 0 if XLA does not count them.
      flops: likewise.
    """

    memory_bytes: int
    bytes: float
    flops: float


def seconds(program: Callable[[], object]) -> float:
    """The time of one call, until its results are ready."""
    start = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - start


def median_seconds(programs: dict[Hashable, Callable[[], object]], repeats: int) -> dict[Hashable, float]:
    """The median time of each program. The programs take turns; a first round is not timed."""
    times: dict[Hashable, list[float]] = {key: [] for key in programs}
    for repeat in range(repeats + 1):
        for key, program in programs.items():
            elapsed = seconds(program)
            if repeat:
                times[key].append(elapsed)
    return {key: statistics.median(of) for key, of in times.items()}


def planned_bytes(compiled: jax.stages.Compiled) -> int:
    """The memory of a device that XLA plans for a program."""
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return sizes - memory.alias_size_in_bytes


def compile_program(function: Callable, *arguments) -> tuple[jax.stages.Compiled, Costs]:
    """A function compiled for its arguments, and its costs."""
    traced = jax.jit(function).trace(*arguments)
    compiled = traced.lower().compile()
    costs, pallas = compiled.cost_analysis() or {}, pallas_counts(traced.jaxpr, (1, 1))
    return compiled, Costs(
        memory_bytes=planned_bytes(compiled),
        bytes=costs.get("bytes accessed", 0) + pallas.bytes - pallas.stated_bytes,
        flops=costs.get("flops", 0) + pallas.flops + pallas.vector_ops - pallas.stated_flops,
    )


def memory_limit() -> int:
    """Bytes of the first device that a program may use; for a CPU, half of the machine's memory."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def machine_name() -> str:
    """The devices and the version of JAX, in one line."""
    devices = jax.devices()
    cores = f" with {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
    return f"{len(devices)} x {devices[0].device_kind}{cores}, jax {jax.__version__}"


def copy_rate(num_bytes: int | None = None) -> float:
    """Bytes per second that the first device reads and writes when it negates a large array; the best of several runs.

    The array is negated in place, because on a CPU a first access to new pages takes longer than writing them.

    Args:
      num_bytes: of the array; by default 2**28 on a CPU, 2**31 elsewhere.
    """
    num_bytes = num_bytes or (2**28 if jax.default_backend() == "cpu" else 2**31)
    negate = jax.jit(jnp.negative, donate_argnums=0)
    x, times = jnp.ones(num_bytes // 4, jnp.float32), []
    for _ in range(6):
        start = time.perf_counter()
        x = jax.block_until_ready(negate(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(times)


def matmul_rate(dtype: str, size: int | None = None) -> float:
    """FLOP/s of a product of two large matrices on the first device, at JAX's default precision; the best of several.

    Args:
      dtype: of the matrices.
      size: rows and columns; by default 2048 on a CPU, 8192 elsewhere.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / min(seconds(lambda: multiply(x, x)) for _ in range(4))


def slope(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The slope of log y in log x by least squares; None for fewer than two values of x."""
    if len(set(xs)) < 2:
        return None
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / sum((x - mean_a) ** 2 for x in a)


def write_csv(path: str, rows: Sequence[dict]) -> None:
    """Writes rows, floats with 6 digits; a column that a row does not have is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})
