"""Scores a set of images and writes the report; the part of `diffussm_jax.evaluate` that knows no flag."""

import dataclasses
import importlib.metadata
import io
import json
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from diffussm_jax.data.transforms import image_grid, write_png
from diffussm_jax.evaluate_images import Images
from diffussm_jax.evaluate_real import RealData
from diffussm_jax.evaluation.classifier import CLASSIFIERS
from diffussm_jax.evaluation.extractor import FEATURES, Extractor, check_images, check_range
from diffussm_jax.evaluation.neighbours import copy_test, nearest
from diffussm_jax.evaluation.report import html_report, make_report, text_report
from diffussm_jax.evaluation.scores import (
    LARGE_DIMENSION,
    SCORES,
    EqualSize,
    Reference,
    Score,
    at_equal_size,
    compute_scores,
    name_of,
)
from diffussm_jax.io import write_whole

REPORT = "report.json"
_PACKAGES = ("diffussm_jax", "jax", "numpy", "scipy")
_NUM_SHOWN = 100  # images in the page's grid
_NUM_PAIRS = 10  # samples beside their nearest training images
_NUM_COMPARED = 1000  # samples that are compared with real images
NOTE = (
    "Copies: without copying half of the samples are nearer to a training image than to a held-out one. Such tests "
    "detect little: a copy that is shifted or recoloured is far away in pixels, and a classifier's features of the "
    "images that it was trained on differ from those of others. Look at the pairs too."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What images are scored with.

    Attributes:
      extractor: the network.
      reference: statistics of real images.
      real: the real images, for the test for copies; None without them.
      chosen: keys of `SCORES`.
      mode: of precision and recall, "float32" or "adm_float16".
      num_resamples: of the bootstrap; None for the default of `compute_scores`.
      batch_size: images at a time in the network.
    """

    extractor: Extractor
    reference: Reference
    real: RealData | None = None
    chosen: Sequence[str] = tuple(SCORES)
    mode: str = "float32"
    num_resamples: int | None = None
    batch_size: int = 64

    @property
    def is_large(self) -> bool:
        """Whether a Fréchet distance of these features takes seconds."""
        return len(self.reference.moments.mean) > LARGE_DIMENSION


def evaluate(
    job: Job,
    images: Images,
    *,
    is_complete: bool = True,
    progress: Callable[[int], None] = lambda num_images: None,
) -> tuple[dict, dict[str, bytes]]:
    """The report of a set of images, and the pictures of its page.

    Args:
      job: what to score with.
      images: what to score.
      is_complete: whether to compare with halves of the real images and with their nearest neighbours as well.
      progress: called with the number of images of each batch.

    Raises:
      ValueError: the images cannot be scored, or fit neither the network nor the reference.
    """
    outputs, labels, first_images = _outputs(job, images, progress)
    if images.class_names and job.real and images.class_names != job.real.class_names:
        labels = None  # of other classes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"chosen": job.chosen, "mode": job.mode, "num_resamples": job.num_resamples}
        scores = compute_scores(job.extractor, outputs, labels, job.reference, **options)
    messages = list(dict.fromkeys(str(warning.message) for warning in caught if _is_ours(warning)))
    messages += _other_warnings(job, first_images)
    pictures = {f"The first {len(first_images[:_NUM_SHOWN])} images": _png(image_grid(first_images[:_NUM_SHOWN], 10))}
    equal_sizes, neighbours, notes = [], {}, _float16_note(scores, job)
    if is_complete and min(len(job.reference.features) // 2, len(outputs[FEATURES])) > 1:
        equal_sizes = _equal_sizes(job, outputs[FEATURES], first_images)
    if is_complete and job.reference.images is not None and job.reference.images.shape[1:] == first_images.shape[1:]:
        neighbours, pairs = _neighbours(job, outputs[FEATURES], first_images)
        notes += [NOTE] if neighbours else []
        pictures["Samples, and the nearest real images in features and in pixels"] = _png(pairs)
    protocol = images.about | {
        "features": job.extractor.name,
        "extractor_sha256": job.extractor.sha256,
        "reference": job.reference.about,
        "precision_recall": job.mode,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    more = {"equal_sizes": equal_sizes, "warnings": messages, "notes": notes, "neighbours": neighbours}
    return make_report(scores, protocol, **more), pictures


def _is_ours(warning: warnings.WarningMessage) -> bool:
    return type(warning.message).__module__.startswith("diffussm_jax")


def _other_warnings(job: Job, images: np.ndarray) -> list[str]:
    found, about = [], job.reference.about
    if job.extractor.num_channels == 3 and _are_gray(images):
        found.append("the images are gray, and the network was made for colour")
    if about.get("image_size") not in (None, images.shape[1]):
        found.append(f"the images have {images.shape[1]} pixels, those of the reference {about['image_size']}")
    if "extractor" not in about:
        found.append(
            f"the reference does not say which network made it: it must be {job.extractor.name}, as in ADM's files"
        )
    return found


def _float16_note(scores: Mapping[str, Score], job: Job) -> list[str]:
    """How much ADM's arithmetic moves precision and recall."""
    names = [name_of(name, job.extractor.distance) for name in ("precision", "recall")]
    others = [name_of(f"{name}_adm_float16", job.extractor.distance) for name in ("precision", "recall")]
    if not all(name in scores for name in others):
        return []
    moved = [scores[other].value - scores[name].value for name, other in zip(names, others, strict=True)]
    return [f"ADM's float16 moves precision by {moved[0]:+.4f} and recall by {moved[1]:+.4f}."]


def _outputs(
    job: Job, images: Images, progress: Callable
) -> tuple[dict[str, np.ndarray], np.ndarray | None, np.ndarray]:
    """What the network gives for all images, their labels, and the first images."""
    found, labels, first_images, num_images, largest = [], [], [], 0, 0
    for batch in images.batches():
        found.append(job.extractor(_with_channels(batch.images, job.extractor.num_channels), job.batch_size))
        labels.append(batch.labels)
        if num_images < _NUM_COMPARED:
            first_images.append(_with_channels(batch.images, job.extractor.num_channels))
        num_images, largest = num_images + len(batch.images), max(largest, int(batch.images.max()))
        if num_images >= _NUM_COMPARED:  # early; a batch alone may be black
            check_range(largest)
        progress(len(batch.images))
    check_range(largest)
    outputs = {key: np.concatenate([of_batch.pop(key) for of_batch in found]) for key in list(found[0])}
    all_labels = None if any(of_batch is None for of_batch in labels) else np.concatenate(labels)
    return outputs, all_labels, np.concatenate(first_images)[:_NUM_COMPARED]


def _with_channels(images: np.ndarray, num_channels: int) -> np.ndarray:
    """Gray images with the channels that a network takes; others as they are."""
    check_images(images)
    if images.shape[-1] == num_channels or not _are_gray(images):
        return images
    return np.repeat(images[..., :1], num_channels, -1)


def _are_gray(images: np.ndarray) -> bool:
    return bool((images == images[..., :1]).all())


def _equal_sizes(job: Job, features: np.ndarray, images: np.ndarray) -> list[EqualSize]:
    """Distances of the samples, of noise and of real images at one number of images."""
    real, sets = job.reference.features, {"samples": features}
    if not job.is_large:
        noise = np.random.default_rng(0).integers(0, 256, (len(real) // 2, *images.shape[1:]), np.uint8)
        sets["noise"] = job.extractor(noise, job.batch_size)[FEATURES]
    return at_equal_size(sets, real, num_splits=2 if job.is_large else 10)


def _neighbours(job: Job, features: np.ndarray, images: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Tests for copies in features and pixels, and a grid of samples above their nearest real images.

    The real images are all training images for classifiers, whose data fit into memory, else those of the reference.
    """
    if job.real is not None and job.extractor.name in CLASSIFIERS:
        real, _ = job.real.training_arrays
        of_real = job.extractor(real, job.batch_size)[FEATURES]
    else:
        real, of_real = job.reference.images, job.reference.features
    spaces = {"features": (features[: len(images)], of_real), "pixels": (images, real)}
    rows = [images[:_NUM_PAIRS]]
    for of_samples, candidates in spaces.values():
        _, indices = nearest(of_samples[:_NUM_PAIRS], candidates)
        rows.append(real[indices[:, 0]])
    found: dict[str, Any] = {}
    held_out = None if job.real is None else job.real.held_out_images
    if held_out is not None:
        others = {"features": job.extractor(held_out, job.batch_size)[FEATURES], "pixels": held_out}
        found["copy_tests"] = {space: copy_test(*spaces[space], others[space])._asdict() for space in spaces}
    return found, image_grid(np.concatenate(rows), len(rows[0]))


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    write_png(content, image)
    return content.getvalue()


def write_report(out: epath.PathLike, report: Mapping, pictures: Mapping[str, bytes], title: str) -> None:
    """Writes OUT/report.json, report.txt and report.html."""
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "report.html", html_report(report, pictures, title))
    write_whole(out / "report.txt", text_report(report) + "\n")
    write_whole(out / REPORT, json.dumps(report, indent=2, allow_nan=False))
