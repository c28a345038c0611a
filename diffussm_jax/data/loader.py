"""The data loader. The order of records is a pure function of the step.

Row r of batch s is record pi(s * B + r). pi concatenates one permutation of the data set per epoch, which depends only
on the seed and the epoch. So a run resumes from the step number alone, and the order is the same for any number of
processes, threads and devices. Grain prefetches with threads.
"""

import collections
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np

Batch = dict[str, np.ndarray]
# Philox pads a short seed with zeros: [seed, epoch] equals [seed, epoch, 0]. The salt keeps the draws of records
# independent of the draws of the order.
_AUGMENT_SALT = 1


class Records(Protocol):
    """The input of a loader: thread-safe random access to records, each a dict of arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


class Loader:
    """Loads batches of records by step.

    Args:
      batch_size: B, the global batch size.
      seed: of the order; None for the records' own order.
      rows: [b] int, the rows of each global batch that this process reads; None for all.
      num_threads: prefetching threads, one batch each.
      augment: (record, generator) -> record, random augmentation on the host. The generator depends only on the seed
        and the record's position in the order.

    Raises:
      ValueError: there are no records.
    """

    def __init__(
        self,
        records: Records,
        batch_size: int,
        seed: int | None,
        *,
        rows: np.ndarray | None = None,
        num_threads: int = 4,
        augment: Callable[[Batch, np.random.Generator], Batch] | None = None,
    ):
        if not len(records):
            raise ValueError("the data set has no records")
        self.batch_size = batch_size
        self._num_records = len(records)
        self._num_threads = num_threads
        rows = np.arange(batch_size) if rows is None else rows
        stream = grain.MapDataset.source(_Stream(records, batch_size, rows, seed, augment))
        self._batches = stream.batch(len(rows))

    def __len__(self) -> int:
        """The number of batches that cover every record."""
        return -(-self._num_records // self.batch_size)

    def num_rows(self, index: int) -> int:
        """The number of new rows in global batch `index` of a pass; fewer than B in the last batch."""
        return min(self.batch_size, self._num_records - index * self.batch_size)

    def batch(self, step: int) -> Batch:
        """This process's rows of batch `step`, stacked."""
        return self._batches[step]

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """Iterates over `batch(first_step)`, `batch(first_step + 1)`, ... forever, prefetched by threads."""
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=2 * self._num_threads)
        return iter(self._batches[first_step:].to_iter_dataset(options))


class _Stream:
    """The infinite sequence of records that one process reads."""

    def __init__(self, records: Records, batch_size: int, rows: np.ndarray, seed: int | None, augment):
        self._records, self._batch_size, self._rows, self._seed = records, batch_size, rows, seed
        self._augment = augment
        self._order = functools.lru_cache(maxsize=4)(self._make_order)  # prefetching touches few epochs at a time

    def __len__(self) -> int:
        return sys.maxsize // len(self._rows) * len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, row = divmod(index, len(self._rows))
        epoch, position = divmod(step * self._batch_size + int(self._rows[row]), len(self._records))
        record = dict(self._records[int(self._order(epoch)[position])])
        if self._augment is None:
            return record
        seed = [self._seed or 0, epoch, position, _AUGMENT_SALT]
        return self._augment(record, np.random.Generator(np.random.Philox(seed)))

    def _make_order(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(len(self._records))
        return np.random.Generator(np.random.Philox([self._seed, epoch])).permutation(len(self._records))


def prefetch(batches: Iterable[Batch], to_devices: Callable[[Batch], Any], depth: int = 2) -> Iterator[Any]:
    """Prefetches batches to devices.

    Args:
      to_devices: starts the transfer of a batch, without waiting for it.
      depth: number of batches in transfer ahead of the consumer.
    """
    in_transfer: collections.deque = collections.deque()
    for batch in batches:
        in_transfer.append(to_devices(batch))
        if len(in_transfer) > depth:
            yield in_transfer.popleft()
    yield from in_transfer
