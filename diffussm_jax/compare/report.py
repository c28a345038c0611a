"""The report of a comparison: CSV, Markdown and one HTML page, from saved results alone.

`docs/compare.md` says how to read it.
"""

import csv
import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffussm_jax.compare.charts import Line, chart
from diffussm_jax.compare.lengths import length_blocks
from diffussm_jax.compare.measure import ratios
from diffussm_jax.compare.page import Block, Figure, Figures, Heading, Table, Text, html_page, write_markdown
from diffussm_jax.compare.results import LOSS, SIGNIFICANCE, Results, statements
from diffussm_jax.compare.suite import Suite, differences
from diffussm_jax.config import from_plain
from diffussm_jax.io import write_whole

REPORT = "report"
_NAME = "comparison"
_MISSING = "-"


def write_report(
    out: epath.PathLike, suite: Suite, results: Results, lengths: Mapping[str, Any] | None = None
) -> dict[str, epath.Path]:
    """Writes OUT/comparison.csv, comparison.md with its figures, and comparison.html. Returns the paths by suffix.

    Args:
      out: a folder, made if it does not exist.
      suite: for title, notes and groups.
      results: to report.
      lengths: of `compare.lengths.read_lengths`.
    """
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    blocks = make_blocks(suite, results, lengths)
    paths = {suffix: out / f"{_NAME}.{suffix}" for suffix in ("csv", "md", "html")}
    write_whole(paths["csv"], csv_table(results))
    write_whole(paths["html"], html_page(suite.title, blocks))
    write_markdown(paths["md"], suite.title, blocks)
    return paths


def make_blocks(suite: Suite, results: Results, lengths: Mapping[str, Any] | None = None) -> list[Block]:
    """All of the report."""
    return [
        *([Text(suite.notes)] if suite.notes else []),
        *_failures(suite, results),
        *_protocol(results),
        Heading("Costs"),
        _costs(results),
        *itertools.chain.from_iterable(_values(results, reading, title) for reading, title in results.readings.items()),
        *_significance(results),
        *_curves(suite, results),
        *_grids(results),
        *(length_blocks(lengths) if lengths else []),
    ]


def mean_and_deviation(values: Sequence[float]) -> str:
    """ "0.0712 ± 0.0011", with two digits of the standard deviation."""
    if not values:
        return _MISSING
    if len(values) == 1:
        return f"{values[0]:.4g} (1 seed)"
    deviation = statistics.stdev(values)
    decimals = min(max(1 - math.floor(math.log10(deviation)), 0), 6) if deviation else 4
    return f"{statistics.fmean(values):.{decimals}f} ± {deviation:.{decimals}f}"


# Sections


def _failures(suite: Suite, results: Results) -> list[Block]:
    texts = list(results.warnings)
    for name in results.names:
        if error := results.measured.get(name, {}).get("error"):
            texts.append(f"{name} does not run: {error}")
            continue
        runs = results.runs_of(name)
        if failed := [run for run in runs if run.error]:
            seeds = ", ".join(str(run.seed) for run in failed)
            texts.append(
                f"{len(failed)} of {len(runs)} runs of {name} failed (seed {seeds}): {failed[0].error}. Its means are "
                "those of the other runs."
            )
        if missing := sorted({*suite.seeds} - {run.seed for run in runs}) if name in suite.configs else []:
            texts.append(f"{name} has not run with seed {', '.join(map(str, missing))} yet.")
    return [Text(text, is_warning=True) for text in texts]


def _protocol(results: Results) -> list[Block]:
    """What is equal, and what differs."""
    schedule = results.schedule
    machines = sorted({entry["machine"] for entry in results.measured.values() if "machine" in entry})
    seeds = sorted({run.seed for run in results.runs})
    text = (
        f"Each run trains for {schedule.budget}. All are compared at step {schedule.equal_steps:,} and at the end of "
        f"the budget. Seeds: {', '.join(map(str, seeds)) or 'none'}. Measured on "
        f"{'; '.join(machines) or 'no machine'}. Values are means ± standard deviations over seeds. Loss and scores "
        "are those of the averaged weights (EMA). The seconds of a run are its steps times the measured time of a "
        "step: compilation, evaluation and saving are left out."
    )
    configs = {
        name: from_plain(dict(runs[0].config))
        for name in results.names
        if (runs := results.runs_of(name)) and runs[0].config
    }
    baseline, rows = configs.get(results.baseline), []
    for name, config in configs.items():
        if name != results.baseline and baseline:
            differing = differences(config, baseline)
            rows.append([name, ", ".join(f"{key}={value}" for key, value in differing.items()) or "nothing"])
    blocks: list[Block] = [Heading("What is equal, and what differs"), Text(text)]
    if rows:
        blocks += [
            Text(
                f"The configs differ from the baseline, {results.baseline}, in these values, and in no others. Options "
                "of another component are listed where they differ from its defaults."
            )
        ]
        blocks += [Table(["config", "differs in"], rows)]
    return blocks


def _costs(results: Results) -> Table:
    header = ["config", "parameters", "M multiply-adds an image", "of these mixers", "ms a step"]
    header += ["times the baseline's (turns)", "images/s", "ms to sample an image", "memory, MB"]
    rows, baseline = [], results.measured.get(results.baseline, {})
    for name in results.names:
        entry = results.measured.get(name, {})
        if "step_ms" not in entry:
            rows.append([name, *[_MISSING] * (len(header) - 1)])
            continue
        mixers = entry["mixer_multiply_adds"]
        rows.append(
            [
                name,
                f"{entry['parameters']:,}",
                f"{entry['multiply_adds'] / 1e6:.4g}",
                "not counted" if mixers is None else f"{mixers / 1e6:.4g}" if mixers else _MISSING,
                f"{entry['step_ms']:.4g}",
                _ratio(entry, baseline),
                f"{entry['images_per_second']:.4g}",
                f"{entry['sampling_ms_per_image']:.4g}",
                f"{entry['memory_mb']:.4g}",
            ]
        )
    return Table(header, rows)


def _ratio(entry: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    found = ratios(entry, baseline) if "step_ms" in baseline else None
    if found is None:
        return _MISSING
    return f"{np.median(found):.2f} ({found.min():.2f} ... {found.max():.2f})"


def _values(results: Results, reading: str, title: str) -> list[Block]:
    """A table of the loss and the scores."""
    header = [
        "config",
        "runs",
        "steps",
        "seconds",
        *(f"{metric} ({_arrow(results, metric)})" for metric in _metrics(results)),
    ]
    rows = []
    for name in results.names:
        runs = results.runs_of(name)
        steps = sorted({results.step_of(run, reading) for run in runs})
        seconds = [results.seconds(name, step) for step in steps[:1]]
        rows.append(
            [
                name,
                f"{sum(not run.error for run in runs)} of {len(runs)}",
                ", ".join(f"{step:,}" for step in steps) or _MISSING,
                f"{seconds[0]:.4g}" if seconds and seconds[0] is not None else _MISSING,
                *(mean_and_deviation(results.values(name, metric, reading)) for metric in _metrics(results)),
            ]
        )
    return [Heading(f"Loss and scores {title}"), Table(header, rows)]


def _metrics(results: Results) -> list[str]:
    return [LOSS, *results.scores]


def _arrow(results: Results, metric: str) -> str:
    return f"{results.is_better[metric]} is better"


def _significance(results: Results) -> list[Block]:
    if len(results.names) < 2:
        return []
    columns = [(metric, reading) for reading in results.readings for metric in results.headline]
    found = {column: statements(results, *column) for column in columns}
    titles = [f"{metric} {results.readings[reading]}" for metric, reading in columns]
    rows = [[name, *(_verdict(found[column][i]) for column in columns)] for i, name in enumerate(results.names[1:])]
    num_others = len(results.names) - 1
    text = (
        f"Each config against the baseline, {results.baseline}: Welch's two-sided t-test over seeds, at the level "
        f"{SIGNIFICANCE:g}, with Holm's correction for the {num_others} comparisons of a column. Each cell has the "
        'difference of the means, config minus baseline, and the corrected p. "Not distinguishable" does not mean '
        "equal: with few seeds only large differences can be seen. Seeds change the initial weights, the order of the "
        "data and the noise of training; they do not change the data, the hyperparameters or the machine."
    )
    return [Heading("What is significant"), Text(text), Table(["config", *titles], rows)]


def _verdict(statement) -> str:
    if math.isnan(statement.difference):
        return statement.words
    figures = f"{statement.difference:+.3g}"
    if not math.isnan(statement.p_holm):
        figures += f", p = {statement.p_holm:.2g}"
    return f"{statement.words} ({figures})"


# Figures


def _curves(suite: Suite, results: Results) -> list[Block]:
    groups = suite.groups or {"": results.names}
    grouped = {name for names in groups.values() for name in names}
    if others := [name for name in results.names if name not in grouped and name != results.baseline]:
        groups = {**groups, "Others": others}
    blocks: list[Block] = []
    for title, names in groups.items():
        names = [results.baseline, *(name for name in results.names if name in names and name != results.baseline)]
        figures = []
        for metric, unit in itertools.product(results.headline, ("steps", "seconds")):
            lines = [Line(name, _points(results, name, metric, unit), i) for i, name in enumerate(names)]
            prefix = f"{title}: " if title else ""
            is_log_y = all(y > 0 for line in lines for _, y, _ in line.points)
            caption = f"{prefix}{metric} against {unit}"
            if picture := chart(caption, f"{unit} of training", metric, lines, is_log_y=is_log_y):
                figures.append(Figure(caption, picture))
        blocks += [Figures(figures)] if figures else []
    if not blocks:
        return []
    return [Heading("Curves"), Text("Means over seeds; bands are one standard deviation."), *blocks]


def _points(results: Results, name: str, metric: str, unit: str) -> list[tuple[float, float, float]]:
    points = results.curve(name, metric)
    if unit == "steps":
        return points
    return [(results.seconds(name, step), y, d) for step, y, d in points if results.seconds(name, step) is not None]


def _grids(results: Results) -> list[Block]:
    """Samples of the first run of each config that has some, for each reading."""
    blocks: list[Block] = []
    for reading, title in results.readings.items():
        figures = []
        for name in results.names:
            found = [(run, run.grids.get(results.step_of(run, reading))) for run in results.runs_of(name)]
            if found := [(run, path) for run, path in found if path is not None]:
                run, path = found[0]
                figures.append(Figure(f"{name}, seed {run.seed}, {title}", path.read_bytes()))
        blocks += [Figures(figures)] if figures else []
    if not blocks:
        return []
    return [Heading("Samples"), Text("Not selected: the first samples that were scored, with the same noise."), *blocks]


# CSV


def csv_table(results: Results) -> str:
    """A row for each run and reading."""
    measured = ("parameters", "multiply_adds", "step_ms", "images_per_second", "sampling_ms_per_image", "memory_mb")
    metrics, content = _metrics(results), io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(["name", "seed", "reading", "step", "seconds", *metrics, *measured, "error"])
    for name in results.names:
        entry = results.measured.get(name, {})
        for run in results.runs_of(name):
            for reading in results.readings:
                step = results.step_of(run, reading)
                values = [run.values.get(metric, {}).get(step) for metric in metrics]
                numbers = [results.seconds(name, step), *values, *(entry.get(key) for key in measured)]
                cells = ["" if x is None else f"{x:.6g}" if isinstance(x, float) else x for x in numbers]
                writer.writerow([name, run.seed, reading, step, *cells, run.error])
    return content.getvalue()
