"""Options of sampling that shape the prediction reach the sampler, and another model can guide (autoguidance)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import run_program
from tiny import tiny_config

from diffussm_jax import load_run
from diffussm_jax import sample as program
from diffussm_jax.build import Parts
from diffussm_jax.config import override
from diffussm_jax.diffusion import TIME_GRIDS
from diffussm_jax.export import export
from diffussm_jax.parallel.mesh import make_mesh
from diffussm_jax.run import Run

SCALE = 3.0


@pytest.fixture(scope="module")
def run(tiny_run):
    return load_run(tiny_run, guide="8", guidance_scale=SCALE)


def evaluate(run, generator, params, x_t, t, condition):
    return jax.device_get(jax.jit(lambda p: generator.denoiser(p, condition)(x_t, t))(params))


def guided(run, **sampling):
    """Of the guided denoiser: a prediction at t = 300, and its arguments."""
    run = run.with_sampling(**sampling)
    x_t = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    t, labels = jnp.array([300, 300]), jnp.array([1, 2])
    condition = run.model.as_condition(labels)
    params = (run.params, run.guide.params)
    return evaluate(run, run._generator, params, x_t, t, condition), (x_t, t, labels)


# Options


def test_options_reach_the_sampler(tiny_run):
    run = load_run(tiny_run, guidance_rescale=0.7, dynamic_threshold=0.9, time_grid="karras")
    generator = run.parts.generator
    assert (generator.guidance_rescale, generator.dynamic_threshold) == (0.7, 0.9)
    for name, grid in TIME_GRIDS.items():
        times = run.with_sampling(time_grid=name).parts.generator.times
        np.testing.assert_array_equal(times, grid(generator.objective.process, 3))
    images, _ = run.sample(3)
    assert images.shape == (3, 8, 8, 1) and (images != load_run(tiny_run).sample(3)[0]).any()


@pytest.mark.slow
def test_a_threshold_takes_the_place_of_clipping(run):
    """Far enough above the data, clipping leaves only -1 and 1, and thresholding what is between."""
    clipped, _ = guided(run, guidance_scale=40.0)
    thresholded, _ = guided(run, guidance_scale=40.0, dynamic_threshold=1.0)
    assert (np.abs(clipped.x_0) == 1).mean() > 0.5
    assert np.abs(thresholded.x_0).max() == pytest.approx(1)
    assert (np.abs(thresholded.x_0) == 1).mean() < 0.1


# Autoguidance


def test_the_guide_takes_the_place_of_the_unconditional_prediction(tiny_run, run):
    """Both models have the condition: guide + w (model - guide)."""
    run = dataclasses.replace(run, parts=dataclasses.replace(run.parts, config=unclipped(run.config)))
    found, (x_t, t, labels) = guided(run)
    main, guide = load_run(tiny_run).denoise(x_t, t, labels), load_run(tiny_run, "8").denoise(x_t, t, labels)
    for name in ("x_0", "noise"):
        ours, its = (np.float64(getattr(prediction, name)) for prediction in (main, guide))
        np.testing.assert_allclose(getattr(found, name), its + SCALE * (ours - its), atol=2e-5)
    np.testing.assert_allclose(found.variance_fraction, main.variance_fraction, atol=1e-6)
    assert run.guide.step == 8 and run.step == 12


def unclipped(config):
    return override(config, {"diffusion.clip_x_0": False})


@pytest.mark.slow
def test_a_guide_is_kept_with_other_options_and_confined_to_the_interval(tiny_run, run):
    images = run.sample(3)[0]
    np.testing.assert_array_equal(run.sample(3)[0], images)
    assert run._generator._sample._cache_size() == 1
    nowhere = run.sample(3, guidance_interval=(0.25, 0.75))[0]  # no whole step
    np.testing.assert_array_equal(nowhere, load_run(tiny_run, guidance_scale=1.0).sample(3)[0])
    assert (images != nowhere).any()


def test_another_run_or_an_export_can_guide(tiny_run, run, tmp_path):
    export(load_run(tiny_run, 8), tmp_path / "export")
    for guide in (f"{tiny_run}:8", str(tmp_path / "export")):
        other = load_run(tiny_run, guide=guide).guide
        for ours, its in zip(*map(jax.tree.leaves, (run.guide.params, other.params)), strict=True):
            np.testing.assert_array_equal(ours, its)


def random_run(seed, guide=None, **changes):
    """A run of random parameters, that was never trained."""
    parts, key = Parts(override(tiny_config(), changes), make_mesh()), jax.random.key(seed)
    params = parts.model.abstract_params(parts.input_shape)
    params = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype), params)
    return Run(parts, params, 0, guide)


@pytest.mark.slow
def test_a_model_without_conditions_can_be_guided_by_one_of_another_size_and_target():
    main = {"data.num_classes": 0, "sampling.guidance_scale": SCALE}
    other = {"model.depth": 1, "diffusion.target": "v", "diffusion.has_learned_variance": False}
    images = random_run(0, random_run(1, **main, **other), **main).sample(3)[0]
    assert images.shape == (3, 8, 8, 1)
    assert (random_run(0, **main | {"sampling.guidance_scale": 1.0}).sample(3)[0] != images).any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.num_classes": 9}, r"its conditions are .*'num_classes': 9.* the run's .*'num_classes': 10"),
        ({"data.num_classes": 0}, r"its conditions are .*'num_classes': 0"),
        ({"data.image_size": 16}, r"its inputs are \(16, 16, 1\), the run's \(8, 8, 1\)"),
        ({"diffusion.schedule": "linear"}, "its process is linear with other noise levels, the run's cosine"),
        ({"diffusion.num_steps": 500}, "its process is cosine with other noise levels, the run's cosine"),
        ({"diffusion.has_zero_terminal_snr": True, "diffusion.target": "v"}, "its process is cosine with other"),
        (
            {"diffusion.schedule": "gvp", "diffusion.has_learned_variance": False, "diffusion.target": "v"},
            "its process is gvp with other noise levels, the run's cosine",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_guide_of_another_kind_is_refused(tiny_run, monkeypatch, changes, message):
    from diffussm_jax import run as module

    other = random_run(0, **changes)
    load = module.load_run
    monkeypatch.setattr(module, "load_run", lambda *args, **kwargs: other)
    with pytest.raises(ValueError, match=f"guide = 'other' cannot guide this run: {message}"):
        load(tiny_run, guide="other")


def test_a_guide_that_is_not_there_is_named(tiny_run, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint '5'"):
        load_run(tiny_run, guide="5")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load_run(tiny_run, guide=f"{tmp_path}:3")


@pytest.mark.slow
def test_the_command_takes_a_guide(tiny_run, tmp_path):
    arguments = (f"--workdir={tiny_run}", "--num_samples=3", f"--out={tmp_path / 'out'}", "--guide=8")
    code, printed = run_program(program.main, *arguments, f"--guidance_scale={SCALE}", flag_values=program._FLAGS)
    assert code == 0, printed
    run = load_run(tiny_run, guide=8, guidance_scale=SCALE)
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], run.sample(3)[0])
    assert "step_00000012_guide8_ddim3_scale3_seed0" in program.default_out(tmp_path, run, 0).name
    code, printed = run_program(program.main, *arguments, "--guidance_scale=1", flag_values=program._FLAGS)
    assert code == 1 and "--guide does nothing with config.sampling.guidance_scale = 1" in printed
