"""Samples from a run: python -m diffussm_jax.sample --workdir=runs/digits --num_samples=100 --out=digits

Writes OUT.png, a grid, and OUT.npz in ADM's convention: arr_0 uint8 [N, H, W, C], arr_1 int labels [N].
"""

import contextlib
import json
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from diffussm_jax import cli
from diffussm_jax.build import build_codec, build_model, build_sampler, build_schedule, from_plain, input_shape
from diffussm_jax.config import validate
from diffussm_jax.data.transforms import image_grid, save_png
from diffussm_jax.parallel.mesh import make_mesh, replicated
from diffussm_jax.training.checkpoint import Checkpointer
from diffussm_jax.training.loop import CONFIG_NAME
from diffussm_jax.training.posthoc_ema import Snapshots
from diffussm_jax.training.state import init_params

_FLAGS = flags.FlagValues()  # apart, so that any of the programs can be imported beside another
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run that main made.", flag_values=_FLAGS)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 100, "How many images.", lower_bound=1, flag_values=_FLAGS)
_LABELS = flags.DEFINE_list(
    "labels", None, "The classes, taken in turn, as 0,3,7; all if not given.", flag_values=_FLAGS
)
_GUIDANCE_SCALE = flags.DEFINE_float(
    "guidance_scale", None, "1 is none; the config's if not given.", lower_bound=0.0, flag_values=_FLAGS
)
_SAMPLER = flags.DEFINE_string("sampler", None, "ddpm or ddim; the config's if not given.", flag_values=_FLAGS)
_STEPS = flags.DEFINE_integer(
    "steps", None, "Steps of the sampler; the config's if not given.", lower_bound=1, flag_values=_FLAGS
)
_OUT = flags.DEFINE_string(
    "out", None, "Where to write, without ending; WORKDIR/samples/final if not given.", flag_values=_FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise.", flag_values=_FLAGS)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images at a time.", lower_bound=1, flag_values=_FLAGS)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "latest", "latest, best (by held-out loss), or a step.", flag_values=_FLAGS
)
_EMA_SIGMA = flags.DEFINE_float(
    "ema_sigma", None, "Relative length of a post-hoc EMA, such as 0.08; else the checkpoint's.", flag_values=_FLAGS
)
_VAE = flags.DEFINE_string(
    "vae", None, "The autoencoder that decodes latents; the config's if not given.", flag_values=_FLAGS
)

_GRID_COLUMNS = 10
_MAX_GRID_IMAGES = 100


def load_config(workdir: epath.PathLike) -> ConfigDict:
    """The config of a run.

    Raises:
      FileNotFoundError: the folder holds no run.
    """
    path = epath.Path(workdir) / CONFIG_NAME
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run: there is no {CONFIG_NAME} in it")
    return from_plain(json.loads(path.read_text()))


def choose_labels(labels: Sequence[int] | None, num_samples: int, num_classes: int) -> np.ndarray:
    """[num_samples] int32: the given labels, or all classes, taken in turn; zeros for an unconditional model.

    Raises:
      ValueError: a label is no class of the model, or the model has none.
    """
    if num_classes == 0:
        if labels:
            raise ValueError(f"labels {list(labels)} were given to an unconditional model")
        return np.zeros(num_samples, np.int32)
    chosen = np.arange(num_classes) if labels is None else np.asarray(labels, np.int64)
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= num_classes:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {list(labels)}")
    return np.resize(chosen, num_samples).astype(np.int32)


def sample(
    workdir: epath.PathLike,
    *,
    num_samples: int = 100,
    labels: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    checkpoint: str = "latest",
    ema_sigma: float | None = None,
    vae: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples from the averaged weights of a run. What is None is as the run's config says.

    Args:
      workdir: of the run.
      num_samples: N.
      labels: the classes, taken in turn; all if None.
      guidance_scale: of classifier-free guidance; 1 is none.
      sampler: "ddpm" or "ddim".
      steps: of the sampler, at most those of training.
      seed: of the noise. The same seed and batch size give the same images.
      batch_size: images at a time.
      checkpoint: "latest", "best" or a step.
      ema_sigma: relative standard deviation of a post-hoc EMA (`training.posthoc_ema`), for a run that stored averages;
        the weights of the checkpoint's own average if None.
      vae: a diffusers folder or repository of the autoencoder that decodes latents.

    Returns:
      images [N, H, W, C] uint8, labels [N] int32.

    Raises:
      FileNotFoundError: there is no run, or no checkpoint of it.
      ValueError: an option is not allowed, or the checkpoint is of another model.
    """
    config = load_config(workdir)
    overrides = {"guidance_scale": guidance_scale, "sampler": sampler, "num_steps": steps}
    config.sampling.update({k: v for k, v in overrides.items() if v is not None})
    config.data.vae = vae or config.data.vae
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    validate(config)
    codec = build_codec(config)
    all_labels = choose_labels(labels, num_samples, config.data.num_classes)
    model = build_model(config)
    mesh = make_mesh()
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(lambda: init_params(model, input_shape(config), 0)),
    )
    if ema_sigma is None:
        with contextlib.closing(Checkpointer(workdir, is_read_only=True)) as checkpointer:
            params = checkpointer.restore_ema(checkpointer.resolve(checkpoint), like)
    else:
        with contextlib.closing(Snapshots(workdir, is_read_only=True)) as snapshots:
            params = snapshots.reconstruct(ema_sigma, like, step=_snapshot_step(checkpoint))
    generate = build_sampler(config, model, build_schedule(config), mesh)
    batch_size = min(batch_size, num_samples)
    images = []
    with tqdm(total=num_samples, unit="image", dynamic_ncols=True) as bar:
        for i, start in enumerate(range(0, num_samples, batch_size)):
            batch_labels = np.resize(all_labels[start : start + batch_size], batch_size)  # one shape, one compilation
            x_0 = generate(params, batch_labels, jax.random.fold_in(jax.random.key(seed), i))
            images.append(codec.decode(x_0)[: num_samples - start])
            bar.update(len(images[-1]))
    return np.concatenate(images), all_labels


def _snapshot_step(checkpoint: str) -> int | None:
    if checkpoint == "latest":
        return None
    if not checkpoint.isdecimal():
        raise ValueError(f"with --ema_sigma, --checkpoint must be latest or a step, got {checkpoint!r}")
    return int(checkpoint)


def save_samples(images: np.ndarray, labels: np.ndarray, out: epath.PathLike) -> tuple[epath.Path, epath.Path]:
    """Writes OUT.png, a grid of at most 100 images, and OUT.npz (arr_0 images, arr_1 labels); returns the two paths."""
    out = epath.Path(out)
    if out.suffix in (".png", ".npz"):
        out = out.with_suffix("")
    out.parent.mkdir(parents=True, exist_ok=True)
    png, npz = out.parent / (out.name + ".png"), out.parent / (out.name + ".npz")
    save_png(png, image_grid(images[:_MAX_GRID_IMAGES], min(_GRID_COLUMNS, len(images))))
    with npz.open("wb") as file:
        np.savez(file, images, labels)  # positional: arr_0 and arr_1
    return png, npz


def main() -> int:
    """Samples as the flags say; returns the exit code."""
    if _WORKDIR.value is None:
        raise app.UsageError("give --workdir=FOLDER, the folder of a run")
    if _LABELS.value is not None and not all(label.strip().isdecimal() for label in _LABELS.value):
        raise ValueError(f"--labels must be whole numbers with commas between, got {','.join(_LABELS.value)}")
    cli.keep_freed_memory()
    images, labels = sample(
        _WORKDIR.value,
        num_samples=_NUM_SAMPLES.value,
        labels=None if _LABELS.value is None else [int(label) for label in _LABELS.value],
        guidance_scale=_GUIDANCE_SCALE.value,
        sampler=_SAMPLER.value,
        steps=_STEPS.value,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
        checkpoint=_CHECKPOINT.value,
        ema_sigma=_EMA_SIGMA.value,
        vae=_VAE.value,
    )
    png, npz = save_samples(images, labels, _OUT.value or epath.Path(_WORKDIR.value) / "samples" / "final")
    print(f"Wrote {png} and {npz}.")
    return 0


if __name__ == "__main__":
    cli.run(main, _FLAGS)
