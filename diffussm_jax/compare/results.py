"""Reads what comparisons saved, and says what of it is significant.

Means and standard deviations are over seeds. Each config is compared with the baseline by Welch's two-sided t-test
over seeds, with the correction of Holm (1979) over all configs of a column. Nothing here trains or samples.
"""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from scipy import stats

from diffussm_jax.compare.measure import MEASURED, read_measured
from diffussm_jax.compare.runs import DONE, RESULT, RUNS, SCORES_FILE, grid_path
from diffussm_jax.compare.suite import SCHEDULE, Schedule, read_schedule, run_identity
from diffussm_jax.io import read_json
from diffussm_jax.training.loop import CONFIG_NAME
from diffussm_jax.training.metrics import CSV_NAME

LOSS = "held-out loss"
SIGNIFICANCE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """What is saved of a run.

    Attributes:
      name, seed: of the config and the run.
      num_steps: that were asked for.
      error: why it failed; "" if it did not.
      values: {metric: {step: value}}, the held-out loss and the scores.
      grids: PNG files of samples by step.
      config: plain values.
    """

    name: str
    seed: int
    num_steps: int
    error: str
    values: Mapping[str, Mapping[int, float]]
    grids: Mapping[int, epath.Path]
    config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """All runs and measurements of a report.

    Attributes:
      names: of the configs, the baseline first.
      schedule: of the comparison; those of merged folders may have other steps.
      measured: figures by name, as `compare.measure.measure` saves them.
      runs: in any order.
      is_better: "lower" or "higher" for each metric, the first score first.
      warnings: what makes the comparison less than equal.
    """

    names: Sequence[str]
    schedule: Schedule
    measured: Mapping[str, Mapping[str, Any]]
    runs: Sequence[RunResult]
    is_better: Mapping[str, str]
    warnings: Sequence[str] = ()

    @property
    def baseline(self) -> str:
        return self.names[0]

    @property
    def scores(self) -> list[str]:
        """The metrics without the loss."""
        return [metric for metric in self.is_better if metric != LOSS]

    @property
    def headline(self) -> list[str]:
        """The metrics that are tested: the held-out loss and the first score."""
        return [LOSS, *self.scores[:1]]

    def runs_of(self, name: str) -> list[RunResult]:
        return sorted((run for run in self.runs if run.name == name), key=lambda run: run.seed)

    @property
    def readings(self) -> dict[str, str]:
        """The two readings and their titles; one if all runs have the same number of steps."""
        found = {"equal": f"at step {self.schedule.equal_steps:,}", "end": f"at {self.schedule.budget}"}
        lengths = {run.num_steps for run in self.runs}
        return found if lengths != {self.schedule.equal_steps} else {"equal": found["equal"]}

    def step_of(self, run: RunResult, reading: str) -> int:
        return self.schedule.equal_steps if reading == "equal" else run.num_steps

    def values(self, name: str, metric: str, reading: str) -> list[float]:
        """The values of a config over its seeds; those of runs that have one."""
        found = [run.values.get(metric, {}).get(self.step_of(run, reading)) for run in self.runs_of(name)]
        return [value for value in found if value is not None and math.isfinite(value)]

    def seconds(self, name: str, step: int) -> float | None:
        """Measured seconds of `step` training steps; None if the config was not measured."""
        step_ms = self.measured.get(name, {}).get("step_ms")
        return None if step_ms is None else step * step_ms / 1e3

    def curve(self, name: str, metric: str) -> list[tuple[int, float, float]]:
        """(step, mean, standard deviation) over the seeds, at the steps that all finished runs have."""
        curves = [curve for run in self.runs_of(name) if not run.error and (curve := run.values.get(metric))]
        if not curves:
            return []
        found = []
        for step in sorted(set.intersection(*map(set, curves))):
            values = [curve[step] for curve in curves]
            found.append((step, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
        return found


# Reading


def read_results(
    workdir: epath.PathLike, *, names: Sequence[str], seeds: Sequence[int] | None = None,
    merged: Sequence[epath.PathLike] = (),
) -> Results:  # fmt: skip
    """The results in a work directory, and in others.

    Args:
      workdir: of the comparison, whose schedule counts.
      names: configs to report, the baseline first; those of merged folders follow.
      seeds: to report; all if None.
      merged: work directories of other comparisons, or of the same one with other seeds.

    Raises:
      FileNotFoundError: a folder holds no comparison.
      ValueError: a file is damaged, or two folders hold the same run, or runs of different configs under one name.
    """
    schedule, warnings = None, []
    runs: dict[tuple[str, int], RunResult] = {}
    measured: dict[str, Mapping] = {}
    is_better = {LOSS: "lower"}
    protocols: dict[str, Any] = {}
    all_names = list(names)
    for folder in map(epath.Path, (workdir, *merged)):
        if not (folder / MEASURED).exists() or not (folder / SCHEDULE).exists():
            raise FileNotFoundError(f"{folder} holds no comparison: {MEASURED} or {SCHEDULE} is missing")
        of_folder = read_schedule(folder / SCHEDULE)
        schedule = schedule or of_folder
        if (of_folder.budget, of_folder.equal_steps) != (schedule.budget, schedule.equal_steps):
            warnings.append(
                f"{folder.name} has the budget {of_folder.budget} and is compared at step {of_folder.equal_steps}, "
                f"{epath.Path(workdir).name} has {schedule.budget} and step {schedule.equal_steps}: some readings of "
                "its runs are missing, or are of another budget."
            )
        for name, entry in read_measured(folder / MEASURED).items():
            measured.setdefault(name, entry)
        for path in sorted((folder / RUNS).glob(f"*/{RESULT}")):
            run, better, protocol = _read_run(path.parent)
            if folder == epath.Path(workdir) and (run.name not in names or (seeds and run.seed not in seeds)):
                continue
            _check_mergeable(run, runs, path.parent)
            runs[run.name, run.seed] = run
            is_better |= {metric: value for metric, value in better.items() if metric not in is_better}
            protocols |= {run.name: protocol} if protocol else {}
            all_names += [] if run.name in all_names else [run.name]
    warnings += _other_warnings(all_names, measured, protocols)
    return Results(
        names=all_names,
        schedule=schedule,
        measured=measured,
        runs=list(runs.values()),
        is_better=is_better,
        warnings=warnings,
    )


def _read_run(folder: epath.Path) -> tuple[RunResult, dict[str, str], dict]:
    """A run; whether lower or higher is better for its scores; and how it was scored."""
    result = read_json(folder / RESULT)
    saved = read_json(folder / SCORES_FILE) if (folder / SCORES_FILE).exists() else {"about": {}, "steps": {}}
    values: dict[str, dict[int, float]] = {LOSS: _losses(folder / CSV_NAME)}
    is_better: dict[str, str] = {}
    for step, scores in saved["steps"].items():
        for metric, score in scores.items():
            values.setdefault(metric, {})[int(step)] = score["value"]
            is_better[metric] = score["is_better"]
    run = RunResult(
        name=result["name"],
        seed=result["seed"],
        num_steps=result["num_steps"],
        error="" if result["status"] == DONE else result["error"],
        values=values,
        grids={int(s): path for s in saved["steps"] if (path := grid_path(folder, int(s))).exists()},
        config=read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).exists() else {},
    )
    shared = ("num_samples", "seed", "features", "extractor_sha256", "reference_sha256", "sampling", "process")
    return run, is_better, {key: saved["about"].get(key) for key in shared} if saved["about"] else {}


def _losses(path: epath.Path) -> dict[int, float]:
    if not path.exists():
        return {}
    rows = csv.DictReader(io.StringIO(path.read_text()))
    return {int(row["step"]): float(row["eval_loss"]) for row in rows if row.get("eval_loss")}


def _check_mergeable(run: RunResult, runs: Mapping[tuple[str, int], RunResult], where: epath.Path) -> None:
    if (run.name, run.seed) in runs:
        raise ValueError(f"{where} is the second run of {run.name!r} with seed {run.seed}: merge one of them")
    for other in runs.values():
        if other.name == run.name and run.config and other.config:
            if run_identity(run.config) != run_identity(other.config):
                raise ValueError(f"{where} is a run of another config than {run.name!r} with seed {other.seed}: rename")


def _other_warnings(names: Iterable[str], measured: Mapping[str, Mapping], protocols: Mapping[str, Any]) -> list[str]:
    found = []
    entries = [measured[name] for name in names if "step_ms" in measured.get(name, {})]
    if len({entry["machine"] for entry in entries}) > 1:
        found.append("The configs were measured on different machines: times and memory do not compare.")
    elif len({entry["at"] for entry in entries}) > 1:
        found.append("Not all configs took turns with each other when they were measured: times compare less well.")
    if len({repr(protocol) for protocol in protocols.values()}) > 1:
        found.append("Not all configs are sampled and scored in the same way: see their configs.")
    return found


# Significance


class Statement(NamedTuple):
    """A config against the baseline in one metric and reading.

    Attributes:
      name, metric, reading: what is compared.
      difference: of the means, config minus baseline.
      p, p_holm: of Welch's test, before and after the correction; NaN where nothing can be tested.
      words: "better", "worse", or why neither is claimed.
    """

    name: str
    metric: str
    reading: str
    difference: float
    p: float
    p_holm: float
    words: str


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """The p-value of Welch's two-sided t-test; NaN with fewer than two values a side, or if no side varies."""
    if min(len(a), len(b)) < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return math.nan
    of_a, of_b = ((np.mean(x), np.std(x, ddof=1), len(x)) for x in (a, b))
    return float(stats.ttest_ind_from_stats(*of_a, *of_b, equal_var=False).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method; NaN stays, and does not count."""
    adjusted, largest = list(p_values), 0.0
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def statements(results: Results, metric: str, reading: str) -> list[Statement]:
    """Every config but the baseline against the baseline."""
    of_baseline, others = results.values(results.baseline, metric, reading), results.names[1:]
    values = [results.values(name, metric, reading) for name in others]
    p_values = [welch(of_config, of_baseline) for of_config in values]
    found = []
    for name, of_config, p, p_holm in zip(others, values, p_values, holm(p_values), strict=True):
        difference = (
            statistics.fmean(of_config) - statistics.fmean(of_baseline) if of_config and of_baseline else math.nan
        )
        is_better = (difference < 0) == (results.is_better[metric] == "lower")
        num_seeds = f"{len(of_config)} seeds"
        if len(of_config) != len(of_baseline):
            num_seeds = f"{len(of_config)} against {len(of_baseline)} seeds"
        if math.isnan(difference):
            words = "no value"
        elif math.isnan(p):
            words = "not tested: one seed" if min(len(of_config), len(of_baseline)) < 2 else "not tested: seeds agree"
        elif p_holm < SIGNIFICANCE:
            words = "better" if is_better else "worse"
        else:
            words = f"not distinguishable with {num_seeds}"
        found.append(Statement(name, metric, reading, difference, p, p_holm, words))
    return found
