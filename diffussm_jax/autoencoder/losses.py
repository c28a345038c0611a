"""The losses of autoencoders that are trained against a discriminator, as pure functions in float32.

They are those of VQGAN (Esser et al., arXiv 2012.09841, section 3.2) and of latent diffusion (Rombach et al., arXiv
2112.10752, appendix G) as the code of both computes them: `VQLPIPSWithDiscriminator` of taming-transformers, and
`LPIPSWithDiscriminator` of latent diffusion for KL.

    error          e = |x - x_hat| + w d(x, x_hat)           [B, H, W, C]; d [B], the perceptual distance, at all values
    KL             nll = sum(e / exp(logvar) + logvar) / B;  kl = sum(mean^2 + std^2 - 1 - log std^2) / 2 / B
    VQ             nll = mean(e)
    generator      g = -mean D(x_hat)                        for both losses of the discriminator
    hinge          (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat))) / 2
    vanilla        (mean softplus(-D(x))  + mean softplus(D(x_hat))) / 2
    factor         |d nll / d W| / (|d g / d W| + 1e-4), at most 1e4           W: kernel of the decoder's last conv
    R1             mean_b |d D(x_b) / d x_b|^2 / 2           Mescheder et al., arXiv 1801.04406, section 4.1

The autoencoder minimises nll + factor weight g + its regularizer, with no gradient through the factor.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# The loss of a patch by its margin: its logit if it is real, minus its logit if it is not.
DISCRIMINATOR_LOSSES = {
    "hinge": lambda margin: jax.nn.relu(1 - margin),
    "vanilla": lambda margin: jax.nn.softplus(-margin),
}
MAX_FACTOR = 1e4
_EPSILON = 1e-4  # of the adaptive factor


def reconstruction_error(
    x: jax.Array, x_hat: jax.Array, perceptual: jax.Array | None = None, weight: float = 1.0
) -> jax.Array:
    """|x - x_hat| [B, H, W, C], with the weighted perceptual distance [B] of an image added to each of its values."""
    error = jnp.abs(_float32(x) - _float32(x_hat))
    return error if perceptual is None else error + weight * _float32(perceptual)[:, None, None, None]


def kl_nll(error: jax.Array, logvar: jax.Array | float = 0.0) -> jax.Array:
    """The reconstruction loss of a KL autoencoder: a sum over H, W and C, and a mean over the batch.

    Args:
      error: [B, H, W, C], of `reconstruction_error`.
      logvar: a scalar. It is learned, or 0.
    """
    logvar = jnp.asarray(logvar, jnp.float32)
    return jnp.sum(_float32(error) * jnp.exp(-logvar) + logvar) / len(error)


def vq_nll(error: jax.Array) -> jax.Array:
    """The reconstruction loss of a VQ autoencoder: the mean of `reconstruction_error` over everything."""
    return jnp.mean(_float32(error))


def kl_divergence(mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """KL(N(mean, std^2) || N(0, 1)) in nats, summed over h, w and c [B, h, w, c]; its mean over the batch."""
    mean, logvar = _float32(mean), 2 * _float32(log_std)
    return jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar) / (2 * len(mean))


def generator_loss(fake_logits: jax.Array) -> jax.Array:
    """g = -mean D(x_hat): what the autoencoder minimises against the discriminator."""
    return -jnp.mean(_float32(fake_logits))


def discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array, kind: str = "hinge") -> jax.Array:
    """The loss of the discriminator on its logits of real and of reconstructed images, of any shapes.

    Raises:
      ValueError: `kind` is not one of DISCRIMINATOR_LOSSES.
    """
    if kind not in DISCRIMINATOR_LOSSES:
        raise ValueError(f"unknown loss of the discriminator {kind!r}; choose one of {', '.join(DISCRIMINATOR_LOSSES)}")
    real, fake = _float32(real_logits), _float32(fake_logits)
    cost = DISCRIMINATOR_LOSSES[kind]
    return 0.5 * (jnp.mean(cost(real)) + jnp.mean(cost(-fake)))


def adaptive_factor(nll_gradient: jax.Array, g_gradient: jax.Array) -> jax.Array:
    """The factor of g with which both losses change the last kernel by about as much; no gradient goes through it.

    Args:
      nll_gradient: of nll, at the kernel of the decoder's last convolution.
      g_gradient: of g, at the same kernel.
    """
    nll_norm, g_norm = (jnp.sqrt(jnp.sum(jnp.square(_float32(x)))) for x in (nll_gradient, g_gradient))
    return jax.lax.stop_gradient(jnp.clip(nll_norm / (g_norm + _EPSILON), 0, MAX_FACTOR))


def r1_penalty(logits_of: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """R1, half the mean over real images x [B, H, W, C] of the squared norm of the gradient of D.

    In the paper D(x) is one number for each image. Here it is the mean of the logits of an image's patches, as in the
    other losses, so that the penalty does not grow with their number (ours; others take the sum). With BatchNorm it is
    the gradient of the sum over the batch, because all images are part of each other's statistics.

    Args:
      logits_of: the discriminator, from images to logits [B, h, w, 1].
      x: real images.
    """

    def total(x):
        return jnp.sum(jnp.mean(_float32(logits_of(x)), (1, 2, 3)))

    return 0.5 * jnp.sum(jnp.square(_float32(jax.grad(total)(x)))) / len(x)


def schedule(step: jax.Array, start: int, warmup: int, ramp: int) -> tuple[jax.Array, jax.Array]:
    """When the discriminator is trained, and how much of it the autoencoder sees.

    Args:
      step: number of steps done, int.
      start: the step at which the autoencoder begins to see it.
      warmup: number of steps before `start` in which it is trained alone. LDM: 0.
      ramp: number of steps in which the weight grows linearly to 1, which it is at step start + ramp - 1. LDM: 0.

    Returns:
      whether the discriminator is trained, 0 or 1, and the weight of g, from 0 to 1, both float32.
    """
    step = jnp.asarray(step, jnp.int32)  # an unsigned difference would not be negative
    weight = jnp.clip((step - start + 1) / max(ramp, 1), 0, 1)
    return _float32(step >= start - warmup), _float32(weight)


def _float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
