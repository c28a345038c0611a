"""`bench vae`: time and memory of the autoencoder for one image, whole and in tiles."""

import functools

import jax
import jax.numpy as jnp

from diffussm_jax.autoencoder import AutoencoderKL, init_params, tiled_decode, tiled_encode
from diffussm_jax.bench.measure import median_seconds, planned_bytes


def bench_vae(image_size: int, *, dtype: str = "float32", is_tiled: bool = False, repeats: int = 3) -> dict[str, float]:
    """Times the full-size autoencoder of Stable Diffusion on one image, and returns the memory that XLA plans.

    Args:
      image_size: pixels, a multiple of 8.
      dtype: of its layers.
      is_tiled: whether the image is computed in tiles of 512 pixels.
      repeats: timed repetitions; the median counts.

    Returns:
      encode_s, decode_s, encode_mb, decode_mb. In tiles, the memory is that of the program of one tile, the image and
      the latents.
    """
    model = AutoencoderKL(dtype=jnp.dtype(dtype))
    params = init_params(model, 0)
    image = jax.random.uniform(jax.random.key(1), (1, image_size, image_size, 3), minval=-1)
    latents = jax.random.normal(jax.random.key(2), (1, image_size // 8, image_size // 8, 4))
    figures = {}
    for method, x, tiled, tile in (
        ("encode", image, tiled_encode, 512),
        ("decode", latents, tiled_decode, 512 // model.downsampling),
    ):
        part = x[:, :tile, :tile] if is_tiled else x
        whole = jax.jit(lambda params, x, method=method: model.apply({"params": params}, x, method=method))
        compiled = whole.lower(params, part).compile()
        num_bytes = planned_bytes(compiled)
        program = functools.partial(compiled, params, x)
        if is_tiled:
            num_bytes += image.nbytes + latents.nbytes
            program = functools.partial(tiled, model, params, x)
        time = median_seconds({method: program}, repeats)[method]
        figures |= {f"{method}_s": time, f"{method}_mb": num_bytes / 1e6}
    return figures


def print_vae(image_sizes: list[int], *, dtype: str, repeats: int) -> None:
    """Prints a line for each size, and another one in tiles for sizes above 512.

    Raises:
      ValueError: a size is not a multiple of 8.
    """
    if any(size < 1 or size % 8 for size in image_sizes):
        raise ValueError(f"--image_sizes are multiples of 8, such as 256,512; got {image_sizes}")
    print(f"one image on 1 {jax.devices()[0].device_kind}, {dtype}, jax {jax.__version__}")
    print(f"{'pixels':>10} {'':>6} {'encode, s':>10} {'decode, s':>10} {'encode, MB':>11} {'decode, MB':>11}")
    for size in image_sizes:
        for is_tiled in (False, True) if size > 512 else (False,):
            f = bench_vae(size, dtype=dtype, is_tiled=is_tiled, repeats=repeats)
            print(
                f"{size:>10} {'tiled' if is_tiled else 'whole':>6} {f['encode_s']:10.3f} {f['decode_s']:10.3f} "
                f"{f['encode_mb']:11.0f} {f['decode_mb']:11.0f}",
                flush=True,
            )
