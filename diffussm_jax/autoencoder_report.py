"""What is made of an autoencoder's run: grids while it trains, and at its end the weights for diffusers and a report.

WORKDIR/vae has the averaged weights in diffusers' format, with `scaling_factor` = 1 / (standard deviation of latents)
and the mean and deviation of each of their channels. `precompute --vae=WORKDIR` reads it.
WORKDIR/reconstruction.json and .md have the scores of held-out images.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from diffussm_jax.autoencoder import to_diffusers
from diffussm_jax.data.loader import Loader
from diffussm_jax.data.transforms import to_uint8
from diffussm_jax.evaluation.extractor import Extractor
from diffussm_jax.evaluation.reconstruction import as_json, markdown_table, reconstruction_scores
from diffussm_jax.io import write_whole
from diffussm_jax.parallel.mesh import batch_to_devices
from diffussm_jax.training.autoencoder_task import AutoencoderTask
from diffussm_jax.training.hooks import HookContext, HookFactory, sample_grid
from diffussm_jax.training.task import Hook

VAE = "vae"
REPORT = "reconstruction"
_NUM_COLUMNS, _NUM_ROWS = 8, 3  # of pairs
MAX_REPORT_IMAGES = 10_000


def reconstruction_grid(parts) -> HookFactory:
    """The hook that writes rows of originals, each above its reconstructions, every `config.sample_every` steps.

    The images are those of the first batch, held out where there are any. The files are
    samples/step_NNNNNNNN_reconstructions.png.
    """
    loader = _loader(parts)
    num_images = min(loader.num_rows(0), _NUM_COLUMNS * _NUM_ROWS)
    num_columns = min(_NUM_COLUMNS, num_images)
    num_rows = -(-num_images // num_columns)

    def draw(params, key):
        made = _reconstructed(parts.task, params, loader, 0)
        pairs = np.stack([made["images"][:num_images], to_uint8(made["reconstructions"][:num_images])])
        blank = np.full((2, num_rows * num_columns - num_images, *pairs.shape[2:]), 255, np.uint8)
        pairs = np.concatenate([pairs, blank], 1)
        rows = pairs.reshape(2, num_rows, num_columns, *pairs.shape[2:]).swapaxes(0, 1)
        return rows.reshape(-1, *pairs.shape[2:])

    return functools.partial(
        sample_grid,
        draw=draw,
        num_columns=num_columns,
        labels=np.repeat(["original", "decoded"] * num_rows, num_columns),
        name="reconstructions",
        seed=parts.config.seed,
        every=parts.config.sample_every,
        tag="reconstructions",
    )


def final_report(parts, extractor: Extractor | None) -> HookFactory:
    """The hook that runs `finish_run` after the last step. The scores are logged too, but for those not finite."""

    def make(context: HookContext) -> Hook:
        def run(state, step):
            return finish_run(parts, extractor, context.task.eval_params(state), context.workdir, step)

        return Hook("final_report", parts.config.num_steps, run)

    return make


def _loader(parts) -> Loader:
    """Of the images that are held out, or else trained on."""
    return parts.eval_loader or parts.train_loader


def _reconstructed(task: AutoencoderTask, params: Any, loader: Loader, index: int) -> dict[str, np.ndarray]:
    """What `AutoencoderTask.reconstruct` makes of a batch of a loader, without the rows that fill the last one."""
    made = jax.device_get(task.reconstruct(params, batch_to_devices(task.mesh, loader.batch(index))))
    return {name: np.asarray(values)[: loader.num_rows(index)] for name, values in made.items()}


def finish_run(parts, extractor: Extractor | None, params: Any, out: epath.PathLike, step: int) -> dict[str, float]:
    """Writes OUT/vae and the report of up to 10,000 images, and returns the finite scores.

    Args:
      parts: `build.Parts` of the run.
      extractor: for the Frechet distance; None for none.
      params: averaged parameters of the autoencoder.
      out: folder of the run.
      step: of the parameters.

    Raises:
      FloatingPointError: reconstructions have values that are not finite.
    """
    out, task, loader = epath.Path(out), parts.task, _loader(parts)
    parts_of = {name: [] for name in ("images", "reconstructions", "mean", "square")}
    for i in range(min(len(loader), -(-MAX_REPORT_IMAGES // loader.batch_size))):
        made = _reconstructed(task, params, loader, i)
        made["reconstructions"] = to_uint8(made["reconstructions"])
        for name, values in made.items():
            parts_of[name].append(values)
    images, reconstructions, mean, square = map(np.concatenate, parts_of.values())
    statistics = latent_statistics(mean, square)
    perceptual = None
    if task.perceptual:
        distance, network = jax.jit(task.perceptual.distance), jax.device_put(task.perceptual.params)
        perceptual = (task.perceptual.name, lambda x, y: distance(network, x, y))
    scores = reconstruction_scores(images, reconstructions, extractor, perceptual)
    if jax.process_index() == 0:
        model = dataclasses.replace(task.stage.model, scaling_factor=statistics.pop("scaling_factor"))
        size = parts.config.data.image_size
        to_diffusers(model, jax.device_get(params), out / VAE, sample_size=size, statistics=statistics)
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
