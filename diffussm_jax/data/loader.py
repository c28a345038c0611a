"""The order of the data, as a pure function of the step.

Row r of batch s is record pi(s * B + r): pi runs through the whole source in an order that depends on the seed and
the epoch alone, then through the next epoch's. So a run that resumes at step s needs to know nothing but s.
"""

import functools

import numpy as np

from diffussm_jax.data.sources import Source


class Loader:
    """Batches of a source, by step.

    Args:
      source: what to read.
      batch_size: B, the global batch.
      seed: of the order; None for the source's own order.

    Raises:
      ValueError: the source is empty.
    """

    def __init__(self, source: Source, batch_size: int, seed: int | None):
        if not len(source):
            raise ValueError("the data source holds no images")
        self._source = source
        self.batch_size = batch_size
        self._seed = seed
        self._order = functools.lru_cache(maxsize=2)(
            self._make_order
        )  # a batch touches two epochs at most, or all are short

    def __len__(self) -> int:
        """The number of batches that hold every record at least once."""
        return -(-len(self._source) // self.batch_size)

    def _make_order(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(len(self._source))
        return np.random.Generator(np.random.Philox([self._seed, epoch])).permutation(len(self._source))

    def indices(self, step: int) -> np.ndarray:
        """The records of batch `step`, [B] int."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs, within = np.divmod(positions, len(self._source))
        return np.array([self._order(int(epoch))[i] for epoch, i in zip(epochs, within, strict=True)])

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch `step`: "image" [B, H, W, C] uint8 and "label" [B] int32."""
        images, labels = zip(*(self._source[int(i)] for i in self.indices(step)), strict=True)
        return {"image": np.stack(images), "label": np.asarray(labels, np.int32)}
