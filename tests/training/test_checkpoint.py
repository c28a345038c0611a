"""Checkpoints give back what was saved, keep the newest and the best, and name what does not fit."""

import contextlib

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath.backend import fsspec_backend

from diffussm_jax.training.checkpoint import Checkpointer, Store, check_same_tree
from diffussm_jax.training.optimizer import adamw
from diffussm_jax.training.state import create_state


def state_at(step):
    state = create_state({"w": {"kernel": jnp.full(3, float(step))}}, adamw(lambda s: 1.0))
    return state.replace(step=jnp.int32(step))


@pytest.fixture
def checkpointer(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path)) as c:
        yield c


def test_restores_every_bit(checkpointer):
    assert checkpointer.latest_valid_step() is None
    state = state_at(7).replace(ema_params={"w": {"kernel": jnp.float32([0.1, np.pi, 1e-30])}})
    checkpointer.save(state)
    restored = checkpointer.restore(7, state_at(0))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(state) == jax.tree.structure(restored)


def test_keeps_the_newest_two_and_the_best(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0, None], start=1):
            checkpointer.save(state_at(step), loss)
    with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
        assert checkpointer.resolve("best") == 2
        assert checkpointer.resolve("latest") == 6
        assert checkpointer.resolve("5") == 5
        with pytest.raises(ValueError, match=r"no checkpoint '4' .*choose latest, best or one of \[2, 5, 6\]"):
            checkpointer.resolve("4")
        np.testing.assert_array_equal(checkpointer.restore_ema(2, state_at(0).params)["w"]["kernel"], 2.0)


def test_the_checkpoint_of_another_model_is_refused_with_both_lists(checkpointer):
    checkpointer.save(state_at(1))
    other = {"w": {"kernel": jnp.zeros(4)}, "v": {"bias": jnp.zeros(1)}}
    with pytest.raises(ValueError, match=r"missing there: \['v/bias'\](.|\n)*w/kernel: \(3,\), not \(4,\)"):
        checkpointer.restore_ema(1, other)
    with pytest.raises(ValueError, match=r"unknown here: \['w/kernel'\]"):
        checkpointer.restore(1, create_state({"v": {"bias": jnp.zeros(1)}}, adamw(lambda s: 1.0)))


def flip_a_byte(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


def save_three(workdir):
    with contextlib.closing(Checkpointer(workdir, config={"seed": 3}, keep_every=1)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(state_at(step))


def files_of(workdir, step):
    """Without what Orbax adds after everything else."""
    folder = workdir / "checkpoints" / str(step)
    added = {folder / "_CHECKPOINT_METADATA", folder / "commit_success.txt"}
    return sorted(p for p in folder.rglob("*") if p.is_file() and p not in added)


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
    largest = max(files_of(tmp_path, 3), key=lambda p: p.stat().st_size)
    flip_a_byte(largest)
    damaged = largest.read_bytes()
    with contextlib.closing(Checkpointer(tmp_path, config={"seed": 4})) as checkpointer:
        assert checkpointer.latest_valid_step() == 2
        np.testing.assert_array_equal(checkpointer.restore(2, state_at(0)).params["w"]["kernel"], 2.0)
        said = capsys.readouterr().out
        assert "checkpoint of step 3 is damaged" in said and largest.name in said
        checkpointer.save(state_at(3))  # the same step, made again
    aside = tmp_path / "checkpoints_damaged" / "3"
    assert (aside / largest.relative_to(tmp_path / "checkpoints" / "3")).read_bytes() == damaged
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        assert checkpointer.latest_valid_step() == 3
        assert checkpointer.about(3)["config"] == {"seed": 4}
        assert checkpointer.about(3)["versions"]["jax"] == jax.__version__
    flip_a_byte(max(files_of(tmp_path, 3), key=lambda p: p.stat().st_size))
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        assert checkpointer.latest_valid_step() == 2
    assert (tmp_path / "checkpoints_damaged" / "3.1").is_dir()


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
    largest = max(files_of(tmp_path, 3), key=lambda p: p.stat().st_size)
    name = largest.relative_to(tmp_path / "checkpoints" / "3").as_posix()
    (bucket / "3" / name).write_bytes(b"?" + largest.read_bytes()[1:])
    assert len(store.find_corruption(3)) == 1 and name in store.find_corruption(3)[0]
    aside = store.quarantine(3)
    assert (aside / name).read_bytes()[:1] == b"?" and not (bucket / "3").exists()
    assert aside == epath.Path("gs://bucket/checkpoint_test/checkpoints_damaged/3")


def test_sampling_passes_over_a_damaged_checkpoint_and_moves_nothing(tmp_path, capsys):
    save_three(tmp_path)
    flip_a_byte(max((f for f in files_of(tmp_path, 3) if "ema" in f.parts), key=lambda p: p.stat().st_size))
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
    checkpointer.save(state_at(4))
    with pytest.raises(ZeroDivisionError):
        checkpointer.close()
    monkeypatch.undo()
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        assert checkpointer.latest_valid_step() == 3
        checkpointer.save(state_at(4))
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        assert checkpointer.latest_valid_step() == 4


def test_multiples_are_kept_for_good(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path, keep_every=4)) as checkpointer:
        for step in range(1, 12):
            checkpointer.save(state_at(step))
    with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
        assert checkpointer.steps() == [4, 8, 10, 11]


def test_equal_trees_pass_and_a_missing_folder_is_named(tmp_path):
    check_same_tree(state_at(1).params, state_at(2).params, "it")
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*checkpoints"):
            checkpointer.resolve("latest")
