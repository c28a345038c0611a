"""The KL autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752), as Stable Diffusion and DiT use it.

    images [B, H, W, 3] in [-1, 1]  -- encode -->  mean, log_std [B, H/f, W/f, C]      f = 2**(number of levels - 1)
    latents [B, H/f, W/f, C]        -- decode -->  images

Latents are unscaled here: a diffusion model is trained on `scaling_factor * latents`. Module for module this is
`AutoencoderKL` of diffusers, and parameters are named as there, `down_blocks.0` as `down_blocks_0`.

float32 products are rounded to fewer digits on TPUs and recent GPUs unless `jax.default_matmul_precision("float32")`
is set, which is worth its time where latents are computed once and stored.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float32", "bfloat16")
QUERY_CHUNK = 1024
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' too

_PYTORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # of convolutions and linear layers


def _conv(features: int, size: int, dtype: jnp.dtype, name: str | None = None, **kwargs) -> nn.Conv:
    kwargs = {"padding": size // 2, "kernel_init": _PYTORCH_INIT, **kwargs}
    return nn.Conv(features, (size, size), dtype=dtype, name=name, **kwargs)


def group_norm(num_groups: int, name: str | None = None) -> nn.GroupNorm:
    """GroupNorm in float32, whatever the dtype of its input, with diffusers' epsilon."""
    # Flax's fast variance, E[x^2] - E[x]^2, loses its digits where the mean is large.
    return nn.GroupNorm(num_groups, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, query_chunk: int = QUERY_CHUNK) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v with one head, logits and softmax in float32.

    Args:
      q: [B, L, C] float, and so k and v.
      k: see q.
      v: see q.
      query_chunk: how many queries are computed at a time, so that memory grows with L and not with L squared.

    Returns:
      [B, L, C] of v's dtype.
    """
    B, L, C = q.shape

    def attend_some(q):
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * C**-0.5
        weights = nn.softmax(logits, -1).astype(v.dtype)
        return jnp.einsum("bqk,bkc->bqc", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)

    if L <= query_chunk:
        return attend_some(q)
    chunks = jnp.pad(q, ((0, 0), (0, -L % query_chunk), (0, 0))).reshape(B, -1, query_chunk, C)
    # Checkpointed, or the backward pass would keep the weights of all chunks.
    out = jax.lax.map(jax.checkpoint(attend_some), chunks.swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(B, -1, C)[:, :L]


class ResnetBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), x through a 1x1 conv where the channel count changes."""

    features: int
    norm_num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for i in (1, 2):
            h = nn.silu(group_norm(self.norm_num_groups, f"norm{i}")(h))
            h = _conv(self.features, 3, self.dtype, f"conv{i}")(h)
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.dtype, "conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all positions, with one head and a residual connection: [B, H, W, C] -> the same."""

    norm_num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape

        def dense(name):
            return nn.Dense(C, dtype=self.dtype, kernel_init=_PYTORCH_INIT, name=name)

        h = group_norm(self.norm_num_groups, "group_norm")(x).reshape(B, H * W, C)
        h = attend(dense("to_q")(h), dense("to_k")(h), dense("to_v")(h))
        return x + dense("to_out_0")(h).reshape(B, H, W, C)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    norm_num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResnetBlock(x.shape[-1], self.norm_num_groups, self.dtype, name="resnets_0")(x)
        x = Attention(self.norm_num_groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(x.shape[-1], self.norm_num_groups, self.dtype, name="resnets_1")(x)


class Resample(nn.Module):
    """Twice the resolution (nearest neighbour, then a conv) or half of it (a conv of stride 2)."""

    is_up: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_up:
            return _conv(x.shape[-1], 3, self.dtype, "conv")(x.repeat(2, 1).repeat(2, 2))
        # Zeros behind the last row and column only, as latent diffusion has it.
        return _conv(x.shape[-1], 3, self.dtype, "conv", strides=2, padding=((0, 1), (0, 1)))(x)


class Level(nn.Module):
    """The residual blocks of one resolution, then the change to the next one, if any."""

    features: int
    num_blocks: int
    norm_num_groups: int
    resampler: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_blocks):
            x = ResnetBlock(self.features, self.norm_num_groups, self.dtype, name=f"resnets_{i}")(x)
        if self.resampler:
            x = Resample(self.resampler == "upsamplers", self.dtype, name=f"{self.resampler}_0")(x)
        return x


class Coder(nn.Module):
    """The encoder, or the decoder, whose levels come in the reverse order and behind the middle.

    The last conv is float32 whatever `dtype`: it costs next to nothing, and its output is not rounded.
    """

    is_decoder: bool
    features: int
    block_out_channels: tuple[int, ...]
    num_blocks: int
    norm_num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = self.block_out_channels[::-1] if self.is_decoder else self.block_out_channels
        blocks, resampler = ("up_blocks", "upsamplers") if self.is_decoder else ("down_blocks", "downsamplers")
        middle = MidBlock(self.norm_num_groups, self.dtype, name="mid_block")

        x = _conv(channels[0], 3, self.dtype, "conv_in")(x)
        if self.is_decoder:
            x = middle(x)
        for i, features in enumerate(channels):
            is_last = i == len(channels) - 1
            change = None if is_last else resampler
            level = Level(features, self.num_blocks, self.norm_num_groups, change, self.dtype, name=f"{blocks}_{i}")
            x = level(x)
        if not self.is_decoder:
            x = middle(x)
        x = nn.silu(group_norm(self.norm_num_groups, "conv_norm_out")(x))
        return _conv(self.features, 3, jnp.float32, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """The KL autoencoder; called on images it encodes, and decodes the mean: [B, H, W, C_in] -> [B, H, W, C_out].

    `model.apply({"params": params}, x, method="encode")`, or "decode". The defaults are Stable Diffusion's: f = 8,
    four latent channels, 83,653,863 parameters.

    Attributes:
      in_channels: of the images that are encoded.
      out_channels: of the images that are decoded.
      block_out_channels: channels of each level, from full resolution down; norm_num_groups divides each.
      layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
      latent_channels: C.
      norm_num_groups: groups of every GroupNorm.
      scaling_factor: what diffusion models multiply the latents by; not applied here.
      use_quant_conv: whether a 1x1 conv follows the encoder.
      use_post_quant_conv: whether a 1x1 conv precedes the decoder.
      dtype: float32 or bfloat16, of the convolutions and linear layers other than the last ones of the encoder and
        the decoder; parameters, norms, softmax and outputs are float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    dtype: jnp.dtype = jnp.float32

    @property
    def downsampling(self) -> int:
        """f: how many pixels in each direction make one position of the latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self):
        self.block_out_channels = tuple(self.block_out_channels)  # of a list, a module could not be hashed
        super().__post_init__()

    def setup(self):
        if any(n < 1 or n % self.norm_num_groups for n in self.block_out_channels) or not self.block_out_channels:
            raise ValueError(
                "norm_num_groups must divide each of block_out_channels, "
                f"got {self.norm_num_groups} and {self.block_out_channels}"
            )
        if jnp.dtype(self.dtype).name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {jnp.dtype(self.dtype).name}")
        shared = {
            "block_out_channels": self.block_out_channels,
            "norm_num_groups": self.norm_num_groups,
            "dtype": self.dtype,
        }
        C = self.latent_channels
        self.encoder = Coder(False, features=2 * C, num_blocks=self.layers_per_block, **shared)
        self.decoder = Coder(True, features=self.out_channels, num_blocks=self.layers_per_block + 1, **shared)
        self.quant_conv = _conv(2 * C, 1, jnp.float32) if self.use_quant_conv else None
        self.post_quant_conv = _conv(C, 1, jnp.float32) if self.use_post_quant_conv else None

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The Gaussian over latents that belongs to each image.

        Args:
          images: [B, H, W, C_in] float in [-1, 1]; H and W are multiples of `downsampling`.

        Returns:
          mean and log_std, [B, H/f, W/f, C] float32: the unscaled mean and the logarithm of the standard deviation.

        Raises:
          ValueError: the images have another shape or are not floating point.
        """
        check_images(images, self.in_channels, self.downsampling)
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, -1)
        return mean, 0.5 * jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images of latents.

        Args:
          latents: [B, h, w, C] float, unscaled.

        Returns:
          [B, h f, w f, C_out] float32, about in [-1, 1], not clipped.

        Raises:
          ValueError: the latents have another shape or are not floating point.
        """
        check_images(latents, self.latent_channels, 1, "latents")
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, images: jax.Array) -> jax.Array:
        mean, _ = self.encode(images)
        return self.decode(mean)


def check_images(x: jax.Array, channels: int, multiple: int, what: str = "images") -> None:
    """ValueError unless x is [B, H, W, channels] of floats, and H and W are multiples."""
    if x.ndim != 4 or x.shape[-1] != channels or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{what} must be [B, H, W, {channels}] of floats, got {x.dtype.name} {list(x.shape)}")
    H, W = x.shape[1:3]
    if min(H, W) < 1 or H % multiple or W % multiple:
        raise ValueError(f"H and W of {what} must be multiples of {multiple} (the downsampling), got H = {H}, W = {W}")


def sample_latents(mean: jax.Array, log_std: jax.Array, key: jax.Array) -> jax.Array:
    """A draw from the Gaussian that `encode` returned: mean + exp(log_std) noise, of mean's shape."""
    return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)


def init_params(model: AutoencoderKL, seed: int) -> dict[str, Any]:
    """Random parameters, float32: an autoencoder before it is trained."""
    image = jnp.zeros((1, model.downsampling, model.downsampling, model.in_channels))
    return jax.jit(model.init)(jax.random.key(seed), image)["params"]


def make_decoder(model: AutoencoderKL, params: Any, *, batch_size: int = 16) -> Callable[[jax.Array], np.ndarray]:
    """A jitted function from latents [B, h, w, c], not scaled, to images in [-1, 1] [B, H, W, C] on the host.

    Any B; at most `batch_size` are decoded at a time, so that memory does not grow with B.
    """
    decode = jax.jit(lambda latents: model.apply({"params": params}, latents, method="decode"))

    def decode_all(latents):
        parts = [latents[i : i + batch_size] for i in range(0, len(latents), batch_size)]
        return np.concatenate([jax.device_get(decode(part)) for part in parts])

    return decode_all
