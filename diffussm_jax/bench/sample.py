"""`bench sample`: images a second of the sampler of a config's model, with random weights; nothing is decoded."""

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from diffussm_jax.bench.measure import median_seconds
from diffussm_jax.build import build_model, build_sampler, build_schedule, input_shape
from diffussm_jax.config import validate
from diffussm_jax.parallel.mesh import make_mesh
from diffussm_jax.training.state import init_params

COLUMNS = {"images_per_second": ".4g", "step_ms": ".1f"}


def bench_sample(config: ConfigDict, *, repeats: int = 3) -> dict[str, float | int | str]:
    """Times sampling a batch by `config.sampling`.

    Args:
      config: as for a run; `batch_size` images are sampled at once.
      repeats: timed batches, after one that compiles.

    Returns:
      sampler, num_steps, guidance_scale, images_per_second, and step_ms, of one sampler step of the batch.

    Raises:
      ValueError: the config is wrong.
    """
    validate(config, jax.device_count())
    mesh = make_mesh(**config.mesh.to_dict())
    model = build_model(config)
    params = init_params(model, input_shape(config), config.seed)
    generate = build_sampler(config, model, build_schedule(config), mesh)
    labels = np.arange(config.batch_size, dtype=np.int32) % max(1, config.data.num_classes)
    program = functools.partial(generate, params, labels, jax.random.key(0))
    time = median_seconds({"batch": program}, repeats)["batch"]
    return {
        "sampler": config.sampling.sampler,
        "num_steps": config.sampling.num_steps,
        "guidance_scale": config.sampling.guidance_scale,
        "images_per_second": config.batch_size / time,
        "step_ms": 1e3 * time / config.sampling.num_steps,
    }
