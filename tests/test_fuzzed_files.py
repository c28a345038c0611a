"""A small file with any damage is read, or refused by a message that names it; damage to a log stops no resume."""

import contextlib
import dataclasses
import json
import random
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from tiny import tiny_config

from diffussm_jax import io, load_run, precompute_job, weights
from diffussm_jax.build import Parts
from diffussm_jax.config import to_plain
from diffussm_jax.data import latents
from diffussm_jax.training.checkpoint import Checkpointer
from diffussm_jax.training.metrics import MetricsLog
from diffussm_jax.validation import check_same_experiment

VALUES = [None, True, -1, 0, 3.5, 10**400, 2**64, 1e308, float("nan"), float("inf"), [], {}, [[1]], {"a": {"b": 1}}]
VALUES += ["", "inf", "\0", "\ud800", "../..", "x" * 5000, "I32"]  # I32 is as wide as F32 in a file of weights
WHOLE = [b"", b"\xff\x00\xfe", b"null", b"[]", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000]
VAE = {"name": "v", "sha256": "1", "encoder_sha256": "2", "scaling_factor": 0.5, "dtype": "float32"}
SETTINGS = {"source": "x", "image_size": 16, "latent_shape": [2, 2, 3], "class_names": ["cat", "dog"], "vae": VAE}
FILES_OF_A_SPLIT = ["card-train.json", "features.json", "dataset_info.json", "label.labels.txt"]
FILES_OF_A_SPLIT += ["unfinished-train/settings.json", "unfinished-train/00000.json"]
State = dataclasses.make_dataclass("State", ["step"])


def cases(few):
    """Parametrizes a test with its number of damaged files; 8 times as many are behind `slow`."""
    return pytest.mark.parametrize("num_cases", [few, pytest.param(8 * few, marks=pytest.mark.slow)])


def other_bytes(rng, data):
    """Cut, without a line, with a part of it zero or twice, or with other bits."""
    start, end = sorted(rng.choices(range(len(data)), k=2))
    lines, flipped = data.splitlines(keepends=True), bytearray(data)
    del lines[rng.randrange(len(lines))]
    for position in rng.choices(range(len(data)), k=rng.randint(1, 4)):
        flipped[position] ^= 1 << rng.randrange(8)
    zeroed = data[:start] + bytes(end - start) + data[end:]
    return rng.choice([data[:start], b"".join(lines), zeroed, data[:end] + data[start:], bytes(flipped)])


def other_value(rng, data):
    """JSON of which a value or a key is another, or missing."""
    groups = [root := json.loads(data)]
    for group in groups:
        values = group.values() if isinstance(group, dict) else group
        groups += [value for value in values if value and isinstance(value, dict | list)]
    group, kind = rng.choice(groups), rng.choice(["missing", "key", "value", "value", "value", "value"])
    key = rng.choice(list(group) if isinstance(group, dict) else range(len(group)))
    if kind == "value" or isinstance(group, list):
        group[key] = rng.choice(VALUES)
    elif (old := group.pop(key)) is not None and kind == "key":
        group[rng.choice(["", "..", "a", "x" * 300])] = old
    return json.dumps(root).encode()


def fuzz(path, num_cases, read, *names, ways=(other_bytes, other_value)):
    """Damages a file in many ways. `read(content)` may raise a ValueError or OSError with one of `names` in it."""
    rng, good, wrong = random.Random(0), path.read_bytes(), {}
    read(good)
    for data in [*WHOLE, *(rng.choice(ways)(rng, good) for _ in range(num_cases))]:
        path.write_bytes(data)
        try:
            read(data)
        except Exception as error:
            if not (isinstance(error, ValueError | OSError) and any(str(name) in str(error) for name in names)):
                wrong.setdefault(f"{type(error).__name__}: {error}"[:120].partition("\n")[0], data[:200])
    assert not wrong, "\n".join(f"{error} from {data}" for error, data in wrong.items())


@cases(40)
def test_the_config_of_a_run(num_cases, tmp_path):
    def read(data):
        load_run(tmp_path)
        check_same_experiment(io.read_json(path), plain, path)

    parts, path = Parts(tiny_config()), tmp_path / "config.json"
    like = parts.model.abstract_params(parts.input_shape)
    weights.write_weights(tmp_path, jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), like), 12)
    path.write_text(json.dumps(plain := to_plain(parts.config)))
    fuzz(path, num_cases, read, path, "config.", "model.safetensors does not hold")


@cases(40)
def test_metrics_csv(num_cases, tmp_path):
    def resume(data):
        for _ in range(2):  # the second time nothing is damaged
            (aside := tmp_path / "metrics.csv.damaged").unlink(missing_ok=True)
            with contextlib.closing(MetricsLog(tmp_path, 45)) as log:
                log.write(50, {"loss": 1 / 3})
        rows = np.genfromtxt(path, delimiter=",", names=True, ndmin=1, comments=None)
        assert not aside.exists() and (np.diff(rows["step"]) > 0).all() and rows["step"][-1] == 50
        assert rows["loss"][-1] == 1 / 3 and (len(rows) == 5 or data != good)

    (path := tmp_path / "metrics.csv").write_bytes(good := b"step,loss\n10,0.1\n20,0.2\n30,nan\n40,0.4\n")
    fuzz(path, num_cases, resume, ways=[other_bytes])


@pytest.mark.parametrize("name", ["metrics/metrics", "_CHECKPOINT_METADATA", "checksums.json"])
@cases(20)
def test_the_files_of_a_checkpoint(num_cases, name, tmp_path):
    def resume(data):
        with contextlib.closing(Checkpointer(tmp_path, is_read_only=True)) as checkpointer:
            latest = checkpointer.resolve("latest")
        with contextlib.closing(Checkpointer(tmp_path, keep_every=1)) as checkpointer:
            assert checkpointer.latest_valid_step() in (1, latest)
        if (aside := tmp_path / "checkpoints_damaged" / "2").exists():
            aside.rename(tmp_path / "checkpoints" / "2")
        elif name == "checksums.json":  # every file has one
            assert json.loads(data) == good

    with contextlib.closing(Checkpointer(tmp_path, keep_every=1)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(State(np.int32(step)), {"w": np.ones(3)}, metrics={"eval_loss": 1 / step})
    good = json.loads((path := tmp_path / "checkpoints" / "2" / name).read_bytes())
    fuzz(path, num_cases, resume)


@pytest.mark.parametrize("name", FILES_OF_A_SPLIT)
@cases(60)
def test_the_files_of_latents(num_cases, name, tmp_path):
    def read(data):
        records = latents.Latents(tmp_path, "train")
        for i in range(5):
            assert (records[i]["mean"] == i).all() and records[i]["label"] == i % 2
        for item in records.card["skipped"]:
            assert isinstance(item["index"], int) and item["key"] + item["reason"]

    def resume(data):
        if note := precompute_job._Progress(job, SETTINGS).read(0):
            latents.write_card(tmp_path, "train", SETTINGS, [note["shard"], shards[1]], note["skipped"])
            latents.read_card(tmp_path, "train")

    shards, skipped = [], [{"index": 5, "key": "5.png", "reason": "torn"}]
    for number, indices in enumerate([(0, 1, 2), (3, 4)]):
        writer = latents.ShardWriter(tmp_path, "train", number, 2, (2, 2, 3), ["cat", "dog"])
        for i in indices:
            writer.write(*2 * [np.full((2, 2, 2, 3), i, np.float16)], i % 2, f"{i}.png")
        shards.append(writer.finish())
    latents.write_card(tmp_path, "train", SETTINGS, shards, skipped)
    job = SimpleNamespace(folder=epath.Path(tmp_path), split="train")  # what `_Progress` needs of one
    precompute_job._Progress(job, SETTINGS).finished(0, shards[0], skipped)
    ways = [other_bytes] if name.endswith("txt") else [other_bytes, other_value]
    fuzz(tmp_path / name, num_cases, resume if name.startswith("unfinished") else read, tmp_path, ways=ways)


@cases(300)
def test_exported_weights(num_cases, tmp_path):
    def other_header(rng, data):
        header = other_value(rng, data[8:-24])  # between its length and six numbers
        return len(header).to_bytes(8, "little") + header + data[-24:]

    def read(data):
        params, step = weights.read_weights(tmp_path, like)
        assert step >= 0 and (data[-24:] != good[-24:] or params["w"].tobytes() == good[-24:])

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"w": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=sharding)}
    good = (path := weights.write_weights(tmp_path, {"w": np.ones((2, 3), np.float32)}, 12)).read_bytes()
    fuzz(path, num_cases, read, path, ways=[other_bytes, other_header])
