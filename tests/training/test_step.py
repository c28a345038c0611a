"""A step skips what is not finite, cuts a batch into parts without changing its gradient, and keeps to float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from diffussm_jax.build import build_experiment, build_recipe
from diffussm_jax.data.transforms import to_unit_range
from diffussm_jax.parallel.mesh import batch_to_devices, make_mesh
from diffussm_jax.training.loop import train
from diffussm_jax.training.step import make_train_step


def encode_or_break(batch, key):
    """x_0, not finite where an image is all 255."""
    x_0 = to_unit_range(batch["image"])
    return jnp.where(jnp.all(batch["image"] == 255, (1, 2, 3), keepdims=True), jnp.nan, x_0)


def recipe_and_batches(**changes):
    config = tiny_config()
    config.model.label_dropout = changes.pop("label_dropout", 0.1)
    config.sampling.guidance_scale = 1.0
    mesh = make_mesh(1)
    recipe = dataclasses.replace(build_recipe(config, mesh, encode_or_break), **changes)
    rng = np.random.default_rng(0)

    def batch(is_broken=False):
        images = rng.integers(0, 255, (8, 8, 8, 1), np.uint8)
        images[3] = 255 if is_broken else images[3]
        return batch_to_devices(mesh, {"image": images, "label": rng.integers(0, 10, 8).astype(np.int32)})

    return recipe, batch


def but_counters(state):
    return jax.device_get((state.params, state.ema_params, state.power_ema, state.opt_state))


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    recipe, batch = recipe_and_batches(power_emas=("0.05", "0.10"))
    step = make_train_step(recipe)
    state = step(recipe.create_state(), batch())
    before, window = but_counters(state), jax.device_get(state.window)
    state = step(state, batch(is_broken=True))
    assert_equal(but_counters(state), before)
    assert (int(state.step), int(state.skipped_in_a_row)) == (2, 1)
    assert jax.device_get(state.window) == window | {"skipped": 1}
    state = step(state, batch())
    assert (int(state.step), int(state.skipped_in_a_row), int(state.window["count"])) == (3, 0, 2)
    assert np.isfinite(list(jax.device_get(state.window).values())).all()
    pairs = zip(jax.tree.leaves(but_counters(state)), jax.tree.leaves(before), strict=True)
    assert any(np.any(a != b) for a, b in pairs)  # the parameters of a fresh block have no gradient at first


def test_after_too_many_in_a_row_the_state_stays_as_it_was():
    recipe, batch = recipe_and_batches(max_skipped_steps=2)
    step = make_train_step(recipe)
    state = step(recipe.create_state(), batch())
    before = but_counters(state)
    for is_broken in (True, True, True, False, False):  # good batches come too late
        state = step(state, batch(is_broken))
    assert_equal(but_counters(state), before)
    assert int(state.skipped_in_a_row) == 5


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_run_that_diverges_ends_and_names_the_last_good_checkpoint(has_checkpoint, tmp_path):
    config = tiny_config()
    config.optimizer.max_skipped_steps = 1
    config.checkpoint_every = 4 if has_checkpoint else 100
    experiment = build_experiment(config)
    experiment = dataclasses.replace(experiment, recipe=dataclasses.replace(experiment.recipe, encode=encode_or_break))
    iterate = experiment.train_loader.iterate

    def batches(first_step):
        for step, batch in enumerate(iterate(first_step), first_step):
            yield batch | {"image": np.full_like(batch["image"], 255)} if step >= 5 else batch

    experiment.train_loader.iterate = batches
    where = r"checkpoints/4\. " if has_checkpoint else "none: no checkpoint was saved yet"
    with pytest.raises(FloatingPointError, match=rf"not finite from step 6 on.*max_skipped_steps = 1 .*{where}"):
        train(experiment, tmp_path)
    rows = (tmp_path / "metrics.csv").read_text()
    assert rows.splitlines()[0].startswith("step,") and "nan" not in rows
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == (["4"] if has_checkpoint else [])


def test_cutting_a_batch_changes_no_gradient():
    states = []
    for parts in (1, 4):
        recipe, batch = recipe_and_batches(accumulation_steps=parts, label_dropout=0.0)
        state = recipe.create_state()
        # Away from the start, where most gradients are zero.
        params = jax.tree.map(lambda p: p + 0.05 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), state.params)
        states.append(jax.device_get(make_train_step(recipe)(state.replace(params=params), batch())))
    whole, cut = states
    assert cut.window["loss"] == pytest.approx(whole.window["loss"], rel=1e-6)
    for a, b in zip(jax.tree.leaves(cut.opt_state[0].mu), jax.tree.leaves(whole.opt_state[0].mu), strict=True):
        assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b)


def test_bfloat16_keeps_the_state_in_float32():
    config = tiny_config()
    config.model.dtype = "bfloat16"
    recipe = build_recipe(config, make_mesh(1))
    _, batch = recipe_and_batches()
    state = make_train_step(recipe)(recipe.create_state(), batch())
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32")}
