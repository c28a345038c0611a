"""From a config to objects. `Parts` makes what is asked for, through the registry, and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from diffussm_jax import registry
from diffussm_jax.build_data import DataParts
from diffussm_jax.config import sampling_name
from diffussm_jax.config_keys import GUIDED_CHANNELS
from diffussm_jax.diffusion import Objective
from diffussm_jax.io import shapes_by_path
from diffussm_jax.models import Backbone
from diffussm_jax.models.sampling import Generator
from diffussm_jax.parallel.mesh import over_batch, platform_of
from diffussm_jax.training.ema import EMA
from diffussm_jax.training.hooks import HookFactory, eval_loss, learning_rate, posthoc_ema, sample_grid
from diffussm_jax.training.optimizer import adamw, learning_rate_schedule
from diffussm_jax.training.posthoc_ema import SIGMAS
from diffussm_jax.training.task import Task

_MAX_GRID_COLUMNS = 10


@dataclasses.dataclass(frozen=True)
class Parts(DataParts):
    """The objects that a config describes, each made when it is first asked for.

    Attributes:
      platform: that the model is compiled for; if None, that of `given_mesh`, or JAX's default backend.
      is_abstract: whether programs are compiled and never run; then weights that are not trained are shapes only.
    """

    platform: str | None = None
    is_abstract: bool = False

    @property
    def condition_groups(self) -> dict[str, ConfigDict]:
        """The groups of `config.conditioners`, without the label's if there are no classes."""
        groups, has_classes = self.config.conditioners, self.config.data.num_classes > 0
        return {key: group for key, group in groups.items() if key != "label" or has_classes}

    @functools.cached_property
    def model(self) -> Backbone:
        model, num_classes = self.config.model, self.config.data.num_classes
        conditioners = {
            key: registry.factory("conditioner", group.name, group, num_classes=num_classes)
            for key, group in self.condition_groups.items()
        }
        platform = self.platform or (platform_of(self.given_mesh.devices.flat[0]) if self.given_mesh else None)
        num_outputs = self.objective.num_output_channels(1)
        return registry.create(
            "model", model.name, model, conditioners=conditioners, num_outputs=num_outputs, platform=platform
        )

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by its path."""
        return shapes_by_path(self.model.abstract_params(self.input_shape))

    @functools.cached_property
    def objective(self) -> Objective:
        diffusion = self.config.diffusion
        return Objective(
            registry.create("process", diffusion.schedule, diffusion),
            registry.create("target", diffusion.target, diffusion),
            diffusion.has_learned_variance,
            registry.create("weighting", diffusion.weighting, diffusion),
        )

    @functools.cached_property
    def generator(self) -> Generator:
        sampling = self.config.sampling
        return Generator(
            model=self.model,
            objective=self.objective,
            sampler=registry.create("sampler", sampling.sampler, sampling),
            num_steps=sampling.num_steps,
            input_shape=self.input_shape,
            mesh=self.mesh,
            clip_x_0=self.config.diffusion.clip_x_0,
            time_grid=sampling.time_grid,
            dynamic_threshold=sampling.dynamic_threshold,
            guidance_scale=sampling.guidance_scale,
            guidance_rescale=sampling.guidance_rescale,
            num_guided_channels=GUIDED_CHANNELS[sampling.guided_channels],
            guidance_interval=tuple(sampling.guidance_interval),
        )

    # Training

    @functools.cached_property
    def learning_rate(self) -> optax.Schedule:
        o = self.config.optimizer
        num_steps = self.config.num_steps
        return learning_rate_schedule(o.learning_rate, warmup_steps=o.warmup_steps, decay=o.decay, num_steps=num_steps)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        o = self.config.optimizer
        return adamw(self.learning_rate, weight_decay=o.weight_decay, max_grad_norm=o.max_grad_norm)

    @property
    def ema(self) -> EMA:
        o, sigmas = self.config.optimizer, SIGMAS if self.config.posthoc_ema_every else ()
        return EMA(decay=o.ema_decay, has_warmup=o.has_ema_warmup, power_sigmas=sigmas)

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global batch."""
        (H, W, C), B = self.input_shape, self.config.batch_size
        shapes = {"label": ((B,), jnp.int32)}
        if self.has_latents:
            shapes |= {name: ((B, 2, H, W, C), jnp.float16) for name in ("mean", "log_std")}
        else:
            shapes["image"] = (B, H, W, C), jnp.uint8
        sharding = over_batch(self.mesh)
        spec = {k: jax.ShapeDtypeStruct(*of, sharding=sharding) for k, of in shapes.items()}
        others = {k: v for k, v in self.model.example_condition(1).items() if k != "label"}
        return spec | jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((B, *x.shape[1:]), x.dtype, sharding=sharding), others
        )

    @functools.cached_property
    def task(self) -> Task:
        return registry.create("task", self.config.task.name, self.config.task, parts=self)

    @property
    def trains_model(self) -> bool:
        """Whether the task trains `model`, so that its parameters can be sampled from."""
        return getattr(registry.component("task", self.config.task.name), "trains_model", False)

    @property
    def hooks(self) -> list[HookFactory]:
        """The hooks under today's config keys, and those of `config.hooks`."""
        config = self.config
        hooks = [functools.partial(learning_rate, schedule=self.learning_rate, every=config.log_every)]
        if config.eval_every and self.eval_loader:
            hooks.append(functools.partial(eval_loss, loader=self.eval_loader, every=config.eval_every))
        if config.sample_every and self.trains_model:
            hooks.append(
                functools.partial(
                    sample_grid,
                    draw=self._draw_grid,
                    num_columns=self._num_grid_columns,
                    labels=range(self._num_grid_columns) if config.data.num_classes else None,
                    name=sampling_name(config, config.seed),
                    seed=config.seed,
                    every=config.sample_every,
                )
            )
        if config.posthoc_ema_every:
            hooks.append(functools.partial(posthoc_ema, every=config.posthoc_ema_every))
        hooks += getattr(registry.component("task", config.task.name), "hooks", lambda parts: [])(self)
        return hooks + [registry.factory("hook", group.name, group) for group in config.hooks.values()]

    @property
    def _num_grid_columns(self) -> int:
        num_columns = self.config.data.num_classes or self.config.sampling.num_grid_rows  # a square without classes
        return min(num_columns, _MAX_GRID_COLUMNS)

    def _draw_grid(self, params, key: jax.Array) -> np.ndarray:
        """Images of a grid with a class in each column, and other conditions at their example values."""
        num_samples = self.config.sampling.num_grid_rows * self._num_grid_columns
        condition = self.model.example_condition(num_samples)
        if "label" in condition:
            condition["label"] = np.arange(num_samples, dtype=np.int32) % self._num_grid_columns
        return self.codec.decode(self.generator(params, condition, num_samples, key))
