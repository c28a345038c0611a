"""Names that TensorFlow Datasets can hold."""

import re
from collections.abc import Sequence


def check_split_name(split: str) -> None:
    """Raises ValueError unless TFDS allows the name."""
    if not re.fullmatch(r"\w[\w-]*", split) or split == "all":
        raise ValueError(f"a split's name is letters, digits, _ and -, and not 'all'; got {split!r}")


def check_class_names(class_names: Sequence[str]) -> None:
    """Checks that TFDS reads the class names back.

    Its file label.labels.txt has a name a line; it strips them and drops empty ones, so that later ones would shift.

    Raises:
      ValueError: a name is empty, has a line break, or begins or ends with white space.
    """
    for name in class_names:
        if not name or name != name.strip() or "\n" in name or "\r" in name:
            raise ValueError(
                f"the class {name!r} is empty, has a line break, or begins or ends with white space, which TFDS's "
                "list of classes cannot hold: rename its folder"
            )
