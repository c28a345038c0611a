"""Trains and scores the runs of a suite, each in WORKDIR/runs/NAME-seedN. What is done is not repeated.

A run's folder is that of `diffussm_jax.main`, and has two files more: result.json says how training ended, and
scores.json has the scores of the checkpoints that are compared.
"""

import contextlib
import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffussm_jax.build import Parts
from diffussm_jax.compare.measure import error_line
from diffussm_jax.compare.suite import Schedule, Suite, folder_name
from diffussm_jax.config import to_plain
from diffussm_jax.data.transforms import image_grid, save_png
from diffussm_jax.evaluate_images import about_run
from diffussm_jax.evaluate_real import open_extractor, open_real_data, open_reference
from diffussm_jax.evaluation.extractor import Extractor
from diffussm_jax.evaluation.scores import Reference, compute_scores
from diffussm_jax.experiment import build_experiment
from diffussm_jax.io import read_json, write_whole
from diffussm_jax.run import Run, load_run
from diffussm_jax.training.checkpoint import DIRECTORY, Checkpointer
from diffussm_jax.training.loop import CONFIG_NAME, train
from diffussm_jax.validation import check_same_experiment

RUNS = "runs"
RESULT = "result.json"
SCORES_FILE = "scores.json"
DONE, FAILED = "done", "failed"
SAMPLING_SEED = 0  # the same noise for every run
_BATCH_SIZE = 256
_GRID_COLUMNS, _GRID_ROWS = 10, 3


def run_folder(workdir: epath.PathLike, name: str, seed: int) -> epath.Path:
    """The work directory of a run."""
    return epath.Path(workdir) / RUNS / f"{folder_name(name)}-seed{seed}"


def grid_path(folder: epath.Path, step: int) -> epath.Path:
    """The grid of samples of a scored checkpoint."""
    return folder / f"scored_{step:08d}.png"


def run_config(config: ConfigDict, schedule: Schedule, name: str, seed: int) -> ConfigDict:
    """The config of a run: seed, number of steps and intervals are the comparison's."""
    config = copy.deepcopy(config).unlock()
    config.seed, config.num_steps = seed, schedule.num_steps[name]
    config.log_every = config.eval_every = schedule.interval
    config.checkpoint_every = config.keep_every = schedule.keep_every
    config.sample_every = config.eval_scores_every = 0
    return config


# Training


def train_runs(
    suite: Suite, schedule: Schedule, workdir: epath.PathLike, names: Sequence[str], say: Callable[[str], None] = print
) -> int | None:
    """Trains the runs of some configs that are not done, all configs of a seed before the next seed.

    A run that fails is recorded with its error, and the others go on.

    Returns:
      None, or the number of the signal that stopped it.

    Raises:
      ValueError: a folder holds a run of another config.
    """
    for seed in suite.seeds:
        for name in names:
            if name not in schedule.num_steps:
                continue  # it does not run
            folder, config = run_folder(workdir, name, seed), run_config(suite.configs[name], schedule, name, seed)
            if _is_done(folder, config):
                continue
            say(f"training {name}, seed {seed}: {config.num_steps:,} steps in {folder}")
            result = {"name": name, "seed": seed, "num_steps": config.num_steps, "status": DONE, "error": ""}
            try:
                signum = train(build_experiment(config), folder)
            except Exception as error:  # of any type: the others shall be compared
                signum, result = None, result | {"status": FAILED, "error": error_line(error)}
                say(f"{name}, seed {seed} failed: {result['error']}")
            if signum is not None:
                return signum
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / RESULT, json.dumps(result, indent=1))
            jax.clear_caches()
    return None


def _is_done(folder: epath.Path, config: ConfigDict) -> bool:
    if not (folder / RESULT).exists() or read_json(folder / RESULT).get("status") != DONE:
        return False
    check_same_experiment(read_json(folder / CONFIG_NAME), to_plain(config), str(folder))
    return read_json(folder / RESULT).get("num_steps") == config.num_steps


def num_failed(suite: Suite, workdir: epath.PathLike, names: Sequence[str]) -> int:
    """How many runs of these configs are not done."""
    results = [run_folder(workdir, name, seed) / RESULT for name in names for seed in suite.seeds]
    return sum(not path.exists() or read_json(path).get("status") != DONE for path in results)


# Scores


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """Scores a run by samples with the same noise and balanced labels."""

    suite: Suite
    extractor: Extractor
    reference: Reference

    @classmethod
    def of(cls, suite: Suite, say: Callable[[str], None]) -> "_Scorer":
        real = open_real_data("", run_config=suite.configs[suite.baseline])
        extractor = open_extractor(suite.features, "", real, say)
        return cls(suite, extractor, open_reference("", extractor, real, _BATCH_SIZE))

    def about(self, config: ConfigDict) -> dict[str, Any]:
        """All that the scores of a config depend on, beside the checkpoint."""
        about = {key: value for key, value in about_run(Run(Parts(config), {}, 0)).items() if key != "step"}
        return json.loads(json.dumps(about)) | {
            "num_samples": self.suite.num_samples,
            "seed": SAMPLING_SEED,
            "scores": list(self.suite.scores),
            "features": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "reference_sha256": self.reference.about["images_sha256"],
        }

    def __call__(self, run: Run) -> tuple[dict[str, dict], np.ndarray]:
        images, labels = run.sample(self.suite.num_samples, seed=SAMPLING_SEED, batch_size=_BATCH_SIZE)
        labels = labels if run.config.data.num_classes else None
        outputs = self.extractor(images, _BATCH_SIZE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said by `diffussm_jax.evaluate`
            options = {"chosen": self.suite.scores, "num_resamples": 0}
            found = compute_scores(self.extractor, outputs, labels, self.reference, **options)
        return {name: {"value": s.value, "is_better": s.is_better} for name, s in found.items()}, images


def score_runs(
    suite: Suite, schedule: Schedule, workdir: epath.PathLike, names: Sequence[str], say: Callable[[str], None] = print
) -> None:
    """Scores the checkpoints of `Schedule.scored_steps` that are there and not scored, and draws a grid of samples."""
    scorer: _Scorer | None = None
    for name in names:
        about, opened = {}, None  # one Run for all checkpoints of a config, so that its sampler is compiled once
        for seed in suite.seeds:
            folder = run_folder(workdir, name, seed)
            if name not in schedule.num_steps or not (folder / RESULT).exists():
                continue
            scorer = scorer or _Scorer.of(suite, say)
            about = about or scorer.about(suite.configs[name])
            saved = _read_scores(folder, about)
            for step in _kept_steps(folder, schedule.scored_steps(name)):
                if str(step) not in saved["steps"]:
                    opened = _open(opened, folder, step)
                    saved["steps"][str(step)] = _score_step(scorer, opened, folder, say)
                    write_whole(folder / SCORES_FILE, json.dumps(saved, indent=1))
        jax.clear_caches()


def _kept_steps(folder: epath.Path, wanted: Sequence[int]) -> list[int]:
    directory = folder / DIRECTORY
    kept = {int(path.name) for path in directory.iterdir() if path.name.isdecimal()} if directory.exists() else set()
    return sorted(kept.intersection(wanted))


def _read_scores(folder: epath.Path, about: dict) -> dict:
    """What is saved; nothing if it was scored by another protocol, which would not compare."""
    path = folder / SCORES_FILE
    saved = read_json(path) if path.exists() else {}
    return saved if saved.get("about") == about else {"about": about, "steps": {}}


def _open(opened: Run | None, folder: epath.Path, step: int) -> Run:
    if opened is None:
        return load_run(folder, step)
    with contextlib.closing(Checkpointer(folder, is_read_only=True)) as checkpointer:
        params = checkpointer.restore_ema(checkpointer.resolve(str(step)), opened.params)
    return dataclasses.replace(opened, params=params, step=step)


def _score_step(scorer: _Scorer, run: Run, folder: epath.Path, say: Callable[[str], None]) -> dict[str, dict]:
    """The scores of a checkpoint; none if its samples are not finite."""
    try:
        found, images = scorer(run)
    except FloatingPointError as error:
        say(f"{folder.name}, step {run.step}: no scores: {error_line(error)}")
        return {}
    save_png(grid_path(folder, run.step), image_grid(images[: _GRID_COLUMNS * _GRID_ROWS], _GRID_COLUMNS))
    first, score = next(iter(found.items()))
    say(f"{folder.name}, step {run.step}: {first} {score['value']:.4g}")
    return found
