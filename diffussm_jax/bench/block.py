"""`bench block`: one DiffuSSM block, forward, and forward with all gradients, with its SSM and without.

Without its SSM, the block uses its input U for each of the R outputs, so that everything around the SSM stays the same.
The SSM's share is the time that this saves. With --aot the same programs are compiled ahead of time for a chip, and
their bytes are counted (`aot`).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffussm_jax.bench.aot import compiled_figures
from diffussm_jax.bench.configs import check_fits
from diffussm_jax.bench.measure import compile_program, median_seconds, memory_limit
from diffussm_jax.bench.ssm import PASSES
from diffussm_jax.build import Parts
from diffussm_jax.models import DiffuSSM
from diffussm_jax.models.diffussm import Block
from diffussm_jax.models.mixers import num_outputs
from diffussm_jax.parallel.mesh import platform_of
from diffussm_jax.parallel.topology import Machine, compile_only_devices

AOT_COLUMNS = {
    **{name: ".2f" for name in ("forward_gb", "gradient_gb", "forward_without_ssm_gb", "gradient_without_ssm_gb")},
    **{"gradient_bytes_ms": ".2f", "gradient_memory_mb": ".0f", "gradient_compile_s": ".0f"},
}
COLUMNS = {
    **{name: ".1f" for name in ("forward_ms", "gradient_ms", "forward_without_ssm_ms", "gradient_without_ssm_ms")},
    **{"forward_ssm_share": ".1%", "gradient_ssm_share": ".1%", "gradient_mb": ".0f"},
}


def _without_ssm(next_function, args, kwargs, context):
    """Intercepts calls of modules: each output of the mixer is its input."""
    is_mixer = context.module.name == "ssm"
    if is_mixer and context.method_name == "phases":
        (u,) = args
        return jnp.broadcast_to(u[:, None], (u.shape[0], num_outputs(context.module), *u.shape[1:]))
    if is_mixer and context.method_name == "__call__":
        (u,) = args
        return jnp.tile(u, num_outputs(context.module))
    return next_function(*args, **kwargs)


def _functions(block: nn.Module, has_ssm: bool):
    def forward_pass(params, x, c):
        if has_ssm:
            return block.apply({"params": params}, x, c)[0]
        with nn.intercept_methods(_without_ssm):
            return block.apply({"params": params}, x, c)[0]

    def with_gradients(params, x, c, d_x):
        y, pull_back = jax.vjp(forward_pass, params, x, c)
        return y, pull_back(d_x)

    return forward_pass, with_gradients


def count_block(config: ConfigDict, machine: Machine) -> dict[str, float | int | None]:
    """Compiles one block for a chip ahead of time, with its SSM and without, at the config's batch size.

    Args:
      config: of a run. `config.model.remat` has no effect: nothing is recomputed.
      machine: `one_chip`.

    Returns:
      The figures of `compiled_figures` for four programs: forward_gb, gradient_gb, forward_without_ssm_gb, ...

    Raises:
      ValueError: the model is not DiffuSSM, or the compiler for the machine is not installed.
    """
    device = compile_only_devices(machine)[0]
    block, (params, x, c) = _abstract_block(config, platform_of(device))
    figures = {}
    for has_ssm in (True, False):
        for which, function, rest in zip(PASSES, _functions(block, has_ssm), ((), (x,)), strict=True):
            found = compiled_figures(function, (params, x, c, *rest), device, machine.chip)
            prefix = which if has_ssm else f"{which}_without_ssm"
            figures |= {f"{prefix}_{name}": value for name, value in found.items()}
    return figures


def _abstract_block(config: ConfigDict, platform: str) -> tuple[Block, tuple]:
    """A block, and the shapes of its parameters, x and c."""
    parts = Parts(config, platform=platform)
    model, (H, W, _) = parts.model, parts.input_shape
    if not isinstance(model, DiffuSSM):
        raise ValueError(f"bench block takes blocks of diffussm, config.model.name is {config.model.name!r}")
    dtype = jnp.dtype(model.dtype)
    block = Block(model.hourglass_ratio, model.mixer, (H, W), dtype)
    B, J, D = config.batch_size, H * W // model.hourglass_ratio, model.width
    x, c = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((B, J, D), (B, D)))
    return block, (jax.eval_shape(block.init, jax.random.key(0), x, c)["params"], x, c)


def bench_block(config: ConfigDict, *, repeats: int = 5) -> dict[str, float]:
    """Times one block on one device, at the config's batch size and resolution.

    Args:
      config: of a run. `config.model.remat` has no effect: nothing is recomputed.
      repeats: timed repetitions of each program, in turns.

    Returns:
      forward_ms and gradient_ms (forward with the gradients of x, c and all parameters), the same as
      .._without_ssm_ms, .._ssm_share, and .._mb, the memory that XLA plans.

    Raises:
      DoesNotFitError: a program needs more memory than the device has.
      ValueError: the model is not DiffuSSM.
    """
    block, (_, x, c) = _abstract_block(config, jax.default_backend())
    keys = jax.random.split(jax.random.key(config.seed), 4)
    x, d_x, c = (jax.random.normal(key, a.shape, a.dtype) for key, a in zip(keys[:3], (x, x, c), strict=True))
    params = jax.jit(block.init)(keys[3], x[:1], c[:1])["params"]
    programs, memory = {}, {}
    for has_ssm in (True, False):
        for which, function, rest in zip(PASSES, _functions(block, has_ssm), ((), (d_x,)), strict=True):
            key = f"{which}_ms" if has_ssm else f"{which}_without_ssm_ms"
            compiled, costs = compile_program(function, params, x, c, *rest)
            check_fits("the block", costs.memory_bytes, memory_limit())
            programs[key] = functools.partial(compiled, params, x, c, *rest)
            if has_ssm:
                memory[f"{which}_mb"] = costs.memory_bytes / 1e6
    times = {key: 1e3 * time for key, time in median_seconds(programs, repeats).items()}
    shares = {f"{which}_ssm_share": 1 - times[f"{which}_without_ssm_ms"] / times[f"{which}_ms"] for which in PASSES}
    return times | shares | memory
