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

The sequence mixer is a module of its own (`models.mixers`), S4D by default. With its scan = "2d", which is ours too,
each S4D above is the sum of two, one along the rows of the latent and one along its columns.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffussm_jax.layers import NUM_TIME_FEATURES, AdaLayerNorm, Linear, TimeEmbed, gelu, sincos_2d
from diffussm_jax.models.backbone import REMAT_POLICIES, Backbone, Condition, Costs, scan_blocks
from diffussm_jax.models.mixers import S4D, mix_phases, num_outputs
from diffussm_jax.options import CHANGEABLE_ON_RESUME, Choices, Component, Range, check_options
from diffussm_jax.parallel.sharding import Rules, replicate_channels, split_channels

# XL is the paper's. It prints 786 for L's width and no depths for S and L: 768, 24 and 12 are ours.
DIFFUSSM_SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "S": {"width": 384, "depth": 12},
        "L": {"width": 768, "depth": 24},
        "XL": {"width": 1152, "depth": 29},
    }
)
# How parameters are laid over the mesh (`parallel.sharding`). D is split along `tensor` so that no SSM and no
# nonlinearity communicates: W0 gathers its output, W_down and W3 sum theirs. `fsdp` splits a dimension that is free.
SHARDING_RULES: Rules = (
    (r"blocks/(W0|W1|W2)/kernel$", (None, "fsdp", "tensor")),
    (r"blocks/W_up/kernel$", (None, None, "fsdp", "tensor")),
    (r"blocks/W_down/kernel$", (None, None, None, "tensor", "fsdp")),
    (r"blocks/W3/kernel$", (None, "tensor", "fsdp")),
    (r"blocks/(W0|W1|W2)/bias$", (None, "tensor")),
    (r"blocks/W_up/bias$", (None, None, "tensor")),
    (r"blocks/(norm/modulation|gate)/kernel$", (None, None, "fsdp")),
    (r"(final_norm/modulation|time_embed/out)/kernel$", (None, "fsdp")),
)


class Block(nn.Module):
    """One gated bidirectional SSM block: x [B, J, D], c [B, D] -> (x [B, J, D], None), as `nn.scan` takes it.

    Attributes:
      hourglass_ratio: M.
      mixer: factory of the sequence mixer, called with name="ssm".
      grid: (H, W) of the L = H W positions.
      dtype: of the linear layers and the residual stream.
      has_gate: see `DiffuSSM`.
    """

    hourglass_ratio: int
    mixer: Callable[..., nn.Module]
    grid: tuple[int, int]
    dtype: jnp.dtype
    has_gate: bool = False

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

        I = replicate_channels(AdaLayerNorm(self.dtype, name="norm")(x, c))
        h = replicate_channels(gelu(keep(split_channels(dense(D, D, "W0")(I)))))
        # U and Y stay apart by k and have channels first, as products give and take them and `ssm.phases` explains.
        W_up = position_dense("bjd,mde->mebj", (M, D, D), "W_up")
        U = gelu(keep(split_channels(W_up(h), batch=2, channels=1)))
        Y = mix_phases(self.mixer(name="ssm"), U, self.grid)  # [M, R, D, B, J]
        W_down = position_dense("mrdbj,mrde->bjme", (M, Y.shape[1], D, 2 * D // M), "W_down")
        I_down = gelu(keep(replicate_channels(W_down(Y)))).reshape(B, J, 2 * D)
        left = gelu(keep(split_channels(dense(2 * D, 2 * D, "W2")(I_down))))
        right = gelu(keep(split_channels(dense(D, 2 * D, "W1")(I))))
        if not self.has_gate:
            W3 = dense(2 * D, D, "W3", kernel_init=nn.initializers.zeros)
            return replicate_channels(x + W3(left * right)), None
        options = {"kernel_init": nn.initializers.zeros, "is_gathered": True, "name": "gate"}
        gate = replicate_channels(Linear("bd,de->be", (D, D), self.dtype, **options)(nn.silu(c)))[:, None]
        return replicate_channels(x + gate * dense(2 * D, D, "W3")(left * right)), None


class DiffuSSM(Backbone):
    """The DiffuSSM backbone: (x_t [B, H, W, C], t [B], condition) -> [B, H, W, num_outputs * C] float32.

    Attributes:
      width: D, a multiple of 4 if there is a position embedding, and 2D one of M.
      depth: number of blocks.
      hourglass_ratio: M; divides W.
      patch_size: P; P x P pixels of the input are one position, so that L = H W / P^2. The paper has no patches, P = 1.
      has_position_embedding: whether to add a fixed 2-D sin-cos embedding.
      has_gate: multiplies the output of each block by a gate of c that starts at zero, as DiT's adaLN-Zero does, and W3
        does not start at zero then. Not in the paper.
      mixer: factory of each block's sequence mixer (`models.mixers`), called with name.
      remat: activations saved for the backward pass: "none" saves all, "dots" each block's input and the outputs of its
        linear layers, "block" each block's input.
      scan_unroll: blocks in each iteration of the scan over depth.
      dtype: of the linear layers and the residual stream; parameters, norms and the states of SSMs are float32.
    """

    width: Annotated[int, Range(1)] = 384
    depth: Annotated[int, Range(1)] = 12
    hourglass_ratio: Annotated[int, Range(1)] = 2
    patch_size: Annotated[int, Range(1)] = 1
    has_position_embedding: bool = True
    has_gate: bool = False
    mixer: Annotated[Callable[..., nn.Module], Component("mixer", "s4d")] = S4D
    remat: Annotated[str, Choices(REMAT_POLICIES), CHANGEABLE_ON_RESUME] = "none"
    scan_unroll: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = 1
    dtype: Annotated[str, Choices(("float32", "bfloat16"))] = "float32"

    sizes: ClassVar[Mapping[str, Mapping[str, int]]] = DIFFUSSM_SIZES

    @property
    def sharding_rules(self) -> Rules:
        """The rules of blocks and ends, and those of the mixer inside a block."""
        of_mixer = getattr(self.mixer(parent=None), "sharding_rules", ())
        return (*SHARDING_RULES, *((f"blocks/ssm/.*{pattern}", (None, *axes)) for pattern, axes in of_mixer))

    def check(self, input_shape: tuple[int, int, int]) -> None:
        """Raises ValueError if the sizes do not divide as they must, or an option is unknown."""
        check_options(self, without=("dtype",))  # which may be a dtype as well as its name
        M, P = self.hourglass_ratio, self.patch_size
        if input_shape[0] % P or input_shape[1] % P:
            raise ValueError(f"patch_size P = {P} must divide height and width of the input {input_shape[:2]}")
        H, W = self._grid(input_shape)
        if W % M or 2 * self.width % M:
            raise ValueError(
                f"hourglass_ratio M = {M} must divide the width W = {W} of the latent (so that L = H W = {H * W} is a "
                f"multiple of M) and 2 * width = {2 * self.width}"
            )
        if self.has_position_embedding and self.width % 4:
            raise ValueError(f"width must be a multiple of 4 for the position embedding, got {self.width}")
        if hasattr(mixer := self.mixer(parent=None), "check"):
            mixer.check()

    @nn.compact
    def __call__(
        self, x_t: jax.Array, t: jax.Array, condition: Condition | jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Predicts the target, and the variance if it is learned.

        Args:
          x_t: [B, H, W, C] float.
          t: [B], the time as the model was trained on it.
          condition: a dict of arrays, labels [B] alone, or None for an unconditional model.
          train: has no effect; conditions are dropped before (`Backbone.drop`).

        Raises:
          ValueError: as `check`; or conditions are missing, unknown or of a kind that this backbone cannot use.
        """
        self.check(x_t.shape[1:])
        B, H, W, C = x_t.shape
        M, D, dtype = self.hourglass_ratio, self.width, jnp.dtype(self.dtype)
        P, (h, w) = self.patch_size, self._grid((H, W))
        J = h * w // M
        c = TimeEmbed(D, dtype, name="time_embed")(t)
        x = x_t
        for key, conditioning in self.embed(condition, D, dtype).items():
            if conditioning.tokens is not None:
                raise ValueError(
                    f"DiffuSSM has no attention, and cannot use the tokens of the condition {key!r} (a label has none "
                    "with token_width = 0)"
                )
            if conditioning.vector is not None:
                c = c + conditioning.vector
            if conditioning.channels is not None:
                x = jnp.concatenate([x, conditioning.channels], -1)
        num_inputs = M * P * P * x.shape[-1]
        x = x.reshape(B, h, P, w, P, -1).swapaxes(2, 3).reshape(B, J, num_inputs)
        x = Linear("bjc,cd->bjd", (num_inputs, D), dtype, name="embed")(x)
        if self.has_position_embedding:
            x = x + jnp.asarray(sincos_2d(h, w // M, D), dtype)
        x = self._blocks((h, w), dtype)(replicate_channels(x), c)[0]
        x = AdaLayerNorm(dtype, name="final_norm")(x, c)
        # The last layer is small and its output meets float32 losses: it stays in float32.
        num_outputs = self.num_outputs * C
        options = {"kernel_init": nn.initializers.zeros, "name": "final"}
        x = Linear("bjd,dc->bjc", (D, M * P * P * num_outputs), jnp.float32, **options)(x)
        return x.reshape(B, h, w, P, P, num_outputs).swapaxes(2, 3).reshape(B, H, W, num_outputs)

    def _grid(self, input_shape: tuple[int, ...]) -> tuple[int, int]:
        """(H, W) of the L positions."""
        return input_shape[0] // self.patch_size, input_shape[1] // self.patch_size

    def block(self, input_shape: tuple[int, int, int]) -> tuple[nn.Module, tuple[int, int]]:
        grid = self._grid(input_shape)
        block = Block(self.hourglass_ratio, self.mixer, grid, jnp.dtype(self.dtype), self.has_gate, parent=None)
        return block, (math.prod(grid) // self.hourglass_ratio, self.width)

    def _blocks(self, grid: tuple[int, int], dtype: jnp.dtype) -> nn.Module:
        scanned = scan_blocks(Block, self.depth, remat=self.remat, unroll=self.scan_unroll)
        return scanned(self.hourglass_ratio, self.mixer, grid, dtype, self.has_gate, name="blocks")

    def costs(self, input_shape: tuple[int, int, int], num_images: int = 1) -> Costs:
        """Multiply-adds as the paper and DiT count them: 13 D^2 for each of J tokens and D^2 for each of L positions.

        These are of a mixer with R = 2 outputs for each channel; with R = 1 W_down has half as many.
        """
        D, M, L = self.width, self.hourglass_ratio, math.prod(self._grid(input_shape))
        J, C = L // M, self.patch_size**2 * input_shape[2]
        mixer = self.mixer(parent=None)
        per_token = {"W0": D * D, "W1": 2 * D * D, "W2": 4 * D * D, "W3": 2 * D * D}
        per_token["W_down"] = num_outputs(mixer) * 2 * D * D
        blocks = {name: self.depth * J * count for name, count in per_token.items()}
        blocks["W_up"] = self.depth * L * D * D
        modulation = self.depth * (3 if self.has_gate else 2) * D * D
        multiply_adds = {
            "embed": J * M * C * D,
            **{f"blocks/{name}": count for name, count in blocks.items()},
            "blocks/modulation": modulation,
            "time_embed": NUM_TIME_FEATURES * D + D * D,
            "final": 2 * D * D + J * D * M * self.num_outputs * C,
        }
        # The backward pass does not need the output of W3, unless a gate multiplies it.
        in_block = sum(blocks.values()) - (0 if self.has_gate else blocks["W3"])
        recomputed = {"none": 0, "dots": modulation, "block": modulation + in_block}[self.remat]
        method, of_mixer = "", None
        if hasattr(mixer, "costs"):
            method, of_mixer = mixer.costs(L, D, jnp.dtype(self.dtype).name, num_images)
        of_mixers = None if of_mixer is None else round(self.depth * of_mixer)
        return Costs(self.count_parameters(input_shape), multiply_adds, recomputed, of_mixers, method)
