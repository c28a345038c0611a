"""Multiply-adds of each SSM method."""

import math

from diffussm_jax.ssm.chunked import chunk_size
from diffussm_jax.ssm.fft import transform_length


def multiply_adds(
    method: str, platform: str, L: int, N: int, num_directions: int = 2, *, num_sequences: int = 1
) -> float | None:
    """Counts the multiply-adds of one channel of one sequence in the forward pass, over all directions.

    "chunked" counts the matrix products inside and between chunks, with the block zeros of the joint product of all
    directions. "fft" counts 5/4 n log2 n for each real transform of n points (one of the input, one back per direction)
    and 3 for each complex product of the spectra. Kernels and operators are computed once per batch and not counted.

    Args:
      method: of `ssm.METHODS`, except "auto", which `fastest_method` resolves.
      platform: "cpu", "gpu" or "tpu".
      num_sequences: sequences per device; sets the chunk size.

    Returns:
      The count, or None for methods that are not counted.
    """
    R = num_directions
    if method == "chunked":
        c = min(L, chunk_size(num_sequences * L))
        K = math.ceil(L / c)
        return R * K * c * (c + ((1 + R) * N if K > 1 else 0))
    if method == "fft":
        n = transform_length(L, platform)
        return (1 + R) * 5 / 4 * n * math.log2(n) + 3 * R * (n // 2 + 1)
    return None
