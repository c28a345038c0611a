"""Image files in folders, zip and tar files as sources.

Nothing is unpacked to disk. Sources are thread-safe: each read opens the file again, so threads do not wait for each
other, except for memory (`decoding`).
"""

import contextlib
import errno
import hashlib
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import numpy as np
from etils import epath

from diffussm_jax.data.decoding import BrokenImage, decode_file
from diffussm_jax.data.walk import is_hidden, print_left_out, walk, walk_bucket
from diffussm_jax.io import is_bucket

MAX_TARS = 8  # inside each other
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Example(NamedTuple):
    """One item of a source.

    Attributes:
      image: [H, W, C] uint8.
      label: its class; 0 if the source has no classes.
      key: its name in the source.
      conditions: arrays for conditioners other than the label's, by key.
    """

    image: np.ndarray
    label: int
    key: str
    conditions: Mapping[str, np.ndarray] = MappingProxyType({})


def fingerprint(parts: Iterable[object]) -> str:
    """SHA-256, in hex, of the `repr` of all parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\n")
    return digest.hexdigest()


class _Files:
    """Named image files: the rules shared by folders and archives.

    The class of an image is its parent folder; labels number the sorted class names. If no image has a parent folder
    below the split's, there are no labels. Skipped are names that are hidden, in __MACOSX, absolute, contain "..", or
    have no image extension.

    Other images that cannot be read are left out, too: their names and reasons are in `left_out`. Those of the split
    are counted and printed.

    Attributes:
      num_left_out: how many.
    """

    def __init__(
        self, kind: str, path: epath.Path, names: Collection[str], split: str, left_out: Mapping[str, str] | None = None
    ):
        split = split.strip("/")
        prefix = f"{split}/" if split else ""
        self.description = f"{kind} {path.name}" + (f", split {split}" if split else "")
        left_out = {name: "its name leaves the archive" for name in names if _leaves_root(name)} | (left_out or {})
        left_out = {k: v for k, v in left_out.items() if k.lstrip("/").startswith(prefix) or prefix.startswith(f"{k}/")}
        self.num_left_out = len(left_out)
        print_left_out(path, left_out)
        images = [name for name in names if _is_image(name)]
        self._keys = sorted(name for name in images if name.startswith(prefix))
        if not self._keys:
            folders = sorted({name.split("/")[0] for name in images if "/" in name})
            raise ValueError(
                f"no images in {path}, split {split!r} (files ending in {' '.join(IMAGE_EXTENSIONS)}); "
                f"top-level folders with images: {', '.join(folders) or '(none)'}"
            )
        folders = [key[len(prefix) :].rpartition("/")[0].rpartition("/")[2] for key in self._keys]
        self.class_names = tuple(sorted(set(folders) - {""}))
        if self.class_names and "" in folders:
            stray = self._keys[folders.index("")]
            raise ValueError(
                f"{path}: {stray} is in no class folder, but other images are; move it, or remove the folders"
            )
        label_of = {name: label for label, name in enumerate(self.class_names)} | {"": 0}
        self._labels = np.array([label_of[folder] for folder in folders], np.int32)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def __getitem__(self, index: int) -> Example:
        key = self._keys[index]
        try:
            with self._open(key) as (file, num_bytes):
                image = decode_file(file, num_bytes, key)
        except BrokenImage:
            raise
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL is an impossible offset; other errors are of the disk or network
                raise
            raise BrokenImage(key, f"cannot be read: {error}") from error
        except Exception as error:  # zipfile raises a dozen types for damaged members
            raise BrokenImage(key, f"cannot be read: {type(error).__name__}: {error}") from error
        return Example(image, int(self._labels[index]), key)

    def fingerprint(self) -> str:
        return fingerprint((key, self._stamp(key)) for key in self._keys)

    def _open(self, key: str) -> AbstractContextManager[tuple[BinaryIO, int]]:
        """Opens a file, and says its size. An OSError means the source is unreachable, other errors that it is broken.

        The same goes for reading the file.
        """
        raise NotImplementedError

    def _stamp(self, key: str) -> object:
        """A cheap value that changes with the file's content."""
        raise NotImplementedError


def _is_image(name: str) -> bool:
    """Whether a name is an image's. Names that leave the root are not."""
    if name.startswith("/") or not name.lower().endswith(IMAGE_EXTENSIONS):
        return False
    return not any(is_hidden(part) for part in name.split("/"))


def _leaves_root(name: str) -> bool:
    """Whether an image or a tar would lie outside of the folder into which its archive is unpacked."""
    return (name.startswith("/") or ".." in name.split("/")) and name.lower().endswith((*IMAGE_EXTENSIONS, ".tar"))


def _normalize_name(name: str) -> str:
    """Removes the "./" that `tar -C folder .` writes and empty parts from a member's name."""
    return "/" * name.startswith("/") + "/".join(part for part in name.split("/") if part not in ("", "."))


class ImageFolder(_Files):
    """Images in a folder, at any depth, local or remote (gs://...).

    Local links are followed. Of links in circles each folder is read once. Links that lead nowhere and folders that
    may not be listed are left out, counted in `num_left_out`, and printed to stderr.

    Args:
      split: the top-level folder to read; "" for everything.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: no images in the split, images both within and without class folders, or links that lead to a folder
        on more than 1,000 paths.
      OSError: the disk or network fails, or the folder may not be listed.
    """

    def __init__(self, path: epath.PathLike, split: str = ""):
        self._path = epath.Path(path)
        if not self._path.is_dir():
            raise FileNotFoundError(f"no folder {self._path}")
        left_out = {}
        names = walk_bucket(self._path) if is_bucket(self._path) else walk(os.fspath(self._path), left_out)
        super().__init__("folder", self._path, list(names), split, left_out)

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, int]]:
        # Opening a pipe or a device might never end.
        if not is_bucket(self._path) and not stat.S_ISREG(os.stat(self._path / key).st_mode):
            raise ValueError("it is no regular file")
        with (self._path / key).open("rb") as file:
            file.seek(0, os.SEEK_END)
            num_bytes = file.tell()
            file.seek(0)
            yield file, num_bytes

    def _stamp(self, key: str) -> int:
        # In a remote folder a stat is a request, and a job would start with a million of them.
        return 0 if is_bucket(self._path) else os.stat(self._path / key).st_size


class _Member(zipfile.ZipExtFile):
    """Reads little at a time, because LZMA expands all that was read at once, thousandfold."""

    MIN_READ_SIZE = 256  # bytes, compressed

    def read(self, n: int = -1) -> bytes:
        return super().read(self.MIN_READ_SIZE)


def _open_member(file: BinaryIO, member: zipfile.ZipInfo) -> BinaryIO:
    """Opens a member of a zip, at its first byte of which `file` is, such that little more is expanded than is read."""
    if member.compress_type == zipfile.ZIP_BZIP2:
        import bz2  # not part of every Python

        return bz2.BZ2File(file)  # ZipExtFile would expand a block at once, 46 MB of zeros
    is_limited = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    return (zipfile.ZipExtFile if is_limited else _Member)(file, "r", member)


class ImageZip(_Files):
    """Images in a zip file, local or remote, with the arguments and rules of `ImageFolder`.

    Backslashes in names are separators. Images whose names are absolute or contain ".." are left out, counted in
    `num_left_out`, and printed to stderr.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: as for `ImageFolder`, or the file is damaged or truncated.
    """

    def __init__(self, path: epath.PathLike, split: str = ""):
        self._path = epath.Path(path)
        with self._path.open("rb") as file:
            try:
                members = zipfile.ZipFile(file).infolist()
            except Exception as error:  # struct.error, OverflowError, ... and zipfile's own
                raise ValueError(f"{self._path} is not a zip file, or is damaged or cut short: {error}") from error
        # Of two members with the same name the later one is used, as in unzip.
        self._members = {_normalize_name(member.filename.replace("\\", "/")): member for member in members}
        super().__init__("zip", self._path, self._members, split)

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, int]]:
        member = self._members[key]
        if member.flag_bits & 1:
            raise ValueError("it is encrypted")
        with self._path.open("rb") as file:  # ZipFile.read would make all threads wait for one file
            file.seek(member.header_offset)
            signature, name_length, extra_length = struct.unpack("<4s22x2H", file.read(30))
            if signature != b"PK\x03\x04":
                raise ValueError(f"no header at byte {member.header_offset:,}")
            file.seek(name_length + extra_length, os.SEEK_CUR)
            with _open_member(file, member) as content:
                try:
                    yield content, member.file_size
                except OSError as error:
                    if error.errno is None:  # bz2 raises this for damaged data; errors of the system have a number
                        raise ValueError(str(error)) from error
                    raise

    def _stamp(self, key: str) -> tuple[int, int]:
        return self._members[key].file_size, self._members[key].CRC


class ImageTar(_Files):
    """Images in an uncompressed tar file, local or remote, with the arguments and rules of `ImageFolder`.

    A tar inside it is treated as a folder of that name, as in ImageNet's ILSVRC2012_img_train.tar, whose n01440764.tar
    holds n01440764_10026.JPEG, up to a depth of `MAX_TARS`. All headers are read once, at opening. Links, sparse
    members, and images and tars whose names are absolute or contain ".." are left out, counted in `num_left_out`, and
    printed to stderr.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: as for `ImageFolder`, or the file is compressed, damaged or truncated.
    """

    def __init__(self, path: epath.PathLike, split: str = ""):
        self._path = epath.Path(path)
        with self._path.open("rb") as file:
            start, left_out = file.read(8), {}
            for magic, name in _COMPRESSED.items():
                if start.startswith(magic):
                    raise ValueError(f"{self._path} is compressed ({name}), so it has no random access; unpack it")
            try:
                self._members = _index_tar(file, left_out)
            except Exception as error:  # UnicodeDecodeError, KeyError, ... and tarfile's own
                raise ValueError(f"{self._path} is not a tar file, or is damaged or cut short: {error}") from error
        super().__init__("tar", self._path, self._members, split, left_out)

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, int]]:
        offset, num_bytes = self._members[key]
        with self._path.open("rb") as file:
            file.seek(offset)
            yield file, num_bytes

    def _stamp(self, key: str) -> int:
        return self._members[key][1]


def _index_tar(
    file: BinaryIO,
    left_out: dict[str, str],
    parents: tuple[str, ...] = (),
    start: int = 0,
    end: float = float("inf"),
) -> dict[str, tuple[int, int]]:
    """Offset and size of every file in a tar and in its inner tars, by name.

    Args:
      left_out: gets the images and tars that are not among them, with the reasons.
      parents: names of the tars around this one and its own.
    """
    members = {}
    archive, folder = "/".join(parents), "".join(f"{parent[:-4]}/" for parent in parents)
    for name, where in list(_scan_tar(file, start, end)):
        if _leaves_root(name):
            left_out[folder + name] = f"its name leaves the archive {archive}".rstrip()
        elif where is None:
            if _is_image(name):
                left_out[folder + name] = "it is a link or sparse"
        elif not name.lower().endswith(".tar") or any(part.startswith(".") for part in name.split("/")):
            members[folder + name] = where
        elif len(parents) == MAX_TARS:
            left_out[folder + name] = f"a tar in {MAX_TARS} tars"
        else:
            offset, size = where
            members |= _index_tar(file, left_out, (*parents, name), offset, offset + size)
    return members


def _scan_tar(file: BinaryIO, start: int, end: float) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yields (name, (offset, size)) for the files of the tar between the bytes `start` and `end`.

    Links and sparse files have None in place of offset and size.

    Raises:
      tarfile.TarError, ValueError: it is damaged or truncated.
    """
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile keeps all of them, 1 KB each
            if member.size < 0 or member.offset_data + member.size > end:
                raise ValueError(f"{member.name} of {member.size} bytes extends beyond its archive")
            if member.isreg() and not member.issparse():
                yield _normalize_name(member.name), (member.offset_data, member.size)
            elif member.islnk() or member.issym() or member.issparse():
                yield _normalize_name(member.name), None
        # tarfile treats an unreadable header as the end. The true end is a block of zeros.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"neither a header nor the end mark at byte {archive.offset:,}")
