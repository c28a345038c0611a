"""Rules lay parameters over the mesh, and the compiled step communicates only what it must."""

import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from tiny import tiny_config

from diffussm_jax.build import Parts
from diffussm_jax.io import path_of
from diffussm_jax.parallel.mesh import mesh_shape
from diffussm_jax.parallel.sharding import spec_of

BATCH, WIDTH, DEPTH = 24, 32, 2  # 24 is no size of any parameter
LAYERS = {"W0", "W1", "W2", "W3", "W_up", "W_down"}

COMPILE = f"""
import json, sys
from tiny import tiny_config
from diffussm_jax.build import Parts
from diffussm_jax.parallel.mesh import make_mesh
texts = []
for ssm, *mesh in json.loads(sys.argv[1]):
    config = tiny_config()
    config.batch_size, config.model.width, config.model.depth = {BATCH}, {WIDTH}, {DEPTH}
    config.model.mixer.scan, config.model.mixer.method = ssm.split()
    config.model.remat = "block"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    task = Parts(config, make_mesh(*mesh)).task
    texts.append(task.train_step.lower(task.abstract_state, task.batch_spec).compile().as_text())
print(json.dumps(texts))
"""
# SSM, data, fsdp, tensor
QUICK_CASES = [("raster fft", 1, 8, 1), ("2d fft", 2, 2, 2)]
LONG_CASES = [
    ("raster fft", 8, 1, 1),
    ("raster chunked", 2, 1, 4),
    ("raster chunked", 2, 4, 1),
    ("raster fft", 1, 1, 8),
    ("zigzag fft", 2, 2, 2),
]


def cases(condition):
    long = (pytest.param(case, marks=pytest.mark.slow) for case in LONG_CASES if condition(case))
    return [*(case for case in QUICK_CASES if condition(case)), *long]


@pytest.fixture(scope="session")
def programs(request):
    """The text of the compiled training step of each case that is tested, on 8 devices."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    tested = [case for case in (*QUICK_CASES, *LONG_CASES) if {"case": case} in parameters]
    environment = os.environ | {
        # The less LLVM has to do the better: nothing is run.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        + os.environ.get("XLA_FLAGS", ""),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", COMPILE, json.dumps(tested)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(tested, json.loads(done.stdout), strict=True))


def collectives(text, mesh):
    """(kind, shapes of the results, axes of the mesh that take part, name of the operation) of each."""
    found = []
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in text.splitlines():
        if not (match := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line)):
            continue
        shapes = [tuple(int(n) for n in s.split(",") if n) for s in re.findall(r"\[([\d,]*)\]", match[1])]
        found.append((match[2], shapes, axes_of(line, mesh), op_name_of(line)))
    return found


def gathered_layers(text):
    """The linear layers of the blocks that read what an all-gather returns.

    In JAX 0.10 an all-gather has the name of its layer, in JAX 0.12 that of the slice of the stacked parameters. There
    it is followed, through copies of the same name, to the operations that read it.
    """
    computations = [{}]  # of each: name of an instruction -> the rest of its line
    for line in text.splitlines():
        if match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line):
            computations[-1][match[1]] = match[2]
        elif line.startswith("}"):
            computations.append({})
    found = set()
    for instructions in computations:
        readers = defaultdict(list)
        for name, line in instructions.items():
            for operand in re.findall(r"%([\w.\-]+)", line.split(", metadata=")[0]):
                readers[operand].append(name)
        to_visit = [name for name, line in instructions.items() if re.search(r" all-gather(?:-start)?\(", line)]
        while to_visit:
            name = to_visit.pop()
            op_name = op_name_of(instructions[name])
            if "/blocks/" in op_name:
                found |= LAYERS & set(re.findall(r"\w+", op_name))
                continue
            of_readers = {reader: op_name_of(instructions[reader]) for reader in readers[name]}
            to_visit += [r for r, other in of_readers.items() if other in ("", op_name) or "/blocks/" in other]
    return found


def op_name_of(line):
    return next(iter(re.findall(r'op_name="([^"]*)"', line)), "")


def axes_of(line, mesh):
    """The axes along which the devices of the first group differ."""

    def device_ids(shape, order):  # of "[4,2]T(1,0)": counted up in that shape, then transposed
        ids = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
        return ids.transpose(numbers(order)) if order else ids

    def numbers(text):
        return [int(n) for n in text.split(",")]

    if match := re.search(r"(?:source_target_pairs|replica_groups)=\{\{([\d,]+)\}", line):
        group = numbers(match[1])
    elif match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        group = device_ids(match[2], match[3]).reshape(numbers(match[1]))[0]
    else:  # mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}
        match = re.search(r"=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^{}:]*)\}", line)
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        ids = device_ids(match[2] or ",".join(sizes.values()), match[3]).reshape([int(n) for n in sizes.values()])
        taking_part = [list(sizes).index(axis) for axis in re.findall(r"\w+", match[4])]
        group = ids[tuple(slice(None) if k in taking_part else 0 for k in range(ids.ndim))].ravel()
    _, fsdp, tensor = mesh
    places = [(i // (fsdp * tensor), i // tensor % fsdp, i % tensor) for i in group]
    return {axis for k, axis in enumerate(("data", "fsdp", "tensor")) if len({p[k] for p in places}) > 1}


def is_activation(shape, mesh):
    """Whether one of its sizes is the batch, or the part of it on a device."""
    return bool({BATCH, BATCH // mesh[0], BATCH // (mesh[0] * mesh[1])} & set(shape)) and shape != ()


@pytest.mark.parametrize("case", cases(lambda case: case[3] == 1), ids=str)
def test_data_and_fsdp_meshes_communicate_parameters_and_gradients_only(case, programs):
    mesh = case[1:]
    found = collectives(programs[case], mesh)
    assert found
    for kind, shapes, axes, name in found:
        assert not any(is_activation(shape, mesh) for shape in shapes), (kind, shapes, name)
        assert not axes or kind in ("all-reduce", "all-gather", "reduce-scatter"), (kind, name)
    assert gathered_layers(programs[case]) == (LAYERS if mesh[1] > 1 else set())


@pytest.mark.parametrize("case", cases(lambda case: case[3] > 1), ids=str)
def test_tensor_meshes_communicate_activations_at_linear_layers_only(case, programs):
    mesh, seen = case[1:], set()
    for kind, shapes, axes, name in collectives(programs[case], mesh):
        assert "tensor" not in axes or "/ssm/" not in name, (kind, shapes, name)
        if "tensor" not in axes or all(shape == () for shape in shapes):  # sums for the gradient's norm
            continue
        inside = re.findall(r"(?<=\W)(W0|W_up|W_down|W1|W2|W3|mul)(?=/|$)", name)
        assert "blocks" in name and inside, (kind, shapes, axes, name)
        assert all(is_activation(shape, mesh) for shape in shapes), (kind, shapes, name)
        seen |= {(kind, layer) for layer in inside}
    # h is gathered behind its nonlinearity, the product that ends it; W_down and W3 sum.
    assert {("all-gather", "mul"), ("all-reduce", "W_down"), ("all-reduce", "W3")} <= seen


def model_and_params():
    parts = Parts(tiny_config())
    return parts.model, jax.eval_shape(lambda: parts.model.init_params(parts.input_shape, 0))


def test_every_large_parameter_is_split_and_what_follows_it_too():
    model, params = model_and_params()
    mesh = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(path)
        spec = spec_of(path, leaf.shape, model.sharding_rules, mesh)
        small = ("embed", "final/", "label_embed", "time_embed/hidden")
        is_small = leaf.ndim < 2 or path.startswith(small)
        is_small |= path.endswith("bias")
        assert is_small or "fsdp" in str(spec), path
        assert spec_of(f"opt_state/0/mu/{path}", leaf.shape, model.sharding_rules, mesh) == spec
    assert spec_of("opt_state/0/count", (), model.sharding_rules, mesh) == PartitionSpec()


def test_what_cannot_be_split_is_named():
    rules = (("kernel$", ("fsdp", ("tensor", "data"))),)
    mesh = AbstractMesh((2, 3, 2), ("data", "fsdp", "tensor"))
    assert spec_of("a/kernel", (3, 8), rules, mesh) == PartitionSpec("fsdp", ("tensor", "data"))
    with pytest.raises(
        ValueError, match=r"a/kernel of shape \(4, 8\).*4 is not a multiple of the 3 devices along fsdp"
    ):
        spec_of("a/kernel", (4, 8), rules, mesh)
    with pytest.raises(ValueError, match=r"6 is not a multiple of the 4 devices along tensor x data"):
        spec_of("a/kernel", (3, 6), rules, mesh)
    with pytest.raises(ValueError, match=r"rule 'kernel\$'.*does not fit a/kernel of shape \(3,\)"):
        spec_of("a/kernel", (3,), rules, mesh)


def test_meshes_are_filled_and_wrong_ones_are_named():
    assert mesh_shape(-1, 2, 2, num_devices=16) == (4, 2, 2)
    assert mesh_shape(2, -1, 1, num_devices=8) == (2, 4, 1)
    assert mesh_shape(2, 1, 1, num_devices=8) == (2, 1, 1)
    for sizes, message in (
        ((-1, 3, 1), "fsdp = 3, tensor = 1 does not divide the 8 devices"),
        ((-1, -1, 1), "one of them may be -1"),
        ((4, 4, 1), "needs 16 devices, there are 8"),
        ((0, 1, 1), "must be positive.*data = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mesh_shape(*sizes, num_devices=8)
