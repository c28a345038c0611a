"""`python -m diffussm_jax.plan`: its count of FLOPs, its search, and real compiles where compilers are installed."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.interpreters import partial_eval
from tiny import tiny_config

from diffussm_jax import plan as plan_lib
from diffussm_jax.build import Parts
from diffussm_jax.config import load_config, override
from diffussm_jax.models import Costs
from diffussm_jax.parallel.hlo import Collective
from diffussm_jax.parallel.topology import compile_only_devices, parse_machine

ROOT = Path(__file__).parent.parent


def dot_multiply_adds(jaxpr):
    """Of all matrix products of a jaxpr, those in a scan as often as it turns."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += eqn.outvars[0].aval.size * int(np.prod([lhs[axis] for axis in contracted]))
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += turns * dot_multiply_adds(inner)
    return total


def small_config(method="recurrent", **changes):
    config = tiny_config()
    config.data.image_size = 16  # L = 256, four chunks
    config.model.width = 32
    return override(config, {f"model.{key}": value for key, value in {"ssm_method": method, **changes}.items()})


def costs(config, platform="cpu"):
    parts = Parts(config, platform=platform)
    return parts.model.costs(parts.input_shape)


def forward_and_gradient(config):
    """Functions of (params, batch size), and the parameters' shapes."""
    model, shape = Parts(config).model, Parts(config).input_shape

    def arguments(batch_size):
        return jnp.zeros((batch_size, *shape)), jnp.zeros(batch_size), jnp.zeros(batch_size, jnp.int32)

    def forward(params, batch_size):
        return model.apply({"params": params}, *arguments(batch_size))

    def gradient(params, batch_size):
        return jax.value_and_grad(lambda params: jnp.sum(forward(params, batch_size)))(params)

    params = jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments(1))["params"])
    return forward, gradient, params


def an_image(function, params):
    """Multiply-adds of a function's matrix products for one more image of a batch."""
    of_batch = []
    for batch_size in (2, 3):
        jaxpr = jax.make_jaxpr(function, static_argnums=1)(params, batch_size).jaxpr
        jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as XLA drops what nobody uses
        of_batch.append(dot_multiply_adds(jaxpr))
    return of_batch[1] - of_batch[0]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_linear_layers_are_counted_exactly(bidirectional):
    config = small_config(bidirectional=bidirectional)
    forward, _, params = forward_and_gradient(config)
    assert an_image(forward, params) == costs(config).total


@pytest.mark.parametrize("remat", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("none", "dots")), "block"])
def test_a_step_is_three_forward_passes_and_what_is_recomputed(remat):
    config = small_config(remat=remat)
    _, gradient, params = forward_and_gradient(config)
    total = costs(config).total
    D, L = config.model.width, 256
    # The backward pass needs no gradients of the data and of the time's features.
    expected = 3 * total - L * config.data.num_channels * D - 256 * D + costs(config).recomputed
    assert an_image(gradient, params) == expected


@pytest.mark.parametrize(
    "bidirectional,scan",
    [
        pytest.param(True, "raster", marks=pytest.mark.slow),
        pytest.param(False, "raster", marks=pytest.mark.slow),
        (True, "2d"),
    ],
)
def test_matrix_products_of_the_chunked_ssm_are_counted_exactly(bidirectional, scan):
    config = small_config("chunked", bidirectional=bidirectional, scan=scan)
    forward, _, params = forward_and_gradient(config)
    assert an_image(forward, params) - costs(config).total == costs(config).mixer


def test_ffts_are_counted():
    config = small_config("fft", depth=1)
    # n = 512 real points: 3 transforms of 5/4 n log2 n, and 2 products of 257 complex numbers. On CPUs n = 528.
    assert costs(config, "gpu").mixer == 32 * (3 * 5 * 512 * 9 // 4 + 3 * 2 * 257)
    expected = 32 * (3 * 5 / 4 * 528 * math.log2(528) + 3 * 2 * 265)
    assert costs(config, "cpu").mixer == pytest.approx(expected, abs=1)
    assert costs(small_config("recurrent"), "cpu").mixer is None


@pytest.mark.slow
def test_the_count_agrees_with_xla_on_an_unrolled_model():
    config = small_config(width=256, scan_unroll=2, state_size=2)
    forward, gradient, params = forward_and_gradient(config)
    forward_count = costs(config).total
    for function, passes in ((forward, 1), (gradient, 3)):
        compiled = jax.jit(function, static_argnums=1).lower(params, 4).compile()
        # XLA counts the nonlinearities and the optimizer, too.
        assert compiled.cost_analysis()["flops"] == pytest.approx(2 * 4 * passes * forward_count, rel=0.03)


def test_changes_come_smallest_first_and_are_valid():
    config = tiny_config()  # a batch of 8, width 16
    changes = [plan_lib.as_flags(change) for change in plan_lib.smaller_changes(config, 4)]
    most = "--config.model.remat=block"
    assert changes == [
        "--config.model.remat=dots",
        most,
        f"{most} --config.optimizer.accumulation_steps=2",
        f"{most} --config.mesh.data=-1 --config.mesh.fsdp=2",
        f"{most} --config.mesh.data=-1 --config.mesh.fsdp=4",
        f"{most} --config.mesh.data=-1 --config.mesh.fsdp=2 --config.optimizer.accumulation_steps=2",
        f"{most} --config.mesh.data=-1 --config.mesh.fsdp=4 --config.optimizer.accumulation_steps=2",
    ]
    config.model.remat = "block"
    assert next(plan_lib.smaller_changes(config, 4)) == {"optimizer.accumulation_steps": 2}


def fits_from(monkeypatch, is_enough, error=plan_lib.DoesNotFitError):
    """Replaces the compiler by a rule; returns the list of what was compiled."""
    compiled = []

    def make_plan(config, machine, *, has_full_effort):
        compiled.append(config)
        if not is_enough(config):
            raise error("too large")
        return config

    monkeypatch.setattr(plan_lib, "make_plan", make_plan)
    return compiled


def test_search_stops_at_the_first_that_fits(monkeypatch, capsys):
    compiled = fits_from(monkeypatch, lambda config: config.mesh.fsdp == 2)
    plan, change = plan_lib.search(tiny_config(), parse_machine("v5e:2x2"))
    assert plan is compiled[-1] and len(compiled) == 4
    assert change == {"model.remat": "block", "mesh.data": -1, "mesh.fsdp": 2}
    assert capsys.readouterr().out.count("does not fit: too large") == 3


def test_search_gives_up_after_so_many_compiles(monkeypatch):
    compiled = fits_from(monkeypatch, lambda config: False)
    assert plan_lib.search(tiny_config(), parse_machine("v5e:2x2"), max_tries=2) is None
    assert len(compiled) == 2
    compiled = fits_from(monkeypatch, lambda config: config.mesh.fsdp == 4, error=plan_lib.StateDoesNotFitError)
    assert plan_lib.search(tiny_config(), parse_machine("v5e:2x2"), max_tries=1) is not None
    assert len(compiled) == 5  # none of those before was compiled


XL_ON_V5E_256 = plan_lib.Plan(
    machine=parse_machine("v5e-256"),
    mesh={"data": 256, "fsdp": 1, "tensor": 1},
    batch_size=256,
    settings={"remat": "block"},
    state_bytes={"parameters": 2**30, "optimizer": 2**31},
    batch_bytes=2**20,
    peak_bytes=2**33,
    costs=Costs({}, {"linear": 295_668_000_000}, recomputed=295_573_000_000, mixer=None),
    collectives=[
        Collective(
            kind="all-reduce", result_bytes=10**9, group_size=256, count=2, is_count_known=True, op_name="a gradient"
        )
    ],
    compile_seconds=60.0,
)


def test_times_by_hand():
    # 256 chips of 197 TFLOP/s; an image is 6 x 295.668 G FLOPs, and 2 x 295.573 G more when blocks are recomputed.
    plan = XL_ON_V5E_256
    assert plan.images_per_second(0.4) == pytest.approx(0.4 * 256 * 197e12 / (6 * 295.668e9))
    assert plan.floor_seconds == pytest.approx(256 * (6 * 295.668e9 + 2 * 295.573e9) / (256 * 197e12))
    text = plan_lib.report(plan, mfu=0.4, num_images=660e6)
    for figure in (
        "11371.3",
        "0.7 days, 4127 chip-hours",
        "8.000  of 15.75: it fits",
        "not counted",
        "3.984",
        "227073",
    ):
        assert figure in text, figure
    assert "at least" not in text
    unsure = dataclasses.replace(plan.collectives[0], is_count_known=False)
    assert "at least" in plan_lib.report(dataclasses.replace(plan, collectives=[unsure]), mfu=0.4, num_images=660e6)
    values = json.loads(json.dumps(plan_lib.as_dict(plan, mfu=0.4, num_images=660e6)))
    assert values["machine"]["shape"] == [16, 16] and values["collectives"][0]["sent_bytes"] == 2e9 * 2 * 255 / 256


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    with pytest.raises(ValueError, match=r"libtpu: pip install .*plan"):
        compile_only_devices(parse_machine("v4-8"))

    def not_there(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", not_there)
    with pytest.raises(ValueError, match=r"pip install .*plan-gpu.*cuda12.*JAX_PLATFORMS=cpu"):
        compile_only_devices(parse_machine("h100"))


@pytest.mark.parametrize(
    "message,expected",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.54G) "
            "exceeds available HBM (15.75G).",
            "takes 18.54 GiB of a device's memory, there are 15.75",
        ),
        ("RESOURCE_EXHAUSTED: Used 20.00G of 15.48G hbm. Exceeded hbm capacity by 4.52G.", "takes 20.00 GiB"),
        ("RESOURCE_EXHAUSTED: hbm is full", "more than the 16.00 GiB"),
    ],
)
def test_what_the_compiler_says_about_memory(message, expected):
    error = plan_lib._explained(RuntimeError(message), 2**34)
    assert isinstance(error, plan_lib.DoesNotFitError) and expected in str(error)


def test_other_errors_of_the_compiler_are_not_about_memory():
    error = plan_lib._explained(RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"), 2**34)
    assert not isinstance(error, plan_lib.DoesNotFitError) and "vmem" in str(error)


# Real compilers, in processes of their own, as a user runs them.

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra plan)"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None and importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX's CUDA plugin is not installed (extra plan-gpu or cuda12)",
)


def run_plan(*arguments):
    tiny = "--config=configs/digits.py --config.model.width=16 --config.model.depth=3 --config.model.scan_unroll=1"
    tiny += " --config.model.ssm_method=fft --config.batch_size=8"
    return subprocess.run(
        [sys.executable, "-m", "diffussm_jax.plan", *tiny.split(), *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"},
        capture_output=True,
        text=True,
    )


def check_real(topology, num_devices, tmp_path, *arguments):
    done = run_plan(f"--topology={topology}", f"--json={tmp_path / 'plan.json'}", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "it fits" in done.stdout
    values = json.loads((tmp_path / "plan.json").read_text())
    config = load_config(str(ROOT / "configs" / "digits.py"))
    config.model.update({"width": 16, "depth": 3})
    _, _, params = forward_and_gradient(config)
    parameter_bytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    state = values["state_bytes"]
    assert values["peak_bytes"] > sum(state.values())
    sent = [c for c in values["collectives"] if c["kind"] == "all-reduce" and c["group_size"] == num_devices]
    return state, parameter_bytes, sent


@needs_libtpu
def test_a_tpu_slice(tmp_path):
    state, parameter_bytes, sent = check_real("v4-8", 4, tmp_path)
    assert state["parameters"] == state["EMA"] == parameter_bytes
    assert state["optimizer"] == pytest.approx(2 * parameter_bytes, abs=8)  # and counters
    # Every gradient is summed over the devices: of the blocks once a turn of the scan.
    assert sum(c["count"] * c["result_bytes"] for c in sent) >= parameter_bytes
    assert all(c["is_count_known"] for c in sent) and {c["count"] for c in sent} <= {1, 3}


@needs_libtpu
@pytest.mark.parametrize(
    "flags",
    [
        "model.name=dit model.width=12 model.num_heads=2 model.scan_unroll=1",
        "model.name=unet model.width=32 model.channel_mult=(1,) model.num_res_blocks=1",
    ],
)
def test_a_tpu_slice_for_other_backbones(flags, tmp_path):
    command = [sys.executable, "-m", "diffussm_jax.plan", "--config=configs/digits.py", "--topology=v5e:2x2"]
    command += [*(f"--config.{flag}" for flag in flags.split()), f"--json={tmp_path / 'plan.json'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "it fits" in done.stdout, done.stdout + done.stderr
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["costs"]["total"] > 0 and values["peak_bytes"] > sum(values["state_bytes"].values())


@needs_libtpu
def test_what_does_not_fit_is_told_so_and_what_would():
    done = run_plan("--topology=v5e:2x2", "--config.batch_size=262144")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DOES NOT FIT v5e:2x2: the step takes" in done.stdout and "there are 15.75" in done.stdout
    assert "It fits with --config.model.remat=dots" in done.stdout


@needs_libtpu
def test_a_training_state_that_is_too_large_is_not_compiled():
    config = tiny_config()
    config.model.width = 16384
    with pytest.raises(plan_lib.StateDoesNotFitError, match=r"state alone takes .* GiB .* there are 15.75"):
        plan_lib.make_plan(config, parse_machine("v5e:2x2"))


@needs_cuda
def test_gpus(tmp_path):
    state, parameter_bytes, sent = check_real("h100:2", 2, tmp_path)
    assert state["parameters"] == parameter_bytes
    assert sum(c["count"] * c["result_bytes"] for c in sent) >= parameter_bytes


def test_an_unknown_machine_is_refused_in_a_line():
    done = run_plan("--topology=v9:2x2")
    assert done.returncode == 1 and "unknown machine 'v9:2x2'" in done.stderr and "Traceback" not in done.stderr
