"""Samples images from a run: python -m diffussm_jax.sample --workdir=runs/digits --num_samples=100 --out=digits

Writes OUT.png, a grid, and OUT.npz in ADM's convention: arr_0 uint8 [N, H, W, C], arr_1 int labels [N].
"""

import itertools

import numpy as np
from absl import app, flags
from etils import epath
from tqdm import tqdm

from diffussm_jax import cli
from diffussm_jax.config_keys import MAX_SEED
from diffussm_jax.data.transforms import image_grid, save_png
from diffussm_jax.io import check_writable
from diffussm_jax.run import Run, load_run

_FLAGS = flags.FlagValues()  # of its own, so that several programs can be imported together
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of diffussm_jax.main.", flag_values=_FLAGS)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 100, "Number of images.", lower_bound=1, flag_values=_FLAGS)
_LABELS = flags.DEFINE_list(
    "labels", None, "Classes, such as 0,3,7; images cycle through them. Default: all.", flag_values=_FLAGS
)
_SAMPLING = cli.define_sampling(_FLAGS)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Output path without extension. Default: in WORKDIR/samples, a name of step, sampler, steps, guidance scale and "
    "seed, and a number if that file exists.",
    flag_values=_FLAGS,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=MAX_SEED, flag_values=_FLAGS)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images per batch.", lower_bound=1, flag_values=_FLAGS)
_CHECKPOINT, _EMA_SIGMA = cli.define_checkpoint(_FLAGS)
_GUIDE = cli.define_guide(_FLAGS)
_COMPILATION_CACHE = cli.define_compilation_cache(_FLAGS)
_VAE = flags.DEFINE_string("vae", None, "Autoencoder that decodes latents. Default: config.", flag_values=_FLAGS)

_GRID_COLUMNS = 10
_MAX_GRID_IMAGES = 100


def output_paths(out: epath.PathLike) -> tuple[epath.Path, epath.Path]:
    """OUT.png and OUT.npz; an ending .png or .npz of OUT is left out."""
    out = epath.Path(out)
    if out.suffix in (".png", ".npz"):
        out = out.with_suffix("")
    return out.parent / (out.name + ".png"), out.parent / (out.name + ".npz")


def check_outputs(out: epath.PathLike) -> None:
    """Raises OSError if the output files cannot be written."""
    for path in output_paths(out):
        check_writable(path)


def default_out(workdir: epath.PathLike, run: Run, seed: int, ema_sigma: float | None = None) -> epath.Path:
    """A path in WORKDIR/samples that says how images are sampled, and at which no file is yet."""
    name = f"{run.samples_name(seed, ema_sigma)}_samples"
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    paths = (epath.Path(workdir) / "samples" / name for name in names)
    return next(path for path in paths if not any(output.exists() for output in output_paths(path)))


def save_samples(
    images: np.ndarray, labels: np.ndarray, out: epath.PathLike, *, shows_labels: bool = True
) -> tuple[epath.Path, epath.Path]:
    """Writes OUT.png, a grid of at most 100 images, and OUT.npz (arr_0 images, arr_1 labels). Returns both paths."""
    png, npz = output_paths(out)
    png.parent.mkdir(parents=True, exist_ok=True)
    shown = labels[:_MAX_GRID_IMAGES] if shows_labels else None
    save_png(png, image_grid(images[:_MAX_GRID_IMAGES], min(_GRID_COLUMNS, len(images)), shown))
    with npz.open("wb") as file:
        np.savez(file, images, labels)  # positional: arr_0 and arr_1
    return png, npz


def main() -> int:
    """Samples images, and returns the exit code."""
    if not _WORKDIR.value:
        raise app.UsageError("give --workdir=FOLDER, the folder of a run")
    if _OUT.value == "":
        raise app.UsageError("--out is empty; give a path without extension")
    if _LABELS.value is not None and not all(label.strip().isdecimal() for label in _LABELS.value):
        raise ValueError(f"--labels must be whole numbers separated by commas, got {','.join(_LABELS.value)}")
    cli.keep_freed_memory()
    cli.use_compilation_cache(_COMPILATION_CACHE.value)
    if _OUT.value:
        check_outputs(_OUT.value)
    run = load_run(
        _WORKDIR.value,
        _CHECKPOINT.value,
        ema_sigma=_EMA_SIGMA.value,
        guide=_GUIDE.value,
        vae=_VAE.value,
        **_SAMPLING(),
    )
    if run.guide is not None and run.config.sampling.guidance_scale == 1:
        raise ValueError("--guide does nothing with config.sampling.guidance_scale = 1: give a larger --guidance_scale")
    out = _OUT.value or default_out(_WORKDIR.value, run, _SEED.value, _EMA_SIGMA.value)
    check_outputs(out)
    with tqdm(total=_NUM_SAMPLES.value, unit="image", dynamic_ncols=True) as bar:
        images, labels = run.sample(
            _NUM_SAMPLES.value,
            None if _LABELS.value is None else [int(label) for label in _LABELS.value],
            seed=_SEED.value,
            batch_size=_BATCH_SIZE.value,
            progress=bar.update,
        )
    png, npz = save_samples(images, labels, out, shows_labels=run.config.data.num_classes > 0)
    print(f"Wrote {png} and {npz}.")
    return 0


if __name__ == "__main__":
    cli.run(main, _FLAGS)
