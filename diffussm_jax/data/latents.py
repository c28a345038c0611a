"""Latent data sets: the outputs of a frozen autoencoder in TFDS's array_record format, with a card.

A folder holds one data set of one or more splits:

    latents-train.array_record-00000-of-00313   shards; each record has the latents of an image and of its mirror image
    card-train.json                             source, settings, statistics, and the checksum of each shard
    dataset_info.json, features.json            TFDS's metadata, for `tfds.builder_from_directory(folder)`

A shard gets its name only when it is complete. A split is in `dataset_info.json` only when all of its shards exist. The
folder may be a bucket (gs://...). array_record reads and writes only local files, so shards are written to a temporary
folder and copied to the bucket, and copied to a local cache before reading. A record is

    mean, log_std   [2, H, W, C] float16, of the encoder's normal distribution, unscaled; index 1 is the mirror image
    label           int, 0 without classes
    key             name of the image in its source
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diffussm_jax.data.card import FORMAT_VERSION, card_name, read_card, splits_in
from diffussm_jax.data.names import check_class_names
from diffussm_jax.io import file_sha256, is_bucket, partial_path, write_whole

NAME = "latents"
_RECORD = {"mean", "log_std", "label", "key"}
_FILENAME_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def shard_name(split: str, index: int, num_shards: int) -> str:
    """The file name of a shard, in TFDS's convention."""
    return f"{NAME}-{split}.array_record-{index:05d}-of-{num_shards:05d}"


def _features(latent_shape: Sequence[int], class_names: Sequence[str]):
    import tensorflow_datasets as tfds

    check_class_names(class_names)
    tensor = tfds.features.Tensor(shape=(2, *latent_shape), dtype=np.float16, encoding=tfds.features.Encoding.BYTES)
    label = tfds.features.ClassLabel(names=class_names) if class_names else tfds.features.Scalar(np.int64)
    return tfds.features.FeaturesDict({"mean": tensor, "log_std": tensor, "label": label, "key": tfds.features.Text()})


class ShardWriter:
    """Writes one shard: call `write` for each record, then `finish`, which gives the file its name.

    Args:
      folder: of the data set; must exist.
      latent_shape: (H, W, C).
      class_names: empty if there are no labels.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        split: str,
        index: int,
        num_shards: int,
        latent_shape: Sequence[int],
        class_names: Sequence[str],
    ):
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        self._features = _features(latent_shape, class_names)
        self._serializer = ExampleSerializer(self._features.get_serialized_info())
        self._path = epath.Path(folder) / shard_name(split, index, num_shards)
        self._partial = self._path.with_name(self._path.name + ".partial")
        if is_bucket(folder):
            self._partial = epath.Path(tempfile.mkdtemp(prefix="diffussm_jax_")) / self._partial.name
        # One record per group, so that random access reads no neighbours.
        self._writer = ArrayRecordWriter(str(self._partial), "group_size:1")
        self._num_records, self._num_bytes = 0, 0
        self._sums = np.zeros((3, latent_shape[-1]))  # of mean, mean**2, std**2, over both mirrors

    def write(self, mean: np.ndarray, log_std: np.ndarray, label: int, key: str) -> None:
        """Adds a record: mean and log_std [2, H, W, C] float16.

        Raises:
          ValueError: a value is not finite.
        """
        if not (np.isfinite(mean).all() and np.isfinite(log_std).all()):
            raise ValueError(f"the autoencoder's latent of {key} is not finite in float16")
        record = {"mean": mean, "log_std": log_std, "label": int(label), "key": key}
        example = self._serializer.get_tf_example(self._features.encode_example(record))
        data = example.SerializeToString(deterministic=True)
        self._writer.write(data)
        self._num_records += 1
        self._num_bytes += len(data)
        m, s = mean.astype(np.float64), np.exp(log_std.astype(np.float64))
        self._sums += [x.sum((0, 1, 2)) / (m.size / m.shape[-1]) for x in (m, m**2, s**2)]

    def finish(self) -> dict:
        """Names the shard. Returns its entry in the card, and the sums for the card's statistics."""
        self._writer.close()
        with open(self._partial, "rb") as file:
            os.fsync(file.fileno())  # flush to disk before the rename
        about = {
            "file": self._path.name,
            "num_records": self._num_records,
            "num_bytes": self._num_bytes,
            "file_bytes": self._partial.stat().length,
            "sha256": file_sha256(self._partial),
            "sums": self._sums.tolist(),
        }
        if is_bucket(self._path):
            self._partial.copy(self._path, overwrite=True)  # a bucket shows only complete objects
            self._partial.parent.rmtree()
        else:
            self._partial.replace(self._path)
        return about

    def discard(self) -> None:
        """Deletes the unfinished shard."""
        with contextlib.suppress(Exception):  # a failed write may be the reason for this call
            self._writer.close()
        self._partial.unlink(missing_ok=True)
        if is_bucket(self._path):
            self._partial.parent.rmtree()


def write_card(
    folder: epath.PathLike, split: str, settings: Mapping, shards: Sequence[Mapping], skipped: Sequence
) -> dict:
    """Completes a split: writes TFDS's metadata, then the card that marks it as finished, and returns the card.

    Args:
      split: all of its shards must exist.
      settings: how they were made: at least "source", "image_size", "latent_shape", "class_names", and "vae" with
        "name", "sha256", "encoder_sha256", "scaling_factor" and "dtype", and "quantizer" if it has one.
      shards: the results of `ShardWriter.finish`, in order.
      skipped: images left out, as {"index", "key", "reason"}.

    Raises:
      ValueError: another split in the folder has other settings, or all images were skipped.
    """
    folder, num_records = epath.Path(folder), sum(shard["num_records"] for shard in shards)
    if not num_records:
        raise ValueError(f"all {len(skipped)} images are broken")
    mean, square, variance = np.sum(np.array([shard["sums"] for shard in shards], np.float64), 0) / num_records
    card = {
        "format_version": FORMAT_VERSION,
        "split": split,
        "num_records": num_records,
        **settings,
        "statistics": {
            "about": "per channel, of latents as sampled, not scaled",
            "mean": mean.tolist(),
            "std": np.sqrt(np.maximum(square - mean**2 + variance, 0)).tolist(),
        },
        "skipped": list(skipped),
        "shards": [{key: value for key, value in shard.items() if key != "sums"} for shard in shards],
    }
    cards = {other: read_card(folder, other) for other in splits_in(folder) if other != split} | {split: card}
    check_joins(folder, split, settings)
    _write_metadata(folder, cards)
    write_whole(folder / card_name(split), json.dumps(card, indent=1))
    return card


def check_joins(folder: epath.Path, split: str, settings: Mapping) -> None:
    """Checks that a split fits the other splits of a folder; raises as `check_same_kind`."""
    for other in splits_in(folder):
        if other != split:
            check_same_kind(settings, read_card(folder, other), f"split {split!r}", f"split {other!r} of {folder}")


def check_same_kind(ours: Mapping, theirs: Mapping, our_name: str, their_name: str) -> None:
    """Checks that two splits can belong to one data set.

    Raises:
      ValueError: image size, latent shape, autoencoder or classes differ. The message has both values.
    """

    def kind(card):
        vae = {f"vae.{key}": card["vae"][key] for key in ("encoder_sha256", "scaling_factor", "dtype")}
        vae["vae.quantizer"] = card["vae"].get("quantizer")
        return vae | {key: card[key] for key in ("image_size", "latent_shape", "class_names")}

    ours, theirs = kind(ours), kind(theirs)
    differing = [
        f"{key} is {ours[key]!r} in {our_name}, {theirs[key]!r} in {their_name}"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if differing:
        raise ValueError("these splits do not belong to one data set: " + "; ".join(differing))


def _write_metadata(folder: epath.Path, cards: Mapping[str, Mapping]) -> None:
    import tensorflow_datasets as tfds

    split_infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard["num_records"] for shard in card["shards"]],
            num_bytes=sum(shard["num_bytes"] for shard in card["shards"]),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder,
                dataset_name=NAME,
                split=split,
                filetype_suffix="array_record",
                template=_FILENAME_TEMPLATE,
            ),
        )
        for split, card in sorted(cards.items())
    ]
    card = next(iter(cards.values()))
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=_features(card["latent_shape"], card["class_names"]),
        split_infos=split_infos,
        filename_template=_FILENAME_TEMPLATE,
        description=f"Latents of {card['source']}",
        check_data=False,  # the check needs TensorFlow
    )


def has_shard(folder: epath.Path, shard: Mapping) -> bool:
    """Whether a shard exists with the size that `ShardWriter.finish` returned."""
    path = folder / shard["file"]
    return path.exists() and path.stat().length == shard["file_bytes"]


def check_shards(folder: epath.Path, card: Mapping) -> None:
    """Raises FileNotFoundError unless all shards of a card exist with their recorded size."""
    missing = [shard["file"] for shard in card["shards"] if not has_shard(folder, shard)]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of its shards or has them cut short: {missing[0]} ...")


def check_sums(folder: epath.Path, card: Mapping) -> None:
    """Rereads the shards of a card. Raises ValueError, listing those whose checksums are not the card's."""
    digests = {shard["file"]: (file_sha256(folder / shard["file"]), shard["sha256"]) for shard in card["shards"]}
    wrong = [f"{k}: SHA-256 is {found}, the card has {was}" for k, (found, was) in digests.items() if found != was]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(digests)} shards are damaged:\n  " + "\n  ".join(wrong))


def _local_copy(folder: epath.Path, card: Mapping) -> epath.Path:
    """Copies a split of a bucket to a local cache, without the files that are already there. Returns the folder."""
    wanted = {shard["file"]: shard["sha256"] for shard in card["shards"]}
    identity = hashlib.sha256(json.dumps([str(folder), wanted]).encode()).hexdigest()[:16]
    local = epath.Path("~/.cache/diffussm_jax/latents").expanduser() / identity
    local.mkdir(parents=True, exist_ok=True)
    metadata = [path.name for path in folder.iterdir() if path.suffix in (".json", ".txt")]
    for name in [*wanted, *metadata]:
        if (local / name).exists():
            continue
        partial = partial_path(local / name)
        (folder / name).copy(partial, overwrite=True)
        if name in wanted and file_sha256(partial) != wanted[name]:
            partial.unlink()
            raise ValueError(f"{folder / name} is damaged: its checksum differs from the card's")
        partial.replace(local / name)
    return local


class Latents:
    """The records of a finished split by index: {"mean", "log_std": [2, H, W, C] float16, "label": int32}.

    Thread-safe.

    Raises:
      FileNotFoundError: the folder has no such split, or a shard is missing.
      ValueError: the metadata, or a shard in a bucket, are damaged; or, when it is read, a record.
    """

    holds_latents = True
    is_croppable = False

    def __init__(self, path: epath.PathLike, split: str):
        import tensorflow_datasets as tfds

        folder = epath.Path(path)
        self.card = read_card(folder, split)
        self.class_names = tuple(self.card["class_names"])
        check_shards(folder, self.card)
        if is_bucket(folder):
            folder = _local_copy(folder, self.card)
        self._folder = folder
        try:
            builder = tfds.builder_from_directory(str(folder))
            self._check_metadata(builder.info, split)
            self._records = builder.as_data_source(split=split)
        except Exception as error:
            raise ValueError(f"TFDS cannot read {folder}, split {split!r}: {error}") from error

    def _check_metadata(self, info: Any, split: str) -> None:
        """Raises ValueError if TFDS's files do not fit the card; TFDS would read other records, or fail at each one."""
        lengths = [shard["num_records"] for shard in self.card["shards"]]
        if (found := info.splits[split].shard_lengths) != lengths:
            raise ValueError(f"dataset_info.json has the shard lengths {found}, the card {lengths}")
        if missing := _RECORD - set(info.features):
            raise ValueError(f"features.json lacks {sorted(missing)}")

    def __len__(self) -> int:
        return self.card["num_records"]

    def key(self, index: int) -> str:
        """The record's number. Its image's name is in the record, and reading all of them would take too long."""
        return str(index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            record = self._records[int(index)]
        except Exception as error:  # of Riegeli or TFDS
            ends = np.cumsum([shard["num_records"] for shard in self.card["shards"]])
            number = int(np.searchsorted(ends, index, side="right"))
            shard = self.card["shards"][number]
            first_line = str(error).partition("\n")[0]
            raise ValueError(
                f"record {index - ends[number] + shard['num_records']} of the shard {self._folder / shard['file']} "
                f"is damaged: {first_line}. `python -m diffussm_jax.precompute --verify` lists the damaged shards of a "
                "split; delete them, and repeat the command that made them"
            ) from error
        return {"mean": record["mean"], "log_std": record["log_std"], "label": np.int32(record["label"])}


def verify(folder: epath.PathLike, split: str) -> dict:
    """Rereads a split, compares it with its card, and returns the card.

    Raises:
      FileNotFoundError: the split or a shard is missing.
      ValueError: shards are damaged. The message lists all of them.
    """
    latents = Latents(folder, split)
    check_sums(epath.Path(folder), latents.card)
    if len(latents._records) != len(latents):
        raise ValueError(f"TFDS finds {len(latents._records)} records, the card has {len(latents)}")
    return latents.card


def draw_latents(batch: Mapping[str, jax.Array], key: jax.Array, scaling_factor: float) -> jax.Array:
    """Draws x_0 from the normal distributions of a batch. Each record uses the image or its mirror image at random.

    Args:
      batch: "mean" and "log_std", [B, 2, H, W, C] float16.
      scaling_factor: of the autoencoder; scales latents to about unit standard deviation.

    Returns:
      [B, H, W, C] float32, scaled.
    """
    mirror_key, noise_key = jax.random.split(key)
    B = batch["mean"].shape[0]
    is_mirrored = jax.random.bernoulli(mirror_key, 0.5, (B, 1, 1, 1))
    mean, log_std = (
        jnp.where(is_mirrored, x[:, 1], x[:, 0]).astype(jnp.float32) for x in (batch["mean"], batch["log_std"])
    )
    return scaling_factor * (mean + jnp.exp(log_std) * jax.random.normal(noise_key, mean.shape))
