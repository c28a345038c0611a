"""The first stage of latent diffusion as training sees it: an autoencoder, its regularizer and its reconstruction loss.

    KL    L = sum |x - x_hat| + kl_weight KL(q(z | x) || N(0, 1))       sums over C, H, W, means over the batch
    VQ    L = mean |x - x_hat| + codebook_weight (codebook term + commitment term)              means over everything

as in latent diffusion (Rombach et al., arXiv 2112.10752, appendix G) and taming-transformers (Esser et al., arXiv
2012.09841). |x - x_hat| has the perceptual distance added (`losses.reconstruction_error`). The adversarial loss is
added by the task.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffussm_jax.autoencoder import losses
from diffussm_jax.autoencoder.kl import DTYPES, AutoencoderKL, check_attention_levels
from diffussm_jax.autoencoder.vq import (
    VQModel,
    codebook_losses,
    codebook_usage,
    init_codebook_state,
    straight_through,
    update_codebook,
)
from diffussm_jax.options import NOT_AN_OPTION, Choices, Range

Terms = dict[str, jax.Array]
_MAX_LEVELS, _MAX_CHANNELS = 16, 65536


class Reconstruction(NamedTuple):
    """What one pass through an autoencoder gives.

    Attributes:
      images: x_hat [B, H, W, C] float32.
      regularizer: scalar, weighted.
      terms: scalars to log.
      last_input: of the decoder's last convolution, [B, H, W, features].
      quantized: what a codebook is updated with, latents [B, h, w, c] and the indices [B, h, w] of their codes; () if
        there is no such codebook.
    """

    images: jax.Array
    regularizer: jax.Array
    terms: Terms
    last_input: jax.Array
    quantized: tuple[jax.Array, ...] = ()


class FirstStage(Protocol):
    """An autoencoder with its regularizer, chosen by `config.task.autoencoder.name`.

    Attributes:
      model: the autoencoder.
      learns_logvar: whether the loss has a learned logarithm of a variance.
      frozen: top-level parts of the parameters that no optimizer changes.
    """

    model: Any
    learns_logvar: bool
    frozen: tuple[str, ...]

    def check(self) -> None:
        """Raises ValueError if the sizes are not allowed."""

    def noise_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...] | None:
        """The shape of one image's noise; None if encoding draws none."""

    def reconstruct(self, params: Any, images: jax.Array, noise: jax.Array | None) -> Reconstruction:
        """Encodes and decodes images [B, H, W, C] in [-1, 1], with noise [B, *noise_shape] float32."""

    def nll(self, error: jax.Array, logvar: jax.Array | float) -> jax.Array:
        """The reconstruction loss of errors [B, H, W, C]: a scalar."""

    def init_codebook(self, params: Any) -> Any:
        """What is kept beside the parameters to update a codebook; {} if nothing is."""

    def update_codebook(self, params: Any, state: Any, quantized: tuple, key: jax.Array) -> tuple[Any, Any]:
        """The parameters and that state after a step; `quantized` is that of `Reconstruction`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stage:
    """What both have: the sizes of the network. f = 2**(number of levels - 1)."""

    block_out_channels: tuple = (128, 256, 512, 512)  # of each level, multiples of norm_num_groups
    layers_per_block: Annotated[int, Range(1, 64)] = 2
    attention_levels: tuple = ()  # levels with attention after each residual block; 0: full resolution
    latent_channels: Annotated[int, Range(1, 65536)] = 4
    norm_num_groups: Annotated[int, Range(1, 65536)] = 32
    dtype: Annotated[str, Choices(DTYPES)] = "float32"
    num_channels: Annotated[int, NOT_AN_OPTION] = 3

    @property
    def _sizes(self) -> dict[str, Any]:
        """The arguments of the module."""
        return {
            "in_channels": self.num_channels,
            "out_channels": self.num_channels,
            "block_out_channels": self.block_out_channels,
            "layers_per_block": self.layers_per_block,
            "attention_levels": self.attention_levels,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_num_groups,
            "scaling_factor": 1.0,
            "dtype": jnp.dtype(self.dtype),
        }

    def _apply(self, params: Any, latents: jax.Array, method: str) -> tuple[jax.Array, jax.Array]:
        """The decoded images, and the input of the last convolution."""
        images, found = self.model.apply({"params": params}, latents, method=method, mutable="intermediates")
        return images, found["intermediates"]["decoder"]["conv_out_input"][0]

    def check(self) -> None:
        """Raises ValueError if the sizes are not allowed."""
        sizes = self.block_out_channels
        if not 1 <= len(sizes) <= _MAX_LEVELS or not all(type(n) is int and 0 < n <= _MAX_CHANNELS for n in sizes):
            raise ValueError(
                f"config.task.autoencoder.block_out_channels must be 1 to {_MAX_LEVELS} whole numbers from 1 to "
                f"{_MAX_CHANNELS}, got {sizes}"
            )
        if any(n % self.norm_num_groups for n in sizes):
            raise ValueError(
                f"config.task.autoencoder.norm_num_groups = {self.norm_num_groups} must divide each of "
                f"block_out_channels = {sizes}"
            )
        check_attention_levels("config.task.autoencoder.attention_levels", self.attention_levels, len(sizes))

    def init_codebook(self, params: Any) -> Any:
        return {}

    def update_codebook(self, params: Any, state: Any, quantized: tuple, key: jax.Array) -> tuple[Any, Any]:
        return params, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLStage(_Stage):
    """`AutoencoderKL`. In training it decodes a latent drawn from the encoder's Gaussian.

    Attributes:
      kl_weight: of the Kullback-Leibler divergence.
      learns_logvar: whether `logvar` in nll = error / exp(logvar) + logvar is learned. It starts at 0; in LDM's code it
        is a parameter that no optimizer sees.
    """

    kl_weight: Annotated[float, Range(0)] = 1e-6
    learns_logvar: bool = False
    frozen = ()

    @property
    def model(self) -> AutoencoderKL:
        return AutoencoderKL(**self._sizes)

    def noise_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...] | None:
        H, W, _ = image_shape
        f = self.model.downsampling
        return H // f, W // f, self.latent_channels

    def reconstruct(self, params: Any, images: jax.Array, noise: jax.Array | None) -> Reconstruction:
        mean, log_std = self.model.apply({"params": params}, images, method="encode")
        x_hat, last_input = self._apply(params, mean + jnp.exp(log_std) * noise, "decode")
        kl = losses.kl_divergence(mean, log_std)
        return Reconstruction(x_hat, self.kl_weight * kl, {"kl": kl}, last_input)

    def nll(self, error: jax.Array, logvar: jax.Array | float) -> jax.Array:
        return losses.kl_nll(error, logvar)


BETA_TERMS = ("codebook", "commitment")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQStage(_Stage):
    """`VQModel`.

    Attributes:
      num_vq_embeddings: number of codes.
      codebook_weight: of the sum of the codebook and the commitment term.
      beta: weight of one of the two.
      beta_term: which: "commitment", as van den Oord et al. (arXiv 1711.00937) have it; or "codebook", as the code of
        taming-transformers and LDM has it ("legacy").
      codebook_decay: the codebook follows an exponential moving average of its latents with this decay, and has no
        codebook term; 0: it is learned by gradients.
      min_usage: codes whose average number of latents in a batch is lower start again at latents of the batch (with
        codebook_decay).
    """

    latent_channels: Annotated[int, Range(1, 65536)] = 3
    num_vq_embeddings: Annotated[int, Range(2, 2**20)] = 8192
    codebook_weight: Annotated[float, Range(0)] = 1.0
    beta: Annotated[float, Range(0)] = 0.25
    beta_term: Annotated[str, Choices(BETA_TERMS)] = "codebook"
    codebook_decay: Annotated[float, Range(0, 1)] = 0.0
    min_usage: Annotated[float, Range(0)] = 0.0
    learns_logvar = False

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("quantize",) if self.codebook_decay else ()

    @property
    def model(self) -> VQModel:
        return VQModel(**self._sizes, num_vq_embeddings=self.num_vq_embeddings)

    def noise_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...] | None:
        return None

    def reconstruct(self, params: Any, images: jax.Array, noise: jax.Array | None) -> Reconstruction:
        latents, _ = self.model.apply({"params": params}, images, method="encode")
        quantized, indices = self.model.apply({"params": params}, latents, method="quantize")
        x_hat, last_input = self._apply(params, straight_through(latents, quantized), "decode_quantized")
        codebook, commitment = codebook_losses(latents, quantized)
        usage, perplexity = codebook_usage(indices, self.num_vq_embeddings)
        if self.codebook_decay:
            regularizer = self.beta * commitment
        elif self.beta_term == "codebook":
            regularizer = self.beta * codebook + commitment
        else:
            regularizer = codebook + self.beta * commitment
        terms = {"codebook": codebook, "commitment": commitment, "usage": usage, "perplexity": perplexity}
        for_update = (latents, indices) if self.codebook_decay else ()
        return Reconstruction(x_hat, self.codebook_weight * regularizer, terms, last_input, for_update)

    def nll(self, error: jax.Array, logvar: jax.Array | float) -> jax.Array:
        return losses.vq_nll(error)

    def init_codebook(self, params: Any) -> Any:
        return init_codebook_state(params["quantize"]["embedding"]) if self.codebook_decay else {}

    def update_codebook(self, params: Any, state: Any, quantized: tuple, key: jax.Array) -> tuple[Any, Any]:
        if not self.codebook_decay:
            return params, state
        options = {"decay": self.codebook_decay, "min_usage": self.min_usage, "key": key}
        codebook, state = update_codebook(params["quantize"]["embedding"], state, *quantized, **options)
        return {**params, "quantize": {"embedding": codebook}}, state


def check_same_model(found: AutoencoderKL | VQModel, wanted: AutoencoderKL | VQModel, where: str) -> None:
    """Checks that an autoencoder has the kind and the sizes of another one.

    Raises:
      ValueError: it does not; each difference is listed with both values.
    """
    if type(found) is not type(wanted):
        raise ValueError(f"{where} holds a {type(found).__name__}, the config describes a {type(wanted).__name__}")
    others = ("scaling_factor", "dtype", "parent", "name")
    names = [field.name for field in dataclasses.fields(wanted) if field.name not in others]
    wrong = [
        f"{n} is {getattr(found, n)} there, {getattr(wanted, n)} here"
        for n in names
        if getattr(found, n) != getattr(wanted, n)
    ]
    if wrong:
        raise ValueError(f"{where} holds another autoencoder than the config describes: {'; '.join(wrong)}")
