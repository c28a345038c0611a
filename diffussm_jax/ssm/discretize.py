"""From continuous to discrete time: zero-order hold and the bilinear transform (S4D, arXiv 2206.11893, section 3.1).

    zoh:       Lambda_bar = exp(dt Lambda),                        B_bar = (Lambda_bar - 1) / Lambda  B
    bilinear:  Lambda_bar = (1 + dt Lambda/2) / (1 - dt Lambda/2),  B_bar = dt / (1 - dt Lambda/2)  B

The angle of Lambda_bar**l reaches thousands of radians for fast states, and float32 keeps too few of its fractional
digits. So angles are measured in turns, as pairs of floats (`_step_turns`), and whole turns are dropped first.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

DISCRETIZATIONS = ("zoh", "bilinear")

_NUM_ROOTS = 1024
_ROOTS = np.exp(2j * np.pi * np.arange(_NUM_ROOTS) / _NUM_ROOTS)  # points of the unit circle, as a pair of complex64
_ROOTS_HIGH = _ROOTS.astype(np.complex64)
_ROOTS_LOW = (_ROOTS - _ROOTS_HIGH).astype(np.complex64)


def _check(discretization: str) -> None:
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"unknown discretization {discretization!r}; choose one of {', '.join(DISCRETIZATIONS)}")


def zoh(Lambda: jax.Array, B: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Zero-order hold: exact for inputs that are constant over each step.

    Args:
      Lambda: [D, N/2] complex64, nonzero.
      B: [D, N/2] complex64.
      dt: [D] float32.

    Returns:
      Lambda_bar and B_bar, [D, N/2] complex64.
    """
    turn = _powers(jax.lax.complex(jnp.zeros_like(Lambda.real), Lambda.imag), dt, jnp.ones(1), "zoh")[..., 0]
    log_decay = Lambda.real * dt[..., None]
    decay, cos, sin = jnp.exp(log_decay), turn.real, turn.imag
    # Lambda_bar - 1 cancels for small steps. Its real part is (decay - 1) cos - v with v = 1 - cos, and a small v is
    # computed as sin**2 / (1 + cos).
    versine = jnp.where(cos > 0, sin * sin / (1 + jnp.abs(cos)), 1 - cos)
    minus_1 = jax.lax.complex(jnp.expm1(log_decay) * cos - versine, decay * sin)
    return decay.astype(turn.dtype) * turn, minus_1 / Lambda * B


def bilinear(Lambda: jax.Array, B: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bilinear (Tustin) transform, with the shapes of `zoh`."""
    dt = dt[..., None].astype(jnp.complex64)
    half = Lambda * dt / 2
    return (1 + half) / (1 - half), dt * B / (1 - half)


def discretize(Lambda: jax.Array, B: jax.Array, dt: jax.Array, discretization: str) -> tuple[jax.Array, jax.Array]:
    """Applies `zoh` or `bilinear` by name. Raises ValueError for another name."""
    _check(discretization)
    return (zoh if discretization == "zoh" else bilinear)(Lambda, B, dt)


def transition_powers(Lambda: jax.Array, dt: jax.Array, exponents: jax.Array, discretization: str) -> jax.Array:
    """Computes Lambda_bar**l for many l, accurately at large l.

    Args:
      Lambda: [D, N/2] complex64.
      dt: [D] float32.
      exponents: [K], integers below 2**24.
      discretization: "zoh" or "bilinear".

    Returns:
      [D, N/2, K] complex64.

    Raises:
      ValueError: the discretisation is unknown.
    """
    _check(discretization)
    return _powers(Lambda, dt, exponents.astype(jnp.float32), discretization)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def split_transition(
    Lambda: jax.Array, dt: jax.Array, discretization: str, num_steps: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Splits Lambda_bar**l into root + rest, for a recurrence that applies it many times.

    The root is a complex64 number on the unit circle. The rest is at most 1/160 where the state decays slowly. Their
    sum equals the power to 2e-9 (bilinear: per step), so x -> root x + (rest x + B_bar u) avoids the systematic error
    of a rounded Lambda_bar.

    Args:
      Lambda: [D, N/2] complex64.
      dt: [D] float32.
      discretization: "zoh" or "bilinear".
      num_steps: l, below 2**24.

    Returns:
      The root and the rest, [D, N/2] complex64. Gradients flow through the rest.

    Raises:
      ValueError: the discretisation is unknown.
    """
    _check(discretization)
    turns, turns_low = _turns(Lambda, dt, jnp.float32(num_steps), discretization)
    index, remainder = _nearest_root(turns, turns_low)
    high, low = jnp.asarray(_ROOTS_HIGH)[index], jnp.asarray(_ROOTS_LOW)[index]
    angle = np.float32(2 * np.pi) * remainder
    beyond_root = jnp.expm1(jax.lax.complex(num_steps * _log_decay(Lambda, dt, discretization), angle))
    return high, low + (high + low) * beyond_root


@split_transition.defjvp
def _split_transition_jvp(discretization, num_steps, primals, tangents):
    root, rest = split_transition(*primals, discretization, num_steps)
    d_log = num_steps * _log_transition_jvp(*primals, *tangents, discretization)
    return (root, rest), (jnp.zeros_like(root), (root + rest) * d_log)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _powers(Lambda: jax.Array, dt: jax.Array, exponents: jax.Array, discretization: str) -> jax.Array:
    """Lambda_bar**l for exponents l [K] float32: [D, N/2, K] complex64."""
    turns, turns_low = _turns(Lambda, dt, exponents, discretization)
    cos, sin = _cos_sin(turns + turns_low)
    magnitude = jnp.exp(_log_decay(Lambda, dt, discretization)[..., None] * exponents)
    return jax.lax.complex(magnitude * cos, magnitude * sin)


@_powers.defjvp
def _powers_jvp(discretization, primals, tangents):
    Lambda, dt, exponents = primals
    d_log = _log_transition_jvp(Lambda, dt, *tangents[:2], discretization)
    powers = _powers(*primals, discretization)
    return powers, powers * (d_log[..., None] * exponents.astype(jnp.complex64))


def _cos_sin(turns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of an angle in turns, to 1e-7. On a CPU several times as fast as `jnp.cos` of large radians.

    Quarter turns are subtracted. Taylor polynomials evaluate the remaining eighth of a turn.
    """
    quarters = jnp.round(4 * turns)
    x = np.float32(2 * np.pi) * (turns - quarters / 4)
    x2 = x * x
    sin = x * (1 + x2 * (-1 / 6 + x2 * (1 / 120 + x2 * (-1 / 5040 + x2 / 362880))))
    cos = 1 + x2 * (-1 / 2 + x2 * (1 / 24 + x2 * (-1 / 720 + x2 / 40320)))
    quarter = quarters.astype(jnp.int32) & 3
    is_odd = (quarter & 1) == 1
    cos_sign = jnp.where((quarter == 1) | (quarter == 2), -1, 1).astype(jnp.float32)
    sin_sign = jnp.where(quarter >= 2, -1, 1).astype(jnp.float32)
    return cos_sign * jnp.where(is_odd, sin, cos), sin_sign * jnp.where(is_odd, cos, sin)


def _log_transition_jvp(Lambda, dt, d_Lambda, d_dt, discretization):
    """The tangent of log(Lambda_bar), [D, N/2]."""
    dt, d_dt = (x[..., None].astype(jnp.complex64) for x in (dt, d_dt))
    d_z = d_Lambda * dt + Lambda * d_dt
    return d_z if discretization == "zoh" else d_z / (1 - (Lambda * dt / 2) ** 2)


def _log_decay(Lambda: jax.Array, dt: jax.Array, discretization: str) -> jax.Array:
    """log |Lambda_bar|, [D, N/2]."""
    re, im = Lambda.real * dt[..., None], Lambda.imag * dt[..., None]
    if discretization == "zoh":
        return re
    # With h = z / 2, |1 + h|^2 / |1 - h|^2 = 1 + 4 Re h / |1 - h|^2. log1p avoids rounding this sum.
    return jnp.log1p(2 * re / ((1 - re / 2) ** 2 + (im / 2) ** 2)) / 2


def _turns(Lambda: jax.Array, dt: jax.Array, exponents: jax.Array, discretization: str) -> tuple[jax.Array, jax.Array]:
    """The angle of Lambda_bar**l in turns, modulo 1, as a sum of two floats: [D, N/2, *l.shape] each."""
    turns, turns_low = _step_turns(Lambda, dt, discretization)
    if exponents.ndim:
        turns, turns_low = turns[..., None], turns_low[..., None]
    total, total_low = _exact_product(turns, exponents)
    return total - jnp.round(total), total_low + turns_low * exponents


def _step_turns(Lambda: jax.Array, dt: jax.Array, discretization: str) -> tuple[jax.Array, jax.Array]:
    """The angle of Lambda_bar in turns, modulo 1, as a sum of two floats: [D, N/2] each."""
    if discretization == "zoh":
        angle, angle_low = _exact_product(Lambda.imag, dt[..., None])
        by_angle = np.float32(1 / (2 * np.pi))
        by_angle_low = np.float32(1 / (2 * np.pi) - np.float64(by_angle))
        turns, turns_low = _exact_product(angle, by_angle)
        return turns - jnp.round(turns), turns_low + angle * by_angle_low + angle_low * by_angle
    # The angles of 1 + h and of the conjugate of 1 - h. Both have the imaginary part of h.
    re = Lambda.real * dt[..., None] / 2
    im, im_low = _exact_product(Lambda.imag, dt[..., None] / 2)
    nearest_plus, turns_plus = _angle_in_turns(re, im, im_low)
    nearest_minus, turns_minus = _angle_in_turns(-re, im, im_low)
    return nearest_plus + nearest_minus, turns_plus + turns_minus


def _angle_in_turns(x: jax.Array, y: jax.Array, y_low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The angle of (1 + x, y + y_low) in turns: the angle of the nearest root of unity, and the rest."""
    one_x = 1 + x
    # The rounding error of the sum. reduce_precision keeps XLA from simplifying (1 + x) - 1 to x.
    x_low = x - (jax.lax.reduce_precision(one_x, 8, 23) - 1)
    index, _ = _nearest_root(jnp.arctan2(y, one_x) * np.float32(1 / (2 * np.pi)), 0)
    high, low = jnp.asarray(_ROOTS_HIGH)[index], jnp.asarray(_ROOTS_LOW)[index]
    # Rotated back by the root's angle, the vector points almost along the first axis.
    (y_cos, y_cos_low), (x_sin, x_sin_low) = _exact_product(y, high.real), _exact_product(one_x, high.imag)
    lost = (y_cos_low - x_sin_low) + (y_low * high.real - x_low * high.imag) + (y * low.real - one_x * low.imag)
    across, along = (y_cos - x_sin) + lost, one_x * high.real + y * high.imag
    return index.astype(jnp.float32) / _NUM_ROOTS, jnp.arctan2(across, along) * np.float32(1 / (2 * np.pi))


def _nearest_root(turns: jax.Array, turns_low: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """The index of the nearest root of unity to an angle in turns (a sum of two floats), and the remaining turns."""
    nearest = jnp.round((turns + turns_low) * _NUM_ROOTS)
    return nearest.astype(jnp.int32) % _NUM_ROOTS, (turns - nearest / _NUM_ROOTS) + turns_low


def _exact_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a * b as an unrounded sum of two floats, after Dekker (1971).

    Masking splits the factors into halves of 12 bits. All products are between halves and exact, so fused multiply-adds
    do not change the result.
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
