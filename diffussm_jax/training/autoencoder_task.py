"""The task of training an autoencoder against a patch discriminator: the first stage of latent diffusion.

Rombach et al. (arXiv 2112.10752), section 3.1 and appendix G; the losses are in `autoencoder.losses`. One step:

    x_hat, regularizer = autoencoder(x)                         one pass through the encoder and the decoder
    a, b = d nll / d x_hat, d g / d x_hat                       g = -mean D(x_hat)
    factor = ||d nll / d W|| / (||d g / d W|| + 1e-4)           W: kernel of the decoder's last convolution
    autoencoder:    a + disc_weight ramp factor b, and the regularizer, pulled back to its parameters
    discriminator:  gradient of its own loss on x and x_hat

LDM updates the discriminator after the autoencoder, with images of the updated one. Here both see the same images: one
pass instead of two is ours.

All randomness of step s comes from fold_in(key(seed), s).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from diffussm_jax.autoencoder import Perceptual, from_diffusers, losses
from diffussm_jax.autoencoder.first_stage import FirstStage, check_same_model
from diffussm_jax.data.transforms import to_unit_range
from diffussm_jax.layers import conv
from diffussm_jax.models.costs import Costs, count_products
from diffussm_jax.parallel.mesh import over_batch, replicated
from diffussm_jax.training.adversary import Adversary, adversarial_warnings
from diffussm_jax.training.ema import EMA
from diffussm_jax.training.state import TrainState
from diffussm_jax.training.step import (
    Losses,
    WithConstants,
    apply_gradients,
    create_state,
    mean_over_microbatches,
    norms,
)

Batch = dict[str, jax.Array]
GENERATOR, DISCRIMINATOR, LOGVAR = "generator", "discriminator", "logvar"
_CODEBOOK_SALT = 0xC0DE  # sets the draws of restarted codes apart from those of the same step's noise
MIN_MSE = 1e-10  # 106 dB: of 8-bit images the least that is not zero is 96 dB at 32 x 32


class AutoencoderState(TrainState):
    """`TrainState` with what is kept to update a codebook; {} if nothing is."""

    codebook: Any = struct.field(default_factory=dict)


class _Draw(NamedTuple):
    """What a step works on: images [B, H, W, C] in [-1, 1], and the noise of their latents if there is any."""

    images: jax.Array
    noise: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTask:
    """Trains an autoencoder; see `training.task.Task`.

    Attributes:
      stage: the autoencoder with its regularizer.
      adversary: the discriminator; None trains without one.
      perceptual: the perceptual distance; None for none.
      perceptual_weight: of it, beside |x - x_hat|.
      image_shape: (H, W, C).
      encode: (batch, key) -> images [B, H, W, C] float32 in [-1, 1].
      optimizer: of the whole tree of parameters; its `update` takes the step.
      ema: the average of the autoencoder's parameters.
      batch_spec: shapes, dtypes and shardings of a global batch.
      accumulation_steps: number of microbatches; the adaptive factor and BatchNorm are those of a microbatch.
      max_skipped_steps: more steps in a row with a loss or gradient that is not finite end the run.
      seed: of all randomness.
      mesh: the devices; parameters are replicated.
      initialize: (fresh autoencoder parameters) -> those that training starts from; if None, the fresh ones.
    """

    stage: FirstStage
    adversary: Adversary | None
    perceptual: Perceptual | None
    perceptual_weight: float
    image_shape: tuple[int, int, int]
    encode: Callable[[Batch, jax.Array], jax.Array]
    optimizer: optax.GradientTransformation
    ema: EMA
    batch_spec: dict[str, jax.ShapeDtypeStruct]
    accumulation_steps: int
    max_skipped_steps: int
    seed: int
    mesh: Mesh
    initialize: Callable[[Any], Any] | None = None

    # The state

    def init_params(self) -> dict[str, Any]:
        """Fresh parameters of the autoencoder, the discriminator, and the learned variance."""
        H, W, C = self.image_shape
        key, disc_key = jax.random.split(jax.random.key(self.seed))
        images = jnp.zeros((1, H, W, C))
        params = {GENERATOR: self.stage.model.init(key, images)["params"]}
        if self.adversary:
            params[DISCRIMINATOR] = self.adversary.model.init(disc_key, images)["params"]
        if self.stage.learns_logvar:
            params[LOGVAR] = jnp.zeros(())
        return params

    def _with_params(self, params) -> AutoencoderState:
        codebook = self.stage.init_codebook(params[GENERATOR])
        return create_state(params, self.optimizer, self.ema, AutoencoderState, codebook=codebook)

    def create_state(self) -> AutoencoderState:
        """The state before the first step, on all devices."""
        params = jax.jit(self.init_params, out_shardings=replicated(self.mesh))()
        if self.initialize is not None:
            params[GENERATOR] = self.initialize(params[GENERATOR])
        return jax.jit(self._with_params, out_shardings=replicated(self.mesh))(params)

    @functools.cached_property
    def abstract_state(self) -> AutoencoderState:
        """Shapes, dtypes and shardings of the state."""
        one = replicated(self.mesh)
        shapes = jax.eval_shape(lambda: self._with_params(self.init_params()))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), shapes)

    def eval_params(self, state: AutoencoderState):
        """The averaged parameters of the autoencoder."""
        return state.ema_params

    def state_metrics(self, state: AutoencoderState) -> Losses:
        """The norm of the autoencoder's parameters, and their distance to the average."""
        return norms(state.params[GENERATOR], state.ema_params)

    @functools.cached_property
    def costs(self) -> Costs:
        """Parameters by part, and multiply-adds of one image: the discriminator's of x and of x_hat."""
        params = self.abstract_state.params
        x = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)

        def products(apply, params, *arguments):
            return count_products(jax.make_jaxpr(apply)(params, *arguments).jaxpr, params).by_module

        def outputs(model):
            return lambda params, x: model.apply({"params": params}, x)

        networks = dict(params[GENERATOR])
        found = products(outputs(self.stage.model), networks, x)
        parts = {name: sum(n for module, n in found.items() if module.split("/")[0] == name) for name in networks}
        if self.adversary:
            networks[DISCRIMINATOR] = params[DISCRIMINATOR]
            parts[DISCRIMINATOR] = 2 * products(outputs(self.adversary.model), params[DISCRIMINATOR], x).total()
        if self.perceptual:
            parts["perceptual"] = products(self.perceptual.distance, self.perceptual.params, x, x).total()
        return Costs({name: sum(leaf.size for leaf in jax.tree.leaves(of)) for name, of in networks.items()}, parts)

    @property
    def multiply_adds(self) -> int:
        """Of all networks, for one image of a step, forward."""
        return self.costs.total

    # The step

    def _draw(self, batch: Batch, key: jax.Array) -> _Draw:
        encode_key, noise_key = jax.random.split(key)
        images, shape = self.encode(batch, encode_key), self.stage.noise_shape(self.image_shape)
        return _Draw(images, None if shape is None else jax.random.normal(noise_key, (len(images), *shape)))

    def _error(self, perceptual_params, images: jax.Array, x_hat: jax.Array) -> tuple[jax.Array, Losses]:
        """|x - x_hat| with the perceptual distance added [B, H, W, C], and both of each image [B]."""
        of_images = {"l1": jnp.abs(images - x_hat).mean((1, 2, 3))}
        if self.perceptual:
            of_images["perceptual"] = self.perceptual.distance(perceptual_params, images, x_hat)
        error = losses.reconstruction_error(images, x_hat, of_images.get("perceptual"), self.perceptual_weight)
        return error, of_images

    def _gradients(self, params, drawn: _Draw, step: jax.Array, perceptual_params):
        """(Gradients of all parameters, losses), and what a codebook is updated with."""

        def generate(generator):
            made = self.stage.reconstruct(generator, drawn.images, drawn.noise)
            return (made.images, made.regularizer), made

        (x_hat, regularizer), pull, made = jax.vjp(generate, params[GENERATOR], has_aux=True)

        def nll_of(x_hat, logvar):
            error, of_images = self._error(perceptual_params, drawn.images, x_hat)
            return self.stage.nll(error, logvar), jax.tree.map(jnp.mean, of_images)

        logvar = params.get(LOGVAR, jnp.zeros(()))
        (nll, logged), (cotangent, d_logvar) = jax.value_and_grad(nll_of, (0, 1), has_aux=True)(x_hat, logvar)
        grads, loss = {}, nll + regularizer
        if self.adversary:
            pull_last = self._pull_last_kernel(params[GENERATOR], made.last_input)
            found = self.adversary.play(params[DISCRIMINATOR], drawn.images, x_hat, cotangent, pull_last, step)
            cotangent, loss = cotangent + found.d_x_hat, loss + found.g_loss
            grads[DISCRIMINATOR] = found.grads
            logged |= found.logged
        if LOGVAR in params:
            grads[LOGVAR] = d_logvar
            logged["logvar"] = logvar
        (grads[GENERATOR],) = pull((cotangent, jnp.ones_like(regularizer)))
        return (grads, {"loss": loss, "nll": nll, **made.terms, **logged}), made.quantized

    def _pull_last_kernel(self, generator, last_input: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """Maps a gradient at x_hat to one at the kernel of the decoder's last convolution."""
        last = generator["decoder"]["conv_out"]

        def apply(kernel):
            return conv(self.image_shape[-1], 3, jnp.float32).apply({"params": {**last, "kernel": kernel}}, last_input)

        _, pull = jax.vjp(apply, last["kernel"])
        return lambda d_x_hat: pull(d_x_hat)[0]

    def _step(self, state: AutoencoderState, batch: Batch, perceptual_params) -> tuple[AutoencoderState, Losses]:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            key = jax.random.fold_in(jax.random.key(self.seed), state.step)

            def gradients(params, drawn):
                return self._gradients(params, drawn, state.step, perceptual_params)

            drawn = self._draw(batch, key)
            (grads, found), quantized = mean_over_microbatches(gradients, state.params, drawn, self.accumulation_steps)

            def update_codebook(params):
                generator, codebook = self.stage.update_codebook(
                    params[GENERATOR], state.codebook, quantized, jax.random.fold_in(key, _CODEBOOK_SALT)
                )
                return params | {GENERATOR: generator}, {"codebook": codebook}

            return apply_gradients(
                state,
                grads,
                found,
                optimizer=self.optimizer,
                ema=self.ema,
                max_skipped_steps=self.max_skipped_steps,
                after_update=update_codebook,
            )

    def _jit(self, function: Callable, num_scalars: int = 0, **options) -> WithConstants:
        """Jits function(tree, batch, *scalars, the perceptual network's parameters)."""
        one = replicated(self.mesh)
        shardings = (one, over_batch(self.mesh), *[one] * num_scalars, one)
        jitted = jax.jit(function, in_shardings=shardings, out_shardings=one, **options)
        return WithConstants(jitted, self.perceptual.params if self.perceptual else {}, one)

    @functools.cached_property
    def train_step(self) -> Callable[[AutoencoderState, Batch], tuple[AutoencoderState, Losses]]:
        """The jitted step; donates the state."""
        return self._jit(self._step, donate_argnums=0)

    @functools.cached_property
    def eval_step(self) -> Callable[..., Losses]:
        """The jitted (params, batch, index, num_rows) -> {"loss", "l1", "psnr", ..}, means over the first rows.

        Images are not augmented and latents not drawn. "loss" is the mean of |x - x_hat| with the perceptual distance
        added; "psnr" is in dB.
        """

        def eval_step(params, batch: Batch, index: jax.Array, num_rows: jax.Array, perceptual_params) -> Losses:
            images = to_unit_range(batch["image"])
            x_hat = self.stage.model.apply({"params": params}, images)
            error, of_images = self._error(perceptual_params, images, x_hat)
            mse = jnp.square(images - jnp.clip(x_hat, -1, 1)).mean((1, 2, 3))
            of_images |= {"loss": error.mean((1, 2, 3)), "psnr": 10 * jnp.log10(4 / jnp.maximum(mse, MIN_MSE))}
            is_counted = jnp.arange(len(images)) < num_rows
            return jax.tree.map(lambda x: jnp.sum(jnp.where(is_counted, x, 0)) / num_rows, of_images)

        return self._jit(eval_step, num_scalars=2)

    # What is said of it

    def warnings(self, metrics: dict[str, float]) -> dict[str, str]:
        """What a row of metrics says about the adversarial training; texts for the log, by name."""
        return adversarial_warnings(metrics)

    # Weights to start from, and reconstructions

    def read_initial(self, path: str) -> Callable[[Any], Any]:
        """Reads an autoencoder to start from, for `initialize`.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it is damaged, or another one than `stage.model`; both values are named.
        """
        model, params = from_diffusers(path)
        check_same_model(model, self.stage.model, path)
        return lambda fresh: jax.device_put(params, replicated(self.mesh))

    @functools.cached_property
    def reconstruct(self) -> Callable[[Any, Batch], dict[str, jax.Array]]:
        """The jitted (params, batch) -> "images" uint8, "reconstructions" float32 in about [-1, 1], both [B, H, W, C].

        And "mean" and "square" [B, C]: of each image the means over positions of drawn latents and of their squares.
        """

        def reconstruct(params, batch: Batch) -> dict[str, jax.Array]:
            images = to_unit_range(batch["image"])
            mean, log_std = self.stage.model.apply({"params": params}, images, method="encode")
            x_hat = self.stage.model.apply({"params": params}, mean, method="decode")
            square = jnp.square(mean) + jnp.exp(2 * log_std)
            return {
                "images": batch["image"],
                "reconstructions": x_hat,
                "mean": mean.mean((1, 2)),
                "square": square.mean((1, 2)),
            }

        one = replicated(self.mesh)
        return jax.jit(reconstruct, in_shardings=(one, over_batch(self.mesh)), out_shardings=one)
