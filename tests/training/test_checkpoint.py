"""Checkpoints give back what was saved, keep the newest and the best, and name what does not fit."""

import contextlib

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath.backend import fsspec_backend

from diffussm_jax.training.checkpoint import CHECKSUMS, Best, Checkpointer, Store
from diffussm_jax.training.ema import EMA
from diffussm_jax.training.optimizer import adamw
from diffussm_jax.training.step import create_state


def state_of(params):
    return create_state(params, adamw(lambda s: 1.0), EMA(decay=0.5))


def state_at(step):
    return state_of({"w": {"kernel": jnp.full(3, float(step))}}).replace(step=jnp.int32(step))


def save(checkpointer, state, **options):
    checkpointer.save(state, state.ema_params, **options)


@pytest.fixture
def checkpointer(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path)) as c:
        yield c


def test_restores_every_bit(checkpointer):
    assert checkpointer.latest_valid_step() is None
    state = state_at(7).replace(ema_params={"w": {"kernel": jnp.float32([0.1, np.pi, 1e-30])}})
    save(checkpointer, state)
    restored = checkpointer.restore(7, state_at(0))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(state) == jax.tree.structure(restored)


def test_keeps_the_newest_two_and_the_best(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0, None], start=1):
            save(checkpointer, state_at(step), metrics={} if loss is None else {"eval_loss": loss})
    with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
        assert checkpointer.resolve("best") == 2
        assert checkpointer.resolve("latest") == 6
        assert checkpointer.resolve("5") == 5
        with pytest.raises(ValueError, match=r"no checkpoint '4' .*choose latest, best or one of \[2, 5, 6\]"):
            checkpointer.resolve("4")
        np.testing.assert_array_equal(checkpointer.restore_ema(2, state_at(0).params)["w"]["kernel"], 2.0)


SCORES = [{"loss": 9.0}, {"accuracy": 0.5}, None, {"accuracy": 0.9}, {"accuracy": float("nan")}, {"loss": 1.0}, {}]


@pytest.mark.parametrize("mode,best,kept", [("max", 4, [4, 6, 7]), ("min", 2, [2, 6, 7])])
def test_a_checkpoint_without_the_metric_counts_as_worst(mode, best, kept, tmp_path):
    options = {"best": Best("accuracy", mode)}
    with contextlib.closing(Checkpointer(tmp_path, **options)) as checkpointer:
        for step, metrics in enumerate(SCORES, start=1):
            save(checkpointer, state_at(step), metrics=metrics)
    with contextlib.closing(Checkpointer(tmp_path, is_read_only=True, **options)) as checkpointer:
        assert checkpointer.resolve("best") == best
        assert checkpointer.steps() == kept


def test_without_any_metric_the_best_is_the_latest(tmp_path, caplog):
    with contextlib.closing(Checkpointer(tmp_path, keep_every=1)) as checkpointer:
        for step, metrics in enumerate([None, {"other": 1.0}, {"other": 2.0}, {"other": 0.5}], start=1):
            save(checkpointer, state_at(step), metrics=metrics)
    with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
        assert checkpointer.resolve("best") == 4


def test_what_is_worst_is_minus_infinity():
    assert Best("a", "min").score({"a": 2.0}) == -2 and Best("a", "max").score({"a": 2.0}) == 2
    for metrics in (None, {}, {"b": 1.0}, {"a": float("nan")}, {"a": float("inf")}):
        assert Best("a", "min").score(metrics) == Best("a", "max").score(metrics) == -np.inf


def test_the_checkpoint_of_another_model_is_refused_with_both_lists(checkpointer):
    save(checkpointer, state_at(1))
    other = {"w": {"kernel": jnp.zeros(4)}, "v": {"bias": jnp.zeros(1)}}
    with pytest.raises(
        ValueError, match=r"ema of .*/1 (.|\n)*missing: \['v/bias \(1,\)'\](.|\n)*w/kernel: \(3,\), not \(4,\)"
    ):
        checkpointer.restore_ema(1, other)
    with pytest.raises(ValueError, match=r"unexpected: \['w/kernel \(3,\)'\]"):
        checkpointer.restore(1, state_of({"v": {"bias": jnp.zeros(1)}}))


def flip_a_byte(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


def save_three(workdir):
    with contextlib.closing(Checkpointer(workdir, config={"seed": 3}, keep_every=1)) as checkpointer:
        for step in (1, 2, 3):
            save(checkpointer, state_at(step), window={"sums": {"loss": step / 3}})


def files_of(workdir, step):
    """Without what Orbax adds after everything else."""
    folder = workdir / "checkpoints" / str(step)
    added = {folder / "_CHECKPOINT_METADATA", folder / "commit_success.txt"}
    return sorted(p for p in folder.rglob("*") if p.is_file() and p not in added)


def largest_file(workdir, step, item=""):
    files = [f for f in files_of(workdir, step) if item in str(f) and f.name != CHECKSUMS]
    return max(files, key=lambda p: p.stat().st_size)


def test_every_file_is_under_checksums_and_any_flipped_byte_is_found(tmp_path):
    save_three(tmp_path)
    store = Checkpointer(tmp_path, is_read_only=True)._store
    assert store.find_corruption(3) == []
    files = files_of(tmp_path, 3)
    assert any("ocdbt" in str(f) for f in files) and any(f.name == "checksums.json" for f in files)
    for file in files:
        if not file.stat().st_size:
            continue
        for position in (0, file.stat().st_size // 2):
            flip_a_byte(file, position)
            wrong = store.find_corruption(3)
            flip_a_byte(file, position)
            name = str(file.relative_to(tmp_path / "checkpoints" / "3"))
            assert wrong and (name in wrong[0] or file.name == "checksums.json"), file
    files[-1].unlink()
    assert store.find_corruption(3) == [f"{files[-1].relative_to(tmp_path / 'checkpoints' / '3')} is missing"]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, capsys):
    save_three(tmp_path)
    largest = largest_file(tmp_path, 3)
    flip_a_byte(largest)
    damaged = largest.read_bytes()
    with contextlib.closing(Checkpointer(tmp_path, config={"seed": 4})) as checkpointer:
        assert checkpointer.latest_valid_step() == 2
        np.testing.assert_array_equal(checkpointer.restore(2, state_at(0)).params["w"]["kernel"], 2.0)
        said = capsys.readouterr().out
        assert "checkpoint of step 3 is damaged" in said and largest.name in said
        save(checkpointer, state_at(3))  # the same step, made again
    aside = tmp_path / "checkpoints_damaged" / "3"
    assert (aside / largest.relative_to(tmp_path / "checkpoints" / "3")).read_bytes() == damaged
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        assert checkpointer.latest_valid_step() == 3
        assert checkpointer.about(3)["config"] == {"seed": 4}
        assert checkpointer.about(3)["versions"]["jax"] == jax.__version__
        assert checkpointer.about(2)["window"] == {"sums": {"loss": 2 / 3}} and checkpointer.about(3)["window"] == {}
    flip_a_byte(largest_file(tmp_path, 3))
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        assert checkpointer.latest_valid_step() == 2
    assert (tmp_path / "checkpoints_damaged" / "3.1").is_dir()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b'{"eval_loss": 0.', b"[1]", b'{"eval_loss": "low"}'])
def test_damaged_metrics_of_one_checkpoint_stop_neither_sampling_nor_resuming(content, tmp_path, capsys):
    with contextlib.closing(Checkpointer(tmp_path, keep_every=1)) as checkpointer:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
            save(checkpointer, state_at(step), metrics={"eval_loss": loss})
    (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_bytes(content)
    with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
        assert [checkpointer.resolve(which) for which in ("latest", "best", "1")] == [3, 1, 1]
        np.testing.assert_array_equal(checkpointer.restore_ema(2, state_at(0).params)["w"]["kernel"], 2.0)
    with contextlib.closing(Checkpointer(tmp_path, keep_every=1)) as checkpointer:
        assert checkpointer.steps() == [1, 3] and checkpointer.latest_valid_step() == 3
        save(checkpointer, state_at(4), metrics={"eval_loss": 0.5})
    assert (tmp_path / "checkpoints_damaged" / "2" / "ema").is_dir()
    assert "checkpoint of step 2 was moved to" in capsys.readouterr().out


def test_in_a_bucket_damage_is_found_and_set_aside_file_by_file(tmp_path, monkeypatch):
    """gs:// with a file system in memory in place of Google's; Orbax, which would go past that, takes no part."""
    in_memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(fsspec_backend), "_get_filesystem", lambda self, name: in_memory)
    save_three(tmp_path)
    bucket = epath.Path("gs://bucket/checkpoint_test/checkpoints")
    for file in files_of(tmp_path, 3):
        (bucket / file.relative_to(tmp_path / "checkpoints").as_posix()).write_bytes(file.read_bytes())
    store = Store.__new__(Store)
    store.directory = bucket
    assert store.find_corruption(3) == []
    largest = largest_file(tmp_path, 3)
    name = largest.relative_to(tmp_path / "checkpoints" / "3").as_posix()
    (bucket / "3" / name).write_bytes(b"?" + largest.read_bytes()[1:])
    assert len(store.find_corruption(3)) == 1 and name in store.find_corruption(3)[0]
    aside = store.quarantine(3)
    assert (aside / name).read_bytes()[:1] == b"?" and not (bucket / "3").exists()
    assert aside == epath.Path("gs://bucket/checkpoint_test/checkpoints_damaged/3")


def test_sampling_passes_over_a_damaged_checkpoint_and_moves_nothing(tmp_path, capsys):
    save_three(tmp_path)
    flip_a_byte(largest_file(tmp_path, 3, "/ema/"))
    with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
        assert checkpointer.resolve("latest") == 2
        assert "3 is damaged" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"3 is damaged: ema/.*SHA-256 is"):
            checkpointer.resolve("3")
    assert (tmp_path / "checkpoints" / "3").is_dir()


def test_a_save_that_ended_before_its_checksums_does_not_count(tmp_path, monkeypatch):
    save_three(tmp_path)
    monkeypatch.setattr("diffussm_jax.training.checkpoint.file_sha256", lambda path: 1 / 0)
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, state_at(4))
    with pytest.raises(ZeroDivisionError):
        checkpointer.close()
    monkeypatch.undo()
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        assert checkpointer.latest_valid_step() == 3
        save(checkpointer, state_at(4))
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        assert checkpointer.latest_valid_step() == 4


def test_multiples_are_kept_for_good(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path, keep_every=4)) as checkpointer:
        for step in range(1, 12):
            save(checkpointer, state_at(step))
    with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
        assert checkpointer.steps() == [4, 8, 10, 11]


def test_a_missing_folder_is_named(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*checkpoints"):
            checkpointer.resolve("latest")
