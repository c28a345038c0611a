"""The benchmarks of a block, a training step and sampling, on a tiny model."""

import csv

import pytest
from tiny import tiny_config

from diffussm_jax.bench import bench_block, bench_configs, bench_sample, bench_step, block, configs, step
from diffussm_jax.bench.configs import parse_changes, print_rows
from diffussm_jax.plan import DoesNotFitError


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


def test_without_means_that_no_ssm_is_computed():
    import functools

    import jax
    import jax.numpy as jnp

    from diffussm_jax.models.diffussm import S4D, Block

    module = Block(2, functools.partial(S4D, state_size=4, method="fft"), (2, 4), jnp.float32)
    x, c = jnp.ones((1, 4, 8)), jnp.ones((1, 8))
    params = jax.eval_shape(module.init, jax.random.key(0), x, c)["params"]
    text = {}
    for has_ssm in (True, False):
        forward_pass, _ = block._functions(module, has_ssm)
        jaxpr = jax.make_jaxpr(forward_pass)(params, x, c)
        text[has_ssm] = str(jaxpr)
        assert jaxpr.out_avals[0].shape == x.shape
    assert "fft" in text[True] and "fft" not in text[False]
    assert text[True].count("dot_general") > text[False].count("dot_general") == 7  # the linear layers are all there


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
    (digits,) = bench_configs(["XL"], [256], file="configs/digits.py", changes=parse_changes(["model.remat=dots"]))
    assert (digits.data.source, digits.model.remat) == ("digits", "dots")
    changes = parse_changes(["model.ssm_method=fft", "sampling.sampler=ddpm"])  # an old name, and a component
    (digits,) = bench_configs([], [], file="configs/digits.py", changes=changes)
    assert (digits.model.mixer.method, digits.sampling.sampler, "eta" in digits.sampling) == ("fft", "ddpm", False)
    with pytest.raises(ValueError, match="got 'M'"):
        list(bench_configs(["M"], [256]))
    with pytest.raises(ValueError, match="model.deph"):
        list(bench_configs(["S"], [256], changes={"model.deph": 2}))
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_changes(["model.depth"])
    assert configs.IMAGE_SIZES == (256, 512, 1024, 2048)


def test_the_command_measures_a_file_of_configs(bench_command, tmp_path):
    command = ["sample", "--config=configs/digits.py", "--batch_size=2", "--steps=2", "--repeats=1"]
    out = bench_command(*command, "--set=model.width=8,model.depth=1", f"--csv={tmp_path / 'sample.csv'}")
    assert "width 8" in out and "images_per_second" in out
    with open(tmp_path / "sample.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["num_steps"] == "2" and float(row["images_per_second"]) > 0


def test_without_a_mixer_that_goes_along_positions():
    """It has no method for phases; each of its outputs becomes its input too."""
    import functools

    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from diffussm_jax.models.diffussm import Block
    from diffussm_jax.models.mixers import mix_phases

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
    module = Block(2, functools.partial(Sine), (2, 4), jnp.float32)
    x, c = jnp.ones((1, 4, 8)), jnp.ones((1, 8))
    forward_pass, _ = block._functions(module, has_ssm=False)
    params = jax.eval_shape(module.init, jax.random.key(0), x, c)["params"]
    assert jax.eval_shape(forward_pass, params, x, c).shape == x.shape
