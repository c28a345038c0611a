"""DINOv2 ViT-L/14 (Oquab et al., arXiv 2304.07193): the features of FD-DINOv2 (Stein et al., arXiv 2306.04675).

Images are prepared as EDM2 does (arXiv 2312.02696): an antialiased bicubic resize to 224 in float32, neither rounded
nor clipped, then ImageNet's mean and deviation. dgm-eval resizes with Pillow, which rounds to uint8; scores differ
little. A feature is the class token after the last LayerNorm.

The table of position embeddings is for 37 x 37 patches. It is resized to 16 x 16 as Meta's code does it: bicubic, not
antialiased, with 0.1 added to the number of patches, so that patch i lies at (i + 1/2) * 37 / 16.1 - 1/2. Recent
versions of transformers leave the 0.1 out, which changes the features.

Weights keep the names of transformers' `Dinov2Model`; blocks are stacked along the first dimension.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from diffussm_jax.evaluation.extractor import FEATURES, Extractor
from diffussm_jax.evaluation.pretrained import Published, Tensors, read_published
from diffussm_jax.evaluation.resize import apply_matrices, interpolating_matrix, resize_bicubic
from diffussm_jax.io import path_of, shapes_by_path

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for values in [0, 1]
IMAGE_SIZE = 224
PATCH = 14
TABLE_SIZE = 37  # patches in each direction of the position embeddings: 518 pixels
_OFFSET = 0.1
_EPSILON = 1e-6  # of LayerNorm
_HIGHEST = jax.lax.Precision.HIGHEST  # by default TPUs multiply in bfloat16 and GPUs in TF32, which moves the distance


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, precision=_HIGHEST, name=name)


def _layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name=name)


class Block(nn.Module):
    """Attention, then an MLP, each with LayerNorm before and a learned gain after: [B, L, D] -> [B, L, D]."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, L, D = x.shape

        def heads(name, h):
            return _dense(D, name)(h).reshape(B, L, self.num_heads, -1)

        h = _layer_norm("norm1")(x)
        q, k, v = (heads(name, h) for name in ("query", "key", "value"))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=_HIGHEST) * q.shape[-1] ** -0.5
        h = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v, precision=_HIGHEST)
        h = _dense(D, "projection")(h.reshape(B, L, D))
        x = x + self.param("gain1", nn.initializers.ones, (D,)) * h
        h = _dense(4 * D, "fc1")(_layer_norm("norm2")(x))
        h = _dense(D, "fc2")(nn.gelu(h, approximate=False))
        return x + self.param("gain2", nn.initializers.ones, (D,)) * h


class DINOv2(nn.Module):
    """The vision transformer: images [B, H, W, 3] uint8 from 0 to 255, of any size -> {"features": [B, D] float32}.

    Attributes:
      width: D. The defaults are those of ViT-L/14: 304,367,616 parameters.
      depth: the number of blocks.
      num_heads: of attention; divides the width.
    """

    width: int = 1024
    depth: int = 24
    num_heads: int = 16

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        x = resize_bicubic(images, IMAGE_SIZE, IMAGE_SIZE) / 255
        x = (x - jnp.array(MEAN)) / jnp.array(DEVIATION)
        patches = nn.Conv(self.width, (PATCH, PATCH), PATCH, "VALID", precision=_HIGHEST, name="patch_embedding")(x)
        B, n, _, D = patches.shape
        class_token = self.param("class_token", nn.initializers.normal(0.02), (D,))
        table = self.param("positions", nn.initializers.normal(0.02), (1 + TABLE_SIZE**2, D))
        first = jnp.broadcast_to(class_token + table[0], (B, 1, D))
        x = jnp.concatenate([first, patches.reshape(B, n * n, D) + resize_positions(table[1:], n)], 1)
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = scan(Block(self.num_heads, name="blocks"), x, None)
        return {FEATURES: _layer_norm("norm")(x[:, 0])}


def resize_positions(table: jax.Array, size: int) -> jax.Array:
    """Resizes a square table of position embeddings [n * n, D] to [size * size, D]."""
    n, D = round(len(table) ** 0.5), table.shape[-1]
    if size == n:
        return table
    matrix = interpolating_matrix(n, size, n / (size + _OFFSET))
    return apply_matrices(table.reshape(1, n, n, D), matrix, matrix).reshape(size * size, D)


def dinov2_extractor(
    path: epath.PathLike | None = None, *, model: DINOv2 | None = None, mesh: Mesh | None = None
) -> Extractor:
    """The extractor of FD-DINOv2, and of precision and recall on the same features.

    Args:
      path: `model.safetensors` of facebook/dinov2-large, or Meta's `dinov2_vitl14_pretrain.pth`. By default the file
        that `convert` wrote.
      model: ViT-L/14 by default.
      mesh: the devices; all if None.

    Raises:
      FileNotFoundError: there is no such file. The message says where to get it.
      ValueError: the file is damaged, or holds another network.
    """
    model = model or DINOv2()
    tensors, sha256 = read_published(published(model), path)
    params = params_of(model, tensors)
    return Extractor(
        "dinov2",
        lambda params, images: model.apply({"params": params}, images),
        params,
        sha256,
        num_channels=3,
        distance="FD-DINOv2",
        mesh=mesh,
    )


# Names of parameters here -> names in transformers.
_NAMES = {
    "class_token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_NAMES_IN_BLOCKS = {
    **{name: f"attention.attention.{name}" for name in ("query", "key", "value")},
    "projection": "attention.output.dense",
    "gain1": "layer_scale1.lambda1",
    "gain2": "layer_scale2.lambda1",
    "norm1": "norm1",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
# Names in Meta's files -> names in transformers. The three parts of attn.qkv are split first.
_META = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(.*)": r"embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\.(.*)": r"encoder.layer.\1.\2.\3",
    r"blocks\.(\d+)\.ls([12])\.gamma": r"encoder.layer.\1.layer_scale\2.lambda1",
    r"blocks\.(\d+)\.attn\.proj\.(.*)": r"encoder.layer.\1.attention.output.dense.\2",
    r"blocks\.(\d+)\.attn\.(query|key|value)\.(.*)": r"encoder.layer.\1.attention.attention.\2.\3",
    r"norm\.(.*)": r"layernorm.\1",
}
_UNUSED = "embeddings.mask_token"  # for training only
_OTHER_WIDTHS = {384: "ViT-S/14", 768: "ViT-B/14", 1536: "ViT-g/14"}


def _torch_name(path: str) -> str:
    """blocks/fc1/kernel -> encoder.layer.{}.mlp.fc1.weight."""
    is_in_block = path.startswith("blocks/")
    module, *leaf = path.removeprefix("blocks/").split("/")
    name = "encoder.layer.{}." + _NAMES_IN_BLOCKS[module] if is_in_block else _NAMES[module]
    return ".".join([name, *("bias" if kind == "bias" else "weight" for kind in leaf)])


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of a parameter, of one block if they are stacked."""
    shape = shape[1:] if path.startswith("blocks/") else shape
    if path in ("class_token", "positions"):
        return (1,) * (3 - len(shape)) + shape
    return {4: (*shape[:1:-1], *shape[:2]), 2: shape[::-1]}.get(len(shape), shape)


def _to_param(path: str, tensor: np.ndarray) -> np.ndarray:
    if path in ("class_token", "positions"):
        return tensor.squeeze(tuple(range(2 if path == "class_token" else 1)))
    return tensor.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim))


def params_of(model: DINOv2, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters, from tensors with the names and shapes of `tensor_shapes`."""

    def param(key_path, leaf):
        path = path_of(key_path)
        name = _torch_name(path)
        if "{}" in name:
            return np.stack([_to_param(path, tensors[name.format(i)]) for i in range(model.depth)])
        return np.ascontiguousarray(_to_param(path, tensors[name]))

    return jax.tree_util.tree_map_with_path(param, _param_shapes(model))


def tensor_shapes(model: DINOv2) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of transformers' `Dinov2Model`, without the mask token."""
    shapes = {}
    for path, shape in shapes_by_path(_param_shapes(model)).items():
        for i in range(model.depth if path.startswith("blocks/") else 1):
            shapes[_torch_name(path).format(i)] = _torch_shape(path, shape)
    return shapes


@functools.cache
def _param_shapes(model: DINOv2) -> Any:
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.uint8)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def _renamed(tensors: Tensors) -> Tensors:
    """Tensors of either layout by the names of transformers, without the mask token."""
    if "pos_embed" in tensors:
        split = {}
        for name, tensor in tensors.items():
            if ".attn.qkv." in name and len(tensor) % 3 == 0:
                parts = zip(("query", "key", "value"), np.split(tensor, 3), strict=True)
                split |= {name.replace("qkv", part): x for part, x in parts}
            else:
                split[name] = tensor
        tensors = {_name_in_transformers(name): tensor for name, tensor in split.items()}
    return {name.removeprefix("dinov2."): tensor for name, tensor in tensors.items() if not name.endswith(_UNUSED)}


def _name_in_transformers(name: str) -> str:
    for pattern, new in _META.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    return name


def _other_network(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What tensors are if they are those of another DINOv2; "" otherwise."""
    if any("register_tokens" in name for name in shapes):
        return "this is a DINOv2 with registers, which has other features"
    width = shapes.get("embeddings.cls_token", (0,))[-1]
    return f"this is DINOv2 {_OTHER_WIDTHS[width]}, not ViT-L/14" if width in _OTHER_WIDTHS else ""


def published(model: DINOv2) -> Published:
    """Where to get the weights of a DINOv2, and what their tensors are."""
    return Published(
        name="dinov2",
        tensor_shapes=functools.partial(tensor_shapes, model),
        renamed=_renamed,
        other_network=_other_network,
        where="model.safetensors of facebook/dinov2-large (1.2 GB): https://huggingface.co/facebook/dinov2-large; or "
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    )


PUBLISHED = published(DINOv2())
