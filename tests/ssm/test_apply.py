"""Every way of computing the SSM, under jit, in values and gradients, against the float64 recurrence and its adjoint.

Held besides: reversing time is a flip, half precision is float32 inside, streaming is the whole sequence, memory does
not hold the [B, L, D, N/2] states of a sequence, and wrong arguments are refused.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from ssm_problems import (
    BACKWARD,
    BOTH,
    FORWARD,
    QUICK_COMPILE,
    errors,
    of_output,
    problem,
    value_and_gradients,
)

from diffussm_jax.ssm import (
    DISCRETIZATIONS,
    INITIALIZATIONS,
    from_phases,
    init_s4d,
    initial_state,
    ssm_apply,
    ssm_apply_bidirectional,
    ssm_apply_phases,
    step,
    to_complex,
    to_phases,
)
from diffussm_jax.ssm import METHODS as ALL_METHODS

# "auto" is one of the others, and kernels have tests of their own.
METHODS = [name for name in ALL_METHODS if name not in ("auto", "pallas")]
# The largest relative error of whole arrays that float32 may have, in values and in gradients.
VALUES = {"recurrent": 2e-6, "associative": 1e-5, "fft": 1e-6, "chunked": 1e-6}
GRADIENTS = {"recurrent": 2e-5, "associative": 5e-5, "fft": 2e-5, "chunked": 2e-5}

B, D, N = 2, 5, 64

# Each length once for each method, but where two lengths are one program: `recurrent` is one loop for any L, and
# `associative`, slow to compile, for any L beyond its chunk of 64. L = 64 is one chunk, 100 not a whole number of them.
CASES = [
    ("recurrent", "forward", 1), ("recurrent", "backward", 7), ("recurrent", "both", 100), ("recurrent", "both", 4096),
    ("associative", "forward", 1), ("associative", "backward", 7), ("associative", "both", 100),
    ("associative", "forward", 4096),
    ("fft", "forward", 1), ("fft", "backward", 7), ("fft", "forward", 64), ("fft", "both", 100),
    ("fft", "backward", 1024), ("fft", "both", 4096),
    ("chunked", "forward", 1), ("chunked", "backward", 7), ("chunked", "backward", 64), ("chunked", "both", 100),
    ("chunked", "backward", 1024), ("chunked", "forward", 4096),
]  # fmt: skip
BILINEAR_CASES = [
    ("recurrent", "backward", 100), ("associative", "forward", 7),
    ("fft", "forward", 100), ("chunked", "backward", 100),
    ("recurrent", "forward", 4096), ("fft", "both", 4096), ("chunked", "forward", 4096),
]  # fmt: skip


def is_long(discretization, method, direction, length):
    """Whether the case is left to the long tests: lengths between those of others, and bilinear at 4096 positions."""
    return length in (64, 1024) or (discretization == "bilinear" and length == 4096)


ALL_CASES = [("zoh", *case) for case in CASES] + [("bilinear", *case) for case in BILINEAR_CASES]
WELL_COMPILED = 1024  # positions from which rounding adds up
DIRECTIONS = {"forward": FORWARD, "backward": BACKWARD, "both": BOTH}


def _problem(direction, length, initialization=tuple(INITIALIZATIONS), discretization="zoh"):
    return problem(DIRECTIONS[direction], B, length, D, initialization=initialization, discretization=discretization)


@functools.cache
def _function(method, direction, discretization="zoh"):
    """(params, u) -> y."""

    def apply(params, u):
        if direction == "both":
            return ssm_apply_bidirectional(*params, u, method=method, discretization=discretization)
        return ssm_apply(*params, u, method=method, discretization=discretization, reverse=direction == "backward")

    return apply


@functools.cache
def _jitted(method, direction, discretization="zoh"):
    return jax.jit(_function(method, direction, discretization), compiler_options=QUICK_COMPILE)


def test_every_method_is_tested():
    assert {method for method, _, _ in CASES} == {method for method, _, _ in BILINEAR_CASES} == set(METHODS)
    assert set(VALUES) == set(GRADIENTS) == set(METHODS)
    assert {"zoh", "bilinear"} == set(DISCRETIZATIONS)


@pytest.mark.parametrize(
    ("discretization", "method", "direction", "length"),
    [pytest.param(*case, marks=[pytest.mark.slow] if is_long(*case) else []) for case in ALL_CASES],
)
def test_values_and_gradients(discretization, method, direction, length):
    """Of each initialisation, whose errors are apart."""
    p = _problem(direction, length, discretization=discretization)
    function = _function(method, direction, discretization)
    of_sequences, of_parameters = errors(function, p, is_quick=length < WELL_COMPILED)
    assert len(of_sequences) == 2 * len(INITIALIZATIONS)
    assert of_output(of_sequences) < VALUES[method], of_sequences
    gradients = of_sequences | of_parameters
    assert max(gradients.values()) < GRADIENTS[method], gradients


@pytest.mark.parametrize("num_phases", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("method", METHODS)
def test_phases_are_the_same_sequence(method, num_phases):
    """150 positions: two chunks of 64 and a part, which two phases share and three do not."""
    p = _problem("both", 150, "lin")

    def apply(params, u):
        y = ssm_apply_phases(params, to_phases(u, num_phases), reverse=BOTH, method=method)
        return from_phases(y).reshape(B, 150, 2 * D)

    of_sequences, of_parameters = errors(apply, p)
    assert of_output(of_sequences) < VALUES[method]
    assert max((of_sequences | of_parameters).values()) < GRADIENTS[method], of_parameters


@pytest.mark.parametrize("method", METHODS)
def test_reverse_of_flipped_is_flipped_of_forward(method):
    p = _problem("both", 100)
    p = p._replace(params=[p.params[0]] * 2)
    both = _function(method, "both")  # as it was compiled above
    y, y_of_flipped = (value_and_gradients(both, p._replace(u=u))[0] for u in (p.u, jnp.flip(p.u, 1)))
    forward, backward_of_flipped = np.split(y, 2, -1)[0], np.split(y_of_flipped, 2, -1)[1]
    assert oracles.relative_error(backward_of_flipped, np.flip(forward, 1)) < VALUES[method]


def test_defaults_are_forward_zoh():
    """One of them also outside jit, under which all else runs."""
    p = _problem("forward", 7, "legs")
    assert oracles.relative_error(ssm_apply(*p.params, jnp.asarray(p.u)), p.y) < VALUES["recurrent"]
    p = _problem("both", 7, "legs")
    y = jax.jit(ssm_apply_bidirectional, compiler_options=QUICK_COMPILE)(*p.params, p.u)
    assert oracles.relative_error(y, p.y) < VALUES["recurrent"]


@pytest.mark.parametrize(
    ("method", "direction", "dtype"),
    [("fft", "both", "bfloat16")]
    + [(name, "forward", "float16") for name in METHODS]
    + [(name, "forward", "bfloat16") for name in METHODS if name != "chunked"],
)
def test_half_precision_is_rounded_once_on_the_way_out(method, direction, dtype):
    p = _problem(direction, 7, "lin")
    u = jnp.asarray(p.u).astype(dtype)
    y = _jitted(method, direction)(p.params, u)
    assert y.dtype == dtype
    parts = [
        oracles.recurrence(oracles.exactly(real, params), np.asarray(u, np.float64), reverse=reverse)
        for real, params, reverse in zip(p.reals, p.params, [False, True], strict=False)
    ]
    expected = np.concatenate(parts, -1).astype(dtype)
    # All but the few that lie at a boundary of rounding; arithmetic in half precision would miss about half of them.
    assert np.mean(np.asarray(y) == expected) > 0.98


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_streaming_is_the_whole_sequence(discretization):
    params, u = to_complex(init_s4d(jax.random.key(0), D, N, initialization="inv")), oracles.normal(5, B, 40, D)
    one_step = jax.jit(step, static_argnames="discretization")
    state = initial_state(params, B)
    assert state.shape == (B, D, N // 2) and state.dtype == np.complex64
    y = np.asarray(_jitted("fft", "forward", discretization)([params], u))
    for i in range(u.shape[1]):
        state, y_i = one_step(params, state, u[:, i], discretization=discretization)
        assert y_i.dtype == np.float32
        np.testing.assert_allclose(y_i, y[:, i], rtol=0, atol=VALUES["recurrent"] * np.abs(y).max(), err_msg=f"{i=}")


def test_step_keeps_the_dtype_of_the_input_and_a_complex64_state():
    params = to_complex(init_s4d(jax.random.key(0), D, N))
    state, y = jax.jit(step)(params, initial_state(params, B), jnp.ones((B, D), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and state.dtype == np.complex64


@pytest.mark.parametrize("method", ["associative", "chunked"])
def test_memory_stays_below_the_states_of_a_sequence(method):
    """Forward and gradients of all at L = 16384, where the states alone would be 1 GB a direction."""
    length, width = 16384, 256
    real = jax.eval_shape(lambda: init_s4d(jax.random.key(0), width, N))
    u = jax.ShapeDtypeStruct((1, length, width), jnp.float32)

    def loss(reals, u):
        return jnp.sum(_function(method, "both")([to_complex(real) for real in reals], u) ** 2)

    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower([real, real], u)
    compiled = lowered.compile(QUICK_COMPILE)  # the buffers are the same
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9


def _call(function, u_shape, widths=(D, D), **options):
    """The shape of the result: arguments are refused before anything is computed."""

    def call():
        params = [to_complex(init_s4d(jax.random.key(0), width, N)) for width in widths]
        return function(*(params[:1] if function is ssm_apply else params), jnp.zeros(u_shape), **options)

    return jax.eval_shape(call)


@pytest.mark.parametrize("function", [ssm_apply, ssm_apply_bidirectional])
def test_unknown_names(function):
    with pytest.raises(ValueError, match="unknown SSM method 'fast'; choose one of " + ", ".join(ALL_METHODS)):
        _call(function, (B, 4, D), method="fast")
    for method in METHODS:
        with pytest.raises(ValueError, match="unknown discretization 'euler'; choose one of zoh, bilinear"):
            _call(function, (B, 4, D), method=method, discretization="euler")


@pytest.mark.parametrize("function", [ssm_apply, ssm_apply_bidirectional])
@pytest.mark.parametrize("shape", [(4, D), (B, 4, D + 1), (B, D, 4), (1, B, 4, D)])
def test_input_must_fit_the_parameters(function, shape):
    with pytest.raises(ValueError, match=r"u must be \[B, L, D\] with D = 5 .* got shape \(" + str(shape)[1:-1]):
        _call(function, shape)


@pytest.mark.parametrize("function", [ssm_apply, ssm_apply_bidirectional])
def test_input_must_have_a_position(function):
    with pytest.raises(ValueError, match=r"at least one position, got shape \(2, 0, 5\)"):
        _call(function, (B, 0, D))


@pytest.mark.parametrize("function", [ssm_apply, ssm_apply_bidirectional])
def test_the_platform_must_be_known_and_have_the_kernel(function):
    with pytest.raises(ValueError, match="unknown platform 'npu'; choose one of cpu, gpu, tpu"):
        _call(function, (B, 4, D), platform="npu")
    with pytest.raises(ValueError, match="'pallas' has a kernel for .*, none for cpu"):
        _call(function, (B, 4, D), method="pallas", platform="cpu")


@pytest.mark.parametrize("widths", [(D, D + 1), (D + 1, D)])
def test_both_directions_must_fit_the_input(widths):
    with pytest.raises(ValueError, match=r"u must be \[B, L, D\]"):
        _call(ssm_apply_bidirectional, (B, 4, D), widths)
