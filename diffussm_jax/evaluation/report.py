"""Reports of scores: JSON, a table in text, and one page of HTML; and the comparison of two sets of reports.

Each has the protocol line: everything that a score depends on beside the model.
"""

import base64
import html
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.special import ndtri, stdtrit

from diffussm_jax.evaluation.scores import EqualSize, Score

FORMAT = 1
# Keys of a protocol without which scores do not compare, and those that name the reference's images.
_SHARED = ("num_samples", "labels", "features", "extractor_sha256")
_OF_REFERENCE = ("images_sha256", "file_sha256", "num_images")
_IGNORED = ("versions", "device", "checkpoint_sha256", "samples_sha256", "batch_size", "reference")
_SHORT = 12  # hex digits of hashes in the line
_NOISE_OF_TRAINING = 3  # by which a new training seed moves FID more than new samples do


def make_report(
    scores: Mapping[str, Score],
    protocol: Mapping[str, Any],
    *,
    equal_sizes: Sequence[EqualSize] = (),
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
    neighbours: Mapping[str, Any] | None = None,
) -> dict:
    """A report as JSON can hold it."""
    return {
        "format": FORMAT,
        "scores": {name: _without_nan(score._asdict()) for name, score in scores.items()},
        "equal_sizes": [row._asdict() for row in equal_sizes],
        "neighbours": dict(neighbours or {}),
        "warnings": list(warnings),
        "notes": list(notes),
        "protocol": dict(protocol),
    }


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null stands for an interval that was not computed."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def check_report(report: Mapping, where: str) -> None:
    """Raises ValueError if `report` is none of this format."""
    if report.get("format") != FORMAT or not isinstance(report.get("scores"), dict) or "protocol" not in report:
        raise ValueError(f"{where} is no report of format {FORMAT} of diffussm_jax.evaluate")


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """The protocol in one line of text: "num_samples=1000; labels=balanced; ..."."""
    return "; ".join(f"{key}={_text_of(key, value)}" for key, value in protocol.items() if value not in ("", None, {}))


def _text_of(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k}={_text_of(k, v)}" for k, v in value.items()) + ")"
    if key.endswith("sha256"):
        return str(value)[:_SHORT]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    is_long = isinstance(value, int) and not isinstance(value, bool) and abs(value) > 9999
    return f"{value:,}" if is_long else str(value)


def _decimals(deviation: float | None) -> int:
    """Decimals to print: two digits of the deviation."""
    if not deviation:
        return 4
    return min(max(1 - math.floor(math.log10(deviation)), 0), 6)


def _row(name: str, score: Mapping) -> tuple[str, ...]:
    decimals = _decimals(score["deviation"])
    interval = "" if score["low"] is None else f"{score['low']:.{decimals}f} ... {score['high']:.{decimals}f}"
    return name, f"{score['value']:.{decimals}f}", interval, f"{score['is_better']} is better"


def _equal_row(row: Mapping) -> tuple[str, ...]:
    decimals = _decimals(row["deviation"])
    return row["name"], f"{row['num_images']:,}", f"{row['mean']:.{decimals}f}", f"+- {row['deviation']:.{decimals}f}"


def _tables(report: Mapping) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(title, rows with a header) of each table."""
    tables = [
        ("Scores", [("score", "value", "95 % interval", ""), *(_row(*item) for item in report["scores"].items())]),
    ]
    if report["equal_sizes"]:
        header = ("Fréchet distance to half of the real images", "images", "mean", "over random halves")
        tables.append(("At equal numbers of images", [header, *map(_equal_row, report["equal_sizes"])]))
    if tests := report["neighbours"].get("copy_tests"):
        header = ("nearer to training than to held-out images", "fraction", "95 % interval without copies", "p")
        rows = [
            (
                f"in {space}",
                f"{t['fraction_nearer_to_training']:.3f}",
                f"{t['low']:.3f} ... {t['high']:.3f}",
                f"{t['p_value']:.3g}",
            )
            for space, t in tests.items()
        ]
        tables.append(("Copies", [header, *rows]))
    return tables


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def text_report(report: Mapping) -> str:
    """The report as text for a terminal."""
    lines = []
    for title, rows in _tables(report):
        lines += ["", title, *(f"  {line}" for line in _aligned(rows))]
    lines += ["", "Protocol", "  " + protocol_line(report["protocol"])]
    lines += [f"\n{note}" for note in report["notes"]]
    lines += [f"\nWARNING: {warning}" for warning in report["warnings"]]
    return "\n".join(lines).strip()


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:left}
.warning{background:#fff3cd;padding:.6em 1em}.protocol{font:13px/1.5 monospace;overflow-wrap:anywhere}
img{max-width:100%;image-rendering:pixelated}"""


def html_report(report: Mapping, pictures: Mapping[str, bytes], title: str) -> str:
    """One page that needs no other file.

    Args:
      report: of `make_report`.
      pictures: PNG files by their captions.
      title: of the page.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f'<p class="warning">{html.escape(warning)}</p>' for warning in report["warnings"]]
    for name, (header, *rows) in _tables(report):
        cells = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
        cells += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        parts.append(f"<h2>{name}</h2><table>{''.join(cells)}</table>")
    parts += [f"<p>{html.escape(note)}</p>" for note in report["notes"]]
    for caption, content in pictures.items():
        data = base64.b64encode(content).decode()
        parts.append(f'<h2>{html.escape(caption)}</h2><img src="data:image/png;base64,{data}" alt="">')
    parts.append(f'<h2>Protocol</h2><p class="protocol">{html.escape(protocol_line(report["protocol"]))}</p>')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


class Difference(NamedTuple):
    """A score of B minus that of A.

    Attributes:
      score: its name.
      a, b: means over the reports of each side.
      difference: b - a.
      low, high: its 95 % interval.
      is_larger_than_noise: whether the interval leaves out 0.
      noise: what the interval covers: "seeds" where both sides have several reports, else "resampling".
    """

    score: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    is_larger_than_noise: bool
    noise: str


def compare(a: Sequence[Mapping], b: Sequence[Mapping]) -> list[Difference]:
    """Which scores differ by more than the noise.

    With two or more reports on each side (seeds of sampling or of training) the noise is that between them (Welch's
    interval); otherwise it is that of drawing other samples, which leaves out the training seed.

    Raises:
      ValueError: the reports have other numbers of samples, labels, networks or references, or share no score.
    """
    first, *others = [_identity(report["protocol"]) for report in (*a, *b)]
    for other in others:
        if keys := [key for key in first if first[key] != other[key]]:
            differing = "; ".join(f"{key}: {first[key]!r} and {other[key]!r}" for key in keys)
            raise ValueError(f"the scores of these reports do not compare: {differing}")
    reports = (*a, *b)
    names = [name for name in a[0]["scores"] if all(_has_interval(report, name) for report in reports)]
    if not names:
        raise ValueError(f"the reports share no score with an interval: {[sorted(r['scores']) for r in reports]}")
    return [_difference(name, [r["scores"][name] for r in a], [r["scores"][name] for r in b]) for name in names]


def _identity(protocol: Mapping[str, Any]) -> dict[str, Any]:
    reference = protocol.get("reference", {})
    of_reference = next((reference[key] for key in _OF_REFERENCE if key in reference), None)
    return {key: protocol.get(key) for key in _SHARED} | {"reference": of_reference}


def _has_interval(report: Mapping, name: str) -> bool:
    return report["scores"].get(name, {}).get("deviation") is not None


def other_differences(a: Mapping, b: Mapping) -> list[str]:
    """What else differs between the protocols of two reports, as lines of text: usually what is compared."""
    a, b = a["protocol"], b["protocol"]
    keys = [key for key in a | b if key not in (*_SHARED, *_IGNORED) and a.get(key) != b.get(key)]
    return [f"{key}: {_text_of(key, a.get(key))} (A), {_text_of(key, b.get(key))} (B)" for key in keys]


def _difference(name: str, a: Sequence[Mapping], b: Sequence[Mapping]) -> Difference:
    means = [statistics.fmean(score["value"] for score in side) for side in (a, b)]
    if min(len(a), len(b)) > 1:
        errors = [statistics.variance([score["value"] for score in side]) / len(side) for side in (a, b)]
        freedom = (
            sum(errors) ** 2 / sum(e**2 / (len(s) - 1) for e, s in zip(errors, (a, b), strict=True))
            if any(errors)
            else 1
        )
        width, noise = stdtrit(freedom, 0.975) * math.sqrt(sum(errors)), "seeds"
    else:
        errors = [statistics.fmean(score["deviation"] ** 2 for score in side) / len(side) for side in (a, b)]
        width, noise = ndtri(0.975) * math.sqrt(sum(errors)), "resampling"
    d = means[1] - means[0]
    return Difference(name, *means, d, d - width, d + width, bool(abs(d) > width), noise)


def text_comparison(differences: Sequence[Difference]) -> str:
    """A table of differences, and what their intervals leave out."""
    rows = [("score", "A", "B", "B - A", "95 % interval", "")]
    for d in differences:
        decimals = _decimals((d.high - d.low) / 4)
        a, b, difference, low, high = (f"{value:.{decimals}f}" for value in (d.a, d.b, d.difference, d.low, d.high))
        rows.append(
            (
                d.score,
                a,
                b,
                difference,
                f"{low} ... {high}",
                "differs" if d.is_larger_than_noise else "within the noise",
            )
        )
    lines = _aligned(rows)
    if any(d.noise == "resampling" for d in differences):
        lines.append(
            "The noise is that of the samples alone. A new training seed moves FID by about "
            f"{_NOISE_OF_TRAINING} times as much: give several reports on each side to include it."
        )
    else:
        lines.append("The noise is that between the reports of each side.")
    return "\n".join(lines)
