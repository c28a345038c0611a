"""The embedded example makes digits: recognised as what they were to be, as various as real ones, and no copies.

Takes minutes. With DIFFUSSM_DIGITS_RUN, judges the run in that folder; without, trains one first, as the README says.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from diffussm_jax import load_run

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """500 samples in [-1, 1], flat, and their labels."""
    workdir = os.environ.get("DIFFUSSM_DIGITS_RUN")
    if workdir is None:
        workdir = tmp_path_factory.mktemp("digits")
        command = [sys.executable, "-m", "diffussm_jax.main", "--config=configs/digits.py", f"--workdir={workdir}"]
        subprocess.run(command, cwd=ROOT, check=True)
    images, labels = load_run(workdir).sample(500, seed=1)
    return images.reshape(500, 64) / 127.5 - 1, labels


@pytest.fixture(scope="module")
def real():
    images, labels = load_digits(return_X_y=True)
    return images / 8 - 1, labels


def test_digits_are_recognised_as_their_label(generated, real):
    images, labels = real
    classifier = SVC(gamma=0.02).fit(images[::2], labels[::2])
    assert classifier.score(images[1::2], labels[1::2]) >= 0.97
    accuracy = classifier.score(*generated)
    print(f"recognised: {accuracy:.3f}")
    assert accuracy >= 0.95


def test_digits_vary_within_a_class_as_real_ones_do(generated, real):
    def deviation(images, labels):
        return np.mean([images[labels == c].std(0).mean() for c in range(10)])

    ratio = deviation(*generated) / deviation(*real)
    print(f"deviation within a class, to real digits': {ratio:.3f}")
    assert ratio >= 0.85


def test_digits_are_no_copies(generated, real):
    is_held_out = np.arange(len(real[0])) % 10 == 9
    training, held_out = real[0][~is_held_out], real[0][is_held_out]

    def median_distance(images):
        return np.median([np.linalg.norm(training - image, axis=1).min() for image in images])

    ratio = median_distance(generated[0]) / median_distance(held_out)
    print(f"distance to the nearest training image, to held-out digits': {ratio:.3f}")
    assert ratio >= 0.6
