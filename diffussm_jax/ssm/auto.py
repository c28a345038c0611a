"""Which method is the fastest: read from `auto_table.csv`, what `diffussm_jax.bench ssm --write_table` measured.

The table has a row for each platform, dtype, shape and method: milliseconds of the bidirectional SSM, forward and all
gradients. `fastest_method` takes the measured shape nearest in L, then in D, then in N, and the method that won there.
"""

import csv
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("auto_table.csv")
# Where nothing was measured. The TPU's kernel moves a tenth of the bytes of `chunked`, by the compiler's count. The
# GPU's was compiled but never ran, by a backend that JAX has deprecated; `chunked` needs nothing but matrix products.
UNMEASURED = {"tpu": "pallas", "gpu": "chunked", "cpu": "fft"}


class Measurement(NamedTuple):
    """A row of the table: a method's time for forward and all gradients at a shape."""

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
    """The rows of a table; ValueError, which names the line, where one is not as `Measurement`."""
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
    """The method to take for a sequence of L positions, D channels and state size N.

    Args:
      platform: "cpu", "gpu" or "tpu".
      dtype: of the input, by name.
      L: positions.
      D: channels.
      N: state size.
      table: what was measured; by default the packaged table.

    Returns:
      A name of `ssm.METHODS`: the nearest shape's fastest, of the same dtype if any was measured; where the platform
      was not measured, as in `UNMEASURED`.
    """
    rows = [row for row in (_packaged() if table is None else table) if row.platform == platform]
    rows = [row for row in rows if row.dtype == dtype] or rows
    if not rows:
        return UNMEASURED.get(platform, "fft")

    def distance(row):
        return tuple(abs(math.log(asked / measured)) for asked, measured in ((L, row.L), (D, row.D), (N, row.N)))

    nearest = min(distance(row) for row in rows)
    return min((row for row in rows if distance(row) == nearest), key=lambda row: row.gradient_ms).method
