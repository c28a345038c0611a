"""What a run says of its speed and of its parameters; the trace; Weights & Biases; a work directory in a bucket."""

import contextlib
import csv
import dataclasses
import functools
import sys
import tempfile
import types

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import Counting, counting_experiment
from etils import epath
from etils.epath.backend import fsspec_backend

from diffussm_jax.main import parse_steps
from diffussm_jax.training import hooks, telemetry
from diffussm_jax.training.loop import train
from diffussm_jax.training.metrics import MetricsLog
from diffussm_jax.training.step import norms


def test_rows_hold_speed_and_norms(tiny_run):
    with open(tiny_run / "metrics.csv", newline="") as file:
        row = {k: float(v) for k, v in list(csv.DictReader(file))[-1].items() if v}
    assert row["skipped_steps"] == 0 and 0 < row["ema_distance"] < row["param_norm"]
    assert 0 <= row["data_wait"] < 1 and 0 < row["compute_ms"] <= row["step_ms"]
    assert row["images_per_second"] == pytest.approx(8 / row["step_ms"] * 1e3, rel=1e-6)
    assert 0.1 < row["peak_memory_gb"] < 100
    assert "mfu" not in row  # a CPU's peak is not known


def test_mfu_is_as_it_is_defined(monkeypatch):
    monkeypatch.setattr(telemetry, "peak_flops", lambda kind: 200e12)
    # 3 passes, 2 operations a multiply-add, 100 images/s, devices of 200 TFLOP/s.
    for num_devices in (1, 4):
        expected = 3 * 2 * 1e11 * 100 / 200e12 / num_devices
        assert telemetry.mfu(100, 10**11, num_devices) == pytest.approx(expected)
    monkeypatch.setattr(telemetry, "peak_flops", lambda kind: None)
    assert telemetry.mfu(100, 10**11, 1) is None


def test_norms_are_euclidean_over_all_parameters_and_the_rate_is_that_of_the_last_step():
    params, ema = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}, {"a": jnp.array([3.0]), "b": jnp.array([[2.0]])}
    task = types.SimpleNamespace(state_metrics=lambda state: norms(state, ema))
    context = hooks.HookContext(workdir=None, log=None, task=task)
    hook = hooks.learning_rate(context, schedule=lambda step: step / 10, every=5)
    found = hook.run(params, step=3)
    assert found == {"learning_rate": 0.2, "param_norm": 5.0, "ema_distance": 2.0} and hook.every == 5


def test_the_grids_noise_is_the_same_every_time_and_no_training_steps():
    keys = []
    context = hooks.HookContext(None, types.SimpleNamespace(image=lambda *args: None), types.SimpleNamespace())
    context.task.eval_params = lambda state: None

    def draw(params, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return np.zeros((2, 4, 4, 1), np.uint8)

    with tempfile.TemporaryDirectory() as folder:
        context = context._replace(workdir=epath.Path(folder))
        options = {"num_columns": 2, "labels": None, "name": "ddim3"}
        hook = hooks.sample_grid(context, draw=draw, seed=3, every=5, **options)
        assert hook.run(None, 5) == hook.run(None, 10) == {}
        assert sorted(p.name for p in (context.workdir / "samples").iterdir()) == [
            "step_00000005_ddim3.png",
            "step_00000010_ddim3.png",
        ]
    assert keys[0] == keys[1]
    seed = jax.random.key(3)
    of_steps = jax.vmap(lambda step: jax.random.key_data(jax.random.fold_in(seed, step)))(jnp.arange(400_000))
    assert tuple(jax.random.key_data(seed).tolist()) != keys[0]
    assert not (np.asarray(of_steps) == np.uint32(keys[0])).all(1).any()


def test_the_clock_leaves_out_what_is_paused_and_the_step_that_compiles(monkeypatch):
    now, state = [0.0], jnp.int32(0)
    monkeypatch.setattr(telemetry, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(items, seconds):
        for item in items:
            now[0] += seconds
            yield item

    clock = telemetry.Clock()
    batches = clock.waiting_for(slow(range(9), 0.25))
    next(batches)
    now[0] += 100
    clock.step_made(state)
    assert clock.lap() == (0, 0, 0)
    for _ in range(2):
        assert next(batches)
        now[0] += 1
        clock.step_made(state)
    with clock.paused(state):
        now[0] += 50
    now[0] += 0.5
    assert clock.lap() == (3.0, 0.5, 2)
    assert clock.lap() == (0, 0, 0)


def test_speed_is_of_the_lap_and_without_a_timed_step_not_told(monkeypatch):
    monkeypatch.setattr(telemetry, "peak_flops", lambda kind: None)
    options = {"batch_size": 8, "multiply_adds": 1, "num_devices": 1}
    speed = telemetry.speed_metrics(telemetry.Lap(4.0, 1.0, 2), **options)
    assert 0.1 < speed.pop("peak_memory_gb") < 100
    assert speed == {"images_per_second": 4.0, "step_ms": 2000.0, "compute_ms": 1500.0, "data_wait": 0.25}
    assert telemetry.speed_metrics(telemetry.Lap(0.0, 0.0, 0), **options).keys() == {"peak_memory_gb"}


def test_a_trace_of_some_steps_is_written(tmp_path):
    class Compiled(Counting):
        @functools.cached_property
        def train_step(self):
            def train_step(state, batch):
                loss = batch["x"].mean()
                return state.replace(step=state.step + 1), {"loss": loss, "skipped": jnp.float32(0)}

            return jax.jit(train_step)

    experiment = dataclasses.replace(counting_experiment(num_steps=5), task=Compiled())
    assert train(experiment, tmp_path, profile_steps=(2, 4)) is None
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"train_step" in trace.read_bytes()


@pytest.mark.parametrize("text", ["100", "5:5", "9:3", "a:b", "-1:3", ":"])
def test_wrong_profile_steps_are_named(text):
    assert parse_steps("100:105") == (100, 105) and parse_steps(None) is None
    with pytest.raises(ValueError, match=f"must be FIRST:LAST, such as 100:105, got '{text}'"):
        parse_steps(text)


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_what_the_csv_gets(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resumed_step in (0, 10):
        with contextlib.closing(MetricsLog(tmp_path / "a", resumed_step, "project", {"seed": 3})) as log:
            log.write(resumed_step + 10, {"loss": np.float32(0.5)})
    first, second = fake.inits
    assert first == second  # the resumed run goes on under the same id
    assert first["project"] == "project" and first["config"] == {"seed": 3} and first["resume"] == "allow"
    assert fake.logged == [(10, {"loss": 0.5}), (20, {"loss": 0.5})] and fake.finished == 2
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"needs Weights & Biases: pip install -e '\.\[wandb\]'"):
        MetricsLog(tmp_path / "b", 0, "project")


def test_metrics_go_into_a_bucket(monkeypatch):
    in_memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(fsspec_backend), "_get_filesystem", lambda self, name: in_memory)
    bucket = epath.Path("gs://bucket/run")
    with contextlib.closing(MetricsLog(bucket, 0)) as log:
        log.write(10, {"loss": 1.0})
        log.image(10, "samples", np.zeros((4, 4, 1), np.uint8))
    with contextlib.closing(MetricsLog(bucket, 10)) as log:
        log.write(20, {"loss": 2.0})
    assert [r["loss"] for r in csv.DictReader((bucket / "metrics.csv").read_text().splitlines())] == ["1.0", "2.0"]
    events = [p for p in bucket.iterdir() if "tfevents" in p.name]
    assert len(events) == 2 and any(b"samples" in p.read_bytes() for p in events)
