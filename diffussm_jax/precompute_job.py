"""Precomputes one split of a latent data set; the implementation of `diffussm_jax.precompute`.

Shards are written in order and atomically. Records of the finished shards are kept until the split is complete, so that
the same job resumes after any interruption with the missing shards, and writes the same bytes.
"""

import collections
import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets  # noqa: F401 - before threads start: its import replaces `__import__`
from etils import epath
from tqdm import tqdm

from diffussm_jax.autoencoder import Autoencoder, encoder_hash
from diffussm_jax.data import latents
from diffussm_jax.data.card import SHARD, SKIPPED, about_quantizer, wrong_keys
from diffussm_jax.data.decoding import BrokenImage, reserve_until_cropped
from diffussm_jax.data.names import check_class_names, check_split_name
from diffussm_jax.data.sources import Source
from diffussm_jax.data.transforms import center_crop, image_grid, to_gray, to_uint8, to_unit_range
from diffussm_jax.io import folder_lock, read_json, weights_hash, write_whole
from diffussm_jax.parallel.hosts import barrier_on_all_hosts
from diffussm_jax.parallel.mesh import make_mesh, over_batch, replicated

_NUM_VERIFIED_IMAGES = 8
_IN_FLIGHT = 2  # batches on the devices while earlier batches are written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The inputs and settings of one split.

    Attributes:
      out: folder of the data set.
      image_size: pixels.
      vae_name: for the card.
      batch_size: images per batch; a batch never crosses shards.
      shard_size: images per shard, including broken images.
      max_bad_fraction: the allowed fraction of broken images.
      num_threads: decoding threads.
    """

    source: Source
    out: epath.PathLike
    split: str
    image_size: int
    vae_name: str
    vae: Autoencoder
    params: dict
    batch_size: int = 32
    shard_size: int = 4096
    max_bad_fraction: float = 0.01
    num_threads: int = 8

    @property
    def folder(self) -> epath.Path:
        return epath.Path(self.out)

    @property
    def num_shards(self) -> int:
        return -(-len(self.source) // self.shard_size)

    @property
    def num_rows(self) -> int:
        """Rows of the array that holds a batch: a multiple of the local devices, and few if there are few images."""
        num_devices = jax.local_device_count()
        return -(-min(self.batch_size, self.shard_size, len(self.source)) // num_devices) * num_devices

    def shard_range(self, shard: int) -> range:
        """The source's items in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.source)))

    def settings(self) -> dict:
        """All settings that determine the content of the shards, for the card."""
        size = self.image_size // self.vae.downsampling
        return {
            "source": _text(self.source.description),
            "source_fingerprint": self.source.fingerprint(),
            "num_images": len(self.source),
            "class_names": [_text(name) for name in self.source.class_names],
            "image_size": self.image_size,
            "crop": "center",
            "latent_shape": [size, size, self.vae.latent_channels],
            "vae": {
                "name": self.vae_name,
                "sha256": weights_hash(self.params),
                "encoder_sha256": encoder_hash(self.params),
                "scaling_factor": self.vae.scaling_factor,
                "dtype": jnp.dtype(self.vae.dtype).name,
                **about_quantizer(getattr(self.vae, "num_vq_embeddings", None)),
            },
            "batch_size": self.batch_size,
            "shard_size": self.shard_size,
        }


def _differences(before: dict, now: dict) -> list[str]:
    """Lists differing settings. Source and autoencoder are compared by fingerprint, not by name."""

    def flat(settings):
        vae = settings.get("vae")
        named = {f"vae.{key}": value for key, value in vae.items() if key != "name"} if isinstance(vae, dict) else {}
        return named | {key: value for key, value in settings.items() if key not in ("source", "vae")}

    before, now = flat(before), flat(now)
    return [f"{key}: was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]]


class _Progress:
    """The progress of an unfinished split: a file for its settings and one per finished shard."""

    def __init__(self, job: Job, settings: dict):
        self._job, self._folder = job, job.folder / f"unfinished-{job.split}"
        path = self._folder / "settings.json"
        has_shards = self._folder.exists() and any(re.fullmatch(r"\d+\.json", p.name) for p in self._folder.iterdir())
        differing = _differences(read_json(path), settings) if has_shards and path.exists() else []
        if differing:
            raise ValueError(
                f"{job.folder} holds a begun split {job.split!r} of other settings; delete it or choose another "
                "--out:\n  " + "\n  ".join(differing)
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=1))

    def _path(self, shard: int) -> epath.Path:
        return self._folder / f"{shard:05d}.json"

    def read(self, shard: int) -> dict | None:
        """Reads what `finished` wrote, or None if that is damaged or the shard does not exist."""
        if not self._path(shard).exists():
            return None
        try:
            note = read_json(self._path(shard))
        except ValueError:
            return None
        return note if _is_whole(note) and latents.has_shard(self._job.folder, note["shard"]) else None

    def finished(self, shard: int, about: dict, skipped: list[dict]) -> None:
        """Records a finished shard."""
        write_whole(self._path(shard), json.dumps({"shard": about, "skipped": skipped}))

    def delete(self) -> None:
        """Deletes the records, which the card replaces."""
        self._folder.rmtree()


def _is_whole(note: dict) -> bool:
    """Whether a record of a finished shard has all of its values."""
    shard, skipped = note.get("shard"), note.get("skipped")
    if wrong_keys(shard, SHARD | {"sums": list}) or not isinstance(skipped, list):
        return False
    try:
        sums = np.asarray(shard["sums"], np.float64)
    except (ValueError, TypeError, OverflowError):
        return False
    is_fine = sums.ndim == 2 and len(sums) == 3 and np.isfinite(sums).all()
    return bool(is_fine) and not any(wrong_keys(item, SKIPPED) for item in skipped)


def make_encoder(job: Job) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
    """Makes a function from images [b, S, S, C_in] uint8 to mean and log_std [b, 2, H, W, C] float16.

    Index 1 of axis 1 is the mirror image. The batch is split over the local devices.

    Raises:
      ValueError: the batch size is not a multiple of the number of local devices.
    """
    devices = jax.local_devices()
    if job.batch_size % len(devices):
        raise ValueError(f"--batch_size={job.batch_size} is not a multiple of the {len(devices)} local devices")
    mesh = make_mesh(devices=devices)

    def encode(params, images):
        x = to_unit_range(images)
        outputs = [job.vae.apply({"params": params}, mirrored, method="encode") for mirrored in (x, jnp.flip(x, 2))]
        return tuple(jnp.stack(pair, 1).astype(jnp.float16) for pair in zip(*outputs, strict=True))

    jitted = jax.jit(encode, in_shardings=(replicated(mesh), over_batch(mesh)), out_shardings=over_batch(mesh))
    params = jax.device_put(job.params, replicated(mesh))

    def encode_batch(images):
        with jax.default_matmul_precision("float32"):  # TPUs and GPUs would round products of stored latents
            return jitted(params, jax.device_put(images, over_batch(mesh)))

    return encode_batch


@dataclasses.dataclass(frozen=True)
class _Item:
    """One image, or the reason why it is missing."""

    index: int
    image: np.ndarray | None
    label: int
    key: str
    reason: str


def _text(name: str) -> str:
    """Escapes bytes of a file name that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _read(job: Job, index: int) -> _Item:
    try:
        with reserve_until_cropped(job.image_size):
            image, label, key, _ = job.source[index]
            if image.shape[-1] > job.vae.in_channels:
                image = to_gray(image)
            image = center_crop(image, job.image_size)
    except BrokenImage as error:
        key, reason = error.args
        return _Item(index, None, 0, _text(key), _text(str(reason)))
    if image.shape[-1] < job.vae.in_channels:
        image = image.repeat(job.vae.in_channels, -1)
    return _Item(index, image, label, _text(key), "")


def _items(job: Job, shards: list[int]) -> Iterator[tuple[int, list[_Item]]]:
    """Yields (shard, next batch of items) in order, with an empty batch at the end of each shard. Threads read ahead.

    A batch has `batch_size` images, plus the broken items between them.
    """
    indices = [i for shard in shards for i in job.shard_range(shard)]
    options = grain.ReadOptions(num_threads=job.num_threads, prefetch_buffer_size=4 * job.batch_size)
    stream = iter(grain.MapDataset.source(indices).map(lambda i: _read(job, i)).to_iter_dataset(options))
    for shard in shards:
        batch: list[_Item] = []
        for _ in job.shard_range(shard):
            batch.append(next(stream))
            if sum(item.image is not None for item in batch) == job.batch_size:
                yield shard, batch
                batch = []
        if batch:
            yield shard, batch
        yield shard, []


def _encoded(job: Job, encode, shards: list[int]) -> Iterator[tuple[int, list[_Item], tuple | None]]:
    """Yields `_items` with their latents. A few batches are encoded ahead."""
    ahead: collections.deque = collections.deque()
    for shard, batch in _items(job, shards):
        images = [item.image for item in batch if item.image is not None]
        encoded = None
        if images:
            padding = [np.zeros_like(images[0])] * (job.num_rows - len(images))  # one shape avoids recompilation
            encoded = encode(np.stack(images + padding))
        ahead.append((shard, batch, encoded))
        if len(ahead) > _IN_FLIGHT:
            yield ahead.popleft()
    yield from ahead


def precompute(job: Job) -> dict:
    """Makes the missing shards of a split, and returns its card.

    Raises:
      ValueError: the folder has this split with other settings, the autoencoder does not fit the images, the name of a
        class cannot be written, more than `max_bad_fraction` of the images are broken, or another job makes this split
        (`io.folder_lock`). Finished shards are kept.
    """
    _check_autoencoder(job)
    check_split_name(job.split)
    settings = job.settings()
    if (job.folder / latents.card_name(job.split)).exists():
        return check_finished(job, settings)
    check_class_names(job.source.class_names)
    latents.check_joins(job.folder, job.split, settings)
    encode = make_encoder(job)
    with contextlib.ExitStack() as lock:
        with barrier_on_all_hosts():  # each host locks its share
            lock.enter_context(folder_lock(job.folder, f"precompute-{job.split}-{jax.process_index()}"))
        if (job.folder / latents.card_name(job.split)).exists():  # another job has just finished it
            return check_finished(job, settings)
        progress = _Progress(job, settings)
        with barrier_on_all_hosts():
            ours = range(jax.process_index(), job.num_shards, jax.process_count())
            missing = [shard for shard in ours if progress.read(shard) is None]
            _write_shards(job, encode, progress, missing, settings)
        with barrier_on_all_hosts():
            if jax.process_index() == 0:
                _finish(job, progress, settings)
    return latents.read_card(job.folder, job.split)


def _check_autoencoder(job: Job) -> None:
    """Raises ValueError if the autoencoder does not take such images, gray or in colour."""
    vae = job.vae
    if job.image_size % vae.downsampling:
        raise ValueError(
            f"--image_size={job.image_size} is not a multiple of the autoencoder's downsampling {vae.downsampling}"
        )
    if vae.in_channels not in (1, 3) or vae.out_channels != vae.in_channels:
        raise ValueError(
            f"the autoencoder {job.vae_name} takes {vae.in_channels} channels and returns {vae.out_channels}; images "
            "have 1 (gray) or 3, before and after"
        )


def _finish(job: Job, progress: _Progress, settings: dict) -> None:
    """Writes the card after all hosts have written their shards."""
    notes = [progress.read(shard) for shard in range(job.num_shards)]
    lost = [shard for shard, note in enumerate(notes) if note is None]
    if lost:
        raise ValueError(f"shards {lost} are missing in {job.folder}: do all hosts share this folder?")
    skipped = [item for note in notes for item in note["skipped"]]
    _check_bad(job, skipped)
    latents.write_card(job.folder, job.split, settings, [note["shard"] for note in notes], skipped)
    progress.delete()


def check_finished(job: Job, settings: dict) -> dict:
    """Reads the card of a finished split. Raises ValueError if its settings differ, apart from batch and shard size."""
    card = latents.read_card(job.folder, job.split)
    content = {key: value for key, value in settings.items() if key not in ("batch_size", "shard_size")}
    differing = _differences(card, content)
    if differing:
        raise ValueError(
            f"{job.folder} already holds split {job.split!r}, of other settings:\n  " + "\n  ".join(differing)
        )
    latents.check_shards(job.folder, card)
    return card


def _write_shards(job: Job, encode, progress: _Progress, shards: list[int], settings: dict) -> None:
    """Makes shards in order, and records each finished shard."""
    todo = sum(len(job.shard_range(shard)) for shard in shards)
    finished = [note for shard in range(job.num_shards) if (note := progress.read(shard))]
    all_skipped, started = [item for note in finished for item in note["skipped"]], time.time()
    writer, skipped = None, []
    try:
        with tqdm(total=todo, unit="image", dynamic_ncols=True, disable=jax.process_index() > 0) as bar:
            for shard, batch, encoded in _encoded(job, encode, shards):
                if writer is None:
                    writer = latents.ShardWriter(
                        job.folder, job.split, shard, job.num_shards, settings["latent_shape"], settings["class_names"]
                    )
                good = [item for item in batch if item.image is not None]
                bad = [item for item in batch if item.image is None]
                if good:
                    for item, mean, log_std in zip(good, *map(np.asarray, encoded), strict=False):
                        writer.write(mean, log_std, item.label, item.key)
                bad = [{"index": item.index, "key": item.key, "reason": item.reason} for item in bad]
                skipped += bad
                all_skipped += bad
                _check_bad(job, all_skipped)
                bar.update(len(batch))
                if not batch:
                    progress.finished(shard, writer.finish(), skipped)
                    writer, skipped = None, []
                    _log(
                        job.folder,
                        f"{job.split}: shard {shard} finished, {bar.n / (time.time() - started):.1f} images/s",
                    )
    finally:
        if writer is not None:
            writer.discard()


def _check_bad(job: Job, skipped: list[dict]) -> None:
    if len(skipped) > job.max_bad_fraction * len(job.source):
        raise ValueError(
            f"{len(skipped)} broken images are more than max_bad_fraction = {job.max_bad_fraction} of "
            f"{len(job.source)}; the last: {skipped[-1]['key']}: {skipped[-1]['reason']}. Finished shards are kept."
        )


def _log(out: epath.Path, line: str) -> None:
    """Appends a line with the time to a log file. The data itself has no times, so that it is reproducible."""
    path = out / f"precompute-{jax.process_index()}.log"
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def draw_reconstructions(job: Job) -> np.ndarray:
    """A uint8 picture of originals, above their reconstructions, for images spread over a finished split."""
    records = latents.Latents(job.folder, job.split)
    skipped = [item["index"] for item in records.card["skipped"]]
    kept = np.setdiff1d(np.arange(len(job.source)), skipped)
    chosen = np.unique(np.linspace(0, len(records) - 1, _NUM_VERIFIED_IMAGES).astype(int))
    originals = np.stack([_read(job, int(kept[i])).image for i in chosen])
    means = np.stack([records[i]["mean"][0] for i in chosen]).astype(np.float32)
    decode = jax.jit(lambda params, mean: job.vae.apply({"params": params}, mean, method="decode"))
    decoded = np.concatenate([to_uint8(decode(job.params, mean[None])) for mean in means])
    return image_grid(np.concatenate([originals, decoded]), len(chosen))
