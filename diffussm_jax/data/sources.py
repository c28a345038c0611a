"""Sources of images: random access to decoded images and their labels, in a fixed order.

    digits                           scikit-learn's handwritten digits
    a folder, a .zip or a .tar       [split/]class/name.jpg, or images without classes; ImageNet's tar of tars
    a folder with data.mdb           LSUN's LMDB
    a folder with dataset_info.json  a TensorFlow Datasets (TFDS) data set; tfds:NAME for one in TFDS's own folder

`open_source` detects the kind.
"""

import functools
import os
from typing import Annotated, Any, Protocol

import numpy as np
from etils import epath

from diffussm_jax.data.decoding import BrokenImage, decode_image
from diffussm_jax.data.images import Example, ImageFolder, ImageTar, ImageZip, fingerprint
from diffussm_jax.io import check_path, is_bucket
from diffussm_jax.options import NOT_AN_OPTION

__all__ = [
    "DIGITS_SPLITS",
    "LSUN",
    "TFDS",
    "BrokenImage",
    "Digits",
    "Example",
    "ImageFolder",
    "ImageTar",
    "ImageZip",
    "Source",
    "open_source",
]

DIGITS_SPLITS = ("train", "eval")
HOLD_OUT_EVERY = 10
_COMPRESSED_TARS = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Source(Protocol):
    """Thread-safe random access to images and their labels.

    `class_names` is empty if there are no labels. `description` is a short text without absolute paths.
    `fingerprint()`, SHA-256 in hex, changes with the items, so that a resumed job detects changed data. An item that
    cannot be read or decoded raises `BrokenImage`.

    A source may have a method `key(index) -> str` too, which gives an item's key without reading the item.
    `config.data.holdout` needs it.
    """

    class_names: tuple[str, ...]
    description: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def fingerprint(self) -> str: ...


def open_source(path: str, split: Annotated[str, NOT_AN_OPTION] = "") -> Source:
    """Opens a source of any kind.

    Args:
      path: "digits", "tfds:NAME", or a local or remote path: a folder of images, of an LMDB, or of a TFDS data set, a
        .zip or a .tar.
      split: a top-level folder such as "train", or a split of TFDS; "" for everything.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: the kind is unknown, the source is damaged, or the split has no images.
    """
    if path == "digits":
        return Digits(split)
    if path.startswith("tfds:"):
        return TFDS(path.removeprefix("tfds:"), split)
    if is_bucket(path):
        check_path(path)
    folder, name = epath.Path(path), path.rstrip("/").lower()
    allowed = (
        'allowed are "digits", "tfds:NAME", a folder of images, of an LSUN LMDB (data.mdb) or of a TFDS data set '
        "(dataset_info.json), a .zip and a .tar"
    )
    if not path or not folder.exists():
        raise FileNotFoundError(f"no data at {path!r}; {allowed}")
    if folder.is_dir():
        if (folder / "data.mdb").exists():
            if split:
                raise ValueError(f"{path}: an LSUN folder is one split; leave the split empty, not {split!r}")
            return LSUN(folder)
        return TFDS(folder, split) if (folder / "dataset_info.json").exists() else ImageFolder(folder, split)
    if name.endswith(".zip"):
        return ImageZip(folder, split)
    if name.endswith((".tar", *_COMPRESSED_TARS)):  # ImageTar explains compressed files in its error
        return ImageTar(folder, split)
    raise ValueError(f"{path} is no source of images; {allowed}")


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 and gray, in 10 classes.

    From the UCI data set Optical Recognition of Handwritten Digits. Every tenth digit is in the split "eval", the rest
    in "train". The 17 gray levels are rescaled to 0 ... 255.

    Raises:
      ValueError: the split is unknown.
    """

    class_names = tuple("0123456789")
    is_croppable = False

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        if split not in DIGITS_SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(DIGITS_SPLITS)}")
        images, labels = load_digits(return_X_y=True)
        is_held_out = np.arange(len(images)) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        chosen = is_held_out if split == "eval" else ~is_held_out
        self._images = np.round(images[chosen].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        self._labels = labels[chosen]
        self.description = f"digits, split {split}"

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]), self.key(index))

    def fingerprint(self) -> str:
        return fingerprint([self._images.tobytes(), self._labels.tolist()])


class LSUN:
    """An LMDB folder of LSUN (church_outdoor_train_lmdb, ...): images without labels, in LMDB's order of keys.

    Args:
      path: the local folder of data.mdb.

    Raises:
      FileNotFoundError: there is no data.mdb.
      ValueError: the package lmdb is missing, or the database is empty, damaged or truncated.
    """

    class_names = ()

    def __init__(self, path: epath.PathLike):
        path = epath.Path(path)
        if not (path / "data.mdb").exists():
            raise FileNotFoundError(f"no data.mdb in {path}")
        self.description = f"lsun {path.name}"
        self._environment = _open_lmdb(os.path.realpath(path))
        with self._environment.begin() as transaction:
            self._keys = list(transaction.cursor().iternext(keys=True, values=False))
        if not self._keys:
            raise ValueError(f"no images in {path}")

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index].decode("ascii", "backslashreplace")

    def __getitem__(self, index: int) -> Example:
        key = self.key(index)
        try:
            with self._environment.begin() as transaction:
                data = transaction.get(self._keys[index])
        except Exception as error:
            raise BrokenImage(key, f"cannot be read: {type(error).__name__}: {error}") from error
        return Example(decode_image(data, key), 0, key)

    def fingerprint(self) -> str:
        return fingerprint(self._keys)


@functools.cache  # LMDB cannot open a folder twice in a process
def _open_lmdb(path: str) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(f"reading {path} needs lmdb: pip install 'diffussm_jax[lsun]'") from error
    try:
        environment = lmdb.open(path, readonly=True, lock=False, readahead=False, create=False)
        num_bytes = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    except lmdb.Error as error:
        raise ValueError(f"{path} is not an LMDB folder, or is damaged: {error}") from error
    # Reading a memory-mapped file beyond its end would kill the process.
    if os.path.getsize(os.path.join(path, "data.mdb")) < num_bytes:
        environment.close()
        raise ValueError(f"{path}/data.mdb is cut short: it should have {num_bytes:,} bytes")
    return environment


class TFDS:
    """A TensorFlow Datasets data set prepared as array_record. Reading needs no TensorFlow.

    The image is the Image feature, or a uint8 Tensor of 1 or 3 channels. The label is the ClassLabel feature, if there
    is one. If there are several, those named "image" and "label" are used.

    Args:
      name_or_dir: TFDS's name ("imagenet2012:5.1.0"), or the folder of dataset_info.json.
      split: in TFDS's syntax ("train", "train[:90%]"); "" if there is only one.
      data_dir: TFDS's folder of data sets; None for its default.

    Raises:
      ValueError: TFDS is missing; the data set is unknown, not prepared, or lacks the features or the split.
    """

    def __init__(self, name_or_dir: epath.PathLike, split: str = "", data_dir: epath.PathLike | None = None):
        builder = _open_tfds(os.fspath(name_or_dir), data_dir)
        import tensorflow_datasets as tfds

        info = builder.info
        if not split and len(info.splits) > 1:
            raise ValueError(f"tfds {info.full_name} has the splits {', '.join(info.splits)}: choose one")
        split = split or next(iter(info.splits), "")
        self.description = f"tfds {info.full_name}, split {split}"
        self._image, self._label = _find_features(info)
        is_encoded = isinstance(info.features[self._image], tfds.features.Image)
        decoders = {self._image: tfds.decode.SkipDecoding()} if is_encoded else None  # `decode_image` takes more
        try:
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except (ValueError, KeyError) as error:
            raise ValueError(f"tfds {info.full_name}: {error}; its splits are {', '.join(info.splits)}") from error
        if not len(self._records):
            raise ValueError(f"no images in {self.description}")
        self.class_names = tuple(info.features[self._label].names) if self._label else ()
        lengths = {name: info.splits[name].shard_lengths for name in sorted(info.splits)}
        self._identity = (info.full_name, split, len(self._records), lengths)

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Example:
        key = self.key(index)
        try:
            record = self._records[index]
        except OSError:
            raise
        except Exception as error:  # protobuf's, array_record's, ...
            raise BrokenImage(key, f"cannot be read: {type(error).__name__}: {error}") from error
        image = record[self._image]
        image = decode_image(image, key) if isinstance(image, bytes) else np.asarray(image, np.uint8)
        return Example(image, int(record[self._label]) if self._label else 0, key)

    def fingerprint(self) -> str:
        return fingerprint(self._identity)


def _open_tfds(name_or_dir: str, data_dir: epath.PathLike | None) -> Any:
    """TFDS's builder of a data set prepared as array_record."""
    try:
        import array_record  # noqa: F401 - TFDS needs it for reading
        import tensorflow_datasets as tfds
    except ImportError as error:
        packages = "tensorflow-datasets array_record importlib_resources"
        raise ValueError(f"reading {name_or_dir} from TFDS: {error}: pip install {packages}") from error
    where = "" if data_dir is None else f", data_dir={os.fspath(data_dir)!r}"
    prepare = (
        "pip install 'diffussm_jax[prepare]', then python -c \"import tensorflow_datasets as tfds; "
        f"tfds.builder({name_or_dir!r}, file_format='array_record'{where}).download_and_prepare()\""
    )
    try:
        if (epath.Path(name_or_dir) / "dataset_info.json").exists():
            builder = tfds.builder_from_directory(name_or_dir)
        else:
            builder = tfds.builder(name_or_dir, data_dir=data_dir, file_format="array_record")
        if not builder.info.splits:
            raise ValueError("it has no data yet")
        if "array_record" not in {str(f.value) for f in builder.info.available_file_formats()}:
            raise ValueError(f"it is in the format {builder.info.file_format.value}")
    except tfds.core.DatasetNotFoundError as error:  # its message lists every data set of TFDS
        raise ValueError(f"TFDS knows no data set {name_or_dir!r}, and none is prepared{where}") from error
    except Exception as error:  # ValueError, ParseError, AttributeError, ... for damaged metadata
        raise ValueError(
            f"tfds {name_or_dir} is not prepared as array_record ({error}); to do so: {prepare}"
        ) from error

    return builder


def _find_features(info: Any) -> tuple[str, str | None]:
    """The names of the image feature and of the label, if there is one."""
    import tensorflow_datasets as tfds

    features = dict(info.features)

    def choose(what: str, found: list[str]) -> str | None:
        if len(found) > 1 and what not in found:
            raise ValueError(f"tfds {info.full_name} has several features for the {what}: {features}")
        return what if what in found else found[0] if found else None

    def is_pixels(feature: Any) -> bool:
        is_uint8 = type(feature) is tfds.features.Tensor and feature.np_dtype == np.uint8
        return is_uint8 and len(feature.shape) == 3 and feature.shape[-1] in (1, 3)

    # A float32 Image of TFDS stores the bits of one float in RGBA.
    images = [n for n, f in features.items() if isinstance(f, tfds.features.Image) and f.np_dtype != np.float32]
    image = choose("image", images or [name for name, feature in features.items() if is_pixels(feature)])
    if image is None:
        raise ValueError(f"tfds {info.full_name} has no image among its features: {features}")
    return image, choose("label", [n for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)])
