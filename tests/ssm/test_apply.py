"""Every way of computing the SSM, under jit, in values and gradients, against the float64 recurrence and its adjoint.

Held besides: reversing time is a flip, half precision is float32 inside, streaming is the whole sequence, memory does
not hold the [B, L, D, N/2] states of a sequence, and wrong arguments are refused.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffussm_jax.ssm import (
    DISCRETIZATIONS,
    INITIALIZATIONS,
    init_s4d,
    initial_state,
    ssm_apply,
    ssm_apply_bidirectional,
    step,
    to_complex,
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

# Compiling takes most of the time of these tests. Half of it is the optimisation of machine code, left out but where
# rounding adds up.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
WELL_COMPILED = 1024


def _real_parameters(initialization="legs", seed=0, width=D):
    return init_s4d(jax.random.key(seed), width, N, initialization=initialization)


class _Problem(NamedTuple):
    reals: list  # of each direction
    params: list
    u: np.ndarray
    dy: np.ndarray
    y: np.ndarray  # of the oracle, as are the gradients
    d_reals: list
    du: np.ndarray


@functools.cache
def _problem(direction, length, initialization, discretization="zoh"):
    backwards = {"forward": [False], "backward": [True], "both": [False, True]}[direction]
    reals = [_real_parameters(initialization, seed) for seed in range(len(backwards))]
    params = [to_complex(real) for real in reals]
    u, dy = oracles.normal(1, B, length, D), oracles.normal(2, B, length, D * len(backwards))
    outputs, gradients = [], []
    for real, p, reverse, dy_part in zip(reals, params, backwards, np.split(dy, len(backwards), -1), strict=True):
        options = {"discretization": discretization, "reverse": reverse}
        outputs.append(oracles.recurrence(oracles.exactly(real, p), u, **options))
        gradients.append(oracles.recurrence_gradients(oracles.exactly(real, p), u, dy_part, **options))
    d_reals, dus = zip(*gradients, strict=True)
    return _Problem(reals, params, u, dy, np.concatenate(outputs, -1), list(d_reals), sum(dus))


def _apply(params, u, method, direction, discretization="zoh"):
    if direction == "both":
        return ssm_apply_bidirectional(*params, u, method=method, discretization=discretization)
    return ssm_apply(*params, u, method=method, discretization=discretization, reverse=direction == "backward")


jitted_apply = jax.jit(
    _apply, static_argnames=("method", "direction", "discretization"), compiler_options=QUICK_COMPILE
)


def _vjp(reals, params, u, dy, method, direction, discretization):
    y, pull_back = jax.vjp(lambda params, u: _apply(params, u, method, direction, discretization), params, u)
    d_params, du = pull_back(dy)
    _, pull_back_to_real = jax.vjp(lambda reals: [to_complex(real) for real in reals], reals)
    return y, *pull_back_to_real(d_params), du


@functools.cache
def _jitted_vjp(is_well_compiled):
    options = None if is_well_compiled else QUICK_COMPILE
    return jax.jit(_vjp, static_argnums=(4, 5, 6), compiler_options=options)


def _value_and_gradients(reals, params, u, dy, method, direction, discretization="zoh"):
    """y, the gradients of each direction's real parameters, and du."""
    return _jitted_vjp(u.shape[1] >= WELL_COMPILED)(reals, params, u, dy, method, direction, discretization)


def test_every_method_is_tested():
    assert {method for method, _, _ in CASES} == {method for method, _, _ in BILINEAR_CASES} == set(METHODS)
    assert set(VALUES) == set(GRADIENTS) == set(METHODS)
    assert {"zoh", "bilinear"} == set(DISCRETIZATIONS)


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize(
    ("discretization", "method", "direction", "length"),
    [("zoh", *case) for case in CASES] + [("bilinear", *case) for case in BILINEAR_CASES],
)
def test_values_and_gradients(discretization, method, direction, length, initialization):
    p = _problem(direction, length, initialization, discretization)
    y, d_reals, du = _value_and_gradients(p.reals, p.params, p.u, p.dy, method, direction, discretization)
    assert y.dtype == np.float32
    assert oracles.relative_error(y, p.y) < VALUES[method]
    errors = {"u": oracles.relative_error(du, p.du)}
    for way, actual, expected in zip(["first", "second"], d_reals, p.d_reals, strict=False):
        assert sorted(actual) == sorted(oracles.REAL_PARAMETERS)
        errors |= {f"{name} {way}": oracles.relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < GRADIENTS[method], errors


@pytest.mark.parametrize("method", METHODS)
def test_reverse_of_flipped_is_flipped_of_forward(method):
    p = _problem("both", 100, "lin")
    reals, params = [p.reals[0]] * 2, [p.params[0]] * 2
    y, _, _ = _value_and_gradients(reals, params, p.u, p.dy, method, "both")
    y_of_flipped, _, _ = _value_and_gradients(reals, params, np.flip(p.u, 1), p.dy, method, "both")
    forward, backward_of_flipped = np.asarray(y)[..., :D], np.asarray(y_of_flipped)[..., D:]
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
    y = jitted_apply(p.params, u, method, direction)
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
    params, u = to_complex(_real_parameters("inv")), oracles.normal(5, B, 40, D)
    one_step = jax.jit(step, static_argnames="discretization")
    state = initial_state(params, B)
    assert state.shape == (B, D, N // 2) and state.dtype == np.complex64
    y = np.asarray(jitted_apply([params], u, "fft", "forward", discretization))
    for i in range(u.shape[1]):
        state, y_i = one_step(params, state, u[:, i], discretization=discretization)
        assert y_i.dtype == np.float32
        np.testing.assert_allclose(y_i, y[:, i], rtol=0, atol=VALUES["recurrent"] * np.abs(y).max(), err_msg=f"{i=}")


def test_step_keeps_the_dtype_of_the_input_and_a_complex64_state():
    params = to_complex(_real_parameters())
    state, y = jax.jit(step)(params, initial_state(params, B), jnp.ones((B, D), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and state.dtype == np.complex64


@pytest.mark.parametrize("method", ["associative", "chunked"])
def test_memory_stays_below_the_states_of_a_sequence(method):
    """Forward and gradients of all at L = 16384, where the states alone would be 1 GB a direction."""
    length, width = 16384, 256
    real = jax.eval_shape(lambda: _real_parameters(width=width))
    u = jax.ShapeDtypeStruct((1, length, width), jnp.float32)

    def loss(reals, u):
        return jnp.sum(_apply([to_complex(real) for real in reals], u, method, "both") ** 2)

    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower([real, real], u)
    compiled = lowered.compile(QUICK_COMPILE)  # the buffers are the same
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9


def _call(function, u_shape, widths=(D, D), **options):
    """The shape of the result: arguments are refused before anything is computed."""

    def call():
        params = [to_complex(_real_parameters(width=width)) for width in widths]
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
