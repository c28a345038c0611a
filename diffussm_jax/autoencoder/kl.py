"""The KL autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752), as in Stable Diffusion and DiT.

    images [B, H, W, 3] in [-1, 1]  -- encode -->  mean, log_std [B, H/f, W/f, C]      f = 2**(number of levels - 1)
    latents [B, H/f, W/f, C]        -- decode -->  images

Latents are unscaled here: a diffusion model is trained on `scaling_factor * latents`. Modules and parameter names are
those of diffusers' `AutoencoderKL`, with `down_blocks.0` as `down_blocks_0`.

TPUs and recent GPUs compute float32 products at lower precision by default. Set
`jax.default_matmul_precision("float32")` to encode latents that are computed once and stored.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.layers import PYTORCH_INIT, attend, conv, group_norm

DTYPES = ("float32", "bfloat16")
LOGVAR_RANGE = (-30.0, 20.0)  # as in diffusers


class ResnetBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), with a 1x1 conv on the shortcut if the number of channels changes."""

    features: int
    norm_num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for i in (1, 2):
            h = nn.silu(group_norm(self.norm_num_groups, f"norm{i}")(h))
            h = conv(self.features, 3, self.dtype, f"conv{i}")(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.dtype, "conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all positions, with one head and a residual connection: [B, H, W, C] -> [B, H, W, C]."""

    norm_num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape

        def dense(name):
            return nn.Dense(C, dtype=self.dtype, kernel_init=PYTORCH_INIT, name=name)

        h = group_norm(self.norm_num_groups, "group_norm")(x).reshape(B, H * W, 1, C)
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
    """Doubles the resolution (nearest neighbour, then a conv) or halves it (a conv of stride 2)."""

    is_up: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_up:
            return conv(x.shape[-1], 3, self.dtype, "conv")(x.repeat(2, 1).repeat(2, 2))
        # Zero padding after the last row and column only, as in latent diffusion.
        return conv(x.shape[-1], 3, self.dtype, "conv", strides=2, padding=((0, 1), (0, 1)))(x)


class Level(nn.Module):
    """The residual blocks of one resolution, each with attention after it if wanted; then the resampling, if any."""

    features: int
    num_blocks: int
    norm_num_groups: int
    resampler: str | None
    dtype: jnp.dtype
    has_attention: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_blocks):
            x = ResnetBlock(self.features, self.norm_num_groups, self.dtype, name=f"resnets_{i}")(x)
            if self.has_attention:
                x = Attention(self.norm_num_groups, self.dtype, name=f"attentions_{i}")(x)
        if self.resampler:
            x = Resample(self.resampler == "upsamplers", self.dtype, name=f"{self.resampler}_0")(x)
        return x


class Coder(nn.Module):
    """The encoder or the decoder. The decoder has the levels in reverse order, after the middle block.

    The last conv is always float32: it is cheap, and its output is not rounded.
    """

    is_decoder: bool
    features: int
    block_out_channels: tuple[int, ...]
    num_blocks: int
    attention_levels: tuple[int, ...]
    norm_num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        levels = list(enumerate(self.block_out_channels))
        if self.is_decoder:
            levels.reverse()
        blocks, resampler = ("up_blocks", "upsamplers") if self.is_decoder else ("down_blocks", "downsamplers")
        middle = MidBlock(self.norm_num_groups, self.dtype, name="mid_block")

        x = conv(levels[0][1], 3, self.dtype, "conv_in")(x)
        if self.is_decoder:
            x = middle(x)
        for i, (index, features) in enumerate(levels):
            x = Level(
                features,
                self.num_blocks,
                self.norm_num_groups,
                resampler if i < len(levels) - 1 else None,
                self.dtype,
                has_attention=index in self.attention_levels,
                name=f"{blocks}_{i}",
            )(x)
        if not self.is_decoder:
            x = middle(x)
        x = nn.silu(group_norm(self.norm_num_groups, "conv_norm_out")(x))
        self.sow("intermediates", "conv_out_input", x)  # the adversarial loss is weighed by gradients of conv_out
        return conv(self.features, 3, jnp.float32, "conv_out")(x)


class Autoencoder(nn.Module):
    """What `AutoencoderKL` and `VQModel` share: the sizes, the encoder and the decoder.

    Attributes:
      block_out_channels: channels per level, from full resolution down; multiples of norm_num_groups.
      layers_per_block: residual blocks per level of the encoder; the decoder has one more.
      attention_levels: levels, numbered from 0 at full resolution, that have attention after each residual block, in
        the encoder and in the decoder. The middle block has attention always.
      latent_channels: C.
      scaling_factor: diffusion models multiply latents by it; not applied here.
      dtype: float32 or bfloat16, of convolutions and linear layers except the last of the encoder and the decoder.
        Parameters, norms, softmax and outputs are float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    attention_levels: tuple[int, ...] = ()
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    dtype: jnp.dtype = jnp.float32

    @property
    def downsampling(self) -> int:
        """f: pixels per latent position, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self):
        # A module with a list is not hashable.
        self.block_out_channels = tuple(self.block_out_channels)
        self.attention_levels = tuple(self.attention_levels)
        super().__post_init__()

    def make_coders(self, encoder_features: int) -> tuple[Coder, Coder]:
        """The encoder, with that many channels at its end, and the decoder; for `setup`."""
        if any(n < 1 or n % self.norm_num_groups for n in self.block_out_channels) or not self.block_out_channels:
            raise ValueError(
                "norm_num_groups must divide each of block_out_channels, "
                f"got {self.norm_num_groups} and {self.block_out_channels}"
            )
        check_attention_levels("attention_levels", self.attention_levels, len(self.block_out_channels))
        if jnp.dtype(self.dtype).name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {jnp.dtype(self.dtype).name}")
        shared = {
            "block_out_channels": self.block_out_channels,
            "attention_levels": self.attention_levels,
            "norm_num_groups": self.norm_num_groups,
            "dtype": self.dtype,
        }
        return (
            Coder(False, features=encoder_features, num_blocks=self.layers_per_block, **shared),
            Coder(True, features=self.out_channels, num_blocks=self.layers_per_block + 1, **shared),
        )


class AutoencoderKL(Autoencoder):
    """The KL autoencoder. A call encodes images and decodes the mean: [B, H, W, C_in] -> [B, H, W, C_out].

    `model.apply({"params": params}, x, method="encode")`, or "decode". The defaults are those of Stable Diffusion: f =
    8, four latent channels, 83,653,863 parameters. See `Autoencoder` for the other attributes.

    Attributes:
      use_quant_conv: adds a 1x1 conv after the encoder.
      use_post_quant_conv: adds a 1x1 conv before the decoder.
    """

    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def setup(self):
        C = self.latent_channels
        self.encoder, self.decoder = self.make_coders(2 * C)
        self.quant_conv = conv(2 * C, 1, jnp.float32) if self.use_quant_conv else None
        self.post_quant_conv = conv(C, 1, jnp.float32) if self.use_post_quant_conv else None

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes images to Gaussians over latents.

        Args:
          images: [B, H, W, C_in] float in [-1, 1]; H and W are multiples of `downsampling`.

        Returns:
          mean and log_std, [B, H/f, W/f, C] float32: the unscaled mean and the logarithm of the standard deviation.

        Raises:
          ValueError: the images have a wrong shape or are not floating point.
        """
        check_images(images, self.in_channels, self.downsampling)
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, -1)
        return mean, 0.5 * jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes latents to images.

        Args:
          latents: [B, h, w, C] float, unscaled.

        Returns:
          [B, h f, w f, C_out] float32, approximately in [-1, 1], not clipped.

        Raises:
          ValueError: the latents have a wrong shape or are not floating point.
        """
        check_images(latents, self.latent_channels, 1, "latents")
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, images: jax.Array) -> jax.Array:
        mean, _ = self.encode(images)
        return self.decode(mean)


def check_attention_levels(name: str, levels: tuple, num_levels: int) -> None:
    """Raises ValueError, with `name` in front, unless `levels` are numbers of levels, each once and in order."""
    if not all(type(i) is int and 0 <= i < num_levels for i in levels) or list(levels) != sorted(set(levels)):
        raise ValueError(
            f"{name} must be levels from 0 (full resolution) to {num_levels - 1}, each once and in order, got {levels}"
        )


def check_images(x: jax.Array, channels: int, multiple: int, what: str = "images") -> None:
    """Raises ValueError unless x is [B, H, W, channels] of floats, with H and W multiples of `multiple`."""
    if x.ndim != 4 or x.shape[-1] != channels or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{what} must be [B, H, W, {channels}] of floats, got {x.dtype.name} {list(x.shape)}")
    H, W = x.shape[1:3]
    if min(H, W) < 1 or H % multiple or W % multiple:
        raise ValueError(f"H and W of {what} must be multiples of {multiple} (the downsampling), got H = {H}, W = {W}")


def sample_latents(mean: jax.Array, log_std: jax.Array, key: jax.Array) -> jax.Array:
    """Draws latents from the Gaussian that `encode` returns: mean + exp(log_std) noise."""
    return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)


def init_params(model: Autoencoder, seed: int) -> dict[str, Any]:
    """Random float32 parameters of an untrained autoencoder."""
    image = jnp.zeros((1, model.downsampling, model.downsampling, model.in_channels))
    return jax.jit(model.init)(jax.random.key(seed), image)["params"]


def make_decoder(model: Autoencoder, params: Any, *, batch_size: int = 16) -> Callable[[jax.Array], np.ndarray]:
    """Makes a function from unscaled latents [B, h, w, c] to images in [-1, 1] [B, H, W, C] on the host.

    It decodes at most `batch_size` latents at a time, so that memory does not grow with B.
    """
    decode = jax.jit(lambda latents: model.apply({"params": params}, latents, method="decode"))

    def decode_all(latents):
        parts = [latents[i : i + batch_size] for i in range(0, len(latents), batch_size)]
        return np.concatenate([jax.device_get(decode(part)) for part in parts])

    return decode_all
