"""Files are whole or not there, a folder has one writer, and trees that differ are told apart with every difference."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from diffussm_jax import io


def test_a_reader_sees_all_of_a_file_or_the_one_before(tmp_path):
    path, texts, seen = tmp_path / "f", ["a" * 50_000, "b" * 70_000], set()
    io.write_whole(path, texts[0])
    is_done = threading.Event()

    def read():
        while not is_done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for k in range(30):
        io.write_whole(path, texts[k % 2])
    is_done.set()
    reader.join()
    assert seen <= set(texts)
    io.write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_file_that_can_be_written_later_gets_its_folder(tmp_path):
    io.check_writable(tmp_path / "a" / "b.csv")
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "a" / "b.csv").write_text("kept")
    io.check_writable(tmp_path / "a" / "b.csv")
    assert (tmp_path / "a" / "b.csv").read_text() == "kept"
    for path, message in ((tmp_path / "a", "a is a folder"), (tmp_path / "a/b.csv/c", "b.csv/c cannot be written")):
        with pytest.raises(OSError, match=message):
            io.check_writable(path)


def test_partial_names_differ_for_every_writer_and_lie_beside_the_file():
    path = epath.Path("/a/b.npz")
    names = {io.partial_path(path) for _ in range(10)}
    assert len(names) == 10 and {p.parent for p in names} == {path.parent}
    assert all(p.name.startswith("b.npz.") and p.name.endswith(".partial") for p in names)


def test_sums_are_sha256_of_whole_files(tmp_path):
    data = np.random.default_rng(0).bytes(3 * (1 << 20) + 5)  # more than is read at a time
    (tmp_path / "f").write_bytes(data)
    assert io.file_sha256(epath.Path(tmp_path / "f")) == hashlib.sha256(data).hexdigest()


def test_files_below_are_named_from_the_folder(tmp_path):
    for name in ("b/d/e", "a", "b/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert io.files_below(epath.Path(tmp_path)) == ["a", "b/c", "b/d/e"]
    assert io.is_bucket("gs://a/b") and io.is_bucket(epath.Path("gs://a/b")) and not io.is_bucket(tmp_path)


# Locks.


def is_locked(folder):
    """Whether the lock "a" of a folder is held, by anyone."""
    try:
        with io.folder_lock(folder, "a"):
            return False
    except ValueError:
        return True


def left_behind(folder, **record):
    """Writes the lock file of a process that was killed."""
    path = folder / "a.lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 1, "since": "yesterday"} | record))
    return path


def test_a_folder_has_one_writer_and_the_second_learns_who_it_is(tmp_path):
    folder = tmp_path / "new" / "folder"
    with io.folder_lock(folder, "a"):
        record = json.loads((folder / "a.lock").read_text())
        assert (record["host"], record["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(ValueError) as error, io.folder_lock(folder, "a"):
            pytest.fail("two hold it")
        for text in (str(folder), f"process {os.getpid()} ", f"host {record['host']} ", record["since"]):
            assert text in str(error.value)
        assert json.loads((folder / "a.lock").read_text()) == record
        with io.folder_lock(folder, "b"):  # of another name
            assert is_locked(folder)
    assert list(folder.iterdir()) == []
    with pytest.raises(KeyError), io.folder_lock(folder, "a"):
        raise KeyError
    assert list(folder.iterdir()) == [] and not is_locked(folder)


HOLDER = """
import signal, sys
from diffussm_jax import io
with io.folder_lock(sys.argv[1], "a"):
    print("held", flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_lock_ends_with_its_process(tmp_path, signum):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by process {process.pid} on host"):
            io.folder_lock(tmp_path, "a").__enter__()
        process.send_signal(signum)
    assert process.returncode and (tmp_path / "a.lock").exists() == (signum != signal.SIGINT)
    with io.folder_lock(tmp_path, "a"):
        assert json.loads((tmp_path / "a.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_left_behind_is_taken_over_even_if_its_pid_lives_again(tmp_path):
    for pid in (os.getpid(), os.getppid(), 1, 2**30):
        left_behind(tmp_path, pid=pid)
        assert not is_locked(tmp_path)
    for content in ("", '{"host": "el', "[]", "\x00"):  # cut by a crash
        (tmp_path / "a.lock").write_text(content)
        assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_hosts_lock_file_is_taken_over_with_a_notice(tmp_path, capsys):
    """A preempted run goes on on another host, and nobody is there to delete the file."""
    path = left_behind(tmp_path, host="elsewhere")
    with io.folder_lock(tmp_path, path.stem):
        assert json.loads(path.read_text())["host"] == socket.gethostname()
    printed = capsys.readouterr().out
    assert f"{tmp_path} was in use by process 1 on host elsewhere (since yesterday)" in printed and not path.exists()


@pytest.mark.parametrize("has_third", [True, False])
def test_a_lock_file_that_its_holder_deletes_while_it_is_opened_locks_nothing(tmp_path, monkeypatch, has_third):
    flock, (first, second, third) = fcntl.flock, (io.folder_lock(tmp_path, "a") for _ in range(3))
    first.__enter__()

    def flock_of_second(*args):
        """It has opened the file of the first."""
        monkeypatch.undo()
        first.__exit__(None, None, None)
        if has_third:
            third.__enter__()
        return flock(*args)

    monkeypatch.setattr(fcntl, "flock", flock_of_second)
    with pytest.raises(ValueError, match="in use") if has_third else contextlib.nullcontext():
        second.__enter__()
    assert is_locked(tmp_path)
    (third if has_third else second).__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_deleted_by_hand_is_anothers_from_then_on(tmp_path):
    with io.folder_lock(tmp_path, "a"):
        (tmp_path / "a.lock").unlink()
        second = io.folder_lock(tmp_path, "a")
        second.__enter__()
    assert is_locked(tmp_path)
    second.__exit__(None, None, None)
    assert not is_locked(tmp_path)


def test_without_locks_of_the_file_system_there_is_a_warning(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert not is_locked(tmp_path)
    assert "a.lock cannot be locked ([Errno 95] Operation not supported)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_buckets_have_no_lock():
    with io.folder_lock("gs://nowhere/run", "a"), io.folder_lock("gs://nowhere/run", "a"):
        pass


def test_shapes_have_paths_and_every_difference_is_listed():
    tree = {"a": {"kernel": jnp.zeros((2, 3))}, "b": [jax.ShapeDtypeStruct((4,), jnp.float32)]}
    shapes = io.shapes_by_path(tree)
    assert shapes == {"a/kernel": (2, 3), "b/0": (4,)}
    io.check_same_shapes(shapes, dict(shapes), "never raised")
    with pytest.raises(ValueError) as error:
        io.check_same_shapes(shapes | {"c": (1,)}, {"a/kernel": (3, 2), "b/0": (4,), "d": ()}, "it does not fit")
    assert str(error.value).splitlines() == [
        "it does not fit.",
        "  missing: ['c (1,)']",
        "  unexpected: ['d ()']",
        "  of another shape: ['a/kernel: (3, 2), not (2, 3)']",
    ]
