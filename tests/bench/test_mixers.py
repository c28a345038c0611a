"""Sequence mixers side by side."""

import csv

import pytest

from diffussm_jax import registry
from diffussm_jax.bench import bench_mixers
from diffussm_jax.bench.mixers import parse_shape


@pytest.mark.slow
def test_every_mixer_is_timed(bench_command, tmp_path):
    out = bench_command(
        "ssm", "--mixers=all", "--shapes=1x16x8", "--repeats=1", "--dtype=bfloat16", f"--csv={tmp_path / 'mixers.csv'}"
    )
    with open(tmp_path / "mixers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mixer"] for row in rows] == registry.names("mixer")
    for row in rows:
        assert row["left_out"] == "" and row["mixer"] in out
        assert float(row["gradient_ms"]) > 0 and float(row["gradient_mb"]) > 0 and row["dtype"] == "bfloat16"


def test_flags_of_methods_are_refused(bench_command):
    with pytest.raises(ValueError, match="timed only; leave out --aot, --plot"):
        bench_command("ssm", "--mixers=s4d", "--plot=a.png", "--aot=v5e")


def test_options_and_what_cannot_run():
    fft, pallas = bench_mixers((1, 12, 4), ["s4d+method=fft+state_size=4", "s4d+method=pallas"], repeats=1)
    assert fft["parameters"] == 2 * 4 * (6 * 2 + 2) and fft["left_out"] == ""  # 2 directions, 4 channels, 2 pairs
    assert "pallas" in pallas["left_out"] and pallas["gradient_ms"] is None
    with pytest.raises(ValueError, match="mixer is 's4e'"):
        bench_mixers((1, 8, 4), ["s4e"])
    with pytest.raises(ValueError, match="'metod'"):
        bench_mixers((1, 8, 4), ["s4d+metod=fft"])
    with pytest.raises(ValueError, match="B x L x D, such as 4x1024x384; got '1x2x3x4'"):
        parse_shape("1x2x3x4")
