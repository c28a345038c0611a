"""`bench sample`: images per second of sampling with random weights; latents are not decoded."""

import functools

import jax
from ml_collections import ConfigDict

from diffussm_jax.bench.measure import median_seconds
from diffussm_jax.build import Parts
from diffussm_jax.parallel.mesh import replicated
from diffussm_jax.validation import validate

COLUMNS = {"images_per_second": ".4g", "step_ms": ".1f"}


def bench_sample(config: ConfigDict, *, repeats: int = 3) -> dict[str, float | int | str]:
    """Times sampling a batch by `config.sampling`.

    Args:
      config: of a run; `batch_size` images are sampled at once.
      repeats: timed batches, after one that compiles.

    Returns:
      sampler, num_steps, guidance_scale, images_per_second, and step_ms, of one sampler step of the batch.

    Raises:
      ValueError: the config is wrong.
    """
    validate(config, jax.device_count())
    parts, batch_size = Parts(config, has_decoder=False), config.batch_size
    params = jax.device_put(parts.model.init_params(parts.input_shape, config.seed), replicated(parts.mesh))
    arguments = params, parts.model.example_condition(batch_size), batch_size, jax.random.key(0)
    program = functools.partial(parts.generator, *arguments)
    time = median_seconds({"batch": program}, repeats)["batch"]
    return {
        "sampler": config.sampling.sampler,
        "num_steps": config.sampling.num_steps,
        "guidance_scale": config.sampling.guidance_scale,
        "images_per_second": batch_size / time,
        "step_ms": 1e3 * time / config.sampling.num_steps,
    }
