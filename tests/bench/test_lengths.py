"""Backbones against the number of positions: crossings of made-up lines, and tiny models."""

import csv
import json

import pytest

from diffussm_jax.bench import bench_lengths, crossings, length_config, lengths
from diffussm_jax.bench.block import measured_part
from diffussm_jax.bench.crossings import never_crossing

TINY = "+width=8+depth=2"
MODELS = (f"diffussm:S{TINY}", f"dit:S/2{TINY}+num_heads=2")


def rows(**lines):
    """a={256: 1.0} to rows."""
    return [{"name": name, "length": L, "ms": ms} for name, line in lines.items() for L, ms in line.items()]


def test_power_laws_cross_where_they_are_equal():
    """a = 100 L and b = L^2 / 10 cross at 1000, whatever lengths are measured; c = 3 L crosses b at 30, never a."""
    measured = (16, 256, 4096)
    found = crossings(
        rows(a={L: 100 * L for L in measured}, b={L: L**2 / 10 for L in measured}, c={L: 3 * L for L in measured})
    )
    assert [(c.below, c.above) for c in found] == [("b", "a"), ("b", "c")]
    assert [c.length for c in found] == pytest.approx([1000, 30])
    assert [c.value for c in found] == pytest.approx([100_000, 90])
    assert never_crossing(rows(a={1: 2.0, 4: 8.0}, c={1: 1.0, 4: 4.0})) == [("c", "a")]


def test_lines_that_cross_twice_meet_or_miss():
    a = {1: 1.0, 10: 1.0, 100: 1.0}
    there, back = crossings(rows(a=a, b={1: 10.0, 10: 0.1, 100: 10.0}))
    assert (there.above, back.above) == ("b", "a")
    assert (there.length, back.length) == pytest.approx((10**0.5, 10**1.5))
    (touch,) = crossings(rows(a=a, b={1: 2.0, 10: 1.0, 100: 0.5}))  # equal at a measured length
    assert (touch.length, touch.above) == (pytest.approx(10), "b")
    assert not crossings(rows(a=a, b={2: 0.5, 20: 5.0}))  # no length of both
    assert not never_crossing(rows(a=a, b={2: 0.5}))
    only_shared = crossings(rows(a={1: 1.0, 4: 1.0, 16: 1.0}, b={1: 4.0, 16: 0.25}))  # 4 was left out of b
    assert [c.length for c in only_shared] == pytest.approx([4])


def test_models_by_name_and_length():
    name, config = length_config("diffussm:S+mixer.method=fft", 1024, batch_size=2, changes={"seed": 3})
    assert name == "DiffuSSM-S+mixer.method=fft"
    assert (config.data.image_size, config.batch_size, config.seed, config.model.dtype) == (256, 2, 3, "float32")
    assert config.model.mixer.method == "fft"
    name, config = length_config("dit:S/2", 1024)
    part = measured_part(config)
    assert (name, part.turns, part.inputs[0].shape) == ("DiT-S/2", 12, (1, 256, 384))
    for text, length, problem in (
        ("dit:S/2", 1000, "square latent, such as 256 or 1024; got 1000"),
        ("dit", 256, "are MODEL:SIZE, such as diffussm:S, dit:S/1, dit:S/2; got 'dit'"),
        ("dit:S/3", 256, "unknown model size 'S/3'"),
        ("tid:S", 256, "'tid'"),
        ("dit:S/2+mixer.method=fft", 256, "model.mixer.method"),
    ):
        with pytest.raises(ValueError, match=problem):
            length_config(text, length)


@pytest.mark.slow
def test_times_are_of_all_blocks_and_one_image(monkeypatch):
    """With a second for each program; and what does not fit in memory is left out."""
    monkeypatch.setattr(lengths, "median_seconds", lambda programs, repeats: dict.fromkeys(programs, 1.0))
    configs = dict(length_config(text, 64) for text in MODELS)
    needed = []
    with monkeypatch.context() as patch:
        patch.setattr(lengths, "check_fits", lambda what, size, limit: needed.append(size))
        found, left_out = bench_lengths(configs)
    assert [row["name"] for row in found] == list(configs) and not left_out
    assert [(row["forward_ms"], row["ms"]) for row in found] == [(2000, 2000)] * 2  # two blocks
    assert [row["memory_mb"] for row in found] == [size / 1e6 for size in needed[1::2]]
    monkeypatch.setattr(lengths, "memory_limit", lambda: max(needed) - 1)
    found, left_out = bench_lengths(configs)
    assert len(found) == len(left_out) == 1
    assert "does not fit: the block needs" in left_out[list(configs)[needed.index(max(needed)) // 2]]
    halved = length_config(MODELS[1], 64, batch_size=2)[1]
    assert bench_lengths({"two": halved})[0][0]["ms"] == 1000


@pytest.mark.slow
def test_the_command_writes_rows_and_crossings(bench_command, tmp_path):
    command = ["lengths", f"--models={','.join(MODELS)}", "--lengths=64,16", "--repeats=1"]
    out = bench_command(*command, f"--json={tmp_path / 'lengths.json'}", f"--csv={tmp_path / 'lengths.csv'}")
    names = [f"DiffuSSM-S{TINY}", f"DiT-S/2{TINY}+num_heads=2"]
    assert all(name in out for name in names) and "cheaper than" in out
    values = json.loads((tmp_path / "lengths.json").read_text())
    assert "cpu" in values["machine"] and "jax" in values["versions"] and values["options"]["batch_size"] == 1
    of_rows = [(row["name"], row["length"], row["tokens"]) for row in values["rows"]]
    assert of_rows == [(names[0], 16, 8), (names[1], 16, 4), (names[0], 64, 32), (names[1], 64, 16)]
    assert all(row["ms"] > 0 and row["forward_ms"] > 0 and row["memory_mb"] > 0 for row in values["rows"])
    assert values["crossings"] == [crossing._asdict() for crossing in crossings(values["rows"])]
    with open(tmp_path / "lengths.csv", newline="") as file:
        assert [row["length"] for row in csv.DictReader(file)] == ["16", "16", "64", "64"]
    with pytest.raises(ValueError, match="numbers of positions, such as 256,1024; got 256,a"):
        bench_command("lengths", "--lengths=256,a")
