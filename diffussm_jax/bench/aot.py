"""`bench ssm --aot=v5e`: compiles each method ahead of time for a chip, and counts the bytes and operations.

Bytes are XLA's count for the compiled program plus the count of Pallas calls (`counts`). Their time is at the chip's
published bandwidth. XLA's `flops` mix the matrix and the vector unit, so no time is given for them. Matrix and vector
operations of Pallas calls are counted separately, each with the time at the unit's rate. All figures are lower bounds,
not measurements: the program does not run, and XLA counts the body of a loop once. XLA counts nothing for GPUs; there
the figures are those of Pallas calls alone.

The vector rate is an estimate. A TensorCore computes on registers of 8 x 128 numbers, with 2 such operations per cycle
on v4 and 4 on v5 (jax-ml.github.io/scaling-book/tpus, appendix C). The clock follows from the peak of the 4 matrix
units of 128 x 128: 197e12 / (4 * 2 * 128**2) = 1.5 GHz on v5e. Real kernels also wait for loads, for results of the
matrix unit and for rolls between lanes, which have their own unit.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from diffussm_jax.bench.counts import TPU_REGISTER, pallas_counts
from diffussm_jax.bench.ssm import PASSES, Shape, check_methods, first_line, ssm_arguments, ssm_functions
from diffussm_jax.bench.yardsticks import TORCH_METHODS
from diffussm_jax.parallel.mesh import platform_of
from diffussm_jax.parallel.topology import CHIPS, Chip, Machine, compile_only_devices, lowering_for, parse_machine

DEFAULT_SHAPE = (16, 1024, 1152, 64)
DEFAULT_DTYPE = "bfloat16"
# Limits at the default shape on v5e: bytes and seconds of compilation of each pass, and the ratio of the time of vector
# operations to the time of `BARS["forward"]` bytes.
BARS = {"forward": 0.6e9, "gradient": 2e9}
MAX_COMPILE_SECONDS = 30
MAX_VECTOR_RATIO = 3
_VECTOR_OPS_PER_CYCLE = {"v4": 2, "v5e": 4, "v5p": 4}  # of whole registers, for each core
_MATRIX_FLOPS_PER_CYCLE = 4 * 2 * 128**2  # of each core of those chips


def one_chip(name: str) -> Machine:
    """The machine with one chip, by a name of `parse_machine` or of the chip alone; ValueError for any other."""
    chip = CHIPS.get(name.lower())
    if chip and chip.platform == "tpu":
        machine = Machine(name=name, chip=chip, shape=(1,) * chip.num_axes)
    else:
        machine = parse_machine(name)
    if machine.num_chips != 1:
        raise ValueError(f"--aot compiles for one chip, such as v5e, v6e or h100; got {name!r}")
    return machine


def vector_rate(chip: Chip) -> float | None:
    """Elementwise operations per second of the vector unit; None if its width is not public."""
    if chip.name not in _VECTOR_OPS_PER_CYCLE:
        return None
    cycles = chip.peak_flops / _MATRIX_FLOPS_PER_CYCLE  # per second, of all cores together
    return cycles * _VECTOR_OPS_PER_CYCLE[chip.name] * math.prod(TPU_REGISTER)


def floor_bytes(shape: Shape, dtype: str) -> dict[str, int]:
    """Bytes that each pass must move: u read and Y written; with gradients also u and dY read and du written."""
    B, L, D, _ = shape
    array = B * L * D * jnp.dtype(dtype).itemsize
    return {"forward": 3 * array, "gradient": 7 * array}


def bench_aot(
    machine: Machine, shape: Shape, methods: Sequence[str], *, dtype: str = DEFAULT_DTYPE
) -> list[dict[str, str | int | float | None]]:
    """Compiles methods for a chip, and counts bytes and operations.

    Args:
      machine: `one_chip`.
      shape: B, L, D, N.
      methods: as for `bench_ssm`, without PyTorch's.
      dtype: of u and y.

    Returns:
      Two rows for each method, forward and forward with all gradients: machine, dtype, B, L, D, N, method, pass,
      compile_s; xla_gb, pallas_gb, gb and bytes_ms; xla_gflop (matrix and vector together); of Pallas calls
      matrix_gflop (each pass of the matrix unit counted), matrix_ms, vector_gop and vector_ms; memory_mb; loops, the
      number of loops in XLA's program, whose bodies are counted once. Unknown figures are None. left_out says why a
      method did not compile.

    Raises:
      ValueError: a method is unknown, or the compiler for the machine is not installed.
    """
    check_methods(methods)
    device = compile_only_devices(machine)[0]
    arguments = jax.eval_shape(lambda: ssm_arguments(shape, dtype))
    rows, platform = [], platform_of(device)
    for name in methods:
        for which, function, of in zip(PASSES, ssm_functions(name, platform), (arguments[:3], arguments), strict=True):
            row = {"machine": machine.chip.name, "dtype": dtype} | dict(zip("BLDN", shape, strict=True))
            row |= {"method": name, "pass": which}
            try:
                rows.append(row | compiled_figures(function, of, device, machine.chip) | {"left_out": ""})
            except Exception as error:  # compilers raise many types of errors
                rows.append(row | dict.fromkeys(_FIGURES) | {"left_out": first_line(error)})
    return rows


_FIGURES = (
    *("compile_s", "xla_gb", "pallas_gb", "gb", "bytes_ms", "xla_gflop"),
    *("matrix_gflop", "matrix_ms", "vector_gop", "vector_ms", "memory_mb", "loops"),
)


def compiled_figures(
    function: Callable,
    arguments: Sequence,
    device: jax.Device,
    chip: Chip,
    options: Mapping[str, float | int] | None = None,
) -> dict[str, float | int | None]:
    """Compiles a function for the shapes of its arguments, and counts; keys as for `bench_aot`, options of XLA."""
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with lowering_for(device):
        traced = jax.jit(function).trace(*arguments)
        lowered = traced.lower()
    pallas = pallas_counts(traced.jaxpr, TPU_REGISTER if chip.platform == "tpu" else (1, 1))
    start = time.perf_counter()
    compiled = lowered.compile(options)
    compile_s = time.perf_counter() - start
    costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    all_bytes = costs["bytes accessed"] - pallas.stated_bytes + pallas.bytes if costs else None
    rate = vector_rate(chip)
    figures = (
        *(compile_s, (all_bytes - pallas.bytes) / 1e9 if costs else None, pallas.bytes / 1e9),
        *((all_bytes / 1e9, 1e3 * all_bytes / chip.memory_bandwidth) if costs else (None, None)),
        (costs["flops"] - pallas.stated_flops) / 1e9 if costs else None,
        *(pallas.matrix_ops / 1e9, 1e3 * pallas.matrix_ops / chip.peak_flops),
        *(pallas.vector_ops / 1e9, 1e3 * pallas.vector_ops / rate if rate else None),
        *(memory.peak_memory_in_bytes / 1e6, compiled.as_text().count(" while(")),
    )
    return dict(zip(_FIGURES, figures, strict=True))


def print_aot(name: str, shapes: Sequence[Shape], methods: Sequence[str], *, dtype: str) -> list[dict]:
    """Prints the figures of `bench_aot`, and at the shape and chip of `BARS` a verdict; returns the rows."""
    machine, rows = one_chip(name), []
    chip, rate = machine.chip, vector_rate(machine.chip)
    methods = [method for method in methods if method not in TORCH_METHODS]
    print(
        f"compiled for 1 {chip.device_kinds[0]}, not run: {chip.memory_bandwidth / 1e9:.0f} GB/s, "
        f"{chip.peak_flops / 1e12:.0f} TFLOP/s bfloat16, vector unit "
        + (f"about {rate / 1e12:.1f} Top/s (estimate)" if rate else "of unknown rate")
    )
    for shape in shapes:
        floor = floor_bytes(shape, dtype)
        print(
            f"\n{'x'.join(map(str, shape))} {dtype}, bidirectional; the least to move: forward "
            f"{floor['forward'] / 1e9:.2f} GB, forward + all gradients {floor['gradient'] / 1e9:.2f} GB\n"
            f"{'method':>12} {'pass':>9} {'compiled':>9} {'XLA, GB':>8} {'Pallas':>7} {'all, GB':>8} {'ms':>7} "
            f"{'memory':>9} {'XLA GFLOP':>10} {'matrix, G':>10} {'ms':>6} {'vector, G':>10} {'ms':>6}"
        )
        for method in methods:
            found = bench_aot(machine, shape, [method], dtype=dtype)
            for row in found:
                print(_line(row), flush=True)
            rows += found
            if shape == DEFAULT_SHAPE and dtype == DEFAULT_DTYPE and chip.name == "v5e":
                print(f"{'':>12} {verdict(found)}", flush=True)
    if any(row["loops"] for row in rows):
        print("* XLA counts the bodies of the program's loops once: bytes and FLOPs are more than that.")
    return rows


def _line(row: dict) -> str:
    line = f"{row['method']:>12} {row['pass']:>9} "
    if row["left_out"]:
        return f"{line}left out: {row['left_out']}"

    def cell(name, width, digits):
        return f"{'-':>{width}}" if row[name] is None else f"{row[name]:{width}.{digits}f}"

    line += f"{row['compile_s']:7.1f} s {cell('xla_gb', 8, 3)} {row['pallas_gb']:7.3f} {cell('gb', 8, 3)} "
    line += f"{cell('bytes_ms', 7, 2)} {row['memory_mb']:6.0f} MB {cell('xla_gflop', 10, 1)}"
    line += "*" if row["loops"] else " "
    if not row["pallas_gb"]:
        return line
    line += f"{row['matrix_gflop']:10.1f} {row['matrix_ms']:6.2f} {row['vector_gop']:10.2f} {cell('vector_ms', 6, 2)}"
    return line


def verdict(rows: Sequence[dict]) -> str:
    """One line that says which limits the two rows of a method keep."""
    parts = []
    for row in rows:
        if row["left_out"]:
            return "bars: not compiled"
        limit = BARS[row["pass"]] / 1e9
        parts.append(f"{row['pass']} {row['gb']:.2f} GB of {limit:g}: {_yes(row['gb'] <= limit)}")
        if row["pallas_gb"] and row["vector_ms"] is not None and row["pass"] == "forward":
            most = MAX_VECTOR_RATIO * 1e3 * BARS["forward"] / CHIPS["v5e"].memory_bandwidth
            is_reached = row["vector_ms"] <= most
            parts.append(f"its vector operations {row['vector_ms']:.2f} ms of {most:.2f}: {_yes(is_reached)}")
    slowest = max(row["compile_s"] for row in rows)
    parts.append(f"compiled in {slowest:.0f} s of {MAX_COMPILE_SECONDS}: {_yes(slowest <= MAX_COMPILE_SECONDS)}")
    return "bars: " + "; ".join(parts)


def _yes(is_reached: bool) -> str:
    return "yes" if is_reached else "no"
