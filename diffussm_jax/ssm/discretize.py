"""From continuous to discrete time: zero-order hold and the bilinear transform (S4D, arXiv 2206.11893, section 3.1).

    zoh:       Lambda_bar = exp(dt Lambda),                        B_bar = (Lambda_bar - 1) / Lambda  B
    bilinear:  Lambda_bar = (1 + dt Lambda/2) / (1 - dt Lambda/2),  B_bar = dt / (1 - dt Lambda/2)  B

Powers Lambda_bar**l turn by l dt Im(Lambda), thousands of radians for the fast states, of which float32 keeps too few
digits behind the point. So that angle is multiplied out in pairs of floats and reduced to one turn first
(`_reduced_angle`). With the bilinear transform the angle of one step is itself an arctangent, rounded to float32: its
powers are off by about l * 1e-7, those of zoh by 1e-7 at any l.
"""

import jax
import jax.numpy as jnp
import numpy as np

DISCRETIZATIONS = ("zoh", "bilinear")


def _check(discretization: str) -> None:
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"unknown discretization {discretization!r}; choose one of {', '.join(DISCRETIZATIONS)}")


def zoh(Lambda: jax.Array, B: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Zero-order hold: exact for inputs that are constant over each step.

    Args:
      Lambda: [D, N/2] complex64, nowhere zero.
      B: [D, N/2] complex64.
      dt: [D] float32, the step.

    Returns:
      Lambda_bar and B_bar, [D, N/2] complex64.
    """
    z = _log_powers(Lambda, dt, jnp.ones(1, jnp.float32), "zoh")[..., 0]
    # expm1, because exp(z) - 1 loses all but a few digits where |z| is small.
    return jnp.exp(z), jnp.expm1(z) / Lambda * B


def bilinear(Lambda: jax.Array, B: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bilinear (Tustin) transform.

    Args:
      Lambda: [D, N/2] complex64.
      B: [D, N/2] complex64.
      dt: [D] float32, the step.

    Returns:
      Lambda_bar and B_bar, [D, N/2] complex64.
    """
    dt = dt[..., None].astype(jnp.complex64)
    half = Lambda * dt / 2
    return (1 + half) / (1 - half), dt * B / (1 - half)


def discretize(Lambda: jax.Array, B: jax.Array, dt: jax.Array, discretization: str) -> tuple[jax.Array, jax.Array]:
    """`zoh` or `bilinear`, by name; raises ValueError for another name."""
    _check(discretization)
    return (zoh if discretization == "zoh" else bilinear)(Lambda, B, dt)


def transition_powers(Lambda: jax.Array, dt: jax.Array, exponents: jax.Array, discretization: str) -> jax.Array:
    """Lambda_bar**l for many l, accurate at large ones.

    Args:
      Lambda: [D, N/2] complex64.
      dt: [D] float32.
      exponents: [K], whole numbers below 2**24.
      discretization: "zoh" or "bilinear".

    Returns:
      [D, N/2, K] complex64.

    Raises:
      ValueError: the discretisation is unknown.
    """
    _check(discretization)
    return jnp.exp(_log_powers(Lambda, dt, exponents.astype(jnp.float32), discretization))


def _log_powers(Lambda: jax.Array, dt: jax.Array, exponents: jax.Array, discretization: str) -> jax.Array:
    """l log(Lambda_bar) up to whole turns, for exponents l [K] float32: [D, N/2, K] complex64."""
    dt = jnp.broadcast_to(dt[..., None], Lambda.shape)
    if discretization == "zoh":
        log_decay, angle, scale = Lambda.real * dt, Lambda.imag, dt
    else:  # |1 + h|^2 / |1 - h|^2 = 1 + 4 Re h / |1 - h|^2, and log1p does not round that sum first
        re, im = Lambda.real * dt / 2, Lambda.imag * dt / 2
        log_decay = jnp.log1p(4 * re / ((1 - re) ** 2 + im**2)) / 2
        angle, scale = jnp.arctan2(2 * im, 1 - re**2 - im**2), jnp.ones_like(dt)
    return jax.lax.complex(
        log_decay[..., None] * exponents, _reduced_angle(angle[..., None], scale[..., None], exponents)
    )


@jax.custom_jvp
def _reduced_angle(omega: jax.Array, dt: jax.Array, exponents: jax.Array) -> jax.Array:
    """omega * dt * exponents modulo 2 pi, to about 1e-7 however large the product is."""
    turn_hi = np.float32(1 / (2 * np.pi))
    turn_lo = np.float32(1 / (2 * np.pi) - np.float64(turn_hi))
    angle, angle_low = _exact_product(omega, dt)
    turns, turns_low = _exact_product(angle, turn_hi)
    turns_low = turns_low + angle * turn_lo + angle_low * turn_hi
    turns = turns - jnp.round(turns)
    total, total_low = _exact_product(turns, exponents)
    total_low = total_low + turns_low * exponents
    return np.float32(2 * np.pi) * (total - jnp.round(total) + total_low)


@_reduced_angle.defjvp
def _reduced_angle_jvp(primals, tangents):
    omega, dt, exponents = primals
    d_omega, d_dt, _ = tangents
    return _reduced_angle(*primals), (d_omega * dt + omega * d_dt) * exponents


def _exact_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a * b as an unrounded sum of two floats, after Dekker (1971).

    The factors are split into halves of 12 bits by masking, and only products of halves occur. Those are exact, so a
    compiler that fuses a multiplication with an addition changes nothing.
    """

    def halves(x):
        x = jnp.asarray(x, jnp.float32)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFF000)
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return high, x - high

    a_high, a_low = halves(a)
    b_high, b_low = halves(b)
    product = a_high * b_high + (a_high * b_low + a_low * b_high)
    return product, ((a_high * b_high - product) + a_high * b_low) + a_low * b_high + a_low * b_low
