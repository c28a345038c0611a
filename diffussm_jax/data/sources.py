"""Sources of images. A source has a length, and item i is (image [H, W, C] uint8, label int)."""

from typing import Protocol

import numpy as np

DIGITS_SPLITS = ("train", "eval")
HOLD_OUT_EVERY = 10


class Source(Protocol):
    """What a loader reads from: random access to images and their labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]: ...


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 and gray, in 10 classes (UCI Optical Recognition of Handwritten
    Digits).

    Every tenth is held out as "eval"; "train" is the rest. Their 17 levels of gray are spread over 0 ... 255.

    Raises:
      ValueError: the split is unknown.
    """

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        if split not in DIGITS_SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(DIGITS_SPLITS)}")
        images, labels = load_digits(return_X_y=True)
        is_held_out = np.arange(len(images)) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        chosen = is_held_out if split == "eval" else ~is_held_out
        self._images = np.round(images[chosen].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        self._labels = labels[chosen]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._images[index], int(self._labels[index])
