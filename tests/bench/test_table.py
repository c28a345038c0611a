"""The table of measured times: rows of this platform and dtype are replaced, others kept."""

import csv

import pytest

from diffussm_jax.bench import write_table
from diffussm_jax.bench.table import COLUMNS, table_methods, table_shapes


def row(method, *, platform="cpu", dtype="float32", L=256, gradient_ms=1.0, left_out=""):
    values = {"platform": platform, "device": "a chip", "dtype": dtype, "B": 1, "L": L, "D": 384, "N": 64}
    return values | {"method": method, "gradient_ms": gradient_ms, "left_out": left_out, "forward_ms": 7.0}


def read(path):
    with open(path, newline="") as file:
        assert file.readline().strip() == ",".join(COLUMNS)
        file.seek(0)
        return [(r["platform"], r["dtype"], r["L"], r["method"], float(r["gradient_ms"])) for r in csv.DictReader(file)]


def test_rows_are_replaced_and_kept(tmp_path):
    path = tmp_path / "table.csv"
    assert write_table([row("fft"), row("chunked", L=1024)], path) == 2
    write_table([row("fft", platform="gpu")], path)
    write_table([row("fft", dtype="bfloat16")], path)
    write_table([row("chunked", gradient_ms=2.5)], path)
    assert sorted(read(path)) == sorted(
        [
            ("cpu", "float32", "256", "chunked", 2.5),
            ("gpu", "float32", "256", "fft", 1.0),
            ("cpu", "bfloat16", "256", "fft", 1.0),
        ]
    )


def test_only_what_can_be_chosen_is_written(tmp_path):
    path = tmp_path / "table.csv"
    yardsticks = [row("fft_naive"), row("torch_naive"), row("auto"), row("pallas", gradient_ms=None, left_out="why")]
    assert write_table([*yardsticks, row("fft")], path) == 1
    assert read(path) == [("cpu", "float32", "256", "fft", 1.0)]
    with pytest.raises(ValueError, match="nothing to write"):
        write_table(yardsticks, path)


def test_another_file_is_not_overwritten(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns"):
        write_table([row("fft")], tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def test_the_grid():
    shapes = table_shapes()
    assert {L for _, L, _, _ in shapes} == {256, 1024, 4096, 16_384, 65_536}
    assert {D for _, _, D, _ in shapes} == {384, 1152}
    assert all(4096 <= B * L <= 65_536 for B, L, _, _ in shapes)
    assert "fft" in table_methods() and not {"auto", "recurrent"} & set(table_methods())
