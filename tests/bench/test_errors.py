"""The errors that `bench errors` prints, of methods that are right and of one that is not."""

import csv
import subprocess
import sys

import jax
import pytest

from diffussm_jax.bench import bench_errors, errors
from diffussm_jax.bench.errors import print_errors
from diffussm_jax.ssm import apply

SHAPE = (2, 70, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "num_phases"), [pytest.param("float32", 1, marks=pytest.mark.slow), ("bfloat16", 2)])
def test_methods_pass_or_say_why_they_do_not_run(dtype, num_phases):
    methods = ["associative", "fft", "chunked", "pallas"]
    rows = {row["method"]: row for row in bench_errors(SHAPE, methods, dtype=dtype, num_phases=num_phases)}
    assert set(rows) == {"associative", "fft", "chunked", "pallas"}
    left_out = rows.pop("pallas")
    assert "none for cpu" in left_out["left_out"] and not left_out["passed"]
    for row in rows.values():
        assert row["passed"] and not row["left_out"]
        assert 0 < max(row["y"], row["du"], row["parameters"]) <= errors.BARS[dtype]


def test_a_wrong_gradient_does_not_pass(monkeypatch):
    """Of the parameters alone: y and du are right."""

    def frozen(directions, u, **options):
        return apply.chunked(jax.lax.stop_gradient(directions), u, **options)

    monkeypatch.setitem(apply._FUNCTIONS, "chunked", frozen)
    rows = print_errors([SHAPE], ["fft", "chunked"], dtypes=["float32"])
    assert [row["passed"] for row in rows] == [True, False] * 2
    assert rows[1]["parameters"] == pytest.approx(1) and rows[1]["y"] < 1e-5 and rows[1]["du"] < 1e-5


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="unknown method 'torch_naive'; choose from auto, recurrent"):
        bench_errors(SHAPE, ["torch_naive"], dtype="float32")
    with pytest.raises(ValueError, match="L = 70 is no multiple of 3 phases"):
        bench_errors(SHAPE, ["fft"], dtype="float32", num_phases=3)


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "diffussm_jax.bench", "errors", "--shapes=2x9x3x4", "--methods=fft"]
    command += ["--dtype=float32", f"--csv={tmp_path / 'errors.csv'}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "2x9x3x4" in out and "at most 1e-05: yes" in out
    with open(tmp_path / "errors.csv", newline="") as file:
        (row,) = csv.DictReader(file)  # 9 positions are no 2 phases
    assert row["method"] == "fft" and row["passed"] == "True"
