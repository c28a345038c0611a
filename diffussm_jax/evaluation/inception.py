"""The Inception of FID: the network of TensorFlow's graph `inception-2015-12-05`, with the weights of pytorch-fid.

It is Inception v3 (Szegedy et al., arXiv 1512.00567) with 1008 classes, and not torchvision's: average pools do not
count padding, and the last block has a max pool in its pool branch. Everything from the resize to the softmax follows
what `guided-diffusion` evaluates, so that FID, sFID and the Inception Score are those of papers:

    images uint8 -> TensorFlow 1's bilinear resize to 299 -> (x - 128) / 128 -> blocks -> mean over 8 x 8: 2048 features
    sFID: Mixed_6d.branch1x1 after BatchNorm and ReLU (the graph's mixed_6/conv:0), channels 0 ... 6: 17 x 17 x 7
    Inception Score: softmax(features @ W), without the bias

BatchNorm is folded into the convolutions, in float64, when weights are read.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from diffussm_jax.evaluation.extractor import FEATURES, PROBABILITIES, SPATIAL, Extractor
from diffussm_jax.evaluation.pretrained import Published, read_published
from diffussm_jax.evaluation.resize import resize_tf1_bilinear
from diffussm_jax.io import path_of, shapes_by_path

NUM_FEATURES, NUM_CLASSES = 2048, 1008
IMAGE_SIZE = 299
NUM_SPATIAL_CHANNELS = 7
_EPSILON = 1e-3  # of BatchNorm
_HIGHEST = jax.lax.Precision.HIGHEST  # by default TPUs multiply in bfloat16 and GPUs in TF32, which moves FID

Size = int | tuple[int, int]


class Conv(nn.Module):
    """Convolution with the folded BatchNorm, then ReLU: [B, H, W, C] -> [B, H', W', features]."""

    features: int
    size: Size = 1
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        kernel_shape = (*size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), kernel_shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        strides, layout = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, strides, self.padding, dimension_numbers=layout, precision=_HIGHEST)
        return nn.relu(x + bias)


class Block(nn.Module):
    """Convolutions in branches, concatenated: the common part of the blocks below."""

    def chain(self, x: jax.Array, branch: str, *layers: tuple[int, Size], reduces: bool = False) -> jax.Array:
        """Convolutions named branch_1, branch_2, ... of (features, size); the last halves the image if it `reduces`."""
        for i, (features, size) in enumerate(layers, 1):
            name = branch if len(layers) == 1 else f"{branch}_{i}"
            last = {"stride": 2, "padding": "VALID"} if reduces and i == len(layers) else {}
            x = Conv(features, size, **last, name=name)(x)
        return x


class BlockA(Block):
    """Mixed_5b ... 5d: 35 x 35."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branches = [
            self.chain(x, "branch1x1", (64, 1)),
            self.chain(x, "branch5x5", (48, 1), (64, 5)),
            self.chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            self.chain(average_pool(x), "branch_pool", (self.pool_features, 1)),
        ]
        return jnp.concatenate(branches, -1)


class BlockB(Block):
    """Mixed_6a: 35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branches = [
            self.chain(x, "branch3x3", (384, 3), reduces=True),
            self.chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3), reduces=True),
            max_pool(x, stride=2),
        ]
        return jnp.concatenate(branches, -1)


class BlockC(Block):
    """Mixed_6b ... 6e: 17 x 17."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        C, wide, high = self.features, (1, 7), (7, 1)
        branches = [
            self.chain(x, "branch1x1", (192, 1)),
            self.chain(x, "branch7x7", (C, 1), (C, wide), (192, high)),
            self.chain(x, "branch7x7dbl", (C, 1), (C, high), (C, wide), (C, high), (192, wide)),
            self.chain(average_pool(x), "branch_pool", (192, 1)),
        ]
        return jnp.concatenate(branches, -1)


class BlockD(Block):
    """Mixed_7a: 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branches = [
            self.chain(x, "branch3x3", (192, 1), (320, 3), reduces=True),
            self.chain(x, "branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3), reduces=True),
            max_pool(x, stride=2),
        ]
        return jnp.concatenate(branches, -1)


class BlockE(Block):
    """Mixed_7b and 7c: 8 x 8."""

    has_max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def both(x, branch):
            return [Conv(384, (1, 3), name=f"{branch}a")(x), Conv(384, (3, 1), name=f"{branch}b")(x)]

        short = Conv(384, name="branch3x3_1")(x)
        long = self.chain(x, "branch3x3dbl", (448, 1), (384, 3))
        pooled = max_pool(x, stride=1, padding="SAME") if self.has_max_pool else average_pool(x)
        branches = [
            self.chain(x, "branch1x1", (320, 1)),
            *both(short, "branch3x3_2"),
            *both(long, "branch3x3dbl_3"),
            self.chain(pooled, "branch_pool", (192, 1)),
        ]
        return jnp.concatenate(branches, -1)


def average_pool(x: jax.Array) -> jax.Array:
    """The mean over 3 x 3 positions, or over those of them that are in the image, as in TensorFlow."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def max_pool(x: jax.Array, *, stride: int, padding: str = "VALID") -> jax.Array:
    """The largest of 3 x 3 positions."""
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


class Inception(nn.Module):
    """The FID Inception: images [B, H, W, 3] uint8 from 0 to 255, of any size -> dict of float32.

    It returns "features" [B, 2048], "spatial" [B, 2023] in the order of NHWC, and "probabilities" [B, 1008].
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        x = resize_tf1_bilinear(images, IMAGE_SIZE, IMAGE_SIZE)
        x = (x - 128) / 128
        x = Conv(32, 3, 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Conv(32, 3, 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = Conv(64, 3, name="Conv2d_2b_3x3")(x)
        x = max_pool(x, stride=2)
        x = Conv(80, 1, name="Conv2d_3b_1x1")(x)
        x = Conv(192, 3, 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = max_pool(x, stride=2)
        for letter, pool_features in zip("bcd", (32, 64, 64), strict=True):
            x = BlockA(pool_features, name=f"Mixed_5{letter}")(x)
        x = BlockB(name="Mixed_6a")(x)
        for letter, features in zip("bcde", (128, 160, 160, 192), strict=True):
            x = BlockC(features, name=f"Mixed_6{letter}")(x)
            if letter == "d":
                spatial = x[..., :NUM_SPATIAL_CHANNELS]  # branch1x1 comes first
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(False, name="Mixed_7b")(x)
        x = BlockE(True, name="Mixed_7c")(x)
        features = x.mean((1, 2))
        logits = nn.Dense(NUM_CLASSES, use_bias=False, precision=_HIGHEST, name="fc")(features)
        return {
            FEATURES: features,
            SPATIAL: spatial.reshape(len(spatial), -1),
            PROBABILITIES: nn.softmax(logits),
        }


def inception_extractor(path: epath.PathLike | None = None, *, mesh: Mesh | None = None) -> Extractor:
    """The extractor of FID, sFID, the Inception Score, and precision and recall.

    Args:
      path: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, or the same tensors as .safetensors or .npz. By
        default the file that `convert` wrote.
      mesh: the devices; all if None.

    Raises:
      FileNotFoundError: there is no such file. The message says where to get it.
      ValueError: the file is damaged, or holds another network.
    """
    tensors, sha256 = read_published(PUBLISHED, path)
    return Extractor("inception", _apply, params_of(tensors), sha256, num_channels=3, distance="FID", mesh=mesh)


def _apply(params: Any, images: jax.Array) -> dict[str, jax.Array]:
    return Inception().apply({"params": params}, images)


def params_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters, from tensors with the names and shapes of `tensor_shapes`; BatchNorm is folded in float64."""

    def param(key_path, leaf):
        *modules, kind = path_of(key_path).split("/")
        name = ".".join(modules)
        if name == "fc":
            return np.ascontiguousarray(tensors["fc.weight"].T)
        norm = {key: tensors[f"{name}.bn.{key}"].astype(np.float64) for key in _NORM}
        gain = norm["weight"] / np.sqrt(norm["running_var"] + _EPSILON)
        if kind == "bias":
            return (norm["bias"] - norm["running_mean"] * gain).astype(np.float32)
        kernel = tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * gain
        return np.ascontiguousarray(kernel, np.float32)

    return jax.tree_util.tree_map_with_path(param, _param_shapes())


_NORM = ("weight", "bias", "running_mean", "running_var")


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in pytorch-fid's file."""
    shapes = {"fc.weight": (NUM_CLASSES, NUM_FEATURES), "fc.bias": (NUM_CLASSES,)}
    for path, shape in shapes_by_path(_param_shapes()).items():
        *modules, kind = path.split("/")
        name = ".".join(modules)
        if kind == "kernel" and name != "fc":
            shapes[f"{name}.conv.weight"] = (*shape[:1:-1], *shape[:2])
            shapes |= {f"{name}.bn.{key}": shape[-1:] for key in _NORM}
    return shapes


@functools.cache
def _param_shapes() -> Any:
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.uint8)
    return jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]


def _other_network(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What tensors are if they are those of another well-known Inception; "" otherwise."""
    is_torchvision = any(name.startswith("AuxLogits.") for name in shapes) or shapes.get("fc.bias") == (1000,)
    return "these are torchvision's Inception v3 with 1000 classes; FID has another network" if is_torchvision else ""


PUBLISHED = Published(
    name="inception",
    tensor_shapes=tensor_shapes,
    other_network=_other_network,
    where="pt_inception-2015-12-05-6726825d.pth of pytorch-fid (91 MB): https://github.com/mseitzer/pytorch-fid/"
    "releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth; pytorch-fid itself keeps it in "
    "~/.cache/torch/hub/checkpoints",
)
