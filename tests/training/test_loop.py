"""A run that is stopped goes on as if it had not been: the same rows and the same parameters, bit by bit."""

import contextlib
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from counting import BATCH_SIZE, Counting, Numbers, counting_experiment
from runs import DIGITS, QUIET, start, wait
from tiny import tiny_config
from tqdm import tqdm

from diffussm_jax import load_run
from diffussm_jax.data.loader import Loader
from diffussm_jax.experiment import build_experiment
from diffussm_jax.io import folder_lock
from diffussm_jax.parallel.mesh import batch_to_devices
from diffussm_jax.training import loop, telemetry
from diffussm_jax.training.checkpoint import Best, Checkpointer
from diffussm_jax.training.loop import train
from diffussm_jax.training.task import Hook

SPEED = ("images_per_second", "step_ms", "compute_ms", "data_wait", "peak_memory_gb", "mfu")


def rows(workdir, without=SPEED):
    with open(workdir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def config_with_partial_windows():
    """Neither a checkpoint nor a stop comes where a row was just written."""
    config = tiny_config()
    config.log_every, config.checkpoint_every, config.sample_every = 7, 3, 0
    return config


def final_state(workdir, task):
    with contextlib.closing(Checkpointer(workdir, is_read_only=True)) as checkpointer:
        return checkpointer.restore(12, task.abstract_state)


def assert_same_state(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def experiment():
    return build_experiment(config_with_partial_windows())


@pytest.fixture(scope="module")
def uninterrupted(experiment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert train(experiment, workdir) is None
    return workdir


@pytest.mark.parametrize(
    "signum,stop_at",
    [(signal.SIGINT, 5), pytest.param(signal.SIGTERM, 8, marks=pytest.mark.slow)],
    ids=["ctrl-c", "sigterm"],
)
def test_a_stopped_run_resumes_exactly(signum, stop_at, experiment, uninterrupted, tiny_run, tmp_path, monkeypatch):
    iterate = experiment.train_loader.iterate

    def batches_and_a_signal(first_step):
        for step, batch in enumerate(iterate(first_step), first_step):
            if step == stop_at + 1:  # two batches are on their way to the device before one is trained on
                os.kill(os.getpid(), signum)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(experiment.train_loader, "iterate", batches_and_a_signal)
        assert train(experiment, tmp_path) == signum
    assert (tmp_path / "checkpoints" / str(stop_at)).is_dir()
    assert train(experiment, tmp_path) is None
    assert rows(tmp_path) == rows(uninterrupted)
    assert [row["step"] for row in rows(tmp_path)] == ["6", "7", "12"]
    assert {"loss", "mse", "vlb", "grad_norm", "skipped_steps", "learning_rate", "param_norm", "ema_distance"} < {
        name for name, value in rows(tmp_path)[-1].items() if value
    }
    state = final_state(tmp_path, experiment.task)
    assert_same_state(state, final_state(uninterrupted, experiment.task))
    assert_same_state(
        state, final_state(tiny_run, experiment.task)
    )  # which wrote its rows and checkpoints at other steps


def test_a_run_leaves_what_the_readme_promises(tiny_run):
    assert [row["step"] for row in rows(tiny_run)] == ["3", "6", "9", "12"]
    assert json.loads((tiny_run / "config.json").read_text())["model"]["width"] == 16
    assert sorted(p.name for p in (tiny_run / "samples").iterdir()) == [
        f"step_{step:08d}_ddim3_scale1.5_seed0.png" for step in (6, 12)
    ]
    assert list(tiny_run.glob("events.out.tfevents.*"))
    assert float(rows(tiny_run)[-1]["mse"]) < float(rows(tiny_run)[0]["mse"])


def test_a_finished_run_does_nothing_more(tiny_run):
    before = (tiny_run / "metrics.csv").read_bytes()
    assert train(build_experiment(tiny_config()), tiny_run) is None
    assert (tiny_run / "metrics.csv").read_bytes() == before


def test_another_config_in_the_same_workdir_is_refused(tiny_run):
    config = tiny_config()
    config.model.width = 32
    with pytest.raises(ValueError, match=r"another config(.|\n)*config.model.width: was 16, is 32"):
        train(build_experiment(config), tiny_run)
    assert json.loads((tiny_run / "config.json").read_text())["model"]["width"] == 16


def test_damaged_data_end_a_run_after_a_save(tmp_path):
    class Damaged(Numbers):
        is_damaged = True

        def __len__(self):
            return 80

        def __getitem__(self, index):
            if self.is_damaged and index == 7:
                raise ValueError("record 7 of the shard s is damaged")
            return super().__getitem__(index)

    experiment = counting_experiment(checkpoint_every=100, num_steps=20)
    loader = Loader(Damaged(), BATCH_SIZE, seed=3)
    with pytest.raises(ValueError, match="record 7 of the shard s is damaged"):
        train(dataclasses.replace(experiment, train_loader=loader), tmp_path / "damaged")
    (saved,) = (int(p.name) for p in (tmp_path / "damaged" / "checkpoints").iterdir())
    Damaged.is_damaged = False
    loader = Loader(Damaged(), BATCH_SIZE, seed=3)
    for workdir in ("damaged", "whole"):
        assert train(dataclasses.replace(experiment, train_loader=loader, log_every=20), tmp_path / workdir) is None
    assert 0 < saved < 20 and rows(tmp_path / "damaged") == rows(tmp_path / "whole")


def test_only_a_checkpoint_holds_a_run(tmp_path, monkeypatch):
    """What a first try leaves, or a damaged config.json, does not stop the corrected command."""
    for content in ('{"cut": ', "", json.dumps({"another": "config"})):
        (tmp_path / "config.json").write_text(content)

        def refuse(saved, where):
            raise ValueError(f"{where}: another config")

        assert train(counting_experiment(num_steps=2, config={"a": 1}, check_config=refuse), tmp_path / "new") is None
        (tmp_path / "new" / "config.json").write_text(content)
        assert train(counting_experiment(num_steps=4, config={"a": 1}), tmp_path / "new") is None
        assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"a": 1}
        with pytest.raises(ValueError, match="new/checkpoints/4: another config"):
            train(counting_experiment(num_steps=4, config={"a": 2}, check_config=refuse), tmp_path / "new")
        shutil.rmtree(tmp_path / "new")


def test_held_out_loss_counts_each_row_once(tiny_run):
    """179 digits in batches of 8: the last batch has 3 that were not counted yet."""
    run = load_run(tiny_run)
    parts, task = run.parts, run.parts.task
    loader = parts.eval_loader
    assert len(parts.eval_records) == 179 and len(loader) == 23

    @jax.jit
    def losses(params, batch, index):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0x5EED), index)
        t_key, noise_key, encode_key, _ = jax.random.split(key, 4)
        x_0 = task.encode(batch, encode_key)
        drawn = task.objective.draw(t_key, noise_key, x_0)
        apply = lambda x_t, t: run.model.apply({"params": params}, x_t, t, batch["label"])  # noqa: E731
        return task.objective.losses(apply, drawn)["loss"]

    each = np.concatenate(
        [losses(run.params, batch_to_devices(parts.mesh, loader.batch(i)), i) for i in range(len(loader))]
    )
    expected = np.float64(each[:179]).mean()
    assert len(each) == 184 and abs(np.float64(each).mean() - expected) > 1e-5 * expected  # as it was counted before
    assert float(rows(tiny_run)[-1]["eval_loss"]) == pytest.approx(expected, rel=1e-6)


# Of the loop alone, with a task that knows no model.


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until `now[0]` is moved."""
    now = [0.0]
    monkeypatch.setattr(telemetry, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


class PowerError(Exception):
    """It fails."""


def slow_first_step(now, fails_at=None):
    """A second for each step, and 100 for the first of the process, as if it compiled."""
    made = []

    def before_step(step):
        if step == fails_at:
            raise PowerError
        now[0] += 1 if made else 100
        made.append(step)

    return before_step


def speeds(workdir):
    return {row["step"]: (row["step_ms"], row["images_per_second"]) for row in rows(workdir, without=())}


def test_the_first_row_leaves_out_the_step_that_compiles(now, tmp_path):
    assert train(counting_experiment(slow_first_step(now), log_every=4, checkpoint_every=3), tmp_path) is None
    one_a_second = ("1000.0", repr(float(BATCH_SIZE)))
    assert speeds(tmp_path) == {"4": one_a_second, "8": one_a_second, "12": one_a_second}
    # Alone in its window, it leaves nothing that could be timed.
    assert train(counting_experiment(slow_first_step(now), log_every=1, num_steps=2), tmp_path / "each") is None
    assert speeds(tmp_path / "each") == {"1": ("", ""), "2": one_a_second}


def test_the_first_row_after_a_resume_times_the_steps_since_then_and_averages_those_since_the_last_row(now, tmp_path):
    options = {"log_every": 7, "checkpoint_every": 3}
    assert train(counting_experiment(slow_first_step(now), **options), tmp_path / "whole") is None
    with pytest.raises(PowerError):
        train(counting_experiment(slow_first_step(now, fails_at=5), **options), tmp_path)
    assert not (tmp_path / "metrics.csv").exists()
    assert train(counting_experiment(slow_first_step(now), **options), tmp_path) is None  # from step 3
    assert speeds(tmp_path) == {s: ("1000.0", repr(float(BATCH_SIZE))) for s in ("7", "12")}
    assert rows(tmp_path) == rows(tmp_path / "whole")
    losses = [float(np.float32(x)) for x in batch_means(counting_experiment().train_loader, 12)]
    assert [float(row["loss"]) for row in rows(tmp_path)] == [np.mean(losses[:7]), np.mean(losses[7:])]
    assert [float(row["twice"]) for row in rows(tmp_path)] == [2 * np.mean(losses[:7]), 2 * np.mean(losses[7:])]


def batch_means(loader, num_steps):
    return jax.device_get([jax.numpy.asarray(loader.batch(i)["x"]).mean() for i in range(num_steps)])


def test_the_bar_says_that_it_compiles_and_leaves_that_step_out_of_the_rate(tmp_path, monkeypatch, capsys):
    bars = []

    def bar(*args, **kwargs):
        bars.append(tqdm(*args, **kwargs))
        return bars[-1]

    def before_step(step):
        assert step % 6 or ("compiling" in capsys.readouterr().err and bars[-1].initial == step)

    monkeypatch.setattr(loop, "tqdm", bar)
    assert train(counting_experiment(before_step, num_steps=6), tmp_path) is None
    assert train(counting_experiment(before_step, num_steps=12), tmp_path) is None
    assert [bar.initial for bar in bars] == [1, 7] and all("compiling" not in str(bar) for bar in bars)


def test_mfu_counts_the_meshs_devices(now, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)  # of which the mesh has one
    monkeypatch.setattr(telemetry, "peak_flops", lambda kind: 200e12)
    experiment = counting_experiment(slow_first_step(now), 10**11, log_every=6)
    assert train(experiment, tmp_path) is None
    found = float(rows(tmp_path, without=())[-1]["mfu"])
    assert found == pytest.approx(3 * 2 * 1e11 * BATCH_SIZE / 200e12)


def test_multiply_adds_are_counted_once_and_not_for_each_row(tmp_path):  # counting them traces the model
    counted = []

    class Counted(Counting):
        multiply_adds = property(lambda self: counted.append(self) or 1, lambda self, value: None)

    experiment = dataclasses.replace(counting_experiment(log_every=1), task=Counted())
    assert train(experiment, tmp_path) is None
    assert len(rows(tmp_path)) == 12 and len(counted) == 1


def test_fewer_steps_than_were_made_are_refused(tmp_path):
    assert train(counting_experiment(num_steps=6), tmp_path) is None
    with pytest.raises(ValueError, match=r"num_steps is 4, but .*checkpoints/6 is the checkpoint of step 6"):
        train(counting_experiment(num_steps=4), tmp_path)
    assert train(counting_experiment(num_steps=8), tmp_path) is None


def test_a_second_process_in_the_workdir_is_refused_and_harms_nothing(tmp_path):
    errors = []

    def start_another(step):
        if step in (0, 7):
            before = files(tmp_path)
            with pytest.raises(ValueError, match=f"{tmp_path} is in use by process {os.getpid()} on host ") as error:
                train(counting_experiment(config={"b": 2}), tmp_path)
            errors.append(error)
            assert files(tmp_path) == before

    options = {"log_every": 1, "checkpoint_every": 12, "config": {"a": 1}}
    assert train(counting_experiment(start_another, **options), tmp_path) is None
    assert len(errors) == 2 and not (tmp_path / "train.lock").exists()
    assert train(counting_experiment(**options), tmp_path / "alone") is None
    assert rows(tmp_path) == rows(tmp_path / "alone")
    assert_same_state(final_state(tmp_path, Counting()), final_state(tmp_path / "alone", Counting()))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_that_failed_or_is_read_leaves_its_workdir_free(tmp_path):
    def fail(step):
        if step == 3:
            raise PowerError

    with pytest.raises(PowerError):
        train(counting_experiment(fail, checkpoint_every=2), tmp_path)
    assert not (tmp_path / "train.lock").exists()

    def read(step):
        with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
            assert checkpointer.steps() == [2]

    assert train(counting_experiment(read, checkpoint_every=100, num_steps=4), tmp_path) is None


@pytest.mark.slow
def test_all_processes_of_a_run_end_if_its_workdir_is_in_use(tmp_path):
    with folder_lock(tmp_path / "run", "train"):
        processes = start(tmp_path, *DIGITS, *QUIET, num_processes=2)
        wait(tmp_path, processes, code=1)
    first, second = ((tmp_path / f"output_{i}").read_text() for i in range(2))
    assert f"error: {tmp_path / 'run'} is in use by process {os.getpid()} on host " in first
    assert "error: host 0 failed, see its error" in second


STOPS_IN_STEP_5 = """
import signal, sys
from counting import counting_experiment
from diffussm_jax.training.loop import train

def before_step(step):
    if step == 5:
        print("in step 5", flush=True)
        signal.pause()

train(counting_experiment(before_step, checkpoint_every=2), sys.argv[1])
"""


def test_a_run_goes_on_at_once_after_a_kill(tmp_path):
    command, environment = (
        [sys.executable, "-c", STOPS_IN_STEP_5, tmp_path],
        os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"in step 5\n"
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by process {process.pid} on host "):
            train(counting_experiment(), tmp_path)
        process.kill()
    assert (tmp_path / "train.lock").exists()
    resumed_at = []
    assert train(counting_experiment(resumed_at.append), tmp_path) is None
    assert resumed_at[0] in (2, 4)  # of step 4 the save may have been under way
    assert not (tmp_path / "train.lock").exists()


def test_hooks_run_at_their_intervals_and_at_the_end_before_the_checkpoint(tmp_path):
    calls = []

    def hook(name, every):
        def run(state, step):
            saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal())
            calls.append((name, step, int(state.step), step in saved))
            return {f"{name}_steps": step, "score": -abs(step - 8)}

        return lambda context: Hook(name, every, run, close=lambda: calls.append((name, "closed")))

    hooks = [hook("a", 4), hook("b", 5), hook("never", 0)]
    best = Best("score", "max")
    experiment = counting_experiment(hooks=hooks, checkpoint_every=4, keep_every=1, log_every=6, best=best)
    assert train(experiment, tmp_path) is None
    made = [call for call in calls if call[1] != "closed"]
    assert made == [(n, s, s, False) for n, s in (("a", 4), ("b", 5), ("a", 8), ("b", 10), ("a", 12), ("b", 12))]
    assert sorted(call[0] for call in calls if call[1] == "closed") == ["a", "b", "never"]
    assert [row["step"] for row in rows(tmp_path)] == ["4", "5", "6", "8", "10", "12"]
    assert {row["step"]: row["a_steps"] for row in rows(tmp_path) if row["a_steps"]} == {
        step: f"{step}.0" for step in ("4", "8", "12")
    }
    with contextlib.closing(Checkpointer(tmp_path, best=best, is_read_only=True)) as checkpointer:
        assert checkpointer.resolve("best") == 8


def test_a_task_without_averages_keeps_its_state(tmp_path):
    """The loop and its checkpoints read `step` and `skipped_in_a_row` of a state, and nothing else."""
    assert train(counting_experiment(num_steps=5), tmp_path) is None
    with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
        state = checkpointer.restore(5, Counting().abstract_state)
        averaged = checkpointer.restore_ema(5, {"total": Counting().abstract_state.total})
    losses = batch_means(counting_experiment().train_loader, 5)
    assert float(state.total) == float(averaged["total"]) == pytest.approx(sum(losses), rel=1e-6)
    assert int(state.step) == 5


def test_skipped_steps_are_counted_and_too_many_end_the_run(tmp_path):
    class Skipping(Counting):
        max_skipped_steps = 2

        def train_step(self, state, batch):
            is_skipped = int(state.step) == 1 or int(state.step) >= 5
            state, metrics = super().train_step(state, batch)
            skipped = state.skipped_in_a_row + 1 if is_skipped else jax.numpy.int32(0)
            loss = jax.numpy.float32(np.nan) if is_skipped else metrics["loss"]
            return state.replace(skipped_in_a_row=skipped), metrics | {"loss": loss, "skipped": float(is_skipped)}

    experiment = dataclasses.replace(counting_experiment(log_every=3, checkpoint_every=100), task=Skipping())
    with pytest.raises(FloatingPointError, match="from step 6 on, more than .*max_skipped_steps = 2 times in a row"):
        train(experiment, tmp_path)
    assert [(row["step"], row["skipped_steps"]) for row in rows(tmp_path)] == [("3", "1.0"), ("6", "1.0")]
    losses = batch_means(experiment.train_loader, 3)
    assert float(rows(tmp_path)[0]["loss"]) == np.mean(np.float64([losses[0], losses[2]]))
