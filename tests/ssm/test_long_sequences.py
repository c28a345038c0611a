"""65,536 positions, the latents of a 2,048-pixel image: errors over whole arrays, values and gradients."""

import functools

import jax
import numpy as np
import oracles
import pytest
from ssm_problems import BOTH, WELL_COMPILED, errors, from_sequence, problem

from diffussm_jax.ssm import (
    INITIALIZATIONS,
    init_s4d,
    ssm_apply,
    ssm_apply_bidirectional,
    to_complex,
)
from diffussm_jax.ssm.pallas_gpu import pallas_gpu
from diffussm_jax.ssm.pallas_tpu import pallas_tpu

L, D, N = 65_536, 2, 64
METHODS = ("fft", "chunked", "recurrent")
KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}  # interpreted
FLOAT32, BFLOAT16 = 1e-5, 5e-3
RECURRENT_PARAMETERS = 5e-5  # their gradients add up L numbers one after the other, in float32


@functools.cache
def function(method, discretization):
    if method in KERNELS:
        return from_sequence(KERNELS[method], 1, BOTH, discretization)
    return lambda params, u: ssm_apply_bidirectional(*params, u, method=method, discretization=discretization)


@pytest.mark.parametrize("discretization", ["zoh", pytest.param("bilinear", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((method, "float32") for method in METHODS[:2]),
        pytest.param("recurrent", "float32", marks=pytest.mark.slow),
        *(pytest.param(method, "float32", marks=pytest.mark.slow) for method in KERNELS),
        pytest.param("chunked", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_initial_parameters(method, dtype, discretization):
    """Of each initialisation, whose errors are apart."""
    # Of numbers that bfloat16 has, so that both dtypes have the same problem, whose answers are float64.
    options = {"initialization": tuple(INITIALIZATIONS), "discretization": discretization}
    p = problem(BOTH, 1, L, D, dtype="bfloat16", **options)
    p = p._replace(u=p.u.astype(dtype), dy=p.dy.astype(dtype))
    # Users run kernels as no interpreter compiles them, well or not.
    sequences, parameters = errors(function(method, discretization), p, is_quick=method in KERNELS)
    assert len(sequences) == 2 * len(INITIALIZATIONS)
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


def test_slow_decay():
    """dt |Re Lambda| down to 1e-6, so that a state remembers more than the sequence."""
    decays = np.array([1e-6, 1e-5, 1e-4], np.float32)  # of D channels each
    real = jax.jit(lambda key: init_s4d(key, len(decays) * D, N, dt_min=1e-3, dt_max=1.001e-3))(jax.random.key(0))
    decay_rates = np.repeat(decays, D) / np.exp(real["log_dt"])
    real["log_neg_re"] = np.broadcast_to(np.log(decay_rates)[:, None], real["log_neg_re"].shape)
    params, u = jax.jit(to_complex)(real), oracles.normal(1, 1, L, len(decays) * D)
    exact = oracles.exactly(real, params)
    expected = oracles.recurrence(exact, u)

    def errors(y):
        """Of each decay."""
        pairs = zip(*(np.split(x, len(decays), -1) for x in (y, expected)), strict=True)
        return [oracles.relative_error(*pair) for pair in pairs]

    bounds = errors(plain_recurrence(exact, u))
    for method in METHODS:
        apply = jax.jit(functools.partial(ssm_apply, method=method), compiler_options=WELL_COMPILED)
        found = errors(np.asarray(apply(params, u)))
        assert all(error < 2 * bound for error, bound in zip(found, bounds, strict=True)), (method, found, bounds)
