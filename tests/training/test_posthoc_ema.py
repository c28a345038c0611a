"""Post-hoc EMA: the averages are those of the profile, and a combination of them is the average that was not kept."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from tiny import tiny_config

from diffussm_jax import load_run
from diffussm_jax.experiment import build_experiment
from diffussm_jax.parallel.mesh import batch_to_devices
from diffussm_jax.training.loop import train
from diffussm_jax.training.posthoc_ema import SIGMAS, Snapshots, coefficients, gamma_of, power_ema_update


def weights_of(step, sigma_rel):
    """What the average after `step` steps gives to the parameters of each: the profile's integrals, float64."""
    edges = (np.arange(step + 1) / step) ** (gamma_of(sigma_rel) + 1)
    return np.diff(edges)


@pytest.mark.parametrize("sigma_rel,gamma", [(0.05, 16.97), (0.10, 6.94)])  # as EDM2 prints them
def test_gamma_has_that_relative_deviation(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-3)
    tau = (np.arange(200_000) + 0.5) / 200_000
    p = (gamma_of(sigma_rel) + 1) * tau ** gamma_of(sigma_rel)
    mean = np.mean(p * tau)
    assert np.sqrt(np.mean(p * (tau - mean) ** 2)) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, float("nan")])
def test_impossible_lengths_are_named(sigma_rel):
    with pytest.raises(ValueError, match=rf"sigma_rel must be above 0 and at most 0.2887.*got {sigma_rel}"):
        gamma_of(sigma_rel)


def test_updates_are_the_profile_exactly():
    theta = np.random.default_rng(0).normal(size=(60, 5))
    ema = {"w": jnp.full(5, 7.0)}  # where it starts has no weight
    for step in range(1, 61):
        ema = power_ema_update(ema, {"w": jnp.float32(theta[step - 1])}, jnp.int32(step), sigma_rel=0.1)
    np.testing.assert_allclose(ema["w"], weights_of(60, 0.1) @ theta, rtol=1e-5, atol=1e-6)


def test_coefficients_give_back_what_was_stored_and_profiles_that_were_not():
    steps = np.arange(50, 1001, 50)
    stored = [(s, float(sigma)) for s in steps for sigma in SIGMAS]
    own = coefficients(stored, (1000, 0.10))
    np.testing.assert_allclose(own, [float(s == (1000, 0.10)) for s in stored], atol=1e-6)
    profiles = np.array([np.pad(weights_of(s, sigma), (0, 1000 - s)) for s, sigma in stored])
    for target in ((1000, 0.07), (1000, 0.15), (500, 0.05), (700, 0.12)):
        wanted = np.pad(weights_of(*target), (0, 1000 - target[0]))
        usable = [k for k, (s, _) in enumerate(stored) if s <= target[0]]
        found = coefficients([stored[k] for k in usable], target) @ profiles[usable]
        assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted), target
        assert found.sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.slow
def test_a_run_stores_averages_and_samples_from_one_that_it_never_kept(tmp_path):
    config = tiny_config()
    config.posthoc_ema_every = 2
    config.checkpoint_every = 5
    config.num_steps = 7
    config.sample_every = config.eval_every = 0
    experiment = build_experiment(config)
    assert train(experiment, tmp_path) is None
    longer = dataclasses.replace(experiment, num_steps=12)  # resumes at 7, between two stored averages
    assert train(longer, tmp_path) is None
    steps = sorted(int(p.name) for p in (tmp_path / "ema_snapshots").iterdir() if p.name.isdecimal())
    assert steps == [2, 4, 6, 7, 8, 10, 12]

    # The same run again, its parameters written down, averaged in float64.
    task, trajectory = experiment.task, []
    state = task.create_state()
    for i in range(12):
        state, _ = task.train_step(state, batch_to_devices(task.mesh, experiment.train_loader.batch(i)))
        trajectory.append(jax.device_get(state.params))
    device = SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=device), state.params)
    with contextlib.closing(Snapshots(tmp_path, is_read_only=True)) as snapshots:
        for sigma, tolerance in ((0.05, 1e-4), (0.10, 1e-4), (0.08, 5e-2)):
            found = snapshots.reconstruct(sigma, like)
            weights = weights_of(12, sigma)
            leaves = zip(*(jax.tree.leaves(params) for params in trajectory), strict=True)
            wanted = [sum(w * np.float64(x) for w, x in zip(weights, xs, strict=True)) for xs in leaves]
            last = jax.tree.leaves(trajectory[-1])
            for a, b, end in zip(jax.tree.leaves(found), wanted, last, strict=True):
                # Relative to how far the average is from the last parameters: else returning those would do.
                assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b - end) + 1e-5 * np.linalg.norm(b)
        with pytest.raises(ValueError, match=r"no averages of step 3 .*choose one of \[2, 4, 6, 7, 8, 10, 12\]"):
            snapshots.reconstruct(0.05, like, step=3)
    run, other = (load_run(tmp_path, "4", ema_sigma=sigma) for sigma in (0.08, 0.2))
    assert run.sample(2)[0].shape == (2, 8, 8, 1)
    assert (run.params["final"]["bias"] != other.params["final"]["bias"]).any()


@pytest.mark.slow
def test_a_run_without_averages_says_so(tiny_run):
    with pytest.raises(FileNotFoundError, match=r"no averages in .*config.posthoc_ema_every"):
        load_run(tiny_run, ema_sigma=0.1)
    with pytest.raises(ValueError, match="must be latest or a step, got 'best'"):
        load_run(tiny_run, "best", ema_sigma=0.1)
