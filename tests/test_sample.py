"""Sampling from a run writes what ADM's evaluation reads, repeatably, and names what is wrong."""

import dataclasses
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from programs import run_program

import diffussm_jax
from diffussm_jax import load_run
from diffussm_jax import sample as program
from diffussm_jax.models import DiffuSSM
from diffussm_jax.run import choose_labels
from diffussm_jax.sample import save_samples


@pytest.fixture(scope="module")
def run(tiny_run):
    return load_run(tiny_run)


def test_the_command_writes_a_grid_and_adms_npz(tiny_run, tmp_path):
    command = [
        sys.executable,
        "-m",
        "diffussm_jax.sample",
        f"--workdir={tiny_run}",
        "--num_samples=7",
        "--labels=0,3,7",
    ]
    command += [
        "--guidance_scale=2",
        "--sampler=ddpm",
        "--steps=4",
        "--batch_size=4",
        f"--out={tmp_path / 'x' / 'seven'}",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with np.load(tmp_path / "x" / "seven.npz", allow_pickle=False) as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        assert (file["arr_0"].shape, file["arr_0"].dtype) == ((7, 8, 8, 1), np.uint8)
        np.testing.assert_array_equal(file["arr_1"], [0, 3, 7, 0, 3, 7, 0])
        images, labels = load_run(tiny_run, sampler="ddpm", num_steps=4, guidance_scale=2).sample(
            7, [0, 3, 7], batch_size=4
        )
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["arr_1"], labels)
    size = 8 * 10 + 2  # above 512 pixels in 7 columns
    assert Image.open(tmp_path / "x" / "seven.png").size == (7 * size + 2, size + 18 + 2)


def test_the_command_names_what_is_wrong(tiny_run, tmp_path):
    for arguments, message in (
        ([], "give --workdir=FOLDER"),
        ([f"--workdir={tmp_path}"], "holds no run"),
        ([f"--workdir={tiny_run}", "--labels=1,x"], "--labels must be whole numbers.* got 1,x"),
        ([f"--workdir={tiny_run}", "--sampler=ddimm"], "'ddimm'; choose one of ddpm, ddim"),
        (["--workdir="], "give --workdir=FOLDER"),
        ([f"--workdir={tiny_run}", "--out="], "--out is empty"),
        ([f"--workdir={tiny_run}", f"--labels={10**30}"], f"labels must be from 0 to 9, got .{10**30}"),
        ([f"--workdir={tiny_run}", f"--seed={2**64 - 1}"], f"seed.*{2**64 - 1}"),
        ([f"--workdir={tiny_run}", "--guidance_scale=inf"], "guidance_scale must be finite, got inf"),
        (
            [f"--workdir={tiny_run}", "--guidance_scale=1e300"],
            "guidance_scale must be at most 3.4e.38, got 1e.300",
        ),
        ([f"--workdir={tiny_run}", "--guidance_scale=nan"], "guidance_scale must be a number of at least 0, got nan"),
    ):
        code, printed = run_program(program.main, *arguments, flag_values=program._FLAGS)
        assert code == 1 and "Traceback" not in printed
        assert re.search(message, printed), printed


def test_an_output_that_cannot_be_written_is_found_before_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "load_run", lambda *args, **kwargs: 1 / 0)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    for out, message in (("file/below", "file/below.png cannot be written"), ("folder", "folder.npz is a folder")):
        arguments = (f"--workdir={tmp_path}", f"--out={tmp_path / out}")
        code, printed = run_program(program.main, *arguments, flag_values=program._FLAGS)
        assert code == 1 and message in printed, printed


def test_samples_that_are_not_finite_are_no_images(run, tmp_path, monkeypatch):
    diverged = dataclasses.replace(run, params=jax.tree.map(lambda leaf: leaf * jnp.nan, run.params))
    monkeypatch.setattr(program, "load_run", lambda *args, **kwargs: diverged)
    arguments = ("--workdir=run", "--num_samples=3", f"--out={tmp_path / 'out'}")
    code, printed = run_program(program.main, *arguments, flag_values=program._FLAGS)
    assert code == 1 and "3 of 3 images have values that are not finite" in printed
    assert "guidance_scale = 1.5" in printed and not list(tmp_path.iterdir())


def test_samples_follow_from_seed_and_options(tiny_run, run):
    images, labels = run.sample(4)
    np.testing.assert_array_equal(run.sample(4)[0], images)
    np.testing.assert_array_equal(labels, [0, 1, 2, 3])
    assert (run.sample(4, seed=1)[0] != images).any()
    assert (load_run(tiny_run, "8").sample(4)[0] != images).any()
    guided = run.sample(4, guidance_scale=3.0)[0]
    assert (guided != images).any()
    np.testing.assert_array_equal(load_run(tiny_run, guidance_scale=3.0).sample(4)[0], guided)
    other_sampler = run.sample(4, sampler="heun", num_steps=2)[0]
    assert other_sampler.shape == images.shape and (other_sampler != images).any()


def test_samples_come_in_batches_and_tell_of_each(run):
    made = []
    images, labels = run.sample(9, [5, 2], batch_size=4, progress=made.append)
    assert made == [4, 4, 1] and images.shape == (9, 8, 8, 1)
    np.testing.assert_array_equal(labels, [5, 2, 5, 2, 5, 2, 5, 2, 5])


def test_a_run_denoises(run):
    """Between its noise and its x_0 lies x_t; the parameters are those of the newest checkpoint."""
    x_t = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    t, labels = jnp.array([3, 700]), jnp.array([1, 2])
    prediction = run.denoise(x_t, t, labels)
    alpha_bar = run.parts.objective.process.alpha_bar[np.asarray(t)][:, None, None, None]
    again = np.sqrt(alpha_bar) * prediction.x_0 + np.sqrt(1 - alpha_bar) * prediction.noise
    np.testing.assert_allclose(again, x_t, rtol=1e-4, atol=1e-5)
    assert prediction.variance_fraction.shape == x_t.shape
    with_null = run.denoise(x_t, t, {"label": jnp.array([10, 10])})
    assert (with_null.noise != prediction.noise).any()
    assert (run.config.model.width, run.model.width) == (16, 16)


def test_labels_are_taken_in_turn():
    np.testing.assert_array_equal(choose_labels(None, 5, 3), [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(choose_labels([2], 2, 3), [2, 2])
    np.testing.assert_array_equal(choose_labels(None, 2, 0), [0, 0])


@pytest.mark.parametrize("labels,num_classes", [([3], 3), ([-1], 3), ([], 3), ([0], 0)])
def test_labels_that_are_no_classes_are_named(labels, num_classes):
    with pytest.raises(ValueError, match="labels"):
        choose_labels(labels, 4, num_classes)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"sampler": "ddimm"}, "sampling.sampler is 'ddimm'; choose one of ddpm, ddim"),
        ({"num_steps": 1001}, "num_steps must be .* 1000, got 1001"),
        ({"guidance_scal": 2.0}, 'guidance_scal(.|\n)*Did you mean "config.sampling.guidance_scale"'),
        ({"guidance_scale": -1.0}, "guidance.scale must .* got -1"),
        ({"labels": [10]}, "from 0 to 9, got"),
    ],
)
def test_wrong_options_are_named(run, tiny_run, options, message):
    with pytest.raises(ValueError, match=message):
        run.sample(1, **options)
    if "labels" not in options:
        with pytest.raises(ValueError, match=message):
            load_run(tiny_run, **options)


def test_a_checkpoint_or_run_that_is_not_there_is_named(tiny_run, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint '5'"):
        load_run(tiny_run, "5")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load_run(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"model": {"wi', b"\xff\x00", b"[1, 2]", b"null"])
def test_a_damaged_config_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json is damaged: "):
        load_run(tmp_path)


def test_files_say_how_the_images_were_made_and_are_never_overwritten(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    arguments = (f"--workdir={tmp_path / 'run'}", "--num_samples=1", "--seed=7", "--guidance_scale=2.5", "--steps=2")
    for _ in range(2):
        code, printed = run_program(program.main, *arguments, flag_values=program._FLAGS)
        assert code == 0, printed
    name = "step_00000012_ddim2_scale2.5_seed7_samples"
    found = {p.name for p in (tmp_path / "run" / "samples").iterdir()} - {
        p.name for p in (tiny_run / "samples").iterdir()
    }
    assert found == {f"{name}{number}{ending}" for number in ("", "_2") for ending in (".png", ".npz")}


def test_an_ending_in_out_is_not_doubled(tmp_path):
    png, npz = save_samples(np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int32), tmp_path / "a.b.npz")
    assert (png.name, npz.name) == ("a.b.png", "a.b.npz")


def test_a_sample_reaches_the_model_through_few_files(tiny_run, monkeypatch):
    class ReachedError(Exception):
        """It got there."""

    def check(self, input_shape):
        raise ReachedError

    run = load_run(tiny_run)  # nothing is traced yet
    monkeypatch.setattr(DiffuSSM, "check", check)
    with pytest.raises(ReachedError) as caught:
        run.sample(1)
    package = Path(diffussm_jax.__file__).parent
    files = [Path(frame.filename) for frame in traceback.extract_tb(caught.value.__traceback__)]
    passed = list(dict.fromkeys(f.relative_to(package).as_posix() for f in files if f.is_relative_to(package)))
    assert passed[0] == "run.py" and passed[-1] == "models/diffussm.py"
    assert len(passed) <= 8, passed
