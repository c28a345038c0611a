"""Dispatches the SSM to one of its methods.

    recurrent    a scan over positions; slow; the reference that the others are tested against
    associative  a parallel prefix scan
    fft          a convolution by FFT
    chunked      matrix products in chunks, a recurrence of states between them
    pallas       `chunked` as a kernel, for TPUs and GPUs
    auto         the method that was measured to be the fastest (`auto.py`); the default

All methods agree to float32 accuracy, for any L. With a bfloat16 input, `chunked` and `pallas` agree to bfloat16
accuracy. `diffussm_jax.bench ssm` times the methods side by side.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from diffussm_jax.ssm.auto import fastest_method
from diffussm_jax.ssm.chunked import chunked
from diffussm_jax.ssm.fft import fft
from diffussm_jax.ssm.pallas_tpu import pallas_tpu
from diffussm_jax.ssm.params import SSMParams
from diffussm_jax.ssm.phases import from_phases, to_phases
from diffussm_jax.ssm.recurrent import associative, recurrent

DEFAULT_METHOD = "auto"
METHODS = ("auto", "recurrent", "associative", "fft", "chunked", "pallas")
PLATFORMS = ("cpu", "gpu", "tpu")
_HALF_PRECISION = ("chunked", "pallas")  # methods that take bfloat16 without a cast to float32


def _per_direction(scan):
    """Adapts a method for one direction to a method for R directions."""

    def apply(directions, u, *, discretization, reverse):
        outputs = [
            scan(params, u, discretization=discretization, reverse=backward)
            for params, backward in zip(directions, reverse, strict=True)
        ]
        return jnp.concatenate(outputs, -1)

    return apply


def _via_positions(function: Callable) -> Callable:
    """Adapts a function from [B, L, D] to [B, L, R * D] to the layout of phases."""

    def apply(directions, u, **options):
        M, D, B, J = u.shape
        y = function(directions, from_phases(u), **options)
        return to_phases(y.reshape(B, M * J, len(directions), D), M)

    return apply


# (directions, u [M, D, B, J], discretization=, reverse=) -> y [M, R, D, B, J]
_FUNCTIONS = {
    "recurrent": _via_positions(_per_direction(recurrent)),
    "associative": _via_positions(_per_direction(associative)),
    "chunked": chunked,
}


def _function(method: str, platform: str) -> Callable:
    if method == "fft":
        return _via_positions(functools.partial(fft, platform=platform))
    if method != "pallas":
        return _FUNCTIONS[method]
    if platform == "cpu":
        raise ValueError("SSM method 'pallas' has a kernel for tpu and gpu, none for cpu")
    if platform == "tpu":
        return pallas_tpu
    # A late import: JAX has deprecated the Triton backend that this kernel needs, and no other method uses it.
    try:
        from diffussm_jax.ssm.pallas_gpu import pallas_gpu
    except ImportError as error:
        raise ValueError(
            f"SSM method 'pallas' needs Pallas's Triton backend on GPUs, which JAX {jax.__version__} does not have; "
            "choose 'auto' or 'chunked'"
        ) from error
    return pallas_gpu


def _check(directions: Sequence[SSMParams], u: jax.Array, dimensions: str) -> None:
    """Raises ValueError unless u is of a float dtype and has these dimensions, with the parameters' D."""
    for D in (params.dt.shape[0] for params in directions):
        if u.ndim != len(dimensions) or u.shape[dimensions.index("D")] != D:
            expected = ", ".join(dimensions)
            raise ValueError(f"u must be [{expected}] with D = {D} as in the SSM's parameters, got shape {u.shape}")
    if not jnp.issubdtype(u.dtype, jnp.floating):
        raise ValueError(f"u must be of a float dtype, got {u.dtype}")
    if 0 in (size for name, size in zip(dimensions, u.shape, strict=True) if name in "LJM"):
        raise ValueError(f"u must have at least one position, got shape {u.shape}")


def ssm_apply_phases(
    directions: Sequence[SSMParams],
    u: jax.Array,
    *,
    reverse: Sequence[bool],
    method: str = DEFAULT_METHOD,
    discretization: str = "zoh",
    platform: str | None = None,
) -> jax.Array:
    """Runs R SSMs over the same sequence, laid out in M phases: position j M + m is u[m, :, :, j].

    `pallas` uses this layout, and an hourglass reads and writes it without transposed copies.

    Args:
      u: [M, D, B, J] of any float dtype. Any J >= 1.
      reverse: per SSM, whether it runs backward.
      method, discretization, platform: see `ssm_apply`.

    Returns:
      y [M, R, D, B, J] in the dtype of `u`.

    Raises:
      ValueError: as `ssm_apply`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown SSM method {method!r}; choose one of {', '.join(METHODS)}")
    platform = jax.default_backend() if platform is None else platform
    if platform not in PLATFORMS:
        raise ValueError(f"unknown platform {platform!r}; choose one of {', '.join(PLATFORMS)}")
    _check(directions, u, "MDBJ")
    M, D, _, J = u.shape
    if method == "auto":
        method = fastest_method(platform, u.dtype.name, M * J, D, 2 * directions[0].Lambda.shape[1])
    is_native = u.dtype == jnp.bfloat16 and method in _HALF_PRECISION
    operand = u if is_native else u.astype(jnp.float32)
    y = _function(method, platform)(directions, operand, discretization=discretization, reverse=tuple(reverse))
    return y.astype(u.dtype)


def _apply(directions, reverse, u, **options):
    """Runs `ssm_apply_phases` on u [B, L, D] as a single phase: [B, L, R * D]."""
    _check(directions, u, "BLD")
    y = from_phases(ssm_apply_phases(directions, to_phases(u, 1), reverse=reverse, **options))
    return y.reshape(*u.shape[:2], -1)


def ssm_apply(
    params: SSMParams,
    u: jax.Array,
    *,
    method: str = DEFAULT_METHOD,
    discretization: str = "zoh",
    reverse: bool = False,
    platform: str | None = None,
) -> jax.Array:
    """Runs D diagonal SSMs over a sequence: y[l] = sum_j K[j] u[l - j] + D u[l].

    Args:
      u: [B, L, D] of any float dtype. Any L >= 1.
      method: a name of `METHODS`. "pallas" needs a TPU or GPU. Sums and states are float32. "chunked" and "pallas"
        multiply bfloat16 inputs in bfloat16; the others cast them to float32.
      discretization: "zoh" or "bilinear".
      reverse: runs backward, y[l] = sum_j K[j] u[l + j] + D u[l].
      platform: the target of compilation, "cpu", "gpu" or "tpu"; JAX's default backend if None.

    Returns:
      y [B, L, D] in the dtype of `u`.

    Raises:
      ValueError: a name is unknown, `u` does not fit the parameters, or the platform has no such kernel.
    """
    return _apply((params,), (reverse,), u, method=method, discretization=discretization, platform=platform)


def ssm_apply_bidirectional(
    forward: SSMParams,
    backward: SSMParams,
    u: jax.Array,
    *,
    method: str = DEFAULT_METHOD,
    discretization: str = "zoh",
    platform: str | None = None,
) -> jax.Array:
    """Runs one SSM forward and another backward over the same sequence. Both include the current position.

    DiffuSSM (arXiv 2311.18257, section 3.2), after BiGS (arXiv 2212.10544).

    Args:
      u: [B, L, D] of any float dtype. Any L >= 1.
      method, discretization, platform: see `ssm_apply`.

    Returns:
      [B, L, 2D] in the dtype of `u`: the forward outputs, then the backward ones.

    Raises:
      ValueError: as `ssm_apply`.
    """
    return _apply(
        (forward, backward), (False, True), u, method=method, discretization=discretization, platform=platform
    )
