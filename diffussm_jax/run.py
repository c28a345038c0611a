"""A trained run, opened for sampling and evaluation:

    from diffussm_jax import load_run

    run = load_run("runs/digits")
    images, labels = run.sample(100, guidance_scale=1.5)

Configs and checkpoints of older versions are read too.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffussm_jax import config as config_lib
from diffussm_jax.build import Parts
from diffussm_jax.data.codec import Codec
from diffussm_jax.diffusion import Prediction, Process
from diffussm_jax.io import check_path, read_json, shapes_by_path
from diffussm_jax.models import Backbone
from diffussm_jax.models.sampling import Generator
from diffussm_jax.parallel.mesh import make_mesh, replicated
from diffussm_jax.training.checkpoint import Checkpointer
from diffussm_jax.training.loop import CONFIG_NAME
from diffussm_jax.training.posthoc_ema import Snapshots
from diffussm_jax.validation import validate
from diffussm_jax.weights import WEIGHTS, read_weights


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, its objects, and the averaged parameters of one checkpoint, on all devices.

    Attributes:
      parts: the objects that the config describes.
      params: of the model.
      step: of the checkpoint.
      guide: a run whose model guides samples in place of the unconditional prediction (autoguidance).
    """

    parts: Parts
    params: dict
    step: int
    guide: "Run | None" = None

    @property
    def config(self) -> ConfigDict:
        return self.parts.config

    @property
    def model(self) -> Backbone:
        return self.parts.model

    @functools.cached_property
    def codec(self) -> Codec:
        """Between images and x_0."""
        return self.parts.codec

    def samples_name(self, seed: int, ema_sigma: float | None = None) -> str:
        """How samples of this run are drawn, for the names of files; `ema_sigma` as it was given to `load_run`."""
        of_ema = "" if ema_sigma is None else f"_ema{ema_sigma:g}"
        of_guide = "" if self.guide is None else f"_guide{self.guide.step}"
        return f"step_{self.step:08d}{of_ema}{of_guide}_{config_lib.sampling_name(self.config, seed)}"

    @functools.cached_property
    def _generator(self) -> Generator:
        """`parts.generator`, guided by the guide if there is one."""
        generator = self.parts.generator
        return generator if self.guide is None else dataclasses.replace(generator, guide=self.guide.parts.generator)

    @functools.cached_property
    def _denoise(self) -> Callable:
        return jax.jit(lambda params, *arguments: self.parts.generator.predict(params)(*arguments))

    def denoise(self, x_t: jax.Array, t: jax.Array, condition=None) -> Prediction:
        """The model's prediction of x_0 and noise, not guided and not clipped.

        Args:
          x_t: [B, H, W, C] float32.
          t: [B], times of the run's process.
          condition: labels [B], a dict of arrays, or None for an unconditional model.
        """
        return self._denoise(self.params, x_t, t, self.model.as_condition(condition))

    def sample(
        self,
        num_samples: int = 100,
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        batch_size: int = 256,
        progress: Callable[[int], None] = lambda num_images: None,
        **sampling,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images and their labels.

        Args:
          num_samples: N.
          labels: the classes, taken in turn; all if None.
          seed: of the noise. The same seed and batch size give the same images.
          batch_size: images at a time.
          progress: called with the number of images of each batch that is done.
          **sampling: other values for keys of `config.sampling`, such as sampler="ddim", num_steps=50,
            guidance_scale=1.5.

        Returns:
          images [N, H, W, C] uint8, labels [N] int32.

        Raises:
          ValueError: a label or an option is not allowed.
          FloatingPointError: images have values that are not finite.
        """
        run = self.with_sampling(**sampling) if sampling else self
        all_labels = choose_labels(labels, num_samples, self.config.data.num_classes)
        batch_size, images = min(batch_size, num_samples), []
        for i, start in enumerate(range(0, num_samples, batch_size)):
            of_batch = all_labels[start : start + batch_size]
            images.append(run.sample_batch(of_batch, i, seed=seed, batch_size=batch_size))
            progress(len(images[-1]))
        return np.concatenate(images), all_labels

    def sample_batch(self, labels: np.ndarray, index: int, *, seed: int, batch_size: int) -> np.ndarray:
        """The images of batch number `index` of `sample`, which depend on no other batch.

        Args:
          labels: [n] int32 with n <= batch_size; zeros for an unconditional model.
          index: of the batch.
          seed: of the noise.
          batch_size: images that are drawn; the first n are returned.

        Returns:
          [n, H, W, C] uint8.

        Raises:
          FloatingPointError: as `sample`.
        """
        condition = self.model.example_condition(batch_size)
        if "label" in condition:  # one shape, one compilation
            condition["label"] = np.resize(labels, batch_size)
        key = jax.random.fold_in(jax.random.key(seed), index)
        params = self.params if self.guide is None else (self.params, self.guide.params)
        x_0 = self._generator(params, condition, batch_size, key)
        try:
            return self.codec.decode(x_0)[: len(labels)]
        except FloatingPointError as error:
            raise FloatingPointError(
                f"sampling failed in batch {index}: {error}. With config.sampling.guidance_scale = "
                f"{self.config.sampling.guidance_scale}; try a smaller one, more steps, or another checkpoint"
            ) from error

    def with_sampling(self, **sampling) -> "Run":
        """The same run with other values of `config.sampling`.

        Raises:
          ValueError: a value is not allowed.
        """
        key = tuple(sorted(sampling.items()))
        if key not in self._variants:  # each compiles a program of its own
            config = config_lib.override(self.config, _dotted(sampling))
            validate(config, has_guide=self.guide is not None)
            self._variants[key] = dataclasses.replace(self, parts=dataclasses.replace(self.parts, config=config))
        return self._variants[key]

    @functools.cached_property
    def _variants(self) -> dict[tuple, "Run"]:
        return {}


def _dotted(sampling: dict) -> dict:
    return {f"sampling.{key}": value for key, value in sampling.items()}


def choose_labels(labels: Sequence[int] | None, num_samples: int, num_classes: int) -> np.ndarray:
    """[num_samples] int32: the given labels, or all classes, taken in turn; zeros for an unconditional model.

    Raises:
      ValueError: a label is no class of the model, or the model has none.
    """
    if num_classes == 0:
        if labels:
            raise ValueError(f"labels {list(labels)} were given to an unconditional model")
        return np.zeros(num_samples, np.int32)
    chosen = range(num_classes) if labels is None else list(labels)
    if not chosen or min(chosen) < 0 or max(chosen) >= num_classes:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {list(labels)}")
    return np.resize(np.asarray(chosen, np.int32), num_samples)


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """The config of a run, also of one that an older version made.

    Raises:
      FileNotFoundError: the folder holds no run.
      ValueError: the file is damaged, or of a newer version.
    """
    check_path(os.fspath(workdir))
    path = epath.Path(workdir) / CONFIG_NAME
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run: there is no {CONFIG_NAME} in it")
    try:
        return config_lib.from_plain(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_run(
    workdir: epath.PathLike,
    checkpoint: str | int = "latest",
    *,
    ema_sigma: float | None = None,
    guide: str | int | None = None,
    vae: str | None = None,
    has_decoder: bool = True,
    mesh: Mesh | None = None,
    **sampling,
) -> Run:
    """Opens a run, with the averaged weights of a checkpoint.

    Args:
      workdir: of the run; or a folder that `diffussm_jax.export` wrote.
      checkpoint: "latest", "best" or a step.
      ema_sigma: relative standard deviation of a post-hoc EMA (`training.posthoc_ema`), for a run that stored averages;
        the checkpoint's own average if None.
      guide: a weaker model, for autoguidance (arXiv 2406.02507): "STEP" of an earlier checkpoint of this run, or
        "WORKDIR[:STEP]" of another run or export on the same data and process. With `guidance_scale` w the prediction
        is guide + w (model - guide), both with the condition.
      vae: a diffusers folder or repository of the autoencoder that decodes latents; the config's if None.
      has_decoder: whether latents will be decoded to images; if not, no autoencoder is needed.
      mesh: the devices, each of which gets all parameters; if None, all devices.
      **sampling: other values for keys of `config.sampling`.

    Raises:
      FileNotFoundError: there is no run, or no checkpoint of it.
      ValueError: an option is not allowed, or the checkpoint is of another model.
    """
    config = config_lib.override(read_config(workdir), _dotted(sampling))
    config.data.vae = vae or config.data.vae
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    validate(config, has_guide=guide is not None)
    mesh = mesh or make_mesh()
    parts = Parts(config, mesh, has_decoder)
    if not parts.trains_model:
        raise ValueError(f"the task {config.task.name!r} of {workdir} trains no model that could be sampled from")
    parts.codec  # noqa: B018 - an autoencoder that is missing should be found before anything large is read
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        parts.model.abstract_params(parts.input_shape),
    )
    if (epath.Path(workdir) / WEIGHTS).exists():
        if str(checkpoint) != "latest" or ema_sigma is not None:
            raise ValueError(f"{workdir} is an export, and holds one set of weights: choose neither checkpoint nor EMA")
        params, step = read_weights(workdir, like)
    elif ema_sigma is None:
        best = config_lib.best_checkpoint(config)
        with contextlib.closing(Checkpointer(workdir, best=best, is_read_only=True)) as checkpointer:
            step = checkpointer.resolve(str(checkpoint))
            params = checkpointer.restore_ema(step, like)
    else:
        with contextlib.closing(Snapshots(workdir, is_read_only=True)) as snapshots:
            step = snapshots.resolve(_snapshot_step(str(checkpoint)))
            params = snapshots.reconstruct(ema_sigma, like, step=step)
    return Run(parts, params, step, None if guide is None else _load_guide(parts, str(guide), workdir))


def _load_guide(parts: Parts, guide: str, workdir: epath.PathLike) -> Run:
    place = (workdir, guide) if guide.isdecimal() else split_checkpoint(guide)
    found = load_run(*place, has_decoder=False, mesh=parts.mesh)
    _check_guide(parts, found.parts, f"guide = {guide!r}")
    return found


def split_checkpoint(value: str) -> tuple[str, str]:
    """Parses WORKDIR[:CHECKPOINT] to (folder, checkpoint); a checkpoint is a step, "latest" or "best"."""
    folder, colon, checkpoint = value.rpartition(":")
    if colon and (checkpoint.isdecimal() or checkpoint in ("latest", "best")):
        return folder, checkpoint
    return value, "latest"


def _check_guide(parts: Parts, other: Parts, name: str) -> None:
    """Raises ValueError unless the models of both see the same inputs, conditions and process."""

    def levels(process: Process) -> np.ndarray:
        times = process.times(process.num_steps or 1000)
        return np.stack([times, process.alpha(times), process.sigma(times)])

    def conditions(parts: Parts) -> dict:
        return {"num_classes": parts.config.data.num_classes, **shapes_by_path(parts.model.example_condition(1))}

    for what, ours, its in (
        ("inputs", parts.input_shape, other.input_shape),
        ("conditions", conditions(parts), conditions(other)),
    ):
        if ours != its:
            raise ValueError(f"{name} cannot guide this run: its {what} are {its}, the run's {ours}")
    ours, its = levels(parts.objective.process), levels(other.objective.process)
    if ours.shape != its.shape or not np.allclose(ours, its, rtol=0, atol=1e-6):
        raise ValueError(
            f"{name} cannot guide this run: its process is {other.config.diffusion.schedule} with other noise levels, "
            f"the run's {parts.config.diffusion.schedule}"
        )


def _snapshot_step(checkpoint: str) -> int | None:
    if checkpoint == "latest":
        return None
    if not checkpoint.isdecimal():
        raise ValueError(f"with --ema_sigma, --checkpoint must be latest or a step, got {checkpoint!r}")
    return int(checkpoint)
