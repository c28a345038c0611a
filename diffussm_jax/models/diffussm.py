"""DiffuSSM (Yan, Gu, Rush, arXiv 2311.18257): a diffusion backbone of gated bidirectional SSMs in an hourglass.

M consecutive positions of the flattened latent make one of the J = L / M tokens of the residual stream. A block, on
I = adaLN(x, c), with sigma the tanh form of GELU:

    h_j       = sigma(W0 I_j)                               on J tokens
    U_{jM+k}  = sigma(W_up_k h_j)       k = 0 ... M-1        back to all L positions
    Y         = [S4D_forward(U), S4D_backward(U)]           along L
    I'_j      = concat_k sigma(W_down_k Y_{jM+k})           down to J tokens, of 2D
    O_j       = W3 (sigma(W2 I'_j) * sigma(W1 I_j))         gate
    x         = x + O

The paper is silent on some choices, which are ours: tanh GELU (after BiGS, arXiv 2212.10544), W3 and the modulation
starting at zero, the fixed position embedding, S4D-Lin at initialisation, and the depths of S and L.

With scan = "2d", which is ours too, each S4D above is the sum of two, one along the rows of the latent and one along
its columns (`models.mixers`); the linear layers stay as they are.
"""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffussm_jax.models.layers import (
    NUM_TIME_FEATURES,
    AdaLayerNorm,
    LabelEmbed,
    Linear,
    TimeEmbed,
    gelu,
    sincos_2d,
)
from diffussm_jax.models.mixers import S4D
from diffussm_jax.parallel.sharding import split_channels, whole_channels
from diffussm_jax.ssm import DEFAULT_METHOD

SCANS = ("raster", "2d")
# What the backward pass finds stored of each block beside its input; it computes the rest again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("dense"),
    "block": jax.checkpoint_policies.nothing_saveable,
}
# How the parameters lie on the mesh (`parallel.sharding`). D is split along `tensor` so that no SSM and no nonlinearity
# communicates: W0 gathers its output, W_down and W3 sum theirs. `fsdp` splits a dimension that is free.
SHARDING_RULES = (
    (r"blocks/(W0|W1|W2)/kernel$", (None, "fsdp", "tensor")),
    (r"blocks/W_up/kernel$", (None, None, "fsdp", "tensor")),
    (r"blocks/W_down/kernel$", (None, None, None, "tensor", "fsdp")),
    (r"blocks/W3/kernel$", (None, "tensor", "fsdp")),
    (r"blocks/(W0|W1|W2)/bias$", (None, "tensor")),
    (r"blocks/W_up/bias$", (None, None, "tensor")),
    (r"blocks/ssm/", (None, ("tensor", "fsdp"))),
    (r"blocks/norm/modulation/kernel$", (None, None, "fsdp")),
    (r"(final_norm/modulation|time_embed/out)/kernel$", (None, "fsdp")),
)


class Block(nn.Module):
    """One gated bidirectional SSM block: x [B, J, D], c [B, D] -> (x [B, J, D], None), as `nn.scan` takes it."""

    hourglass_ratio: int
    mixer: Mapping[str, object]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> tuple[jax.Array, None]:
        B, J, D = x.shape
        M = self.hourglass_ratio

        def dense(inputs, outputs, name, **options):
            return Linear("bjd,de->bje", (inputs, outputs), self.dtype, **options, name=name)

        def position_dense(equation, shape, name):  # one for each of M positions: kernel [M, inputs..., outputs]
            inputs = tuple(range(1, len(shape) - 1))
            init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", inputs, -1, batch_axis=0)
            return Linear(equation, shape, self.dtype, kernel_init=init, name=name)

        def keep(x):
            return checkpoint_name(x, "dense")

        I = whole_channels(AdaLayerNorm(self.dtype, name="norm")(x, c))
        h = whole_channels(gelu(keep(split_channels(dense(D, D, "W0")(I)))))
        # U and Y stay apart by k and have channels first, as products give and take them and `ssm.phases` explains.
        W_up = position_dense("bjd,mde->mebj", (M, D, D), "W_up")
        U = gelu(keep(split_channels(W_up(h), batch=2, channels=1)))
        Y = S4D(**self.mixer, name="ssm")(U)  # [M, R, D, B, J]
        W_down = position_dense("mrdbj,mrde->bjme", (M, Y.shape[1], D, 2 * D // M), "W_down")
        I_down = gelu(keep(whole_channels(W_down(Y)))).reshape(B, J, 2 * D)
        left = gelu(keep(split_channels(dense(2 * D, 2 * D, "W2")(I_down))))
        right = gelu(keep(split_channels(dense(D, 2 * D, "W1")(I))))
        W3 = dense(2 * D, D, "W3", kernel_init=nn.initializers.zeros)
        return whole_channels(x + W3(left * right)), None


class DiffuSSM(nn.Module):
    """The DiffuSSM backbone: (x_t [B, H, W, C], t [B], y [B]) -> [B, H, W, 2C] float32, noise and variance fraction.

    Attributes:
      width: D, a multiple of 4 if there is a position embedding, and 2D one of M.
      depth: number of blocks.
      num_classes: labels are 0 ... num_classes-1, and num_classes is the null label; 0 for an unconditional model,
        which takes no y.
      hourglass_ratio: M; divides W.
      has_position_embedding: whether to add a fixed 2-D sin-cos embedding.
      state_size: N of the SSMs.
      scan: "raster", the SSMs run over the flattened latent; or "2d", as many again run over it column by column.
      bidirectional: whether the SSMs run in both directions.
      discretization: "zoh" or "bilinear".
      initialization: "legs", "lin" or "inv".
      ssm_method: how the SSMs are computed (`ssm_apply`).
      label_dropout: probability of the null label in training.
      remat: what is kept for the backward pass: "none" (everything), "dots" (each block's input and what its linear
        layers give; SSM and nonlinearities are computed again), "block" (each block's input).
      scan_unroll: how many blocks each iteration of the scan over depth holds.
      dtype: of the linear layers and the residual stream; parameters, norms and the states of SSMs are float32.
      platform: what it is compiled for, by which SSM methods are chosen; JAX's default backend if None.
    """

    width: int
    depth: int
    num_classes: int = 1000
    hourglass_ratio: int = 2
    has_position_embedding: bool = True
    state_size: int = 64
    scan: str = "raster"
    bidirectional: bool = True
    discretization: str = "zoh"
    initialization: str = "lin"
    ssm_method: str = DEFAULT_METHOD
    label_dropout: float = 0.1
    remat: str = "none"
    scan_unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    platform: str | None = None
    sharding_rules: ClassVar = SHARDING_RULES

    def _check(self, x_t: jax.Array, y: jax.Array | None) -> None:
        W, M = x_t.shape[2], self.hourglass_ratio
        if M < 1 or W % M:
            raise ValueError(f"hourglass_ratio M must divide the latent's width W, got M = {M} and W = {W}")
        if 2 * self.width % M:
            raise ValueError(f"hourglass_ratio M must divide 2D, got M = {M} and D = {self.width}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"unknown remat {self.remat!r}; choose one of {', '.join(REMAT_POLICIES)}")
        if self.scan not in SCANS:
            raise ValueError(f"unknown scan {self.scan!r}; choose one of {', '.join(SCANS)}")
        if (y is None) != (self.num_classes == 0):
            raise ValueError(
                f"a model of {self.num_classes} classes was called {'without' if y is None else 'with'} labels"
            )

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array, y: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Predicts noise and variance.

        Args:
          x_t: [B, H, W, C] float.
          t: [B], the diffusion time as the model was trained on it.
          y: [B] int labels, or None if num_classes is 0.
          train: whether to drop labels; needs the random stream "label_dropout".

        Returns:
          [B, H, W, 2C] float32.

        Raises:
          ValueError: sizes do not divide as they must, labels are missing or not wanted, or an option is unknown.
        """
        self._check(x_t, y)
        B, H, W, C = x_t.shape
        M = self.hourglass_ratio
        J = H * W // M
        x = x_t.reshape(B, J, M * C)
        x = Linear("bjc,cd->bjd", (M * C, self.width), self.dtype, name="embed")(x)
        if self.has_position_embedding:
            x = x + jnp.asarray(sincos_2d(H, W // M, self.width), self.dtype)
        c = TimeEmbed(self.width, self.dtype, name="time_embed")(t)
        if y is not None:
            label_embed = LabelEmbed(self.num_classes, self.width, self.label_dropout, self.dtype, name="label_embed")
            c = c + label_embed(y, train=train)
        x = self._blocks(H, W)(whole_channels(x), c)[0]
        x = AdaLayerNorm(self.dtype, name="final_norm")(x, c)
        # The last layer is small and its output meets float32 losses: it stays in float32.
        options = {"kernel_init": nn.initializers.zeros, "name": "final"}
        x = Linear("bjd,dc->bjc", (self.width, M * 2 * C), jnp.float32, **options)(x)
        return x.reshape(B, H, W, 2 * C)

    def _blocks(self, height: int, width: int) -> nn.Module:
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=self.scan_unroll,
        )
        return scanned(self.hourglass_ratio, self.mixer_options(height, width), self.dtype, name="blocks")

    def mixer_options(self, height: int, width: int) -> dict[str, object]:
        """The options of each block's `S4D` for a latent of that height and width."""
        return {
            "state_size": self.state_size,
            "grid": (height, width) if self.scan == "2d" else None,
            "bidirectional": self.bidirectional,
            "discretization": self.discretization,
            "initialization": self.initialization,
            "method": self.ssm_method,
            "platform": self.platform,
        }

    def multiply_adds(self, height: int, width: int, channels: int) -> dict[str, int]:
        """Multiply-adds of the linear layers in one forward pass of one image, as the paper and DiT count them.

        The SSMs and everything elementwise come on top.

        Args:
          height: H of the latent.
          width: W of the latent.
          channels: C of the latent.

        Returns:
          "blocks": the blocks' linear layers, 13 D^2 for each of J tokens and D^2 for each of L positions when
          bidirectional; "total": with input, output and conditioning.
        """
        D, M, L = self.width, self.hourglass_ratio, height * width
        J = L // M
        num_directions = 2 if self.bidirectional else 1
        per_token = D * D + 2 * D * D + 4 * D * D + 2 * D * D  # W0, W1, W2, W3
        per_token += num_directions * 2 * D * D  # W_down, all M of them
        blocks = self.depth * (J * per_token + L * D * D)  # and W_up
        ends = J * M * channels * D + J * D * M * 2 * channels
        conditioning = NUM_TIME_FEATURES * D + D * D + (self.depth + 1) * 2 * D * D
        return {"blocks": blocks, "total": blocks + ends + conditioning}
