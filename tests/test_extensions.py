"""Every kind of component can be added from outside the package, by the files of tests/extensions.

They are the examples of CONTRIBUTING.md. Each is registered by its last line, chosen by a config, trained, resumed, and
sampled in a fresh process from the work directory alone.
"""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from diffussm_jax import registry
from diffussm_jax.config import choose, import_modules
from diffussm_jax.experiment import build_experiment
from diffussm_jax.training.loop import train

ROOT = Path(__file__).parents[1]
EXTENSIONS = Path(__file__).parent / "extensions"


SAMPLE = """
import sys
from diffussm_jax import load_run
from diffussm_jax.sample import save_samples
for name in ("everything_else", "backbone"):
    save_samples(*load_run(f"{sys.argv[1]}/{name}").sample(4), f"{sys.argv[1]}/{name}")
"""


def short_config(*modules):
    config = tiny_config()
    config.imports = tuple(f"extensions.{module}" for module in modules)
    import_modules(config)
    return config


def everything_else():
    """Source, process, target, weighting, sampler, mixer, conditioner and hook in one run."""
    config = short_config("source", "process", "target", "weighting", "sampler", "mixer", "conditioner", "hook")
    choose(config, "data.source", "stripes")
    config.data.num_images, config.data.num_classes = 48, 2
    choose(config, "diffusion.schedule", "trigonometric")
    choose(config, "diffusion.target", "scaled_score")
    choose(config, "diffusion.weighting", "sigmoid")
    config.diffusion.has_learned_variance = False
    choose(config, "sampling.sampler", "adams_bashforth")
    choose(config, "model.mixer.name", "short_convolution")
    config.model.mixer.kernel_size = 5
    config.conditioners.brightness = registry.group("conditioner", "number", dropout=0.2)
    config.hooks.largest = registry.group("hook", "largest_parameter", every=3)
    return config


def backbone():
    config = short_config("backbone")
    choose(config, "model.name", "mlp")
    config.model.width = 24
    return config


def train_and_resume(config, workdir):
    """Six steps, then the other six; returns the rows of metrics.csv."""
    num_steps, config.num_steps = config.num_steps, 6
    assert train(build_experiment(config), workdir) is None
    config.num_steps = num_steps
    assert train(build_experiment(config), workdir) is None
    with open(workdir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_components_from_outside_train_resume_and_are_sampled_in_a_fresh_process(tmp_path):
    for make in (everything_else, backbone):
        rows = train_and_resume(make(), tmp_path / make.__name__)
        assert [row["step"] for row in rows] == ["3", "6", "9", "12"]
        assert float(rows[3]["eval_loss"]) < float(rows[1]["eval_loss"])  # of the averaged parameters, same noise
        if make is everything_else:
            assert all(float(row["largest_parameter"]) > 0 for row in rows)
    paths = [str(EXTENSIONS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", SAMPLE, tmp_path], check=True, cwd=ROOT, env=environment, timeout=300)
    for make in (everything_else, backbone):
        with np.load(tmp_path / f"{make.__name__}.npz") as file:
            assert file["arr_0"].shape == (4, 8, 8, 1) and len(np.unique(file["arr_0"])) > 2


def test_a_task_from_outside_trains_and_resumes(tmp_path):
    config = short_config("task")
    choose(config, "task.name", "classifier")
    config.batch_size = 64
    rows = train_and_resume(config, tmp_path)
    assert float(rows[3]["eval_loss"]) < float(rows[1]["eval_loss"])  # of the averaged parameters, same noise
    assert not (tmp_path / "samples").exists()


def test_a_wrong_name_lists_what_is_there():
    short_config("sampler")
    with pytest.raises(ValueError, match="'euler2'; choose one of ddpm, ddim, heun.*adams_bashforth"):
        registry.component("sampler", "euler2", "sampling.sampler")


@pytest.mark.parametrize("path", sorted(EXTENSIONS.glob("*.py")), ids=lambda p: p.stem)
def test_contributing_shows_the_file(path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert path.read_text() in blocks
