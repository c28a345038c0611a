"""A step skips what is not finite, cuts a batch into parts without changing its gradient, and keeps to float32."""

import dataclasses
import functools
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

import diffussm_jax
from diffussm_jax.build import Parts
from diffussm_jax.data.transforms import to_unit_range
from diffussm_jax.experiment import build_experiment
from diffussm_jax.parallel.mesh import batch_to_devices, make_mesh
from diffussm_jax.training.ema import EMA
from diffussm_jax.training.loop import train
from diffussm_jax.training.window import Window


def encode_or_break(batch, key):
    """x_0, not finite where an image is all 255."""
    x_0 = to_unit_range(batch["image"])
    return jnp.where(jnp.all(batch["image"] == 255, (1, 2, 3), keepdims=True), jnp.nan, x_0)


@functools.cache
def task_that_skips_two():
    ema = EMA(decay=0.5, power_sigmas=("0.05", "0.10"))
    task = Parts(tiny_config(), make_mesh(1)).task
    return dataclasses.replace(task, encode=encode_or_break, max_skipped_steps=2, ema=ema)


def batches(mesh):
    rng = np.random.default_rng(0)

    def batch(is_broken=False):
        images = rng.integers(0, 255, (8, 8, 8, 1), np.uint8)
        images[3] = 255 if is_broken else images[3]
        return batch_to_devices(mesh, {"image": images, "label": rng.integers(0, 10, 8).astype(np.int32)})

    return batch


def but_counters(state):
    return jax.device_get((state.params, state.ema_params, state.power_ema, state.opt_state))


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    task, window = task_that_skips_two(), Window()
    batch = batches(task.mesh)
    state, metrics = task.train_step(task.create_state(), batch())
    window.add(metrics)
    before, summed = but_counters(state), window.to_json()
    state, metrics = task.train_step(state, batch(is_broken=True))
    window.add(metrics)
    assert_equal(but_counters(state), before)
    assert (int(state.step), int(state.skipped_in_a_row)) == (2, 1)
    assert float(metrics["skipped"]) == 1
    assert window.to_json() == summed | {"num_skipped": 1}
    state, metrics = task.train_step(state, batch())
    window.add(metrics)
    assert (int(state.step), int(state.skipped_in_a_row)) == (3, 0)
    assert window.to_json()["num_taken"] == 2
    means, num_skipped = window.close()
    assert num_skipped == 1 and means.keys() == {"loss", "mse", "vlb", "grad_norm"}
    assert np.isfinite(list(means.values())).all()
    pairs = zip(jax.tree.leaves(but_counters(state)), jax.tree.leaves(before), strict=True)
    assert any(np.any(a != b) for a, b in pairs)  # the parameters of a fresh block have no gradient at first


def test_after_too_many_in_a_row_the_state_stays_as_it_was():
    task = task_that_skips_two()
    batch = batches(task.mesh)
    state, _ = task.train_step(task.create_state(), batch())
    before = but_counters(state)
    for is_broken in (True, True, True, False, False):  # good batches come too late
        state, metrics = task.train_step(state, batch(is_broken))
        assert float(metrics["skipped"]) == 1
    assert_equal(but_counters(state), before)
    assert int(state.skipped_in_a_row) == 5


def experiment_that_skips_two():
    config = tiny_config()
    config.sample_every = config.eval_every = 0
    return dataclasses.replace(build_experiment(config), task=task_that_skips_two())


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_run_that_diverges_ends_and_names_the_last_good_checkpoint(has_checkpoint, tmp_path, monkeypatch):
    checkpoint_every = 4 if has_checkpoint else 100
    experiment = dataclasses.replace(experiment_that_skips_two(), checkpoint_every=checkpoint_every)
    iterate = experiment.train_loader.iterate

    def batches(first_step):
        for step, batch in enumerate(iterate(first_step), first_step):
            yield batch | {"image": np.full_like(batch["image"], 255)} if step >= 5 else batch

    monkeypatch.setattr(experiment.train_loader, "iterate", batches)
    where = r"checkpoints/4\. " if has_checkpoint else "none: no checkpoint was saved yet"
    with pytest.raises(FloatingPointError, match=rf"not finite from step 6 on.*max_skipped_steps = 2 .*{where}"):
        train(experiment, tmp_path)
    rows = (tmp_path / "metrics.csv").read_text()
    assert rows.splitlines()[0].startswith("step,") and "nan" not in rows
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == (["4"] if has_checkpoint else [])


def step_that_drops_some(model, labels, seed):
    """The first step at which some labels of the batch are dropped, and not all."""
    for step in range(100):
        drop_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 4)[3]
        num_dropped = int((model.drop(labels, drop_key)["label"] != labels).sum())
        if 2 <= num_dropped < len(labels) - 2:
            return step
    raise AssertionError("none drops as many")


@pytest.mark.slow
def test_cutting_a_batch_changes_no_gradient_whichever_labels_are_dropped():
    states, losses = [], []
    for num_parts in (1, 4):
        config = tiny_config()
        config.optimizer.accumulation_steps = num_parts
        task = Parts(config, make_mesh(1)).task
        state, batch = task.create_state(), batches(task.mesh)()
        step = step_that_drops_some(task.model, batch["label"], task.seed)
        # Away from the start, where most gradients are zero.
        params = jax.tree.map(lambda p: p + 0.05 * np.sin(np.arange(p.size)).reshape(p.shape), state.params)
        state, metrics = task.train_step(state.replace(params=params, step=jnp.int32(step)), batch)
        states.append(jax.device_get(state))
        losses.append(jax.device_get(metrics))
    whole, cut = states
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-6)
    for name in ("mse", "vlb", "grad_norm"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=1e-5)
    for a, b in zip(jax.tree.leaves(cut.opt_state[0].mu), jax.tree.leaves(whole.opt_state[0].mu), strict=True):
        assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b)


def test_bfloat16_keeps_the_state_in_float32():
    config = tiny_config()
    config.model.dtype = "bfloat16"
    task = Parts(config, make_mesh(1)).task
    state, metrics = jax.eval_shape(task.train_step, task.abstract_state, task.batch_spec)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert {leaf.dtype for leaf in metrics.values()} == {jnp.dtype("float32")}


def test_a_batch_reaches_the_ssm_through_few_files(monkeypatch):
    class ReachedError(Exception):
        """It got there."""

    def ssm_apply_phases(*args, **options):
        raise ReachedError

    task = Parts(tiny_config(), make_mesh(1)).task
    state = task.abstract_state  # tracing the initialisation goes through the model, too
    monkeypatch.setattr("diffussm_jax.models.mixers.s4d.ssm_apply_phases", ssm_apply_phases)
    with pytest.raises(ReachedError) as caught:
        task.train_step.lower(state, task.batch_spec)
    package = Path(diffussm_jax.__file__).parent
    files = [Path(frame.filename) for frame in traceback.extract_tb(caught.value.__traceback__)]
    passed = list(dict.fromkeys(f.relative_to(package).as_posix() for f in files if f.is_relative_to(package)))
    assert passed[0] == "training/diffusion_task.py" and "models/mixers/s4d.py" in passed
    assert len(passed) <= 9, passed
