"""The TPU kernel as plain JAX: values and gradients against the float64 recurrence, and `recurrent`; compiled for TPUs.

Batches of whole tiles in one and in several phases, and others; sequences that are shorter than a chunk, not a whole
number of chunks, and spread over several blocks of rows; widths that do not fill a block of channels.
"""

import functools
import importlib.util
import re

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
from diffussm_jax.ssm.pallas_tpu import pallas_tpu

# The largest relative error of whole arrays. In bfloat16, outputs are rounded and so are some operands that lead to
# them; what leads to the gradients of parameters is not.
SEQUENCES = {"float32": 1e-6, "bfloat16": 5e-3}
PARAMETERS = {"float32": 2e-6, "bfloat16": 5e-5}

# reverse, phases, batch, length, width, initialisation, discretisation, dtype, max_rows. Three sequences are laid out
# anew: 300 positions are 3 chunks, 1100 are 9: 27 rows, and the second sequence crosses the border of blocks of 16.
# Eight and more are taken as they are: 260 tokens are three tiles, of M chunks each; 16 rows hold one tile of one
# phase, 32 one of two phases of 16 sequences or of four of eight, and 24 sequences do not fit beside each other in 16.
# Three phases in 16 rows, and five in any, are interleaved before the kernel.
CASES = [
    (FORWARD, 1, 3, 7, 17, "inv", "zoh", "float32", None),
    pytest.param(BACKWARD, 2, 3, 300, 5, "legs", "bilinear", "float32", None, marks=pytest.mark.slow),
    (BOTH, 1, 3, 1100, 3, "legs", "zoh", "float32", 16),
    pytest.param((True, False), 1, 3, 1100, 3, "lin", "zoh", "float32", 16, marks=pytest.mark.slow),
    pytest.param(BOTH, 2, 3, 1100, 3, "inv", "zoh", "bfloat16", 16, marks=pytest.mark.slow),
    pytest.param(BOTH, 1, 8, 260, 3, "legs", "zoh", "float32", 16, marks=pytest.mark.slow),
    (BOTH, 2, 16, 520, 3, "lin", "bilinear", "float32", 32),
    pytest.param(BOTH, 2, 8, 520, 3, "inv", "zoh", "bfloat16", None, marks=pytest.mark.slow),
    pytest.param((True, False), 4, 8, 600, 3, "legs", "zoh", "bfloat16", 32, marks=pytest.mark.slow),
    pytest.param(BACKWARD, 1, 24, 7, 3, "inv", "zoh", "bfloat16", 16, marks=pytest.mark.slow),
    pytest.param(FORWARD, 3, 8, 399, 3, "lin", "zoh", "float32", 48, marks=pytest.mark.slow),
    pytest.param(FORWARD, 3, 8, 399, 3, "lin", "zoh", "float32", 16, marks=pytest.mark.slow),
    (BOTH, 5, 8, 200, 3, "legs", "zoh", "bfloat16", None),
]


@pytest.mark.parametrize(
    ("reverse", "phases", "batch", "length", "width", "initialization", "discretization", "dtype", "max_rows"), CASES
)
def test_values_and_gradients(reverse, phases, batch, length, width, initialization, discretization, dtype, max_rows):
    options = {"initialization": initialization, "discretization": discretization, "dtype": dtype}
    kernel = from_sequence(pallas_tpu, phases, reverse, discretization, max_rows=max_rows)
    sequences, parameters = errors(kernel, problem(reverse, batch, length, width, **options))
    assert max(sequences.values()) < SEQUENCES[dtype], sequences
    assert max(parameters.values()) < PARAMETERS[dtype], parameters


def test_agrees_with_the_recurrence_of_the_package():
    p = problem(BOTH, 8, 260, 3, initialization="legs")
    actual = value_and_gradients(from_sequence(pallas_tpu, 1, BOTH, "zoh", max_rows=16), p)  # one of the cases above
    expected = value_and_gradients(lambda params, u: ssm_apply_bidirectional(*params, u, method="recurrent"), p)
    of_each = jax.tree.map(oracles.relative_error, actual, expected)
    assert max(jax.tree.leaves(of_each)) < 5e-6, of_each


def test_few_states_and_small_steps():
    """States that do not fill a register; and steps where Lambda_bar - 1 loses digits unless it is taken with care."""
    real = init_s4d(jax.random.key(0), 3, 6, initialization="inv", dt_min=1e-3, dt_max=1.001e-3)
    real["D"] = jnp.zeros_like(real["D"])  # or it would hide errors
    u = oracles.normal(1, 1, 200, 3)
    y = jax.jit(from_sequence(pallas_tpu, 1, FORWARD), compiler_options=QUICK_COMPILE)([to_complex(real)], u)
    expected = oracles.recurrence(oracles.exactly(real, to_complex(real)), u)
    assert oracles.relative_error(y, expected) < SEQUENCES["float32"]


def test_float32_products_are_of_full_precision():
    """As the kernel asks of the matrix unit; a CPU has no other, so that values do not show it."""
    p = problem(FORWARD, 8, 8, 3)
    kernel = functools.partial(pallas_tpu, discretization="zoh", reverse=FORWARD)
    u, dy = to_phases(p.u, 2), to_phases(p.dy, 2)[:, None]
    jaxpr = str(jax.make_jaxpr(lambda params, u, dy: jax.vjp(kernel, params, u)[1](dy))(p.params, u, dy))
    products = re.findall(r"dot_general\[(.*?)\]\s", jaxpr, re.DOTALL)
    assert len(products) > 30 and all("precision=(Precision.HIGHEST, Precision.HIGHEST)" in x for x in products), (
        products
    )


def _refused(u, message, **options):
    p = problem(FORWARD, 3, 7, 3)
    with pytest.raises(ValueError, match=message):
        pallas_tpu(p.params, u, **{"discretization": "zoh", "reverse": FORWARD, "interpret": True} | options)


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_other_dtypes_are_refused(dtype):
    _refused(jnp.zeros((1, 3, 3, 7), dtype), f"u must be float32 or bfloat16 for the TPU kernel, got {dtype}")


def test_unknown_discretization():
    message = "unknown discretization 'euler'; choose one of zoh, bilinear"
    _refused(jnp.zeros((1, 3, 3, 7)), message, discretization="euler")


@pytest.mark.parametrize("max_rows", [0, 20, 272])
def test_blocks_must_be_whole_tiles(max_rows):
    _refused(jnp.zeros((1, 3, 3, 7)), f"multiple of 16 from 16 to 256, got {max_rows}", max_rows=max_rows)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra plan)")
@pytest.mark.parametrize(
    ("machine", "dtype", "shape"),
    [
        ("v4:2x2x1", "float32", (1, 24, 20, 2000, 64)),
        ("v5e:1x1", "bfloat16", (2, 24, 24, 1000, 64)),
        ("v5e:1x1", "bfloat16", (1, 24, 20, 2000, 64)),
        ("v5e:1x1", "bfloat16", (4, 24, 8, 100, 64)),
        ("v6e:1x1", "float32", (4, 24, 8, 300, 64)),
    ],
)
def test_compiles_for_tpus(machine, dtype, shape):
    """Several blocks of rows, from phases as they are and laid out anew."""
    assert compiled_kernels(machine, "tpu", "tpu_custom_call", shape, dtype) == "2 kernels"
