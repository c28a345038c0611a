"""From `config.data` to records, loaders and the codec; the part of `build` that knows data and autoencoders."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffussm_jax import registry
from diffussm_jax.autoencoder import Autoencoder, encoder_hash, from_diffusers, make_decoder
from diffussm_jax.data.card import check_card, check_quantizer, read_card
from diffussm_jax.data.codec import Codec, latent_codec, pixel_codec
from diffussm_jax.data.holdout import Subset, held_out
from diffussm_jax.data.latents import check_sums
from diffussm_jax.data.loader import Loader, Records
from diffussm_jax.data.pixels import Pixels
from diffussm_jax.parallel.mesh import local_rows, make_mesh


def open_data(data: ConfigDict, split: str) -> Any:
    """The source of a split of `config.data`: images, or records of latents.

    Raises:
      ValueError: there is no path, or the data are damaged.
      FileNotFoundError: there are no such data.
    """
    open_split = registry.factory("source", data.source, data, path=data.path, split=split)
    if "path" in open_split.keywords and not data.path:
        raise ValueError(f"config.data.source = {data.source!r} needs a path: give --config.data.path=...")
    return open_split()


@dataclasses.dataclass(frozen=True)
class DataParts:
    """The data that a config describes, each part made when it is first asked for.

    Attributes:
      config: of the run; must not be modified afterwards.
      given_mesh: the devices; if None, those of `config.mesh`.
      has_decoder: whether latents will be decoded; if not, the autoencoder is not read.
    """

    config: ConfigDict
    given_mesh: Mesh | None = None
    has_decoder: bool = True

    @functools.cached_property
    def mesh(self) -> Mesh:
        return self.given_mesh or make_mesh(**self.config.mesh.to_dict())

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what the model sees, pixels or latents."""
        data = self.config.data
        size = data.image_size // data.downsampling
        return size, size, data.num_channels

    @property
    def has_latents(self) -> bool:
        """Whether the data are latents of an autoencoder, not images."""
        return getattr(registry.component("source", self.config.data.source), "holds_latents", False)

    def _open(self, split: str) -> Any:
        """The source of a split, which fits the config.

        Raises:
          ValueError: it does not; both values are named. Or as `open_data`.
          FileNotFoundError: there are no such data.
        """
        data, source = self.config.data, open_data(self.config.data, split)
        if self.has_latents:
            check_card(source.card, data.to_dict(), data.path)
            if data.verify and jax.process_index() == 0:
                check_sums(epath.Path(data.path), source.card)
        elif data.num_classes not in (0, len(source.class_names)):
            raise ValueError(
                f"config.data.num_classes = {data.num_classes}, but {source.description} has "
                f"{len(source.class_names)} classes (0 trains without them)"
            )
        return source

    def _records(self, source: Any, *, is_cropped: bool = True) -> Records:
        """The records of a source; images cropped, or as large as they are."""
        data = self.config.data
        if self.has_latents:
            return source
        options = {"is_cropped": is_cropped, "min_crop_fraction": data.min_crop_fraction}
        return Pixels(source, data.image_size, data.num_channels, **options)

    @functools.cached_property
    def _train_source(self) -> Any:
        """The source of `config.data.split`, with what is held out of it."""
        return self._open(self.config.data.split)

    @functools.cached_property
    def _is_held_out(self) -> np.ndarray:
        """[len(_train_source)] bool."""
        return held_out(self._train_source, self.config.data.holdout)

    @functools.cached_property
    def train_records(self) -> Records:
        """What is trained on."""
        source, is_cropped = self._train_source, not self.config.data.random_crop
        if self.config.data.holdout:
            source = Subset(source, np.flatnonzero(~self._is_held_out))
        return self._records(source, is_cropped=is_cropped)

    @functools.cached_property
    def eval_records(self) -> Records | None:
        """The held-out data, if there are any: a split of their own, or a part of the split that is trained on.

        Raises:
          ValueError: their classes are not those of `train_records`.
        """
        data = self.config.data
        if data.holdout:
            return self._records(Subset(self._train_source, np.flatnonzero(self._is_held_out)))
        if not data.eval_split:
            return None
        source, training = self._open(data.eval_split), self._train_source
        if source.class_names != training.class_names:
            raise ValueError(
                f"the classes of split {data.split!r} are {training.class_names}, those of {data.eval_split!r} are "
                f"{source.class_names}: their labels do not agree"
            )
        return self._records(source)

    def _loader(self, records: Records, seed: int | None, augment: Callable | None = None) -> Loader:
        rows = local_rows(self.mesh, self.config.batch_size)
        threads = self.config.data.num_threads
        return Loader(records, self.config.batch_size, seed, rows=rows, num_threads=threads, augment=augment)

    @functools.cached_property
    def train_loader(self) -> Loader:
        records = self.train_records
        augment = records.crop_at_random if self.config.data.random_crop else None
        return self._loader(records, self.config.seed, augment)

    @functools.cached_property
    def eval_loader(self) -> Loader | None:
        """Batches of `eval_records`."""
        return None if self.eval_records is None else self._loader(self.eval_records, None)

    @functools.cached_property
    def codec(self) -> Codec:
        """Between records and x_0.

        Raises:
          ValueError: the autoencoder is not that of the latents.
          FileNotFoundError: it cannot be had.
        """
        data = self.config.data
        if not self.has_latents:
            return pixel_codec(is_flipped=data.random_flip)
        return latent_codec(data.scaling_factor, make_decoder(*self._autoencoder()) if self.has_decoder else None)

    def _autoencoder(self) -> tuple[Autoencoder, dict]:
        """The autoencoder of the latents. Its encoder must be the one that made them; its decoder may be another."""
        data = self.config.data
        if not data.vae:
            raise ValueError(
                "decoding samples needs the autoencoder that made the latents: give --config.data.vae=... (or "
                "--config.sample_every=0 to train without samples; or --vae=... to diffussm_jax.sample)"
            )
        vae, params = from_diffusers(data.vae)
        found = {"num_channels": vae.latent_channels, "downsampling": vae.downsampling}
        found["scaling_factor"] = vae.scaling_factor
        wrong = [f"config.data.{k} = {data[k]}, it has {v}" for k, v in found.items() if data[k] != v]
        if wrong:
            raise ValueError(f"the autoencoder {data.vae} does not fit the config: " + "; ".join(wrong))
        try:
            card = read_card(data.path, data.split)
        except FileNotFoundError:  # sampling elsewhere than where the latents are
            return vae, params
        check_quantizer(card, getattr(vae, "num_vq_embeddings", None), data.vae)
        if encoder_hash(params) != card["vae"]["encoder_sha256"]:
            raise ValueError(
                f"the autoencoder {data.vae} does not have the encoder that made the latents of {data.path}: its "
                f"SHA-256 is {encoder_hash(params)}, that of {card['vae']['name']} was {card['vae']['encoder_sha256']}"
            )
        return vae, params
