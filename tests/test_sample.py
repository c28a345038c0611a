"""Sampling from a run writes what ADM's evaluation reads, repeatably, and names what is wrong."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffussm_jax.sample import choose_labels, sample, save_samples


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
        "--batch_size=3",
        f"--out={tmp_path / 'x' / 'seven'}",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with np.load(tmp_path / "x" / "seven.npz", allow_pickle=False) as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        assert (file["arr_0"].shape, file["arr_0"].dtype) == ((7, 8, 8, 1), np.uint8)
        np.testing.assert_array_equal(file["arr_1"], [0, 3, 7, 0, 3, 7, 0])
    assert Image.open(tmp_path / "x" / "seven.png").size == (7 * 34 + 2, 34 + 2)


def test_samples_follow_from_seed_and_options(tiny_run):
    def images(**options):
        return sample(tiny_run, num_samples=4, **options)[0]

    np.testing.assert_array_equal(images(), images())
    assert (images(seed=1) != images()).any()
    assert (images(guidance_scale=3.0) != images()).any()
    assert (images(checkpoint="8") != images()).any()


def test_labels_are_taken_in_turn():
    np.testing.assert_array_equal(choose_labels(None, 5, 3), [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(choose_labels([2], 2, 3), [2, 2])
    np.testing.assert_array_equal(choose_labels(None, 2, 0), [0, 0])


@pytest.mark.parametrize("labels,num_classes", [([3], 3), ([-1], 3), ([], 3), ([0], 0)])
def test_labels_that_are_no_classes_are_named(labels, num_classes):
    with pytest.raises(ValueError, match="labels"):
        choose_labels(labels, 4, num_classes)


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"sampler": "ddimm"}, ValueError, "'ddimm'; choose one of ddpm, ddim"),
        ({"steps": 1001}, ValueError, "num_steps = 1001 exceeds"),
        ({"labels": [10]}, ValueError, "from 0 to 9, got"),
        ({"checkpoint": "5"}, ValueError, "no checkpoint '5'"),
    ],
)
def test_wrong_options_are_named(tiny_run, options, error, message):
    with pytest.raises(error, match=message):
        sample(tiny_run, num_samples=1, **options)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        sample(tmp_path)


def test_an_ending_in_out_is_not_doubled(tmp_path):
    png, npz = save_samples(np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int32), tmp_path / "a.b.npz")
    assert (png.name, npz.name) == ("a.b.png", "a.b.npz")
