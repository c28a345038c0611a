"""DiT (Peebles & Xie, arXiv 2212.09748): a transformer on the patches of the latent, with four kinds of conditioning.

P x P positions of the latent make one of the J = H W / P^2 tokens. A block, on the embeddings of t and of the
conditions (section 3.2; Norm is LayerNorm, MLP two linear layers with tanh GELU between them):

    adaln_zero       x = x + gate_1 SelfAttention(I),  I = LN(x) (1 + scale_1) + shift_1
                     x = x + gate_2 MLP(I),            I = LN(x) (1 + scale_2) + shift_2
                     scales, shifts and gates come from one linear layer on SiLU(c), c the sum of the embeddings
    adaln            the same without gates
    cross_attention  x = x + SelfAttention(Norm(x)),  x = x + CrossAttention(Norm(x), embeddings),  x = x + MLP(Norm(x))
    in_context       x = x + SelfAttention(Norm(x)),  x = x + MLP(Norm(x)),  with the embeddings as further tokens of x

LN has no parameters, Norm has its own. DiT's code has adaln_zero alone. Ours, where the paper is silent: the layer of
adaln starts at zero, further tokens have no position, a condition that is a sequence of tokens (text) joins the
embeddings of cross_attention and in_context. Normalised queries and keys (RMSNorm of each head, as Stable Diffusion 3,
arXiv 2403.03206) and registers (learned tokens, arXiv 2309.16588) are options that the paper does not have.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from diffussm_jax.layers import (
    ATTENTION,
    NUM_TIME_FEATURES,
    QUERY_CHUNK,
    AdaLayerNorm,
    Linear,
    TimeEmbed,
    attend,
    gelu,
    sincos_2d,
)
from diffussm_jax.models import dit_convert
from diffussm_jax.models.backbone import REMAT_POLICIES, Backbone, Condition, Costs, scan_blocks
from diffussm_jax.models.conditioners import Conditioning
from diffussm_jax.options import CHANGEABLE_ON_RESUME, Choices, Range, check_options
from diffussm_jax.parallel.sharding import Rules, replicate_channels, split_channels

# The conditionings, and the modulations that each residual branch takes from c: shift, scale and gate.
CONDITIONINGS: Mapping[str, int] = MappingProxyType(
    {"adaln_zero": dit_convert.NUM_MODULATIONS, "adaln": 2, "cross_attention": 0, "in_context": 0}
)
_SIZES = {
    "S": {"width": 384, "depth": 12, "num_heads": 6},
    "B": {"width": 768, "depth": 12, "num_heads": 12},
    "L": {"width": 1024, "depth": 24, "num_heads": 16},
    "XL": {"width": 1152, "depth": 28, "num_heads": 16},
}
# The paper has patches of 2, 4 and 8; with 1 a token is a position of the latent.
DIT_SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {f"{name}/{P}": {**size, "patch_size": P} for name, size in _SIZES.items() for P in (1, 2, 4, 8)}
)
# How parameters are laid over the mesh (`parallel.sharding`). Heads and the hidden channels of the MLP are split along
# `tensor`: attention does not communicate, proj and fc2 sum their outputs. `fsdp` splits a dimension that is free.
SHARDING_RULES: Rules = (
    (r"blocks/\w+_attention/(qkv|q|kv)/kernel$", (None, "fsdp", None, "tensor")),
    (r"blocks/fc1/kernel$", (None, "fsdp", "tensor")),
    (r"blocks/(\w+_attention/proj|fc2)/kernel$", (None, "tensor", "fsdp")),
    (r"blocks/\w+_attention/(qkv|q|kv)/bias$", (None, None, "tensor")),
    (r"blocks/fc1/bias$", (None, "tensor")),
    (r"blocks/modulation/kernel$", (None, None, None, "fsdp")),
    (r"(final_norm/modulation|time_embed/out)/kernel$", (None, "fsdp")),
)


def _xavier(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> nn.initializers.Initializer:
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", inputs, outputs)


def _keep(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, "dense")


def _layer_norm(name: str | None = None) -> nn.LayerNorm:
    """LayerNorm in float32, with parameters if it has a name."""
    has_params = name is not None
    return nn.LayerNorm(epsilon=1e-6, use_bias=has_params, use_scale=has_params, dtype=jnp.float32, name=name)


class Attention(nn.Module):
    """Multi-head attention of x [B, J, D] to itself, or to a context [B, S, D] -> [B, J, D].

    Attributes:
      num_heads: divides D.
      has_qk_norm: see `DiT`.
      attention: see `DiT`.
      dtype: of the linear layers.
    """

    num_heads: int
    has_qk_norm: bool
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        D = x.shape[-1]

        def dense(x, count, name):  # `count` layers in one, each output on its own: [count, B, J, D]
            options = {"kernel_init": _xavier((0,), (1, 2)), "name": name}
            y = Linear("bjd,dke->kbje", (D, count, D), self.dtype, **options)(x)
            return _keep(split_channels(y, batch=1))

        def heads(x, norm):
            x = x.reshape(*x.shape[:2], self.num_heads, -1)
            if norm and self.has_qk_norm:
                x = nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=norm)(x).astype(self.dtype)
            return split_channels(x, channels=2)

        if context is None:
            q, k, v = dense(x, 3, "qkv")
        else:
            (q,), (k, v) = dense(x, 1, "q"), dense(context, 2, "kv")
        y = attend(heads(q, "q_norm"), heads(k, "k_norm"), heads(v, None), self.attention)
        y = _keep(split_channels(y.reshape(x.shape)))
        return _keep(replicate_channels(Linear("bjd,de->bje", (D, D), self.dtype, name="proj")(y)))


class Block(nn.Module):
    """One transformer block: x [B, J, D], c -> (x [B, J, D], None), as `nn.scan` takes it.

    c is [B, D] with adaln_zero and adaln; with cross_attention a sequence [B, S, D], or [B, D] for one of length 1.

    Attributes:
      num_heads: divides D.
      num_hidden: channels between the layers of the MLP.
      conditioning: see `DiT`, and so are the others.
      dtype: of the linear layers and the residual stream.
    """

    num_heads: int
    num_hidden: int
    conditioning: str
    has_qk_norm: bool
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> tuple[jax.Array, None]:
        D, dtype, num_modulations = x.shape[-1], self.dtype, CONDITIONINGS[self.conditioning]
        of_attention = (self.num_heads, self.has_qk_norm, self.attention, dtype)
        branches = [()] * 2  # the modulations of self-attention and of the MLP, [B, 1, D] each
        if num_modulations:
            shape = (D, 2 * num_modulations, D)
            options = {"kernel_init": nn.initializers.zeros, "is_gathered": True, "name": "modulation"}
            modulation = Linear("bd,dke->bke", shape, dtype, **options)(nn.silu(c))
            modulation = jnp.split(_keep(replicate_channels(modulation)), 2 * num_modulations, 1)
            branches = [modulation[:num_modulations], modulation[num_modulations:]]

        def norm(x, name, shift=None, scale=None, gate=None):
            x = _layer_norm(name)(x) if shift is None else _layer_norm()(x) * (1 + scale) + shift
            return replicate_channels(x.astype(dtype))

        def add(x, y, shift=None, scale=None, gate=None):
            return replicate_channels(x + (y if gate is None else gate * y))

        attention = Attention(*of_attention, name="self_attention")
        x = add(x, attention(norm(x, "norm1", *branches[0])), *branches[0])
        if self.conditioning == "cross_attention":
            attention = Attention(*of_attention, name="cross_attention")
            x = add(x, attention(norm(x, "cross_norm"), c if c.ndim == 3 else c[:, None]))
        fc1 = Linear("bjd,de->bje", (D, self.num_hidden), dtype, name="fc1")
        fc2 = Linear("bjd,de->bje", (self.num_hidden, D), dtype, name="fc2")
        hidden = gelu(_keep(split_channels(fc1(norm(x, "norm2", *branches[1])))))
        return add(x, _keep(replicate_channels(fc2(hidden))), *branches[1]), None


class DiT(Backbone):
    """The DiT backbone: (x_t [B, H, W, C], t [B], condition) -> [B, H, W, num_outputs * C] float32.

    Attributes:
      width: D, a multiple of num_heads, and of 4 if there is a position embedding.
      depth: number of blocks.
      num_heads: of attention.
      patch_size: P; divides H and W.
      mlp_ratio: hidden channels of the MLP for each of D.
      conditioning: how t and the conditions reach the blocks: "adaln_zero", "adaln", "cross_attention" or "in_context".
      has_position_embedding: whether to add a fixed 2-D sin-cos embedding.
      has_qk_norm: whether queries and keys have an RMSNorm each, over the channels of a head.
      num_registers: learned tokens beside those of the patches.
      attention: how attention is computed (`layers.attend`).
      remat: activations saved for the backward pass: "none" saves all, "dots" each block's input and the outputs of its
        linear layers and of attention, "block" each block's input.
      scan_unroll: blocks in each iteration of the scan over depth.
      dtype: of the linear layers and the residual stream; parameters, norms and softmax are float32.
    """

    width: Annotated[int, Range(1)] = 384
    depth: Annotated[int, Range(1)] = 12
    num_heads: Annotated[int, Range(1)] = 6
    patch_size: Annotated[int, Range(1)] = 2
    mlp_ratio: Annotated[float, Range(0)] = 4.0
    conditioning: Annotated[str, Choices(CONDITIONINGS)] = "adaln_zero"
    has_position_embedding: bool = True
    has_qk_norm: bool = False
    num_registers: Annotated[int, Range(0)] = 0
    attention: Annotated[str, Choices(ATTENTION), CHANGEABLE_ON_RESUME] = "auto"
    remat: Annotated[str, Choices(REMAT_POLICIES), CHANGEABLE_ON_RESUME] = "none"
    scan_unroll: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = 1
    dtype: Annotated[str, Choices(("float32", "bfloat16"))] = "float32"

    sharding_rules: ClassVar[Rules] = SHARDING_RULES
    sizes: ClassVar[Mapping[str, Mapping[str, int]]] = DIT_SIZES

    def check(self, input_shape: tuple[int, int, int]) -> None:
        """Raises ValueError if the sizes do not divide as they must, or an option is unknown."""
        check_options(self, without=("dtype",))  # which may be a dtype as well as its name
        H, W, _ = input_shape
        D, P, num_heads = self.width, self.patch_size, self.num_heads
        if H % P or W % P:
            raise ValueError(f"patch_size P = {P} must divide the height H = {H} and the width W = {W} of the latent")
        if D % num_heads:
            raise ValueError(f"width must be a multiple of num_heads = {num_heads}, got {D}")
        if self.has_position_embedding and D % 4:
            raise ValueError(f"width must be a multiple of 4 for the position embedding, got {D}")
        if D * self.mlp_ratio != self._num_hidden or self._num_hidden < 1:
            raise ValueError(f"mlp_ratio must give a whole number of channels, got {self.mlp_ratio} * width = {D}")
        num_devices = dict(jax.sharding.get_abstract_mesh().shape).get("tensor", 1)
        if num_heads % num_devices:
            raise ValueError(
                f"num_heads = {num_heads} is not a multiple of the {num_devices} devices along tensor; choose a "
                "smaller config.mesh.tensor"
            )

    @property
    def _num_hidden(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def _has_modulation(self) -> bool:
        return CONDITIONINGS[self.conditioning] > 0

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
          ValueError: as `check`; or conditions are missing or unknown, or are tokens, which adaln cannot use.
        """
        self.check(x_t.shape[1:])
        (B, H, W, C), P, D, dtype = x_t.shape, self.patch_size, self.width, jnp.dtype(self.dtype)
        h, w = H // P, W // P
        conditionings = self.embed(condition, D, dtype)
        c = self._conditioning(TimeEmbed(D, dtype, name="time_embed")(t), conditionings)
        x = jnp.concatenate(
            [x_t, *(given.channels for given in conditionings.values() if given.channels is not None)], -1
        )
        x = x.reshape(B, h, P, w, P, -1)
        options = {"kernel_init": _xavier((0, 1, 2), (3,)), "name": "embed"}
        x = Linear("bhpwqc,pqcd->bhwd", (P, P, x.shape[-1], D), dtype, **options)(x).reshape(B, h * w, D)
        if self.has_position_embedding:
            x = x + jnp.asarray(sincos_2d(h, w, D), dtype)
        more = [c] if self.conditioning == "in_context" else []
        if self.num_registers:
            registers = self.param("registers", nn.initializers.normal(0.02), (self.num_registers, D))
            more.append(jnp.broadcast_to(registers.astype(dtype), (B, *registers.shape)))
        x = replicate_channels(jnp.concatenate([x, *more], 1))
        scanned = scan_blocks(Block, self.depth, remat=self.remat, unroll=self.scan_unroll)
        x = scanned(**self._of_block, name="blocks")(x, c)[0][:, : h * w]
        x = AdaLayerNorm(dtype, name="final_norm")(x, c) if self._has_modulation else _layer_norm("final_norm")(x)
        # The last layer is small and its output meets float32 losses: it stays in float32.
        num_outputs = self.num_outputs * C
        options = {"kernel_init": nn.initializers.zeros, "name": "final"}
        final = Linear("bhwd,dpqc->bhpwqc", (D, P, P, num_outputs), jnp.float32, **options)
        return final(x.reshape(B, h, w, D)).reshape(B, H, W, num_outputs)

    def _conditioning(self, time: jax.Array, conditionings: Mapping[str, Conditioning]) -> jax.Array:
        """c, as blocks take it: the sum [B, D] of the embeddings, or their sequence [B, S, D]."""
        vectors = [time, *(given.vector for given in conditionings.values() if given.vector is not None)]
        tokens = {key: given.tokens for key, given in conditionings.items() if given.tokens is not None}
        for key, sequence in tokens.items():
            if self._has_modulation:
                raise ValueError(
                    f"DiT with conditioning = {self.conditioning!r} cannot use the tokens of the condition {key!r}; "
                    "choose cross_attention or in_context"
                )
            if sequence.shape[-1] != self.width:
                raise ValueError(
                    f"tokens of the condition {key!r} must have the model's width = {self.width}, got "
                    f"{sequence.shape[-1]}"
                )
        if not self._has_modulation:
            return jnp.concatenate([jnp.stack(vectors, 1), *tokens.values()], 1)
        return sum(vectors)

    @property
    def _of_block(self) -> dict:
        return {
            "num_heads": self.num_heads,
            "num_hidden": self._num_hidden,
            "conditioning": self.conditioning,
            "has_qk_norm": self.has_qk_norm,
            "attention": self.attention,
            "dtype": jnp.dtype(self.dtype),
        }

    def block(self, input_shape: tuple[int, int, int]) -> tuple[nn.Module, tuple[int, int]]:
        H, W, _ = input_shape
        return Block(**self._of_block, parent=None), (H * W // self.patch_size**2, self.width)

    def from_pytorch(self, state_dict: Mapping[str, np.ndarray]) -> dict:
        return dit_convert.from_pytorch(state_dict)

    def to_pytorch(self, params: dict, input_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
        return dit_convert.to_pytorch(params, latent_size=input_shape[:2])

    def costs(self, input_shape: tuple[int, int, int], num_images: int = 1) -> Costs:
        """Multiply-adds as the paper counts them: matrix products, those of attention among them, and residual sums.

        The sums x + y are 0.01 % and no matrix products, but with them all figures that the paper prints are met.
        """
        H, W, C = input_shape
        D, P, depth, hidden = self.width, self.patch_size, self.depth, self._num_hidden
        J, num_modulations = H * W // P**2, CONDITIONINGS[self.conditioning]
        S, num_channels = self._count_conditions()
        L = J + self.num_registers + (S if self.conditioning == "in_context" else 0)
        block = {
            "self_attention/qkv": 3 * L * D * D,
            "self_attention": 2 * L * L * D,
            "self_attention/proj": L * D * D,
            "fc1": L * D * hidden,
            "fc2": L * D * hidden,
        }
        if num_modulations:
            block["modulation"] = 2 * num_modulations * D * D
        if self.conditioning == "cross_attention":
            of_cross = {"/q": L * D * D, "/kv": 2 * S * D * D, "": 2 * L * S * D, "/proj": L * D * D}
            block |= {f"cross_attention{name}": count for name, count in of_cross.items()}
        multiply_adds = {
            "embed": J * P**2 * (C + num_channels) * D,
            "time_embed/hidden": NUM_TIME_FEATURES * D,
            "time_embed/out": D * D,
            **{f"blocks/{name}": depth * count for name, count in block.items()},
            "blocks/residual_sums": depth * (3 if self.conditioning == "cross_attention" else 2) * L * D,
            "final_norm/modulation": 2 * D * D if num_modulations else 0,
            "final": J * D * P**2 * self.num_outputs * C,
        }
        logits = (block["self_attention"] + block.get("cross_attention", 0)) // 2
        in_block = sum(block.values()) - (0 if num_modulations == 3 else block["fc2"])
        recomputed = {"none": 0, "dots": logits, "block": in_block}[self.remat]
        is_blockwise = self.attention == "blockwise" or (self.attention == "auto" and L > QUERY_CHUNK)
        if is_blockwise and self.remat != "dots":  # `attend` computes its logits again by itself
            recomputed += logits
        return Costs(self.count_parameters(input_shape), multiply_adds, depth * recomputed)

    def _count_conditions(self) -> tuple[int, int]:
        """S, the embeddings and tokens of t and all conditions, and the channels that they add to the input."""
        num_tokens, num_channels = 1, 0
        for make in self.conditioners.values():
            conditioner = make(width=self.width, dtype=jnp.float32, parent=None)
            example = conditioner.example(1)
            given, _ = jax.eval_shape(lambda c=conditioner, x=example: c.init_with_output(jax.random.key(0), x))
            num_tokens += (given.vector is not None) + (0 if given.tokens is None else given.tokens.shape[1])
            num_channels += 0 if given.channels is None else given.channels.shape[-1]
        return num_tokens, num_channels
