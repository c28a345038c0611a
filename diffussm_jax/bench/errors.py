"""`bench errors`: errors of the methods of the SSM against the plain recurrence, on this machine.

Run it before the first use of a kernel on a new machine. Interpreting a kernel on a CPU shows neither races nor the
rounding of a matrix unit. The reference is `recurrent` in float32, which uses elementwise operations only.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.bench.measure import machine_name
from diffussm_jax.bench.ssm import Shape, check_methods, first_line, ssm_arguments
from diffussm_jax.ssm import METHODS, from_phases, ssm_apply_phases, to_complex, to_phases

# B x L x D x N: not a multiple of the size of chunks, and more sequences than the GPU kernel takes at once.
DEFAULT_SHAPES: tuple[Shape, ...] = ((72, 200, 32, 64), (16, 1000, 32, 64))
NUM_PHASES = (1, 2)  # the plain sequence, and the layout of an hourglass with M = 2
BARS = {"float32": 1e-5, "bfloat16": 5e-3}


def bench_errors(
    shape: Shape, methods: Sequence[str], *, dtype: str, num_phases: int = 1
) -> list[dict[str, str | int | float | bool | None]]:
    """Relative errors |x - reference| / |reference| of whole arrays, in the Euclidean norm.

    Args:
      shape: B, L, D, N.
      methods: names of `ssm.METHODS`.
      dtype: of u and y, a key of `BARS`; the reference computes on the same numbers in float32.
      num_phases: M of `ssm_apply_phases`, a divisor of L.

    Returns:
      A row for each method: dtype, B, L, D, N, M, method; the errors y, du, and parameters, the largest error of the
      gradients of all real parameters, None if the method did not run; passed, whether all errors are within the bar
      of the dtype; and left_out, why the method did not run.

    Raises:
      ValueError: a method is unknown, or L is not a multiple of the phases.
    """
    check_methods(methods, METHODS)
    if shape[1] % num_phases:
        raise ValueError(f"L = {shape[1]} is no multiple of {num_phases} phases")
    *directions, u, dy = ssm_arguments(shape, dtype)
    expected = _value_and_gradients("recurrent", 1)(directions, u.astype(jnp.float32), dy.astype(jnp.float32))
    rows = []
    for name in methods:
        row = {"dtype": dtype} | dict(zip("BLDN", shape, strict=True)) | {"M": num_phases, "method": name}
        try:
            actual = _value_and_gradients(name, num_phases)(directions, u, dy)
            row |= _errors(actual, expected) | {"left_out": ""}
        except Exception as error:  # compilers raise many types of errors
            row |= {"y": None, "du": None, "parameters": None, "left_out": first_line(error)}
        found = [row[name] for name in ("y", "du", "parameters")]
        rows.append(row | {"passed": None not in found and all(x <= BARS[dtype] for x in found)})
    return rows


def _value_and_gradients(method: str, num_phases: int) -> Callable:
    """(real parameters of both directions, u, dy) -> y, and the gradients of the parameters and u."""

    def apply(directions, u):
        params, phases = [to_complex(real) for real in directions], to_phases(u, num_phases)
        y = ssm_apply_phases(params, phases, reverse=(False, True), method=method)
        return from_phases(y).reshape(*u.shape[:2], -1)

    @jax.jit
    def run(directions, u, dy):
        y, pull_back = jax.vjp(apply, directions, u)
        return y, pull_back(dy)

    return run


def _errors(actual, expected) -> dict[str, float]:
    (y, (of_parameters, du)), (expected_y, (expected_parameters, expected_du)) = actual, expected
    gradients = jax.tree.leaves(jax.tree.map(_relative, of_parameters, expected_parameters))
    return {"y": _relative(y, expected_y), "du": _relative(du, expected_du), "parameters": max(gradients)}


def _relative(actual: jax.Array, expected: jax.Array) -> float:
    actual, expected = (np.asarray(x.astype(jnp.float32), np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def print_errors(shapes: Sequence[Shape], methods: Sequence[str], *, dtypes: Sequence[str]) -> list[dict]:
    """Prints a line for each shape, dtype and method; returns the rows."""
    print(f"{machine_name()}; relative errors against the recurrence in float32")
    rows = []
    for shape in shapes:
        for dtype in dtypes:
            for num_phases in (M for M in NUM_PHASES if shape[1] % M == 0):
                for row in bench_errors(shape, methods, dtype=dtype, num_phases=num_phases):
                    rows.append(row)
                    print(_line(row), flush=True)
    return rows


def _line(row: dict) -> str:
    shape = "x".join(str(row[name]) for name in "BLDN")
    line = f"{shape:>18} {row['dtype']:>9} {row['M']} phases {row['method']:>12} "
    if row["left_out"]:
        return f"{line}left out: {row['left_out']}"
    figures = ", ".join(f"{name} {row[name]:.1e}" for name in ("y", "du", "parameters"))
    return f"{line}{figures}; at most {BARS[row['dtype']]:.0e}: {'yes' if row['passed'] else 'NO'}"
