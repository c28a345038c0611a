"""Means of the metrics over the steps since the last row was written."""

import jax
import numpy as np


class Window:
    """Collects the scalar metrics of each step on their device, and fetches them when they are needed.

    Sums are float64 in the order of the steps. A checkpoint keeps them as JSON, so that the rows of a resumed run are
    those of a run that was never stopped.

    Args:
      saved: what `to_json` returned, or None.
    """

    def __init__(self, saved: dict | None = None):
        saved = saved or {}
        self._sums: dict[str, float] = dict(saved.get("sums", {}))
        self._num_taken, self._num_skipped = saved.get("num_taken", 0), saved.get("num_skipped", 0)
        self._pending: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of one step, without waiting for them."""
        self._pending.append(metrics)

    def _fetch(self) -> None:
        for metrics in jax.device_get(self._pending):
            if metrics.pop("skipped", 0):
                self._num_skipped += 1
                continue
            self._num_taken += 1
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._pending.clear()

    def to_json(self) -> dict:
        """The window so far, as plain values."""
        self._fetch()
        return {"sums": dict(self._sums), "num_taken": self._num_taken, "num_skipped": self._num_skipped}

    def close(self) -> tuple[dict[str, float], int]:
        """The mean of each metric over the steps taken, and the number of skipped steps; starts a new window."""
        self._fetch()
        means = {name: total / self._num_taken if self._num_taken else np.nan for name, total in self._sums.items()}
        num_skipped = self._num_skipped
        self.__init__()
        return means, num_skipped
