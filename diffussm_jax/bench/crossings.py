"""Where the figures of models cross as a length grows."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Crossing(NamedTuple):
    """Where two lines cross: below `length` the figure of `below` is the smaller one, above it that of `above`."""

    length: float
    value: float
    below: str
    above: str


def _pairs(rows: Sequence[Mapping], column: str) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """(length, figure of a, figure of b) by increasing length, for each pair (a, b) of names."""
    figures: dict[str, dict[float, float]] = {}
    for row in rows:
        figures.setdefault(row["name"], {})[row["length"]] = row[column]
    return {
        (a, b): [(L, figures[a][L], figures[b][L]) for L in sorted(figures[a].keys() & figures[b].keys())]
        for a, b in itertools.combinations(figures, 2)
    }


def crossings(rows: Sequence[Mapping], column: str = "ms") -> list[Crossing]:
    """The lengths at which one of two models becomes cheaper than the other.

    Between two measured lengths the logarithm of each figure is taken as linear in the logarithm of the length.

    Args:
      rows: with "name", "length" and `column`, a positive number.
      column: what is compared.

    Returns:
      The crossings of each pair of names, in the order of the rows, by increasing length.
    """
    found = []
    for names, points in _pairs(rows, column).items():
        for (L, *figures), (next_L, *next_figures) in itertools.pairwise(points):
            gap, next_gap = math.log(figures[0] / figures[1]), math.log(next_figures[0] / next_figures[1])
            if (gap > 0) != (next_gap > 0):
                share = gap / (gap - next_gap)
                length, value = (
                    math.exp((1 - share) * math.log(x) + share * math.log(y))
                    for x, y in ((L, next_L), (figures[0], next_figures[0]))
                )
                above, below = names if gap > 0 else reversed(names)
                found.append(Crossing(length, value, below, above))
    return found


def never_crossing(rows: Sequence[Mapping], column: str = "ms") -> list[tuple[str, str]]:
    """(cheaper, dearer) of the pairs of names that do not cross at the lengths that both have."""
    crossed = {frozenset(crossing[2:]) for crossing in crossings(rows, column)}
    return [
        names if points[0][1] <= points[0][2] else names[::-1]
        for names, points in _pairs(rows, column).items()
        if points and frozenset(names) not in crossed
    ]
