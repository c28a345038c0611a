"""The vector-quantized autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752), a VQGAN.

    images [B, H, W, 3] in [-1, 1]  -- encode -->  z [B, H/f, W/f, C]       f = 2**(number of levels - 1)
    z_q = E_k,  k = argmin_j |z - E_j|^2                                    at each position; E: codebook [num_codes, C]
    z + stop_gradient(z_q - z)  -- decode_quantized -->  images             the gradient passes straight through

    codebook term    mean (stop_gradient(z) - z_q)^2                        moves the codes to the latents
    commitment term  mean (z - stop_gradient(z_q))^2                        keeps the encoder near the codes

van den Oord et al. (arXiv 1711.00937) weight the commitment term with beta = 0.25. The code of taming-transformers
(Esser et al., arXiv 2012.09841) and of latent diffusion puts beta on the codebook term, and calls that "legacy". The
codebook may follow a moving average of its latents instead of a gradient (1711.00937, appendix A.1).

Modules and parameter names are those of diffusers' `VQModel`. As in latent diffusion, a diffusion model is trained on
z, and `decode` quantizes what it samples.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffussm_jax.autoencoder.kl import LOGVAR_RANGE, Autoencoder, check_images
from diffussm_jax.layers import conv

_CODES_AT_A_TIME = 1024
_LAPLACE = 1e-5


class Quantized(NamedTuple):
    """The nearest codes.

    Attributes:
      latents: [B, h, w, C] float32. Gradients reach the codebook, and not the latents that were quantized.
      indices: [B, h, w] int32.
    """

    latents: jax.Array
    indices: jax.Array


class Usage(NamedTuple):
    """How much of a codebook a batch uses.

    Attributes:
      usage: fraction of the codes that occur.
      perplexity: exp(entropy) of their frequencies, from 1 to the number of codes.
    """

    usage: jax.Array
    perplexity: jax.Array


class CodebookState(NamedTuple):
    """Moving averages of what each code receives from a batch.

    Attributes:
      sizes: number of latents, [num_codes] float32.
      sums: sum of the latents, [num_codes, C] float32.
    """

    sizes: jax.Array
    sums: jax.Array


class Quantizer(nn.Module):
    """A codebook, uniform in [-1 / num_codes, 1 / num_codes] at first: latents [B, h, w, C] -> `Quantized`."""

    num_codes: int

    @nn.compact
    def __call__(self, latents: jax.Array) -> Quantized:
        def uniform(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -1 / self.num_codes, 1 / self.num_codes)

        codebook = self.param("embedding", uniform, (self.num_codes, latents.shape[-1]))
        indices = nearest_codes(latents, codebook)
        return Quantized(codebook[indices], indices)


class VQModel(Autoencoder):
    """The vector-quantized autoencoder. A call encodes, quantizes and decodes: [B, H, W, C_in] -> [B, H, W, C_out].

    `model.apply({"params": params}, x, method="encode")`, or "quantize", "decode", "decode_quantized". The defaults are
    those of latent diffusion's VQ-f4: 8192 codes of three channels, 55,322,782 parameters. The codebook is
    `params["quantize"]["embedding"]`. See `Autoencoder` for the other attributes.

    Attributes:
      num_vq_embeddings: number of codes.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512)
    latent_channels: int = 3
    scaling_factor: float = 1.0
    num_vq_embeddings: int = 8192

    def setup(self):
        if self.num_vq_embeddings < 1:
            raise ValueError(f"num_vq_embeddings must be positive, got {self.num_vq_embeddings}")
        self.encoder, self.decoder = self.make_coders(self.latent_channels)
        self.quant_conv = conv(self.latent_channels, 1, jnp.float32)
        self.quantizer = Quantizer(self.num_vq_embeddings, name="quantize")
        self.post_quant_conv = conv(self.latent_channels, 1, jnp.float32)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes images to latents before quantization.

        Args:
          images: [B, H, W, C_in] float in [-1, 1]; H and W are multiples of `downsampling`.

        Returns:
          latents and log_std, [B, H/f, W/f, C] float32. log_std is -15 everywhere, `AutoencoderKL`'s smallest, so that
          latents of both are stored and drawn alike.

        Raises:
          ValueError: the images have a wrong shape or are not floating point.
        """
        check_images(images, self.in_channels, self.downsampling)
        latents = self.quant_conv(self.encoder(images))
        return latents, jnp.full_like(latents, LOGVAR_RANGE[0] / 2)

    def quantize(self, latents: jax.Array) -> Quantized:
        """The nearest code at each position of latents [B, h, w, C].

        Raises:
          ValueError: the latents have a wrong shape or are not floating point.
        """
        check_images(latents, self.latent_channels, 1, "latents")
        return self.quantizer(latents)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Quantizes latents and decodes them to images.

        Args:
          latents: [B, h, w, C] float, unscaled. Gradients pass straight through to them.

        Returns:
          [B, h f, w f, C_out] float32, approximately in [-1, 1], not clipped.

        Raises:
          ValueError: the latents have a wrong shape or are not floating point.
        """
        return self.decode_quantized(straight_through(latents, self.quantize(latents).latents))

    def decode_quantized(self, latents: jax.Array) -> jax.Array:
        """As `decode`, of latents that are codes already; they are not looked up."""
        check_images(latents, self.latent_channels, 1, "latents")
        return self.decoder(self.post_quant_conv(latents))

    def __call__(self, images: jax.Array) -> jax.Array:
        latents, _ = self.encode(images)
        return self.decode(latents)


def nearest_codes(latents: jax.Array, codebook: jax.Array) -> jax.Array:
    """The index of the nearest code, by distances in float32.

    Compares |E|^2 - 2 z E, which is the squared distance less |z|^2. Of equal values the lowest index is taken. Codes
    whose squared distances differ by less than the rounding of these values, about 1e-6 (|z| + |E|) |E|, may be taken
    for one another.

    Args:
      latents: z, [..., C]. Where they are NaN, the index is 0.
      codebook: E, [num_codes, C].

    Returns:
      [...] int32.
    """
    latents, codebook = jax.lax.stop_gradient((latents.astype(jnp.float32), codebook.astype(jnp.float32)))
    num_codes, C = codebook.shape
    # The distances to all codes would be the largest array of a training step. Blocks of codes, not of latents: a
    # sharded batch stays where it is.
    block = min(num_codes, _CODES_AT_A_TIME)
    padding = -num_codes % block
    starts = jnp.arange(0, num_codes, block, dtype=jnp.int32)
    norms = jnp.pad(jnp.sum(codebook**2, -1), (0, padding), constant_values=jnp.inf).reshape(-1, block)
    codes = jnp.pad(codebook, ((0, padding), (0, 0))).reshape(-1, block, C)

    def compare(best, inputs):
        smallest, nearest = best
        start, norms, codes = inputs
        distances = norms - 2 * jnp.einsum("...c,kc->...k", latents, codes, precision="highest")
        here = jnp.min(distances, -1)
        is_nearer = here < smallest
        index = start + jnp.argmin(distances, -1).astype(jnp.int32)
        return (jnp.where(is_nearer, here, smallest), jnp.where(is_nearer, index, nearest)), None

    shape = latents.shape[:-1]
    first = (jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32))
    (_, nearest), _ = jax.lax.scan(compare, first, (starts, norms, codes))
    return nearest


def straight_through(z: jax.Array, z_q: jax.Array) -> jax.Array:
    """z_q, up to rounding, with the gradient of z."""
    return z + jax.lax.stop_gradient(z_q - z)


def codebook_losses(z: jax.Array, z_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codebook term and the commitment term: means over everything, float32."""
    z, z_q = z.astype(jnp.float32), z_q.astype(jnp.float32)
    codebook = jnp.mean((jax.lax.stop_gradient(z) - z_q) ** 2)
    commitment = jnp.mean((z - jax.lax.stop_gradient(z_q)) ** 2)
    return codebook, commitment


def codebook_usage(indices: jax.Array, num_codes: int) -> Usage:
    """How many codes occur among indices of any shape, and how evenly."""
    counts = _counts(indices, num_codes)
    p = counts / indices.size
    return Usage(jnp.mean(counts > 0, dtype=jnp.float32), jnp.exp(jnp.sum(jax.scipy.special.entr(p))))


def init_codebook_state(codebook: jax.Array) -> CodebookState:
    """The moving averages before the first batch: as if each code had received itself once."""
    return CodebookState(jnp.ones(len(codebook), jnp.float32), jnp.array(codebook, jnp.float32))  # a copy: to donate


def update_codebook(
    codebook: jax.Array,
    state: CodebookState,
    z: jax.Array,
    indices: jax.Array,
    *,
    decay: float,
    min_usage: float,
    key: jax.Array,
) -> tuple[jax.Array, CodebookState]:
    """Moves each code to the moving average of the latents that it was nearest to, and revives those hardly used.

        sizes_k <- decay sizes_k + (1 - decay) n_k         n_k, s_k: number and sum of the batch's latents of code k
        sums_k  <- decay sums_k  + (1 - decay) s_k
        E_k      = sums_k / size'_k,   size'_k = N (sizes_k + 1e-5) / (N + 1e-5 num_codes),   N = sum of sizes

    as van den Oord et al. (arXiv 1711.00937, appendix A.1), with Laplace smoothing as in their code. Under jit with a
    sharded batch all sums are over the whole batch.

    Args:
      codebook: E, [num_codes, C] float32.
      state: of the step before.
      z: latents before quantization, [..., C].
      indices: of their codes, [...].
      decay: in [0, 1).
      min_usage: in latents per batch. A code whose size is lower starts again at a random latent of the batch, with the
        mean of all sizes (ours). Take a fraction of the number of latents divided by num_codes: each code receives that
        many on average. 0: none is revived.
      key: draws these latents, each at most once if there are enough.

    Returns:
      The new codebook and state; no gradient passes through.
    """
    num_codes, C = codebook.shape
    z = jax.lax.stop_gradient(z.astype(jnp.float32)).reshape(-1, C)
    indices = indices.reshape(-1)
    sizes = decay * state.sizes + (1 - decay) * _counts(indices, num_codes)
    sums = decay * state.sums + (1 - decay) * jnp.zeros((num_codes, C)).at[indices].add(z)
    total = jnp.sum(sizes)
    smoothed = total * (sizes + _LAPLACE) / (total + _LAPLACE * num_codes)

    is_dead = sizes < min_usage
    rows = jax.random.permutation(key, len(z))[jnp.arange(num_codes) % len(z)]
    sizes = jnp.where(is_dead, jnp.mean(sizes), sizes)
    codebook = jnp.where(is_dead[:, None], z[rows], sums / smoothed[:, None])
    return codebook, CodebookState(sizes, jnp.where(is_dead[:, None], sizes[:, None] * codebook, sums))


def _counts(indices: jax.Array, num_codes: int) -> jax.Array:
    """How often each code occurs, [num_codes] float32."""
    return jnp.zeros(num_codes).at[indices.reshape(-1)].add(1)
