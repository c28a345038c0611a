"""Fine-tuning: `config.init_from` starts a run from the averaged weights of another run, or of an export.

A parameter is loaded if the other model has one of the same path and shape. Others keep their fresh values: with
another number of classes that is the table of labels, with another number of channels the first and the last layer.
Another image size changes no parameter, because positions are embedded by a fixed function. The step starts at 0, and
the optimizer and all averages start anew, at the loaded weights.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from diffussm_jax.io import path_of, shapes_by_path
from diffussm_jax.options import flatten
from diffussm_jax.run import load_run, split_checkpoint
from diffussm_jax.training.task import Task
from diffussm_jax.validation import known_options

_COMPARED = ("model.", "diffusion.", "data.downsampling", "data.scaling_factor", "data.num_channels")
_MIN_LOADED = 0.5  # of the parameters


def starting_from(task: Task, config: ConfigDict) -> Task:
    """The task with `config.init_from` as its initial weights, which are read when a run starts, not when it resumes.

    Raises:
      ValueError: the task cannot start from other weights.
    """
    if not hasattr(task, "initialize"):
        raise ValueError(f"config.init_from = {config.init_from!r}: the task {config.task.name!r} cannot start from it")
    if hasattr(task, "read_initial"):  # weights of its own kind
        return dataclasses.replace(task, initialize=lambda fresh: task.read_initial(config.init_from)(fresh))
    return dataclasses.replace(task, initialize=lambda fresh: initial_params(fresh, config, task.mesh))


def initial_params(fresh: Any, config: ConfigDict, mesh: jax.sharding.Mesh) -> Any:
    """Fresh parameters, replaced by those of `config.init_from` where path and shape are the same.

    The first process prints what was loaded, drawn anew and left over, and which settings of the model differ.

    Args:
      fresh: pytree of arrays on `mesh`.
      config: of this run.
      mesh: the devices.

    Returns:
      a pytree of the same shapes and shardings.

    Raises:
      FileNotFoundError: there is no such run or export.
      ValueError: it is damaged, or fewer than half of the parameters could be loaded.
    """
    folder, checkpoint = split_checkpoint(config.init_from)
    other = load_run(folder, checkpoint, has_decoder=False, mesh=mesh)
    loaded = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(other.params)}
    report = compare(shapes_by_path(fresh), shapes_by_path(other.params))
    lines = [f"Initial weights: {folder}, step {other.step:,}.", *report.lines()]
    before, now = flatten(other.config), flatten(config)
    lines += [
        f"  config.{key}: was {before.get(key)!r} there, is {now[key]!r}"
        for key, option in known_options(config).items()
        if key.startswith(_COMPARED) and not option.is_changeable_on_resume and before.get(key) != now[key]
    ]
    if report.fraction_loaded < _MIN_LOADED:
        raise ValueError("\n".join([f"config.init_from = {config.init_from!r} is of another model.", *lines[1:]]))
    if jax.process_index() == 0:
        print("\n".join(lines), flush=True)

    def choose(path, leaf):
        path = path_of(path)
        return loaded[path].astype(leaf.dtype) if path in report.loaded else leaf

    layout = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    return jax.jit(lambda params: params, out_shardings=layout)(jax.tree_util.tree_map_with_path(choose, fresh))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Which parameters of a model another one has.

    Attributes:
      shapes: of the model's parameters, by path.
      others: of the other model's.
      loaded: the paths with the same shape in both.
    """

    shapes: Mapping[str, tuple[int, ...]]
    others: Mapping[str, tuple[int, ...]]
    loaded: frozenset[str]

    @property
    def fraction_loaded(self) -> float:
        """Of the model's parameters, counted one by one."""
        counts = {path: math.prod(shape) for path, shape in self.shapes.items()}
        return sum(counts[path] for path in self.loaded) / sum(counts.values())

    def lines(self) -> list[str]:
        """A report for people."""
        found = [
            f"  loaded: {len(self.loaded)} of {len(self.shapes)} arrays, {self.fraction_loaded:.1%} of the parameters"
        ]
        for path in sorted(self.shapes.keys() - self.loaded):
            there = f"{self.others[path]} there" if path in self.others else "not there"
            found.append(f"  drawn anew: {path} {self.shapes[path]}, {there}")
        return found + [
            f"  not used: {path} {self.others[path]}" for path in sorted(self.others.keys() - self.shapes.keys())
        ]


def compare(shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]) -> Comparison:
    """Compares the shapes of two models' parameters by path."""
    return Comparison(shapes, others, frozenset(path for path in shapes if others.get(path) == shapes[path]))
