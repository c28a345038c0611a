"""Image resizing as the networks behind published scores do it.

Each is a pair of matrices, one for the rows and one for the columns, made in float64 on the host, except TensorFlow 1's
bilinear resize, whose float32 arithmetic is followed step by step.
"""

import jax
import jax.numpy as jnp
import numpy as np

PILLOW_CUBIC = -0.5  # Keys' a in Pillow, in jax.image and in PyTorch's antialiased bicubic
PYTORCH_CUBIC = -0.75  # in PyTorch's bicubic without antialiasing and in OpenCV


def resize_tf1_bilinear(images: jax.Array, height: int, width: int) -> jax.Array:
    """TensorFlow 1's `ResizeBilinear` with align_corners=False: output i samples the input at i * (input / output).

    Corners are not aligned and pixel centres are not half a pixel in, so images shift; nothing is antialiased.

    Args:
      images: [B, H, W, C] of any real dtype.
      height: of the output.
      width: of the output.

    Returns:
      [B, height, width, C] float32.
    """
    x = images.astype(jnp.float32)
    lower, upper, weight = _tf1_neighbours(x.shape[2], width)
    left, right = x[:, :, lower], x[:, :, upper]
    x = left + (right - left) * weight[:, None]
    lower, upper, weight = _tf1_neighbours(x.shape[1], height)
    top, bottom = x[:, lower], x[:, upper]
    return top + (bottom - top) * weight[:, None, None]


def _tf1_neighbours(num_in: int, num_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two inputs of every output and the weight of the second. TensorFlow has the positions in float32."""
    position = np.arange(num_out, dtype=np.float32) * (np.float32(num_in) / np.float32(num_out))
    lower = np.floor(position).astype(np.int32)
    return lower, np.minimum(lower + 1, num_in - 1), position - lower.astype(np.float32)


def resize_bicubic(images: jax.Array, height: int, width: int) -> jax.Array:
    """Antialiased bicubic resize as in Pillow, but of floats: nothing is rounded or clipped.

    It is PyTorch's `interpolate(mode="bicubic", antialias=True)`.

    Args:
      images: [B, H, W, C] of any real dtype.
      height: of the output.
      width: of the output.

    Returns:
      [B, height, width, C] float32. Values may lie a little outside the range of the input.
    """
    rows, columns = antialiased_matrix(images.shape[1], height), antialiased_matrix(images.shape[2], width)
    return apply_matrices(images.astype(jnp.float32), rows, columns)


def antialiased_matrix(num_in: int, num_out: int) -> np.ndarray:
    """The weights [num_out, num_in] float64 of an antialiased bicubic resize along one axis."""
    scale = num_in / num_out
    centres = (np.arange(num_out)[:, None] + 0.5) * scale
    weights = keys_cubic((np.arange(num_in) + 0.5 - centres) / max(scale, 1), PILLOW_CUBIC)
    return weights / weights.sum(1, keepdims=True)


def interpolating_matrix(num_in: int, num_out: int, scale: float) -> np.ndarray:
    """The weights [num_out, num_in] float64 of PyTorch's bicubic without antialiasing along one axis.

    Args:
      scale: inputs per output. Inputs outside the image are those of its edge.
    """
    positions = (np.arange(num_out) + 0.5) * scale - 0.5
    neighbours = np.floor(positions).astype(int)[:, None] + np.arange(-1, 3)
    weights = keys_cubic(neighbours - positions[:, None], PYTORCH_CUBIC)
    matrix = np.zeros((num_out, num_in))
    np.add.at(matrix, (np.arange(num_out)[:, None], neighbours.clip(0, num_in - 1)), weights)
    return matrix


def keys_cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (IEEE TASSP 29, 1981), 0 for |x| >= 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def apply_matrices(images: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """Multiplies the rows and the columns of images [B, H, W, C] float32 by matrices [h, H] and [w, W]."""
    # Without HIGHEST, TPUs and recent GPUs round pixels to fewer than 8 bits.
    highest = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    images = jnp.einsum("hH,bHWc->bhWc", jnp.asarray(rows, jnp.float32), images, **highest)
    return jnp.einsum("wW,bhWc->bhwc", jnp.asarray(columns, jnp.float32), images, **highest)
