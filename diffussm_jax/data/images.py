"""Images in files: from a file's bytes to RGB pixels, and folders, zip and tar files as sources.

Nothing is ever unpacked to disk. Many threads may read one source; each read opens the file anew, so none waits for
another.
"""

import errno
import hashlib
import io
import os
import stat
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from diffussm_jax.io import is_bucket

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
MAX_ENCODED_BYTES = 1 << 30  # of one image in an archive, whose header may claim anything
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Pillow would also open formats that run other programs (EPS calls Ghostscript); these it reads by itself.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

# Pillow imports its plugins when it first needs them, which fails in a thread while another library, TFDS for one, has
# replaced `__import__` to import lazily.
Image.init()

# Odd metadata of one image in a million is no news, and `warnings.catch_warnings` is not for threads.
for _category in (UserWarning, RuntimeWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")


class Example(NamedTuple):
    """One item of a source.

    Attributes:
      image: [H, W, C] uint8.
      label: its class; 0 where the source has none.
      key: its name in the source.
      conditions: arrays for other conditioners than the label's, by their keys.
    """

    image: np.ndarray
    label: int
    key: str
    conditions: Mapping[str, np.ndarray] = MappingProxyType({})


class BrokenImage(ValueError):  # noqa: N818 - it says what the item is
    """An item of a source that cannot be read or decoded; the message names its key and the reason."""

    def __init__(self, key: str, reason: object):
        super().__init__(key, reason)  # both, so that it survives pickling

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


def decode_image(data: bytes, key: str) -> np.ndarray:
    """Decodes an image file: JPEG, PNG, WebP, BMP, GIF, TIFF or PNM, by its content, not by its name.

    Gray, palettes, CMYK and 16 bits become 8-bit RGB, transparency is laid on white, the rotation that EXIF asks for is
    done, and of an animation the first frame counts.

    Args:
      data: the file's content.
      key: its name, for messages.

    Returns:
      [H, W, 3] uint8, read-only.

    Raises:
      BrokenImage: no such image, cut short, damaged, or of more than `MAX_PIXELS` pixels by its header.
    """
    if not data:
        raise BrokenImage(key, "the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size  # from the header: nothing is decoded yet
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(_to_rgb(image))
    except Image.UnidentifiedImageError as error:
        raise BrokenImage(key, f"not an image of a known format ({', '.join(_FORMATS)})") from error
    except Exception as error:  # Pillow raises a dozen unrelated types for damaged files
        raise BrokenImage(key, f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):  # I, I;16, I;16B, ...
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        on_white = Image.new("RGB", image.size, "white")
        on_white.paste(image, mask=image)
        return on_white
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit gray, [0, 65535] spread over [0, 255]; Pillow's own conversion clips."""
    values = np.asarray(image)
    # Mode "I" also holds 32-bit TIFFs, and nothing says what their black and white are.
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"gray values {values.min()} ... {values.max()}, outside of 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def fingerprint(parts: Iterable[object]) -> str:
    """sha256, in hex, of what the parts' `repr` says."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\n")
    return digest.hexdigest()


class _Files:
    """Named image files: the rules that folders and archives share.

    The label is the folder that holds the image directly, among the sorted names of all such folders; where no image
    has a folder (below the split's), there are no labels. Names that are hidden, __MACOSX, absolute, contain "..", or
    do not end as images do are passed over.
    """

    def __init__(self, kind: str, path: epath.Path, names: Collection[str], split: str):
        split = split.strip("/")
        prefix = f"{split}/" if split else ""
        self.description = f"{kind} {path.name}" + (f", split {split}" if split else "")
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
            raise ValueError(f"{path}: {stray} is in no class folder, others are; move it, or remove the folders")
        label_of = {name: label for label, name in enumerate(self.class_names)} | {"": 0}
        self._labels = np.array([label_of[folder] for folder in folders], np.int32)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Example:
        key = self._keys[index]
        try:
            data = self._read(key)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a lost disk or network is no broken image; an offset that cannot be is
                raise
            raise BrokenImage(key, f"cannot be read: {error}") from error
        except Exception as error:  # zipfile raises a dozen types for damaged members
            raise BrokenImage(key, f"cannot be read: {type(error).__name__}: {error}") from error
        return Example(decode_image(data, key), int(self._labels[index]), key)

    def fingerprint(self) -> str:
        return fingerprint((key, self._stamp(key)) for key in self._keys)

    def _read(self, key: str) -> bytes:
        """The file's content. An OSError says that the source is out of reach, anything else that it is broken."""
        raise NotImplementedError

    def _stamp(self, key: str) -> object:
        """What tells cheaply that the file's content changed."""
        raise NotImplementedError


def _is_image(name: str) -> bool:
    """By its name; names that climb out of the root are none."""
    if name.startswith("/") or not name.lower().endswith(IMAGE_EXTENSIONS):
        return False
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _normal(name: str) -> str:
    """A member's name without the "./" that `tar -C folder .` writes, and without empty parts."""
    return "/" * name.startswith("/") + "/".join(part for part in name.split("/") if part not in ("", "."))


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_ENCODED_BYTES:
        raise ValueError(f"{num_bytes:,} bytes, more than {MAX_ENCODED_BYTES:,}")


class ImageFolder(_Files):
    """Images in a folder, at any depth, local or remote (gs://...); local links are followed.

    Args:
      path: the folder.
      split: the top-level folder to take; "" for everything.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no images in the split, or images both within and without class folders.
    """

    def __init__(self, path: epath.PathLike, split: str = ""):
        self._path = epath.Path(path)
        if not self._path.is_dir():
            raise FileNotFoundError(f"no folder {self._path}")
        super().__init__("folder", self._path, list(_walk(self._path)), split)

    def _read(self, key: str) -> bytes:
        if not is_bucket(self._path):
            about = os.stat(self._path / key)
            if not stat.S_ISREG(about.st_mode):  # reading a pipe or a device might never end
                raise ValueError("it is no regular file")
            _check_size(about.st_size)
        return (self._path / key).read_bytes()

    def _stamp(self, key: str) -> int:
        # Where the folder is remote, a stat is a request: a million of them to start a job is too much.
        return 0 if is_bucket(self._path) else os.stat(self._path / key).st_size


def _walk(root: epath.Path) -> Iterator[str]:
    """The files below root, by their relative names."""
    start = os.fspath(root)
    for folder, subfolders, names in root.walk() if is_bucket(root) else os.walk(start, followlinks=True):
        folder = os.fspath(folder)
        below = folder.split("://")[-1].removeprefix(start.split("://")[-1])  # some backends drop the scheme
        yield from (f"{below}/{name}".lstrip("/") for name in names)
        if not is_bucket(root):
            subfolders[:] = [name for name in subfolders if not _leads_up(os.path.join(folder, name))]


def _leads_up(path: str) -> bool:
    """Whether a link leads to a folder that it is in, and so would be walked for ever."""
    above = os.path.realpath(os.path.dirname(path)) + os.sep
    return os.path.islink(path) and above.startswith(os.path.join(os.path.realpath(path), ""))


class ImageZip(_Files):
    """Images in a zip file, local or remote; arguments and rules as `ImageFolder`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: as `ImageFolder`; or the file is damaged or cut short.
    """

    def __init__(self, path: epath.PathLike, split: str = ""):
        self._path = epath.Path(path)
        with self._path.open("rb") as file:
            try:
                members = zipfile.ZipFile(file).infolist()
            except Exception as error:  # struct.error, OverflowError, ... beside its own
                raise ValueError(f"{self._path} is not a zip file, or is damaged or cut short: {error}") from error
        # Of two members of one name the later counts, as it does for unzip.
        self._members = {_normal(member.filename): member for member in members}
        super().__init__("zip", self._path, self._members, split)

    def _read(self, key: str) -> bytes:
        member = self._members[key]
        _check_size(member.file_size)
        if member.flag_bits & 1:
            raise ValueError("it is encrypted")
        with self._path.open("rb") as file:  # ZipFile.read would let all threads wait for one file
            file.seek(member.header_offset)
            signature, name_length, extra_length = struct.unpack("<4s22x2H", file.read(30))
            if signature != b"PK\x03\x04":
                raise ValueError(f"no header at byte {member.header_offset:,}")
            file.seek(name_length + extra_length, os.SEEK_CUR)
            with zipfile.ZipExtFile(file, "r", member) as content:
                try:
                    return content.read()
                except OSError as error:
                    if error.errno is None:  # what bz2 raises for damaged data; the system's have a number
                        raise ValueError(str(error)) from error
                    raise

    def _stamp(self, key: str) -> tuple[int, int]:
        return self._members[key].file_size, self._members[key].CRC


class ImageTar(_Files):
    """Images in an uncompressed tar file, local or remote; arguments and rules as `ImageFolder`.

    A tar within it counts as a folder of its name, as in ImageNet's ILSVRC2012_img_train.tar, whose n01440764.tar holds
    n01440764_10026.JPEG. All headers are read once, when it is opened. Links and sparse members are passed over.

    Raises:
      FileNotFoundError: no such file.
      ValueError: as `ImageFolder`; or the file is compressed, damaged or cut short.
    """

    def __init__(self, path: epath.PathLike, split: str = ""):
        self._path = epath.Path(path)
        with self._path.open("rb") as file:
            start = file.read(8)
            for magic, name in _COMPRESSED.items():
                if start.startswith(magic):
                    raise ValueError(f"{self._path} is compressed ({name}), so it has no random access: unpack it")
            try:
                self._members = _index_tar(file)
            except Exception as error:  # UnicodeDecodeError, KeyError, ... beside its own
                raise ValueError(f"{self._path} is not a tar file, or is damaged or cut short: {error}") from error
        super().__init__("tar", self._path, self._members, split)

    def _read(self, key: str) -> bytes:
        offset, size = self._members[key]
        _check_size(size)
        with self._path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ValueError(f"{self._path.name} is cut short")
        return data

    def _stamp(self, key: str) -> int:
        return self._members[key][1]


def _index_tar(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Offset and size of every file in a tar and in the tars within it, by name."""
    members = {}
    for name, (offset, size) in list(_scan_tar(file, 0)):
        if name.lower().endswith(".tar") and not any(part.startswith(".") for part in name.split("/")):
            inner = _scan_tar(file, offset, offset + size)
            members |= {f"{name[:-4]}/{inner_name}": where for inner_name, where in inner}
        else:
            members[name] = (offset, size)
    return members


def _scan_tar(file: BinaryIO, start: int, end: float = float("inf")) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (offset, size)) of the files of the tar between the bytes `start` and `end`.

    Raises:
      tarfile.TarError, ValueError: it is damaged or cut short.
    """
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile remembers all of them, 1 KB each
            if member.size < 0 or member.offset_data + member.size > end:
                raise ValueError(f"{member.name} of {member.size} bytes does not end within its archive")
            if member.isreg() and not member.issparse():
                yield _normal(member.name), (member.offset_data, member.size)
        # tarfile takes a header that it cannot read for the end; the true end is a block of zeros.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"neither a header nor the end mark at byte {archive.offset:,}")
