"""Sweeps of `diffussm_jax.evaluate`: combinations of sampling options, their table, their plot and the best."""

import ast
import csv
import dataclasses
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffussm_jax.evaluation.report import protocol_line

_ALIASES = {"steps": "num_steps"}


def parse_sweeps(texts: Sequence[str]) -> dict[str, list[Any]]:
    """["num_steps:10,20"] as {"num_steps": [10, 20]}; tuples keep their commas. ValueError if one is malformed."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, colon, rest = text.partition(":")
        values = [value.strip() for value in re.split(r",(?![^(]*\))", rest)]
        if not colon or not key.strip() or not all(values):
            raise ValueError(f"--sweep must be KEY:VALUE,VALUE,..., such as num_steps:10,20, got {text!r}")
        key = _ALIASES.get(key.strip(), key.strip())
        if key in found:
            raise ValueError(f"--sweep={key} is given twice")
        found[key] = [_value(value) for value in values]
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@dataclasses.dataclass(frozen=True)
class Swept:
    """One point of a sweep.

    Attributes:
      values: of the keys that are swept.
      report: of that point.
    """

    values: dict[str, Any]
    report: dict

    @property
    def name(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.values.items())


def combinations(sweeps: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of each key."""
    return [dict(zip(sweeps, values, strict=True)) for values in itertools.product(*sweeps.values())]


def best_of(points: Sequence[Swept], score: str) -> tuple[Swept, list[Swept]]:
    """The best point by a score, and the others whose interval overlaps its own."""
    sign = 1 if points[0].report["scores"][score]["is_better"] == "lower" else -1
    best, *others = sorted(points, key=lambda point: sign * point.report["scores"][score]["value"])
    found = best.report["scores"][score]

    def overlaps(point):
        other = point.report["scores"][score]
        return other["low"] <= found["high"] and other["high"] >= found["low"]

    return best, list(filter(overlaps, others))


def sweep_csv(points: Sequence[Swept]) -> str:
    """A row for each point: the swept values, the evaluations of the network, every score with its interval."""
    names = list(points[0].report["scores"])
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(
        [
            *points[0].values,
            "evaluations",
            *(f"{name}{end}" for name in names for end in ("", "_low", "_high")),
            "protocol",
        ]
    )
    for point in points:
        scores, protocol = point.report["scores"], point.report["protocol"]
        numbers = [_number(scores[name][end]) for name in names for end in ("value", "low", "high")]
        writer.writerow([*point.values.values(), protocol["evaluations"], *numbers, protocol_line(protocol)])
    return content.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def sweep_plot(points: Sequence[Swept], score: str) -> bytes:
    """A PNG of the score against evaluations of the network, a line for each combination of the other keys.

    Where all points have one number of evaluations, it is against the last key that is swept.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the plot of a sweep needs matplotlib: pip install 'diffussm_jax[bench]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    is_over_evaluations = len({point.report["protocol"]["evaluations"] for point in points}) > 1
    x_key = "num_steps" if is_over_evaluations else list(points[0].values)[-1]
    lines: dict[str, list[tuple]] = {}
    for point in points:
        others = ", ".join(f"{key} {value}" for key, value in point.values.items() if key != x_key)
        x = point.report["protocol"]["evaluations"] if is_over_evaluations else point.values[x_key]
        found = point.report["scores"][score]
        lines.setdefault(others, []).append((x, found["value"], found["low"], found["high"]))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, of_line in lines.items():
        if not any(isinstance(x, str | tuple) for x, *_ in of_line):
            of_line.sort()
        x, y, low, high = zip(*of_line, strict=True)
        x = list(map(str, x)) if any(isinstance(value, str | tuple) for value in x) else x
        errors = [np.subtract(y, low), np.subtract(high, y)]
        axes.errorbar(x, y, errors, label=name or None, marker="o", markersize=4, capsize=2)
    axes.set(xlabel="evaluations of the network" if is_over_evaluations else x_key)
    axes.set(ylabel=f"{score} ({points[0].report['scores'][score]['is_better']} is better)")
    if is_over_evaluations:
        ticks = sorted({point.report["protocol"]["evaluations"] for point in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.minorticks_off()
    if all(low > 0 for of_line in lines.values() for _, _, low, _ in of_line):
        axes.set_yscale("log")
    if len(lines) > 1:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    pyplot.close(figure)
    return content.getvalue()
