"""The table of measured times: rows of the same problem are replaced, others kept."""

import pytest

from diffussm_jax.bench import table, write_table
from diffussm_jax.bench.ssm import own_methods
from diffussm_jax.bench.table import print_table, table_shapes
from diffussm_jax.ssm.auto import read_table


def row(method, *, platform="cpu", dtype="float32", L=256, gradient_ms=1.0, left_out=""):
    values = {"platform": platform, "device": "a chip", "dtype": dtype, "B": 1, "L": L, "D": 384, "N": 64}
    return values | {"method": method, "gradient_ms": gradient_ms, "left_out": left_out, "forward_ms": 7.0}


def read(path):
    return [(row.platform, row.dtype, row.L, row.method, row.gradient_ms) for row in read_table(path)]


def test_rows_are_replaced_and_kept(tmp_path):
    path = tmp_path / "table.csv"
    assert write_table([row("fft"), row("chunked", L=1024)], path) == 2
    write_table([row("fft", platform="gpu")], path)
    write_table([row("fft", dtype="bfloat16")], path)
    write_table([row("chunked", gradient_ms=2.5)], path)
    assert sorted(read(path)) == sorted(
        [
            ("cpu", "float32", 256, "chunked", 2.5),
            ("cpu", "float32", 1024, "chunked", 1.0),
            ("gpu", "float32", 256, "fft", 1.0),
            ("cpu", "bfloat16", 256, "fft", 1.0),
        ]
    )


def test_only_what_can_be_chosen_is_written(tmp_path):
    path = tmp_path / "table.csv"
    yardsticks = [row("fft_naive"), row("torch_naive"), row("auto"), row("pallas", gradient_ms=None, left_out="why")]
    assert write_table([*yardsticks, row("fft")], path) == 1
    assert read(path) == [("cpu", "float32", 256, "fft", 1.0)]
    assert write_table(yardsticks, path) == 0
    assert read(path) == [("cpu", "float32", 256, "fft", 1.0)]


def test_another_file_is_not_overwritten(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns platform,.*, got a,b"):
        write_table([row("fft")], tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


OPTIONS = {"dtype": "float32", "repeats": 1}


def test_a_run_that_stops_keeps_what_it_measured(tmp_path, monkeypatch):
    """And methods that are ten times as slow as the fastest are not tried again."""
    asked = []

    def measure(shape, methods, **_):
        asked.append(methods)
        if len(asked) == 3:
            raise KeyboardInterrupt
        times = {"fft": 1.0, "chunked": 9.0, "associative": 11.0}
        return [row(name, L=shape[1], gradient_ms=times[name]) for name in methods]

    monkeypatch.setattr(table, "print_shape", measure)
    shapes = [(1, L, 384, 64) for L in (64, 128, 256)]
    with pytest.raises(KeyboardInterrupt):
        print_table(tmp_path / "table.csv", shapes, ["fft", "chunked", "associative"], **OPTIONS)
    assert asked == [["fft", "chunked", "associative"], ["fft", "chunked"], ["fft", "chunked"]]
    assert [(L, method) for _, _, L, method, _ in read(tmp_path / "table.csv")] == [
        (64, "fft"),
        (64, "chunked"),
        (64, "associative"),
        (128, "fft"),
        (128, "chunked"),
    ]


def test_nothing_is_measured_for_another_file(tmp_path, monkeypatch):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr(table, "print_head", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ValueError, match="must have the columns"):
        print_table(tmp_path / "other.csv", [(1, 64, 2, 16)], ["fft"], **OPTIONS)


def test_a_table_of_yardsticks_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "print_shape", lambda *_, **__: [row("fft_naive")])
    with pytest.raises(ValueError, match="nothing to write"):
        print_table(tmp_path / "table.csv", [(1, 64, 2, 16)], ["fft_naive"], **OPTIONS)


def test_the_grid():
    shapes = table_shapes()
    assert {L for _, L, _, _ in shapes} == {256, 1024, 4096, 16_384, 65_536}
    assert {D for _, _, D, _ in shapes} == {96, 384, 1152}
    assert all(4096 <= B * L <= 65_536 for B, L, _, _ in shapes)
    assert "fft" in own_methods() and not {"auto", "recurrent"} & set(own_methods())
