"""Files are whole or not there, and trees that differ are told apart with every difference."""

import hashlib
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
