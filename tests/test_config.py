"""A wrong config is refused before anything is built, by a message that names the value and the choices."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from programs import run_program
from tiny import tiny_config

from diffussm_jax import cli, load_run, main, migrations, registry, ssm
from diffussm_jax.build import Parts
from diffussm_jax.config import (
    GROUPS,
    choose,
    complete,
    default_config,
    from_plain,
    import_modules,
    load_config,
    paper_config,
    to_plain,
)
from diffussm_jax.data_config import left_to_data
from diffussm_jax.diffusion import DDIM, Heun, RectifiedFlow, Velocity
from diffussm_jax.experiment import build_experiment
from diffussm_jax.models import DiffuSSM, diffussm
from diffussm_jax.models.mixers import S4D, s4d
from diffussm_jax.options import flatten
from diffussm_jax.training.checkpoint import Best
from diffussm_jax.training.loop import train
from diffussm_jax.training.optimizer import DECAYS
from diffussm_jax.validation import check_same_experiment, known_options, validate

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
DIGITS = f"--config={ROOT}/configs/digits.py"


def test_choices_are_those_of_the_code():
    known = known_options(default_config())
    for key, names in {
        "model.mixer.method": ssm.METHODS,
        "model.mixer.discretization": ssm.DISCRETIZATIONS,
        "model.mixer.initialization": ssm.INITIALIZATIONS,
        "model.mixer.scan": s4d.SCANS,
        "model.remat": diffussm.REMAT_POLICIES,
        "optimizer.decay": DECAYS,
    }.items():
        assert set(known[key].choices.names) == set(names), key
    assert {"linear", "cosine", "rectified_flow"} <= set(registry.names("process"))
    assert {"ddpm", "ddim", "heun"} <= set(registry.names("sampler"))
    assert {"noise", "x_0", "v", "velocity"} <= set(registry.names("target"))
    assert {"digits", "images", "latents"} <= set(registry.names("source"))
    assert default_config().model.mixer.method == ssm.DEFAULT_METHOD


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid_and_tells_its_command(path):
    config = load_config(str(path))
    if left_to_data(config):
        config.data.update(num_classes=10, image_size=64, num_channels=3, split="", eval_split="")
        config.data.update(downsampling=1, scaling_factor=1.0)
    validate(config)
    assert flatten(config).keys() == known_options(config).keys() | {"hooks"}
    assert f"--config=configs/{path.name}" in path.read_text().split('"""')[1]


@pytest.mark.parametrize("size,width,depth", [("S", 384, 12), ("L", 768, 24), ("XL", 1152, 29)])
def test_the_papers_configs_come_in_sizes(size, width, depth):
    for name in ("imagenet256", "imagenet512", "lsun_church256", "lsun_bedroom256"):
        config = load_config(f"{ROOT}/configs/{name}.py:{size}")
        assert (config.model.width, config.model.depth) == (width, depth)
        with pytest.raises(ValueError, match=r"needs a path: give --config.data.path=\.\.\."):
            build_experiment(config)
    with pytest.raises(ValueError, match=r"unknown model size 'M'; choose one of S, L, XL"):
        paper_config("M", image_size=256, num_classes=0)


def test_a_config_file_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no config file 'configs/digit.py'"):
        load_config("configs/digit.py")
    (tmp_path / "empty.py").write_text('"""Nothing."""\n')
    with pytest.raises(ValueError, match=r"empty.py defines no get_config"):
        load_config(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("model.name", "dit2", "config.model.name is 'dit2'; choose one of diffussm"),
        ("model.mixer.name", "s5", "config.model.mixer.name is 's5'; choose one of s4d"),
        ("model.mixer.method", "fftt", "'fftt'; choose one of auto, recurrent, associative, fft, chunked, pallas"),
        ("model.mixer.scan", "3d", "config.model.mixer.scan is '3d'; choose one of raster, 2d"),
        ("model.depth", 0, "config.model.depth must be a whole number of at least 1, got 0"),
        ("model.hourglass_ratio", 3, r"M = 3 must divide the width W = 8 .*\(so that L = H W = 64"),
        ("model.width", 18, "config.model: width must be a multiple of 4.*got 18"),
        ("model.mixer.state_size", 5, "must be even, got 5"),
        ("data.source", "imagenet", "'imagenet'; choose one of digits, images, latents"),
        ("data.downsampling", 3, "image_size = 8 is not a multiple of config.data.downsampling = 3"),
        ("data.downsampling", 2, "config.data.downsampling and scaling_factor must be 1 for pixels, got 2 and 1.0"),
        ("data.random_crop", True, "random_crop is for the source images, not digits"),
        ("data.eval_split", "", "config.eval_every needs held-out data: set config.data.eval_split or holdout"),
        ("diffusion.schedule", "sigmoid", "'sigmoid'; choose one of linear, scaled_linear, cosine"),
        ("diffusion.target", "x0", "'x0'; choose one of noise, x_0, v, velocity"),
        ("diffusion.weighting", "snr", "config.diffusion.weighting is 'snr'; choose one of none, min_snr, p2"),
        ("diffusion.has_zero_terminal_snr", True, "config.diffusion: the target Noise divides by alpha, which is 0"),
        ("diffusion.num_steps", 20, "config.diffusion.num_steps must be from 21 to 100000, got 20"),
        ("optimizer.ema_decay", 1.5, "config.optimizer.ema_decay must be from 0 to 1, got 1.5"),
        ("optimizer.learning_rate", math.nan, "config.optimizer.learning_rate must be .* got nan"),
        ("optimizer.decay", "linear", "config.optimizer.decay is 'linear'; choose one of constant, cosine"),
        ("conditioners.label.dropout", 2.0, "config.conditioners.label.dropout must be from 0 to 1, got 2.0"),
        ("sampling.num_steps", 2000, "config.sampling: num_steps must be .* 1000, got 2000"),
        ("sampling.time_grid", "cubic", "config.sampling.time_grid is 'cubic'; choose one of uniform, log_snr, karras"),
        ("sampling.dynamic_threshold", 99.5, "config.sampling.dynamic_threshold must be from 0 to 1, got 99.5"),
        ("sampling.dynamic_threshold", -0.1, "config.sampling.dynamic_threshold must be from 0 to 1, got -0.1"),
        ("sampling.guidance_rescale", 2.0, "config.sampling.guidance_rescale must be from 0 to 1, got 2.0"),
        ("sampling.sampler", "euler9", "config.sampling.sampler is 'euler9'; choose one of ddpm, ddim, heun"),
        ("best_mode", "most", "config.best_mode is 'most'; choose one of min, max"),
        ("task.name", "gan9", "config.task.name is 'gan9'; choose one of diffusion"),
        ("mesh.data", 16, "config.mesh: data = 16, fsdp = 1, tensor = 1 needs 16 devices, there are 8"),
        ("mesh.tensor", 3, "config.mesh: data = -1, fsdp = 1, tensor = 3 does not divide the 8 devices"),
        ("batch_size", 257, "batch_size = 257 is not a multiple of 8: config.mesh.data = 8 x fsdp = 1 devices x"),
        ("optimizer.accumulation_steps", 3, "batch_size = 256 is not a multiple of 24: .*accumulation_steps = 3"),
        ("model.remat", "all", "config.model.remat is 'all'; choose one of none, dots, block"),
        ("optimizer.learning_rate", math.inf, "config.optimizer.learning_rate must be finite, got inf"),
        ("optimizer.weight_decay", math.inf, "config.optimizer.weight_decay must be finite, got inf"),
        ("sampling.guidance_interval", (1.0,), r"interval must be \(low, high\) with low <= high, got \(1.0,\)"),
        ("sampling.guidance_interval", (9.0, 1.0), r"interval must be .* got \(9.0, 1.0\)"),
        ("sampling.guidance_interval", (0.0, math.nan), r"interval must be .* got \(0.0, nan\)"),
        ("seed", -1, "config.seed must be from 0 to 4294967295, got -1"),
        ("seed", 10**30, "config.seed must be from 0 to 4294967295, got 10{30}$"),
    ],
)
def test_wrong_values_are_named(key, value, message):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        validate(config, num_devices=8)


def test_a_warmup_that_leaves_no_step_for_the_decay_is_named():
    config = default_config()
    config.optimizer.update({"decay": "cosine", "warmup_steps": 400_000})
    with pytest.raises(ValueError, match="config.optimizer: warmup_steps = 400000 must be fewer than num_steps = 4"):
        validate(config)


def test_the_width_must_be_a_multiple_of_what_splits_it():
    config = default_config()
    config.mesh.fsdp, config.mesh.tensor, config.model.width = 4, 2, 388
    with pytest.raises(ValueError, match="388 is not a multiple of the 8 devices along (fsdp x tensor|tensor x fsdp)"):
        validate(config, num_devices=8)
    config.model.width = 384
    validate(config, num_devices=8)


@pytest.mark.parametrize("key,value", [("data.num_classes", 0), ("conditioners.label.dropout", 0.0)])
def test_guidance_needs_a_null_label(key, value):
    config = default_config()
    config.sampling.guidance_scale = 2.0
    validate(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match="guidance_scale = 2.0 needs a null condition"):
        validate(config)


def test_keys_must_be_those_that_are_known_and_those_that_are_missing_have_their_defaults():
    config = default_config()
    del config.optimizer.decay, config.model.mixer
    del config.sampling["num_steps"]
    validate(config)
    for key, near in {
        "model.dpth": "config.model.depth",
        "model.mixer.state_siz": "config.model.mixer.state_size",
        "model.state_size": "config.model.mixer.state_size",
        "num_stpes": "config.num_steps",
        "sampling.etaa": "config.sampling.seed",
    }.items():
        wrong = default_config()
        wrong.update_from_flattened_dict({key: 3})
        hint = f'(.|\n)*Did you mean "{near}"' if key != "sampling.etaa" else ""
        with pytest.raises(ValueError, match=f"'config.{re.escape(key)}'{hint}"):
            validate(wrong)


def test_data_must_have_the_configs_shape():
    config = default_config()
    config.data.num_classes = 7
    with pytest.raises(ValueError, match="num_classes = 7, but digits.* has 10 classes"):
        build_experiment(config)
    config.data.num_classes, config.data.num_channels = 10, 3
    with pytest.raises(ValueError, match="images have 1 channels, config.data.num_channels = 3"):
        build_experiment(config)


def test_a_config_survives_json():
    config = default_config()
    assert from_plain(to_plain(config)).to_dict() == config.to_dict()


# Components and their options.


def test_choosing_a_component_replaces_the_options_of_the_one_before_and_keeps_what_both_have():
    config = default_config()
    config.sampling.num_steps, config.sampling.guidance_scale = 7, 3.0
    choose(config, "sampling.sampler", "ddim")
    assert config.sampling.eta == 0.0
    config.sampling.eta = 0.5
    choose(config, "sampling.sampler", "heun")
    assert "eta" not in config.sampling
    assert (config.sampling.num_steps, config.sampling.guidance_scale) == (7, 3.0)
    choose(config, "sampling.sampler", "ddim")
    assert config.sampling.eta == 0.0
    config.diffusion.num_steps = 500
    choose(config, "diffusion.schedule", "cosine")
    assert config.diffusion.num_steps == 500
    choose(config, "diffusion.schedule", "rectified_flow")
    assert "num_steps" not in config.diffusion and config.diffusion.clip_x_0 is False
    choose(config, "diffusion.target", "velocity")
    with pytest.raises(ValueError, match="config.diffusion: a learned variance .*needs a process in discrete time"):
        validate(config)
    config.diffusion.has_learned_variance = False
    config.model.width, config.model.mixer.state_size = 8, 2
    choose(config, "model.mixer.name", "s4d")
    assert config.model.mixer.state_size == 2
    validate(config)
    with pytest.raises(ValueError, match="'config.model.width'; choose one of .*config.model.mixer.name"):
        choose(config, "model.width", "s4d")
    with pytest.raises(ValueError, match="config.model.mixer.name is 's5'; choose one of s4d"):
        choose(config, "model.mixer.name", "s5")


def test_conditioners_and_hooks_may_be_added_under_any_key():
    config = default_config()
    choose(config, "conditioners.kind.name", "label")
    assert config.conditioners.kind.to_dict() == {"name": "label", "dropout": 0.1, "token_width": 0}
    config.conditioners.kind.dropout = 0.3
    complete(config)
    assert sorted(config.conditioners) == ["kind", "label"] and config.conditioners.kind.dropout == 0.3
    validate(config)
    assert sorted(Parts(config).model.conditioners) == ["kind", "label"]


def test_complete_adds_what_is_missing_and_changes_nothing_else():
    config = default_config()
    whole = config.to_dict()
    assert complete(config) is config and config.to_dict() == whole
    for group in GROUPS:
        for key in list(config[group]):
            if key not in ("schedule", "target", "sampler", "source"):
                del config[group][key]
    del config.model["width"], config.model["mixer"], config["batch_size"], config.conditioners.label["dropout"]
    config.sampling.sampler = "ddim"  # set as a value, without `choose`
    complete(config)
    whole["sampling"] |= {"sampler": "ddim", "eta": 0.0}
    assert config.to_dict() == whole


def test_a_group_holds_the_components_defaults():
    assert registry.group("sampler", "ddim", eta=0.25).to_dict() == {"name": "ddim", "eta": 0.25}
    model = registry.group("model", "diffussm", width=64)
    assert (model.name, model.width, model.depth, model.mixer.name, model.mixer.state_size) == (
        "diffussm",
        64,
        DiffuSSM.depth,
        "s4d",
        S4D.state_size,
    )
    with pytest.raises(ValueError, match="'widht'(.|\n)*Did you mean \"width\""):
        registry.group("model", "diffussm", widht=64)


def test_components_are_made_of_their_options_and_the_arguments_that_they_accept():
    assert registry.create("sampler", "ddim", {"eta": 0.5, "num_steps": 3}) == DDIM(eta=0.5)
    assert registry.create("sampler", "ddim", {}, unknown=1) == DDIM()
    model = registry.create(
        "model", "diffussm", {"width": 8, "mixer": {"name": "s4d", "state_size": 2}}, platform="tpu"
    )
    mixer = model.mixer(parent=None)
    assert (model.width, model.depth, mixer.state_size, mixer.platform) == (8, DiffuSSM.depth, 2, "tpu")
    with pytest.raises(ValueError, match="unknown kind of component 'smapler'(.|\n)*Did you mean \"sampler\""):
        registry.register("smapler", "x", DDIM)
    with pytest.raises(ValueError, match="sampler is 'euler9'; choose one of ddpm, ddim, heun"):
        registry.component("sampler", "euler9")


def test_a_config_builds_the_chosen_components():
    config = tiny_config()
    choose(config, "diffusion.schedule", "rectified_flow")
    choose(config, "diffusion.target", "velocity")
    choose(config, "sampling.sampler", "heun")
    config.diffusion.has_learned_variance = False
    parts = Parts(complete(config))
    assert (parts.objective.process, parts.objective.target) == (RectifiedFlow(), Velocity())
    assert parts.generator.sampler == Heun() and parts.model.num_outputs == 1
    assert (parts.model.width, parts.model.mixer(parent=None).state_size) == (16, 4)
    assert parts.model.conditioners["label"](width=1, parent=None).num_classes == 10
    config.data.num_classes = 0
    assert Parts(config).model.conditioners == {}


OWN_SAMPLER = """
import dataclasses
from diffussm_jax.diffusion import DDIM
from diffussm_jax.registry import register
@dataclasses.dataclass(frozen=True)
class Mine(DDIM):
    extra: int = 3
register("sampler", "mine_of_{name}", Mine)
"""


def test_imports_register_components_and_are_saved(tmp_path, monkeypatch):
    (tmp_path / "own_sampler.py").write_text(OWN_SAMPLER.format(name="test_config"))
    monkeypatch.syspath_prepend(tmp_path)
    config = default_config()
    config.imports = ("own_sampler",)
    import_modules(config)
    choose(config, "sampling.sampler", "mine_of_test_config")
    assert (config.sampling.extra, config.sampling.eta) == (3, 0.0)
    validate(config)
    saved = to_plain(config)
    monkeypatch.delitem(registry._COMPONENTS["sampler"], "mine_of_test_config")
    monkeypatch.delitem(sys.modules, "own_sampler")
    assert from_plain(saved).to_dict() == config.to_dict()  # imported again
    config.imports = ("no_such_module",)
    with pytest.raises(ValueError, match="config.imports: the module 'no_such_module' cannot be imported"):
        validate(config)


def test_the_best_checkpoint_is_by_the_configs_metric():
    config = tiny_config()
    assert build_experiment(config).best == Best("eval_loss", "min")
    config.best_metric, config.best_mode = "accuracy", "max"
    assert build_experiment(config).best == Best("accuracy", "max")


# The command line.


def parsed(monkeypatch, *arguments):
    """The config that a program gets from these arguments."""
    values = flags.FlagValues()
    holder = cli.define_config(values)
    monkeypatch.setattr(sys, "argv", ["program", *(cli._current_name(argument) for argument in arguments)])
    values(sys.argv)
    return holder.value


def test_old_key_names_on_the_command_line_still_work(monkeypatch):
    before = parsed(monkeypatch, DIGITS).to_dict()
    values = {
        "model.state_size": "8",
        "model.scan": "2d",
        "model.bidirectional": "False",
        "model.discretization": "bilinear",
        "model.initialization": "legs",
        "model.ssm_method": "fft",
        "model.label_dropout": "0.25",
    }
    assert values.keys() == migrations.MOVED.keys()
    of_old_names = parsed(monkeypatch, DIGITS, *(f"--config.{key}={value}" for key, value in values.items()))
    new_names = [f"--config.{migrations.MOVED[key]}={value}" for key, value in values.items()]
    assert of_old_names.to_dict() == parsed(monkeypatch, DIGITS, *new_names).to_dict() != before
    assert of_old_names.model.mixer.to_dict() | {"state_size": 8, "scan": "2d", "bidirectional": False} == (
        of_old_names.model.mixer.to_dict()
    )
    assert of_old_names.conditioners.label.dropout == 0.25
    assert parsed(monkeypatch, DIGITS, "--config.model.state_size", "6").model.mixer.state_size == 6


def test_choices_on_the_command_line_come_first_wherever_they_stand(monkeypatch):
    choices = ["--config.sampling.sampler=ddim", "--config.diffusion.schedule=linear", "--config.model.mixer.scan=2d"]
    options = ["--config.sampling.eta=0.5", "--config.diffusion.num_steps=77", "--config.model.mixer.state_size=2"]
    for arguments in ([*choices, *options], [*options, *choices]):
        config = parsed(monkeypatch, f"--config={ROOT}/configs/cifar10.py", *arguments)
        assert (config.sampling.sampler, config.sampling.eta) == ("ddim", 0.5)
        assert (config.diffusion.schedule, config.diffusion.num_steps) == ("linear", 77)
        assert (config.model.mixer.scan, config.model.mixer.state_size) == ("2d", 2)
        config.sampling.num_steps = 50
        validate(config)
    heun = ["--config.sampling.sampler=heun", "--config.sampling.num_steps=20"]
    for arguments in (heun, heun[::-1]):
        config = parsed(monkeypatch, DIGITS, *arguments)
        assert "eta" not in config.sampling and config.sampling.num_steps == 20
        assert config.sampling.guidance_scale == 1.2  # of the file
        validate(config)
    hooked = ["--config.conditioners.kind.dropout=0.5", "--config.conditioners.kind.name=label"]
    kind = parsed(monkeypatch, DIGITS, *hooked).conditioners.kind
    assert kind.to_dict() == {"name": "label", "dropout": 0.5, "token_width": 0}


def test_imports_on_the_command_line_come_before_choices(tmp_path, monkeypatch):
    (tmp_path / "own_sampler_2.py").write_text(OWN_SAMPLER.format(name="the_command_line"))
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--config.sampling.sampler=mine_of_the_command_line", "--config.sampling.extra=5"]
    config = parsed(monkeypatch, DIGITS, *arguments, "--config.imports=('own_sampler_2',)")
    assert (config.imports, config.sampling.extra) == (("own_sampler_2",), 5)
    monkeypatch.delitem(registry._COMPONENTS["sampler"], "mine_of_the_command_line")


WRONG_COMMANDS = {
    "key": (["--config=configs/digits.py", "--config.model.dpth=3"], r'Did you mean "(config\.)?(model\.)?depth"'),
    "option": (["--config=configs/digits.py", "--config.sampling.sampler=heun", "--config.sampling.eta=1"], "eta"),
    "combination": (["--config=configs/digits.py", "--config.model.hourglass_ratio=3"], "M = 3 must divide"),
    "component": (["--config=configs/digits.py", "--config.sampling.sampler=euler9"], "'euler9'; choose one of ddpm"),
    "size": (["--config=configs/imagenet256.py:XXL"], "unknown model size 'XXL'; choose one of S, L, XL"),
    "data": (["--config=configs/imagenet256.py:XL"], "673,088,272 parameters(.|\n)*needs a path"),
    "nothing": ([], "give --config"),
}


@pytest.mark.parametrize("case", WRONG_COMMANDS)
def test_the_command_line_refuses_what_is_wrong(case, tmp_path, monkeypatch):
    arguments, message = WRONG_COMMANDS[case]
    monkeypatch.chdir(ROOT)
    code, printed = run_program(main.main, f"--workdir={tmp_path / 'run'}", *arguments, flag_values=main._FLAGS)
    assert code != 0 and re.search(message, printed), printed
    assert not (tmp_path / "run").exists()


def test_the_process_refuses_what_is_wrong(tmp_path):
    arguments, message = WRONG_COMMANDS["data"]
    command = [sys.executable, "-m", "diffussm_jax.main", f"--workdir={tmp_path / 'run'}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert re.search(message, result.stdout + result.stderr), result.stdout + result.stderr
    assert not (tmp_path / "run").exists()


# Configs of other runs and other versions.


def plain(**changes):
    config = tiny_config()
    config.update_from_flattened_dict(changes)
    return to_plain(config)


def test_what_changes_nothing_that_was_computed_may_differ_on_resume():
    free = {
        "log_every": 1,
        "eval_every": 2,
        "sample_every": 0,
        "checkpoint_every": 7,
        "keep_every": 3,
        "num_steps": 99,
        "best_metric": "x",
        "data.path": "y",
        "data.vae": "z",
        "data.num_threads": 2,
        "data.eval_split": "",
        "mesh.data": 4,
        "sampling.num_steps": 9,
        "model.remat": "block",
        "model.scan_unroll": 2,
        "model.mixer.method": "fft",
        "optimizer.accumulation_steps": 2,
        "optimizer.max_skipped_steps": 3,
    }
    check_same_experiment(plain(), plain(**free), "runs/a")
    other = tiny_config()
    choose(other, "sampling.sampler", "heun")
    check_same_experiment(plain(), to_plain(other), "runs/a")
    for key, value in {
        "model.width": 32,
        "model.mixer.state_size": 8,
        "conditioners.label.dropout": 0.2,
        "optimizer.learning_rate": 1e-3,
        "diffusion.target": "v",
        "batch_size": 16,
        "seed": 1,
    }.items():
        with pytest.raises(
            ValueError, match=rf"runs/a holds a run of another config(.|\n)*config.{key}: was .*{value}"
        ):
            check_same_experiment(plain(), plain(**{key: value}), "runs/a")


def test_the_number_of_steps_may_not_change_if_the_learning_rate_follows_it():
    cosine = {"optimizer.decay": "cosine"}
    check_same_experiment(plain(**cosine), plain(**cosine, log_every=5), "runs/a")
    with pytest.raises(ValueError, match=r"config.num_steps: was 12, is 20.*the learning rate follows num_steps"):
        check_same_experiment(plain(**cosine), plain(**cosine, num_steps=20), "runs/a")


def test_saved_configs_have_the_number_of_their_format_and_newer_ones_are_refused():
    saved = plain()
    assert saved["format"] == migrations.FORMAT
    for wrong in (migrations.FORMAT + 1, 0, "2"):
        with pytest.raises(ValueError, match=f"format {wrong!r}; this version reads formats 1 to {migrations.FORMAT}"):
            from_plain(saved | {"format": wrong})
    assert isinstance(from_plain(saved), ConfigDict)
    assert from_plain(plain(**{"sampling.guidance_interval": (1.0, math.inf)})).sampling.guidance_interval[1] == np.inf


# Runs of what can be chosen.


@pytest.mark.slow
def test_a_2d_scan_learns_the_velocity_of_rectified_flow_and_heun_samples_it(tmp_path):
    config = tiny_config()
    config.model.mixer.scan = "2d"
    choose(config, "diffusion.schedule", "rectified_flow")
    choose(config, "diffusion.target", "velocity")
    choose(config, "sampling.sampler", "heun")
    config.diffusion.has_learned_variance = False
    config.num_steps, config.log_every, config.checkpoint_every = 24, 12, 24
    config.sample_every = config.eval_every = 0
    config.optimizer.ema_decay, config.sampling.num_steps = 0.9, 4
    assert train(build_experiment(config), tmp_path) is None
    rows = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True)
    assert (rows["loss"] == rows["mse"]).all() and "vlb" not in rows.dtype.names
    run = load_run(tmp_path)
    # Of a model that predicts 0: the mean of (noise - x_0)^2, 1 and the digits' second moment.
    digits = np.stack([run.parts.eval_loader.batch(i)["image"] for i in range(22)]) / 127.5 - 1
    assert rows["loss"][1] < 0.9 * (1 + np.mean(digits**2)) and rows["loss"][1] < rows["loss"][0]
    images, labels = run.sample(20)
    assert images.shape == (20, 8, 8, 1) and labels.tolist() == [*range(10), *range(10)]
    assert abs(images.mean() / 127.5 - 1 - digits.mean()) < 0.35  # mostly black, as digits are
