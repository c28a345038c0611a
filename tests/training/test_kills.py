"""A run that is killed again and again, in the middle of saves too, ends as one that was never stopped.

DIFFUSSM_KILLS=20 takes 20 kills in place of 5.
"""

import contextlib
import os
import random
import time

import jax
import numpy as np
import pytest
from runs import DIGITS, QUIET, losses, run, start

from diffussm_jax.build import Parts
from diffussm_jax.parallel.mesh import make_mesh
from diffussm_jax.run import read_config
from diffussm_jax.training.checkpoint import Checkpointer

NUM_KILLS, NUM_STEPS = int(os.environ.get("DIFFUSSM_KILLS", "5")), 300
FLAGS = (*DIGITS, *QUIET, f"--config.num_steps={NUM_STEPS}", "--config.checkpoint_every=3")


def final_state(workdir):
    task = Parts(read_config(workdir), make_mesh(1)).task
    with contextlib.closing(Checkpointer(workdir, is_read_only=True)) as checkpointer:
        return jax.device_get(checkpointer.restore(NUM_STEPS, task.abstract_state))


def kill_during(workdir, rng, in_save):
    """Starts the run, and kills it some steps later: at any moment, or while a checkpoint is being written."""
    (process,) = start(workdir, *FLAGS)
    checkpoints, done = workdir / "run" / "checkpoints", len(losses(workdir))
    wanted = done + rng.randrange(1, 12)
    while process.poll() is None and len(losses(workdir)) < wanted:
        time.sleep(0.005)
    if in_save:
        while process.poll() is None and not list(checkpoints.glob("*.orbax-checkpoint-tmp*")):
            time.sleep(0.001)
    else:
        time.sleep(rng.random() * 0.3)
    assert process.poll() is None, (workdir / "output_0").read_text()[-4000:]
    process.kill()
    process.wait()
    return bool(list(checkpoints.glob("*.orbax-checkpoint-tmp*")))


@pytest.mark.slow
def test_kills_change_no_bit(tmp_path):
    expected = run(tmp_path / "whole", *FLAGS)
    rng = random.Random(0)
    num_half_saved = 0
    for k in range(NUM_KILLS):
        num_half_saved += kill_during(tmp_path / "killed", rng, in_save=k % 2 == 0)
        if k == 3:  # before the first step of a run, too
            (process,) = start(tmp_path / "killed", *FLAGS)
            time.sleep(rng.random() * 3)
            process.kill()
            process.wait()
    assert num_half_saved >= NUM_KILLS // 4
    found = run(tmp_path / "killed", *FLAGS)
    np.testing.assert_array_equal(found, expected)
    a, b = final_state(tmp_path / "whole" / "run"), final_state(tmp_path / "killed" / "run")
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
