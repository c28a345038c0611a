"""65,536 positions, the latents of a 2,048-pixel image: errors over whole arrays, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffussm_jax.ssm import INITIALIZATIONS, init_s4d, ssm_apply, ssm_apply_bidirectional, to_complex

L, D, N = 65_536, 2, 64
METHODS = ("fft", "chunked", "recurrent")
FLOAT32, BFLOAT16 = 1e-5, 5e-3
RECURRENT_PARAMETERS = 5e-5  # their gradients add up L numbers one after the other, in float32


@functools.cache
def problem(initialization):
    reals = [init_s4d(jax.random.key(i), D, N, initialization=initialization) for i in range(2)]
    params = [to_complex(real) for real in reals]
    # Numbers that bfloat16 has, so that both dtypes have the same problem.
    u, dy = (np.asarray(jnp.bfloat16(oracles.normal(i, 1, L, i * D))).astype(np.float32) for i in (1, 2))
    outputs, d_reals, du = [], [], 0
    for i, real in enumerate(reals):
        exact, backward = oracles.exactly(real, params[i]), {"reverse": i == 1}
        outputs.append(oracles.recurrence(exact, u, **backward))
        d_real, part = oracles.recurrence_gradients(exact, u, dy[..., i * D : (i + 1) * D], **backward)
        d_reals.append(d_real)
        du = du + part
    return reals, params, u, dy, np.concatenate(outputs, -1), d_reals, du


@functools.partial(jax.jit, static_argnums=4)
def value_and_gradients(params, reals, u, dy, method):
    y, pull_back = jax.vjp(lambda params, u: ssm_apply_bidirectional(*params, u, method=method), params, u)
    d_params, du = pull_back(dy)
    _, pull_back_to_real = jax.vjp(lambda reals: [to_complex(real) for real in reals], reals)
    return y, *pull_back_to_real(d_params), du


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize(("method", "dtype"), [*((method, "float32") for method in METHODS), ("chunked", "bfloat16")])
def test_initial_parameters(method, dtype, initialization):
    reals, params, u, dy, exact_y, exact_d_reals, exact_du = problem(initialization)
    y, d_reals, du = value_and_gradients(params, reals, jnp.asarray(u, dtype), jnp.asarray(dy, dtype), method)
    sequences = {"y": oracles.relative_error(y.astype(jnp.float32), exact_y)}
    sequences["u"] = oracles.relative_error(du.astype(jnp.float32), exact_du)
    parameters = {}
    for i, (actual, exact) in enumerate(zip(d_reals, exact_d_reals, strict=True)):
        parameters |= {f"{name} {i}": oracles.relative_error(actual[name], exact[name]) for name in exact}
    bound = FLOAT32 if dtype == "float32" else BFLOAT16
    assert max(sequences.values()) < bound, sequences
    assert max(parameters.values()) < (RECURRENT_PARAMETERS if method == "recurrent" else bound), parameters


def plain_recurrence(real, u):
    """The recurrence in float32 with Lambda_bar rounded once: u [1, L, D] to y."""
    p = oracles.complex_parameters(real)
    Lambda_bar, B_bar = (x.astype(np.complex64) for x in oracles.discretize(p["Lambda"], p["B"], p["dt"], "zoh"))
    C, x, y = p["C"].astype(np.complex64), np.zeros(Lambda_bar.shape, np.complex64), np.empty_like(u)
    for k in range(u.shape[1]):
        x = Lambda_bar * x + B_bar * u[0, k, :, None]
        y[0, k] = 2 * np.sum(C * x, -1).real + np.float32(p["D"]) * u[0, k]
    return y


@pytest.mark.parametrize("decay", [1e-6, 1e-5, 1e-4])
def test_slow_decay(decay):
    """dt |Re Lambda| down to 1e-6, so that a state remembers more than the sequence."""
    real = init_s4d(jax.random.key(0), D, N, dt_min=1e-3, dt_max=1.001e-3)
    real["log_neg_re"] = jnp.log(decay / jnp.exp(real["log_dt"]))[:, None] + jnp.zeros_like(real["log_neg_re"])
    params, u = to_complex(real), oracles.normal(1, 1, L, D)
    exact = oracles.exactly(real, params)
    expected = oracles.recurrence(exact, u)
    bound = 2 * oracles.relative_error(plain_recurrence(exact, u), expected)
    errors = {}
    for method in METHODS:
        y = jax.jit(functools.partial(ssm_apply, method=method))(params, u)
        errors[method] = oracles.relative_error(y, expected)
    assert max(errors.values()) < bound, (errors, bound)
