"""Compares models at equal budgets: python -m diffussm_jax.compare configs/suites/digits.py --workdir=runs/compare

A suite is a Python file of named configs, a budget, seeds and scores. Its stages, which --stages chooses from:

    measure   times a training step and sampling of all configs, in turns
    train     each config with each seed, in a folder of its own
    score     samples of each run
    report    WORKDIR/report/comparison.html, .md and .csv: costs, scores, curves, samples, what is significant
    plan      in place of the others: what each config needs of a machine, --topology; nothing is trained

Repeat the command to go on after a stop: what is done is not repeated.
"""

import dataclasses
import json
import signal

import jax
from absl import app, flags
from etils import epath

from diffussm_jax import cli
from diffussm_jax.compare.lengths import read_lengths
from diffussm_jax.compare.measure import MEASURED, measure, read_measured
from diffussm_jax.compare.page import html_page, write_markdown
from diffussm_jax.compare.plan import plan_blocks, plan_suite
from diffussm_jax.compare.report import REPORT, write_report
from diffussm_jax.compare.results import read_results
from diffussm_jax.compare.runs import num_failed, score_runs, train_runs
from diffussm_jax.compare.suite import STAGES, Budget, Suite, load_suite, open_schedule
from diffussm_jax.io import check_path, check_writable, folder_lock, write_whole
from diffussm_jax.options import check_names
from diffussm_jax.parallel.topology import parse_machine

_FLAGS = flags.FlagValues()  # of its own, so that several programs can be imported together
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for measurements, runs and the report.", flag_values=_FLAGS)
_STAGES = flags.DEFINE_list("stages", None, f"Of {', '.join(STAGES)}. Default: the suite's.", flag_values=_FLAGS)
_BUDGET = flags.DEFINE_string(
    "budget",
    None,
    "KIND:AMOUNT of each run, such as seconds:60, steps:2000, images:1e6 or flops:1e15. Default: the suite's.",
    flag_values=_FLAGS,
)
_SEEDS = flags.DEFINE_list("seeds", None, "Seeds, such as 0,1,2. Default: the suite's.", flag_values=_FLAGS)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", None, "Samples to score a checkpoint by. Default: the suite's.", lower_bound=10, flag_values=_FLAGS
)
_ONLY = flags.DEFINE_list(
    "only", None, "Names of configs to train, score and report. All are measured, for equal steps.", flag_values=_FLAGS
)
_TURNS = flags.DEFINE_integer(
    "turns", 9, "How often the step of each config is timed.", lower_bound=1, flag_values=_FLAGS
)
_MERGE = flags.DEFINE_list("merge", [], "Work directories whose runs are reported too.", flag_values=_FLAGS)
_LENGTHS = flags.DEFINE_string(
    "lengths", None, "JSON of `bench lengths --json`. Default: WORKDIR/lengths.json if it exists.", flag_values=_FLAGS
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "plan: the machine, as for `diffussm_jax.plan`: v5e:16x16, h100:8, ...", flag_values=_FLAGS
)
_MFU = flags.DEFINE_float(
    "mfu", 0.4, "plan: the MFU assumed for times.", lower_bound=1e-6, upper_bound=1, flag_values=_FLAGS
)
_COMPILATION_CACHE = cli.define_compilation_cache(_FLAGS)


def _say(text: str) -> None:
    print(text, flush=True)


def _open_suite(file: str) -> Suite:
    """The suite of a file, with the values of the flags.

    Raises:
      ValueError: it is wrong, or a flag does not fit it.
    """
    suite, changes = load_suite(file), {}
    if _BUDGET.value is not None:
        changes["budget"] = Budget.parse(_BUDGET.value)
    if _SEEDS.value is not None:
        if not all(seed.isdecimal() for seed in _SEEDS.value):
            raise ValueError(f"--seeds must be whole numbers with commas between them, got {','.join(_SEEDS.value)!r}")
        changes["seeds"] = tuple(map(int, _SEEDS.value))
    if _NUM_SAMPLES.value is not None:
        changes["num_samples"] = _NUM_SAMPLES.value
    if _STAGES.value is not None:
        changes["stages"] = tuple(_STAGES.value)
    suite = dataclasses.replace(suite, **changes)
    if "plan" in suite.stages and suite.is_trained:
        raise ValueError(f"the stage plan goes alone, got --stages={','.join(suite.stages)}")
    if not suite.is_trained:
        jax.config.update("jax_platforms", "cpu")  # before the first use of a device; leaves an accelerator free
    suite.check()
    return suite


def _plan(suite: Suite, names: list[str], out: epath.Path) -> int:
    if not _TOPOLOGY.value:
        raise app.UsageError("the stage plan needs --topology, such as v5e:16x16 or h100:8")
    machine = parse_machine(_TOPOLOGY.value)
    check_writable(out / "plan.html")
    rows = plan_suite(suite, machine, names, mfu=_MFU.value, say=_say)
    title, blocks = f"{suite.title}: {machine.name}", plan_blocks(suite, machine, rows, mfu=_MFU.value)
    write_whole(out / "plan.json", json.dumps(rows, indent=2))
    write_whole(out / "plan.html", html_page(title, blocks))
    write_markdown(out / "plan.md", title, blocks)
    _say((out / "plan.md").read_text())
    return int(any("error" in row for row in rows))


def _run(suite: Suite, names: list[str], workdir: epath.Path) -> int:
    """The stages before the report. Returns the exit code."""
    with folder_lock(workdir, "compare"):
        if "measure" in suite.stages:
            measured = measure(suite, workdir, num_turns=_TURNS.value, say=_say)
        elif not (workdir / MEASURED).exists():
            raise FileNotFoundError(f"{workdir} holds no measurements: begin with --stages=measure")
        else:
            measured = read_measured(workdir / MEASURED)
        schedule = open_schedule(suite, measured, workdir)
        if "train" in suite.stages:
            signum = train_runs(suite, schedule, workdir, names, _say)
            if signum is not None:
                _say(f"Stopped by {signal.Signals(signum).name}. Repeat the command to go on.")
                return cli.PREEMPTED if signum == signal.SIGTERM else 128 + signum
        if "score" in suite.stages:
            score_runs(suite, schedule, workdir, names, _say)
    if "train" in suite.stages and (failed := num_failed(suite, workdir, names)):
        _say(f"{failed} runs failed; {workdir}/runs/*/result.json say why.")
        return 1
    return 0


def main(suite_file: str) -> int:
    """Compares, and returns the exit code: 1 if a run failed, 130 after Ctrl-C, 75 after SIGTERM, else 0."""
    if not _WORKDIR.value:
        raise app.UsageError("give --workdir=FOLDER")
    paths = [_WORKDIR.value, *_MERGE.value, *([_LENGTHS.value] if _LENGTHS.value else [])]
    for path in paths:
        check_path(path)
    suite, workdir = _open_suite(suite_file), epath.Path(_WORKDIR.value)
    names = _ONLY.value or list(suite.configs)
    check_names(names, suite.configs, "config of --only:")
    if not suite.is_trained:
        return _plan(suite, names, workdir / REPORT)
    check_writable(workdir / REPORT / "comparison.html")
    cli.keep_freed_memory()
    cli.use_compilation_cache(_COMPILATION_CACHE.value)
    code = 0
    if {"measure", "train", "score"} & {*suite.stages}:
        code = _run(suite, names, workdir)
    if code <= 1 and "report" in suite.stages:
        default = workdir / "lengths.json"
        path = _LENGTHS.value or (default if default.exists() else None)
        lengths = read_lengths(path) if path else None
        results = read_results(workdir, names=names, seeds=suite.seeds, merged=_MERGE.value)
        written = write_report(workdir / REPORT, suite, results, lengths)
        _say(f"Wrote {', '.join(map(str, written.values()))}.")
    return code


if __name__ == "__main__":
    cli.run(main, _FLAGS, num_arguments=1)
