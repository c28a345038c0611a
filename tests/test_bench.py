"""The benchmark's yardstick computes the same numbers, and its table is complete."""

import csv
import subprocess
import sys

import jax
import numpy as np
import pytest

from diffussm_jax.bench import bench_ssm, fft_naive, parse_shape
from diffussm_jax.ssm import init_s4d, ssm_apply_bidirectional, to_complex


def test_the_yardstick_is_the_same_ssm():
    forward, backward = (to_complex(init_s4d(jax.random.key(i), 3, 8)) for i in (0, 1))
    u = jax.random.normal(jax.random.key(2), (2, 50, 3))
    expected = ssm_apply_bidirectional(forward, backward, u, method="recurrent")
    np.testing.assert_allclose(fft_naive(forward, backward, u), expected, atol=1e-4)


def test_rows_hold_every_method_and_ratios_to_the_first():
    rows = bench_ssm((1, 16, 4, 4), ["fft_naive", "fft"], repeats=2)
    assert [row["method"] for row in rows] == ["fft_naive", "fft"]
    assert rows[0]["speedup_gradient"] == 1
    assert rows[1]["speedup_gradient"] == pytest.approx(rows[0]["gradient_ms"] / rows[1]["gradient_ms"])


def test_the_command_prints_a_table_and_writes_csv(tmp_path):
    command = [sys.executable, "-m", "diffussm_jax.bench", "ssm", "--shapes=1x8x4x4", "--methods=fft,chunked"]
    command += ["--repeats=1", f"--csv={tmp_path / 'ssm.csv'}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "chunked" in out and "1x8x4x4" in out
    with open(tmp_path / "ssm.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["fft", "chunked"]


@pytest.mark.parametrize("text", ["1x2x3", "1x2x3x0", "axbxcxd", ""])
def test_wrong_shapes_are_named(text):
    with pytest.raises(ValueError, match="B x L x D x N"):
        parse_shape(text)
    with pytest.raises(ValueError, match="unknown method 'fftt'"):
        bench_ssm((1, 8, 4, 4), ["fftt"])
