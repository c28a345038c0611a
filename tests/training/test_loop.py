"""A run that is stopped goes on as if it had not been: the same losses and the same parameters, bit by bit."""

import contextlib
import csv
import json
import os
import signal

import jax
import numpy as np
import pytest
from tiny import tiny_config

from diffussm_jax.build import build_experiment
from diffussm_jax.training.checkpoint import Checkpointer
from diffussm_jax.training.loop import train
from diffussm_jax.training.optimizer import adamw
from diffussm_jax.training.state import create_state

COMPARED = ("step", "loss", "mse", "vlb", "grad_norm", "learning_rate", "eval_loss")


def rows(workdir):
    with open(workdir / "metrics.csv", newline="") as file:
        return [{name: row[name] for name in COMPARED} for row in csv.DictReader(file)]


def final_state(workdir):
    recipe = build_experiment(tiny_config()).recipe
    with contextlib.closing(Checkpointer(workdir, is_read_only=True)) as checkpointer:
        return checkpointer.restore(12, recipe.abstract_state)


@pytest.mark.parametrize("signum,stop_at", [(signal.SIGINT, 5), (signal.SIGTERM, 8)], ids=["ctrl-c", "sigterm"])
def test_a_stopped_run_resumes_exactly(signum, stop_at, tiny_run, tmp_path):
    stopped = build_experiment(tiny_config())
    iterate = stopped.train_loader.iterate

    def batches_and_a_signal(first_step):
        for step, batch in enumerate(iterate(first_step), first_step):
            if step == stop_at + 1:  # two batches are on their way to the device before one is trained on
                os.kill(os.getpid(), signum)
            yield batch

    stopped.train_loader.iterate = batches_and_a_signal
    assert train(stopped, tmp_path) == signum
    assert (tmp_path / "checkpoints" / str(stop_at)).is_dir()
    assert train(build_experiment(tiny_config()), tmp_path) is None
    assert rows(tmp_path) == rows(tiny_run)
    for a, b in zip(jax.tree.leaves(final_state(tmp_path)), jax.tree.leaves(final_state(tiny_run)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_leaves_what_the_readme_promises(tiny_run):
    assert [row["step"] for row in rows(tiny_run)] == ["3", "6", "9", "12"]
    assert json.loads((tiny_run / "config.json").read_text())["model"]["width"] == 16
    assert sorted(p.name for p in (tiny_run / "samples").iterdir()) == ["step_00000006.png", "step_00000012.png"]
    assert list(tiny_run.glob("events.out.tfevents.*"))
    assert float(rows(tiny_run)[-1]["mse"]) < float(rows(tiny_run)[0]["mse"])


def test_a_finished_run_does_nothing_more(tiny_run):
    before = (tiny_run / "metrics.csv").read_bytes()
    assert train(build_experiment(tiny_config()), tiny_run) is None
    assert (tiny_run / "metrics.csv").read_bytes() == before


def test_another_config_in_the_same_workdir_is_refused(tiny_run):
    config = tiny_config()
    config.model.width = 32
    with pytest.raises(ValueError, match=r"another config(.|\n)*config.model.width: was 16, is 32"):
        train(build_experiment(config), tiny_run)
    assert json.loads((tiny_run / "config.json").read_text())["model"]["width"] == 16


def test_the_ema_follows_the_parameters():
    params = {"w": {"kernel": jax.numpy.ones(2)}}
    state = create_state(params, adamw(lambda s: 1.0))
    assert state.ema_params["w"]["kernel"] is not params["w"]["kernel"]  # a step donates both
    np.testing.assert_array_equal(state.ema_params["w"]["kernel"], params["w"]["kernel"])
