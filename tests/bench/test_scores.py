"""Precision and recall of `bench scores`: all methods agree, and the command prints their times."""

import csv

import pytest

from diffussm_jax.bench import bench_scores
from diffussm_jax.bench.scores import METHODS, parse_shape, random_features

SHAPE = (300, 200, 32)


def test_all_methods_agree():
    samples, reference = random_features(SHAPE)
    assert samples.shape == (300, 32) and reference.shape == (200, 32)
    found = {name: method(samples, reference) for name, method in METHODS.items()}
    expected = found.pop("sklearn")
    assert 0.3 < min(expected) and max(expected) < 1
    assert found.pop("adm_float16") == pytest.approx(expected, abs=0.05)
    for values in found.values():
        assert values == pytest.approx(expected, abs=2 / 200)


def test_the_command(tmp_path, bench_command):
    path = tmp_path / "scores.csv"
    out = bench_command("scores", "--shapes=300x200x32", "--methods=float32", f"--csv={path}")
    assert "N x M x d = 300x200x32" in out and "1.00 x float32), CPU" in out
    with open(path, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["method"] == "float32" and 0 < float(row["peak_gb"]) < 4 and float(row["seconds"]) > 0


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="unknown method 'torch'; choose from float32, adm_float16, numpy, sklearn"):
        bench_scores(SHAPE, "torch")
    for text in ("50000x10000", "0x10x10", "axbxc"):
        with pytest.raises(ValueError, match=f"N x M x d, such as .*'{text}'"):
            parse_shape(text)
