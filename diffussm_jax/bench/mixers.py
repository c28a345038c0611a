"""`bench ssm --mixers=all`: whole sequence mixers side by side in one run, forward, and forward with all gradients.

All have one signature, mixer(u [B, L, D], grid) -> [B, L, R D], with their own parameters at their initial values, and
what they have around their maths, such as projections, is timed too. The mixers take turns; the median counts. Memory
is what XLA plans.
"""

import functools
import math
from collections.abc import Sequence

import jax

from diffussm_jax import registry
from diffussm_jax.bench.configs import split_changes
from diffussm_jax.bench.measure import compile_program, machine_name, median_seconds
from diffussm_jax.bench.ssm import PASSES, first_line, too_much

Shape = tuple[int, int, int]
DEFAULT_SHAPE: Shape = (1, 1024, 384)


def parse_shape(text: str) -> Shape:
    """4x1024x384 to (4, 1024, 384); ValueError for anything else."""
    parts = text.strip().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"with --mixers a shape is B x L x D, such as 4x1024x384; got {text!r}")
    return tuple(int(part) for part in parts)


def _programs(text: str, u: jax.Array) -> tuple[list, dict[str, float | int]]:
    """Both programs of a mixer, and its figures without times; ValueError if it cannot run."""
    name, values = split_changes(text)
    mixer = registry.create("mixer", name, registry.group("mixer", name, **values), platform=jax.default_backend())
    L = u.shape[1]
    side = math.isqrt(L)
    grid = (side, side) if side * side == L else (1, L)

    def forward_pass(params, u):
        return mixer.apply({"params": params}, u, grid=grid)

    def with_gradients(params, u, dy):
        y, pull_back = jax.vjp(forward_pass, params, u)
        return y, pull_back(dy)

    params = jax.jit(functools.partial(mixer.init, grid=grid))(jax.random.key(0), u[:1]).get("params", {})
    y = jax.eval_shape(forward_pass, params, u)
    dy = jax.random.normal(jax.random.key(1), y.shape, y.dtype)
    programs, figures = [], {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
    for which, function, arguments in zip(PASSES, (forward_pass, with_gradients), ((), (dy,)), strict=True):
        compiled, costs = compile_program(function, params, u, *arguments)
        if problem := too_much(costs.memory_bytes):
            raise ValueError(problem)
        figures[f"{which}_mb"] = costs.memory_bytes / 1e6
        programs.append(functools.partial(compiled, params, u, *arguments))
    return programs, figures


def bench_mixers(
    shape: Shape, mixers: Sequence[str], *, dtype: str = "float32", repeats: int = 5
) -> list[dict[str, str | int | float | None]]:
    """Times mixers at one shape, in turns.

    Args:
      shape: B, L, D.
      mixers: names of the registry; options may follow, "s4d+method=fft+state_size=16".
      dtype: of u and y, "float32" or "bfloat16".
      repeats: timed repetitions.

    Returns:
      A row for each mixer: platform, device, dtype, B, L, D, mixer, parameters, forward_ms, gradient_ms (forward with
      the gradients of u and all parameters), forward_mb and gradient_mb (planned by XLA), None if it did not run; and
      left_out, why, or "".

    Raises:
      ValueError: a mixer or an option is unknown.
    """
    u = jax.random.normal(jax.random.key(2), shape).astype(dtype)
    head = {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind, "dtype": dtype}
    head |= dict(zip("BLD", shape, strict=True))
    figures = dict.fromkeys(("parameters", "forward_ms", "gradient_ms", "forward_mb", "gradient_mb"))
    programs, rows = {}, {}
    for text in mixers:
        name, values = split_changes(text)
        registry.component("mixer", name)
        registry.group("mixer", name, **values)  # names what is unknown
        rows[text] = head | {"mixer": text} | figures | {"left_out": ""}
        try:
            of_mixer, found = _programs(text, u)
        except (ValueError, RuntimeError) as error:
            rows[text]["left_out"] = first_line(error)
            continue
        rows[text] |= found
        programs |= {(text, f"{which}_ms"): program for which, program in zip(PASSES, of_mixer, strict=True)}
    for (text, column), time in median_seconds(programs, repeats).items():
        rows[text][column] = 1e3 * time
    return list(rows.values())


def print_mixers(shapes: Sequence[Shape], mixers: Sequence[str], *, dtype: str, repeats: int) -> list[dict]:
    """Prints a line for each shape and mixer; returns the rows of `bench_mixers`."""
    print(f"{machine_name()}, {dtype}; medians of {repeats}")
    print(f"{'B x L x D':>16} {'mixer':>20} {'parameters':>11} {'forward':>12} {'+ gradients':>13} {'memory':>10}")
    rows = []
    for shape in shapes:
        for row in bench_mixers(shape, mixers, dtype=dtype, repeats=repeats):
            line = f"{'x'.join(map(str, shape)):>16} {row['mixer']:>20} "
            if row["left_out"]:
                line += f"left out: {row['left_out']}"
            else:
                line += f"{row['parameters']:11,} {row['forward_ms']:9.1f} ms {row['gradient_ms']:10.1f} ms "
                line += f"{row['gradient_mb']:7.0f} MB"
            print(line, flush=True)
            rows.append(row)
    return rows
