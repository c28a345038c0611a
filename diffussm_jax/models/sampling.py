"""Sampling from a backbone: puts model, objective, guidance and sampler together, and jits it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffussm_jax.diffusion import (
    TIME_GRIDS,
    Denoise,
    Objective,
    Prediction,
    Sampler,
    both,
    clipped,
    guided,
    pair,
    sample,
    thresholded,
)
from diffussm_jax.models.backbone import Backbone, Condition
from diffussm_jax.parallel.mesh import BATCH, replicated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """Draws samples: generator(params, condition, num_samples, key) -> x_0 [B, H, W, C] float32, on the host.

    With a `guide`, another model, the parameters are a pair: (those of the model, those of the guide).

    Attributes:
      model: the backbone.
      objective: that it was trained on.
      sampler: such as `DDIM()`.
      num_steps: of the sampler.
      input_shape: (H, W, C).
      mesh: the devices; the batch is split over them.
      clip_x_0: whether to clip the predicted x_0 to [-1, 1]: for pixels, not for latents.
      time_grid: a name of `diffusion.TIME_GRIDS`.
      dynamic_threshold: the percentile, as a fraction, of dynamic thresholding, which takes the place of clipping; 0 is
        none.
      guidance_scale: 1 is no guidance.
      guidance_rescale: of `diffusion.guided`; 0 is none.
      num_guided_channels: guides only the first channels; all if None.
      guidance_interval: guides between these times.
      guide: the generator of a model whose prediction takes the place of the unconditional one (autoguidance); None is
        classifier-free guidance.
    """

    model: Backbone
    objective: Objective
    sampler: Sampler
    num_steps: int
    input_shape: tuple[int, int, int]
    mesh: Mesh
    clip_x_0: bool = False
    time_grid: str = "uniform"
    dynamic_threshold: float = 0.0
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    num_guided_channels: int | None = None
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    guide: "Generator | None" = None

    @property
    def times(self) -> np.ndarray:
        """The sampler's grid of times.

        Raises:
          ValueError: the process has fewer steps.
        """
        return TIME_GRIDS[self.time_grid](self.objective.process, self.num_steps)

    def predict(self, params) -> Callable[..., Prediction]:
        """The model with these parameters as (x_t, t, condition) -> `Prediction`; not guided, not clipped."""
        return self.objective.predict(lambda *arguments: self.model.apply({"params": params}, *arguments))

    def denoiser(self, params, condition: Condition) -> Denoise:
        """The guided and clipped, or thresholded, denoiser for a condition."""
        params, guide_params = (params, None) if self.guide is None else params
        process, predict = self.objective.process, self.predict(params)

        def denoise(x_t, t):
            return predict(x_t, t, condition)

        predictions = None
        if self.guide is not None:
            guide = self.guide.predict(guide_params)
            predictions = pair(denoise, lambda x_t, t: guide(x_t, t, condition))
        elif condition:
            predictions = both(predict, condition, self.model.null(condition))
        if predictions is not None:
            low, high = self.guidance_interval
            denoise = guided(
                predictions,
                denoise,
                scale=self.guidance_scale,
                num_guided_channels=self.num_guided_channels,
                interval=(-math.inf if low <= max(process.clean, 0) else low, high),
                rescale=self.guidance_rescale,
                process=process,
            )
        if self.dynamic_threshold:
            return thresholded(denoise, process, self.dynamic_threshold)
        return clipped(denoise, process) if self.clip_x_0 else denoise

    @functools.cached_property
    def _sample(self) -> Callable:
        process, times = self.objective.process, self.times

        def draw(params, condition, num_samples, key):
            noise_key, sampler_key = jax.random.split(key)
            x_T = process.prior(noise_key, (num_samples, *self.input_shape))
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return sample(self.sampler, self.denoiser(params, condition), process, x_T, times, sampler_key)

        return jax.jit(draw, static_argnums=2, out_shardings=replicated(self.mesh))

    def __call__(self, params, condition: Any, num_samples: int, key: jax.Array) -> np.ndarray:
        """Samples; any number of them: the batch is filled up to a multiple of the devices that it is split over.

        Args:
          params: of the model, on the mesh; with a guide (of the model, of the guide).
          condition: of each sample, arrays [num_samples, ...]; None for an unconditional model.
          num_samples: B.
          key: of all noise.
        """
        num_parts = math.prod(self.mesh.shape[axis] for axis in BATCH)
        filled = -(-num_samples // num_parts) * num_parts
        rows = np.arange(filled) % num_samples
        condition = jax.tree.map(lambda x: np.asarray(x)[rows], dict(self.model.as_condition(condition)))
        return jax.device_get(self._sample(params, condition, filled, key))[:num_samples]
