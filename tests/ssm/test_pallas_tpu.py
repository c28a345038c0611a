"""The TPU kernel as plain JAX: values and gradients against the float64 recurrence, and `recurrent`; compiled for TPUs.

Sequences that are shorter than a chunk, not a whole number of chunks, and spread over several blocks of rows; widths
that do not fill a block of channels.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffussm_jax.ssm import init_s4d, ssm_apply_bidirectional, to_complex
from diffussm_jax.ssm.pallas_tpu import pallas_tpu

# The largest relative error of whole arrays. In bfloat16, outputs are rounded and so are some operands that lead to
# them; what leads to the gradients of parameters is not.
SEQUENCES = {"float32": 1e-6, "bfloat16": 5e-3}
PARAMETERS = {"float32": 2e-6, "bfloat16": 5e-5}
B, N = 3, 64
FORWARD, BACKWARD, BOTH = (False,), (True,), (False, True)
QUICK_COMPILE = {"xla_backend_optimization_level": 0}

# reverse, length, width, initialisation, discretisation, dtype, max_rows. 300 positions are 3 chunks, 1100 are 9: 27
# rows for three sequences, of which the second crosses the border of blocks of 16.
CASES = [
    (FORWARD, 7, 17, "inv", "zoh", "float32", None),
    (BACKWARD, 300, 5, "legs", "bilinear", "float32", None),
    (BOTH, 1100, 3, "legs", "zoh", "float32", 16),
    ((True, False), 1100, 3, "lin", "zoh", "float32", 16),
    (BOTH, 1100, 3, "inv", "zoh", "bfloat16", 16),
]


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
def _value_and_gradients(function, params, reals, u, dy):
    """y, the gradients of each direction's real parameters, and du."""
    y, pull_back = jax.vjp(function, params, u)
    d_params, du = pull_back(dy)
    _, pull_back_to_real = jax.vjp(lambda reals: [to_complex(real) for real in reals], reals)
    return y, *pull_back_to_real(d_params), du


def _problem(reverse, length, width, initialization, dtype="float32"):
    reals = [init_s4d(jax.random.key(i), width, N, initialization=initialization) for i in range(len(reverse))]
    u = jnp.asarray(oracles.normal(1, B, length, width)).astype(dtype)
    dy = jnp.asarray(oracles.normal(2, B, length, width * len(reverse))).astype(dtype)
    return [to_complex(real) for real in reals], reals, u, dy


@pytest.mark.parametrize(("reverse", "length", "width", "initialization", "discretization", "dtype", "max_rows"), CASES)
def test_values_and_gradients(reverse, length, width, initialization, discretization, dtype, max_rows):
    params, reals, u, dy = _problem(reverse, length, width, initialization, dtype)
    kernel = functools.partial(
        pallas_tpu, discretization=discretization, reverse=reverse, interpret=True, max_rows=max_rows
    )
    y, d_reals, du = _value_and_gradients(kernel, params, reals, u, dy)
    assert y.dtype == du.dtype == dtype
    exact_u, errors, outputs, exact_du = np.asarray(u, np.float64), {}, [], 0
    for i, backward in enumerate(reverse):
        options = {"discretization": discretization, "reverse": backward}
        exact = oracles.exactly(reals[i], params[i])
        outputs.append(oracles.recurrence(exact, exact_u, **options))
        exact_dy = np.asarray(dy, np.float64)[..., i * width : (i + 1) * width]
        d_real, part = oracles.recurrence_gradients(exact, exact_u, exact_dy, **options)
        exact_du = exact_du + part
        errors |= {f"{name} {i}": oracles.relative_error(d_reals[i][name], d_real[name]) for name in d_real}
    assert max(errors.values()) < PARAMETERS[dtype], errors
    assert oracles.relative_error(y.astype(jnp.float32), np.concatenate(outputs, -1)) < SEQUENCES[dtype]
    assert oracles.relative_error(du.astype(jnp.float32), exact_du) < SEQUENCES[dtype]


def test_agrees_with_the_recurrence_of_the_package():
    params, reals, u, dy = _problem(BOTH, 200, 3, "lin")
    kernel = functools.partial(pallas_tpu, discretization="zoh", reverse=BOTH, interpret=True)
    actual = _value_and_gradients(kernel, params, reals, u, dy)
    expected = _value_and_gradients(
        lambda params, u: ssm_apply_bidirectional(*params, u, method="recurrent"), params, reals, u, dy
    )
    errors = jax.tree.map(oracles.relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) < 5e-6, errors


def test_few_states_and_small_steps():
    """States that do not fill a register; and steps where Lambda_bar - 1 loses digits unless it is taken with care."""
    real = init_s4d(jax.random.key(0), 3, 6, initialization="inv", dt_min=1e-3, dt_max=1.001e-3)
    real["D"] = jnp.zeros_like(real["D"])  # or it would hide errors
    u = oracles.normal(1, 1, 200, 3)
    kernel = functools.partial(pallas_tpu, discretization="zoh", reverse=FORWARD, interpret=True)
    y = jax.jit(kernel, compiler_options=QUICK_COMPILE)([to_complex(real)], u)
    expected = oracles.recurrence(oracles.exactly(real, to_complex(real)), u)
    assert oracles.relative_error(y, expected) < SEQUENCES["float32"]


def test_float32_products_are_of_full_precision():
    """As the kernel asks of the matrix unit; a CPU has no other, so that values do not show it."""
    params, _, u, dy = _problem(FORWARD, 7, 3, "lin")
    kernel = functools.partial(pallas_tpu, discretization="zoh", reverse=FORWARD)
    jaxpr = str(jax.make_jaxpr(lambda params, u, dy: jax.vjp(kernel, params, u)[1](dy))(params, u, dy))
    products = re.findall(r"dot_general\[(.*?)\]\s", jaxpr, re.DOTALL)
    assert len(products) > 20 and all("precision=(Precision.HIGHEST, Precision.HIGHEST)" in x for x in products), (
        products
    )


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_other_dtypes_are_refused(dtype):
    params, *_ = _problem(FORWARD, 1, 3, "lin")
    with pytest.raises(ValueError, match=f"u must be float32 or bfloat16 for the TPU kernel, got {dtype}"):
        pallas_tpu(params, jnp.zeros((B, 7, 3), dtype), discretization="zoh", reverse=FORWARD, interpret=True)


def test_unknown_discretization():
    params, _, u, _ = _problem(FORWARD, 7, 3, "lin")
    with pytest.raises(ValueError, match="unknown discretization 'euler'; choose one of zoh, bilinear"):
        pallas_tpu(params, u, discretization="euler", reverse=FORWARD, interpret=True)


@pytest.mark.parametrize("max_rows", [0, 20, 272])
def test_blocks_must_be_whole_tiles(max_rows):
    params, _, u, _ = _problem(FORWARD, 7, 3, "lin")
    with pytest.raises(ValueError, match=f"multiple of 16 from 16 to 256, got {max_rows}"):
        pallas_tpu(params, u, discretization="zoh", reverse=FORWARD, interpret=True, max_rows=max_rows)


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from diffussm_jax.parallel.topology import compile_only_devices, parse_machine
from diffussm_jax.ssm import init_s4d, to_complex
from diffussm_jax.ssm.pallas_tpu import pallas_tpu

def vjp(reals, u, dy):
    def apply(reals, u):
        params = [to_complex(real) for real in reals]
        return pallas_tpu(params, u, discretization="zoh", reverse=(False, True))
    y, pull_back = jax.vjp(apply, reals, u)
    return y, pull_back(dy)

machine, dtype = sys.argv[1:]
device = compile_only_devices(parse_machine(machine))[0]
shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=SingleDeviceSharding(device))
real = jax.eval_shape(lambda: init_s4d(jax.random.key(0), 24, 64))
real = jax.tree.map(lambda x: shape(x.shape, x.dtype), real)
arguments = [real, real], shape((20, 2000, 24), dtype), shape((20, 2000, 48), dtype)
compiled = jax.jit(vjp).lower(*arguments).compile()
print(compiled.as_text().count('custom_call_target="tpu_custom_call"'), "kernels")
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra plan)")
@pytest.mark.parametrize("machine, dtype", [("v4:2x2x1", "float32"), ("v5e:1x1", "bfloat16"), ("v6e:1x1", "float32")])
def test_compiles_for_tpus(machine, dtype):
    """Forward and gradients, of several blocks of rows; in a process of its own, whose environment libtpu reads."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, machine, dtype],
        cwd=Path(__file__).parents[2],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "2 kernels"
