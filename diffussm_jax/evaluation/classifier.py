"""A small classifier, trained on the real data in seconds to minutes: scores where no pretrained network is at hand.

Its 64 features take the place of Inception's. The scores are named after it, "FD-digits", because they compare with no
FID. They compare with each other only where the classifier has the same weights, whose SHA-256 every report has.
Samples must be compared with images that the classifier was not trained on.

Its convolutions give the features of a perceptual distance too (`layer_features`), which is no LPIPS.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils

from diffussm_jax.evaluation.extractor import (
    DISTANCES,
    FEATURES,
    PROBABILITIES,
    Extractor,
    block_means,
    check_images,
)
from diffussm_jax.io import check_same_shapes, path_of, read_safetensors, shapes_by_path, weights_hash, write_whole

_VERSION = 1  # of the network and its training; another one trains anew


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A classifier and how it is trained.

    Attributes:
      image_size: pixels.
      num_channels: 1 or 3.
      widths: channels of each resolution; the last are the features.
      num_epochs: of training, with a learning rate that falls to zero.
      max_shift: images are moved at random by up to this number of pixels.
      is_flipped: whether half of them are mirrored.
    """

    image_size: int
    num_channels: int
    widths: tuple[int, ...]
    num_epochs: int
    max_shift: int = 1
    is_flipped: bool = False
    num_classes: int = 10
    batch_size: int = 64
    learning_rate: float = 3e-3


CLASSIFIERS = {
    "digits": Training(image_size=8, num_channels=1, widths=(32, 64), num_epochs=30),
    "cifar10": Training(
        image_size=32, num_channels=3, widths=(32, 64, 64), num_epochs=10, max_shift=3, is_flipped=True, batch_size=128
    ),
}


class Classifier(nn.Module):
    """Two convolutions at each resolution, then the mean over positions.

    Images [B, H, W, C] uint8 -> features [B, widths[-1]] and logits [B, num_classes], float32.
    """

    widths: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = images.astype(jnp.float32) / 127.5 - 1
        features = _convolutions(x, self.widths)[-1].mean((1, 2))
        return features, nn.Dense(self.num_classes, name="head")(features)


class _Layers(nn.Module):
    """What `Classifier` has before its mean, with the same parameters."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        return _convolutions(x, self.widths)


def _convolutions(x: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
    """The maps after the second convolution of each resolution; called by a module, whose parameters they are."""
    layers = []
    for i, width in enumerate(widths):
        x = nn.max_pool(x, (2, 2), (2, 2)) if i else x
        for j in range(2):
            x = nn.Conv(width, (3, 3), name=f"conv_{i}_{j}")(x)
            x = nn.relu(nn.GroupNorm(8, name=f"norm_{i}_{j}")(x))
        layers.append(x)
    return layers


def layer_features(name: str, params: dict) -> Callable[[jax.Array], list[jax.Array]]:
    """The layers of a classifier as a differentiable function of images, for a perceptual distance.

    Args:
      name: "digits" or "cifar10".
      params: `Extractor.params` of that classifier.

    Returns:
      a function of x [B, H, W, C] in [-1, 1] to the maps after the ReLU of the second convolution of each resolution,
      float32 [B, H / 2**i, W / 2**i, widths[i]], rounded down. H and W may be any that leave a pixel in the last one:
      they need not be those of the training images, which the network has learned from, and are not resized. It
      raises ValueError for smaller images and for other channels.
    """
    training = CLASSIFIERS[name]
    smallest = 2 ** (len(training.widths) - 1)

    def layers(x: jax.Array) -> list[jax.Array]:
        if x.ndim != 4 or x.shape[-1] != training.num_channels or min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"the classifier {name} takes x [B, H, W, {training.num_channels}] of at least {smallest} x {smallest} "
                f"pixels, got {list(x.shape)}"
            )
        return _Layers(training.widths).apply({"params": params}, x.astype(jnp.float32))

    return layers


def train_classifier(images: np.ndarray, labels: np.ndarray, training: Training, seed: int = 0) -> dict:
    """Trains a classifier.

    Args:
      images: [N, H, W, C] uint8.
      labels: [N] int.
      training: how.
      seed: of initial values, order and augmentation.

    Returns:
      the parameters.

    Raises:
      ValueError: the images or labels do not fit `training`.
    """
    check_images(images, training.num_channels)
    if images.shape[1:3] != (training.image_size,) * 2 or len(np.unique(labels)) != training.num_classes:
        raise ValueError(
            f"the classifier takes images of {training.image_size} x {training.image_size} in {training.num_classes} "
            f"classes, got {list(images.shape)} in {len(np.unique(labels))} classes"
        )
    if len(images) < training.batch_size:
        raise ValueError(f"the classifier needs at least {training.batch_size} images, got {len(images)}")
    model = Classifier(training.widths, training.num_classes)
    steps_per_epoch = len(images) // training.batch_size
    schedule = optax.cosine_onecycle_schedule(steps_per_epoch * training.num_epochs, training.learning_rate)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    images, labels = jnp.asarray(images), jnp.asarray(labels)

    def loss_of(params, batch, targets):
        _, logits = model.apply({"params": params}, batch)
        smooth = optax.smooth_labels(jax.nn.one_hot(targets, training.num_classes), 0.1)
        return optax.softmax_cross_entropy(logits, smooth).mean()

    @jax.jit
    def step(params, state, rows, key):
        gradients = jax.grad(loss_of)(params, _augmented(images[rows], key, training), labels[rows])
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    key, init_key = jax.random.split(jax.random.key(seed))
    params = jax.jit(model.init)(init_key, images[:1])["params"]
    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(training.num_epochs):
        order = rng.permutation(len(images))[: steps_per_epoch * training.batch_size]
        for rows in order.reshape(steps_per_epoch, -1):  # no scan: XLA:CPU runs convolutions in loops on one thread
            key, step_key = jax.random.split(key)
            params, state = step(params, state, rows, step_key)
    return jax.device_get(params)


def _augmented(images: jax.Array, key: jax.Array, training: Training) -> jax.Array:
    """Shifts a batch, each image by its own offset, and mirrors half of it."""
    shift_key, flip_key = jax.random.split(key)
    pad, size = training.max_shift, training.image_size
    offsets = jax.random.randint(shift_key, (len(images), 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    crop = functools.partial(jax.lax.dynamic_slice, slice_sizes=(size, size, images.shape[-1]))
    shifted = jax.vmap(lambda image, at: crop(image, (at[0], at[1], 0)))(padded, offsets)
    if not training.is_flipped:
        return shifted
    is_mirrored = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(is_mirrored, shifted[:, :, ::-1], shifted)


def classifier_extractor(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    cache: epath.PathLike,
    log: Callable[[str], None] = lambda line: None,
) -> Extractor:
    """The extractor of a classifier that was trained on these images, now or before.

    Args:
      name: "digits" or "cifar10".
      images: real ones, [N, H, W, C] uint8. Those of a multiple of its `image_size` are averaged over blocks.
      labels: [N] int.
      cache: folder for its weights.
      log: called with a line before training.

    Raises:
      ValueError: as `train_classifier`, or the weights in the cache are damaged.
    """
    training = CLASSIFIERS[name]
    check_images(images, training.num_channels, training.image_size)
    images = block_means(images, training.image_size)
    digest = hashlib.sha256(repr((_VERSION, training, images.shape)).encode())
    digest.update(images.tobytes() + np.asarray(labels, np.int64).tobytes())
    path = epath.Path(cache) / f"classifier_{name}_{digest.hexdigest()[:16]}.safetensors"
    is_known = path.exists()
    if is_known:
        params = _read_params(name, path)
    else:
        log(f"Training the classifier {name} on {len(images):,} images (once: it is kept in {cache})")
        params = train_classifier(images, labels, training)
    if jax.process_count() > 1:  # trained in each, perhaps on unlike machines
        params = jax.device_get(multihost_utils.broadcast_one_to_all(params))
    if jax.process_index() == 0 and not is_known:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {path_of(p): np.ascontiguousarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}
        write_whole(path, safetensors.numpy.save(tensors, {"sha256": weights_hash(params)}))
    return extractor_of_params(name, params)


def read_classifier(name: str, path: epath.PathLike) -> Extractor:
    """The extractor of a classifier's file, such as another machine's.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or of another network.
    """
    return extractor_of_params(name, _read_params(name, epath.Path(path)))


def classifier_shapes(name: str) -> dict:
    """Shapes and dtypes of a classifier's parameters."""
    training = CLASSIFIERS[name]
    size = (1, training.image_size, training.image_size, training.num_channels)
    model = Classifier(training.widths, training.num_classes)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(size, jnp.uint8)))["params"]


def _read_params(name: str, path: epath.Path) -> dict:
    like = classifier_shapes(name)
    try:
        tensors, metadata = read_safetensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and the classifier is trained anew") from error
    found = {key: tensor.shape for key, tensor in tensors.items()}
    check_same_shapes(shapes_by_path(like), found, f"{path} does not hold the classifier {name}")
    params = jax.tree_util.tree_map_with_path(lambda p, leaf: tensors[path_of(p)], like)
    if weights_hash(params) != (sha256 := metadata.get("sha256")):
        raise ValueError(f"{path} is damaged: its weights do not have the SHA-256 {sha256}; delete it")
    return params


def extractor_of_params(name: str, params: dict) -> Extractor:
    """The extractor of a classifier with these parameters."""
    training = CLASSIFIERS[name]
    model = Classifier(training.widths, training.num_classes)

    def apply(params, batch):
        features, logits = model.apply({"params": params}, batch)
        return {FEATURES: features, PROBABILITIES: jax.nn.softmax(logits)}

    sha256, distance = weights_hash(params), DISTANCES[name]
    return Extractor(name, apply, params, sha256, training.num_channels, distance, training.image_size)
