"""The parameters of a diagonal SSM: real for the optimiser, complex for the maths."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.ssm.hippo import s4d_inv, s4d_legs, s4d_lin, s4d_random

INITIALIZATIONS = {"legs": s4d_legs, "lin": s4d_lin, "inv": s4d_inv, "random": s4d_random}


class SSMParams(NamedTuple):
    """D independent diagonal SSMs, one per channel.

    Attributes:
      Lambda: [D, N/2] complex64, with negative real part.
      B: [D, N/2] complex64.
      C: [D, N/2] complex64.
      dt: [D] float32, positive.
      D: [D] float32, the skip from input to output.
    """

    Lambda: jax.Array
    B: jax.Array
    C: jax.Array
    dt: jax.Array
    D: jax.Array


def init_s4d(
    key: jax.Array,
    width: int,
    state_size: int = 64,
    *,
    initialization: str = "lin",
    dt_min: float = 1e-3,
    dt_max: float = 1e-1,
) -> dict[str, jax.Array]:
    """Initialises the real parameters of `width` S4D channels (S4D, arXiv 2206.11893, section 4.4).

    Lambda and B follow `initialization` ("legs", "lin", "inv" or "random") and are the same in all channels, except
    that "random" draws each channel's Lambda. C is complex normal with variance 1, dt log-uniform in [dt_min, dt_max],
    D normal.

    Returns:
      float32: log_neg_re and im [D, N/2], where Lambda = -exp(log_neg_re) + i im; B and C [D, N/2, 2], real and
      imaginary part; log_dt and D [D].

    Raises:
      ValueError: the initialization is unknown, or the state size is odd.
    """
    if initialization not in INITIALIZATIONS:
        raise ValueError(f"unknown initialization {initialization!r}; choose one of {', '.join(INITIALIZATIONS)}")
    Lambda, B = INITIALIZATIONS[initialization](state_size)
    C_key, dt_key, D_key = jax.random.split(key, 3)

    def in_every_channel(x: np.ndarray) -> jax.Array:
        return jnp.tile(jnp.asarray(x, jnp.float32), (width,) + (1,) * x.ndim)

    log_dt = jax.random.uniform(dt_key, (width,), jnp.float32, np.log(dt_min), np.log(dt_max))
    parts = {"log_neg_re": in_every_channel(np.log(-Lambda.real)), "im": in_every_channel(Lambda.imag)}
    if initialization == "random":
        uniform = 1 - jax.random.uniform(jax.random.fold_in(key, 3), (2, width, state_size // 2), jnp.float32)
        parts = {"log_neg_re": jnp.log(uniform[0]), "im": np.float32(np.pi * state_size / 2) * uniform[1]}
    return parts | {
        "B": in_every_channel(np.stack([B.real, B.imag], -1)),
        "C": jax.random.normal(C_key, (width, state_size // 2, 2), jnp.float32) * np.float32(np.sqrt(0.5)),
        "log_dt": log_dt,
        "D": jax.random.normal(D_key, (width,), jnp.float32),
    }


def to_complex(real: dict[str, jax.Array]) -> SSMParams:
    """Converts the real parameters of `init_s4d` to `SSMParams`."""
    return SSMParams(
        Lambda=jax.lax.complex(-jnp.exp(real["log_neg_re"]), real["im"]),
        B=jax.lax.complex(real["B"][..., 0], real["B"][..., 1]),
        C=jax.lax.complex(real["C"][..., 0], real["C"][..., 1]),
        dt=jnp.exp(real["log_dt"]),
        D=real["D"],
    )
