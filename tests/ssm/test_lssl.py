"""LSSL's kernel and recurrence against the dense float64 recurrence, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_dense
import pytest
from ssm_problems import QUICK_COMPILE, WELL_COMPILED

from diffussm_jax.ssm import init_lssl, lssl_kernel, lssl_step, to_lssl
from diffussm_jax.ssm.hippo import legs

D = 6


def parameters(state_size):
    """Initial parameters, those of every other channel changed as by training."""
    real = jax.jit(functools.partial(init_lssl, width=D, state_size=state_size))(jax.random.key(0))
    rng, changed = np.random.default_rng(0), {}
    for name, value in real.items():
        change = 0.3 * rng.normal(size=value.shape)
        change[::2] = 0
        changed[name] = np.float32(value + change)
    return changed


def system_of(real):
    exact = {name: np.asarray(value, np.float64) for name, value in real.items()}
    A = legs(real["B"].shape[1])[0]
    dt = np.asarray(jax.jit(to_lssl)(real).dt, np.float64)
    return {"A": np.broadcast_to(A, (D, *A.shape)), "B": exact["B"], "C": exact["C"], "dt": dt, "D": exact["D"]}


def largest_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@functools.partial(jax.jit, static_argnums=(2, 3), compiler_options=QUICK_COMPILE)
def kernel_and_gradients(real, dK, length, alpha):
    K, pull_back = jax.vjp(lambda real: lssl_kernel(to_lssl(real), length, alpha=alpha), real)
    return K, *pull_back(dK)


@pytest.mark.parametrize(
    ("state_size", "length", "alpha"),
    [(1, 9, 0.5), (4, 1, 0.5), (4, 7, 1.0), (16, 64, 0.75), (16, 100, 0.5), (64, 100, 0.5), (16, 4096, 0.5)],
)
def test_kernel_and_gradients(state_size, length, alpha):
    """Of sum(dK * K), relative to the largest value."""
    real, dK = parameters(state_size), oracles.normal(1, D, length)
    K, gradients = kernel_and_gradients(real, dK, length, alpha)
    system, impulse = system_of(real) | {"D": np.zeros(D)}, np.zeros((1, length, D))
    impulse[:, 0] = 1
    expected, _ = oracles_dense.recurrence_gradients(system, impulse, dK.T[None], alpha=alpha)
    expected |= {"log_dt": expected["dt"] * system["dt"]}
    errors = {"K": largest_error(K, oracles_dense.recurrence(system, impulse, alpha=alpha)[0].T)}
    errors |= {name: largest_error(gradients[name], expected[name]) for name in ("B", "C", "log_dt")}
    print(state_size, length, alpha, {name: f"{error:.1e}" for name, error in errors.items()})
    assert errors["K"] <= 2e-6
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_steps_are_the_recurrence(alpha):
    real, length = parameters(16), 60
    params, u = to_lssl(real), oracles.normal(2, 2, length, D)

    @functools.partial(jax.jit, compiler_options=WELL_COMPILED)
    def stream(params, u):
        def body(state, u_t):
            return lssl_step(params, state, u_t, alpha=alpha)

        return jax.lax.scan(body, jnp.zeros((2, D, 16)), u.swapaxes(0, 1))[1].swapaxes(0, 1)

    assert largest_error(stream(params, u), oracles_dense.recurrence(system_of(real), u, alpha=alpha)) <= 2e-6
    assert stream(params, jnp.asarray(u, jnp.bfloat16)).dtype == jnp.bfloat16


def test_length_must_be_positive():
    with pytest.raises(ValueError, match="length must be at least 1, got -2"):
        lssl_kernel(to_lssl(init_lssl(jax.random.key(0), D, 4)), -2)
