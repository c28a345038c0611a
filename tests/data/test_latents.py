"""Data sets of latents: written and read, their cards and statistics, damage found, and sampled on the device."""

import concurrent.futures
import hashlib
import json
import re
import subprocess
import sys

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from etils.epath.backend import fsspec_backend

from diffussm_jax.data import latents

SHAPE = (4, 4, 3)
SETTINGS = {
    "source": "a test",
    "image_size": 32,
    "latent_shape": list(SHAPE),
    "class_names": ["cat", "dog"],
    "vae": {"name": "v", "sha256": "1", "encoder_sha256": "2", "scaling_factor": 0.5, "dtype": "float32"},
}


def _records(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (*rng.normal(size=(2, 2, *SHAPE)).astype(np.float16), int(rng.integers(2)), f"images/{i}.png") for i in range(n)
    ]


def _write(folder, split="train", sizes=(5, 3), settings=SETTINGS):
    folder.mkdir(parents=True, exist_ok=True)
    records, shards = _records(sum(sizes)), []
    left = iter(records)
    for index, size in enumerate(sizes):
        writer = latents.ShardWriter(folder, split, index, len(sizes), SHAPE, settings["class_names"])
        for _ in range(size):
            writer.write(*next(left))
        shards.append(writer.finish())
    latents.write_card(folder, split, settings, shards, [{"index": 2, "key": "bad.png", "reason": "torn"}])
    return records


def test_what_is_written_is_read(tmp_path):
    records = _write(tmp_path)
    data = latents.Latents(tmp_path, "train")
    assert len(data) == 8
    for i, (mean, log_std, label, _) in enumerate(records):
        assert data[i]["mean"].dtype == data[i]["log_std"].dtype == np.float16
        np.testing.assert_array_equal(data[i]["mean"], mean)
        np.testing.assert_array_equal(data[i]["log_std"], log_std)
        assert data[i]["label"] == label and data[i]["label"].dtype == np.int32
    assert latents.verify(tmp_path, "train") == data.card


@pytest.mark.parametrize("name", ["cat\n\ndog", "a\rb", " ", "cat ", ""])
def test_class_names_that_tfds_would_not_read_back_are_refused(tmp_path, name):
    """TFDS's label.labels.txt has a name a line, stripped, and drops empty ones: later names would shift."""
    with pytest.raises(ValueError, match=rf"the class {re.escape(repr(name))} .*rename"):
        latents.ShardWriter(tmp_path, "train", 0, 1, SHAPE, ["ant", name, "dog"])
    assert not list(tmp_path.iterdir())


def test_tfds_reads_it_without_tensorflow(tmp_path):
    records = _write(tmp_path)
    program = (
        "import sys, tensorflow_datasets as tfds\n"
        f"builder = tfds.builder_from_directory({str(tmp_path)!r})\n"
        "source = builder.as_data_source(split='train[:50%]')\n"
        "names = builder.info.features['label'].names\n"
        "print(len(source), source[3]['key'].decode(), names, 'tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[-2] == f"4 {records[3][3]} ['cat', 'dog'] False"


def test_many_threads_read_the_same(tmp_path):
    records = _write(tmp_path, sizes=(100, 60))
    data = latents.Latents(tmp_path, "train")

    def num_wrong(seed):
        return sum((data[i]["mean"] != records[i][0]).any() for i in np.random.default_rng(seed).permutation(160))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(num_wrong, range(8))) == [0] * 8


def test_equal_records_make_equal_files(tmp_path):
    for name in ("a", "b"):
        _write(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert "latents-train.array_record-00001-of-00002" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_card(tmp_path):
    records = _write(tmp_path)
    card = latents.read_card(tmp_path, "train")
    assert (card["num_records"], card["split"], card["vae"]) == (8, "train", SETTINGS["vae"])
    assert card["skipped"] == [{"index": 2, "key": "bad.png", "reason": "torn"}]
    for shard, size in zip(card["shards"], (5, 3), strict=True):
        data = (tmp_path / shard["file"]).read_bytes()
        assert (shard["num_records"], shard["sha256"]) == (size, hashlib.sha256(data).hexdigest())
    means, log_stds = (np.stack([record[i] for record in records]).astype(np.float64) for i in (0, 1))
    draws = means + np.exp(log_stds) * np.random.default_rng(0).normal(size=(2000, *means.shape))
    np.testing.assert_allclose(card["statistics"]["mean"], means.mean((0, 1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(card["statistics"]["std"], draws.std((0, 1, 2, 3, 4)), rtol=3e-3)


def test_splits_share_a_folder(tmp_path):
    _write(tmp_path, "train")
    _write(tmp_path, "test", sizes=(2,))
    assert [len(latents.Latents(tmp_path, split)) for split in ("train", "test")] == [8, 2]
    other = SETTINGS | {"image_size": 64}
    with pytest.raises(ValueError, match="image_size is 64 in split 'extra', 32 in split 'test'"):
        _write(tmp_path, "extra", settings=other)
    assert [len(latents.Latents(tmp_path, split)) for split in ("train", "test")] == [8, 2]


def test_unlabelled(tmp_path):
    _write(tmp_path, settings=SETTINGS | {"class_names": []})
    assert len(latents.Latents(tmp_path, "train")) == 8


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished latents of split 'train'.*it holds none"):
        latents.Latents(tmp_path, "train")
    _write(tmp_path)
    with pytest.raises(FileNotFoundError, match="split 'val'.*it holds the splits train"):
        latents.Latents(tmp_path, "val")


def test_an_unfinished_shard_is_no_shard(tmp_path):
    writer = latents.ShardWriter(tmp_path, "train", 0, 1, SHAPE, [])
    writer.write(*_records(1)[0])
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_damage_is_found(tmp_path):
    _write(tmp_path)
    second = tmp_path / "latents-train.array_record-00001-of-00002"
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1
    second.write_bytes(data)
    with pytest.raises(ValueError, match="1 of 2 shards are damaged:\n  latents-train.array_record-00001-of-00002"):
        latents.verify(tmp_path, "train")
    second.unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of its shards or has them cut short: .*00001-of-00002"):
        latents.Latents(tmp_path, "train")


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"format_version": 0})])
def test_a_damaged_card_is_named(tmp_path, text):
    _write(tmp_path)
    (tmp_path / "card-train.json").write_text(text)
    with pytest.raises(ValueError, match="card-train.json is"):
        latents.Latents(tmp_path, "train")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *(((key,), None, f"{key} is missing") for key in ("num_records", "image_size", "latent_shape", "class_names")),
        *(((key,), 3.5, f"{key} is missing or of another type") for key in ("vae", "shards")),
        (("vae", "scaling_factor"), "big", "vae.scaling_factor is missing or of another type"),
        (("shards", 1, "sha256"), None, r"shards\[1\].sha256 is missing"),
        (("num_records",), 10**9, "num_records is 1000000000, its shards hold 8"),
        (("latent_shape",), [2, 0, 4], r"latent_shape is \[2, 0, 4\]"),
    ],
    ids=str,
)
def test_a_card_without_a_key_or_with_a_wrong_number_is_named(path, value, message, tmp_path):
    _write(tmp_path)
    file = tmp_path / "card-train.json"
    card = json.loads(file.read_text())
    group = card
    for key in path[:-1]:
        group = group[key]
    group[path[-1]] = value
    file.write_text(json.dumps(card))
    with pytest.raises(ValueError, match=rf"{file} is damaged: {message}"):
        latents.read_card(tmp_path, "train")


def test_a_damaged_record_is_named_with_its_shard(tmp_path):
    _write(tmp_path)
    data = latents.Latents(tmp_path, "train")
    shard = tmp_path / data.card["shards"][1]["file"]
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    shard.write_bytes(content)  # of the same size, so that opening it finds nothing
    data = latents.Latents(tmp_path, "train")
    found = {}
    for index in range(len(data)):
        try:
            data[index]
        except ValueError as error:
            found[index] = str(error)
    assert found and min(found) >= 5
    for index, message in found.items():
        assert f"record {index - 5} of the shard {shard} is damaged: " in message and "--verify" in message


def test_damaged_metadata_are_named(tmp_path):
    _write(tmp_path)
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(ValueError, match="TFDS cannot read"):
        latents.Latents(tmp_path, "train")


def test_values_beyond_float16_are_refused(tmp_path):
    writer = latents.ShardWriter(tmp_path, "train", 0, 1, SHAPE, [])
    mean, log_std, label, _ = _records(1)[0]
    mean[1, 2, 3, 0] = np.inf
    with pytest.raises(ValueError, match="latent of x.png is not finite"):
        writer.write(mean, log_std, label, "x.png")
    writer.discard()


def test_sampling_has_the_records_mean_and_deviation_and_both_mirrors():
    B = 20_000
    mean = np.stack([np.full((1, 1, 2), 1.0), np.full((1, 1, 2), -3.0)]).astype(np.float16)
    log_std = np.stack([np.full((1, 1, 2), np.log(0.5)), np.full((1, 1, 2), np.log(0.1))]).astype(np.float16)
    batch = {"mean": np.tile(mean, (B, 1, 1, 1, 1)), "log_std": np.tile(log_std, (B, 1, 1, 1, 1))}
    x = np.asarray(jax.jit(latents.draw_latents, static_argnums=2)(batch, jax.random.key(0), 0.5))
    assert x.shape == (B, 1, 1, 2) and x.dtype == np.float32
    is_mirrored = x[..., 0] < -0.8
    assert abs(is_mirrored.mean() - 0.5) < 0.02
    np.testing.assert_array_equal(is_mirrored, x[..., 1] < -0.8)  # one draw for all of an image
    for mirror, (center, deviation) in ((False, (0.5, 0.25)), (True, (-1.5, 0.05))):
        values = x[is_mirrored == mirror]
        assert abs(values.mean() - center) < 0.01
        assert abs(values.std() / deviation - 1) < 0.03


def test_a_bucket(tmp_path, monkeypatch):
    """gs:// paths, with a file system in memory in place of Google's: written there, and read through the cache."""

    def file_system(self, name):
        return fsspec.filesystem("memory" if name == "gcs" else name)

    monkeypatch.setattr(type(fsspec_backend), "_get_filesystem", file_system)
    monkeypatch.setenv("HOME", str(tmp_path))
    bucket = epath.Path("gs://bucket/latents")
    records = _write(bucket)
    assert (bucket / "latents-train.array_record-00000-of-00002").exists()
    data = latents.Latents(bucket, "train")
    assert len(data) == 8
    np.testing.assert_array_equal(data[7]["mean"], records[7][0])
    assert latents.verify(bucket, "train") == data.card
    assert len(list(tmp_path.rglob("*.array_record-*"))) == 2
    second = bucket / "latents-train.array_record-00001-of-00002"
    second.write_bytes(second.read_bytes()[::-1])
    with pytest.raises(ValueError, match="1 of 2 shards are damaged"):
        latents.verify(bucket, "train")
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    with pytest.raises(ValueError, match="gs://bucket/latents/.*00001-of-00002 is damaged"):
        latents.Latents(bucket, "train")
