"""Line charts as inline SVG, for pages that need no other file and no plotting library."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 320, 62, 12, 30, 44
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#7f7f7f")
_DASHES = ("", "7 3", "2 2")
_MAX_BANDS = 5  # lines whose deviation can be told apart
_NUM_TICKS = 5
_LEGEND_COLUMNS, _LEGEND_ROW = 2, 15


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
      name: in the legend.
      points: (x, y, standard deviation of y); those that are not finite are left out.
      style: number of its colour and dash; the same number is the same style in every chart.
    """

    name: str
    points: Sequence[tuple[float, float, float]]
    style: int


class Mark(NamedTuple):
    """A point that is pointed out, with its text."""

    x: float
    y: float
    text: str


class _Axis:
    """Maps values to pixels, linear or logarithmic."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, is_log: bool):
        self.is_log = is_log
        low, high = min(map(self._scaled, values)), max(map(self._scaled, values))
        margin = 0.04 * (high - low) or 0.5 * abs(low) or 0.5
        self._low, self._high, self._start, self._end = low - margin, high + margin, start, end

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def __call__(self, value: float) -> float:
        fraction = (self._scaled(value) - self._low) / (self._high - self._low)
        return self._start + fraction * (self._end - self._start)

    def ticks(self) -> list[float]:
        if not self.is_log:
            return linear_ticks(self._low, self._high)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            exponents = range(math.floor(self._low), math.ceil(self._high) + 1)
            found = [f * 10.0**e for e in exponents for f in factors if self._low <= math.log10(f) + e <= self._high]
            if len(found) >= 3:
                return found
        return linear_ticks(10**self._low, 10**self._high)


def linear_ticks(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    rough = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    *,
    is_log_x: bool = False,
    is_log_y: bool = False,
    marks: Sequence[Mark] = (),
) -> str:
    """A chart as an <svg> element; "" if there is nothing to draw.

    Args:
      title: above it.
      x_label, y_label: of the axes.
      lines: to draw. Up to five have a band of one standard deviation.
      is_log_x, is_log_y: whether an axis is logarithmic; values that are not positive are left out then.
      marks: points to point out.
    """

    def is_drawn(x, y):
        return math.isfinite(x) and math.isfinite(y) and (x > 0 or not is_log_x) and (y > 0 or not is_log_y)

    kept = [line._replace(points=[p for p in line.points if is_drawn(*p[:2])]) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return ""
    points = [point for line in kept for point in line.points]
    x_axis = _Axis([x for x, *_ in points], _LEFT, _WIDTH - _RIGHT, is_log=is_log_x)
    y_axis = _Axis([y for _, y, _ in points], _HEIGHT - _BOTTOM, _TOP, is_log=is_log_y)
    parts = [_text(_WIDTH / 2, 16, title, "middle", "font-weight='bold'")]
    parts += _frame(x_axis, y_axis, x_label, y_label)
    if len(kept) <= _MAX_BANDS:
        parts += [_band(line, x_axis, y_axis, is_log_y) for line in kept if any(d for _, _, d in line.points)]
    parts += [_line(line, x_axis, y_axis) for line in kept]
    for mark in marks:
        x, y = x_axis(mark.x), y_axis(mark.y)
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='none' stroke='#000'/>")
        is_right = x > 0.7 * _WIDTH
        parts.append(_text(x - 8 if is_right else x + 8, y + 14, mark.text, "end" if is_right else "start"))
    of_legend, height = _legend(kept)
    height += _HEIGHT
    box = f"viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' height='{height}'"
    style = f"{box} font-family='sans-serif' font-size='11'"
    parts = [f"<rect width='{_WIDTH}' height='{height}' fill='#fff'/>", *parts, *of_legend]
    return f"<svg xmlns='http://www.w3.org/2000/svg' {style}>{''.join(parts)}</svg>"


def _legend(lines: Sequence[Line]) -> tuple[list[str], int]:
    """The lines' names beside their styles below the chart, and the height that they take."""
    rows = -(-len(lines) // _LEGEND_COLUMNS)
    parts = []
    for i, line in enumerate(lines):
        x, y = _LEFT - 40 + i // rows * (_WIDTH - 24) / _LEGEND_COLUMNS, _HEIGHT + 8 + i % rows * _LEGEND_ROW
        parts.append(f"<line x1='{x:.1f}' x2='{x + 24:.1f}' y1='{y:.1f}' y2='{y:.1f}' {_stroke(line.style)}/>")
        parts.append(_text(x + 30, y + 4, line.name, "start"))
    return parts, rows * _LEGEND_ROW + 4


def _stroke(style: int) -> str:
    dash = _DASHES[style // len(_COLOURS) % len(_DASHES)]
    dashes = f" stroke-dasharray='{dash}'" if dash else ""
    return f"stroke='{_colour(style)}' stroke-width='1.8'{dashes}"


def _colour(style: int) -> str:
    return _COLOURS[style % len(_COLOURS)]


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {more}>{html.escape(text)}</text>"


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> list[str]:
    """Grid lines with their values, and the labels of the axes."""
    left, right, bottom, top = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, _TOP
    parts = [f"<rect x='{left}' y='{top}' width='{right - left}' height='{bottom - top}' fill='none' stroke='#888'/>"]
    for value in x_axis.ticks():
        x = x_axis(value)
        parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{top}' y2='{bottom}' stroke='#ddd'/>")
        parts.append(_text(x, bottom + 14, _number(value), "middle"))
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f"<line x1='{left}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' stroke='#ddd'/>")
        parts.append(_text(left - 5, y + 4, _number(value), "end"))
    parts.append(_text((left + right) / 2, _HEIGHT - 10, x_label, "middle"))
    middle = (top + bottom) / 2
    return [*parts, _text(13, middle, y_label, "middle", f"transform='rotate(-90 13 {middle:.1f})'")]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 and value == round(value) else f"{value:.4g}"


def _line(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    pixels = [(x_axis(x), y_axis(y)) for x, y, _ in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    dots = "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.2' fill='{_colour(line.style)}'/>" for x, y in pixels)
    named = f"<title>{html.escape(line.name)}</title>"
    return f"<g>{named}<polyline points='{path}' fill='none' {_stroke(line.style)}/>{dots}</g>"


def _band(line: Line, x_axis: _Axis, y_axis: _Axis, is_log_y: bool) -> str:
    """Mean plus and minus the standard deviation, inside the frame."""

    def pixel(x, y):
        y = y_axis(y) if y > 0 or not is_log_y else _HEIGHT - _BOTTOM
        return f"{x_axis(x):.1f},{min(max(y, _TOP), _HEIGHT - _BOTTOM):.1f}"

    outline = [pixel(x, y + d) for x, y, d in line.points] + [pixel(x, y - d) for x, y, d in reversed(line.points)]
    return f"<polygon points='{' '.join(outline)}' fill='{_colour(line.style)}' fill-opacity='0.15'/>"
