"""What is made of an autoencoder's run: grids while it trains, and at its end the weights for diffusers and a report.

WORKDIR/vae has the averaged weights in diffusers' format, with `scaling_factor` = 1 / (standard deviation of latents)
and the mean and deviation of each of their channels. `precompute --vae=WORKDIR` reads it.
WORKDIR/reconstruction.json and .md have the scores of held-out images.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from diffussm_jax.autoencoder import to_diffusers
from diffussm_jax.data.loader import Loader
from diffussm_jax.data.transforms import image_grid, save_png
from diffussm_jax.evaluation.extractor import Extractor
from diffussm_jax.evaluation.reconstruction import as_json, markdown_table, reconstruction_scores
from diffussm_jax.io import write_whole
from diffussm_jax.parallel.mesh import batch_to_devices
from diffussm_jax.training.autoencoder_task import AutoencoderTask
from diffussm_jax.training.hooks import HookContext
from diffussm_jax.training.task import Hook

VAE = "vae"
REPORT = "reconstruction"
_NUM_COLUMNS, _NUM_ROWS = 8, 3  # of pairs
MAX_REPORT_IMAGES = 10_000


def reconstruction_grid(context: HookContext, *, loader: Loader, every: int) -> Hook:
    """Writes rows of originals, each above its reconstructions, to samples/step_NNNNNNNN_reconstructions.png.

    The images are those of the first batch, held out where there are any.

    Args:
      context: of the run.
      loader: of the images.
      every: interval in steps.
    """
    task = context.task

    def run(state, step):
        made = task.reconstruct(task.eval_params(state), batch_to_devices(task.mesh, loader.batch(0)))
        if jax.process_index() == 0:
            num_images = min(loader.num_rows(0), _NUM_COLUMNS * _NUM_ROWS)
            grid = pairs_grid(*(np.asarray(made[k])[:num_images] for k in ("images", "reconstructions")))
            folder = context.workdir / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            save_png(folder / f"step_{step:08d}_reconstructions.png", grid)
            context.log.image(step, "reconstructions", grid)
        return {}

    return Hook("reconstruction_grid", every, run)


def pairs_grid(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Rows of originals, each above its reconstructions: [N, H, W, C] uint8 twice to [H', W', C]."""
    num_columns = min(_NUM_COLUMNS, len(images))
    rows = [range(start, min(start + num_columns, len(images))) for start in range(0, len(images), num_columns)]
    blank = np.full_like(images[:1], 255)

    def padded(of, row):
        return np.concatenate([of[row], *[blank] * (num_columns - len(row))])

    pairs = [padded(of, row) for row in rows for of in (images, reconstructions)]
    labels = ["original", "decoded"] * len(rows)
    return image_grid(np.concatenate(pairs), num_columns, np.repeat(labels, num_columns))


def final_report(context: HookContext, *, finish, num_steps: int) -> Hook:
    """After the last step writes WORKDIR/vae and the report. The scores are logged too, but for those not finite."""

    def run(state, step):
        return finish(context.task, context.task.eval_params(state), context.workdir, step)

    return Hook("final_report", num_steps, run)


def _reconstructed(task: AutoencoderTask, params: Any, loader: Loader) -> Iterator[dict[str, np.ndarray]]:
    """What `AutoencoderTask.reconstruct` makes of the batches of a loader, without the rows that fill the last."""
    num_images = 0
    for i in range(len(loader)):
        if num_images >= MAX_REPORT_IMAGES:
            return
        made = jax.device_get(task.reconstruct(params, batch_to_devices(task.mesh, loader.batch(i))))
        yield {name: np.asarray(values)[: loader.num_rows(i)] for name, values in made.items()}
        num_images += loader.num_rows(i)


def finish_run(
    parts, extractor: Extractor | None, task: AutoencoderTask, params: Any, out: epath.PathLike, step: int
) -> dict[str, float]:
    """Writes OUT/vae and the report, and returns the finite scores.

    Args:
      parts: `build.Parts` of the run.
      extractor: for the Frechet distance; None for none.
      task: that trained the parameters.
      params: averaged parameters of the autoencoder.
      out: folder of the run.
      step: of the parameters.
    """
    out, loader = epath.Path(out), parts.eval_loader or parts.train_loader
    found = list(_reconstructed(task, params, loader))
    images, reconstructions, mean, square = (
        np.concatenate([made[name] for made in found]) for name in ("images", "reconstructions", "mean", "square")
    )
    statistics = latent_statistics(mean, square)
    perceptual = None
    if task.perceptual:
        distance, network = jax.jit(task.perceptual.distance), jax.device_put(task.perceptual.params)
        perceptual = (task.perceptual.name, lambda x, y: distance(network, x, y))
    scores = reconstruction_scores(images, reconstructions, extractor, perceptual)
    if jax.process_index() == 0:
        model = dataclasses.replace(task.stage.model, scaling_factor=statistics.pop("scaling_factor"))
        to_diffusers(
            model,
            jax.device_get(params),
            out / VAE,
            sample_size=parts.config.data.image_size,
            statistics=statistics,
        )
        about = {
            "step": step,
            "num_images": len(images),
            "images": "held out" if parts.eval_loader else "trained on",
            "scaling_factor": model.scaling_factor,
            "latent_mean": statistics["mean"],
            "latent_std": statistics["std"],
            "perceptual_sha256": task.perceptual.sha256 if task.perceptual else None,
            "features_sha256": extractor.sha256 if extractor else None,
        }
        write_whole(out / f"{REPORT}.json", json.dumps(about | {"scores": as_json(scores)}, indent=2))
        words = "\n".join(f"- {key}: {value}" for key, value in about.items())
        write_whole(out / f"{REPORT}.md", f"# Reconstructions\n\n{markdown_table(scores)}\n\n{words}\n")
    return {name: score.value for name, score in scores.items() if np.isfinite(score.value)}


def latent_statistics(mean: np.ndarray, square: np.ndarray) -> dict[str, Any]:
    """`scaling_factor`, and the mean and standard deviation of each channel, of latents.

    Args:
      mean: [N, C], of each image over positions.
      square: likewise of the squares.

    Returns:
      "scaling_factor": 1 / (standard deviation over all channels), as latent diffusion takes it; "mean" and "std":
      lists of C numbers.
    """
    first, second = mean.astype(np.float64), square.astype(np.float64)
    std = np.sqrt(second.mean(0) - first.mean(0) ** 2)
    overall = np.sqrt(second.mean() - first.mean() ** 2)
    return {"scaling_factor": float(1 / overall), "mean": first.mean(0).tolist(), "std": std.tolist()}
