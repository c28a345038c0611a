"""Chooses the fastest method from the timings in `auto_table.csv`, written by `diffussm_jax.bench ssm --write_table`.

The table has one row per platform, dtype, shape and method: milliseconds for the bidirectional SSM, forward and all
gradients. `fastest_method` finds the measured shape nearest in L, then in D, then in N, and returns its fastest method.
"""

import csv
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("auto_table.csv")
# For platforms without measurements. By the compiler's count, the TPU kernel moves a tenth of the bytes of `chunked`.
# The GPU kernel was compiled but never run, and JAX has deprecated its backend; `chunked` needs only matrix products.
UNMEASURED = {"tpu": "pallas", "gpu": "chunked", "cpu": "fft"}


class Measurement(NamedTuple):
    """A row of the table: the time of a method for forward and all gradients at one shape."""

    platform: str
    device: str
    dtype: str
    B: int
    L: int
    D: int
    N: int
    method: str
    gradient_ms: float


def read_table(path: str | os.PathLike = TABLE) -> list[Measurement]:
    """Reads a table. Raises a ValueError with the line number for a row that is not a `Measurement`."""
    with open(path, newline="") as file:
        reader = csv.reader(file)
        if (header := tuple(next(reader, ()))) != Measurement._fields:
            raise ValueError(f"{path} must have the columns {','.join(Measurement._fields)}, got {','.join(header)}")
        types, rows = Measurement.__annotations__.values(), []
        for row in reader:
            try:
                rows.append(Measurement(*(of(x) for of, x in zip(types, row, strict=True))))
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}, is no measurement: {','.join(row)}") from error
        return rows


@functools.cache
def _packaged() -> tuple[Measurement, ...]:
    return tuple(read_table())


def fastest_method(
    platform: str, dtype: str, L: int, D: int, N: int, table: Sequence[Measurement] | None = None
) -> str:
    """Returns the fastest method of `ssm.METHODS` for L positions, D channels and state size N.

    Rows of the same dtype are preferred. A platform without measurements gets its entry of `UNMEASURED`.

    Args:
      platform: "cpu", "gpu" or "tpu".
      dtype: name of the input's dtype.
      table: the packaged table if None.
    """
    rows = [row for row in (_packaged() if table is None else table) if row.platform == platform]
    rows = [row for row in rows if row.dtype == dtype] or rows
    if not rows:
        return UNMEASURED.get(platform, "fft")

    def distance(row):
        return tuple(abs(math.log(asked / measured)) for asked, measured in ((L, row.L), (D, row.D), (N, row.N)))

    nearest = min(distance(row) for row in rows)
    return min((row for row in rows if distance(row) == nearest), key=lambda row: row.gradient_ms).method
