"""A run starts from the weights of another one: what fits is loaded, the rest is fresh, and both are printed."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from diffussm_jax import load_run
from diffussm_jax.config import load_config, override
from diffussm_jax.data.sources import DIGITS_SPLITS, Digits
from diffussm_jax.experiment import build_experiment
from diffussm_jax.export import export
from diffussm_jax.io import path_of
from diffussm_jax.run import split_checkpoint
from diffussm_jax.training.loop import train

CONFIGS = Path(__file__).parent.parent / "configs"


def start(config):
    """The state of the first step."""
    return build_experiment(config).task.create_state()


def by_path(params):
    return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def changed(init_from, **data):
    config = tiny_config()
    config.init_from, config.seed = str(init_from), 1
    config.data.update(**data)
    return config


def test_the_same_model_starts_from_the_averaged_weights(tiny_run, capsys):
    state = start(changed(tiny_run))
    run = load_run(tiny_run)
    for tree in (state.params, state.ema_params):
        jax.tree.map(np.testing.assert_array_equal, tree, run.params)
    assert int(state.step) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    assert "step 12." in (printed := capsys.readouterr().out) and "100.0% of the parameters" in printed


def test_other_classes_have_a_fresh_table_and_other_sizes_change_nothing(tiny_run, capsys):
    config = changed(tiny_run, num_classes=0, image_size=16)
    config.sampling.guidance_scale = 1.0
    params, old = by_path(start(config).params), by_path(load_run(tiny_run).params)
    assert old.keys() - params.keys() == {"label_embed/table/embedding"}
    assert all(np.array_equal(params[path], old[path]) for path in params)
    assert "not used: label_embed/table/embedding (11, 16)" in capsys.readouterr().out


def test_parameters_of_another_shape_are_drawn_anew(tiny_run, capsys):
    config = changed(tiny_run)
    config.diffusion.has_learned_variance = False
    config.diffusion.target = "v"
    params, fresh = by_path(start(config).params), by_path(start(changed("")).params)
    old, printed = by_path(load_run(tiny_run).params), capsys.readouterr().out
    drawn_anew = {path for path in params if params[path].shape != old[path].shape}
    assert drawn_anew and all(path in printed for path in drawn_anew)
    for path in params:
        expected = fresh[path][..., : params[path].shape[-1]] if path in drawn_anew else old[path]
        np.testing.assert_array_equal(params[path], expected)
    assert "config.diffusion.target: was 'noise' there, is 'v'" in printed


def test_a_step_or_an_export_can_be_chosen(tiny_run, tmp_path):
    step = load_run(tiny_run, 8)
    jax.tree.map(np.testing.assert_array_equal, start(changed(f"{tiny_run}:8")).params, step.params)
    export(step, tmp_path / "export")
    jax.tree.map(np.testing.assert_array_equal, start(changed(tmp_path / "export")).params, step.params)
    assert split_checkpoint("gs://bucket/runs/a") == ("gs://bucket/runs/a", "latest")
    assert split_checkpoint("gs://bucket/runs/a:best") == ("gs://bucket/runs/a", "best")


@pytest.mark.slow
def test_a_resume_does_not_read_it_again(tiny_run, tmp_path):
    config = changed(tiny_run)
    config.num_steps = 4
    assert train(build_experiment(config), tmp_path / "run") is None
    config.num_steps = 5
    config.init_from = str(tmp_path / "gone")
    with pytest.raises(ValueError, match="config.init_from: was"):
        train(build_experiment(config), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="gone holds no run"):
        start(config)


def test_another_model_is_refused(tiny_run):
    config = changed(tiny_run)
    config.model.width = 32
    with pytest.raises(ValueError, match="(?s)is of another model.*drawn anew: .*config.model.width: was 16 there"):
        start(config)


@pytest.mark.slow
def test_digits_0_to_4_help_with_all_digits(tmp_path):
    digits = {split: Digits(split) for split in DIGITS_SPLITS}
    for split, source in digits.items():
        for i in range(len(source)):
            image, label, *_ = source[i]
            for data in ("half", "all") if label < 5 else ("all",):
                folder = tmp_path / data / split / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[..., 0]).save(folder / f"{i}.png")

    def eval_loss(name, data, num_classes, num_steps, **changes):
        config = load_config(str(CONFIGS / "digits.py"))
        changes |= {"data.path": str(tmp_path / data), "data.num_classes": num_classes, "num_steps": num_steps}
        small = {"model.width": 32, "model.depth": 2, "model.scan_unroll": 1}
        quiet = {"sample_every": 0, "eval_every": num_steps, "optimizer.decay": "constant"}
        config = override(config, {"data.source": "images", "optimizer.warmup_steps": 20, **small, **quiet, **changes})
        assert train(build_experiment(config), tmp_path / name) is None
        header, *_, last = (tmp_path / name / "metrics.csv").read_text().splitlines()
        return float(last.split(",")[header.split(",").index("eval_loss")])

    eval_loss("half_run", "half", 5, 300)
    tuned = eval_loss("tuned", "all", 10, 60, init_from=str(tmp_path / "half_run"))
    assert tuned < 0.9 * eval_loss("scratch", "all", 10, 60)
