"""The two interfaces of the training loop: what is trained, and what happens at intervals."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh


class Task(Protocol):
    """What is trained.

    A state is a dataclass and a pytree. The loop reads its fields `step` and `skipped_in_a_row`. If it has a field
    `ema_params`, that must be what `eval_params` returns; the checkpoint then holds it once.

    A task may have two more: a method `warnings`, from the means of a row of metrics to texts by name, which the loop
    prints when their names change; and `costs`, a `models.Costs`, which `plan` and `main` print.

    Attributes:
      mesh: the devices.
      max_skipped_steps: more skipped steps in a row end the run.
      abstract_state: shapes, dtypes and shardings of the state.
      batch_spec: likewise of a global batch.
      multiply_adds: of one forward pass of one example, for the MFU; 0 if unknown.
    """

    mesh: Mesh
    max_skipped_steps: int
    abstract_state: Any
    batch_spec: dict[str, jax.ShapeDtypeStruct]
    multiply_adds: int

    def create_state(self) -> Any:
        """The state before the first step."""

    def train_step(self, state: Any, batch: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        """The next state, and scalar metrics of any names, among them "loss" and "skipped". Donates the state."""

    def eval_step(self, params: Any, batch: dict[str, jax.Array], index: int, num_rows: int) -> dict[str, jax.Array]:
        """Mean metrics over the first `num_rows` rows of held-out batch number `index`."""

    def eval_params(self, state: Any) -> Any:
        """The parameters to evaluate and to sample from; the checkpoint's item "ema"."""

    def state_metrics(self, state: Any) -> dict[str, jax.Array]:
        """Scalars of a state for each row of metrics, such as the norm of its parameters."""


class Hook(NamedTuple):
    """An action at regular intervals during training.

    Attributes:
      name: for error messages.
      every: interval in steps; 0 is never. It also runs after the last step.
      run: (state, step) -> metrics for that step's row. Called in all processes, it must return the same metrics in
        each, and writes files in the first only. It must not keep the state, whose buffers are donated, and must be
        idempotent, because a resumed run may repeat the step. It runs before the checkpoint of that step is saved.
      close: called at the end of training.
    """

    name: str
    every: int
    run: Callable[[Any, int], dict[str, float]]
    close: Callable[[], None] = lambda: None
