"""The GPU kernel as plain JAX: values and gradients against the float64 recurrence, and `recurrent`; compiled for H100.

Sequences that are shorter than a chunk and not a whole number of chunks; batches that do not fill a block of sequences,
and several blocks.
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
from diffussm_jax.ssm.pallas_gpu import pallas_gpu, pallas_gpu_channels_first

# The largest relative error of whole arrays. In bfloat16, outputs are rounded and so are some operands that lead to
# them; what leads to the gradients of parameters is not.
SEQUENCES = {"float32": 2e-6, "bfloat16": 5e-3}
PARAMETERS = {"float32": 3e-6, "bfloat16": 5e-5}
N = 64
FORWARD, BACKWARD, BOTH = (False,), (True,), (False, True)
QUICK_COMPILE = {"xla_backend_optimization_level": 0}

# reverse, batch, length, width, initialisation, discretisation, dtype. A block holds 16 sequences here.
CASES = [
    (FORWARD, 3, 7, 3, "inv", "zoh", "float32"),
    (BACKWARD, 3, 100, 2, "legs", "bilinear", "float32"),
    (BOTH, 20, 150, 2, "legs", "zoh", "float32"),
    ((True, False), 2, 300, 2, "lin", "bilinear", "float32"),
    (BOTH, 20, 200, 2, "inv", "zoh", "bfloat16"),
    (BOTH, 3, 300, 2, "legs", "bilinear", "bfloat16"),
    (BOTH, 3, 300, 2, "lin", "zoh", "bfloat16"),
]


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
def _value_and_gradients(function, params, reals, u, dy):
    """y, the gradients of each direction's real parameters, and du."""
    y, pull_back = jax.vjp(function, params, u)
    d_params, du = pull_back(dy)
    _, pull_back_to_real = jax.vjp(lambda reals: [to_complex(real) for real in reals], reals)
    return y, *pull_back_to_real(d_params), du


def _problem(reverse, batch, length, width, initialization, dtype="float32"):
    reals = [init_s4d(jax.random.key(i), width, N, initialization=initialization) for i in range(len(reverse))]
    u = jnp.asarray(oracles.normal(1, batch, length, width)).astype(dtype)
    dy = jnp.asarray(oracles.normal(2, batch, length, width * len(reverse))).astype(dtype)
    return [to_complex(real) for real in reals], reals, u, dy


def _errors(reverse, params, reals, u, dy, discretization):
    """The relative error of y, du and the gradient of each real parameter, by name."""
    kernel = functools.partial(pallas_gpu, discretization=discretization, reverse=reverse, interpret=True, max_rows=16)
    y, d_reals, du = _value_and_gradients(kernel, params, reals, u, dy)
    assert y.dtype == du.dtype == u.dtype
    exact_u, errors, outputs, exact_du = np.asarray(u, np.float64), {}, [], 0
    for i, (backward, exact_dy) in enumerate(
        zip(reverse, np.split(np.asarray(dy, np.float64), len(reverse), -1), strict=True)
    ):
        options = {"discretization": discretization, "reverse": backward}
        exact = oracles.exactly(reals[i], params[i])
        outputs.append(oracles.recurrence(exact, exact_u, **options))
        d_real, part = oracles.recurrence_gradients(exact, exact_u, exact_dy, **options)
        exact_du = exact_du + part
        errors |= {f"{name} {i}": oracles.relative_error(d_reals[i][name], d_real[name]) for name in d_real}
    return errors | {
        "y": oracles.relative_error(y.astype(jnp.float32), np.concatenate(outputs, -1)),
        "du": oracles.relative_error(du.astype(jnp.float32), exact_du),
    }


@pytest.mark.parametrize(("reverse", "batch", "length", "width", "initialization", "discretization", "dtype"), CASES)
def test_values_and_gradients(reverse, batch, length, width, initialization, discretization, dtype):
    problem = _problem(reverse, batch, length, width, initialization, dtype)
    errors = _errors(reverse, *problem, discretization)
    sequences = errors.pop("y"), errors.pop("du")
    assert max(sequences) < SEQUENCES[dtype], sequences
    assert max(errors.values()) < PARAMETERS[dtype], errors


def test_agrees_with_the_recurrence_of_the_package():
    params, reals, u, dy = _problem(BOTH, 3, 200, 3, "lin")
    kernel = functools.partial(pallas_gpu, discretization="zoh", reverse=BOTH, interpret=True)
    actual = _value_and_gradients(kernel, params, reals, u, dy)
    expected = _value_and_gradients(
        lambda params, u: ssm_apply_bidirectional(*params, u, method="recurrent"), params, reals, u, dy
    )
    errors = jax.tree.map(oracles.relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) < 5e-6, errors


def test_channels_first():
    params, _, u, _ = _problem(BOTH, 2, 40, 3, "inv")
    apply, apply_channels_first = (
        jax.jit(
            functools.partial(f, discretization="zoh", reverse=BOTH, interpret=True), compiler_options=QUICK_COMPILE
        )
        for f in (pallas_gpu, pallas_gpu_channels_first)
    )
    y = apply_channels_first(params, u.transpose(2, 0, 1)).transpose(1, 2, 0)
    assert oracles.relative_error(y, apply(params, u)) < 1e-7


def test_few_states():
    """Fewer than fill the side of a matrix, which is a power of two and at least 16."""
    real = init_s4d(jax.random.key(0), 3, 6, initialization="inv")
    real["D"] = jnp.zeros_like(real["D"])  # or it would hide errors
    u = oracles.normal(1, 1, 200, 3)
    kernel = functools.partial(pallas_gpu, discretization="zoh", reverse=FORWARD, interpret=True)
    y = jax.jit(kernel, compiler_options=QUICK_COMPILE)([to_complex(real)], u)
    expected = oracles.recurrence(oracles.exactly(real, to_complex(real)), u)
    assert oracles.relative_error(y, expected) < SEQUENCES["float32"]


def test_float32_products_are_of_full_precision():
    """As the kernel asks of the GPU; a CPU has no other, so that values do not show it."""
    params, _, u, dy = _problem(FORWARD, 3, 7, 3, "lin")
    kernel = functools.partial(pallas_gpu, discretization="zoh", reverse=FORWARD)
    jaxpr = str(jax.make_jaxpr(lambda params, u, dy: jax.vjp(kernel, params, u)[1](dy))(params, u, dy))
    products = re.findall(r"dot_general\[(.*?)\]\s", jaxpr, re.DOTALL)
    assert len(products) > 12 and all("precision=(Precision.HIGHEST, Precision.HIGHEST)" in x for x in products), (
        products
    )


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_other_dtypes_are_refused(dtype):
    params, *_ = _problem(FORWARD, 3, 1, 3, "lin")
    with pytest.raises(ValueError, match=f"u must be float32 or bfloat16 for the GPU kernel, got {dtype}"):
        pallas_gpu(params, jnp.zeros((3, 7, 3), dtype), discretization="zoh", reverse=FORWARD, interpret=True)


def test_unknown_discretization():
    params, _, u, _ = _problem(FORWARD, 3, 7, 3, "lin")
    with pytest.raises(ValueError, match="unknown discretization 'euler'; choose one of zoh, bilinear"):
        pallas_gpu(params, u, discretization="euler", reverse=FORWARD, interpret=True)


@pytest.mark.parametrize("max_rows", [8, 24, 128])
def test_sizes_of_blocks(max_rows):
    params, _, u, _ = _problem(FORWARD, 3, 7, 3, "lin")
    with pytest.raises(ValueError, match=f"max_rows must be one of 16, 32, 64, got {max_rows}"):
        pallas_gpu(params, u, discretization="zoh", reverse=FORWARD, interpret=True, max_rows=max_rows)


def test_too_many_states():
    params = [to_complex(init_s4d(jax.random.key(0), 3, 258))]
    with pytest.raises(ValueError, match="room for 256 states, got 258"):
        pallas_gpu(params, jnp.zeros((1, 7, 3)), discretization="zoh", reverse=FORWARD, interpret=True)


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from diffussm_jax.parallel.topology import compile_only_devices, parse_machine
from diffussm_jax.ssm import init_s4d, to_complex
from diffussm_jax.ssm.pallas_gpu import pallas_gpu, pallas_gpu_channels_first

def vjp(reals, u, dy):
    def apply(reals, u):
        params = [to_complex(real) for real in reals]
        return pallas_gpu(params, u, discretization="zoh", reverse=(False, True))
    y, pull_back = jax.vjp(apply, reals, u)
    return y, pull_back(dy)

B, L, D, N = map(int, sys.argv[1:5])
device = compile_only_devices(parse_machine("h100"))[0]
shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=SingleDeviceSharding(device))
real = jax.eval_shape(lambda: init_s4d(jax.random.key(0), D, N))
real = jax.tree.map(lambda x: shape(x.shape, x.dtype), real)
arguments = [real, real], shape((B, L, D), sys.argv[5]), shape((B, L, 2 * D), sys.argv[5])
compiled = jax.jit(vjp).lower(*arguments).compile()
print(compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"'), "kernels")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None and importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX's CUDA plugin is not installed (extra plan-gpu or cuda12)",
)
@pytest.mark.parametrize("shape, dtype", [((16, 1024, 1152, 64), "bfloat16"), ((5, 100, 24, 64), "float32")])
def test_compiles_for_an_h100(shape, dtype):
    """Forward and gradients; in a process of its own, which sees no other device."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *map(str, shape), dtype],
        cwd=Path(__file__).parents[2],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "2 kernels"
