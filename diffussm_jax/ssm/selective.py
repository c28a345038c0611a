"""S6, the selective state-space model of Mamba (Gu and Dao, arXiv 2312.00752, section 3.2, algorithm 2).

Step size, input and output weights of each position depend on the input: dt_l [D], B_l and C_l [N]. With a real
diagonal A [D, N], for each channel d and state n

    x_l = exp(dt_l A) x_{l-1} + g_l B_l u_l,    y_l = sum_n C_l x_l + D u_l

where g_l is dt_l ("euler", what Mamba's code computes) or (exp(dt_l A) - 1) / A ("zoh", the paper's equation 4).

Since the system changes with l, it is no convolution. The sequence is cut into chunks. Inside a chunk an associative
scan gives all states; a `lax.scan` carries the last one to the next chunk. The backward pass computes the states of a
chunk again, so that memory holds the [B, N, D] states of one chunk and those between chunks.

Arrays of states are [.., N, D], with channels last: vector units and TPU lanes are then full for any N.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# The fastest of 8 ... 256 on a CPU, forward and gradients at B = 4, L = 1024, D = 384, N = 16: a chunk stays in its
# cache. The states between chunks are then as large as u.
SELECTIVE_CHUNK = 16
SELECTIVE_DISCRETIZATIONS = ("euler", "zoh")


def _combine(earlier, later):
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]


@jax.custom_vjp
def _recurrence(decay: jax.Array, write: jax.Array, state: jax.Array) -> jax.Array:
    """x_l = decay_l x_{l-1} + write_l [c, ..] from the state x_{-1} [..].

    The adjoint is a recurrence too, a_l = decay_{l+1} a_{l+1} + dx_l. Written by hand, it takes 3/4 of the time of the
    transposed associative scan.
    """
    return _recurrence_forward(decay, write, state)[0]


def _recurrence_forward(decay, write, state):
    write = write.at[0].add(decay[0] * state)
    x = jax.lax.associative_scan(_combine, (decay, write))[1]
    return x, (decay, x, state)


def _recurrence_backward(residuals, dx):
    decay, x, state = residuals
    decay_of_next = jnp.concatenate([decay[1:], jnp.ones_like(decay[:1])])
    a = jax.lax.associative_scan(_combine, (decay_of_next, dx), reverse=True)[1]
    previous = jnp.concatenate([state[None], x[:-1]])
    return a * previous, a, decay[0] * a[0]


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _chunk(state, inputs, A, D, discretization):
    """The state [B, N, D] after c positions and their y [c, B, D], from u, dt [c, B, D] and B, C [c, B, N]."""
    u, dt, B, C = inputs
    dt_A = dt[:, :, None] * A.T
    gain = dt[:, :, None] if discretization == "euler" else jnp.expm1(dt_A) / A.T
    x = _recurrence(jnp.exp(dt_A), gain * u[:, :, None] * B[..., None], state)
    return x[-1], jnp.sum(C[..., None] * x, 2) + D * u


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    *,
    reverse: bool = False,
    discretization: str = "euler",
    chunk: int = SELECTIVE_CHUNK,
) -> jax.Array:
    """Runs the selective SSM over a sequence from a zero state (Mamba, arXiv 2312.00752, algorithm 2).

    States and sums are float32 for every dtype of the inputs.

    Args:
      u: [B, L, D] of any float dtype. Any L >= 1.
      dt: [B, L, D], positive.
      A: [D, N], negative.
      B, C: [B, L, N].
      D: [D], the skip.
      reverse: runs backward, x_l from x_{l+1}.
      discretization: "euler" or "zoh".
      chunk: positions of the associative scan. A longer one has fewer steps in sequence and takes more memory.

    Returns:
      y [B, L, D] in the dtype of `u`.

    Raises:
      ValueError: the shapes do not fit, or the discretization is unknown.
    """
    _check((u, dt, A, B, C, D), "BLD", discretization)
    batch, length, width = u.shape
    chunk = max(1, min(chunk, length))
    num_chunks = -(-length // chunk)
    A, D = A.astype(jnp.float32), D.astype(jnp.float32)

    def cut(x):  # [B, L, ..] -> [chunks, c, B, ..]
        x = jnp.flip(x, 1) if reverse else x
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, num_chunks * chunk - length), (0, 0)))
        return x.reshape(batch, num_chunks, chunk, -1).transpose(1, 2, 0, 3)

    body = jax.checkpoint(functools.partial(_chunk, A=A, D=D, discretization=discretization))
    initial = jnp.zeros((batch, *A.T.shape), jnp.float32)
    _, y = jax.lax.scan(body, initial, tuple(cut(x) for x in (u, dt, B, C)))
    y = y.transpose(2, 0, 1, 3).reshape(batch, -1, width)[:, :length].astype(u.dtype)
    return jnp.flip(y, 1) if reverse else y


def selective_step(
    state: jax.Array,
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    *,
    discretization: str = "euler",
) -> tuple[jax.Array, jax.Array]:
    """Advances the selective SSM by one position, for streaming; equal to `selective_scan`.

    Args:
      state: [B, D, N] float32, zeros before the first position.
      u: [B, D] of any float dtype.
      dt: [B, D], positive.
      A: [D, N], negative.
      B, C: [B, N].
      D: [D].
      discretization: "euler" or "zoh".

    Returns:
      The new state, and y [B, D] in the dtype of `u`, in the order of `step`.

    Raises:
      ValueError: as `selective_scan`.
    """
    _check((u, dt, A, B, C, D), "BD", discretization)
    inputs = tuple(x[None].astype(jnp.float32) for x in (u, dt, B, C))
    A, D = A.astype(jnp.float32), D.astype(jnp.float32)
    state, y = _chunk(state.swapaxes(1, 2), inputs, A, D, discretization)
    return state.swapaxes(1, 2), y[0].astype(u.dtype)


def _check(arrays: tuple[jax.Array, ...], dimensions: str, discretization: str) -> None:
    """Raises ValueError unless u has these dimensions and the others fit."""
    if discretization not in SELECTIVE_DISCRETIZATIONS:
        choices = ", ".join(SELECTIVE_DISCRETIZATIONS)
        raise ValueError(f"unknown discretization {discretization!r}; choose one of {choices}")
    u, _, A, *_ = arrays
    if u.ndim != len(dimensions) or 0 in u.shape or A.ndim != 2:
        raise ValueError(f"u must be [{', '.join(dimensions)}] and A [D, N], got {u.shape} and {A.shape}")
    of_channels, of_states = u.shape, (*u.shape[:-1], A.shape[1])
    expected = (of_channels, of_channels, (u.shape[-1], A.shape[1]), of_states, of_states, u.shape[-1:])
    for name, x, shape in zip(("u", "dt", "A", "B", "C", "D"), arrays, expected, strict=True):
        if x.shape != shape:
            raise ValueError(f"{name} must be {shape} to fit u {u.shape} and A {A.shape}, got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a float dtype, got {x.dtype}")


def init_s6(
    key: jax.Array,
    width: int,
    state_size: int = 16,
    *,
    dt_rank: int,
    dt_min: float = 1e-3,
    dt_max: float = 1e-1,
) -> dict[str, jax.Array]:
    """Initialises the parameters of S6 as Mamba's code does (arXiv 2312.00752, sections 3.5 and 3.6).

    A is S4D-real, A_n = -(n + 1) (S4D, arXiv 2206.11893, section 4.3). dt is log-uniform in [dt_min, dt_max] where the
    input is zero, and D is 1. The projections are uniform, with variance 1 / (3 fan_in) for B, C and the low rank of
    dt, and 1 / (3 dt_rank) from there to dt.

    Returns:
      float32: A_log [D, N], where A = -exp(A_log); x_proj [D, dt_rank + 2N], to the low rank of dt, B and C; dt_proj
      [D, dt_rank] and dt_bias [D], where dt = softplus(dt_proj . low rank + dt_bias); D [D].
    """
    x_key, dt_key, bias_key = jax.random.split(key, 3)

    def uniform(key, shape, fan_in):
        bound = float(fan_in**-0.5)
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    log_dt = jax.random.uniform(bias_key, (width,), jnp.float32, np.log(dt_min), np.log(dt_max))
    return {
        "A_log": jnp.tile(jnp.log(jnp.arange(1, state_size + 1, dtype=jnp.float32)), (width, 1)),
        "x_proj": uniform(x_key, (width, dt_rank + 2 * state_size), width),
        "dt_proj": uniform(dt_key, (width, dt_rank), dt_rank),
        "dt_bias": jnp.log(jnp.expm1(jnp.exp(log_dt))),  # the inverse of softplus
        "D": jnp.ones(width, jnp.float32),
    }
