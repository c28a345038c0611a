"""What a config leaves to its data: the split, the number of classes, the size and the channels of images.

`configs/folder.py` has -1 for numbers and "auto" for splits, so that a folder of images is enough to start training.
Likewise `configs/cifar10_latent.py` has -1 for the factor, the channels and the scale of latents, which their card has.
"""

import copy

import numpy as np
from ml_collections import ConfigDict

from diffussm_jax.build_data import DataParts, open_data
from diffussm_jax.config_keys import AUTO_SPLIT, FROM_DATA
from diffussm_jax.data.card import data_values
from diffussm_jax.data.decoding import BrokenImage
from diffussm_jax.data.holdout import held_out
from diffussm_jax.data.sources import Source

_TRAIN = "train"
_HELD_OUT = ("val", "valid", "validation", "eval", "test")  # the first that exists is used
_SIZES = (8, 16, 32, 64)  # larger images train on latents
_OF_LATENTS = ("downsampling", "scaling_factor")
_NUMBERS = ("num_classes", "image_size", "num_channels", *_OF_LATENTS)
_NUM_INSPECTED = 32
_MAX_SHOWN = 8


def left_to_data(config: ConfigDict) -> list[str]:
    """The keys that `complete_from_data` fills in."""
    data = config.data
    numbers = [key for key in _NUMBERS if data[key] == FROM_DATA]
    return [f"data.{key}" for key in numbers + [key for key in ("split", "eval_split") if data[key] == AUTO_SPLIT]]


def complete_from_data(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """Fills in what a config leaves to its data. The same data give the same values.

    A top-level folder "train" beside "val" or "test" is the split to train on, and the other one is held out.
    Otherwise everything is one split, of which `config.data.holdout` is held out. Fewer than two classes make an
    unconditional model. The size is the largest of 8, 16, 32 and 64 pixels that is not above the median of the shorter
    sides of up to 32 images, spread over the data. If these are all gray, there is one channel, else three.

    The numbers of latents are those of their card.

    Returns:
      the completed config (the same one if it is complete already), and a line of text about each choice.

    Raises:
      FileNotFoundError: there are no such data.
      ValueError: they are damaged, none of the images can be read, or a split of latents is not named.
    """
    if not left_to_data(config):
        return config, []
    config = copy.deepcopy(config).unlock()
    data = config.data
    if DataParts(config).has_latents:
        return config, _complete_from_card(data)
    data.update({key: 1 for key in _OF_LATENTS if data[key] == FROM_DATA})
    source, lines = _choose_splits(data)
    if data.num_classes == FROM_DATA:
        names = source.class_names
        data.num_classes = len(names) if len(names) > 1 else 0
        shown = ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")
        lines.append(f"config.data.num_classes = {data.num_classes}" + (f": {shown}" if data.num_classes else ""))
    if FROM_DATA in (data.image_size, data.num_channels):
        images = _some_images(source)
        side = float(np.median([min(image.shape[:2]) for image in images]))
        if data.image_size == FROM_DATA:
            data.image_size = max((size for size in _SIZES if size <= side), default=_SIZES[0])
            lines.append(
                f"config.data.image_size = {data.image_size}: the median shorter side of {len(images)} images is "
                f"{side:g} pixels, and the choice is among {', '.join(map(str, _SIZES))}"
            )
        if data.num_channels == FROM_DATA:
            data.num_channels = 1 if all(map(_is_gray, images)) else 3
            lines.append(f"config.data.num_channels = {data.num_channels}")
    num_held_out = f", {int(held_out(source, data.holdout).sum()):,} held out" if data.holdout else ""
    lines.insert(0, f"{source.description}: {len(source):,} images{num_held_out}")
    return config, lines


def _complete_from_card(data: ConfigDict) -> list[str]:
    """Sets numbers to those of latents. Returns lines of text."""
    for key in ("split", "eval_split"):
        if data[key] == AUTO_SPLIT:
            raise ValueError(f"config.data.{key} = {AUTO_SPLIT!r} is for images; name a split of {data.path}")
    source, lines = open_data(data, data.split), []
    for key, value in data_values(source.card).items():
        if data[key] == FROM_DATA:
            data[key] = 0 if key == "num_classes" and value < 2 else value
            lines.append(f"config.data.{key} = {data[key]}")
    return [f"{data.path}: {len(source):,} latents of split {data.split!r}", *lines]


def _choose_splits(data: ConfigDict) -> tuple[Source, list[str]]:
    """Sets `split`, `eval_split` and `holdout`. Returns the source of what is trained on, and lines of text."""
    split = "" if data.split == AUTO_SPLIT else data.split
    source, lines, held_out_split = open_data(data, split), [], ""
    if data.split == AUTO_SPLIT:
        folders = {name for name in map(_top_folder, map(source.key, range(len(source)))) if name}
        if _TRAIN in folders and folders <= {_TRAIN, *_HELD_OUT}:
            split, source = _TRAIN, open_data(data, _TRAIN)
            held_out_split = next((name for name in _HELD_OUT if name in folders), "")
        lines.append(f"config.data.split = {split!r}" + ("" if split else " (all images)"))
    data.split = split
    if data.eval_split == AUTO_SPLIT:
        if held_out_split and open_data(data, held_out_split).class_names != source.class_names:
            lines.append(f"the split {held_out_split!r} has other classes, and is not used")
            held_out_split = ""
        data.eval_split = held_out_split
        lines.append(f"config.data.eval_split = {data.eval_split!r}")
    if data.eval_split:
        data.holdout = 0.0
    lines.append(f"config.data.holdout = {data.holdout:g}")
    return source, lines


def _top_folder(key: str) -> str:
    folder, slash, _ = key.partition("/")
    return folder if slash else ""


def _some_images(source: Source) -> list[np.ndarray]:
    """Up to `_NUM_INSPECTED` images that can be read, spread over the source."""
    images, error = [], None
    for index in np.unique(np.linspace(0, len(source) - 1, _NUM_INSPECTED).astype(int)):
        try:
            images.append(source[int(index)].image)
        except BrokenImage as broken:
            error = broken
    if not images:
        raise ValueError(f"{source.description}: none of the images that were tried can be read, such as {error}")
    return images


def _is_gray(image: np.ndarray) -> bool:
    return bool((image == image[..., :1]).all())
