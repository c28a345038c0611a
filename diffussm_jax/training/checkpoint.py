"""Checkpoints of a run, through Orbax: saved in the background, with checksums, and kept by a policy.

A checkpoint has three items: "ema", the averaged parameters, so that sampling reads a part of it only; "train", the
rest of the state; and "about", the config and the versions of libraries as JSON. Before Orbax gives it its final name,
the SHA-256 of every file is written beside them: a checkpoint is whole or has no name, and one that was damaged later
is found out, set aside and reported, and the one before it used.
"""

import importlib.metadata
import itertools
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from diffussm_jax.data.latents import file_sha256
from diffussm_jax.parallel.sharding import path_of
from diffussm_jax.training.state import TrainState

NUM_NEWEST = 2
DIRECTORY = "checkpoints"
CHECKSUMS = "checksums.json"
_ABOUT = "about"
# Orbax writes these after the checksums, when it gives a checkpoint its name; nothing is read from them.
_WITHOUT_CHECKSUM = ("_CHECKPOINT_METADATA", "commit_success.txt")
_PACKAGES = ("diffussm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def _score(metrics: dict[str, float]) -> float:
    return -metrics["eval_loss"]


def check_same_tree(expected, found, what: str) -> None:
    """Raises ValueError, with both lists, where two trees differ in their paths or in the shapes at the same path."""

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_of(path): tuple(leaf.shape) for path, leaf in leaves}

    expected, found = shapes(expected), shapes(found)
    if expected == found:
        return
    reshaped = [
        f"{k}: {found[k]}, not {expected[k]}" for k in sorted(expected.keys() & found.keys()) if expected[k] != found[k]
    ]
    raise ValueError(
        f"{what} does not hold the parameters of this model.\n"
        f"  missing there: {sorted(expected.keys() - found.keys())}\n"
        f"  unknown here: {sorted(found.keys() - expected.keys())}\n"
        f"  of another shape: {reshaped}"
    )


class Store:
    """Pytrees of arrays on disk, by step and item, with checksums.

    Args:
      directory: where they lie, each step in a folder of its own.
      items: names of the pytrees of a step.
      policy: which steps are kept; all if None.
      is_read_only: whether the folder is only read; else what a killed run left half saved is removed.
    """

    def __init__(
        self,
        directory: epath.Path,
        items: tuple[str, ...],
        *,
        policy: AnyPreservationPolicy | None = None,
        is_read_only: bool = False,
    ):
        self.directory = directory
        options = ocp.CheckpointManagerOptions(
            best_fn=_score if policy else None,
            best_mode="max",
            preservation_policy=policy,
            create=not is_read_only,
            cleanup_tmp_directories=not is_read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        # Named, so that the shapes in a checkpoint can be read before the arrays are.
        handlers = {item: ocp.StandardCheckpointHandler() for item in items} | {_ABOUT: ocp.JsonCheckpointHandler()}
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
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
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
        sums = {name: file_sha256(folder / name) for name in _files(folder) if name not in _WITHOUT_CHECKSUM}
        (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))

    def damage(self, step: int, items: tuple[str, ...] | None = None) -> list[str]:
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

    def set_aside(self, step: int) -> epath.Path:
        """Moves a step's folder out of the way, and returns where to; nothing of it is lost."""
        folder, aside = self.directory / str(step), self.directory.parent / f"{self.directory.name}_damaged"
        names = itertools.chain([str(step)], (f"{step}.{number}" for number in itertools.count(1)))
        target = next(aside / name for name in names if not (aside / name).exists())
        if "://" not in str(folder):
            aside.mkdir(exist_ok=True)
            return folder.rename(target)
        for name in _files(folder):  # buckets have no folders that could be renamed
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
        metadata = self._manager.item_metadata(step)
        for item, tree in like.items():
            found = metadata[item]
            found = found.tree if hasattr(found, "tree") else found
            check_same_tree(tree, found, f"{item} of {self.directory / str(step)}")
        arguments = {item: ocp.args.StandardRestore(tree) for item, tree in like.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {item: restored[item] for item in like}

    def about(self, step: int) -> dict:
        """What was written about a step."""
        return self._manager.restore(step, args=ocp.args.Composite(**{_ABOUT: ocp.args.JsonRestore()}))[_ABOUT]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _files(folder: epath.Path) -> list[str]:
    """The files below a folder, as paths relative to it."""
    return sorted(
        f"{path.name}/{name}" if name else path.name
        for path in folder.iterdir()
        for name in (_files(path) if path.is_dir() else [""])
    )


class Checkpointer:
    """The checkpoints of a work directory: the newest two, the best, and one every so many steps.

    "Best" is the lowest loss of the averaged parameters on held-out data.

    Args:
      workdir: of the run; they lie in its folder "checkpoints".
      config: the run's, as plain values, to be kept in each.
      keep_every: checkpoints at multiples of so many steps are kept for good; 0: none.
      is_read_only: whether the folder is only read, as sampling does.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        config: dict | None = None,
        keep_every: int = 0,
        is_read_only: bool = False,
    ):
        self.directory = epath.Path(workdir).absolute() / DIRECTORY
        self._config = config or {}
        policies = [LatestN(NUM_NEWEST), BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)]
        if keep_every:
            policies.append(EveryNSteps(keep_every))
        self._store = Store(
            self.directory, ("train", "ema"), policy=AnyPreservationPolicy(policies), is_read_only=is_read_only
        )

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending."""
        return self._store.steps()

    def newest_sound_step(self) -> int | None:
        """The newest checkpoint whose files are what was saved, or None. Newer ones are set aside, and reported.

        On several hosts the first one looks, and all use what it found.
        """
        found = -1
        if jax.process_index() == 0:
            for step in reversed(self._store.steps()):
                wrong = self._store.damage(step)
                if not wrong:
                    found = step
                    break
                aside = self._store.set_aside(step)
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
            wrong = self._store.damage(step, ("ema",))
            if not wrong:
                return step
            reports.append(f"the checkpoint {self.directory / str(step)} is damaged: " + "; ".join(wrong))
            print(reports[-1], flush=True)
        raise ValueError("\n".join(reports))

    def save(self, state: TrainState, eval_loss: float | None = None) -> None:
        """Starts to save the state under its step; it is copied first, and may be donated when this returns."""
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        self._store.save(
            int(state.step),
            {"train": _without_ema(state), "ema": state.ema_params},
            about={"config": self._config, "versions": versions, "process_count": jax.process_count()},
            metrics=None if eval_loss is None else {"eval_loss": eval_loss},
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, laid out as `like` (arrays, or ShapeDtypeStructs with shardings).

        Raises:
          ValueError: the checkpoint is of another model; the message lists what differs.
        """
        restored = self._store.restore(step, {"train": _without_ema(like), "ema": like.ema_params})
        return TrainState(**restored["train"], ema_params=restored["ema"])

    def restore_ema(self, step: int, like) -> dict:
        """The averaged parameters saved at `step`, laid out as `like`; ValueError as `restore`."""
        return self._store.restore(step, {"ema": like})["ema"]

    def about(self, step: int) -> dict:
        """ "config", "versions" of libraries and "process_count" of the run that saved a checkpoint."""
        return self._store.about(step)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._store.close()


def _without_ema(state: TrainState) -> dict:
    return {name: getattr(state, name) for name in state.__dataclass_fields__ if name != "ema_params"}
