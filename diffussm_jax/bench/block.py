"""`bench block`: one block of a model, forward, and forward with all gradients; of DiffuSSM with its SSM and without.

Without its SSM, the block uses its input U for each of the R outputs, so that everything around the SSM stays the same.
The SSM's share is the time that this saves. A network that does not repeat one kind of block, such as a U-Net, is
measured whole. With --aot the same programs are compiled ahead of time for a chip, and their bytes are counted (`aot`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffussm_jax.bench.aot import compiled_figures
from diffussm_jax.bench.configs import check_fits
from diffussm_jax.bench.measure import compile_program, median_seconds, memory_limit
from diffussm_jax.bench.ssm import PASSES
from diffussm_jax.build import Parts
from diffussm_jax.config import override
from diffussm_jax.models.backbone import Backbone
from diffussm_jax.models.mixers import num_outputs
from diffussm_jax.parallel.mesh import platform_of
from diffussm_jax.parallel.topology import Machine, compile_only_devices
from diffussm_jax.plan import LITTLE_EFFORT

AOT_COLUMNS = {
    **{"part": "", "turns": "d"},
    **{name: ".2f" for name in ("forward_gb", "gradient_gb", "forward_without_ssm_gb", "gradient_without_ssm_gb")},
    **{"gradient_bytes_ms": ".2f", "forward_memory_mb": ".0f", "gradient_memory_mb": ".0f"},
    **{"gradient_compile_s": ".0f"},
}
COLUMNS = {
    **{"part": "", "turns": "d"},
    **{name: ".1f" for name in ("forward_ms", "gradient_ms", "forward_without_ssm_ms", "gradient_without_ssm_ms")},
    **{"forward_ssm_share": ".1%", "gradient_ssm_share": ".1%", "gradient_mb": ".0f"},
}


class Part(NamedTuple):
    """What is measured of a model: one of the blocks that it repeats, or the whole network if it repeats none.

    Attributes:
      name: "block" or "network".
      turns: how often the model repeats it.
      apply: apply(params, *inputs) -> y.
      init: init(key) -> params.
      inputs: their shapes and dtypes: x [B, J, D] and c [B, D] of a block, x_t [B, H, W, C] of a network.
      y: shape and dtype of the output.
      has_ssm: whether it can be measured without its sequence mixer.
    """

    name: str
    turns: int
    apply: Callable
    init: Callable
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    y: jax.ShapeDtypeStruct
    has_ssm: bool

    def random_arguments(self, seed: int) -> tuple:
        """(params, inputs.., a gradient of y)."""
        key, *keys = jax.random.split(jax.random.key(seed), 2 + len(self.inputs))
        arrays = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, (*self.inputs, self.y), strict=True)]
        return self.init(key), *arrays


def measured_part(config: ConfigDict, platform: str | None = None) -> Part:
    """The part of a config's model that is measured, at its batch size and resolution; nothing is recomputed.

    Raises:
      ValueError: the model cannot take these inputs.
    """
    if "remat" in config.model:
        config = override(config, {"model.remat": "none"})
    parts = Parts(config, platform=platform)
    model, input_shape, B = parts.model, parts.input_shape, config.batch_size
    model.check(input_shape)
    if type(model).block is not Backbone.block:
        block, (J, D) = model.block(input_shape)
        dtype = jnp.dtype(model.dtype)
        name, turns, inputs = "block", model.depth, _shapes(dtype, (B, J, D), (B, D))

        def init(key):
            return block.init(key, *(jnp.zeros((1, *a.shape[1:]), a.dtype) for a in inputs))["params"]

        def apply(params, x, c):
            return block.apply({"params": params}, x, c)[0]

    else:
        name, turns, inputs = "network", 1, _shapes(jnp.float32, (B, *input_shape))

        def init(key):
            x_t, t, condition = (jnp.zeros((1, *input_shape)), jnp.zeros(1), model.example_condition(1))
            return model.init(key, x_t, t, condition)["params"]

        def apply(params, x_t):
            return model.apply_params(params, x_t, jnp.zeros(B), model.example_condition(B))

    y = jax.eval_shape(apply, jax.eval_shape(init, jax.random.key(0)), *inputs)
    return Part(name, turns, apply, jax.jit(init), inputs, y, name == "block" and hasattr(model, "mixer"))


def _shapes(dtype, *shapes: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


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


def part_functions(part: Part, *, has_ssm: bool = True) -> tuple[Callable, Callable]:
    """(params, inputs..) -> y, and (params, inputs.., gradient of y) -> y and all gradients."""

    def forward_pass(params, *inputs):
        if has_ssm:
            return part.apply(params, *inputs)
        with nn.intercept_methods(_without_ssm):
            return part.apply(params, *inputs)

    def with_gradients(params, *inputs_and_dy):
        *inputs, dy = inputs_and_dy
        y, pull_back = jax.vjp(forward_pass, params, *inputs)
        return y, pull_back(dy)

    return forward_pass, with_gradients


def _programs(part: Part, arguments: tuple):
    """(name of the figures, has_ssm, function, arguments) of each program."""
    for has_ssm in (True, False) if part.has_ssm else (True,):
        functions = part_functions(part, has_ssm=has_ssm)
        for which, function, of in zip(PASSES, functions, (arguments[:-1], arguments), strict=True):
            yield which if has_ssm else f"{which}_without_ssm", has_ssm, function, of


def count_block(
    config: ConfigDict, machine: Machine, *, has_full_effort: bool = True
) -> dict[str, float | int | str | None]:
    """Compiles one block for a chip ahead of time, with its SSM and without, at the config's batch size.

    Args:
      config: of a run. `config.model.remat` has no effect: nothing is recomputed.
      machine: `one_chip`.
      has_full_effort: whether the compiler optimizes the program's speed as it does for a run.

    Returns:
      part and turns of `Part`; and the figures of `compiled_figures` for its programs: forward_gb, gradient_gb,
      forward_without_ssm_gb, ...

    Raises:
      ValueError: the model cannot take these inputs, or the compiler for the machine is not installed.
    """
    device = compile_only_devices(machine)[0]
    part = measured_part(config, platform_of(device))
    params = jax.eval_shape(part.init, jax.random.key(0))
    figures: dict[str, float | int | str | None] = {"part": part.name, "turns": part.turns}
    for name, _, function, arguments in _programs(part, (params, *part.inputs, part.y)):
        found = compiled_figures(function, arguments, device, machine.chip, None if has_full_effort else LITTLE_EFFORT)
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    return figures


def bench_block(config: ConfigDict, *, repeats: int = 5) -> dict[str, float | int | str]:
    """Times one block on one device, at the config's batch size and resolution.

    Args:
      config: of a run. `config.model.remat` has no effect: nothing is recomputed.
      repeats: timed repetitions of each program, in turns.

    Returns:
      part and turns of `Part`; forward_ms and gradient_ms (forward with the gradients of x, c and all parameters), the
      same as .._without_ssm_ms, .._ssm_share, and .._mb, the memory that XLA plans.

    Raises:
      DoesNotFitError: a program needs more memory than the device has.
      ValueError: the model cannot take these inputs.
    """
    part = measured_part(config)
    programs, memory = {}, {}
    for name, has_ssm, function, arguments in _programs(part, part.random_arguments(config.seed)):
        compiled, costs = compile_program(function, *arguments)
        check_fits(f"the {part.name}", costs.memory_bytes, memory_limit())
        programs[f"{name}_ms"] = functools.partial(compiled, *arguments)
        if has_ssm:
            memory[f"{name}_mb"] = costs.memory_bytes / 1e6
    times = {key: 1e3 * time for key, time in median_seconds(programs, repeats).items()}
    shares = {}
    if part.has_ssm:
        shares = {f"{which}_ssm_share": 1 - times[f"{which}_without_ssm_ms"] / times[f"{which}_ms"] for which in PASSES}
    return {"part": part.name, "turns": part.turns} | times | shares | memory
