"""Checkpoints of a run, through Orbax: saved in the background, the newest two and the best kept.

A checkpoint has two items, so that sampling reads a quarter of it: "ema", the averaged parameters, and "train", the
rest of the state. "Best" is the lowest loss of the averaged parameters on held-out data.
"""

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from diffussm_jax.training.state import TrainState

NUM_NEWEST = 2
DIRECTORY = "checkpoints"


def _score(metrics: dict[str, float]) -> float:
    return -metrics["eval_loss"]


def check_same_tree(expected, found, what: str) -> None:
    """Raises ValueError, with both lists, where two trees differ in their paths or in the shapes at the same path."""

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

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


class Checkpointer:
    """The checkpoints of a work directory.

    Args:
      workdir: of the run; they lie in its folder "checkpoints".
      is_read_only: whether the folder is only read, as sampling does; else what a killed run left half saved is
        removed.
    """

    def __init__(self, workdir: epath.PathLike, *, is_read_only: bool = False):
        self.directory = epath.Path(workdir).absolute() / DIRECTORY
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=_score,
                best_mode="max",
                preservation_policy=AnyPreservationPolicy(
                    [
                        LatestN(NUM_NEWEST),
                        BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
                    ]
                ),
                create=not is_read_only,
                cleanup_tmp_directories=not is_read_only,
            ),
            # Named, so that the shapes in a checkpoint can be read before the arrays are.
            item_handlers={"train": ocp.StandardCheckpointHandler(), "ema": ocp.StandardCheckpointHandler()},
        )

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def resolve(self, which: str) -> int:
        """The step that "latest", "best" or a number names.

        Raises:
          FileNotFoundError: there is no checkpoint at all.
          ValueError: none has that name.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise ValueError(f"no checkpoint {which!r} in {self.directory}; choose latest, best or one of {steps}")

    def save(self, state: TrainState, eval_loss: float | None = None) -> None:
        """Starts to save the state under its step; it is copied first, and may be donated when this returns."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                train=ocp.args.StandardSave(_without_ema(state)), ema=ocp.args.StandardSave(state.ema_params)
            ),
            metrics=None if eval_loss is None else {"eval_loss": eval_loss},
            force=True,
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, laid out as `like` (arrays, or ShapeDtypeStructs with shardings).

        Raises:
          ValueError: the checkpoint is of another model; the message lists what differs.
        """
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        self._check(step, "ema", like.ema_params)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                train=ocp.args.StandardRestore(_without_ema(like)), ema=ocp.args.StandardRestore(like.ema_params)
            ),
        )
        return TrainState(**restored["train"], ema_params=restored["ema"])

    def restore_ema(self, step: int, like) -> dict:
        """The averaged parameters saved at `step`, laid out as `like`; ValueError as `restore`."""
        self._check(step, "ema", like)
        return self._manager.restore(step, args=ocp.args.Composite(ema=ocp.args.StandardRestore(like)))["ema"]

    def _check(self, step: int, item: str, like) -> None:
        self._manager.wait_until_finished()
        found = self._manager.item_metadata(step)[item]
        check_same_tree(
            like, found.tree if hasattr(found, "tree") else found, f"checkpoint {self.directory / str(step)}"
        )

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _without_ema(state: TrainState) -> dict:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state, "window": state.window}
