"""What samples are compared with: feature extractors by name, real images, and their statistics.

A reference file is an .npz as ADM publishes them: `mu`, `sigma` of the features, `mu_s`, `sigma_s` of the spatial ones,
and images `arr_0`, which serve precision and recall. Files made here also have labels `arr_1` and `about`, JSON that
names the network and the data.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffussm_jax.build_data import DataParts
from diffussm_jax.config import choose, default_config
from diffussm_jax.config_keys import AUTO_SPLIT, FROM_DATA
from diffussm_jax.data.loader import Records
from diffussm_jax.data_config import complete_from_data
from diffussm_jax.evaluation import dinov2, inception
from diffussm_jax.evaluation.classifier import CLASSIFIERS, classifier_extractor, read_classifier
from diffussm_jax.evaluation.dinov2 import dinov2_extractor
from diffussm_jax.evaluation.extractor import DISTANCES, FEATURES, SPATIAL, Extractor
from diffussm_jax.evaluation.frechet import Moments, RunningMoments
from diffussm_jax.evaluation.inception import inception_extractor
from diffussm_jax.evaluation.pretrained import convert
from diffussm_jax.evaluation.scores import Reference
from diffussm_jax.io import NPZ_ERRORS, cache_folder, file_sha256, read_npz, write_whole

PRETRAINED = {"inception": inception_extractor, "dinov2": dinov2_extractor}
_PUBLISHED = {"inception": inception.PUBLISHED, "dinov2": dinov2.PUBLISHED}
NUM_REFERENCE_IMAGES = 10_000  # that ADM's files hold, for precision and recall
_NUM_THREADS = 8


def read_images(records: Records, rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images [n, H, W, C] and labels [n] of some records, in batches, decoded by threads."""
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        for start in range(0, len(rows), batch_size):
            found = list(pool.map(records.__getitem__, map(int, rows[start : start + batch_size])))
            yield np.stack([record["image"] for record in found]), np.array([record["label"] for record in found])


@dataclasses.dataclass(frozen=True)
class RealData:
    """Real images, those that are trained on and those that are held out.

    Attributes:
      config: whose `data` describes them; not latents.
    """

    config: ConfigDict

    @functools.cached_property
    def _parts(self) -> DataParts:
        return DataParts(self.config)

    @property
    def training(self) -> Records:
        return self._parts.train_records

    @property
    def held_out(self) -> Records | None:
        return self._parts.eval_records

    @property
    def description(self) -> str:
        data = self.config.data
        return f"{data.source} {epath.Path(data.path).name} {data.split}".replace("  ", " ").strip()

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.training.class_names)

    @functools.cached_property
    def training_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All training images and labels in memory; for the data of classifiers."""
        ((images, labels),) = read_images(self.training, np.arange(len(self.training)), len(self.training))
        return images, labels

    @functools.cached_property
    def held_out_images(self) -> np.ndarray | None:
        """Up to 10,000 of the images that are held out."""
        if self.held_out is None or len(self.held_out) < 2:
            return None
        rows = np.arange(min(len(self.held_out), NUM_REFERENCE_IMAGES))
        ((images, _),) = read_images(self.held_out, rows, len(rows))
        return images


def open_real_data(
    path: str, *, run_config: ConfigDict | None = None, image_size: int | None = None, split: str | None = None
) -> RealData:
    """Real images: those at `path`, or those that a run is trained on.

    Args:
      path: "digits", or as `data.sources.open_source`; "" for the run's.
      run_config: of the run.
      image_size: pixels to crop the images of `path` to.
      split: of `path`; by default found in it.

    Raises:
      FileNotFoundError: there are no such images.
      ValueError: no images or no size are named, or the run's data are latents, or the images are damaged.
    """
    if path == "digits":
        return RealData(default_config())
    if not path:
        if run_config is None:
            raise ValueError("no real images are named: give --data=PATH, a folder, a zip or a tar")
        if DataParts(run_config).has_latents:
            raise ValueError(
                "the run is trained on latents: name the images that they were made from, --data=PATH, or a reference"
            )
        if run_config.data.source == "images" and not run_config.data.path:
            raise ValueError("an export does not say where its images are: give --data=PATH")
        config = copy.deepcopy(run_config).unlock()
        config.data.random_crop = False
        return RealData(config)
    if not image_size:
        raise ValueError("give --image_size=PIXELS, the size that real images are cropped to")
    config = default_config()
    choose(config, "data.source", "images")
    config.data.update(path=path, split=split or AUTO_SPLIT, eval_split=AUTO_SPLIT)
    config.data.update(image_size=image_size, num_channels=FROM_DATA, num_classes=FROM_DATA)
    if run_config is not None and not DataParts(run_config).has_latents:
        config.data.num_channels = run_config.data.num_channels
    return RealData(complete_from_data(config)[0])


def open_extractor(name: str, weights: str = "", real: RealData | None = None, log: Callable = print) -> Extractor:
    """The network of `--features`: a pretrained one, or a classifier that is trained on half of the real images.

    Args:
      name: one of `evaluation.extractor.DISTANCES`.
      weights: a file of weights; "" for what `--convert` made, or for a classifier that was trained before.
      real: the images that a classifier is trained on; not needed with `weights`.
      log: called with a line before training.

    Raises:
      FileNotFoundError: there are no weights.
      ValueError: the name is unknown, the weights are of another network, or the images do not fit the classifier.
    """
    if name in PRETRAINED:
        return PRETRAINED[name](weights or None)
    if name not in CLASSIFIERS:
        raise ValueError(f"--features is {name!r}; choose one of {', '.join(DISTANCES)}")
    if weights:
        return read_classifier(name, weights)
    if real is None:
        raise ValueError(f"--features={name} needs the real images: give --data=PATH")
    images, labels = real.training_arrays
    is_scored = _is_scored(len(images))
    return classifier_extractor(name, images[~is_scored], labels[~is_scored], cache_folder(), log)


def convert_weights(path: str, name: str) -> Path:
    """Converts published weights of "inception" or "dinov2" to a file that `open_extractor` finds. Returns its path.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the network has no published weights, or the file is damaged or of another network.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"--convert reads the weights of {' or '.join(_PUBLISHED)}, not of --features={name}")
    return convert(path, _PUBLISHED[name])


def _is_scored(num_images: int) -> np.ndarray:
    """A random half of the training images, the same one every time; classifiers are trained on the other."""
    return np.isin(np.arange(num_images), np.random.default_rng(0).permutation(num_images)[: num_images // 2])


def rows_of_reference(extractor: Extractor, num_images: int) -> np.ndarray:
    """The training images that samples are compared with: all, or for a classifier those that it was not trained on.

    Its features of the images that it was trained on are unlike those of any others, real ones too.
    """
    return np.flatnonzero(_is_scored(num_images)) if extractor.name in CLASSIFIERS else np.arange(num_images)


def reference_of_images(
    extractor: Extractor,
    real: RealData,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda num_images: None,
) -> Reference:
    """The statistics of the images of `rows_of_reference`, cropped and not mirrored, each seen once.

    As ADM's references, it keeps up to 10,000 of the images, chosen at random, for what compares single images.
    """
    rows = rows_of_reference(extractor, len(real.training))
    is_kept = np.isin(rows, np.random.default_rng(0).permutation(rows)[:NUM_REFERENCE_IMAGES])
    moments, spatial, digest = RunningMoments(), RunningMoments(), hashlib.sha256()
    kept, start = [], 0
    for images, labels in read_images(real.training, rows, batch_size):
        outputs = extractor(images, batch_size)
        moments.add(outputs[FEATURES])
        if SPATIAL in outputs:
            spatial.add(outputs[SPATIAL])
        digest.update(images.tobytes())
        inside = is_kept[start : start + len(images)]
        kept.append((outputs[FEATURES][inside], images[inside], labels[inside]))
        start += len(images)
        progress(len(images))
    about = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "data": real.description,
        "images_sha256": digest.hexdigest(),
        "num_images": len(rows),
        "image_size": real.config.data.image_size,
    }
    if extractor.name in CLASSIFIERS:
        about["num_classes"] = real.config.data.num_classes
    features, images, labels = map(np.concatenate, zip(*kept, strict=True))
    return Reference(moments.moments(), spatial.moments() if spatial.count else None, features, labels, about, images)


def write_reference(path: epath.PathLike, reference: Reference) -> None:
    """Writes a reference file, in ADM's format."""
    arrays = {"arr_0": reference.images, "arr_1": reference.labels}
    arrays |= {"mu": reference.moments.mean, "sigma": reference.moments.covariance}
    if reference.spatial_moments is not None:
        arrays |= {"mu_s": reference.spatial_moments.mean, "sigma_s": reference.spatial_moments.covariance}
    content = io.BytesIO()
    np.savez(content, about=np.array(json.dumps(reference.about)), **arrays)
    write_whole(path, content.getvalue())


def about_reference(path: epath.PathLike) -> dict[str, Any]:
    """What a reference file says of itself; {} for those of ADM.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: it is damaged.
    """
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"])) if "about" in arrays.files else {}
        if not isinstance(about, dict):
            raise ValueError("about is no JSON object")
    except NPZ_ERRORS as error:
        raise ValueError(f"{path} is damaged, or no .npz: {error}") from error
    return about


def read_reference(path: epath.PathLike, extractor: Extractor, batch_size: int = 64) -> Reference:
    """Reads a reference file: ADM's, one of `write_reference`, or images `arr_0` alone.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: it is damaged, holds neither statistics nor images, or is of another extractor.
    """
    path = epath.Path(path)
    about, arrays = about_reference(path), read_npz(path)
    if "arr_0" not in arrays and not {"mu", "sigma"} <= arrays.keys():
        raise ValueError(f"{path} is no reference: it needs mu and sigma, or images arr_0; it has {sorted(arrays)}")
    images, labels, outputs = arrays.get("arr_0"), arrays.get("arr_1"), {}
    about |= {"file": path.name, "file_sha256": file_sha256(path)}
    if images is not None:
        images, labels = images[:NUM_REFERENCE_IMAGES], None if labels is None else labels[:NUM_REFERENCE_IMAGES]
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
            raise ValueError(f"{path}: arr_1 must be the {len(images)} labels, got {labels.dtype} {list(labels.shape)}")
        outputs = extractor(images, batch_size)
        about["image_size"] = images.shape[1]
    moments, spatial = (
        Moments(arrays[mean], arrays[covariance], about.get("num_images"))
        if {mean, covariance} <= arrays.keys()
        else (Moments.of(outputs[key]) if key in outputs else None)
        for mean, covariance, key in (("mu", "sigma", FEATURES), ("mu_s", "sigma_s", SPATIAL))
    )
    features = outputs.get(FEATURES, np.zeros((0, len(moments.mean)), np.float32))
    reference = Reference(moments, spatial, features, labels, about, images)
    reference.check_extractor(extractor)
    return reference


def open_reference(path: str | None, extractor: Extractor, real: RealData | None, batch_size: int) -> Reference:
    """The reference file at a path; without one, the statistics of the real images."""
    if path:
        return read_reference(path, extractor, batch_size)
    return reference_of_images(extractor, real, batch_size)
