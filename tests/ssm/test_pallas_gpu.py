"""The GPU kernel as plain JAX: values and gradients against the float64 recurrence, and `recurrent`; compiled for H100.

Sequences that are shorter than a chunk and not a whole number of chunks, in one and in several phases; batches that do
not fill a block of sequences, and several blocks.
"""

import functools
import importlib.util
import re
import warnings

import jax
import jax.numpy as jnp
import oracles
import pytest
from ssm_problems import (
    BACKWARD,
    BOTH,
    FORWARD,
    QUICK_COMPILE,
    compiled_kernels,
    errors,
    from_sequence,
    problem,
    value_and_gradients,
)

from diffussm_jax.ssm import init_s4d, ssm_apply_bidirectional, to_complex, to_phases
from diffussm_jax.ssm.pallas_gpu import _warn_of_triton, pallas_gpu

# The largest relative error of whole arrays. In bfloat16, outputs are rounded and so are some operands that lead to
# them; what leads to the gradients of parameters is not.
SEQUENCES = {"float32": 2e-6, "bfloat16": 5e-3}
PARAMETERS = {"float32": 3e-6, "bfloat16": 5e-5}

# reverse, phases, batch, length, width, initialisation, discretisation, dtype. A block holds 16 sequences here. Three
# phases are interleaved before the kernel.
CASES = [
    (FORWARD, 1, 3, 7, 3, "inv", "zoh", "float32"),
    pytest.param(BACKWARD, 2, 3, 100, 2, "legs", "bilinear", "float32", marks=pytest.mark.slow),
    pytest.param(BOTH, 2, 20, 150, 2, "legs", "zoh", "float32", marks=pytest.mark.slow),
    ((True, False), 4, 2, 300, 2, "lin", "bilinear", "float32"),
    (BOTH, 2, 20, 200, 2, "inv", "zoh", "bfloat16"),
    pytest.param(BOTH, 1, 3, 300, 2, "legs", "bilinear", "bfloat16", marks=pytest.mark.slow),
    pytest.param(BOTH, 4, 3, 300, 2, "lin", "zoh", "bfloat16", marks=pytest.mark.slow),
    (BACKWARD, 3, 3, 90, 2, "lin", "zoh", "float32"),
]


@pytest.mark.parametrize(
    ("reverse", "phases", "batch", "length", "width", "initialization", "discretization", "dtype"), CASES
)
def test_values_and_gradients(reverse, phases, batch, length, width, initialization, discretization, dtype):
    options = {"initialization": initialization, "discretization": discretization, "dtype": dtype}
    kernel = from_sequence(pallas_gpu, phases, reverse, discretization, max_rows=16)
    sequences, parameters = errors(kernel, problem(reverse, batch, length, width, **options))
    assert max(sequences.values()) < SEQUENCES[dtype], sequences
    assert max(parameters.values()) < PARAMETERS[dtype], parameters


def test_agrees_with_the_recurrence_of_the_package():
    p = problem(BOTH, 20, 150, 2, initialization="legs")
    actual = value_and_gradients(from_sequence(pallas_gpu, 2, BOTH, "zoh", max_rows=16), p)  # one of the cases above
    expected = value_and_gradients(lambda params, u: ssm_apply_bidirectional(*params, u, method="recurrent"), p)
    of_each = jax.tree.map(oracles.relative_error, actual, expected)
    assert max(jax.tree.leaves(of_each)) < 5e-6, of_each


def test_few_states():
    """Fewer than fill the side of a matrix, which is a power of two and at least 16."""
    real = init_s4d(jax.random.key(0), 3, 6, initialization="inv")
    real["D"] = jnp.zeros_like(real["D"])  # or it would hide errors
    u = oracles.normal(1, 1, 200, 3)
    y = jax.jit(from_sequence(pallas_gpu, 1, FORWARD), compiler_options=QUICK_COMPILE)([to_complex(real)], u)
    expected = oracles.recurrence(oracles.exactly(real, to_complex(real)), u)
    assert oracles.relative_error(y, expected) < SEQUENCES["float32"]


def test_float32_products_are_of_full_precision():
    """As the kernel asks of the GPU; a CPU has no other, so that values do not show it."""
    p = problem(FORWARD, 3, 7, 3)
    kernel = functools.partial(pallas_gpu, discretization="zoh", reverse=FORWARD)
    u, dy = to_phases(p.u, 1), to_phases(p.dy, 1)[:, None]
    jaxpr = str(jax.make_jaxpr(lambda params, u, dy: jax.vjp(kernel, params, u)[1](dy))(p.params, u, dy))
    products = re.findall(r"dot_general\[(.*?)\]\s", jaxpr, re.DOTALL)
    assert len(products) > 12 and all("precision=(Precision.HIGHEST, Precision.HIGHEST)" in x for x in products), (
        products
    )


def test_the_deprecated_backend_is_announced_once():
    p = problem(FORWARD, 3, 7, 3)
    kernel = functools.partial(pallas_gpu, discretization="zoh", reverse=FORWARD)
    _warn_of_triton.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for num_phases in (1, 2):
            jax.make_jaxpr(kernel)(p.params, to_phases(p.u[:, :6], num_phases))
    messages = [str(x.message) for x in caught if "Triton" in str(x.message)]
    assert len(messages) == (1 if jax.__version_info__ >= (0, 11) else 0), messages
    assert all("'auto' and 'chunked' do not need it" in message for message in messages)


def _refused(params, u, message, **options):
    with pytest.raises(ValueError, match=message):
        pallas_gpu(params, u, **{"discretization": "zoh", "reverse": FORWARD, "interpret": True} | options)


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_other_dtypes_are_refused(dtype):
    u = jnp.zeros((1, 3, 3, 7), dtype)
    message = f"u must be float32 or bfloat16 for the GPU kernel, got {dtype}"
    _refused(problem(FORWARD, 3, 7, 3).params, u, message)


def test_unknown_discretization():
    message = "unknown discretization 'euler'; choose one of zoh, bilinear"
    _refused(problem(FORWARD, 3, 7, 3).params, jnp.zeros((1, 3, 3, 7)), message, discretization="euler")


@pytest.mark.parametrize("max_rows", [8, 24, 128])
def test_sizes_of_blocks(max_rows):
    message = f"max_rows must be one of 16, 32, 64, got {max_rows}"
    _refused(problem(FORWARD, 3, 7, 3).params, jnp.zeros((1, 3, 3, 7)), message, max_rows=max_rows)


def test_too_many_states():
    params = [to_complex(init_s4d(jax.random.key(0), 3, 258))]
    _refused(params, jnp.zeros((1, 3, 1, 7)), "room for 256 states, got 258")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None and importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX's CUDA plugin is not installed (extra plan-gpu or cuda12)",
)
@pytest.mark.parametrize(("shape", "dtype"), [((2, 1152, 16, 512, 64), "bfloat16"), ((1, 24, 5, 100, 64), "float32")])
def test_compiles_for_an_h100(shape, dtype):
    """Forward and gradients."""
    assert compiled_kernels("h100", "gpu", "__gpu$xla.gpu.triton", shape, dtype) == "2 kernels"
