"""The discriminator's part of an autoencoder's training step; `training.autoencoder_task` has the whole."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffussm_jax.autoencoder import losses
from diffussm_jax.autoencoder.discriminator import PatchDiscriminator

# Outside of these bands the log says so.
MIN_FACTOR, MAX_FACTOR = 1e-4, 0.99 * losses.MAX_FACTOR
MIN_ACCURACY, MAX_ACCURACY = 0.02, 0.99  # of the discriminator on real and on reconstructed patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversary:
    """The discriminator, and when it acts.

    Attributes:
      model: the discriminator.
      loss: "hinge" or "vanilla".
      weight: of the adversarial loss, beside the adaptive factor.
      start: the step at which the autoencoder begins to see the discriminator.
      warmup: number of steps before `start` in which the discriminator is trained alone.
      ramp: number of steps over which the weight grows from 0 to its value.
      r1_weight: of the gradient penalty on real images (Mescheder et al., arXiv 1801.04406); 0: none.
      is_conditional: whether steps in which it is not trained leave it out, by `lax.cond`. On CPUs that is slower: XLA
        runs convolutions inside of it on one thread, 27 times slower than outside.
    """

    model: PatchDiscriminator
    loss: str
    weight: float
    start: int
    warmup: int
    ramp: int
    r1_weight: float
    is_conditional: bool

    def play(
        self,
        params: Any,
        images: jax.Array,
        x_hat: jax.Array,
        d_nll: jax.Array,
        pull_last: Callable[[jax.Array], jax.Array],
        step: jax.Array,
    ) -> "Turn":
        """The gradients of one step.

        Args:
          params: of the discriminator.
          images: x, [B, H, W, C] in [-1, 1].
          x_hat: reconstructions.
          d_nll: gradient of the reconstruction loss at x_hat.
          pull_last: maps a gradient at x_hat to one at the kernel of the decoder's last convolution.
          step: number of steps done.

        Returns:
          zeros in steps in which the discriminator is not trained.
        """
        play = functools.partial(self._play, pull_last=pull_last, step=step)
        arguments = params, images, x_hat, d_nll
        is_trained, _ = losses.schedule(step, self.start, self.warmup, self.ramp)
        if self.is_conditional:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(play, *arguments))
            return jax.lax.cond(is_trained > 0, play, lambda *arguments: zeros, *arguments)
        return jax.tree.map(lambda x: jnp.where(is_trained > 0, x, 0), play(*arguments))

    def _play(self, params, images, x_hat, d_nll, *, pull_last, step) -> "Turn":
        def judge(params, images):
            return self.model.apply({"params": params}, images)

        _, ramp = losses.schedule(step, self.start, self.warmup, self.ramp)
        # BatchNorm sees real and reconstructed images apart.
        fake, pull_fake = jax.vjp(judge, params, x_hat)
        real, pull_real = jax.vjp(lambda params: judge(params, images), params)
        g_loss, d_g = jax.value_and_grad(losses.generator_loss)(fake)
        _, d_x_hat = pull_fake(d_g)
        factor = losses.adaptive_factor(pull_last(d_nll), pull_last(d_x_hat))
        weight = self.weight * ramp * factor
        loss_of = functools.partial(losses.discriminator_loss, kind=self.loss)
        d_loss, (d_real, d_fake) = jax.value_and_grad(loss_of, (0, 1))(real, fake)
        grads = jax.tree.map(jnp.add, pull_real(d_real)[0], pull_fake(d_fake)[0])
        logged = {
            "g_loss": g_loss,
            "d_loss": d_loss,
            "adaptive_factor": factor,
            "adversarial_weight": weight,
            "accuracy_real": jnp.mean(real > 0),
            "accuracy_fake": jnp.mean(fake < 0),
        }
        if self.r1_weight:

            def penalty_of(params):
                return losses.r1_penalty(lambda x: judge(params, x), images)

            logged["r1"], d_penalty = jax.value_and_grad(penalty_of)(params)
            grads = jax.tree.map(lambda grad, of_r1: grad + self.r1_weight * of_r1, grads, d_penalty)
        return Turn(weight * d_x_hat, weight * g_loss, grads, logged)


class Turn(NamedTuple):
    """What the discriminator gives to a step.

    Attributes:
      d_x_hat: weighted gradient of g at x_hat, [B, H, W, C].
      g_loss: weighted g.
      grads: of the discriminator's parameters.
      logged: scalars to log.
    """

    d_x_hat: jax.Array
    g_loss: jax.Array
    grads: Any
    logged: dict[str, jax.Array]


def adversarial_warnings(metrics: dict[str, float]) -> dict[str, str]:
    """What a row of metrics says about the adversarial training; texts for the log, by name."""
    if not metrics.get("adversarial_weight"):
        return {}
    found, factor = {}, metrics["adaptive_factor"]
    if not MIN_FACTOR <= factor <= MAX_FACTOR:
        found["factor"] = (
            f"the adaptive factor is {factor:.3g}, outside of {MIN_FACTOR:g} to {MAX_FACTOR:g}: the gradients of "
            "the reconstruction and of the adversarial loss are of very different sizes"
        )
    accuracies = metrics["accuracy_real"], metrics["accuracy_fake"]
    if min(accuracies) > MAX_ACCURACY:
        found["accuracy"] = (
            f"the discriminator tells {min(accuracies):.1%} of real and of reconstructed patches: it has won. Try "
            "config.task.r1_weight, a smaller config.task.disc_weight or a longer config.task.disc_ramp"
        )
    elif max(accuracies) < MIN_ACCURACY:
        found["accuracy"] = f"the discriminator tells {max(accuracies):.1%} of the patches: it is blind"
    return found
