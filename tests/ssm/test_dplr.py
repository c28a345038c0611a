"""S4's kernel and recurrence against the dense float64 recurrence, which knows neither Cauchy sums nor Woodbury."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_dense
import pytest
from ssm_problems import QUICK_COMPILE, WELL_COMPILED

from diffussm_jax.ssm import dplr, dplr_kernel, dplr_legs, dplr_step, init_s4, initial_state, to_dplr
from diffussm_jax.ssm.hippo import legs

D = 6


def parameters(state_size, **steps):
    """Initial parameters, those of every other channel changed as by training."""
    real = jax.jit(functools.partial(init_s4, width=D, state_size=state_size, **steps))(jax.random.key(0))
    rng, changed = np.random.default_rng(0), {}
    for name, value in real.items():
        change = 0.3 * rng.normal(size=value.shape) * (np.abs(value) if name == "im" else 1)
        change[::2] = 0
        changed[name] = np.float32(value + change)
    return changed


def largest_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@functools.partial(jax.jit, static_argnums=2, compiler_options=QUICK_COMPILE)
def kernel_and_gradients(real, dK, length):
    K, pull_back = jax.vjp(lambda real: dplr_kernel(to_dplr(real), length), real)
    return K, *pull_back(dK)


def dt_terms(pairs, gradients):
    """The gradient of log_dt as terms [D, ..]: the kernel depends on dt Lambda, sqrt(dt) P and dt B alone."""
    of_B, of_P = (pairs[name].view(np.float64).reshape(D, -1) * gradients[name].reshape(D, -1) for name in "BP")
    return np.concatenate([gradients["log_neg_re"], pairs["Lambda"].imag * gradients["im"], of_B, of_P / 2], -1)


def kernel_errors(state_size, length):
    """Of the kernel, and of each parameter's gradient of sum(dK * K), relative to the largest value.

    The gradient of log_dt is a sum over states that nearly cancels. Its error is relative to the norm of the terms, and
    LegS makes up to 2e-5 of the rounding of dt Lambda.
    """
    real, dK = parameters(state_size), oracles.normal(1, D, length)
    K, gradients = kernel_and_gradients(real, dK, length)
    pairs = oracles_dense.pairs_of(real, jax.jit(to_dplr)(real)) | {"D": np.zeros(D)}
    system, impulse = oracles_dense.from_pairs(pairs), np.zeros((1, length, D))
    impulse[:, 0] = 1
    expected = oracles_dense.recurrence_gradients(system, impulse, dK.T[None])[0]
    expected = oracles_dense.to_pairs(expected, pairs)
    terms = dt_terms(pairs, expected)
    np.testing.assert_allclose(terms.sum(-1), expected["log_dt"], rtol=1e-6, atol=1e-9 * np.abs(terms).max())
    errors = {"K": largest_error(K, oracles_dense.recurrence(system, impulse)[0].T)}
    errors |= {name: largest_error(gradients[name], expected[name]) for name in expected if name != "D"}
    errors["log_dt"] *= np.abs(expected["log_dt"]).max() / np.linalg.norm(terms, axis=-1).max()
    return errors


@pytest.mark.parametrize(
    ("state_size", "length"),
    [
        *[(4, 1), (16, 63), (64, 7), (64, 100), (64, 4096)],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, 100), (16, 64), (64, 64), (16, 4096)]),
    ],
)
def test_kernel_and_gradients(state_size, length):
    errors = kernel_errors(state_size, length)
    print(state_size, length, {name: f"{error:.1e}" for name, error in errors.items()})
    assert errors.pop("K") <= 2e-6
    assert errors.pop("log_dt") <= 5e-5
    assert max(errors.values()) <= (1e-5 if length <= 100 else 1e-4), errors


def test_it_starts_at_legs():
    """The kernel is that of HiPPO-LegS, for any C in the basis of Legendre polynomials."""
    N, length = 8, 50
    real = init_s4(jax.random.key(0), D, N)
    C = oracles.normal(0, D, N)
    in_eigenbasis = (C @ dplr_legs(N)[3])[:, N // 2 :]
    real["C"] = jnp.asarray(np.stack([in_eigenbasis.real, in_eigenbasis.imag], -1), jnp.float32)
    K = jax.jit(lambda real: dplr_kernel(to_dplr(real), length), compiler_options=QUICK_COMPILE)(real)
    A, B = (np.broadcast_to(x, (D, *x.shape)) for x in legs(N))
    system = {"A": A, "B": B, "C": C, "dt": np.exp(np.asarray(real["log_dt"], np.float64)), "D": np.zeros(D)}
    impulse = np.zeros((1, length, D))
    impulse[:, 0] = 1
    assert largest_error(K, oracles_dense.recurrence(system, impulse)[0].T) <= 1e-6


def test_blocks_of_frequencies_change_nothing_and_keep_memory_small(monkeypatch):
    length = 8192
    real, dK = parameters(16), oracles.normal(1, D, length)
    at_once = kernel_and_gradients(real, dK, length)
    monkeypatch.setattr(dplr, "_BLOCK", 2**13)
    in_blocks = jax.jit(lambda *of: kernel_and_gradients.__wrapped__(*of, length), compiler_options=QUICK_COMPILE)
    compiled = in_blocks.lower(real, dK).compile()
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(compiled(real, dK)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(a).max())
    cauchy_matrix = D * 8 * (length // 2 + 1) * 8
    assert compiled.memory_analysis().temp_size_in_bytes < cauchy_matrix


def test_steps_are_the_convolution():
    real, length = parameters(16), 60
    params, u = to_dplr(real), oracles.normal(2, 2, length, D)

    @functools.partial(jax.jit, compiler_options=WELL_COMPILED)
    def stream(params, u):
        state = initial_state(params, u.shape[0])
        return jax.lax.scan(lambda state, u_t: dplr_step(params, state, u_t), state, u.swapaxes(0, 1))[1].swapaxes(0, 1)

    y = stream(params, u)
    expected = oracles_dense.recurrence(oracles_dense.from_pairs(oracles_dense.pairs_of(real, params)), u)
    assert largest_error(y, expected) <= 2e-6
    assert stream(params, jnp.asarray(u, jnp.bfloat16)).dtype == jnp.bfloat16
    K = np.asarray(jax.jit(dplr_kernel, static_argnums=1)(params, length), np.float64)
    convolved = sum(K[:, j] * np.pad(u, ((0, 0), (j, 0), (0, 0)))[:, :length] for j in range(length))
    assert largest_error(y, convolved + np.asarray(params.D) * u) <= 2e-6


def test_a_longer_kernel_starts_with_the_shorter_one():
    kernel = jax.jit(lambda real, length: dplr_kernel(to_dplr(real), length), static_argnums=1)
    short, long = (kernel(parameters(8), length) for length in (30, 100))
    assert largest_error(short, np.asarray(long)[:, :30]) <= 1e-6


def test_numbers_of_points_have_small_factors():
    for length in (*range(1, 300), 1000, 4095, 4096, 4097, 65_537):
        m, k = dplr._num_points(length)
        n = m << k
        assert length <= n <= max(1.25 * length, length + 1) and m <= 16, length
        assert 2**20 * 3**9 * 5**5 % n == 0, length


def test_errors():
    params = to_dplr(init_s4(jax.random.key(0), D, 4))
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        dplr_kernel(params, 0)
    with pytest.raises(ValueError, match="state_size must be even .* got 7"):
        init_s4(jax.random.key(0), D, 7)
