"""The benchmark of the SSM: its yardstick computes the same numbers, its rows are complete, its slopes are slopes."""

import csv

import jax
import numpy as np
import pytest

from diffussm_jax.bench import __main__ as program
from diffussm_jax.bench import bench_ssm, fft_naive, parse_shape, plot
from diffussm_jax.bench import ssm as bench
from diffussm_jax.bench.measure import compile_program, copy_rate, matmul_rate, slope
from diffussm_jax.ssm import METHODS, init_s4d, ssm_apply_bidirectional, to_complex


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_yardstick_is_the_same_ssm(dtype):
    forward, backward = (to_complex(init_s4d(jax.random.key(i), 3, 8)) for i in (0, 1))
    u = jax.random.normal(jax.random.key(2), (2, 50, 3)).astype(dtype)
    expected = jax.jit(ssm_apply_bidirectional, static_argnames="method")(forward, backward, u, method="recurrent")
    actual = jax.jit(fft_naive)(forward, backward, u)
    assert actual.dtype == dtype
    atol = 1e-4 if dtype == "float32" else 0.05
    np.testing.assert_allclose(np.asarray(actual, np.float32), np.asarray(expected, np.float32), atol=atol)


def test_rows_hold_every_method_and_ratios_to_the_first():
    rates = bench.Rates(copy=1e9, matmul=1e9)
    rows = bench_ssm((1, 16, 4, 4), ["fft_naive", "fft"], repeats=2, rates=rates)
    assert [row["method"] for row in rows] == ["fft_naive", "fft"]
    assert rows[0]["gradient_speedup"] == 1
    assert rows[1]["gradient_speedup"] == pytest.approx(rows[0]["gradient_ms"] / rows[1]["gradient_ms"])
    for row in rows:
        assert row["left_out"] == "" and None not in row.values()
        assert row["gradient_copy_share"] == pytest.approx(row["gradient_gb_per_s"])  # of 1 GB/s


def test_what_cannot_run_is_left_out_with_its_reason(monkeypatch):
    methods = ["pallas", "recurrent", "fft_naive", "fft"]
    monkeypatch.setattr(bench, "memory_limit", lambda: 20_000)
    rows = {row["method"]: row for row in bench_ssm((1, 2048, 1, 2), methods, repeats=1)}
    assert "none for cpu" in rows["pallas"]["left_out"]
    assert "beyond L = 1024" in rows["recurrent"]["left_out"]
    assert "more than 0.0" in rows["fft_naive"]["left_out"] and "more than 0.0" in rows["fft"]["left_out"]
    assert {row["gradient_ms"] for row in rows.values()} == {None}
    monkeypatch.undo()
    rows = bench_ssm((1, 2048, 1, 2), methods, repeats=1)
    assert [bool(row["left_out"]) for row in rows] == [True, True, False, False]
    assert rows[2]["gradient_speedup"] == 1  # the first that ran


def test_costs_of_a_matrix_product():
    x = jax.numpy.ones((64, 128), jax.numpy.float32)
    _, costs = compile_program(lambda x: x @ x.T, x)
    assert costs.flops == 2 * 64 * 64 * 128
    assert costs.memory_bytes >= 4 * (64 * 128 + 64 * 64) and costs.bytes >= 4 * (64 * 128 + 64 * 64)


def test_ceilings_are_rates():
    assert copy_rate(2**16) > 1e6 and matmul_rate("float32", 32) > 1e6


def test_slopes_are_of_log_time_in_log_length():
    assert slope([2, 4, 8], [3 * 2**1.5, 3 * 4**1.5, 3 * 8**1.5]) == pytest.approx(1.5)
    assert slope([2, 2], [1, 3]) is None
    rows = [{"method": m, "B": 1, "L": L, "D": D, "N": 4, "gradient_ms": t} for m, L, D, t in (
        ("a", 2, 8, 1.0), ("a", 8, 8, 4.0), ("b", 2, 8, 1.0), ("b", 8, 8, None), ("c", 2, 8, 1.0), ("c", 4, 9, 2.0)
    )]  # fmt: skip
    assert bench.slopes(rows) == {"a": pytest.approx(1)}
    rows += [row | {"D": 9} for row in rows[:2]]
    assert bench.slopes(rows) == {"a 1x8x4": pytest.approx(1), "a 1x9x4": pytest.approx(1)}


def test_the_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra bench)")
    rows = [row for L in (8, 16) for row in bench_ssm((1, L, 4, 4), ["fft", "pallas"], repeats=1)]
    plot(rows, tmp_path / "ssm.png")
    assert (tmp_path / "ssm.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_a_table_and_writes_csv(bench_command, tmp_path):
    command = ["ssm", "--shapes=1x8x4x4,1x16x4x4", "--methods=fft,chunked", "--repeats=5"]
    out = bench_command(*command, f"--csv={tmp_path / 'ssm.csv'}", "--write_table=" + str(tmp_path / "table.csv"))
    assert "chunked" in out and "1x8x4x4" in out and "slope" in out
    for name in ("ssm.csv", "table.csv"):
        with open(tmp_path / name, newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["L"], row["method"]) for row in rows] == [(L, m) for L in ("8", "16") for m in ("fft", "chunked")]
        assert all(float(row["gradient_ms"]) > 0 for row in rows)


@pytest.mark.parametrize("flag", ["csv", "plot"])
def test_a_file_that_cannot_be_written_is_found_before_the_work(flag, bench_command, tmp_path, monkeypatch):
    monkeypatch.setitem(program._BENCHMARKS, "ssm", lambda: 1 / 0)
    with pytest.raises(OSError, match=f"{tmp_path} is a folder"):
        bench_command("ssm", f"--{flag}={tmp_path}")


@pytest.mark.parametrize("text", ["1x2x3", "1x2x3x0", "axbxcxd", ""])
def test_wrong_shapes_are_named(text):
    with pytest.raises(ValueError, match="B x L x D x N"):
        parse_shape(text)


def test_wrong_methods_are_named():
    with pytest.raises(ValueError, match="unknown method 'fftt'"):
        bench_ssm((1, 8, 4, 4), ["fftt"])
    assert set(METHODS) < set(bench.default_methods())
