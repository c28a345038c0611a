"""metrics.csv holds each step once, to the last bit, also after a resume."""

import contextlib
import csv

import numpy as np

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


def test_tensorboard_files_are_written(tmp_path):
    with contextlib.closing(MetricsLog(tmp_path, 0)) as log:
        log.write(1, {"loss": 1.0})
        log.image(1, "samples", np.zeros((4, 4, 1), np.uint8))
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"samples" in events.read_bytes()
