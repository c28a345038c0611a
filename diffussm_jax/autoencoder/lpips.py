"""LPIPS 0.1 on VGG16: a perceptual distance between images (Zhang et al., arXiv 1801.03924).

    x, y [B, H, W, 3] in [-1, 1]  ->  (x - shift) / scale  ->  VGG16  ->  relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    u = f / sqrt(|f|^2 + epsilon)                      for each position of each of these maps f, over channels
    d = sum over maps  mean over positions  sum over channels  head (u_x - u_y)^2                  head >= 0

The original divides by |f| + 1e-10, whose gradient is 0 / 0 where all channels are zero. With epsilon inside the root,
as in torchmetrics, no derivative of u is larger than epsilon^(-1/2) = 1e4. It makes u shorter by the fraction
epsilon / (2 |f|^2): less than float32 can show where |f| > 0.3, and 5e-5 where |f| = 0.01.

`feature_distance` serves other networks too. A distance in their features is not called LPIPS.

TPUs and recent GPUs compute float32 products at lower precision by default. That is fine for training. Set
`jax.default_matmul_precision("float32")` for distances that are reported.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diffussm_jax.io import cache_folder, file_sha256, path_of, shapes_by_path, weights_hash
from diffussm_jax.layers import conv
from diffussm_jax.tensor_files import Published, Tensors, convert_weights, read_weights

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
WIDTHS, NUM_CONVS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)  # of each resolution
MIN_SIZE = 2 ** (len(WIDTHS) - 1)  # pixels
EPSILON = 1e-8


class Perceptual(NamedTuple):
    """A perceptual distance between images.

    Attributes:
      name: such as "LPIPS".
      params: of its network. Pass them to jitted functions as an argument: constants would be part of the program.
      distance: (params, x, y [B, H, W, C] in [-1, 1]) -> [B] float32.
      sha256: of the params.
    """

    name: str
    params: Any
    distance: Callable[[Any, jax.Array, jax.Array], jax.Array]
    sha256: str


def feature_distance(
    features_x: Sequence[jax.Array], features_y: Sequence[jax.Array], heads: Sequence[jax.Array] | None = None
) -> jax.Array:
    """The distance between two batches of images by their feature maps, as LPIPS measures it.

    Args:
      features_x: maps [B, h, w, C] of one or more layers, float. Sizes may differ between layers.
      features_y: maps of the same shapes.
      heads: the weights [C] of the channels of each layer. If None, the mean over channels is taken.

    Returns:
      [B] float32.
    """
    total = jnp.zeros(len(features_x[0]))
    heads = heads if heads is not None else [1 / f.shape[-1] for f in features_x]
    for f_x, f_y, head in zip(features_x, features_y, heads, strict=True):
        total += jnp.sum(head * jnp.square(_unit(f_x) - _unit(f_y)), -1).mean((1, 2))
    return total


def _unit(f: jax.Array) -> jax.Array:
    f = f.astype(jnp.float32)
    return f * jax.lax.rsqrt(jnp.sum(jnp.square(f), -1, keepdims=True) + EPSILON)


class VGG16(nn.Module):
    """VGG16's convolutions (Simonyan and Zisserman, arXiv 1409.1556): images -> the last map of each resolution."""

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        maps = []
        for i, (width, num_convs) in enumerate(zip(WIDTHS, NUM_CONVS, strict=True), 1):
            x = nn.max_pool(x, (2, 2), (2, 2)) if i > 1 else x
            for j in range(1, num_convs + 1):
                x = nn.relu(conv(width, 3, jnp.float32, f"conv{i}_{j}")(x))
            maps.append(x)
        return maps


class LPIPS(nn.Module):
    """LPIPS: two batches of images [B, H, W, 3] float in [-1, 1], of at least 16 x 16 pixels -> [B] float32."""

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < MIN_SIZE:
            raise ValueError(
                f"LPIPS takes two batches [B, H, W, 3] of one size, at least {MIN_SIZE} x {MIN_SIZE} pixels, got "
                f"{list(x.shape)} and {list(y.shape)}"
            )
        vgg = VGG16(name="vgg16")
        heads = [self.param(f"head{i}", nn.initializers.uniform(1.0), (width,)) for i, width in enumerate(WIDTHS)]
        # One after the other, so that training, which has no use for the gradient of x, does not compute it.
        maps_x, maps_y = (vgg((z.astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)) for z in (x, y))
        return feature_distance(maps_x, maps_y, heads)


def read_lpips(vgg_file: epath.PathLike, heads_file: epath.PathLike, cache: epath.PathLike | None = None) -> Perceptual:
    """LPIPS with published weights.

    Files of other formats are converted to safetensors in the cache, under the first digits of their SHA-256. From then
    on PyTorch is not needed, neither with them nor with the converted files in their place.

    Args:
      vgg_file: torchvision's `vgg16-397923af.pth`. Its classifier is not used.
      heads_file: `vgg.pth` of LPIPS 0.1.
      cache: folder of converted files; `weights` in `io.cache_folder` by default.

    Raises:
      FileNotFoundError: there is no such file. The message says where to get it.
      ValueError: a file is damaged, needs PyTorch, or holds another network, such as LPIPS's heads of AlexNet.
    """
    cache = epath.Path(cache or cache_folder() / "weights")
    (backbone, _), (heads, sha256) = _read(VGG, vgg_file, cache), _read(HEADS, heads_file, cache)
    if sha256 == _HEADS_OF_0_0:
        raise ValueError(f"{heads_file} holds the heads of LPIPS 0.0, which did not scale its input. Get {HEADS.where}")
    if (lowest := min(head.min() for head in heads.values())) < 0:
        raise ValueError(f"{heads_file} holds a weight of {lowest:g}; no head of LPIPS is negative")
    params = params_of(backbone | heads)
    return Perceptual("LPIPS", jax.tree.map(jnp.asarray, params), lpips_distance, weights_hash(params))


def lpips_distance(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """LPIPS with these parameters."""
    return LPIPS().apply({"params": params}, x, y)


def _read(network: Published, file: epath.PathLike, cache: epath.Path) -> tuple[Tensors, str]:
    file = epath.Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}. Get {network.where}")
    if file.suffix != ".safetensors":
        converted = cache / f"{network.name}_{file_sha256(file)[:16]}.safetensors"
        if not converted.exists():
            convert_weights(network, file, converted)
        file = converted
    return read_weights(network, file)


def params_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of `LPIPS`, from the tensors of both files by their names."""

    def param(key_path, leaf):
        tensor = tensors[_torch_name(path_of(key_path))]
        return np.ascontiguousarray(tensor.transpose(2, 3, 1, 0) if leaf.ndim == 4 else tensor.reshape(leaf.shape))

    return jax.tree_util.tree_map_with_path(param, param_shapes())


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of both files, without VGG16's classifier."""
    shapes = {}
    for path, shape in shapes_by_path(param_shapes()).items():
        is_head = path.startswith("head")
        torch_shape = (1, *shape, 1, 1) if is_head else (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape
        shapes[_torch_name(path)] = torch_shape
    return shapes


def _torch_name(path: str) -> str:
    """vgg16/conv2_1/kernel -> features.5.weight, where ReLUs and pools count; head0 -> lin0.model.1.weight."""
    if path.startswith("head"):
        return f"lin{path[-1]}.model.1.weight"
    _, name, kind = path.split("/")
    i, j = int(name[4]), int(name[6])
    index = sum(2 * num_convs + 1 for num_convs in NUM_CONVS[: i - 1]) + 2 * (j - 1)
    return f"features.{index}.{'bias' if kind == 'bias' else 'weight'}"


@functools.cache
def param_shapes() -> Any:
    """Shapes and dtypes of LPIPS's parameters."""
    image = jax.ShapeDtypeStruct((1, MIN_SIZE, MIN_SIZE, 3), jnp.float32)
    return jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]


def _shapes_in(file: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in tensor_shapes().items() if name.startswith(file)}


def _other_network(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What tensors are if they are those of another well-known network, or LPIPS's heads of it; "" otherwise."""
    kernels = [shape for shape in shapes.values() if len(shape) == 4]
    widths = tuple(sorted(shape[0] if shape[0] > 1 else shape[1] for shape in kernels))
    name = "SqueezeNet" if any(".squeeze." in name for name in shapes) else _NETWORKS.get(widths)
    if any(name.endswith(".running_mean") for name in shapes):
        name = "a network with BatchNorm"
    return f"it has the shapes of {name}" if name else ""


_NETWORKS = {  # by the widths of their convolutions or heads, sorted
    (64, 192, 256, 256, 384): "AlexNet",
    (64, 128, 256, 384, 384, 512, 512): "SqueezeNet",
    (64, 128, 256, 256, *[512] * 4): "VGG11",
    (64, 64, 128, 128, 256, 256, *[512] * 4): "VGG13",
    (64, 64, 128, 128, *[256] * 4, *[512] * 8): "VGG19",
}
_HEADS_OF_0_0 = "069ad4541f2feeffbdb99cebdd98f22d3cadaa8117c527329c047dfa5a11a76e"  # of LPIPS's v0.0/vgg.pth

VGG = Published(
    name="vgg16",
    tensor_shapes=functools.partial(_shapes_in, "features"),
    renamed=lambda tensors: {name: x for name, x in tensors.items() if not name.startswith("classifier.")},
    other_network=_other_network,
    where="vgg16-397923af.pth of torchvision (528 MB): https://download.pytorch.org/models/vgg16-397923af.pth",
)
HEADS = Published(
    name="lpips_vgg16",
    tensor_shapes=functools.partial(_shapes_in, "lin"),
    other_network=_other_network,
    where="vgg.pth of LPIPS 0.1 (7 KB): https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/"
    "v0.1/vgg.pth; the package `lpips` holds it too",
)
