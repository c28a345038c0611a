"""Counting for chips that are not there: rates, floors, bars; and the command for a TPU, where libtpu is installed."""

import csv
import importlib.util
import os
import subprocess
import sys

import pytest

from diffussm_jax.bench import aot, one_chip
from diffussm_jax.parallel.topology import CHIPS


def test_one_chip():
    assert one_chip("v5e").shape == one_chip("v5e-1").shape == (1, 1)
    assert one_chip("v4").num_devices == 1 and one_chip("h100").num_chips == 1
    for name in ("v5e-4", "h100:8"):
        with pytest.raises(ValueError, match=f"one chip, such as v5e, v6e or h100; got '{name}'"):
            one_chip(name)
    with pytest.raises(ValueError, match="unknown machine 'v9'"):
        one_chip("v9")


def test_vector_rates_follow_from_registers_and_clocks():
    assert aot.vector_rate(CHIPS["v5e"]) == pytest.approx(4 * 8 * 128 * 1.5e9, rel=0.01)
    assert aot.vector_rate(CHIPS["v5p"]) == pytest.approx(2 * 4 * 8 * 128 * 1.75e9, rel=0.01)  # two cores
    assert aot.vector_rate(CHIPS["v6e"]) is None and aot.vector_rate(CHIPS["h100"]) is None


def test_the_least_to_move():
    floor = aot.floor_bytes((16, 1024, 1152, 64), "bfloat16")
    assert floor == {"forward": 113_246_208, "gradient": 264_241_152}


def test_bars():
    common = {"left_out": "", "pallas_gb": 0.1, "compile_s": 29.0, "vector_ms": 2.3}
    rows = [common | {"pass": "forward", "gb": 0.59}, common | {"pass": "gradient", "gb": 2.01}]
    assert aot.verdict(rows) == (
        "bars: forward 0.59 GB of 0.6: yes; its vector operations 2.30 ms of 2.20: no; "
        "gradient 2.01 GB of 2: no; compiled in 29 s of 30: yes"
    )
    assert "vector" not in aot.verdict([row | {"pallas_gb": 0.0} for row in rows])
    assert aot.verdict([rows[0], rows[1] | {"left_out": "why"}]) == "bars: not compiled"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra plan)")
def test_the_command_compiles_for_tpus(tmp_path):
    """In a process of its own, whose environment libtpu reads."""
    command = [sys.executable, "-m", "diffussm_jax.bench", "ssm", "--aot=v5e", "--shapes=1x256x16x64"]
    command += ["--methods=pallas,fft_naive", f"--csv={tmp_path / 'aot.csv'}"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert "compiled for 1 TPU v5 lite, not run: 819 GB/s, 197 TFLOP/s" in out
    with open(tmp_path / "aot.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["pass"]) for row in rows] == [
        (method, which) for method in ("pallas", "fft_naive") for which in ("forward", "gradient")
    ]
    for row in rows:
        assert row["left_out"] == ""
        assert float(row["gb"]) == pytest.approx(float(row["xla_gb"]) + float(row["pallas_gb"]), rel=1e-4)
        assert (float(row["pallas_gb"]) > 0) == (float(row["matrix_gflop"]) > 0) == (row["method"] == "pallas")
    # u [16, 16, 128], its rows filled up to 16, is read once and y written for both directions, in bfloat16.
    assert float(rows[0]["pallas_gb"]) > 3 * 16 * 16 * 128 * 2 / 1e9


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra plan)")
def test_a_block_compiles_for_tpus(tmp_path):
    command = [sys.executable, "-m", "diffussm_jax.bench", "block", "--sizes=64", "--image_sizes=256", "--aot=v5e"]
    command += ["--batch_size=8", "--little_effort", f"--csv={tmp_path / 'block.csv'}"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert "compiled for 1 TPU v5 lite, not run" in out
    with open(tmp_path / "block.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["forward_pallas_gb"]) > 0 and float(row["forward_without_ssm_pallas_gb"]) == 0
    assert 0 < float(row["gradient_without_ssm_gb"]) < float(row["gradient_gb"])


def test_what_a_compiler_does_not_count_is_not_printed_as_nothing():
    row = dict.fromkeys(aot._FIGURES, 1.0) | {"method": "pallas", "pass": "forward", "left_out": "", "loops": 0}
    line = aot._line(row | dict.fromkeys(("xla_gb", "gb", "bytes_ms", "xla_gflop", "vector_ms")))
    assert line.split() == [
        "pallas",
        "forward",
        "1.0",
        "s",
        "-",
        "1.000",
        "-",
        "-",
        "1",
        "MB",
        *"- 1.0 1.00 1.00 -".split(),
    ]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_command_says_what_to_install():
    command = [sys.executable, "-m", "diffussm_jax.bench", "ssm", "--aot=v5e", "--methods=fft"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 1 and "libtpu: pip install -e '.[plan]'" in done.stderr
