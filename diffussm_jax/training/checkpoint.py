"""Checkpoints of a run, through Orbax: saved in the background, with checksums, and kept by a policy.

A checkpoint has three items: "ema", the averaged parameters, so that sampling reads a part of it only; "train", the
rest of the state; and "about", the config and the versions of libraries as JSON. Before Orbax gives it its final name,
the SHA-256 of every file is written beside them: a checkpoint is whole or has no name, and one that was damaged later
is found out, set aside and reported, and the one before it used.
"""

import importlib.metadata
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from diffussm_jax.io import check_same_shapes, file_sha256, files_below, is_bucket, shapes_by_path

NUM_NEWEST = 2
DIRECTORY = "checkpoints"
CHECKSUMS = "checksums.json"
_ABOUT = "about"
# Orbax writes these after the checksums, when it gives a checkpoint its name; nothing is read from them.
_WITHOUT_CHECKSUM = ("_CHECKPOINT_METADATA", "commit_success.txt")
_PACKAGES = ("diffussm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
# Parts of old checkpoints that are not read any more. Up to format 1 the sums of metrics were state.
_RETIRED = ("window/",)


class Best(NamedTuple):
    """The metric by which the best checkpoint is kept, and whether "min" or "max" is best.

    A checkpoint saved without that metric counts as worst.
    """

    metric: str = "eval_loss"
    mode: str = "min"

    def score(self, metrics: Mapping[str, float] | None) -> float:
        """What is to be maximised."""
        value = (metrics or {}).get(self.metric)
        if value is None or not math.isfinite(value):
            return -math.inf
        return value if self.mode == "max" else -value


EVAL_LOSS = Best()


class Store:
    """Pytrees of arrays on disk, by step and item, with checksums.

    Args:
      directory: where they lie, each step in a folder of its own.
      items: names of the pytrees of a step.
      policy: which steps are kept; all if None.
      best: the metric of `best_step`.
      is_read_only: whether the folder is only read; else what a killed run left half saved is removed.
    """

    def __init__(
        self,
        directory: epath.Path,
        items: tuple[str, ...],
        *,
        policy: AnyPreservationPolicy | None = None,
        best: Best | None = None,
        is_read_only: bool = False,
    ):
        self.directory = directory
        options = ocp.CheckpointManagerOptions(
            best_fn=best.score if best else None,
            best_mode="max",
            preservation_policy=policy,
            create=not is_read_only,
            cleanup_tmp_directories=not is_read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        # Named, so that the shapes in a checkpoint can be read before the arrays are.
        handlers = {item: ocp.PyTreeCheckpointHandler() for item in items} | {_ABOUT: ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
        self._being_saved: int | None = None

    def steps(self) -> list[int]:
        """All steps, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the best metric, or None."""
        return self._manager.best_step()

    def save(self, step: int, items: dict, *, about: dict | None = None, metrics: dict | None = None) -> None:
        """Starts to save; what is passed is copied first, and may be donated when this returns."""
        self._manager.wait_until_finished()
        self._being_saved = step
        arguments = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        arguments[_ABOUT] = ocp.args.JsonSave(about or {})
        self._manager.save(step, args=ocp.args.Composite(**arguments), metrics=metrics, force=True)

    def _write_checksums(self) -> None:
        """Called by Orbax, in its thread, when all files of a step are written and before they get their final name."""
        if jax.process_index():
            return
        prefix = f"{self._being_saved}.orbax-checkpoint-tmp"
        unfinished = [path for path in self.directory.iterdir() if path.name.startswith(prefix)]
        # In buckets, where nothing can be renamed, the folder has its name from the start.
        folder = unfinished[0] if unfinished else self.directory / str(self._being_saved)
        sums = {name: file_sha256(folder / name) for name in files_below(folder) if name not in _WITHOUT_CHECKSUM}
        (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))

    def find_corruption(self, step: int, items: tuple[str, ...] | None = None) -> list[str]:
        """What is wrong with the files of a step (or of some of its items), a line for each; empty if all is well."""
        folder = self.directory / str(step)
        try:
            sums = json.loads((folder / CHECKSUMS).read_text())
            wanted = {n: s for n, s in sums.items() if items is None or n.partition("/")[0] in (*items, _ABOUT)}
        except (OSError, ValueError, AttributeError) as error:
            return [f"{CHECKSUMS} cannot be read: {error}"]
        wrong = []
        for name, expected in wanted.items():
            if not (folder / name).exists():
                wrong.append(f"{name} is missing")
            elif (found := file_sha256(folder / name)) != expected:
                wrong.append(f"{name}: SHA-256 is {found}, was {expected}")
        return wrong

    def quarantine(self, step: int) -> epath.Path:
        """Moves a step's folder out of the way, and returns where to; nothing of it is lost."""
        folder, aside = self.directory / str(step), self.directory.parent / f"{self.directory.name}_damaged"
        names = itertools.chain([str(step)], (f"{step}.{number}" for number in itertools.count(1)))
        target = next(aside / name for name in names if not (aside / name).exists())
        if not is_bucket(folder):
            aside.mkdir(exist_ok=True)
            return folder.rename(target)
        for name in files_below(folder):  # buckets have no folders that could be renamed
            (folder / name).copy(target / name)
        folder.rmtree()
        return target

    def reload(self) -> None:
        """Looks again which steps there are."""
        self._manager.reload()

    def restore(self, step: int, like: dict) -> dict:
        """The items of a step that `like` names, each laid out as it is there (arrays or ShapeDtypeStructs).

        Raises:
          ValueError: they are of another model; the message lists what differs.
        """
        self._manager.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        metadata, arguments = self._manager.item_metadata(step), {}
        for item, tree in like.items():
            found = shapes_by_path(getattr(metadata[item], "tree", metadata[item]))
            retired = [path for path in found if path.startswith(_RETIRED)]
            path = self.directory / str(step)
            check_same_shapes(
                shapes_by_path(tree),
                {path: shape for path, shape in found.items() if path not in retired},
                f"{item} of {path} does not hold the parameters of this model",
            )
            arguments[item] = ocp.args.PyTreeRestore(
                tree,
                restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                partial_restore=bool(retired),  # Orbax would skip missing parts too: hence the check before
            )
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {item: restored[item] for item in like}

    def about(self, step: int) -> dict:
        """What was written about a step."""
        return self._manager.restore(step, args=ocp.args.Composite(**{_ABOUT: ocp.args.JsonRestore()}))[_ABOUT]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


class Checkpointer:
    """The checkpoints of a work directory: the newest two, the best, and those of multiples of `keep_every`.

    Args:
      workdir: of the run; they lie in its folder "checkpoints".
      config: the run's, as plain values, to be kept in each.
      keep_every: checkpoints of its multiples are kept for good; 0: none.
      best: which is the best; by default the lowest loss on held-out data.
      is_read_only: whether the folder is only read, as sampling does.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        config: dict | None = None,
        keep_every: int = 0,
        best: Best = EVAL_LOSS,
        is_read_only: bool = False,
    ):
        self.directory = epath.Path(workdir).absolute() / DIRECTORY
        self._config = config or {}
        policies = [LatestN(NUM_NEWEST), BestN(get_metric_fn=best.score, n=1, keep_checkpoints_without_metrics=False)]
        if keep_every:
            policies.append(EveryNSteps(keep_every))
        self._store = Store(
            self.directory,
            ("train", "ema"),
            policy=AnyPreservationPolicy(policies),
            best=best,
            is_read_only=is_read_only,
        )

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending."""
        return self._store.steps()

    def latest_valid_step(self) -> int | None:
        """The newest checkpoint whose files are what was saved, or None. Newer ones are set aside, and reported.

        On several hosts the first one looks, and all use what it found.
        """
        found = -1
        if jax.process_index() == 0:
            for step in reversed(self._store.steps()):
                wrong = self._store.find_corruption(step)
                if not wrong:
                    found = step
                    break
                aside = self._store.quarantine(step)
                report = (
                    f"The checkpoint of step {step} is damaged, and was moved to {aside}; the one before it is used."
                )
                print("\n  ".join([report, *wrong]), flush=True)
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        self._store.reload()
        return None if found == -1 else found

    def resolve(self, which: str) -> int:
        """The step that "latest", "best" or a number names; damaged ones are passed over by "latest", and reported.

        Raises:
          FileNotFoundError: there is no checkpoint at all.
          ValueError: none has that name, or it is damaged.
        """
        steps = self._store.steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        best = self._store.best_step()
        if which == "latest":
            candidates = steps[::-1]
        elif which == "best":
            candidates = [steps[-1] if best is None else best]
        elif which.isdecimal() and int(which) in steps:
            candidates = [int(which)]
        else:
            raise ValueError(f"no checkpoint {which!r} in {self.directory}; choose latest, best or one of {steps}")
        reports = []
        for step in candidates:
            wrong = self._store.find_corruption(step, ("ema",))
            if not wrong:
                return step
            reports.append(f"the checkpoint {self.directory / str(step)} is damaged: " + "; ".join(wrong))
            print(reports[-1], flush=True)
        raise ValueError("\n".join(reports))

    def save(
        self, state: Any, ema_params: Any, *, metrics: dict[str, float] | None = None, window: dict | None = None
    ) -> None:
        """Starts to save the state under its step; it is copied first, and may be donated when this returns.

        Args:
          state: of the task, with a field `step`.
          ema_params: the parameters to evaluate and sample from; saved once, if they are the state's `ema_params`.
          metrics: of this step, for `best`.
          window: `Window.to_json()`, the metrics since the last row.
        """
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        about = {
            "config": self._config,
            "versions": versions,
            "process_count": jax.process_count(),
            "window": window or {},
        }
        self._store.save(
            int(state.step), {"train": _without_ema(state), "ema": ema_params}, about=about, metrics=metrics or None
        )

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`, laid out as `like` (arrays, or ShapeDtypeStructs with shardings).

        Raises:
          ValueError: the checkpoint is of another model; the message lists what differs.
        """
        has_ema = "ema_params" in like.__dataclass_fields__
        restored = self._store.restore(
            step, {"train": _without_ema(like)} | ({"ema": like.ema_params} if has_ema else {})
        )
        return type(like)(**restored["train"], **({"ema_params": restored["ema"]} if has_ema else {}))

    def restore_ema(self, step: int, like) -> dict:
        """The averaged parameters saved at `step`, laid out as `like`; ValueError as `restore`."""
        return self._store.restore(step, {"ema": like})["ema"]

    def about(self, step: int) -> dict:
        """ "config", "versions" of libraries, "process_count" and "window" of the run that saved a checkpoint."""
        return self._store.about(step)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._store.close()


def _without_ema(state: Any) -> dict:
    return {name: getattr(state, name) for name in state.__dataclass_fields__ if name != "ema_params"}
