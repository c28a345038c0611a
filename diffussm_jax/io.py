"""Files, buckets and trees: what checkpoints, latents, metrics and exports share.

Paths may be local or in a bucket (gs://...). Buckets cannot rename, so an object appears there only when it is whole.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping

import jax
from etils import epath

_CHUNK_BYTES = 1 << 20


def is_bucket(path: epath.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def partial_path(path: epath.Path) -> epath.Path:
    """A name beside `path` to write to before renaming, different for every writer."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file so that a reader sees all of it or none."""
    path = epath.Path(path)
    partial = partial_path(path)
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def read_json(path: epath.Path) -> dict:
    """The object in a JSON file.

    Raises:
      ValueError: the file is damaged: not text, cut, or not an object.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} where an object should be")
    except ValueError as error:  # of text, too
        raise ValueError(f"{path} is damaged: {error}") from error
    return found


def check_writable(path: epath.PathLike) -> None:
    """Makes the folder of a file that is to be written later, and checks that it can be written.

    Raises:
      OSError: it cannot, or the path is a folder. Buckets are not tried.
    """
    path = epath.Path(path)
    if is_bucket(path):
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file is to be written there")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = partial_path(path)
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def file_sha256(path: epath.Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def files_below(folder: epath.Path) -> list[str]:
    """The files below a folder, as sorted paths relative to it."""
    return sorted(
        f"{path.name}/{name}" if name else path.name
        for path in folder.iterdir()
        for name in (files_below(path) if path.is_dir() else [""])
    )


def path_of(key_path, separator: str = "/") -> str:
    """A key path of jax.tree_util as text, "blocks/W0/kernel"."""
    return jax.tree_util.keystr(key_path, simple=True, separator=separator)


def shapes_by_path(tree) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf (anything with a shape) by its path."""
    return {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_same_shapes(expected: Mapping[str, tuple], found: Mapping[str, tuple], message: str) -> None:
    """Raises ValueError, listing every difference below `message`, where two sets of named shapes differ."""
    if expected == found:
        return
    reshaped = [
        f"{k}: {found[k]}, not {expected[k]}" for k in sorted(expected.keys() & found.keys()) if expected[k] != found[k]
    ]
    raise ValueError(
        f"{message}.\n"
        f"  missing: {_only_in(expected, found)}\n"
        f"  unexpected: {_only_in(found, expected)}\n"
        f"  of another shape: {reshaped}"
    )


def _only_in(some: Mapping[str, tuple], others: Mapping[str, tuple]) -> list[str]:
    return [f"{name} {some[name]}" for name in sorted(some.keys() - others.keys())]
