"""A run of format 1, made by commit c3000c3, is resumed and sampled from by today's code.

tests/data_of_c3000c3 holds its work directory, and samples that c3000c3 drew from it:

    run.tar.xz     6 steps of `config_of_today()`; at its first checkpoint three steps wait for the next row
    samples.npz    6 images each: "ddim" as its config says, "ddpm" with --sampler=ddpm --steps=5 --guidance_scale=1,
                   "posthoc_ema" with --ema_sigma=0.08
"""

import contextlib
import csv
import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from diffussm_jax import load_run, migrations
from diffussm_jax.config import choose, default_config, from_plain, to_plain
from diffussm_jax.experiment import build_experiment
from diffussm_jax.options import flatten
from diffussm_jax.run import read_config
from diffussm_jax.training.checkpoint import Checkpointer
from diffussm_jax.training.loop import train
from diffussm_jax.validation import check_same_experiment, known_options, validate

DATA = Path(__file__).parent / "data_of_c3000c3"
SPEED = ("images_per_second", "step_ms", "compute_ms", "data_wait", "peak_memory_gb", "mfu")
# What is new since, and reproduces the old behaviour.
ADDED = {
    "init_from": "",
    "data.holdout": 0.0,
    "data.min_crop_fraction": 0.8,
    "data.verify": False,
    "task.name": "diffusion",
    "model.patch_size": 1,
    "model.has_gate": False,
    "model.mixer.name": "s4d",
    "model.mixer.dt_min": 1e-3,
    "model.mixer.dt_max": 1e-1,
    "conditioners.label.name": "label",
    "conditioners.label.token_width": 0,
    "diffusion.target": "noise",
    "diffusion.has_learned_variance": True,
    "diffusion.weighting": "none",
    "diffusion.has_zero_terminal_snr": False,
    "sampling.time_grid": "uniform",
    "sampling.guidance_rescale": 0.0,
    "sampling.dynamic_threshold": 0.0,
    "eval_scores_every": 0,
    "scores.features": "digits",
    "scores.weights": "",
    "scores.reference": "",
    "scores.num_samples": 1000,
    "hooks": {},
    "best_metric": "eval_loss",
    "best_mode": "min",
    "imports": (),
}


def config_of_today():
    config = default_config()
    config.batch_size, config.num_steps = 8, 9
    config.log_every, config.eval_every, config.sample_every = 4, 3, 0
    config.checkpoint_every = config.posthoc_ema_every = 3
    config.model.width, config.model.depth, config.model.mixer.state_size = 8, 1, 4
    choose(config, "diffusion.schedule", "cosine")
    config.diffusion.clip_x_0 = True
    config.optimizer.learning_rate, config.optimizer.ema_decay = 1e-2, 0.5
    choose(config, "sampling.sampler", "ddim")
    config.sampling.num_steps, config.sampling.guidance_scale, config.sampling.num_grid_rows = 3, 1.5, 1
    return config


def unpack(folder):
    with tarfile.open(DATA / "run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """Read it only."""
    return unpack(tmp_path_factory.mktemp("old_run"))


@pytest.fixture(scope="module")
def experiment():
    return build_experiment(config_of_today())


def rows(workdir):
    with open(workdir / "metrics.csv", newline="") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def test_every_key_of_the_old_config_has_its_meaning_today(old_run):
    saved = json.loads((old_run / "config.json").read_text())
    assert "format" not in saved
    config = read_config(old_run)
    validate(config)
    expected = {migrations.MOVED.get(key, key): value for key, value in flatten(saved).items()}
    expected["sampling.guidance_interval"] = (0.0, np.inf)
    assert flatten(config.to_dict()) == expected | ADDED
    assert flatten(config).keys() == known_options(config).keys() | {"hooks"}
    assert flatten(from_plain(to_plain(config)).to_dict()) == flatten(config.to_dict())


def test_an_option_of_a_sampler_that_was_not_chosen_is_left_behind(old_run):
    saved = json.loads((old_run / "config.json").read_text())
    saved["sampling"] |= {"sampler": "ddpm", "eta": 0.5}
    assert "eta" not in from_plain(saved).sampling
    assert from_plain(saved | {"sampling": saved["sampling"] | {"sampler": "ddim"}}).sampling.eta == 0.5


def test_the_old_config_is_that_of_the_same_experiment_and_of_no_other(old_run):
    saved, config = json.loads((old_run / "config.json").read_text()), config_of_today()
    check_same_experiment(saved, to_plain(config), "old")
    config.model.width = 16
    with pytest.raises(ValueError, match=r"old holds a run of another config(.|\n)*config.model.width: was 8, is 16"):
        check_same_experiment(saved, to_plain(config), "old")


@pytest.mark.parametrize(
    "name,options",
    [
        ("ddim", {}),
        ("ddpm", {"sampler": "ddpm", "num_steps": 5, "guidance_scale": 1.0}),
        ("posthoc_ema", {"ema_sigma": 0.08}),
    ],
)
def test_samples_are_those_that_it_drew_itself(name, options, old_run):
    images, labels = load_run(old_run, **options).sample(6)
    with np.load(DATA / "samples.npz") as file:
        assert np.abs(images.astype(int) - file[name]).max() <= 1
    np.testing.assert_array_equal(labels, range(6))


def test_the_best_is_by_the_metric_of_then(old_run):
    with contextlib.closing(Checkpointer(old_run, is_read_only=True)) as checkpointer:
        assert checkpointer.steps() == [3, 6]
        assert checkpointer.resolve("best") == 6  # 0.827, after 0.944


def test_it_goes_on_and_keeps_its_rows(experiment, tmp_path):
    old = unpack(tmp_path)
    before = rows(old)
    assert train(experiment, tmp_path) is None
    after = rows(tmp_path)
    assert list(after) == [3, 4, 6, 8, 9]
    for step in (3, 4, 6):
        assert {name: after[step][name] for name in before[step]} == before[step]
    assert all(np.isfinite(float(after[9][name])) for name in ("loss", "vlb", "eval_loss", "grad_norm", "param_norm"))
    assert float(after[9]["eval_loss"]) < float(after[6]["eval_loss"])
    assert json.loads((tmp_path / "config.json").read_text())["format"] == migrations.FORMAT
    assert load_run(tmp_path, "9").sample(2)[0].shape == (2, 8, 8, 1)
    assert train(experiment, tmp_path) is None  # once more, from its own checkpoint: nothing is left to do


def test_from_its_first_checkpoint_the_same_steps_come_again(experiment, tmp_path):
    """The sums of three steps were state then; the row of the fourth is their mean."""
    expected = rows(unpack(tmp_path / "old"))[4]
    unpack(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert train(experiment, tmp_path / "run") is None
    found = rows(tmp_path / "run")[4]
    for name in expected.keys() - set(SPEED) - {"eval_loss"}:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-4), name
    states = []
    for workdir in ("old", "run"):
        with contextlib.closing(Checkpointer(tmp_path / workdir, is_read_only=True)) as checkpointer:
            states.append(jax.device_get(checkpointer.restore(6, experiment.task.abstract_state)))
    old, new = states
    for part in ("params", "ema_params", "power_ema"):
        for a, b in zip(jax.tree.leaves(getattr(old, part)), jax.tree.leaves(getattr(new, part)), strict=True):
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-6
