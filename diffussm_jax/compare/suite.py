"""Suites of `diffussm_jax.compare`: named configs, a budget, seeds and scores.

A suite is a Python file that defines get_suite():

    def get_suite():
        config = default_config()
        ...
        return Suite(title="...", configs={"A": config, "B": other}, budget=Budget("seconds", 60))

Every budget becomes a number of steps of each config before training starts: seconds by the measured time of a step,
FLOPs by the counted multiply-adds. So training needs no clock. It can be stopped and resumed, and what else the machine
does in the meantime changes no result.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from diffussm_jax import registry
from diffussm_jax.config import call_in_file, chosen, to_plain
from diffussm_jax.config_keys import MAX_SEED
from diffussm_jax.evaluation.extractor import DISTANCES
from diffussm_jax.evaluation.scores import SCORES
from diffussm_jax.io import read_json, write_whole
from diffussm_jax.options import check_names, flatten
from diffussm_jax.validation import validate

STAGES = ("plan", "measure", "train", "score", "report")
BUDGETS = ("steps", "images", "flops", "seconds")
SCHEDULE = "schedule.json"
_MAX_STEPS = 2**31 - 1  # of the int32 that counts them


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long each config trains, in units that are equal for all.

    Attributes:
      kind: "steps", "images" (seen in training, with repetitions), "flops" or "seconds".
      amount: of them.
    """

    kind: str
    amount: float

    def __post_init__(self):
        check_names([self.kind], BUDGETS, "budget")
        if not 0 < self.amount < float("inf"):
            raise ValueError(f"the amount of a budget must be positive and finite, got {self.amount}")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Parses KIND:AMOUNT, such as "seconds:60". Raises ValueError if malformed."""
        kind, _, amount = text.partition(":")
        try:
            return cls(kind, float(amount))
        except ValueError as error:
            raise ValueError(
                f"a budget must be KIND:AMOUNT with KIND of {', '.join(BUDGETS)}, such as seconds:60, got {text!r}"
            ) from error

    def __str__(self) -> str:
        return f"{self.amount:,.12g} {'FLOPs' if self.kind == 'flops' else self.kind}"

    def num_steps(self, *, batch_size: int, multiply_adds: int, step_ms: float) -> int:
        """Steps that the budget pays for, at least one.

        Args:
          batch_size: images of a step.
          multiply_adds: of a forward pass of one image. A step is 3 such passes, of 2 FLOPs for each multiply-add.
          step_ms: measured time of a step.
        """
        of_a_step = {
            "steps": 1,
            "images": batch_size,
            "flops": 6 * multiply_adds * batch_size,
            "seconds": step_ms / 1e3,
        }
        # The tolerance is for amounts that are a whole number of steps, but for rounding.
        num_steps = self.amount / of_a_step[self.kind] * (1 + 1e-9)
        if num_steps > _MAX_STEPS:
            raise ValueError(f"a budget of {self} is {num_steps:.3g} steps; the most are {_MAX_STEPS}")
        return max(1, int(num_steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """What is compared. The first config is the baseline.

    Attributes:
      title: of the report.
      configs: by name, in the order of the report.
      budget: of each run.
      notes: what a reader of the report should know, in plain text.
      seeds: one run of each config for each of them.
      features: the network of the scores, as `evaluate --features`.
      scores: keys of `evaluation.scores.SCORES`. The first score of the first key stands in the foreground.
      num_samples: to score a checkpoint by.
      num_losses: how often the held-out loss is read until the step at which all are compared.
      num_scores: likewise the scores; divides `num_losses`. The end of each run is scored as well.
      groups: names that share a figure, by the figure's title; the baseline is in each. Default: one figure for all.
      stages: what `compare` does by default.
    """

    title: str
    configs: Mapping[str, ConfigDict]
    budget: Budget
    notes: str = ""
    seeds: Sequence[int] = (0, 1, 2)
    features: str = "digits"
    scores: Sequence[str] = ("frechet", "precision_recall", "accuracy")
    num_samples: int = 1000
    num_losses: int = 10
    num_scores: int = 1
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    stages: Sequence[str] = STAGES[1:]

    @property
    def baseline(self) -> str:
        return next(iter(self.configs))

    def check(self) -> None:
        """Raises ValueError if the suite cannot be compared; the message names the config and the key."""
        if not self.configs:
            raise ValueError("the suite has no config")
        folders = [folder_name(name) for name in self.configs]
        if len({*folders}) < len(folders):
            raise ValueError(f"two names of the suite give the same folder: {', '.join(self.configs)}")
        check_names(self.stages, STAGES, "stage")
        if not self.stages:
            raise ValueError(f"stages must be some of {', '.join(STAGES)}, got none")
        check_names([self.features], DISTANCES, "features")
        check_names(self.scores, SCORES, "score")
        for title, names in self.groups.items():
            check_names(names, self.configs, f"config of the group {title!r}:")
        wrong = [s for s in self.seeds if isinstance(s, bool) or not isinstance(s, int) or not 0 <= s <= MAX_SEED]
        if wrong or not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds must be different whole numbers from 0 to {MAX_SEED}, got {list(self.seeds)}")
        if self.num_samples < 10:
            raise ValueError(f"num_samples must be at least 10, got {self.num_samples}")
        if self.num_losses < 1 or self.num_scores < 1 or self.num_losses % self.num_scores:
            raise ValueError(
                f"num_scores must divide num_losses, both at least 1, got {self.num_scores} and {self.num_losses}"
            )
        for name, config in self.configs.items():
            try:
                validate(config, jax.device_count() if self.is_trained else 1)
                self._check_config(name, config)
            except ValueError as error:
                raise ValueError(f"the config {name!r} of the suite: {error}") from error

    @property
    def is_trained(self) -> bool:
        """Whether a stage other than "plan" is asked for."""
        return any(stage != "plan" for stage in self.stages)

    def _check_config(self, name: str, config: ConfigDict) -> None:
        if not self.is_trained:
            return
        if config.optimizer.decay != "constant":
            raise ValueError(
                f"config.optimizer.decay is {config.optimizer.decay!r}; with 'constant' runs of different length can "
                "be read at the same step"
            )
        if not (config.data.eval_split or config.data.holdout):
            raise ValueError("the held-out loss needs config.data.eval_split or config.data.holdout")
        differing = differences(config, self.configs[self.baseline])
        if keys := [key for key in differing if key.startswith("data.")]:
            raise ValueError(f"its data are not those of {self.baseline!r}: {', '.join(keys)}")


def differences(config: ConfigDict, baseline: ConfigDict) -> dict[str, Any]:
    """The values of a config, under dotted keys, that the baseline does not have; those that `compare` sets left out.

    An option of a component that the baseline does not have is listed if it differs from that component's default.
    """
    one, other = (flatten(run_identity(to_plain(of))) for of in (config, baseline))
    defaults = {
        f"{key.rpartition('.')[0]}.{name}": list(option.default)
        if isinstance(option.default, tuple)
        else option.default
        for key, kind, group in chosen(config)
        for name, option in registry.options(kind, group[key.rpartition(".")[2]]).items()
    }
    return {
        key: value
        for key, value in one.items()
        if not isinstance(value, Mapping) and value != (other[key] if key in other else defaults.get(key))
    }


# What `compare` sets itself.
_SET = ("seed", "num_steps", "log_every", "eval_every", "checkpoint_every", "keep_every", "sample_every")
_SET += ("eval_scores_every",)


def run_identity(plain: Mapping) -> dict:
    """What the runs of a config share: its plain values without those that `compare` sets."""
    return {key: value for key, value in plain.items() if key not in _SET}


def folder_name(name: str) -> str:
    """A name as part of a path: "DiT/2" is "DiT_2"."""
    return re.sub(r"[^\w.+-]+", "_", name)


def load_suite(file: str) -> Suite:
    """The suite of a file: "configs/suites/digits.py", or with an argument of get_suite "FILE.py:ARGUMENT".

    This runs the file, which is Python.

    Raises:
      ValueError: there is no such file, or it defines no suite.
    """
    suite = call_in_file(file, "get_suite", "suite", "configs/suites/digits.py")
    if not isinstance(suite, Suite):
        raise ValueError(f"get_suite() of {file} must return a Suite, got {type(suite).__name__}")
    return suite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many steps each config makes, and at which it is read.

    Attributes:
      budget: that it was made for, in words.
      interval: of the held-out loss.
      keep_every: interval of the checkpoints that are kept and scored.
      equal_steps: the step at which all are compared: a multiple of both, and at most the steps of the shortest run.
      num_steps: of each config.
    """

    budget: str
    interval: int
    keep_every: int
    equal_steps: int
    num_steps: Mapping[str, int]

    def scored_steps(self, name: str) -> list[int]:
        """The steps at which a config is scored: until `equal_steps` all that are kept, and the last one."""
        end = self.num_steps[name]
        return sorted({*range(self.keep_every, min(self.equal_steps, end) + 1, self.keep_every), end})


def make_schedule(suite: Suite, measured: Mapping[str, Mapping]) -> Schedule:
    """The schedule of a suite.

    Args:
      suite: of which configs that were not measured are left out.
      measured: "batch_size", "multiply_adds" and "step_ms" of each config, as `compare.measure.measure` saves them.

    Raises:
      ValueError: no config was measured.
    """
    num_steps = {
        name: suite.budget.num_steps(**{key: measured[name][key] for key in ("batch_size", "multiply_adds", "step_ms")})
        for name in suite.configs
        if name in measured and "error" not in measured[name]
    }
    if not num_steps:
        raise ValueError("no config of the suite was measured")
    shortest = min(num_steps.values())
    num_scores, losses_each = min(suite.num_scores, shortest), suite.num_losses // suite.num_scores
    interval = max(1, shortest // (num_scores * losses_each))
    keep_every = interval * min(losses_each, shortest // (interval * num_scores))
    return Schedule(
        budget=str(suite.budget),
        interval=interval,
        keep_every=keep_every,
        equal_steps=keep_every * num_scores,
        num_steps=num_steps,
    )


def open_schedule(suite: Suite, measured: Mapping[str, Mapping], workdir: epath.PathLike) -> Schedule:
    """The schedule that a work directory has, or a new one, saved there.

    Configs that joined the suite later follow the schedule that is there.

    Raises:
      ValueError: the one that is there was made for another budget.
    """
    path, schedule = epath.Path(workdir) / SCHEDULE, make_schedule(suite, measured)
    if path.exists():
        old = read_schedule(path)
        changed = {name: n for name, n in old.num_steps.items() if schedule.num_steps.get(name, n) != n}
        if changed or old.budget != schedule.budget:
            raise ValueError(
                f"{workdir} holds a comparison at {old.budget} with {dict(old.num_steps)} steps, now it would be "
                f"{schedule.budget} with {dict(schedule.num_steps)} steps: choose another workdir, or the same budget, "
                f"batch size and measurements"
            )
        schedule = dataclasses.replace(old, num_steps={**schedule.num_steps, **old.num_steps})
    write_whole(path, json.dumps(dataclasses.asdict(schedule), indent=2))
    return schedule


def read_schedule(path: epath.PathLike) -> Schedule:
    """Reads a schedule that `open_schedule` saved.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    try:
        return Schedule(**read_json(epath.Path(path)))
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
