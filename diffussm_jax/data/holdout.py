"""A part of a data set that is held out for evaluation, chosen by a hash of each item's key.

The choice does not depend on the order of the items. An item stays on its side when others are added or removed.
"""

import hashlib
from typing import Any

import numpy as np


def held_out(source: Any, fraction: float) -> np.ndarray:
    """Which items of a source are held out: about `fraction` of them, and at least one.

    An item is held out if the first 8 bytes of its key's SHA-256, as a number in [0, 1), are less than `fraction`.

    Args:
      source: `data.sources.Source` or `data.latents.Latents`, with a method `key(index)`.
      fraction: in (0, 1).

    Returns:
      [len(source)] bool.

    Raises:
      ValueError: the source has no keys, or nothing would be left to train on.
    """
    if not hasattr(source, "key"):
        raise ValueError(f"config.data.holdout = {fraction} needs a source with keys; {source.description} has none")
    digests = (hashlib.sha256(source.key(i).encode("utf-8", "surrogateescape")).digest() for i in range(len(source)))
    hashes = np.fromiter((int.from_bytes(digest[:8], "big") / 2**64 for digest in digests), np.float64, len(source))
    chosen = hashes < fraction
    if not chosen.any():
        chosen[np.argmin(hashes)] = True
    if chosen.all():
        raise ValueError(f"config.data.holdout = {fraction} leaves none of {len(source)} items to train on")
    return chosen


class Subset:
    """Some of the items of a source or of records, in their order.

    Args:
      items: as `data.sources.Source`, or records with `class_names`.
      indices: [n] int, the items to keep.
    """

    def __init__(self, items: Any, indices: np.ndarray):
        self.class_names = items.class_names
        self.description = getattr(items, "description", "")
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._items[int(self._indices[index])]
