"""`bench ssm`: the methods of the SSM side by side in one run, forward, and forward with all gradients.

Times are of the jitted bidirectional SSM from the real parameters of `init_s4d`: y, and y with the gradients of u and
of every real parameter for a given gradient of y. All methods take turns, so that slow moments of the machine affect
all of them; the median counts. Memory is what XLA plans. Bytes and FLOPs are XLA's count (the body of a loop once) plus
the count of Pallas calls (`counts`). Their rates are compared with those of a large copy and a large matrix product in
the same run.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from diffussm_jax.bench.measure import (
    Costs,
    compile_program,
    copy_rate,
    machine_name,
    matmul_rate,
    median_seconds,
    memory_limit,
    slope,
)
from diffussm_jax.bench.yardsticks import NAIVE, TORCH_METHODS, fft_naive, torch_left_out, torch_programs
from diffussm_jax.ssm import METHODS, init_s4d, ssm_apply_bidirectional, to_complex

Shape = tuple[int, int, int, int]
PASSES = ("forward", "gradient")
LENGTHS = (256, 1024, 4096, 16_384, 65_536)
# Longest sequences of methods whose time per position grows with L, or which go through positions one by one.
MAX_LENGTHS = {"recurrent": 1024, "associative": 4096}
# Vandermonde arrays [D, N/2, L] of complex64 that torch_naive saves for its gradients, both directions together.
_TORCH_ARRAYS = 8


class Rates(NamedTuple):
    """Peak rates of the machine: bytes read and written per second by a copy, FLOP/s of a matrix product."""

    copy: float
    matmul: float


def default_shapes() -> list[Shape]:
    """One shape for each of `LENGTHS`, small on a CPU."""
    B, D = (1, 96) if jax.default_backend() == "cpu" else (8, 1152)
    return [(B, L, D, 64) for L in LENGTHS]


def default_methods() -> list[str]:
    """The yardsticks that run here, and all methods of the package."""
    return [NAIVE, *(() if torch_left_out() else TORCH_METHODS), *METHODS]


def own_methods() -> list[str]:
    """The methods that "auto" chooses from on this platform: all but the recurrence, which is never the fastest."""
    left_out = {"auto", "recurrent"} | ({"pallas"} if jax.default_backend() == "cpu" else set())
    return [name for name in METHODS if name not in left_out]


def parse_shape(text: str) -> Shape:
    """4x1024x384x64 to (4, 1024, 384, 64); ValueError for anything else."""
    parts = text.strip().split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape is B x L x D x N, such as 4x1024x384x64; got {text!r}")
    return tuple(int(part) for part in parts)


def check_methods(methods: Sequence[str], known: Sequence[str] = (NAIVE, *TORCH_METHODS, *METHODS)) -> None:
    """Raises ValueError if a method is unknown."""
    for name in methods:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; choose from {', '.join(known)}")


def ssm_functions(name: str, platform: str | None = None) -> tuple[Callable, Callable]:
    """(real forward, real backward, u) -> y, and (.., dy) -> y and all gradients, for a platform."""

    def forward_pass(forward, backward, u):
        if name == NAIVE:
            return fft_naive(to_complex(forward), to_complex(backward), u)
        return ssm_apply_bidirectional(to_complex(forward), to_complex(backward), u, method=name, platform=platform)

    def with_gradients(forward, backward, u, dy):
        y, pull_back = jax.vjp(forward_pass, forward, backward, u)
        return y, pull_back(dy)

    return forward_pass, with_gradients


def ssm_arguments(shape: Shape, dtype: str) -> tuple[dict, dict, jax.Array, jax.Array]:
    """Real parameters of both directions, u, and a gradient of y."""
    B, L, D, N = shape
    keys = jax.random.split(jax.random.key(0), 4)
    u, dy = (jax.random.normal(key, (B, L, n)).astype(dtype) for key, n in zip(keys[2:], (D, 2 * D), strict=True))
    return init_s4d(keys[0], D, N), init_s4d(keys[1], D, N), u, dy


def left_out(name: str, shape: Shape) -> str:
    """Why a method is not compiled for a shape; "" if it is."""
    _, L, D, N = shape
    if name in TORCH_METHODS and torch_left_out():
        return torch_left_out()
    if L > MAX_LENGTHS.get(name, L):
        return f"too slow beyond L = {MAX_LENGTHS[name]}"
    if name == "torch_naive":
        return too_much(_TORCH_ARRAYS * 8 * D * (N // 2) * L)
    return ""


def too_much(num_bytes: int) -> str:
    """Why a program that needs so much memory does not run; "" if it does."""
    if num_bytes <= memory_limit():
        return ""
    return f"needs {num_bytes / 1e9:.1f} GB, more than {memory_limit() / 1e9:.1f}"


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _prepare(name: str, shape: Shape, arguments: tuple) -> tuple[tuple[Callable, Callable], tuple[Costs | None, ...]]:
    """Both programs of a method, their arguments bound, and their costs; ValueError if the method cannot run."""
    reason = left_out(name, shape)
    if reason:
        raise ValueError(reason)
    if name in TORCH_METHODS:
        return torch_programs(name, *arguments), (None, None)
    programs, costs = [], []
    for function, of in zip(ssm_functions(name), (arguments[:3], arguments), strict=True):
        try:
            compiled, cost = compile_program(function, *of)
        except Exception as error:  # compilers raise many types of errors
            raise ValueError(first_line(error)) from error
        if too_much(cost.memory_bytes):
            raise ValueError(too_much(cost.memory_bytes))
        programs.append(functools.partial(compiled, *of))
        costs.append(cost)
    return tuple(programs), tuple(costs)


def bench_ssm(
    shape: Shape, methods: Sequence[str], *, dtype: str = "float32", repeats: int = 5, rates: Rates | None = None
) -> list[dict[str, str | int | float | None]]:
    """Times methods at one shape, in turns.

    Args:
      shape: B, L, D, N.
      methods: names of `ssm.METHODS`, "fft_naive", "torch_naive" or "torch_two_level".
      dtype: of u and y, "float32" or "bfloat16".
      repeats: timed repetitions.
      rates: of the machine, to compare with.

    Returns:
      A row for each method: platform, device, dtype, B, L, D, N, method; for the forward pass, and for forward with all
      gradients under gradient_..: forward_ms, .._mb (memory that XLA plans), .._gb_per_s, .._gflop_per_s, .._copy_share
      and .._matmul_share (of the machine's rates), .._speedup (over the first method that ran). Unknown figures are
      None. left_out says why a method did not run; else it is "".

    Raises:
      ValueError: a method is unknown.
    """
    check_methods(methods)
    arguments = ssm_arguments(shape, dtype)
    programs, costs, reasons = {}, {}, dict.fromkeys(methods, "")
    for name in methods:
        try:
            of_method, costs[name] = _prepare(name, shape, arguments)
        except ValueError as error:
            reasons[name] = str(error)
            continue
        programs |= {(name, which): program for which, program in zip(PASSES, of_method, strict=True)}
    times = median_seconds(programs, repeats)
    first = next((name for name in methods if not reasons[name]), None)
    device = jax.devices()[0]
    rows = []
    for name in methods:
        row = {"platform": jax.default_backend(), "device": device.device_kind, "dtype": dtype}
        row |= dict(zip("BLDN", shape, strict=True)) | {"method": name}
        for i, which in enumerate(PASSES):
            cost = costs[name][i] if name in costs else None
            row |= _figures(which, times.get((name, which)), times.get((first, which)), cost, rates)
        rows.append(row | {"left_out": reasons[name]})
    return rows


def _figures(which: str, time: float | None, first: float | None, cost: Costs | None, rates: Rates | None) -> dict:
    names = ("ms", "mb", "gb_per_s", "gflop_per_s", "copy_share", "matmul_share", "speedup")
    figures: dict[str, float | None] = dict.fromkeys(names)
    if time is not None:
        figures |= {"ms": 1e3 * time, "speedup": first / time}
        if cost:
            figures |= {
                "mb": cost.memory_bytes / 1e6,
                "gb_per_s": cost.bytes / time / 1e9,
                "gflop_per_s": cost.flops / time / 1e9,
            }
            if rates:
                figures |= {
                    "copy_share": cost.bytes / time / rates.copy,
                    "matmul_share": cost.flops / time / rates.matmul,
                }
    return {f"{which}_{name}": value for name, value in figures.items()}


def slopes(rows: Sequence[dict], column: str = "gradient_ms") -> dict[str, float]:
    """The slope of log time in log L of each method that was timed at several L with the same B, D and N.

    The key is the method, followed by B x D x N if there are several.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row[column] is not None:
            groups.setdefault((row["method"], row["B"], row["D"], row["N"]), []).append(row)
    found = {key: slope([row["L"] for row in of], [row[column] for row in of]) for key, of in groups.items()}
    found = {key: value for key, value in found.items() if value is not None}
    is_one = len({key[1:] for key in found}) == 1
    return {key[0] if is_one else f"{key[0]} {key[1]}x{key[2]}x{key[3]}": value for key, value in found.items()}


def print_head(methods: Sequence[str], *, dtype: str, repeats: int) -> Rates:
    """Prints the machine and the names of the columns, and returns its rates; ValueError if a method is unknown."""
    check_methods(methods)
    rates = Rates(copy_rate(), matmul_rate(dtype))
    print(f"{machine_name()}, {dtype}; medians of {repeats}, forward + all gradients")
    print(f"copy: {rates.copy / 1e9:.1f} GB/s, matrix product: {rates.matmul / 1e9:.0f} GFLOP/s")
    print(
        f"{'B x L x D x N':>18} {'method':>16} {'forward':>10} {'+ gradients':>12} {'times':>6} {'memory':>9} "
        f"{'GB/s':>7} {'share':>6} {'GFLOP/s':>8} {'share':>6}"
    )
    return rates


def print_shape(shape: Shape, methods: Sequence[str], *, dtype: str, repeats: int, rates: Rates) -> list[dict]:
    """Prints a line for each method; returns the rows of `bench_ssm`."""
    rows = bench_ssm(shape, methods, dtype=dtype, repeats=repeats, rates=rates)
    for row in rows:
        print(_line(row), flush=True)
    return rows


def print_ssm(shapes: Sequence[Shape], methods: Sequence[str], *, dtype: str, repeats: int) -> list[dict]:
    """Prints a table of all shapes and methods, and the slopes in L; returns the rows."""
    rates = print_head(methods, dtype=dtype, repeats=repeats)
    rows = [row for shape in shapes for row in print_shape(shape, methods, dtype=dtype, repeats=repeats, rates=rates)]
    print_slopes(rows)
    return rows


def print_slopes(rows: Sequence[dict]) -> None:
    """Prints `slopes` in one line, if there are any."""
    found = slopes(rows)
    if found:
        print("slope of log time (+ gradients) in log L: " + ", ".join(f"{k} {x:.2f}" for k, x in found.items()))


def _line(row: dict) -> str:
    line = f"{'x'.join(str(row[name]) for name in 'BLDN'):>18} {row['method']:>16} "
    if row["left_out"]:
        return f"{line}left out: {row['left_out']}"
    line += f"{row['forward_ms']:7.1f} ms {row['gradient_ms']:9.1f} ms {row['gradient_speedup']:6.2f} "
    if row["gradient_mb"] is None:
        return line.rstrip()
    return line + (
        f"{row['gradient_mb']:6.0f} MB {row['gradient_gb_per_s']:7.1f} {row['gradient_copy_share']:6.1%} "
        f"{row['gradient_gflop_per_s']:8.1f} {row['gradient_matmul_share']:6.1%}"
    )


def plot(rows: Sequence[dict], path: str) -> None:
    """Writes a PNG of time against L, both logarithmic, with a line and its slope for each method.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install -e '.[bench]'") from error
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    sizes = {(row["B"], row["D"], row["N"]) for row in rows}
    for B, D, N in sorted(sizes):
        of_size = [row for row in rows if (row["B"], row["D"], row["N"]) == (B, D, N) and not row["left_out"]]
        slope_of = slopes(of_size)
        for method in dict.fromkeys(row["method"] for row in of_size):
            points = [(row["L"], row["gradient_ms"]) for row in of_size if row["method"] == method]
            label = method if len(sizes) == 1 else f"{method} {B}x{D}x{N}"
            label += f", slope {slope_of[method]:.2f}" if method in slope_of else ""
            axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=label)
    size = "".join(f", B = {B}, D = {D}, N = {N}" for B, D, N in sizes) if len(sizes) == 1 else ""
    axes.set(xlabel="L", ylabel="ms, forward + all gradients", title=f"{rows[0]['device']}, {rows[0]['dtype']}{size}")
    lengths = sorted({row["L"] for row in rows})
    axes.set_xticks(lengths, [str(L) for L in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
