"""The images that `diffussm_jax.evaluate` scores: samples of a run, an .npz file, or a folder of images.

Samples of a run are kept in files of a batch each, so that an evaluation that was stopped draws only what is missing.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from diffussm_jax.config import to_plain
from diffussm_jax.data.sources import open_source
from diffussm_jax.diffusion.samplers.base import num_evaluations
from diffussm_jax.evaluation.extractor import check_images
from diffussm_jax.io import NPZ_ERRORS, file_sha256, read_json, read_npz, write_whole
from diffussm_jax.parallel.hosts import barrier_on_all_hosts, of_first_host
from diffussm_jax.run import Run, choose_labels

BALANCED, RANDOM = "balanced", "random"
_ABOUT = "about.json"
_FILE = "batch_{:06d}.npz"
_NUM_THREADS = 8  # that decode images


class Batch(NamedTuple):
    """Images [n, H, W, C] uint8 and their labels [n], None if unknown."""

    images: np.ndarray
    labels: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of images.

    Attributes:
      num_images: in all batches.
      image_size: pixels.
      batches: () -> the batches, in order.
      about: what the protocol says of them, as JSON can hold it.
      class_names: of the labels, if they are those of folders; else None.
    """

    num_images: int
    image_size: int
    batches: Callable[[], Iterator[Batch]]
    about: dict[str, Any]
    class_names: tuple[str, ...] | None = None


# Samples of a run


def draw_labels(choice: str, num_samples: int, num_classes: int, seed: int) -> np.ndarray:
    """[num_samples] int32: "balanced", all classes in turn, or "random", uniform and independent.

    ADM and DiT draw labels at random; balanced ones give slightly better scores.
    """
    if choice == BALANCED or num_classes == 0:
        return choose_labels(None, num_samples, num_classes)
    return np.random.default_rng(seed).integers(num_classes, size=num_samples).astype(np.int32)


def of_run(
    run: Run, folder: epath.Path, about: dict, *, num_samples: int, label_choice: str, seed: int, batch_size: int
) -> Images:
    """Samples of a run, drawn on all devices of all processes, and kept in `folder`.

    Args:
      run: with the sampling options to use.
      folder: of files of a batch each; with several hosts it must be visible to all of them.
      about: what else the samples depend on, such as the hash of the weights.
      num_samples: N.
      label_choice: "balanced" or "random", see `draw_labels`.
      seed: of the noise and of random labels.
      batch_size: images drawn together.

    Raises:
      ValueError: the folder holds samples of another protocol. They stay as they are.
    """
    batch_size = min(batch_size, num_samples)
    label_choice = label_choice if run.config.data.num_classes else "none"
    own = {"num_samples": num_samples, "labels": label_choice, "seed": seed, "batch_size": batch_size}
    about = about_run(run) | about | own
    _claim(folder, about)
    labels = draw_labels(label_choice, num_samples, run.config.data.num_classes, seed)

    def batches():
        for i, start in enumerate(range(0, num_samples, batch_size)):
            path, of_batch = folder / _FILE.format(i), labels[start : start + batch_size]
            if of_first_host(path.exists()):
                images = read_npz(path)["arr_0"]
            else:
                images = run.sample_batch(of_batch, i, seed=seed, batch_size=batch_size)
                with barrier_on_all_hosts():
                    if jax.process_index() == 0:
                        content = io.BytesIO()
                        np.savez(content, images, of_batch)  # positional: arr_0 and arr_1
                        write_whole(path, content.getvalue())
            yield Batch(images, of_batch if run.config.data.num_classes else None)

    return Images(num_samples, run.config.data.image_size, batches, about)


def _claim(folder: epath.Path, about: dict) -> None:
    path = folder / _ABOUT
    with barrier_on_all_hosts():
        if not path.exists():
            if jax.process_index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps(about, indent=2))
        elif (saved := read_json(path)) != about:
            differing = {k: (saved.get(k), about.get(k)) for k in saved | about if saved.get(k) != about.get(k)}
            raise ValueError(
                f"{folder} holds samples of another protocol; choose another --out. (was, is): {differing}"
            )


def about_run(run: Run) -> dict[str, Any]:
    """What the config says of how samples of a run are drawn."""
    config, sampling = run.config, run.config.sampling
    options = {key: value for key, value in to_plain(config)["sampling"].items() if key != "num_grid_rows"}
    return {
        "model": config.model.name,
        "step": run.step,
        "process": config.diffusion.schedule,
        "sampling": options,
        "evaluations": num_evaluations(run.parts.generator.sampler, sampling.num_steps),
        "clip_x_0": config.diffusion.clip_x_0,
        "autoencoder": config.data.vae if run.parts.has_latents else "",
    }


# Files


def of_path(path: epath.PathLike, batch_size: int) -> Images:
    """An .npz in ADM's convention (arr_0 uint8 [N, H, W, C], arr_1 labels); a folder, zip or tar of images; or the
    folder in which `of_run` keeps samples.

    Args:
      path: of them.
      batch_size: images that are read together.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, or (when they are read) its images do not have one size.
    """
    path = epath.Path(path)
    if path.is_dir() and (path / _ABOUT).exists():
        return _of_kept(path)
    if path.suffix == ".npz":
        array = Rows(path, "arr_0")
        about = {"samples": path.name, "samples_sha256": file_sha256(path), "num_samples": array.shape[0]}
        return Images(array.shape[0], array.shape[1], lambda: _of_file(path, batch_size), about)
    source = open_source(str(path))
    shape = source[0].image.shape

    def read(index: int) -> np.ndarray:
        image = source[index].image
        if image.shape != shape:
            raise ValueError(
                f"{source.description}: {source.key(index)} is of shape {image.shape}, the first image {shape}; images "
                "are scored as they are, so scale them first"
            )
        return image

    def batches():
        with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
            for start in range(0, len(source), batch_size):
                rows = range(start, min(start + batch_size, len(source)))
                labels = np.array([source[i].label for i in rows], np.int32) if source.class_names else None
                yield Batch(np.stack(list(pool.map(read, rows))), labels)

    about = {"samples": path.name, "num_samples": len(source)}
    return Images(len(source), shape[0], batches, about, tuple(source.class_names) or None)


def _of_kept(folder: epath.Path) -> Images:
    """What `of_run` kept, all of it."""
    about = read_json(folder / _ABOUT)
    num_files = -(-about["num_samples"] // about["batch_size"])
    paths = [folder / _FILE.format(i) for i in range(num_files)]
    if missing := [path.name for path in paths if not path.exists()]:
        raise ValueError(f"{folder} does not hold all samples yet, {missing[0]} is missing: repeat what draws them")

    def batches():
        for path in paths:
            arrays = read_npz(path)
            yield Batch(arrays["arr_0"], arrays["arr_1"] if about["labels"] != "none" else None)

    return Images(about["num_samples"], Rows(paths[0], "arr_0").shape[1], batches, about)


def _of_file(path: epath.Path, batch_size: int) -> Iterator[Batch]:
    images, labels = Rows(path, "arr_0"), _labels(path)
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: arr_1 must be the {images.shape[0]} labels, got the shape {list(labels.shape)}")
    start = 0
    for rows in images.read(batch_size):
        yield Batch(rows, None if labels is None else labels[start : start + len(rows)])
        start += len(rows)


def _labels(path: epath.Path) -> np.ndarray | None:
    """arr_1, if there is one and it holds whole numbers."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            labels = arrays["arr_1"] if "arr_1" in arrays.files else None
    except NPZ_ERRORS as error:
        raise ValueError(f"{path}: the labels arr_1 cannot be read: {error}") from error
    return labels if labels is not None and labels.dtype.kind in "iu" else None


class Rows:
    """An array of an .npz that is read by rows: 50,000 images of 256 pixels are 10 GB.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: it is damaged, has no such array, or one of Python objects, which would have to be unpickled.
    """

    def __init__(self, path: epath.Path, name: str):
        self._path, self._name = path, name
        with self._open() as member:
            self.shape, self.dtype = self._read_header(member)
        try:
            check_images(np.empty((1, *self.shape[1:]), self.dtype))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @contextlib.contextmanager
    def _open(self):
        name = f"{self._name}.npy"
        try:
            with self._path.open("rb") as file, zipfile.ZipFile(file) as archive:
                if name not in archive.namelist():
                    found = [other.removesuffix(".npy") for other in archive.namelist()]
                    raise _FileError(f"{self._path} has no {self._name}, only {found}")
                with archive.open(name) as member:
                    yield member
        except _FileError:
            raise
        except NPZ_ERRORS as error:
            raise ValueError(f"{self._path} is no .npz file, or a damaged one: {error}") from error

    def read(self, num_rows: int) -> Iterator[np.ndarray]:
        """The rows of the array, `num_rows` at a time."""
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with self._open() as member:
            self._read_header(member)
            for start in range(0, self.shape[0], num_rows):
                n = min(num_rows, self.shape[0] - start)
                content = member.read(n * row_bytes)
                if len(content) != n * row_bytes:
                    raise _FileError(f"{self._path} is cut: {self._name} ends after {start} rows of {self.shape[0]}")
                yield np.frombuffer(content, self.dtype).reshape(n, *self.shape[1:])

    def _read_header(self, member) -> tuple[tuple[int, ...], np.dtype]:
        version = np.lib.format.read_magic(member)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise _FileError(f"{self._path}: arrays of the npy format {version} are not read")
        shape, is_fortran, dtype = read[version](member)
        if dtype.hasobject:
            raise _FileError(f"{self._path} holds pickled objects, which are never unpickled; save a plain uint8 array")
        if is_fortran or len(shape) != 4 or not shape[0]:
            raise _FileError(f"{self._path}: images must be [N, H, W, C] in C order, got the shape {list(shape)}")
        return shape, dtype


class _FileError(ValueError):
    """An error whose message says what is wrong with the file."""
