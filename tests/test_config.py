"""A wrong config is refused before anything is built, by a message that names the value and the choices."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config

from diffussm_jax import config as config_lib
from diffussm_jax import diffusion, ssm
from diffussm_jax.build import build_experiment, from_plain, to_plain
from diffussm_jax.config import default_config, load_config, paper_config, validate
from diffussm_jax.models import diffussm
from diffussm_jax.sample import sample
from diffussm_jax.training.loop import train

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def test_choices_are_those_of_the_code():
    assert set(config_lib.CHOICES["model.ssm_method"]) == set(ssm.METHODS)
    assert set(config_lib.CHOICES["model.discretization"]) == set(ssm.DISCRETIZATIONS)
    assert set(config_lib.CHOICES["model.initialization"]) == set(ssm.INITIALIZATIONS)
    assert set(config_lib.CHOICES["model.scan"]) == set(diffussm.SCANS)
    assert set(config_lib.CHOICES["model.remat"]) == set(diffussm.REMAT_POLICIES)
    assert set(config_lib.CHOICES["diffusion.schedule"]) == set(diffusion.SCHEDULES)
    assert set(config_lib.CHOICES["sampling.sampler"]) == set(diffusion.SAMPLERS)
    assert default_config().model.ssm_method == ssm.DEFAULT_METHOD


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid_and_tells_its_command(path):
    validate(load_config(str(path)))
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


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("model.name", "dit2", "config.model.name is 'dit2'; choose one of diffussm"),
        ("model.ssm_method", "fftt", "'fftt'; choose one of auto, recurrent, associative, fft, chunked, pallas"),
        ("model.scan", "3d", "config.model.scan is '3d'; choose one of raster, 2d"),
        ("model.depth", 0, "config.model.depth must be a whole number of at least 1, got 0"),
        ("model.hourglass_ratio", 3, r"M = 3 must divide the latent's width 8 \(so that L = 64"),
        ("model.width", 18, "config.model.width must be a multiple of 4.*got 18"),
        ("model.state_size", 5, "must be even, got 5"),
        ("data.source", "imagenet", "'imagenet'; choose one of digits, images, latents"),
        ("data.downsampling", 3, "image_size = 8 is not a multiple of config.data.downsampling = 3"),
        ("diffusion.schedule", "sigmoid", "'sigmoid'; choose one of linear, cosine"),
        ("optimizer.ema_decay", 1.5, "config.optimizer.ema_decay must be from 0 to 1, got 1.5"),
        ("sampling.num_steps", 2000, "sampling.num_steps = 2000 exceeds config.diffusion.num_steps = 1000"),
        ("mesh.data", 16, "config.mesh: data = 16, fsdp = 1, tensor = 1 needs 16 devices, there are 8"),
        ("mesh.tensor", 3, "config.mesh: data = -1, fsdp = 1, tensor = 3 does not divide the 8 devices"),
        ("batch_size", 257, "batch_size = 257 is not a multiple of 8: config.mesh.data = 8 x fsdp = 1 devices x"),
        ("optimizer.accumulation_steps", 3, "batch_size = 256 is not a multiple of 24: .*accumulation_steps = 3"),
        ("model.remat", "all", "config.model.remat is 'all'; choose one of none, dots, block"),
    ],
)
def test_wrong_values_are_named(key, value, message):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        validate(config, num_devices=8)


def test_the_width_must_be_a_multiple_of_what_splits_it():
    config = default_config()
    config.mesh.fsdp, config.mesh.tensor, config.model.width = 4, 2, 388
    with pytest.raises(ValueError, match="width = 388 is not a multiple of config.mesh.fsdp = 4 x tensor = 2"):
        validate(config, num_devices=8)


def test_guidance_needs_a_null_label():
    config = default_config()
    config.sampling.guidance_scale, config.data.num_classes = 2.0, 0
    with pytest.raises(ValueError, match="guidance_scale = 2.0 needs a null label"):
        validate(config)


def test_keys_must_be_those_that_are_known():
    config = default_config()
    config.model.dpth = 3
    del config.optimizer.decay
    with pytest.raises(ValueError, match=r"unknown \['model.dpth'\], missing \['optimizer.decay'\]"):
        validate(config)


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


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--config=configs/digits.py", "--config.model.dpth=3"], 'Did you mean "depth"'),
        (["--config=configs/digits.py", "--config.model.hourglass_ratio=3"], "M = 3 must divide"),
        (["--config=configs/imagenet256.py:XXL"], "unknown model size 'XXL'; choose one of S, L, XL"),
        (["--config=configs/imagenet256.py:XL"], "673,088,272 parameters(.|\n)*needs a path"),
        ([], "give --config"),
    ],
    ids=["key", "combination", "size", "data", "nothing"],
)
def test_the_command_line_refuses_what_is_wrong(arguments, message, tmp_path):
    command = [sys.executable, "-m", "diffussm_jax.main", f"--workdir={tmp_path / 'run'}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert re.search(message, result.stdout + result.stderr), result.stdout + result.stderr
    assert not (tmp_path / "run").exists()


def test_a_2d_scan_trains_and_samples(tmp_path):
    config = tiny_config()
    config.model.scan = "2d"
    assert train(build_experiment(config), tmp_path) is None
    assert sample(tmp_path, num_samples=2)[0].shape == (2, 8, 8, 1)
