"""One U-Net for two papers: ADM's (Dhariwal & Nichol, arXiv 2105.05233) and LDM's (Rombach et al., arXiv 2112.10752).

Level l has resolution H / 2**l and C_l = width * channel_mult[l] channels. With c the embedding of the time, and of
those conditions that give a vector:

    down     each level: num_res_blocks residual blocks, then, except at the last level, half the resolution.
             The output of conv_in, of each of these blocks and of each halving is kept as a skip.
    middle   residual block, attention, residual block
    up       each level, from the last: num_res_blocks + 1 residual blocks on [x, skip], then, except at the first
             level, twice the resolution

    residual block   x = shortcut(x) + conv2(SiLU(GroupNorm(conv1(SiLU(GroupNorm(x)))) (1 + scale(c)) + shift(c)))

Attention follows each residual block at the stated resolutions. It is self-attention (ADM); if a condition gives
tokens, it is a transformer with cross-attention onto them (LDM). The last layer of each branch starts at zero.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.layers import ATTENTION, sinusoidal_features
from diffussm_jax.models.backbone import Backbone, Condition
from diffussm_jax.models.unet_blocks import (
    QKV_ORDERS,
    ResidualBlock,
    SelfAttention,
    SpatialTransformer,
    conv3,
    double,
    halve,
    linear,
    norm,
)
from diffussm_jax.options import CHANGEABLE_ON_RESUME, Choices, Range, check_options
from diffussm_jax.parallel.sharding import Rules, replicate_channels

_ADM = {
    "attention_resolutions": (32, 16, 8),
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
# ADM's for ImageNet of 64, 256 and 512 pixels, as released, and LDM-4's (cin256-v2) for ImageNet of 256 pixels.
UNET_SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ADM-64": _ADM
        | {"width": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3, "qkv_order": "new", "dropout": 0.1},
        "ADM-256": _ADM
        | {"width": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "qkv_order": "legacy"},
        "ADM-512": _ADM
        | {"width": 256, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "qkv_order": "legacy"},
        "LDM-4": {
            "width": 192,
            "channel_mult": (1, 2, 3, 5),
            "num_res_blocks": 2,
            "attention_resolutions": (32, 16, 8),
            "num_heads": 1,
            "num_head_channels": 0,
            "use_scale_shift_norm": False,
            "resblock_updown": False,
        },
    }
)
_MAX_CHANNELS = 1 << 16
# `fsdp` splits the outputs of each kernel, and the inputs of the last.
SHARDING_RULES: Rules = (
    (r"conv_out/kernel$", (None, None, "fsdp")),
    (r"(conv_in|conv1|conv2|(down|up)sample)/kernel$", (None, None, None, "fsdp")),
    (r"/kernel$", (None, "fsdp")),
)


class Level(nn.Module):
    """The blocks of one resolution, on the way down or up.

    Attributes:
      features: channels.
      num_blocks: number of residual blocks.
      residual: factory of residual blocks.
      attention: factory of the attention after each of them, if any.
      resample: "down" or "up" after them, or "".
      resblock_updown: see `UNet`.
      dtype: of the convolutions.
    """

    features: int
    num_blocks: int
    residual: Callable[..., nn.Module]
    attention: Callable[..., nn.Module] | None
    resample: str
    resblock_updown: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, c: jax.Array, tokens: jax.Array | None, skips: Sequence[jax.Array] = ()
    ) -> list[jax.Array]:
        """The outputs of all blocks, the last one that of the resampling. `skips` is one for each residual block."""
        outputs = []
        for i in range(self.num_blocks):
            if skips:
                x = jnp.concatenate([x, skips[i]], -1)
            x = self.residual(self.features, name=f"block_{i}")(x, c)
            if self.attention:
                x = self.attention(name=f"attention_{i}")(x, tokens)
            outputs.append(x)
        if self.resample:
            outputs.append(self._resampled(x, c))
        return outputs

    def _resampled(self, x: jax.Array, c: jax.Array) -> jax.Array:
        change, name = {"down": (halve, "downsample"), "up": (double, "upsample")}[self.resample]
        if self.resblock_updown:
            return self.residual(self.features, resample=change, name=name)(x, c)
        if self.resample == "down":
            return conv3(self.features, self.dtype, name, strides=2)(x)
        return conv3(self.features, self.dtype, name)(double(x))


class Middle(nn.Module):
    """A residual block, attention if there is any, and a residual block, at the lowest resolution."""

    features: int
    residual: Callable[..., nn.Module]
    attention: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, tokens: jax.Array | None) -> jax.Array:
        x = self.residual(self.features, name="block_0")(x, c)
        if self.attention:
            x = self.attention(name="attention_0")(x, tokens)
        return self.residual(self.features, name="block_1")(x, c)


class UNet(Backbone):
    """The U-Net backbone: (x_t [B, H, W, C], t [B], condition) -> [B, H, W, num_outputs * C] float32.

    Attributes:
      width: channels that `channel_mult` multiplies; even.
      channel_mult: of each level, from full resolution down.
      num_res_blocks: residual blocks of a level on the way down; one more on the way up.
      attention_resolutions: heights of the levels with attention; () for none.
      has_middle_attention: whether the middle has attention too.
      num_heads: of attention; not used if `num_head_channels` is given.
      num_head_channels: channels of each head; 0 if `num_heads` is given.
      qkv_order: how q, k and v of ADM's attention lie in the outputs of one layer: "new" has q of all heads, then k,
        then v; "legacy" has q, k and v of each head, as most of ADM's checkpoints.
      transformer_depth: blocks of each of LDM's transformers.
      use_scale_shift_norm: the condition scales and shifts after the second norm of a residual block; else it is added
        before that norm.
      resblock_updown: changes the resolution inside of residual blocks (BigGAN's); else by convolutions.
      dropout: rate of dropout before the last convolution of each residual block, in training.
      norm_num_groups: of the GroupNorms; where it does not divide the channels, the greatest common divisor.
      attention: how attention is computed (`layers.attend`).
      remat: activations saved for the backward pass: "none" saves all, "block" the input of each residual block and
        of each attention.
      dtype: of convolutions, linear layers and the residual stream; parameters, norms, softmax and the last
        convolution are float32.
    """

    width: Annotated[int, Range(2)] = 128
    channel_mult: tuple = (1, 2, 2, 2)
    num_res_blocks: Annotated[int, Range(1, 100)] = 2
    attention_resolutions: tuple = (16, 8)
    has_middle_attention: bool = True
    num_heads: Annotated[int, Range(1)] = 4
    num_head_channels: Annotated[int, Range(0)] = 0
    qkv_order: Annotated[str, Choices(QKV_ORDERS)] = "new"
    transformer_depth: Annotated[int, Range(1, 100)] = 1
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    dropout: Annotated[float, Range(0, 1)] = 0.0
    norm_num_groups: Annotated[int, Range(1)] = 32
    attention: Annotated[str, Choices(ATTENTION), CHANGEABLE_ON_RESUME] = "auto"
    remat: Annotated[str, Choices(("none", "block")), CHANGEABLE_ON_RESUME] = "none"
    dtype: Annotated[str, Choices(("float32", "bfloat16"))] = "float32"

    sharding_rules: ClassVar[Rules] = SHARDING_RULES
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = UNET_SIZES

    def __post_init__(self):
        for name in ("channel_mult", "attention_resolutions"):
            if isinstance(value := getattr(self, name), list):  # a module with a list is not hashable
                setattr(self, name, tuple(value))
        super().__post_init__()

    def from_pytorch(self, state_dict: Mapping[str, np.ndarray]) -> dict:
        from diffussm_jax.models import unet_convert  # which makes a UNet for its shapes

        return unet_convert.from_pytorch(state_dict)

    def to_pytorch(self, params: dict, input_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
        from diffussm_jax.models import unet_convert

        table = params.get("label_embed", {}).get("table", {}).get("embedding")
        return unet_convert.to_pytorch(params, has_null_label=table is not None and bool(np.any(table[-1])))

    @property
    def features(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(int(multiplier * self.width) for multiplier in self.channel_mult)

    def _has_attention(self, input_shape: tuple[int, int, int]) -> list[bool]:
        return [input_shape[0] >> level in self.attention_resolutions for level in range(len(self.channel_mult))]

    def check(self, input_shape: tuple[int, int, int]) -> None:
        """Raises ValueError if the sizes do not divide as they must, or an option or the mesh is not allowed."""
        check_options(self, without=("dtype",))  # which may be a dtype as well as its name
        if (num_devices := dict(jax.sharding.get_abstract_mesh().shape).get("tensor", 1)) > 1:
            raise ValueError(f"the U-Net is not split along the mesh axis tensor, which has {num_devices} devices")
        if self.width % 2:
            raise ValueError(f"width must be even, for sines and cosines of the time, got {self.width}")
        for name in ("channel_mult", "attention_resolutions"):
            if any(isinstance(n, bool) or not isinstance(n, int | float) for n in getattr(self, name)):
                raise ValueError(f"{name} must be numbers, got {getattr(self, name)}")
        if not self.channel_mult or not all(1 <= m * self.width <= _MAX_CHANNELS for m in self.channel_mult):
            raise ValueError(
                f"channel_mult must be factors that make 1 to {_MAX_CHANNELS} channels of width = {self.width}, got "
                f"{self.channel_mult}"
            )
        factor = 2 ** (len(self.channel_mult) - 1)
        H, W, _ = input_shape
        if H % factor or W % factor:
            raise ValueError(
                f"{len(self.channel_mult)} levels need H and W that are multiples of {factor}, got {H}, {W}"
            )
        attended = [C for C, has in zip(self.features, self._has_attention(input_shape), strict=True) if has]
        for C in attended + [self.features[-1]] * self.has_middle_attention:
            name = "num_head_channels" if self.num_head_channels else "num_heads"
            if C % getattr(self, name):
                raise ValueError(
                    f"{name} = {getattr(self, name)} must divide the {C} channels of a level with attention"
                )

    @nn.compact
    def __call__(
        self, x_t: jax.Array, t: jax.Array, condition: Condition | jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Predicts the target, and the variance if it is learned.

        Args:
          x_t: [B, H, W, C] float.
          t: [B], the time as the model was trained on it.
          condition: a dict of arrays, labels [B] alone, or None for an unconditional model.
          train: has no effect; conditions are dropped before (`Backbone.drop`), and `dropout` acts where `apply` has
            random numbers, `rngs={"dropout": key}`.

        Raises:
          ValueError: as `check`; or conditions are missing or unknown.
        """
        self.check(x_t.shape[1:])
        dtype, features = jnp.dtype(self.dtype), self.features
        last = len(features) - 1
        x, c, tokens = self._embedded(x_t, t, condition, dtype)
        residual, attention = self._factories(tokens is not None, dtype)
        level = functools.partial(Level, residual=residual, resblock_updown=self.resblock_updown, dtype=dtype)
        has_attention = [attention if has else None for has in self._has_attention(x_t.shape[1:])]

        x = replicate_channels(conv3(features[0], dtype, "conv_in")(x))
        skips = [x]
        for i, C in enumerate(features):
            options = {"attention": has_attention[i], "resample": "down" if i < last else ""}
            skips += level(C, self.num_res_blocks, **options, name=f"down_{i}")(skips[-1], c, tokens)
        middle = attention if self.has_middle_attention else None
        x = Middle(features[-1], residual, middle, name="middle")(skips[-1], c, tokens)
        for i, C in reversed(list(enumerate(features))):
            options = {"attention": has_attention[i], "resample": "up" if i else ""}
            of_level = [skips.pop() for _ in range(self.num_res_blocks + 1)]
            *_, x = level(C, self.num_res_blocks + 1, **options, name=f"up_{i}")(x, c, tokens, of_level)
        # The last convolution is small and its output meets float32 losses: it stays in float32.
        x = nn.silu(norm(self.norm_num_groups, x, "norm_out"))
        return conv3(self.num_outputs * x_t.shape[-1], jnp.float32, "conv_out", kernel_init=nn.initializers.zeros)(x)

    def _embedded(
        self, x_t: jax.Array, t: jax.Array, condition: Condition | jax.Array | None, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """x_t with the channels of conditions, c [B, E], and the tokens of conditions [B, T, ...] if there are any."""
        D, E = self.width, 4 * self.width
        hidden = linear(D, E, dtype, "time_hidden")(sinusoidal_features(t, D)[:, None])
        c = linear(E, E, dtype, "time_out")(nn.silu(hidden))[:, 0]
        x, tokens = x_t, []
        for conditioning in self.embed(condition, E, dtype).values():
            if conditioning.vector is not None:
                c = c + conditioning.vector
            if conditioning.channels is not None:
                x = jnp.concatenate([x, conditioning.channels], -1)
            if conditioning.tokens is not None:
                tokens.append(conditioning.tokens)
        return x, replicate_channels(c), jnp.concatenate(tokens, 1) if tokens else None

    def _factories(self, has_tokens: bool, dtype: jnp.dtype) -> tuple[Callable[..., nn.Module], ...]:
        """Of residual blocks, called with features, and of attention."""
        shared = {"norm_num_groups": self.norm_num_groups, "dtype": dtype}
        of_attention = {
            "num_heads": self.num_heads,
            "num_head_channels": self.num_head_channels,
            "attention": self.attention,
            **shared,
        }
        kept = nn.remat if self.remat == "block" else lambda module: module
        of_residual = {"use_scale_shift_norm": self.use_scale_shift_norm, "dropout": self.dropout}
        residual = functools.partial(kept(ResidualBlock), **of_residual, **shared)
        if has_tokens:
            depth = self.transformer_depth
            return residual, functools.partial(kept(SpatialTransformer), depth=depth, **of_attention)
        return residual, functools.partial(kept(SelfAttention), qkv_order=self.qkv_order, **of_attention)
