"""DiT's rules split its heads and its MLP, and a compiled gradient communicates at linear layers only."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from diffussm_jax.io import path_of
from diffussm_jax.models import DiT
from diffussm_jax.models.dit import CONDITIONINGS
from diffussm_jax.parallel.hlo import Collective, collectives
from diffussm_jax.parallel.sharding import spec_of

AXES = ("data", "fsdp", "tensor")
COMPILE = """
import json, sys, jax
from diffussm_jax.models import DiT
from diffussm_jax.parallel.mesh import make_mesh, over_batch
from diffussm_jax.parallel.sharding import shardings
conditioning, *mesh = json.loads(sys.argv[1])
mesh, shape = make_mesh(*mesh), (8, 8, 1)
model = DiT(width=32, num_heads=4, depth=2, conditioning=conditioning, has_qk_norm=True, num_registers=2, remat="block")
params, batch = model.abstract_params(shape), model.abstract_arguments(shape, 24)
layout = shardings(params, model.sharding_rules, mesh)
def loss(params, *batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return (model.apply_params(params, *batch) ** 2).mean()
step = jax.jit(jax.value_and_grad(loss), in_shardings=(layout, *[over_batch(mesh)] * 3), out_shardings=(None, layout))
print(json.dumps(step.lower(params, *batch).compile().as_text()))
"""


def communicated(conditioning, mesh) -> list[Collective]:
    """The collectives of a loss with its gradients, on 8 devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        + os.environ.get("XLA_FLAGS", ""),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", COMPILE, json.dumps([conditioning, *mesh])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return collectives(json.loads(done.stdout), 8)


@pytest.mark.parametrize(
    "conditioning",
    ["cross_attention", *(pytest.param(x, marks=pytest.mark.slow) for x in ("adaln_zero", "in_context"))],
)
def test_attention_does_not_communicate(conditioning):
    """On fsdp 2 x tensor 4 each device has one of the 4 heads."""
    fsdp, summed = 2, set()
    for found in communicated(conditioning, (1, fsdp, 4)):
        if "/blocks/" not in found.op_name:
            continue
        inside = set(re.findall(r"\w+_attention/\(?(\w+)", found.op_name))
        assert inside <= {"qkv", "q", "kv", "proj", "q_norm", "k_norm"}, found
        if found.kind == "all-gather":  # of parameters
            assert found.group_size == fsdp, found
        elif found.kind == "all-reduce":
            summed |= set(re.findall(r"(\w+_attention/proj|fc2)/bj[de],de->", found.op_name))
        else:  # the small gradient of the modulation, which devices along `tensor` share
            assert "/modulation/" in found.op_name, found
    assert {"self_attention/proj", "fc2"} <= summed
    assert ("cross_attention/proj" in summed) == (conditioning == "cross_attention")


@pytest.mark.slow
def test_data_and_fsdp_meshes_communicate_parameters_and_gradients_only():
    for found in communicated("adaln_zero", (2, 4, 1)):
        assert found.kind in ("all-reduce", "all-gather", "reduce-scatter"), found
        # 3 images a device, of 16 patches and 2 registers, with 32 channels in float32; kernels are smaller or equal.
        assert found.kind != "all-gather" or found.result_bytes <= 6 * 32 * 32 * 4, found


def test_every_large_parameter_is_split():
    mesh = AbstractMesh((1, 2, 4), AXES)
    for conditioning in CONDITIONINGS:
        model = DiT(width=32, num_heads=4, conditioning=conditioning, has_qk_norm=True, num_registers=2)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract_params((8, 8, 1))):
            path = path_of(path)
            spec = spec_of(path, leaf.shape, model.sharding_rules, mesh)
            is_kernel = path.startswith("blocks/") and path.endswith("kernel")
            assert not is_kernel or "fsdp" in spec, path
            is_by_heads = re.search(r"(qkv|q|kv|proj|fc1|fc2)/kernel$|(qkv|q|kv|fc1)/bias$", path)
            assert ("tensor" in spec) == bool(is_by_heads), path


def test_heads_that_cannot_be_split_are_named():
    model = DiT(width=24, num_heads=6)
    for num_devices, message in ((3, None), (4, "num_heads = 6 is not a multiple of the 4 devices along tensor")):
        with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1, num_devices), AXES)):
            if message is None:
                model.check((8, 8, 1))
                continue
            with pytest.raises(ValueError, match=message):
                model.check((8, 8, 1))
