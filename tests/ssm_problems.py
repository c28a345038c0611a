"""Problems for SSMs in one direction or several, with the float64 oracle's answers; how far a function is from them."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from diffussm_jax.ssm import from_phases, init_s4d, to_complex, to_phases

FORWARD, BACKWARD, BOTH = (False,), (True,), (False, True)
# Compiling takes most of the time of these tests. Most of it is machine code, which the conftest makes cheap. Where
# rounding is measured to the digit it is made as for users.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
WELL_COMPILED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):  # else this option may be none
    WELL_COMPILED["xla_cpu_use_fusion_emitters"] = True


class Problem(NamedTuple):
    """SSMs of several schemes at once: channels are independent, and each scheme has D of a direction's [S * D]."""

    schemes: tuple[str, ...]
    reals: list  # the parameters of each direction, as `init_s4d` has them
    params: list  # and complex
    u: jax.Array  # [B, L, S * D]
    dy: jax.Array  # [B, L, R * S * D]
    y: np.ndarray  # of the oracle, as are the gradients
    d_reals: list  # by log_dt, the terms [D, N/2] whose sum over states is the gradient
    du: np.ndarray


_to_complex = jax.jit(to_complex)


@functools.cache
def problem(reverse, batch, length, width, *, initialization="lin", discretization="zoh", dtype="float32"):
    """A problem of `width` channels; of a tuple of initialisations, so many of each."""
    schemes = (initialization,) if isinstance(initialization, str) else tuple(initialization)

    def init(key):
        of_each = [init_s4d(key, width, 64, initialization=name) for name in schemes]
        return {name: np.concatenate([real[name] for real in of_each]) for name in of_each[0]}

    reals = [init(jax.random.key(i)) for i in range(len(reverse))]
    params = [_to_complex(real) for real in reals]
    width *= len(schemes)
    u = np.asarray(oracles.normal(1, batch, length, width), dtype)
    dy = np.asarray(oracles.normal(2, batch, length, width * len(reverse)), dtype)
    exact_u, exact_dy = np.asarray(u, np.float64), np.split(np.asarray(dy, np.float64), len(reverse), -1)
    outputs, gradients = [], []
    for real, p, is_reverse, own in zip(reals, params, reverse, exact_dy, strict=True):
        exact, options = oracles.exactly(real, p), {"discretization": discretization, "reverse": is_reverse}
        outputs.append(oracles.recurrence(exact, exact_u, **options))
        gradients.append(oracles.recurrence_gradients_by_state(exact, exact_u, own, **options))
    d_reals, dus = zip(*gradients, strict=True)
    y = np.concatenate(outputs, -1)
    return Problem(schemes, reals, params, jnp.asarray(u), jnp.asarray(dy), y, list(d_reals), sum(dus))


def _value_and_gradients(function, params, reals, u, dy):
    y, pull_back = jax.vjp(function, params, u)
    d_params, du = pull_back(dy)
    _, pull_back_to_real = jax.vjp(lambda reals: [to_complex(real) for real in reals], reals)
    return y, *pull_back_to_real(d_params), du


_well_compiled = jax.jit(_value_and_gradients, static_argnums=0, compiler_options=WELL_COMPILED)
_quickly_compiled = jax.jit(_value_and_gradients, static_argnums=0, compiler_options=QUICK_COMPILE)


def value_and_gradients(function: Callable, p: Problem, *, is_quick: bool = True):
    """y, the gradients of each direction's real parameters, and du, of function(params, u)."""
    run = _quickly_compiled if is_quick else _well_compiled
    return run(function, p.params, p.reals, p.u, p.dy)


def errors(function: Callable, p: Problem, *, is_quick: bool = True) -> tuple[dict[str, float], dict[str, float]]:
    """The relative errors of y and du, and of the gradients of parameters, by name and scheme.

    The gradient by log_dt is a sum over states, and that by D is one over positions. Where the terms nearly cancel, a
    rounding error of a term, or a last bit of exp(log_dt) that differs between versions of JAX, is large compared with
    the sum. So that error is relative to the norm of the terms, or to that of the sum if it is larger.
    """
    y, d_reals, du = value_and_gradients(function, p, is_quick=is_quick)
    assert y.dtype == du.dtype == p.u.dtype

    def of_schemes(name, actual, exact, axis, terms=None):
        arrays = (actual, exact, exact if terms is None else terms)
        parts = zip(*(np.split(np.asarray(x), len(p.schemes), axis) for x in arrays), strict=True)
        return {
            f"{name} {scheme}": oracles.relative_error(actual, exact, max(exact, terms, key=np.linalg.norm))
            for scheme, (actual, exact, terms) in zip(p.schemes, parts, strict=True)
        }

    def by_position(i):
        """The terms u dy of the gradient by D of direction i: [S * D, B * L]."""
        u, dy = (np.asarray(x, np.float64) for x in (p.u, p.dy))
        return (u * np.split(dy, len(p.reals), -1)[i]).reshape(-1, u.shape[-1]).T

    of_sequences, of_parameters = {}, {}
    for name, actual, exact in (("y", y, p.y), ("du", du, p.du)):
        directions = (-1, len(p.reals) if name == "y" else 1, p.u.shape[-1])
        actual = np.asarray(actual).astype(np.float32).reshape(directions)
        of_sequences |= of_schemes(name, actual, exact.reshape(directions), -1)
    for i, (actual, exact) in enumerate(zip(d_reals, p.d_reals, strict=True)):
        assert sorted(actual) == sorted(oracles.REAL_PARAMETERS)
        for name in exact:
            total = exact[name].sum(-1) if name == "log_dt" else exact[name]
            terms = {"log_dt": exact["log_dt"], "D": by_position(i)}.get(name)
            of_parameters |= of_schemes(f"{name} {i}", actual[name], total, 0, terms)
    return of_sequences, of_parameters


def of_output(sequences: dict[str, float]) -> float:
    """The largest error of y."""
    return max(error for name, error in sequences.items() if name.startswith("y "))


@functools.cache
def from_sequence(kernel: Callable, num_phases: int, reverse, discretization="zoh", **options) -> Callable:
    """A kernel of phases, interpreted, as (params, u [B, L, D]) -> [B, L, R * D]."""

    def apply(params, u):
        phases = to_phases(u, num_phases)
        y = kernel(params, phases, reverse=reverse, discretization=discretization, interpret=True, **options)
        return from_phases(y).reshape(*u.shape[:2], -1)

    return apply


COMPILE_KERNEL = """
import sys
import jax
from jax.sharding import SingleDeviceSharding
from diffussm_jax.parallel.topology import compile_only_devices, lowering_for, parse_machine
from diffussm_jax.ssm import init_s4d, ssm_apply_phases, to_complex

machine, dtype, platform, kernel = sys.argv[1:5]
M, D, B, J, N = map(int, sys.argv[5:])

def vjp(reals, u, dy):
    def apply(reals, u):
        params = [to_complex(real) for real in reals]
        return ssm_apply_phases(params, u, reverse=(False, True), method="pallas", platform=platform)
    y, pull_back = jax.vjp(apply, reals, u)
    return y, pull_back(dy)

device = compile_only_devices(parse_machine(machine))[0]
sharding = SingleDeviceSharding(device)
shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=sharding)
real = jax.tree.map(lambda x: shape(x.shape, x.dtype), jax.eval_shape(lambda: init_s4d(jax.random.key(0), D, N)))
arguments = [real, real], shape((M, D, B, J), dtype), shape((M, 2, D, B, J), dtype)
with lowering_for(device):
    lowered = jax.jit(vjp).lower(*arguments)
print(lowered.compile().as_text().count(f'custom_call_target="{kernel}"'), "kernels")
"""


def run_apart(script: str, *arguments: object) -> str:
    """What a script that compiles for another machine prints.

    In a process of its own: libtpu reads its environment, and CUDA's plugin shall see no other device.
    """
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def compiled_kernels(machine: str, platform: str, target: str, shape: tuple[int, ...], dtype: str) -> str:
    """What is printed of "pallas", forward and gradients, compiled for a machine at M, D, B, J, N."""
    return run_apart(COMPILE_KERNEL, machine, dtype, platform, target, *shape)
