"""Multiply-adds of each way of computing the SSM."""

import math

from diffussm_jax.ssm.chunked import chunk_size
from diffussm_jax.ssm.fft import transform_length


def multiply_adds(
    method: str, platform: str, L: int, N: int, num_directions: int = 2, *, num_sequences: int = 1
) -> float | None:
    """Multiply-adds of one channel of one sequence in the forward pass, for all directions together.

    "chunked": the matrix products inside chunks and between them, those of both directions as one product with zeros
    between. "fft": transforms of n real points at 5/4 n log2 n, one of the input and one back for each direction, and
    the products of their spectra at 3 for each complex product. Kernels and operators are made once for a whole batch
    and not counted.

    Args:
      method: of `ssm.METHODS` but "auto", which `fastest_method` resolves.
      platform: "cpu", "gpu" or "tpu".
      L: positions.
      N: state size.
      num_directions: R.
      num_sequences: that a device computes together; decides on the size of chunks.

    Returns:
      The count; None for methods that are not counted.
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
