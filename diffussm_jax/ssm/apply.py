"""One entrance to every way of computing the SSM.

    recurrent    a scan over positions; slow and plain, the oracle of the others
    associative  a parallel prefix scan
    fft          a convolution by FFT
    chunked      matrix products in chunks, states between them
    pallas       the same as a kernel for TPUs, on no other machine

All give the same numbers to float32 accuracy, for any L; `pallas` of a bfloat16 input to the accuracy of that.
`diffussm_jax.bench ssm` times them side by side.
"""

import jax
import jax.numpy as jnp

from diffussm_jax.ssm import chunked as chunked_lib
from diffussm_jax.ssm import fft as fft_lib
from diffussm_jax.ssm import pallas_tpu as pallas_lib
from diffussm_jax.ssm import recurrent as recurrent_lib
from diffussm_jax.ssm.params import SSMParams

DEFAULT_METHOD = "fft"


def _one_by_one(scan):
    """A method that shares nothing between directions, in the form of those that do."""

    def apply(directions, u, *, discretization, reverse):
        outputs = [
            scan(params, u, discretization=discretization, reverse=backward)
            for params, backward in zip(directions, reverse, strict=True)
        ]
        return jnp.concatenate(outputs, -1)

    return apply


METHODS = {
    "recurrent": _one_by_one(recurrent_lib.recurrent),
    "associative": _one_by_one(recurrent_lib.associative),
    "fft": fft_lib.fft,
    "chunked": chunked_lib.chunked,
    "pallas": pallas_lib.pallas_tpu,
}
_NATIVE = {"pallas": (jnp.float32, jnp.bfloat16)}  # dtypes of u that a method takes as they are


def _apply(directions, reverse, u, method, discretization):
    if method not in METHODS:
        raise ValueError(f"unknown SSM method {method!r}; choose one of {', '.join(METHODS)}")
    for params in directions:
        if u.ndim != 3 or params.dt.shape[0] != u.shape[-1]:
            raise ValueError(
                f"u must be [B, L, D] with D = {params.dt.shape[0]} as in the SSM's parameters, got shape {u.shape}"
            )
    if not jnp.issubdtype(u.dtype, jnp.floating):
        raise ValueError(f"u must be of a float dtype, got {u.dtype}")
    if u.shape[1] < 1:
        raise ValueError(f"u must have at least one position, got shape {u.shape}")
    operand = u if u.dtype in _NATIVE.get(method, ()) else u.astype(jnp.float32)
    y = METHODS[method](directions, operand, discretization=discretization, reverse=reverse)
    return y.astype(u.dtype)


def ssm_apply(
    params: SSMParams,
    u: jax.Array,
    *,
    method: str = DEFAULT_METHOD,
    discretization: str = "zoh",
    reverse: bool = False,
) -> jax.Array:
    """Runs D diagonal SSMs over a sequence: y[l] = sum_j K[j] u[l - j] + D u[l].

    Args:
      params: `SSMParams` of D channels.
      u: [B, L, D] of any float dtype; computed in float32. Any L >= 1.
      method: "recurrent", "associative", "fft", "chunked", or on a TPU "pallas".
      discretization: "zoh" or "bilinear".
      reverse: whether time runs backwards, y[l] = sum_j K[j] u[l + j] + D u[l].

    Returns:
      y [B, L, D] in the dtype of `u`.

    Raises:
      ValueError: a name is unknown, or `u` does not fit the parameters.
    """
    return _apply((params,), (reverse,), u, method, discretization)


def ssm_apply_bidirectional(
    forward: SSMParams,
    backward: SSMParams,
    u: jax.Array,
    *,
    method: str = DEFAULT_METHOD,
    discretization: str = "zoh",
) -> jax.Array:
    """Runs one SSM forward and another backward over the same sequence; both see the current position.

    DiffuSSM (arXiv 2311.18257, section 3.2), after BiGS (arXiv 2212.10544).

    Args:
      forward: `SSMParams` of D channels.
      backward: `SSMParams` of D channels.
      u: [B, L, D] of any float dtype; computed in float32. Any L >= 1.
      method: "recurrent", "associative", "fft", "chunked", or on a TPU "pallas".
      discretization: "zoh" or "bilinear".

    Returns:
      [B, L, 2D] in the dtype of `u`: the forward outputs, then the backward ones.

    Raises:
      ValueError: a name is unknown, or `u` does not fit the parameters.
    """
    return _apply((forward, backward), (False, True), u, method, discretization)
