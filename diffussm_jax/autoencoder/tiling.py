"""Encoding and decoding by overlapping tiles, for images that do not fit in memory."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.autoencoder.kl import Autoencoder, check_images


def tiled_encode(
    model: Autoencoder, params: Any, images: jax.Array, *, tile: int = 512, overlap: float = 0.25
) -> tuple[jax.Array, jax.Array]:
    """`encode` by overlapping tiles.

    Norms and attention see one tile, so the result approximates `encode`. Images that fit in a tile are encoded whole.

    Args:
      images: [B, H, W, C_in] float in [-1, 1]; H and W are multiples of `model.downsampling`.
      tile: height and width of a tile in pixels, a multiple of `model.downsampling`.
      overlap: fraction of a tile shared with the next tile and blended linearly; 0 <= overlap < 1.

    Returns:
      mean and log_std, [B, H/f, W/f, C] float32.

    Raises:
      ValueError: tile or overlap is out of range, or the images are invalid for `encode`.
    """
    f = model.downsampling
    _check_tile(tile, overlap, f)
    check_images(images, model.in_channels, f)
    return _tiled(model, params, images, "encode", tile // f, overlap, scales=(f, 1))


def tiled_decode(
    model: Autoencoder, params: Any, latents: jax.Array, *, tile: int = 64, overlap: float = 0.25
) -> jax.Array:
    """`decode` by overlapping tiles; see `tiled_encode`.

    Args:
      latents: [B, h, w, C] float, unscaled.
      tile: height and width of a tile in latent positions.

    Returns:
      [B, h f, w f, C_out] float32.

    Raises:
      ValueError: tile or overlap is out of range, or the latents are invalid for `decode`.
    """
    _check_tile(tile, overlap, 1)
    check_images(latents, model.latent_channels, 1, "latents")
    return _tiled(model, params, latents, "decode", tile, overlap, scales=(1, model.downsampling))


def _check_tile(tile: int, overlap: float, multiple: int) -> None:
    if not isinstance(tile, int | np.integer) or tile < 1 or tile % multiple:
        raise ValueError(f"tile must be a positive multiple of {multiple}, got {tile!r}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is a fraction of a tile, 0 <= overlap < 1, got {overlap}")


def blend_weights(size: int, tile: int, overlap: float, scale: int = 1) -> tuple[list[int], np.ndarray]:
    """The starts of the tiles along one axis, and their weights, which sum to one at every position.

    All tiles have the same size. The last tile is moved back to end with the axis. Weights rise and fall linearly over
    the overlap.

    Args:
      size: positions along the axis.
      tile: positions per tile, at most `size`.
      overlap: fraction of a tile shared with the next.
      scale: output positions per input position.

    Returns:
      The starts, in input positions, and the weights, [tiles, tile * scale] float32.
    """
    shared = min(round(tile * overlap), tile - 1)
    count = 1 + max(0, -(-(size - tile) // (tile - shared)))
    starts = [min(i * (tile - shared), size - tile) for i in range(count)]
    ramp = np.arange(tile * scale) + 0.5
    window = np.minimum(1, np.minimum(ramp, ramp[::-1]) / max(shared * scale, 0.5))
    total = np.zeros(size * scale)
    spans = [slice(start * scale, (start + tile) * scale) for start in starts]
    for span in spans:
        total[span] += window
    return starts, np.stack([window / total[span] for span in spans]).astype(np.float32)


# Jitted for the shape of the tile, not of the image: all tiles of all images share one program.
@functools.partial(jax.jit, static_argnames=("model", "method"))
def _apply(model, params, x, method):
    return model.apply({"params": params}, x, method=method)


@functools.partial(jax.jit, donate_argnums=0)
def _add_tile(total, tile, weights, row, column):
    start = (0, row, column, 0)
    present = jax.lax.dynamic_slice(total, start, tile.shape)
    return jax.lax.dynamic_update_slice(total, present + weights[..., None] * tile, start)


def _tiled(model, params, x, method, tile, overlap, scales):
    """Runs `method` on tiles of `tile` latent positions; `scales` are x and output positions per latent position."""
    x = jnp.asarray(x)
    in_scale, out_scale = scales
    sizes = [n // in_scale for n in x.shape[1:3]]
    if max(sizes) <= tile:
        return _apply(model, params, x, method)
    tiles = [min(n, tile) for n in sizes]
    rows, columns = (
        zip(*blend_weights(n, t, overlap, out_scale), strict=True) for n, t in zip(sizes, tiles, strict=True)
    )
    patch_shape = (x.shape[0], tiles[0] * in_scale, tiles[1] * in_scale, x.shape[-1])
    total = None
    for (row, row_weights), (column, column_weights) in itertools.product(rows, columns):
        patch = jax.lax.dynamic_slice(x, (0, row * in_scale, column * in_scale, 0), patch_shape)
        out = _apply(model, params, patch, method)
        if total is None:
            shape = (x.shape[0], sizes[0] * out_scale, sizes[1] * out_scale)
            total = jax.tree.map(lambda leaf, shape=shape: jnp.zeros((*shape, leaf.shape[-1]), leaf.dtype), out)
        add = functools.partial(
            _add_tile,
            weights=np.outer(row_weights, column_weights),
            row=row * out_scale,
            column=column * out_scale,
        )
        total = jax.tree.map(add, total, out)
    return total
