"""Means of metrics are those of the steps taken, in float64, and survive a checkpoint to the last bit."""

import json

import jax.numpy as jnp
import numpy as np

from diffussm_jax.training.window import Window

VALUES = np.float32(np.random.default_rng(0).normal(size=9))


def metrics(value, skipped=0.0, **more):
    return {"loss": jnp.float32(value), "skipped": jnp.float32(skipped), **more}


def test_means_leave_out_skipped_steps_and_a_new_window_starts():
    window = Window()
    for value in VALUES[:4]:
        window.add(metrics(value))
    window.add(metrics(np.nan, skipped=1.0))
    window.add(metrics(VALUES[4], skipped=0.0))
    means, num_skipped = window.close()
    assert (means, num_skipped) == ({"loss": np.mean(np.float64(VALUES[:5]))}, 1)
    window.add(metrics(3.0))
    assert window.close() == ({"loss": 3.0}, 0)
    assert window.close() == ({}, 0)


def test_a_window_of_skipped_steps_has_no_means():
    window = Window({"sums": {"loss": 0.0}, "num_taken": 0, "num_skipped": 2})
    window.add(metrics(np.nan, skipped=1.0))
    means, num_skipped = window.close()
    assert np.isnan(means["loss"]) and num_skipped == 3


def test_a_window_goes_through_json_wherever_it_is_cut():
    whole = Window()
    for value in VALUES:
        whole.add(metrics(value / 3, norm=jnp.float32(value)))
    expected = whole.close()
    for cut in range(len(VALUES) + 1):
        window = Window()
        for k, value in enumerate(VALUES):
            if k == cut:
                window = Window(json.loads(json.dumps(window.to_json())))
            window.add(metrics(value / 3, norm=jnp.float32(value)))
        assert window.close() == expected


def test_windows_of_older_checkpoints_and_names_that_come_later_are_taken():
    for saved in (None, {}, {"unknown": 1}):
        window = Window(saved)
        window.add(metrics(1.0, late=jnp.float32(2.0)))
        assert window.close() == ({"loss": 1.0, "late": 2.0}, 0)
