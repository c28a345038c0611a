"""The section of a report about the number of positions, from what `diffussm_jax.bench lengths --json` measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from diffussm_jax.bench.crossings import crossings, never_crossing
from diffussm_jax.compare.charts import Line, Mark, chart
from diffussm_jax.compare.page import Block, Figure, Figures, Heading, Items, Table, Text
from diffussm_jax.io import read_json

# Columns, what they are, and their units.
_COLUMNS = {
    "ms": ("time of forward and gradients", "ms an image"),
    "forward_ms": ("time of a forward pass", "ms an image"),
    "memory_mb": ("memory of a block with gradients", "MB"),
}


def read_lengths(path: epath.PathLike) -> dict[str, Any]:
    """What `bench lengths --json` wrote: "rows" with "name", "length" and figures, and the "machine".

    Raises:
      FileNotFoundError: there is no file.
      ValueError: it is damaged, or another file.
    """
    values = read_json(epath.Path(path))
    try:
        for row in values["rows"]:
            figures = [row["length"], *(row[column] for column in _COLUMNS if column in row)]
            if not isinstance(row["name"], str) or not all(0 < figure < math.inf for figure in figures):
                raise ValueError(f"the row {row}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what `bench lengths --json` writes: {error!r}") from error
    return values


def length_blocks(values: Mapping[str, Any]) -> list[Block]:
    """A chart, the crossings in words and a table for each column.

    Args:
      values: of `read_lengths`.
    """
    blocks: list[Block] = [
        Heading("Time and memory against the number of positions"),
        Text(
            f"Measured on {values.get('machine', 'an unknown machine')}. Lines cross where the marks are; between two "
            "measured lengths a line is straight in the logarithms of both axes."
        ),
    ]
    for column, (what, unit) in _COLUMNS.items():
        rows = [row for row in values["rows"] if column in row]
        if column == "memory_mb":  # that of a whole network is not comparable with a block's
            rows = [row for row in rows if row.get("tokens", 1)]
        if rows:
            blocks += _column_blocks(rows, column, what, unit)
    return blocks


def _column_blocks(rows: Sequence[Mapping], column: str, what: str, unit: str) -> list[Block]:
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        points.setdefault(row["name"], {})[row["length"]] = row[column]
    found = crossings(rows, column)
    marks = [Mark(crossing.length, crossing.value, f"L = {crossing.length:,.0f}") for crossing in found]
    lines = [Line(name, [(L, y, 0.0) for L, y in sorted(of.items())], i) for i, (name, of) in enumerate(points.items())]
    texts = [f"{c.below} takes less below {c.length:,.0f} positions, {c.above} above." for c in found]
    texts += [
        f"{name} takes less than {other} at all lengths that were measured."
        for name, other in never_crossing(rows, column)
    ]
    lengths = sorted({row["length"] for row in rows})
    cells = [[f"{L:,}", *(f"{of[L]:.4g}" if L in of else "-" for of in points.values())] for L in lengths]
    caption = f"{what} against positions"
    picture = chart(caption, "positions L", unit, lines, is_log_x=True, is_log_y=True, marks=marks)
    table = Table(["positions", *(f"{name}, {unit}" for name in points)], cells)
    return [Figures([Figure(caption, picture)]), Text(f"{what[0].upper()}{what[1:]}:"), Items(texts), table]
