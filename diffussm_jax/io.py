"""Files, buckets and trees: what checkpoints, latents, metrics and exports share.

Paths may be local or in a bucket (gs://...). Buckets cannot rename, so an object appears there only when it is whole.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

_CHUNK_BYTES = 1 << 20
_SCHEMES = ("gs", "s3")  # of buckets
_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what flock gives on file systems that have none


def is_bucket(path: epath.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def check_path(path: str) -> None:
    """Checks a path of the command line before any work.

    Raises:
      ValueError: it is not UTF-8, which the libraries that write there need, or is neither local nor in a bucket.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the path {path!r} is not valid UTF-8: choose another name") from error
    scheme, separator, _ = path.partition("://")
    if separator and scheme not in _SCHEMES:
        raise ValueError(f"the path {path!r} must be local, gs://... or s3://...")


def cache_folder() -> Path:
    """The user's folder of what can be made again: $XDG_CACHE_HOME/diffussm_jax, by default ~/.cache/diffussm_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffussm_jax"


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
    except (ValueError, RecursionError) as error:  # not text, not JSON, or nested without end
        raise ValueError(f"{path} is damaged: {error}") from error
    return found


# What damaged .npz files raise, beside what NumPy says of pickled objects.
NPZ_ERRORS = (ValueError, TypeError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error)


def read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Nothing is unpickled.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: it is damaged, or holds more than plain arrays.
    """
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = dict(arrays)
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("not all of its files are arrays")
    except NPZ_ERRORS as error:
        raise ValueError(
            f"{path} is damaged, no .npz, or holds pickled objects, which are never unpickled: {error}"
        ) from error
    return found


_SAFETENSORS_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}


def read_safetensors(
    path: epath.PathLike, dtypes: tuple[str, ...] = ("F32", "F16", "BF16")
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; bfloat16 too, which `safetensors.numpy` does not read.

    Args:
      path: of the file.
      dtypes: that are allowed, by the names of safetensors.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: it is damaged, or a tensor has another dtype.
    """
    content = epath.Path(path).read_bytes()
    try:
        entries = safetensors.deserialize(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{path}: tensor {name} is of dtype {entry['dtype']}; supported is {', '.join(dtypes)}")
        tensors[name] = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, header.get("__metadata__") or {}


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


@contextlib.contextmanager
def folder_lock(folder: epath.PathLike, name: str) -> Iterator[None]:
    """Holds the file NAME.lock in a folder, so that a second writer fails at once and harms nothing.

    The lock is `flock`'s. The kernel releases it when the process ends in any way, also by SIGKILL, so that a lock file
    that was left behind is taken over at once, even if its pid is another process's by now. The file says who holds it;
    it is deleted at the end. The folder is made if it does not exist. Buckets have no lock.

    Network file systems: NFS and most others share the lock between hosts. Some do not (Lustre mounted with localflock,
    NFS with local_lock), and this cannot be seen. A preempted run often goes on on another host, so a file that another
    host left behind is taken over as well, and a notice is printed. Where a file system has no locks, a warning is
    printed, and nothing stops a second writer.

    Raises:
      ValueError: the lock is held. The message says by whom.
      OSError: the folder cannot be written.
    """
    if is_bucket(folder):
        yield
        return
    path = epath.Path(folder) / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(_take_lock(path)) as file:
        try:
            yield
        finally:
            if _is_at(path, file):  # and not deleted by hand, and the lock of another by now
                path.unlink()  # before the lock is released


def _take_lock(path: epath.Path) -> TextIO:
    """The open lock file. Closing it releases the lock."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # not inherited by programs that are started
        try:
            if _flock(file) and not _is_at(path, file):  # its holder deleted it after it was opened
                file.close()
                continue
            before = _lock_record(file)
            host = socket.gethostname()
            if before.get("host", host) != host:
                print(
                    f"{path.parent} was in use by {_lock_holder(before)}, which did not release it. It is taken over; "
                    "stop that process if it still runs",
                    flush=True,
                )
            us = {"host": host, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            file.truncate(0)
            file.write(json.dumps(us))
            file.flush()
            return file
        except BaseException:
            file.close()
            raise


def _flock(file: TextIO) -> bool:
    """Locks a file. Returns False, after a warning, if its file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        folder, holder = os.path.dirname(file.name), _lock_holder(_lock_record(file))
        raise ValueError(f"{folder} is in use by {holder}. Wait for it, stop it, or choose another folder") from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        print(f"{file.name} cannot be locked ({error}): nothing stops a second program from writing there", flush=True)
        return False
    return True


def _is_at(path: epath.Path, file: TextIO) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock_record(file: TextIO) -> dict:
    """What a lock file says of its holder; empty if it is being written, or its writing was cut."""
    file.seek(0)
    try:
        record = json.loads(file.read())
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _lock_holder(record: dict) -> str:
    pid, host, since = (record.get(key, "unknown") for key in ("pid", "host", "since"))
    return f"process {pid} on host {host} (since {since})"


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


def weights_hash(params: Any) -> str:
    """SHA-256 (64 hex digits) of the names, shapes, dtypes and float32 values of a pytree; independent of sharding.

    It records which weights made a latent data set, samples or scores.
    """
    digest = hashlib.sha256()
    named = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for name, leaf in sorted(named.items()):
        digest.update(f"{name} {list(leaf.shape)} {np.dtype(leaf.dtype).name}\n".encode())
        digest.update(np.ascontiguousarray(leaf, "<f4").tobytes())
    return digest.hexdigest()


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
