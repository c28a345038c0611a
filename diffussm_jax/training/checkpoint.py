"""Checkpoints of a run with Orbax: saved asynchronously, with checksums and a retention policy.

A checkpoint has three items: "ema", the averaged parameters, which sampling reads alone; "train", the rest of the
state; and "about", the config and the library versions as JSON. The SHA-256 of every file is written before Orbax
renames the checkpoint to its final name, so that a named checkpoint is complete. If a checkpoint is corrupt, it is
quarantined and reported, and the previous one is used.
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

from diffussm_jax.io import check_same_shapes, file_sha256, files_below, is_bucket, read_json, shapes_by_path

NUM_NEWEST = 2
DIRECTORY = "checkpoints"
CHECKSUMS = "checksums.json"
_ABOUT = "about"
_METRICS = "metrics/metrics"  # Orbax's file of the metrics of a step
# Orbax writes these after the checksums, when it renames a checkpoint. They are not read.
_METADATA = "_CHECKPOINT_METADATA"
_WITHOUT_CHECKSUM = (_METADATA, "commit_success.txt")
_PACKAGES = ("diffussm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
# Parts of old checkpoints that are ignored. Up to format 1 the sums of metrics were in the state.
_RETIRED = ("window/",)


class Best(NamedTuple):
    """The metric that selects the best checkpoint, and whether "min" or "max" is best.

    A checkpoint without that metric is the worst.
    """

    metric: str = "eval_loss"
    mode: str = "min"

    def score(self, metrics: Mapping[str, float] | None) -> float:
        """The score to maximise."""
        value = (metrics or {}).get(self.metric)
        if value is None or not math.isfinite(value):
            return -math.inf
        return value if self.mode == "max" else -value


EVAL_LOSS = Best()


class Store:
    """Pytrees of arrays on disk, by step and item, with checksums.

    Args:
      directory: has one folder per step.
      items: names of the pytrees of a step.
      policy: which steps are kept; all if None.
      best: the metric of `best_step`.
      is_read_only: if False, incomplete saves of a killed run are deleted, and steps whose metrics are damaged are
        quarantined and reported.
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
        self.directory, self._best = directory, best
        if not is_read_only:
            self._quarantine_damaged_metrics()
        options = ocp.CheckpointManagerOptions(
            best_fn=best.score if best else None,
            best_mode="max",
            # Else Orbax reads the metrics of all steps here, and fails if those of one are damaged.
            lightweight_initialize=is_read_only,
            preservation_policy=policy,
            create=not is_read_only,
            cleanup_tmp_directories=not is_read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._handlers = {item: ocp.PyTreeCheckpointHandler() for item in items} | {_ABOUT: ocp.JsonCheckpointHandler()}
        self._manager = self._make_manager(options)
        self._being_saved: int | None = None

    def _make_manager(self, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
        def make():
            return ocp.CheckpointManager(self.directory, options=options, item_handlers=self._handlers)

        try:
            return make()
        except Exception as error:  # of any type, for damage in these files, which hold times that nothing needs
            damaged = list(self.directory.glob(f"*/{_METADATA}"))
            if not damaged or jax.process_count() > 1:
                raise
            print(f"Orbax cannot read {damaged[0].name} of a checkpoint ({error}); it is deleted.", flush=True)
            for path in damaged:
                path.unlink()
            return make()

    def steps(self) -> list[int]:
        """All steps, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the best metric, the latest of equal ones; None if no step has metrics that can be read."""
        found = {step: self._read_metrics(step) for step in self.steps()}
        scores = [(self._best.score(metrics), step) for step, metrics in found.items() if isinstance(metrics, dict)]
        return max(scores)[1] if scores else None

    def _read_metrics(self, step: int) -> dict | ValueError | None:
        """The metrics of a step; None if it has none, or the error if they are damaged."""
        path = self.directory / str(step) / _METRICS
        try:
            metrics = read_json(path)
            if not all(map(_is_number, metrics.values())):
                raise ValueError(f"{path} holds {metrics!r}, which are no metrics")
        except FileNotFoundError:
            return None
        except ValueError as error:
            return error
        return metrics

    def _quarantine_damaged_metrics(self) -> None:
        if jax.process_index() == 0 and self.directory.exists():
            for step in sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal()):
                if isinstance(error := self._read_metrics(step), ValueError):
                    aside = self.quarantine(step)
                    print(f"The checkpoint of step {step} was moved to {aside}: {error}", flush=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("metrics of checkpoints are read")

    def save(self, step: int, items: dict, *, about: dict | None = None, metrics: dict | None = None) -> None:
        """Starts an asynchronous save. The arguments are copied first, and may be donated after the return."""
        self._manager.wait_until_finished()
        self._being_saved = step
        arguments = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        arguments[_ABOUT] = ocp.args.JsonSave(about or {})
        self._manager.save(step, args=ocp.args.Composite(**arguments), metrics=metrics, force=True)

    def _write_checksums(self) -> None:
        """Called by Orbax, in its thread, after it has written all files of a step and before it renames them."""
        if jax.process_index():
            return
        prefix = f"{self._being_saved}.orbax-checkpoint-tmp"
        unfinished = [path for path in self.directory.iterdir() if path.name.startswith(prefix)]
        # Buckets cannot rename: there the folder has its final name from the start.
        folder = unfinished[0] if unfinished else self.directory / str(self._being_saved)
        sums = {name: file_sha256(folder / name) for name in files_below(folder) if name not in _WITHOUT_CHECKSUM}
        (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))

    def find_corruption(self, step: int, items: tuple[str, ...] | None = None) -> list[str]:
        """Lists the corrupt files of a step (or of some of its items), one line each; empty if all are valid."""
        folder = self.directory / str(step)
        try:
            sums = read_json(folder / CHECKSUMS)
        except (OSError, ValueError) as error:
            return [f"{CHECKSUMS} cannot be read: {error}"]
        found, wrong = set(files_below(folder)) - {*_WITHOUT_CHECKSUM, CHECKSUMS}, []
        for name in sorted(found | sums.keys()):
            if items is not None and name.partition("/")[0] not in (*items, _ABOUT):
                continue
            if name not in sums:
                wrong.append(f"{name} has no checksum")
            elif name not in found:
                wrong.append(f"{name} is missing")
            elif (digest := file_sha256(folder / name)) != sums[name]:
                wrong.append(f"{name}: SHA-256 is {digest}, was {sums[name]}")
        return wrong

    def quarantine(self, step: int) -> epath.Path:
        """Moves the folder of a step to "DIRECTORY_damaged" without deleting anything. Returns its new path."""
        folder, aside = self.directory / str(step), self.directory.parent / f"{self.directory.name}_damaged"
        names = itertools.chain([str(step)], (f"{step}.{number}" for number in itertools.count(1)))
        target = next(aside / name for name in names if not (aside / name).exists())
        if not is_bucket(folder):
            aside.mkdir(exist_ok=True)
            return folder.rename(target)
        for name in files_below(folder):  # buckets cannot rename folders
            (folder / name).copy(target / name)
        folder.rmtree()
        return target

    def reload(self) -> None:
        """Lists the steps on disk again."""
        self._manager.reload()

    def restore(self, step: int, like: dict) -> dict:
        """Restores the items of a step that are in `like`, with its shapes and shardings.

        Args:
          like: trees of arrays or ShapeDtypeStructs, by item.

        Raises:
          ValueError: the checkpoint is of another model. The message lists the differences.
        """
        self._manager.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = {}
        for item, tree in like.items():
            found = shapes_by_path(self._metadata(step, item))
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
                partial_restore=bool(retired),  # Orbax would skip missing parts too, so they are checked above
            )
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {item: restored[item] for item in like}

    def _metadata(self, step: int, item: str) -> dict:
        """The tree of an item, with shapes in place of arrays."""
        found = self._handlers[item].metadata(self.directory / str(step) / item)
        return getattr(found, "tree", found)

    def restore_scalars(self, step: int, item: str, group: str) -> dict[str, float]:
        """The scalars of a top-level group of an item, by name; empty if there is no such group."""
        names = self._metadata(step, item).get(group, {})
        if not names:
            return {}
        tree = {group: {name: np.zeros(()) for name in names}}
        arguments = ocp.args.PyTreeRestore(
            tree,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree),
            partial_restore=True,
        )
        restored = self._manager.restore(step, args=ocp.args.Composite(**{item: arguments}))[item][group]
        return {name: float(value) for name, value in restored.items()}

    def about(self, step: int) -> dict:
        """The JSON data saved with a step."""
        return self._manager.restore(step, args=ocp.args.Composite(**{_ABOUT: ocp.args.JsonRestore()}))[_ABOUT]

    def close(self) -> None:
        """Waits for pending writes."""
        self._manager.wait_until_finished()
        self._manager.close()


class Checkpointer:
    """The checkpoints of a work directory: the newest two, the best, and multiples of `keep_every`.

    Args:
      workdir: of the run; checkpoints are in its folder "checkpoints".
      config: of the run, as plain values; saved with each checkpoint.
      keep_every: multiples of it are kept forever; 0 for none.
      best: selects the best; the lowest loss on held-out data by default.
      is_read_only: for sampling, see `Store`.
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
        """All steps, ascending."""
        return self._store.steps()

    def latest_valid_step(self) -> int | None:
        """The step of the latest checkpoint with valid checksums, or None. Corrupt ones are quarantined and reported.

        With several hosts, the first host checks and broadcasts the step.
        """
        found = -1
        if jax.process_index() == 0:
            for step in reversed(self._store.steps()):
                wrong = self._store.find_corruption(step)
                if not wrong:
                    found = step
                    break
                aside = self._store.quarantine(step)
                report = f"The checkpoint of step {step} is damaged and was moved to {aside}; the previous one is used."
                print("\n  ".join([report, *wrong]), flush=True)
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        self._store.reload()
        return None if found == -1 else found

    def resolve(self, which: str) -> int:
        """Converts "latest", "best" or a number to a step. "latest" skips corrupt checkpoints and reports them.

        Raises:
          FileNotFoundError: there are no checkpoints.
          ValueError: there is no such checkpoint, or it is corrupt.
        """
        steps = self._store.steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        if which == "latest":
            candidates = steps[::-1]
        elif which == "best":
            best = self._store.best_step()
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
        """Starts an asynchronous save of the state. It is copied first, and may be donated after the return.

        Args:
          state: of the task, with a field `step`.
          ema_params: the parameters for evaluation and sampling. The state's own `ema_params` are not saved again.
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
            int(state.step), {"train": _without_ema(state), "ema": ema_params}, about=about, metrics=metrics or {}
        )

    def restore(self, step: int, like: Any) -> Any:
        """Restores the state of a step, with the shapes and shardings of `like` (arrays or ShapeDtypeStructs).

        Raises:
          ValueError: the checkpoint is of another model. The message lists the differences.
        """
        has_ema = "ema_params" in like.__dataclass_fields__
        restored = self._store.restore(
            step, {"train": _without_ema(like)} | ({"ema": like.ema_params} if has_ema else {})
        )
        return type(like)(**restored["train"], **({"ema_params": restored["ema"]} if has_ema else {}))

    def restore_ema(self, step: int, like) -> dict:
        """Restores the averaged parameters of a step; see `restore`."""
        return self._store.restore(step, {"ema": like})["ema"]

    def about(self, step: int) -> dict:
        """ "config", "versions" of libraries, "process_count" and "window" of the run that saved a checkpoint."""
        about = self._store.about(step)
        if "window" not in about:  # format 1
            sums = self._store.restore_scalars(step, "train", "window")
            counts = {"num_taken": int(sums.pop("count", 0)), "num_skipped": int(sums.pop("skipped", 0))}
            about["window"] = {"sums": sums, **counts}
        return about

    def close(self) -> None:
        """Waits for pending writes."""
        self._store.close()


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that fits a float."""
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 1023)


def _without_ema(state: Any) -> dict:
    return {name: getattr(state, name) for name in state.__dataclass_fields__ if name != "ema_params"}
