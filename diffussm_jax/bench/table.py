"""`bench ssm --write_table`: the times from which `ssm_method="auto"` chooses."""

import csv
import os
from collections.abc import Sequence

import jax

from diffussm_jax.bench.ssm import LENGTHS, Shape
from diffussm_jax.bench.yardsticks import NAIVE, TORCH_METHODS
from diffussm_jax.ssm import METHODS
from diffussm_jax.ssm.auto import TABLE, Measurement

COLUMNS = Measurement._fields
_WIDTHS = (384, 1152)
_POSITIONS = {"cpu": 4096}  # of a batch, where one sequence is not longer; elsewhere _MANY
_MANY = 65_536


def table_shapes() -> list[Shape]:
    """The grid of L and D; B such that there are enough positions to keep the machine busy."""
    positions = _POSITIONS.get(jax.default_backend(), _MANY)
    return [(max(1, positions // L), L, D, 64) for D in _WIDTHS for L in LENGTHS]


def table_methods() -> list[str]:
    """The methods to choose from; the recurrence is never the fastest at these shapes."""
    return [name for name in METHODS if name not in ("auto", "recurrent")]


def write_table(rows: Sequence[dict], path: str | os.PathLike = TABLE) -> int:
    """Writes the rows of `bench_ssm` to a table, in place of its rows of the same platform and dtype; keeps the others.

    Args:
      rows: of one platform and dtype. Yardsticks, "auto" and what was left out are not written.
      path: of the table; made if there is none.

    Returns:
      The number of rows written.

    Raises:
      ValueError: the file is there and has other columns, or none of the rows can be written.
    """
    new = [row for row in rows if not row["left_out"] and row["method"] not in (NAIVE, *TORCH_METHODS, "auto")]
    if not new:
        raise ValueError("no method of the package was timed: nothing to write to the table")
    old = []
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            old = list(reader)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has columns {reader.fieldnames}, a table has {list(COLUMNS)}")
    replaced = {(row["platform"], row["dtype"]) for row in new}
    old = [row for row in old if (row["platform"], row["dtype"]) not in replaced]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(old + [row | {"gradient_ms": f"{row['gradient_ms']:.4g}"} for row in new])
    return len(new)
