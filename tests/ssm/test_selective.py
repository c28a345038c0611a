"""The selective scan is the float64 recurrence, in values and gradients; streaming is the scan; memory is a chunk's."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_selective
import pytest

from diffussm_jax.ssm import selective_scan, selective_step
from diffussm_jax.ssm.selective import SELECTIVE_CHUNK, SELECTIVE_DISCRETIZATIONS, init_s6

NAMES = oracles_selective.NAMES
B, D, N = 2, 3, 4
DIRECTIONS = (False, True)


def arrays(length, dtype=np.float32):
    """u, dt, A, B, C, D: steps from 1e-3 to 1, so that states last from one position to all."""
    rng = np.random.default_rng(length)
    u, B_, C = (rng.normal(size=(B, length, n)) for n in (D, N, N))
    dt = np.exp(rng.uniform(np.log(1e-3), 0, (B, length, D)))
    A = -np.exp(rng.normal(0, 1, (D, N)))
    found = {"u": u, "dt": dt, "A": A, "B": B_, "C": C, "D": rng.normal(size=D)}
    return {name: jnp.asarray(x, np.float32 if name in "AD" else dtype) for name, x in found.items()}


@functools.partial(jax.jit, static_argnames=("cases", "chunk"))
def run(values, dy, cases, chunk=SELECTIVE_CHUNK):
    """y and the gradients by all arrays, of each (reverse, discretization)."""

    def vjp(reverse, discretization):
        options = {"reverse": reverse, "discretization": discretization, "chunk": chunk}
        y, pull_back = jax.vjp(lambda v: selective_scan(**v, **options), values)
        return y, pull_back(dy)[0]

    return [vjp(*case) for case in cases]


CASES = tuple((reverse, name) for reverse in DIRECTIONS for name in SELECTIVE_DISCRETIZATIONS)


@pytest.mark.parametrize(("length", "cases"), [(1, CASES[:1]), (7, CASES[2:3]), (64, CASES[1:3]), (100, CASES)])
def test_values_and_gradients(length, cases):
    values, dy = arrays(length), oracles.normal(1, B, length, D)
    for case, (y, gradients) in zip(cases, run(values, dy, cases), strict=True):
        options = dict(zip(("reverse", "discretization"), case, strict=True))
        assert oracles.relative_error(y, oracles_selective.scan(values, **options)) <= 1e-6
        expected = oracles_selective.scan_gradients(values, dy, **options)
        for name in NAMES:
            if length > 1 or name != "A" or case[1] == "zoh":  # by A it is zero at the first position
                assert oracles.relative_error(gradients[name], expected[name]) <= 5e-6, (case, name)


def test_the_oracles_gradients_are_its_finite_differences():
    values, dy, eps = arrays(9), oracles.normal(1, B, 9, D).astype(np.float64), 1e-6
    values = {name: np.asarray(x, np.float64) for name, x in values.items()}
    for reverse, discretization in CASES:
        options = {"reverse": reverse, "discretization": discretization}
        gradients = oracles_selective.scan_gradients(values, dy, **options)
        for name in NAMES:
            along = oracles.normal(2, *values[name].shape)
            high, low = (
                np.sum(dy * oracles_selective.scan(values | {name: values[name] + sign * eps * along}, **options))
                for sign in (1, -1)
            )
            assert (high - low) / (2 * eps) == pytest.approx(np.sum(gradients[name] * along), rel=1e-6), name


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_any_chunk_gives_the_same(chunk):
    values, dy = arrays(23), oracles.normal(1, B, 23, D)
    (expected,), (found,) = (run(values, dy, CASES[2:3], c) for c in (SELECTIVE_CHUNK, chunk))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("discretization", SELECTIVE_DISCRETIZATIONS)
def test_streaming_is_the_scan(discretization):
    values = arrays(40)

    @jax.jit
    def stream(values):
        def body(state, inputs):
            u, dt, B_, C = inputs
            return selective_step(state, u, dt, values["A"], B_, C, values["D"], discretization=discretization)

        along = tuple(values[name].swapaxes(0, 1) for name in ("u", "dt", "B", "C"))
        return jax.lax.scan(body, jnp.zeros((B, D, N)), along)[1].swapaxes(0, 1)

    expected = oracles_selective.scan(values, discretization=discretization)
    assert oracles.relative_error(stream(values), expected) <= 1e-6


def test_half_precision_is_float32_inside():
    values = arrays(100, jnp.bfloat16)
    ((y, gradients),) = run(values, jnp.asarray(oracles.normal(1, B, 100, D), jnp.bfloat16), CASES[:1])
    assert y.dtype == gradients["u"].dtype == jnp.bfloat16 and gradients["A"].dtype == jnp.float32
    expected = oracles_selective.scan({name: np.asarray(x, np.float32) for name, x in values.items()})
    # Half a unit in the last of 8 bits, on the mean: the result alone is rounded.
    assert oracles.relative_error(np.asarray(y, np.float32), expected) <= 2e-3


def array_sizes(jaxpr):
    """Elements of every array that is computed in a jaxpr, those inside of its loops too."""
    sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    for value in (value for eqn in jaxpr.eqns for value in eqn.params.values()):
        inner = getattr(value, "jaxpr", value)
        sizes += array_sizes(inner) if hasattr(inner, "eqns") else []
    return sizes


def test_the_gradient_keeps_one_chunk_of_states_and_those_between_chunks():
    length, width = 64 * SELECTIVE_CHUNK, 32
    shapes = {"u": (B, length, width), "A": (width, 16), "B": (B, length, 16), "D": (width,)}
    shapes |= {"dt": shapes["u"], "C": shapes["B"]}
    values = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    jaxpr = jax.make_jaxpr(jax.grad(lambda v: selective_scan(**v).sum()))(values).jaxpr
    states = B * width * 16
    assert max(array_sizes(jaxpr)) == 64 * states  # one for each chunk; all would be 1024


@pytest.mark.parametrize(
    "change,message",
    [
        ({"discretization": "bilinear"}, "discretization 'bilinear'; choose one of euler, zoh"),
        ({"u": (B, D)}, r"u must be \[B, L, D\].*got \(2, 3\)"),
        ({"u": (B, 0, D)}, r"u must be \[B, L, D\].*got \(2, 0, 3\)"),
        ({"dt": (B, 8, 1)}, r"dt must be \(2, 8, 3\).*got shape \(2, 8, 1\)"),
        ({"C": (B, 8, N + 1)}, r"C must be \(2, 8, 4\).*got shape \(2, 8, 5\)"),
        ({"D": (1,)}, r"D must be \(3,\).*got shape \(1,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    changed = {name: jnp.zeros(value) if isinstance(value, tuple) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**(arrays(8) | changed))
    with pytest.raises(ValueError, match="dt must be of a float dtype, got int32"):
        selective_scan(**(arrays(8) | {"dt": jnp.ones((B, 8, D), jnp.int32)}))


def test_parameters_start_as_mambas():
    p = jax.jit(lambda key: init_s6(key, 4096, 8, dt_rank=16))(jax.random.key(0))
    np.testing.assert_allclose(np.exp(p["A_log"]), np.broadcast_to(np.arange(1, 9), (4096, 8)), rtol=1e-6)
    dt = np.logaddexp(0, np.asarray(p["dt_bias"], np.float64))
    assert dt.min() >= 1e-3 * (1 - 1e-4) and dt.max() <= 0.1 * (1 + 1e-4)
    assert np.quantile(np.log10(dt), [0.25, 0.5, 0.75]) == pytest.approx([-2.5, -2, -1.5], abs=0.05)
    assert (p["D"] == 1).all() and p["dt_proj"].shape == (4096, 16) and p["x_proj"].shape == (4096, 16 + 2 * 8)
    for name, bound in (("dt_proj", 0.25), ("x_proj", 1 / 64)):
        assert np.abs(p[name]).max() <= bound and p[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
