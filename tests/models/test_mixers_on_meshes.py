"""Each mixer on a mesh of 2 x 2 x 2 devices: the same numbers as on one, and no batch rows are gathered."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

MIXERS = {"s6": {"state_size": 4}, "attention": {"num_heads": 4}, "conv": {}}
CONVOLUTIONS = {"s4": {"state_size": 4}, "lssl": {"state_size": 4}}  # laid out as "conv" is
NUM_STEPS, BATCH, L, WIDTH = 8, 24, 64, 16  # 24 is no size of any parameter
ROWS = BATCH // 4  # of a device

START = r"""
import functools, json, re, sys
import jax, jax.numpy as jnp, numpy as np
from diffussm_jax import registry
from diffussm_jax.parallel.mesh import batch_to_devices, make_mesh

mixers, num_steps, *shape = json.loads(sys.argv[1])
meshes = make_mesh(1, 1, 1), make_mesh(2, 2, 2)
found = {name: {"losses": []} for name in mixers}

def collectives(compiled):  # (kind, shapes of the results, name of the operation)
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in compiled.as_text().splitlines():
        if match := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
            shapes = [[int(n) for n in s.split(",") if n] for s in re.findall(r"\[([\d,]*)\]", match[1])]
            yield match[2], shapes, next(iter(re.findall(r'op_name="([^"]*)"', line)), "")
"""
LAYERS = """
from jax.sharding import NamedSharding, PartitionSpec
from diffussm_jax.models.mixers import mix_phases, num_outputs
from diffussm_jax.parallel.sharding import shardings
from diffussm_jax.ssm import to_phases

BATCH = ("data", "fsdp")

@functools.partial(jax.jit, static_argnums=0)
def run(model, params, U, dY):  # in phases, as a block calls a mixer
    Y, pull_back = jax.vjp(lambda params, U: mix_phases(model.bind({"params": params}), U, None), params, U)
    return Y, *pull_back(dY)

for name, options in mixers.items():
    model, u = registry.create("mixer", name, options), jax.random.normal(jax.random.key(0), shape)
    params = jax.jit(model.init)(jax.random.key(1), u)["params"]
    U = to_phases(u, 2)
    dY = jax.random.normal(jax.random.key(2), (2, num_outputs(model), *U.shape[1:]))
    rules = [(f".*{pattern}", axes) for pattern, axes in model.sharding_rules]
    specs = PartitionSpec(None, "tensor", BATCH), PartitionSpec(None, None, "tensor", BATCH)
    layout = shardings(params, rules, meshes[1]), *(NamedSharding(meshes[1], spec) for spec in specs)
    laid = jax.device_put((params, U, dY), layout)
    with jax.sharding.use_abstract_mesh(meshes[1].abstract_mesh):
        compiled = run.lower(model, *laid).compile()
    found[name]["collectives"] = list(collectives(compiled))
    pairs = zip(jax.tree.leaves(run(model, params, U, dY)), jax.tree.leaves(compiled(*laid)))
    of_pairs = [(np.asarray(alone), np.asarray(together)) for alone, together in pairs]
    found[name]["error"] = float(max(abs(a - b).max() / (abs(a).max() + 1e-2) for a, b in of_pairs))
print(json.dumps(found))
"""
TRAINING = """
from tiny import tiny_config
from diffussm_jax.build import Parts
from diffussm_jax.config import choose

for name, options in mixers.items():
    config = tiny_config()
    config.batch_size, config.model.width = shape[0], shape[2]
    choose(config, "model.mixer.name", name)
    config.model.mixer.update(options)
    for mesh in meshes:
        task = Parts(config, mesh).task
        step = task.train_step.lower(task.abstract_state, task.batch_spec).compile()
        found[name]["collectives"] = list(collectives(step))
        state, rng, losses = task.create_state(), np.random.default_rng(0), []
        for _ in range(num_steps):
            batch = {
                key: rng.integers(0, 10 if spec.dtype.kind == "i" else 256, spec.shape).astype(spec.dtype)
                for key, spec in task.batch_spec.items()
            }
            state, metrics = step(state, batch_to_devices(mesh, batch))
            losses.append(float(metrics["loss"]))
        found[name]["losses"].append(losses)
print(json.dumps(found))
"""


def run(program, mixers):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", ""),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    arguments = json.dumps([mixers, NUM_STEPS, BATCH, L, WIDTH])
    command = [sys.executable, "-c", START + program, arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def assert_no_rows_are_gathered(of_programs):
    for name, found in of_programs.items():
        assert found["collectives"]
        for kind, shapes, op_name in found["collectives"]:
            assert not any({BATCH, BATCH // 2} & set(shape) for shape in shapes), (name, kind, shapes, op_name)


@pytest.mark.slow
def test_layers_are_the_same_and_communicate_what_they_say():
    found = run(LAYERS, MIXERS)
    for name in MIXERS:
        assert found[name]["error"] <= 1e-5, name
    assert_no_rows_are_gathered(found)
    activations = {
        name: {
            (kind, math.prod(shape))
            for kind, shapes, _ in found[name]["collectives"]
            for shape in shapes
            if ROWS in shape
        }
        for name in MIXERS
    }
    rank, state_size = 1, MIXERS["s6"]["state_size"]
    assert activations["conv"] == set()
    assert activations["s6"] == {("all-reduce", ROWS * L * (rank + 2 * state_size))}
    assert activations["attention"] == {(kind, ROWS * L * WIDTH) for kind in ("all-gather", "all-reduce")}


@pytest.mark.slow
def test_training_is_the_same():
    found = run(TRAINING, MIXERS | CONVOLUTIONS)
    for name in found:
        alone, together = np.array(found[name]["losses"])
        np.testing.assert_allclose(together, alone, rtol=1e-5, err_msg=name)
    assert_no_rows_are_gathered(found)
