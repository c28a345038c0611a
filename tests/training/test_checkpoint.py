"""Checkpoints give back what was saved, keep the newest and the best, and name what does not fit."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.training.checkpoint import Checkpointer, check_same_tree
from diffussm_jax.training.optimizer import adamw
from diffussm_jax.training.state import create_state


def state_at(step):
    state = create_state({"w": {"kernel": jnp.full(3, float(step))}}, adamw(lambda s: 1.0))
    return state.replace(step=jnp.int32(step))


@pytest.fixture
def checkpointer(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path)) as c:
        yield c


def test_restores_every_bit(checkpointer):
    assert checkpointer.latest_step() is None
    state = state_at(7).replace(ema_params={"w": {"kernel": jnp.float32([0.1, np.pi, 1e-30])}})
    checkpointer.save(state)
    restored = checkpointer.restore(7, state_at(0))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(state) == jax.tree.structure(restored)


def test_keeps_the_newest_two_and_the_best(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0, None], start=1):
            checkpointer.save(state_at(step), loss)
    with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
        assert checkpointer.resolve("best") == 2
        assert checkpointer.resolve("latest") == checkpointer.latest_step() == 6
        assert checkpointer.resolve("5") == 5
        with pytest.raises(ValueError, match=r"no checkpoint '4' .*choose latest, best or one of \[2, 5, 6\]"):
            checkpointer.resolve("4")
        np.testing.assert_array_equal(checkpointer.restore_ema(2, state_at(0).params)["w"]["kernel"], 2.0)


def test_the_checkpoint_of_another_model_is_refused_with_both_lists(checkpointer):
    checkpointer.save(state_at(1))
    other = {"w": {"kernel": jnp.zeros(4)}, "v": {"bias": jnp.zeros(1)}}
    with pytest.raises(ValueError, match=r"missing there: \['v/bias'\](.|\n)*w/kernel: \(3,\), not \(4,\)"):
        checkpointer.restore_ema(1, other)
    with pytest.raises(ValueError, match=r"unknown here: \['w/kernel'\]"):
        checkpointer.restore(1, create_state({"v": {"bias": jnp.zeros(1)}}, adamw(lambda s: 1.0)))


def test_equal_trees_pass_and_a_missing_folder_is_named(tmp_path):
    check_same_tree(state_at(1).params, state_at(2).params, "it")
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*checkpoints"):
            checkpointer.resolve("latest")
