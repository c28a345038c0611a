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

NUM_KILLS = int(os.environ.get("DIFFUSSM_KILLS", "5"))
SAVES = (*QUIET, "--config.checkpoint_every=3")
AUTOENCODER = ("--config=configs/digits_autoencoder.py", "--config.task.autoencoder.block_out_channels=(8,8)")
AUTOENCODER += ("--config.task.disc_start=10", "--config.task.disc_warmup=10", "--config.batch_size=8")
AUTOENCODER += ("--config.task.perceptual=none", "--config.task.report_features=none")
# Flags, steps, kills.
RUNS = {
    "diffusion": ((*DIGITS, *SAVES, "--config.num_steps=300"), 300, NUM_KILLS),
    "autoencoder": ((*AUTOENCODER, *SAVES, "--config.num_steps=40"), 40, 1),
}


def final_state(workdir, num_steps):
    task = Parts(read_config(workdir), make_mesh(1)).task
    with contextlib.closing(Checkpointer(workdir, is_read_only=True)) as checkpointer:
        return jax.device_get(checkpointer.restore(num_steps, task.abstract_state))


def kill_during(workdir, flags, rng, in_save):
    """Starts the run, and kills it some steps later: at any moment, or while a checkpoint is being written."""
    (process,) = start(workdir, *flags)
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
@pytest.mark.parametrize("flags,num_steps,num_kills", RUNS.values(), ids=RUNS)
def test_kills_change_no_bit(flags, num_steps, num_kills, tmp_path):
    expected = run(tmp_path / "whole", *flags)
    rng = random.Random(0)
    num_half_saved = 0
    for k in range(num_kills):
        num_half_saved += kill_during(tmp_path / "killed", flags, rng, in_save=k % 2 == 0)
        if k == 3:  # before the first step of a run, too
            (process,) = start(tmp_path / "killed", *flags)
            time.sleep(rng.random() * 3)
            process.kill()
            process.wait()
    assert num_half_saved >= num_kills // 4
    found = run(tmp_path / "killed", *flags)
    np.testing.assert_array_equal(found, expected)
    a, b = (final_state(tmp_path / name / "run", num_steps) for name in ("whole", "killed"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
