"""metrics.csv holds each step once, to the last bit, also after a resume."""

import contextlib
import csv

import numpy as np
import pytest

from diffussm_jax.training.metrics import MetricsLog


def read(workdir):
    with open(workdir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_kept_to_the_last_bit_and_late_columns_are_added(tmp_path):
    value = float(np.float32(0.1) / np.float32(3))
    with contextlib.closing(MetricsLog(tmp_path, 0)) as log:
        log.write(10, {"loss": value})
        log.write(20, {"loss": 2.0})
        log.write(20, {"eval_loss": 3.0})
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == ["10", "20"]
    assert float(rows[0]["loss"]) == value and rows[0]["eval_loss"] == "" and rows[1]["eval_loss"] == "3.0"


def test_a_resume_drops_the_steps_that_will_be_made_again(tmp_path):
    with contextlib.closing(MetricsLog(tmp_path, 0)) as log:
        for step in (10, 20, 30):
            log.write(step, {"loss": float(step)})
    with contextlib.closing(MetricsLog(tmp_path, 20)) as log:
        log.write(30, {"loss": 31.0})
    assert [(row["step"], row["loss"]) for row in read(tmp_path)] == [("10", "10.0"), ("20", "20.0"), ("30", "31.0")]
    assert not (tmp_path / "metrics.csv.partial").exists()


GOOD = b"step,loss\n10,1.0\n20,2.0\n"


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"", []),
        (GOOD.removeprefix(b"step,loss\n"), []),
        (GOOD + b"\xff\xfe\x00,\x00\n", ["10", "20"]),
        (GOOD + b"\n \n", ["10", "20"]),
        (GOOD + b"25,1.0,7\n", ["10", "20"]),
        (GOOD.replace(b"20", b"2O"), ["10"]),
        (GOOD + b'28,"' + b"x" * 200_000 + b'"\n', ["10", "20"]),
    ],
    ids=["empty", "no_header", "binary", "blank", "too_many", "no_number", "long"],
)
def test_a_damaged_file_is_set_aside_and_stops_no_resume(content, kept, tmp_path, capsys):
    (tmp_path / "metrics.csv").write_bytes(content)
    with contextlib.closing(MetricsLog(tmp_path, 29)) as log:
        log.write(30, {"loss": 3.0})
    assert [row["step"] for row in read(tmp_path)] == [*kept, "30"]
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == content
    assert f"{tmp_path}/metrics.csv is damaged" in capsys.readouterr().out


def test_tensorboard_files_are_written(tmp_path):
    with contextlib.closing(MetricsLog(tmp_path, 0)) as log:
        log.write(1, {"loss": 1.0})
        log.image(1, "samples", np.zeros((4, 4, 1), np.uint8))
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"samples" in events.read_bytes()
