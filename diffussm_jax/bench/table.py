"""`bench ssm --write_table`: the times from which method "auto" of the SSM chooses."""

import csv
import os
from collections.abc import Sequence

import jax

from diffussm_jax.bench.ssm import LENGTHS, Shape, print_head, print_shape, print_slopes
from diffussm_jax.bench.yardsticks import NAIVE, TORCH_METHODS
from diffussm_jax.ssm.auto import TABLE, Measurement, read_table

HOPELESS = 10  # multiple of the time of the fastest method
_WIDTHS = {"cpu": (96, 384, 1152)}
_OTHER_WIDTHS = (384, 1152)
_POSITIONS = {"cpu": 4096}  # of a batch; longer sequences have B = 1
_OTHER_POSITIONS = 65_536


def table_shapes() -> list[Shape]:
    """The grid of L and D, with B large enough to keep the machine busy."""
    platform = jax.default_backend()
    positions = _POSITIONS.get(platform, _OTHER_POSITIONS)
    return [(max(1, positions // L), L, D, 64) for D in _WIDTHS.get(platform, _OTHER_WIDTHS) for L in LENGTHS]


def print_table(
    path: str | os.PathLike, shapes: Sequence[Shape], methods: Sequence[str], *, dtype: str, repeats: int
) -> list[dict]:
    """Times methods as `print_ssm`, and writes the table after each shape, so that a stopped run loses one shape.

    A method that takes over `HOPELESS` times as long as the fastest is left out from then on.

    Args:
      path: of the table.
      shapes: to time.
      methods: to time.
      dtype: of u and y.
      repeats: timed repetitions.

    Returns:
      The rows of all shapes.

    Raises:
      ValueError: a method is unknown, the file is not a table, or no method of the package was timed.
    """
    if os.path.exists(path):
        read_table(path)  # before any measurement
    rates, rows, num_written = print_head(methods, dtype=dtype, repeats=repeats), [], 0
    for shape in shapes:
        of_shape = print_shape(shape, methods, dtype=dtype, repeats=repeats, rates=rates)
        num_written += write_table(of_shape, path)
        rows += of_shape
        slow = hopeless(of_shape)
        methods = [name for name in methods if name not in slow]
    if not num_written:
        raise ValueError("no method of the package was timed: nothing to write to the table")
    print_slopes(rows)
    print(f"wrote {num_written} rows to {path}")
    return rows


def hopeless(rows: Sequence[dict]) -> list[str]:
    """The methods that took over `HOPELESS` times as long as the fastest at a shape."""
    times = {row["method"]: row["gradient_ms"] for row in rows if not row["left_out"]}
    return [name for name, time in times.items() if time > HOPELESS * min(times.values())]


def write_table(rows: Sequence[dict], path: str | os.PathLike = TABLE) -> int:
    """Writes rows of `bench_ssm` to a table. They replace rows with the same platform, dtype, L, D and N.

    Args:
      rows: of any shapes. Yardsticks, "auto" and methods that did not run are not written.
      path: of the table, which is created if it does not exist.

    Returns:
      The number of rows written.

    Raises:
      ValueError: the file exists and is not a table.
    """
    kept = [row for row in rows if not row["left_out"] and row["method"] not in (NAIVE, *TORCH_METHODS, "auto")]
    new = [Measurement(*(row[name] for name in Measurement._fields)) for row in kept]
    replaced = {_problem(row) for row in new}
    old = [row for row in read_table(path) if _problem(row) not in replaced] if os.path.exists(path) else []
    unfinished = f"{path}.unfinished"
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Measurement._fields)
        writer.writerows(row._replace(gradient_ms=f"{row.gradient_ms:.4g}") for row in old + new)
    os.replace(unfinished, path)
    return len(new)


def _problem(row: Measurement) -> tuple:
    return row.platform, row.dtype, row.L, row.D, row.N
