"""Files of published weights: three formats, one result; the cache; and what is refused, with a reason."""

import ast
import os
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from random_tensors import random_tensors

from diffussm_jax import tensor_files
from diffussm_jax.evaluation import pretrained
from diffussm_jax.evaluation.pretrained import Published, convert, converted_path, find_weights, read_published
from diffussm_jax.io import file_sha256, weights_hash

SHAPES = {"conv.weight": (4, 3, 2, 2), "fc.weight": (5, 4), "fc.bias": (5,)}
NETWORK = Published(
    name="small",
    tensor_shapes=lambda: SHAPES,
    where="small.pth from https://example.org",
    other_network=lambda shapes: "this is the large one" if "large" in shapes else "",
)
TENSORS = random_tensors(SHAPES)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


def save_pytorch(path, tensors):
    torch = pytest.importorskip("torch", reason=".pth files need PyTorch")
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, path)


SAVE = {
    "w.safetensors": lambda path, tensors: safetensors.numpy.save_file(dict(tensors), path),
    "w.npz": lambda path, tensors: np.savez(path, **tensors),
    "w.pth": save_pytorch,
}
formats = pytest.mark.parametrize("name", SAVE)


@formats
def test_all_formats_give_the_same(name, tmp_path):
    SAVE[name](tmp_path / name, TENSORS)
    tensors, sha256 = read_published(NETWORK, tmp_path / name)
    assert tensors.keys() == TENSORS.keys() and sha256 == weights_hash(TENSORS)
    for key, tensor in tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, TENSORS[key])


@formats
def test_conversion(name, tmp_path, caches):
    SAVE[name](tmp_path / name, TENSORS)
    path = convert(tmp_path / name, NETWORK)
    assert path == caches / "diffussm_jax" / "weights" / "small.safetensors" == find_weights(NETWORK)
    tensors, sha256 = read_published(NETWORK)
    assert sha256 == read_published(NETWORK, tmp_path / name)[1]
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, TENSORS[key])
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {
            "format": "diffussm_jax.pretrained",
            "network": "small",
            "source": name,
            "source_sha256": file_sha256(tmp_path / name),
            "sha256": sha256,
        }
    before = path.read_bytes()
    assert convert(path, NETWORK).stat().st_size and read_published(NETWORK)[1] == sha256  # its own file
    assert len(path.read_bytes()) >= len(before) - 100


def test_a_cache_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert converted_path(NETWORK) == tmp_path / ".cache/diffussm_jax/weights/small.safetensors"


def test_the_hash_depends_on_names_shapes_and_values():
    changed = [
        TENSORS | {"fc.bias": TENSORS["fc.bias"] + np.float32(1e-7)},
        TENSORS | {"fc.weight": TENSORS["fc.weight"].reshape(4, 5)},
        {name.replace("bias", "b"): x for name, x in TENSORS.items()},
    ]
    assert len({weights_hash(tensors) for tensors in [TENSORS, *changed]}) == 4


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_precisions_become_float32(dtype, tmp_path):
    tensors = {name: x.astype(dtype) for name, x in TENSORS.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors")
    found, _ = read_published(NETWORK, tmp_path / "w.safetensors")
    for name, tensor in found.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))


def test_counters_of_batches_are_ignored(tmp_path):
    SAVE["w.npz"](tmp_path / "w.npz", TENSORS | {"bn.num_batches_tracked": np.array(7)})
    assert read_published(NETWORK, tmp_path / "w.npz")[0].keys() == SHAPES.keys()


def refused(path, *words, error=ValueError):
    with pytest.raises(error) as info:
        read_published(NETWORK, path)
    for word in (path.name if path else NETWORK.name, *words):
        assert word in str(info.value), info.value


@pytest.mark.parametrize("is_given", [True, False])
def test_missing_files_say_where_to_get_them(is_given, tmp_path):
    path = tmp_path / "no.pth" if is_given else None
    refused(path, "https://example.org", "--convert", error=FileNotFoundError)
    refused(tmp_path, "https://example.org", error=FileNotFoundError)  # a folder


@formats
def test_other_tensors(name, tmp_path):
    path = tmp_path / name
    SAVE[name](path, {k: x for k, x in TENSORS.items() if k != "fc.bias"} | {"extra": np.zeros(3, np.float32)})
    refused(path, "small", "missing: ['fc.bias (5,)']", "unexpected: ['extra (3,)']")
    SAVE[name](path, TENSORS | {"fc.bias": np.zeros(6, np.float32)})
    refused(path, "fc.bias: (6,), not (5,)")
    SAVE[name](path, TENSORS | {"large": np.zeros(3, np.float32)})
    refused(path, "this is the large one")


def test_tensors_of_whole_numbers(tmp_path):
    SAVE["w.npz"](tmp_path / "w.npz", TENSORS | {"fc.bias": np.zeros(5, np.int32)})
    refused(tmp_path / "w.npz", "floating-point", "fc.bias")
    SAVE["w.safetensors"](tmp_path / "w.safetensors", TENSORS | {"fc.bias": np.zeros(5, np.int32)})
    refused(tmp_path / "w.safetensors", "I32", "fc.bias")


@formats
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "zeros in the middle"])
def test_damaged_files(name, damage, tmp_path):
    path = tmp_path / name
    SAVE[name](path, TENSORS)
    content = path.read_bytes()
    half = len(content) // 2
    if damage == "zeros in the middle":
        if name == "w.safetensors":
            pytest.skip("plain safetensors have no checksum; converted ones have, see below")
        path.write_bytes(content[: half - 40] + bytes(80) + content[half + 40 :])
    else:
        path.write_bytes({"cut": content[:half], "empty": b"", "text": b"<!DOCTYPE html>"}[damage])
    refused(path, "damaged")


def test_a_converted_file_with_one_changed_bit(tmp_path):
    SAVE["w.npz"](tmp_path / "w.npz", TENSORS)
    path = convert(tmp_path / "w.npz", NETWORK)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(path, "damaged", "SHA-256")


def test_a_hash_in_the_name(tmp_path):
    other = tmp_path / "w-2015-12-05-6726825d.pth"
    other.write_bytes(b"something else")
    refused(other, "damaged, or another file", file_sha256(other), "6726825d")
    save_pytorch(tmp_path / "w.pth", TENSORS)
    sha256 = file_sha256(tmp_path / "w.pth")
    read_published(NETWORK, (tmp_path / "w.pth").rename(tmp_path / f"w-2015-12-05-{sha256[:8]}.pth"))


@pytest.mark.parametrize("name", ["w.bin", "w.pkl", "w"])
def test_other_formats(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(tmp_path / name, ".safetensors")


class Harmful:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_executed(tmp_path):
    trap = tmp_path / "trap"
    np.savez(tmp_path / "w.npz", **TENSORS, more=np.array([Harmful(trap)], object))
    refused(tmp_path / "w.npz", "never unpickled")
    np.save(tmp_path / "w.npy", np.array([Harmful(trap)], object), allow_pickle=True)
    (tmp_path / "w.npy").rename(tmp_path / "x.npz")
    refused(tmp_path / "x.npz", "never unpickled")
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as file:
        file.writestr("data.txt", "no array")
    refused(tmp_path / "y.npz")
    assert not trap.exists()


def test_pickles_of_pytorch_are_not_executed(tmp_path):
    torch = pytest.importorskip("torch", reason=".pth files need PyTorch")
    trap, path = tmp_path / "trap", tmp_path / "w.pth"
    for zipped in (True, False):
        torch.save({"x": Harmful(trap)}, path, _use_new_zipfile_serialization=zipped)
        refused(path, "not read")
    assert not trap.exists()
    for content in ({"weights": {"x": torch.zeros(3)}}, [torch.zeros(3)], {3: torch.zeros(3)}):
        torch.save(content, path)
        refused(path, "state dict")


def test_the_old_format_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch", reason=".pth files need PyTorch")
    tensors = {name: torch.from_numpy(x).half() for name, x in TENSORS.items()}
    torch.save(tensors, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    found, _ = read_published(NETWORK, tmp_path / "w.pt")
    for name, x in TENSORS.items():
        np.testing.assert_array_equal(found[name], x.astype(np.float16).astype(np.float32))


def test_the_average_of_a_training_checkpoint_is_read(tmp_path):
    torch = pytest.importorskip("torch", reason=".ckpt files need PyTorch")
    tensors = {name: torch.from_numpy(x) for name, x in TENSORS.items()}
    others = {name: torch.zeros_like(x) for name, x in tensors.items()}
    for content in ({"model": others, "ema": tensors, "step": 3}, {"state_dict": tensors}):
        torch.save(content, tmp_path / "w.ckpt")
        assert read_published(NETWORK, tmp_path / "w.ckpt")[1] == weights_hash(TENSORS)


def test_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # its import fails
    (tmp_path / "w.pth").write_bytes(b"")
    refused(tmp_path / "w.pth", "PyTorch", "pip install torch")


def test_pytorch_is_imported_for_its_files_only():
    for path in [*Path(pretrained.__file__).parent.glob("*.py"), Path(tensor_files.__file__)]:
        at_top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [node for node in at_top if "torch" in ast.unparse(node)], path


def test_metadata_of_others_are_allowed(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert read_published(NETWORK, tmp_path / "w.safetensors")[0].keys() == SHAPES.keys()
