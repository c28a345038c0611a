"""A task: a classifier of images, an S4D layer between two linear ones."""

import functools
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from diffussm_jax.models import S4D
from diffussm_jax.options import Range
from diffussm_jax.parallel.mesh import replicated
from diffussm_jax.registry import register
from diffussm_jax.training.step import apply_gradients, create_state, gradients, norms


class Network(nn.Module):
    width: int
    num_classes: int

    @nn.compact
    def __call__(self, images):  # [B, H, W, C] uint8
        u = images.reshape(images.shape[0], -1, images.shape[-1]) / 255
        y = S4D(state_size=8)(nn.Dense(self.width)(u))
        return nn.Dense(self.num_classes)(nn.gelu(y).mean(1))


class Classifier:
    multiply_adds = 0

    def __init__(self, parts, *, width: Annotated[int, Range(1)] = 8):
        self.mesh, self.batch_spec = parts.mesh, parts.batch_spec
        self.max_skipped_steps = parts.config.optimizer.max_skipped_steps
        self._network = Network(width, parts.config.data.num_classes)
        self._optimizer, self._ema = parts.optimizer, parts.ema
        self.train_step = jax.jit(self._train_step, donate_argnums=0)
        self.eval_step = jax.jit(self._eval_step)

    def create_state(self):
        def create():
            images = jnp.zeros((1, *self.batch_spec["image"].shape[1:]))
            return create_state(self._network.init(jax.random.key(0), images)["params"], self._optimizer, self._ema)

        return jax.jit(create, out_shardings=replicated(self.mesh))()

    @functools.cached_property
    def abstract_state(self):
        return jax.eval_shape(self.create_state)

    def eval_params(self, state):
        return state.ema_params

    def state_metrics(self, state):
        return norms(state.params, state.ema_params)

    def _losses(self, params, batch):
        logits = self._network.apply({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    def _train_step(self, state, batch):
        grads, losses = gradients(lambda p, b: {"loss": self._losses(p, b).mean()}, state.params, batch)
        options = {"optimizer": self._optimizer, "ema": self._ema, "max_skipped_steps": self.max_skipped_steps}
        return apply_gradients(state, grads, losses, **options)

    def _eval_step(self, params, batch, index, num_rows):
        losses = self._losses(params, batch)
        return {"loss": jnp.where(jnp.arange(losses.size) < num_rows, losses, 0).sum() / num_rows}


register("task", "classifier", Classifier)
