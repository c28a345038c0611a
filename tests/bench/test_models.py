"""The benchmarks of a block, a training step and sampling, on a tiny model."""

import csv
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_config

from diffussm_jax.bench import bench_block, bench_configs, bench_sample, bench_step, block, configs, step
from diffussm_jax.bench.configs import parse_changes, print_rows, split_changes
from diffussm_jax.bench.measure import write_csv
from diffussm_jax.build import Parts
from diffussm_jax.config import override
from diffussm_jax.io import shapes_by_path
from diffussm_jax.models.diffussm import Block
from diffussm_jax.models.mixers import S4D, mix_phases
from diffussm_jax.plan import DoesNotFitError


@pytest.mark.slow
def test_a_step():
    config = tiny_config()
    figures = bench_step(config, repeats=1)
    assert figures["images_per_second"] == pytest.approx(8 * 1e3 / figures["step_ms"])
    assert figures["mfu"] is None  # the peak of a CPU is not known
    assert figures["peak_memory_gb"] > 0 and figures["ssm_share"] > 0
    assert set(step.COLUMNS) < set(figures)


def test_the_share_of_the_ssm_follows_depth_and_recomputation(monkeypatch):
    monkeypatch.setattr(step, "median_seconds", lambda programs, repeats: dict.fromkeys(programs, 1.0))
    config, mesh = tiny_config(), {"data": 1, "fsdp": 1, "tensor": 1}
    assert step.ssm_seconds(config, mesh) == 2  # blocks
    config.model.remat = "block"
    config.optimizer.accumulation_steps = 4
    assert step.ssm_seconds(config, mesh) == 2 * 2 * 4
    config.model.mixer.bidirectional = False
    assert step.ssm_seconds(config, mesh) is None


def test_a_block_with_its_ssm_and_without():
    figures = bench_block(tiny_config(), repeats=1)
    assert set(block.COLUMNS) < set(figures)
    expected = 1 - figures["gradient_without_ssm_ms"] / figures["gradient_ms"]
    assert figures["gradient_ssm_share"] == pytest.approx(expected)


def counts_of_a_block(mixer):
    """The shape of x and, with the SSM and without, the text and the output's shape of a forward pass."""
    module = Block(2, mixer, (2, 4), jnp.float32)
    inputs = x, c = jnp.ones((1, 4, 8)), jnp.ones((1, 8))
    params = jax.eval_shape(module.init, jax.random.key(0), x, c)["params"]
    part = block.Part("block", 1, lambda params, x, c: module.apply({"params": params}, x, c)[0], None, inputs, x, True)
    jaxprs = [jax.make_jaxpr(block.part_functions(part, has_ssm=has)[0])(params, x, c) for has in (True, False)]
    return x.shape, [(str(jaxpr), jaxpr.out_avals[0].shape) for jaxpr in jaxprs]


def test_without_means_that_no_ssm_is_computed():
    expected, [(has, shape), (has_not, other)] = counts_of_a_block(functools.partial(S4D, state_size=4, method="fft"))
    assert shape == other == expected
    assert "fft" in has and "fft" not in has_not
    assert has.count("dot_general") > has_not.count("dot_general") == 7  # the linear layers are all there


@pytest.mark.slow
def test_sampling():
    config = tiny_config()
    figures = bench_sample(config, repeats=1)
    assert figures["images_per_second"] == pytest.approx(8 / (3e-3 * figures["step_ms"]))
    assert (figures["sampler"], figures["num_steps"]) == ("ddim", 3)


def test_what_does_not_fit_is_told_and_the_rest_goes_on(capsys):
    small, large = tiny_config(), tiny_config()
    large.model.width = 32

    def bench(config):
        if config.model.width == 32:
            raise DoesNotFitError("the step needs 9.0 GB")
        return {"step_ms": 5.0, "mfu": None}

    rows = print_rows([large, small], bench, {"step_ms": ".1f", "mfu": ".1%"})
    out = capsys.readouterr().out
    assert "width 32" in out and "does not fit: the step needs 9.0 GB" in out and "step_ms 5.0\n" in out
    assert [row["width"] for row in rows] == [16]

    def broken(config):
        raise ValueError("config.batch_size is wrong")

    with pytest.raises(ValueError, match="batch_size is wrong"):
        print_rows([small], broken, {})


@pytest.mark.parametrize("bench, module", [(bench_step, step), (bench_block, block)])
def test_plans_are_held_against_the_memory(bench, module, monkeypatch):
    monkeypatch.setattr(module, "memory_limit", lambda: 1000)
    with pytest.raises(DoesNotFitError, match="there are 0.0"):
        bench(tiny_config(), repeats=1)


def test_configs_of_sizes_and_files():
    found = list(bench_configs(["S", "64"], [256, 512], changes={"model.depth": 2}, batch_size=4))
    assert [(c.model.width, c.data.image_size) for c in found] == [(384, 256), (384, 512), (64, 256), (64, 512)]
    assert {(c.model.depth, c.batch_size) for c in found} == {(2, 4)}
    files = ["configs/digits.py", "configs/imagenet256.py:L"]
    digits, large = bench_configs(["XL"], [256], files=files, changes=parse_changes(["model.remat=dots"]))
    assert (digits.data.source, digits.model.remat, large.model.width) == ("digits", "dots", 768)
    changes = parse_changes(["model.ssm_method=fft", "sampling.sampler=ddpm"])  # an old name, and a component
    (digits,) = bench_configs([], [], files=files[:1], changes=changes)
    assert (digits.model.mixer.method, digits.sampling.sampler, "eta" in digits.sampling) == ("fft", "ddpm", False)
    with pytest.raises(ValueError, match="got 'M'"):
        list(bench_configs(["M"], [256]))
    with pytest.raises(ValueError, match="model.deph"):
        list(bench_configs(["S"], [256], changes={"model.deph": 2}))
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_changes(["model.depth"])
    assert split_changes("s4d+method=fft+state_size=8") == ("s4d", {"method": "fft", "state_size": 8})
    assert configs.IMAGE_SIZES == (256, 512, 1024, 2048)


def test_rows_of_different_models_have_different_columns(tmp_path):
    write_csv(
        tmp_path / "rows.csv", [{"model": "dit", "ms": 1.0}, {"model": "diffussm", "ssm_method": "fft", "ms": 0.5}]
    )
    assert (tmp_path / "rows.csv").read_text() == "model,ms,ssm_method\ndit,1,\ndiffussm,0.5,fft\n"


def test_the_command_measures_a_file_of_configs(bench_command, tmp_path):
    command = ["sample", "--config=configs/digits.py", "--batch_size=2", "--steps=2", "--repeats=1"]
    out = bench_command(*command, "--set=model.width=8,model.depth=1", f"--csv={tmp_path / 'sample.csv'}")
    assert "width 8" in out and "images_per_second" in out
    with open(tmp_path / "sample.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["num_steps"] == "2" and float(row["images_per_second"]) > 0


def test_without_a_mixer_that_goes_along_positions():
    """It has no method for phases; each of its outputs becomes its input too."""

    class Sine(nn.Module):
        bidirectional: bool = False

        def __call__(self, u, grid=None):
            return jnp.sin(u)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, u):
            return mix_phases(Sine(name="ssm"), u, (2, 4))

    u = jax.random.normal(jax.random.key(0), (2, 3, 1, 4))  # [M, D, B, J]
    with nn.intercept_methods(block._without_ssm):
        assert (Outer().apply({}, u)[:, 0] == u).all()
    expected, [(has, shape), (has_not, other)] = counts_of_a_block(functools.partial(Sine))
    assert shape == other == expected and "= sin " in has and "= sin " not in has_not


def test_a_block_of_a_transformer_has_no_ssm():
    config = override(tiny_config(), {"model.name": "dit", "model.num_heads": 2, "model.remat": "block"})
    figures = bench_block(config, repeats=1)
    assert (figures["part"], figures["turns"]) == ("block", 2)
    assert figures["gradient_ms"] > 0 and not [key for key in figures if "ssm" in key]
    assert "checkpoint" not in str(jaxpr_of(config))  # nothing is recomputed


@pytest.mark.slow
def test_a_network_without_repeated_blocks_is_measured_whole():
    changes = {"model.name": "unet", "model.width": 8, "model.channel_mult": (1, 2), "model.norm_num_groups": 4}
    config = override(tiny_config(), changes | {"model.num_res_blocks": 1, "model.attention_resolutions": (4,)})
    part = block.measured_part(config)
    assert (part.name, part.turns, part.has_ssm) == ("network", 1, False)
    assert [x.shape for x in part.inputs] == [(8, 8, 8, 1)] and part.y.shape == (8, 8, 8, 2)
    params = Parts(config).parameter_shapes
    assert shapes_by_path(jax.eval_shape(part.init, jax.random.key(0))) == params
    text = str(jaxpr_of(config))
    assert "conv_general_dilated" in text


def jaxpr_of(config):
    part = block.measured_part(config)
    params = jax.eval_shape(part.init, jax.random.key(0))
    return jax.make_jaxpr(block.part_functions(part)[1])(params, *part.inputs, part.y)
