"""Latents precomputed from images: the same bytes after kills, broken images counted, wrong input refused."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import fsspec
import jax
import numpy as np
import pytest
from etils.epath.backend import fsspec_backend
from PIL import Image
from programs import run_program

from diffussm_jax import precompute as command_line
from diffussm_jax import precompute_job as program
from diffussm_jax.autoencoder import AutoencoderKL, VQModel, init_params
from diffussm_jax.data.latents import Latents, read_card, verify
from diffussm_jax.data.sources import Digits, open_source
from diffussm_jax.io import folder_lock
from diffussm_jax.precompute import Job, draw_reconstructions, precompute

SIZE = 16


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """90 images of digits in 10 folders, some wider than high."""
    root = tmp_path_factory.mktemp("images")
    for image, label, key, _ in itertools.islice(iter(Digits("train")), 90):
        folder = root / "train" / f"class_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        size = (SIZE + int(key) % 3, SIZE)
        Image.fromarray(image[..., 0]).resize(size).save(folder / f"{int(key):03d}.png")
    return root


def _job(small_vae, images, out, **options):
    options = {"batch_size": 8, "shard_size": 20, "split": "train", "image_size": SIZE, **options}
    source = open_source(str(images), "train")
    return Job(source=source, out=out, vae_name="small", vae=small_vae[0], params=small_vae[1], **options)


def _encoder(model, params):
    return jax.jit(lambda x: model.apply({"params": params}, x, method="encode"))


def _shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*array_record*")}


@pytest.fixture(scope="session")
def finished(small_vae, images, tmp_path_factory):
    """The folder of a whole split, made in one go."""
    out = tmp_path_factory.mktemp("latents")
    precompute(_job(small_vae, images, out))
    return out


def test_records_are_the_images_encoded(small_vae, images, finished):
    encode = _encoder(*small_vae)
    data, source = Latents(finished, "train"), open_source(str(images), "train")
    card = read_card(finished, "train")
    assert len(data) == 90 and len(card["shards"]) == 5 and not card["skipped"]
    assert card["class_names"] == [f"class_{i}" for i in range(10)]
    for i in (0, 19, 20, 57, 89):
        image, label, *_ = source[i]
        left = (image.shape[1] - SIZE) // 2
        cropped = image[:, left : left + SIZE].astype(np.float32) / 127.5 - 1
        for mirror, x in enumerate((cropped, cropped[:, ::-1])):
            mean, log_std = encode(x[None])
            np.testing.assert_allclose(data[i]["mean"][mirror], mean[0], rtol=2e-3, atol=2e-3)
            np.testing.assert_allclose(data[i]["log_std"][mirror], log_std[0], rtol=2e-3, atol=2e-3)
        assert data[i]["label"] == label


def test_gray_images_are_encoded_as_rgb(small_vae, tmp_path):
    job = Job(
        source=Digits("eval"),
        out=tmp_path,
        split="eval",
        image_size=8,
        vae_name="small",
        vae=small_vae[0],
        params=small_vae[1],
    )
    assert precompute(job)["num_records"] == 179
    x = job.source[3].image.astype(np.float32).repeat(3, -1) / 127.5 - 1
    mean, _ = _encoder(*small_vae)(x[None])
    np.testing.assert_allclose(Latents(tmp_path, "eval")[3]["mean"][0], mean[0], rtol=2e-3, atol=2e-3)


def test_an_autoencoder_of_gray_images_gets_them_gray(images, tmp_path):
    """From a source in colour; by a vector-quantized one, whose latents are stored before quantization."""
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    model = VQModel(in_channels=1, out_channels=1, latent_channels=2, num_vq_embeddings=16, **sizes)
    params = init_params(model, seed=0)
    job = _job((model, params), images, tmp_path)
    card = precompute(job)
    assert card["vae"]["quantizer"] == {"num_codes": 16} and card["latent_shape"] == [SIZE // 2, SIZE // 2, 2]
    data, number = Latents(tmp_path, "train"), 57  # 16 x 16 as it is
    image = job.source[number].image
    assert image.shape == (SIZE, SIZE, 3)
    luma = np.round(image @ np.array([0.299, 0.587, 0.114]))[None, ..., None]
    latents, log_std = _encoder(model, params)((luma / 127.5 - 1).astype(np.float32))
    np.testing.assert_allclose(data[number]["mean"][0], latents[0], rtol=2e-3, atol=2e-3)
    assert (data[number]["log_std"] == -15).all() and (log_std == -15).all()
    other = dataclasses.replace(job, vae=dataclasses.replace(model, num_vq_embeddings=24))
    with pytest.raises(ValueError, match="vae.quantizer: was {'num_codes': 16}, is {'num_codes': 24}"):
        precompute(other)
    picture = draw_reconstructions(job)
    assert picture.shape[-1] == 1 and picture.min() < picture.max()


def test_an_autoencoder_of_other_channels_is_refused(images, tmp_path):
    for channels in ((4, 4), (3, 1)):
        model = AutoencoderKL(in_channels=channels[0], out_channels=channels[1])
        with pytest.raises(ValueError, match="small takes {} channels and returns {}; images have 1".format(*channels)):
            precompute(_job((model, {}), images, tmp_path))


def test_the_card_of_a_kl_autoencoder_names_no_quantizer(finished):
    names = ["name", "sha256", "encoder_sha256", "scaling_factor", "dtype"]
    assert list(read_card(finished, "train")["vae"]) == names


def test_a_finished_split_is_left_alone_or_refused(small_vae, images, finished):
    before = _shards(finished)
    assert precompute(_job(small_vae, images, finished)) == read_card(finished, "train")
    assert _shards(finished) == before
    with pytest.raises(ValueError, match="already holds split 'train'.*\n  image_size: was 16, is 8"):
        precompute(_job(small_vae, images, finished, image_size=8))


def test_a_second_split_joins_the_folder(small_vae, images, tmp_path):
    for split in ("train", "again"):
        precompute(_job(small_vae, images, tmp_path, split=split))
    assert len(Latents(tmp_path, "train")) == len(Latents(tmp_path, "again")) == 90


def _command(images, small_vae_folder, out, *more):
    flags_ = {
        "source": images,
        "source_split": "train",
        "out": out,
        "vae": small_vae_folder,
        "image_size": SIZE,
        "batch_size": 8,
        "shard_size": 20,
    }
    return [sys.executable, "-m", "diffussm_jax.precompute", *(f"--{k}={v}" for k, v in flags_.items()), *more]


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again(small_vae, images, small_vae_folder, finished, tmp_path):
    """SIGKILL when the first, second and fourth shard has begun: the shards are those of one run, byte for byte."""
    command = _command(images, small_vae_folder, tmp_path)
    for num_partial in (1, 2, 4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(f"*-{num_partial - 1:05d}-of-00005*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert (tmp_path / "precompute-train-0.lock").exists()  # and is taken over
        with pytest.raises(FileNotFoundError, match="no finished latents"):
            Latents(tmp_path, "train")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "90 latents of 90 images (0 skipped)" in done.stdout
    assert _shards(tmp_path) == _shards(finished)
    cards = [read_card(folder, "train") for folder in (tmp_path, finished)]
    for card in cards:
        card["vae"].pop("name")
    assert cards[0] == cards[1]
    assert not list(tmp_path.glob("unfinished*")) and not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.lock"))


def test_ctrl_c_says_how_to_go_on(images, small_vae_folder, tmp_path):
    process = subprocess.Popen(_command(images, small_vae_folder, tmp_path), stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*.partial")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped; finished shards are kept" in error and "Traceback" not in error
    assert not list(tmp_path.glob("*.lock"))


def test_only_missing_shards_are_made_again(small_vae, images, tmp_path, monkeypatch):
    job = _job(small_vae, images, tmp_path)
    write, calls = program.latents.write_card, []
    monkeypatch.setattr(program.latents, "write_card", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # all shards are there, the card is not
        precompute(job)
    (tmp_path / "latents-train.array_record-00002-of-00005").unlink()
    monkeypatch.setattr(program.latents, "write_card", write)
    center_crop = program.center_crop
    monkeypatch.setattr(program, "center_crop", lambda *args: (calls.append(0), center_crop(*args))[1])
    precompute(job)
    assert len(calls) == 20


def test_a_begun_split_of_other_settings_is_refused(small_vae, images, tmp_path, monkeypatch):
    monkeypatch.setattr(program.latents, "write_card", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        precompute(_job(small_vae, images, tmp_path))
    with pytest.raises(ValueError, match="begun split 'train' of other settings.*\n  shard_size: was 20, is 30"):
        precompute(_job(small_vae, images, tmp_path, shard_size=30))


@pytest.fixture
def torn(images, tmp_path):
    """A copy of the images of which numbers 20 to 39, a whole shard, and number 3 are broken."""
    root = tmp_path / "torn"
    for i, path in enumerate(sorted((images / "train").rglob("*.png"))):
        copy = root / "train" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        copy.write_bytes(data[: len(data) // 2] if 20 <= i < 40 or i == 3 else data)
    return root


def test_broken_images_are_counted_and_listed(small_vae, images, torn, finished, tmp_path):
    card = precompute(_job(small_vae, torn, tmp_path / "out", max_bad_fraction=0.3))
    assert [item["index"] for item in card["skipped"]] == [3, *range(20, 40)]
    assert all(item["key"].endswith(".png") and item["reason"] for item in card["skipped"])
    data, whole = Latents(tmp_path / "out", "train"), Latents(finished, "train")
    assert len(data) == 69
    for i, j in ((2, 2), (3, 4), (18, 19), (19, 40), (68, 89)):
        np.testing.assert_allclose(data[i]["mean"], whole[j]["mean"], atol=2e-3)
    verify(tmp_path / "out", "train")


def test_too_many_broken_images_stop_it_and_keep_what_is_finished(small_vae, torn, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="broken images are more than max_bad_fraction = 0.1 of 90; the last: .*png"):
        precompute(_job(small_vae, torn, out, max_bad_fraction=0.1))
    assert list(_shards(out)) == ["latents-train.array_record-00000-of-00005"]
    with pytest.raises(FileNotFoundError, match="no finished latents"):
        Latents(out, "train")
    assert len(precompute(_job(small_vae, torn, out, max_bad_fraction=0.3))["skipped"]) == 21


def test_verify_draws_originals_above_reconstructions(small_vae, images, small_vae_folder, finished, tmp_path):
    command = _command(images, small_vae_folder, finished, "--verify")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "90 records in 5 shards are as their card says." in done.stdout
    picture = np.asarray(Image.open(finished / "verified-train.png"))
    expected = draw_reconstructions(_job(small_vae, images, finished))
    np.testing.assert_array_equal(picture, expected)
    first = open_source(str(images), "train")[0].image
    zoom = 4  # eight images of 16 pixels make 512
    tile = picture[2 : 2 + zoom * SIZE : zoom, 2 : 2 + zoom * SIZE : zoom]
    left = (first.shape[1] - SIZE) // 2
    np.testing.assert_array_equal(tile, first[:, left : left + SIZE])


def _on_two_hosts(images, small_vae_folder, out):
    """The exit codes and what was printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            _command(images, small_vae_folder, out, f"--distributed={address},2,{i}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [host.communicate(timeout=120) for host in hosts]
    return [host.returncode for host in hosts], outputs


def test_two_hosts_make_the_same_split(images, small_vae_folder, finished, tmp_path):
    codes, outputs = _on_two_hosts(images, small_vae_folder, tmp_path)
    assert codes == [0, 0], outputs
    assert not list(tmp_path.glob("*.lock"))
    assert _shards(tmp_path) == _shards(finished)
    logs = [(tmp_path / f"precompute-{i}.log").read_text() for i in range(2)]
    assert [log.count("finished") for log in logs] == [3, 2]


def test_both_hosts_end_if_the_share_of_one_is_in_use(images, small_vae_folder, tmp_path):
    with folder_lock(tmp_path, "precompute-train-1"):
        codes, ((_, first), (_, second)) = _on_two_hosts(images, small_vae_folder, tmp_path)
    assert codes == [1, 1]
    assert "error: host 1 failed, see its error" in first
    assert f"error: {tmp_path} is in use by process {os.getpid()} on host " in second
    assert not list(tmp_path.iterdir())


class _Meanwhile:
    """A source that does something else while it is read."""

    def __init__(self, source, do, at_item):
        self.source, self.do, self.at_item = source, do, at_item
        self.class_names, self.description, self.fingerprint = source.class_names, "slow", source.fingerprint

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == self.at_item:
            self.do()
        return self.source[index]


def test_a_second_job_of_the_same_split_is_refused_and_harms_nothing(small_vae, images, finished, tmp_path):
    job, errors = _job(small_vae, images, tmp_path), []

    def start_another():
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by process {os.getpid()} on host ") as error:
            precompute(job)
        errors.append(error)

    precompute(dataclasses.replace(job, source=_Meanwhile(job.source, start_another, at_item=50)))
    assert len(errors) == 1 and _shards(tmp_path) == _shards(finished)
    verify(tmp_path, "train")
    assert not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob("*.partial"))


def test_a_split_that_another_job_has_just_finished_is_not_made_again(small_vae, images, tmp_path, monkeypatch):
    job, make_encoder = _job(small_vae, images, tmp_path), program.make_encoder

    def finish_meanwhile(job):
        monkeypatch.undo()
        precompute(job)
        monkeypatch.setattr(program, "_write_shards", lambda *args: pytest.fail("made again"))
        return make_encoder(job)

    monkeypatch.setattr(program, "make_encoder", finish_meanwhile)
    assert precompute(job) == read_card(tmp_path, "train")
    assert not list(tmp_path.glob("unfinished*"))


def test_a_first_try_without_a_shard_does_not_stop_the_corrected_command(small_vae, images, tmp_path, monkeypatch):
    unfinished = tmp_path / "unfinished-train"
    with monkeypatch.context() as patch:
        patch.setattr(program, "_write_shards", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            precompute(_job(small_vae, images, tmp_path, batch_size=4))
    assert [path.name for path in unfinished.iterdir()] == ["settings.json"]
    (unfinished / "00001.json").write_text("{")  # a note that was cut is no shard, but says that there was one
    with pytest.raises(ValueError, match="holds a begun split 'train' of other settings(.|\n)*batch_size"):
        precompute(_job(small_vae, images, tmp_path))
    (unfinished / "00001.json").unlink()
    (unfinished / "settings.json").write_text("{")
    assert precompute(_job(small_vae, images, tmp_path))["num_records"] == 90


def test_a_lock_file_left_behind_is_taken_over(small_vae, images, tmp_path):
    path = tmp_path / "precompute-train-0.lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": "yesterday"}))
    precompute(_job(small_vae, images, tmp_path))  # the pid is another process's now
    assert not path.exists()


def test_wrong_sizes_are_refused(small_vae, images, tmp_path):
    with pytest.raises(ValueError, match="--image_size=15 is not a multiple of the autoencoder's downsampling 2"):
        precompute(_job(small_vae, images, tmp_path, image_size=15))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=a", "--out=b", "--max_bad_fraction=nan"], "--max_bad_fraction must be from 0 to 1, got nan"),
        (["--source=a", "--out=b", "--max_bad_fraction=1.1"], "max_bad_fraction.*1.1"),
        (["--source=a", "--out="], "give --source=IMAGES and --out=FOLDER"),
        (["--source=", "--out=b"], "give --source=IMAGES and --out=FOLDER"),
    ],
)
def test_wrong_flags_are_named(arguments, message):
    code, printed = run_program(command_line.main, *arguments, flag_values=command_line._FLAGS)
    assert code == 1 and "Traceback" not in printed
    assert re.search(message, printed), printed


def test_a_missing_source_is_named(small_vae_folder, tmp_path):
    done = subprocess.run(_command(tmp_path / "none.zip", small_vae_folder, tmp_path), capture_output=True, text=True)
    assert done.returncode == 1
    assert "none.zip" in done.stderr and "Traceback" not in done.stderr


def test_into_a_bucket(small_vae, images, finished, tmp_path, monkeypatch):
    """gs:// with a file system in memory in place of Google's."""

    def file_system(self, name):
        return fsspec.filesystem("memory" if name == "gcs" else name)

    monkeypatch.setattr(type(fsspec_backend), "_get_filesystem", file_system)
    monkeypatch.setenv("HOME", str(tmp_path))
    job = _job(small_vae, images, "gs://bucket/precomputed")
    card = precompute(job)
    assert precompute(job) == card  # finished: left alone
    assert {shard["file"]: (job.folder / shard["file"]).read_bytes() for shard in card["shards"]} == _shards(finished)
    assert not (job.folder / "unfinished-train" / "settings.json").exists()
    assert len(Latents(job.folder, "train")) == 90


def test_a_kill_before_the_card_is_made_good(small_vae, images, finished, tmp_path, monkeypatch):
    write_whole = program.latents.write_whole

    def die_at_the_card(path, text):
        if path.name == "card-train.json":
            raise KeyboardInterrupt
        write_whole(path, text)

    monkeypatch.setattr(program.latents, "write_whole", die_at_the_card)
    with pytest.raises(KeyboardInterrupt):
        precompute(_job(small_vae, images, tmp_path))
    with pytest.raises(FileNotFoundError, match="no finished latents"):
        Latents(tmp_path, "train")
    monkeypatch.undo()
    precompute(_job(small_vae, images, tmp_path))
    assert len(Latents(tmp_path, "train")) == 90 and _shards(tmp_path) == _shards(finished)
    assert not list(tmp_path.glob("unfinished*"))


class _Unreliable:
    """A source that fails as a lost disk does, from some item on, while it is broken."""

    def __init__(self, source):
        self.source, self.is_broken = source, True
        self.class_names, self.description, self.fingerprint = source.class_names, "unreliable", source.fingerprint

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if self.is_broken and index >= 30:
            raise OSError(errno.EIO, "Input/output error")
        return self.source[index]


def test_a_lost_disk_is_no_broken_image(small_vae, images, finished, tmp_path):
    job = _job(small_vae, images, tmp_path, max_bad_fraction=1.0)
    source = _Unreliable(job.source)
    job = dataclasses.replace(job, source=source)
    with pytest.raises(OSError, match="Input/output error"):
        precompute(job)
    source.is_broken = False
    assert not precompute(job)["skipped"]
    assert _shards(tmp_path) == _shards(finished)


def test_the_bad_fraction_counts_at_the_end_too(small_vae, torn, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(program, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        precompute(_job(small_vae, torn, out, max_bad_fraction=0.3))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="21 broken images are more than max_bad_fraction = 0.1 of 90"):
        precompute(_job(small_vae, torn, out, max_bad_fraction=0.1))


def test_names_that_are_not_utf_8(small_vae, tmp_path):
    folder = os.fsencode(tmp_path / "images" / "train") + b"/caf\xe9"
    os.makedirs(folder)
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "image.png")
    shutil.copy(tmp_path / "image.png", folder + b"/\xff.png")
    card = precompute(_job(small_vae, tmp_path / "images", tmp_path / "out"))
    assert card["class_names"] == ["caf\\udce9"]
    assert len(Latents(tmp_path / "out", "train")) == 1


def test_a_class_name_with_a_line_break_is_refused_before_any_work(small_vae, tmp_path):
    (tmp_path / "images" / "train" / "a\nb").mkdir(parents=True)
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "images" / "train" / "a\nb" / "1.png")
    with pytest.raises(ValueError, match=r"the class 'a\\nb' is empty, has a line break"):
        precompute(_job(small_vae, tmp_path / "images", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_split_that_does_not_fit_its_folder_is_refused_before_any_work(small_vae, images, tmp_path, monkeypatch):
    precompute(_job(small_vae, images, tmp_path))
    monkeypatch.setattr(program, "make_encoder", lambda job: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match="image_size is 8 in split 'val', 16 in split 'train'"):
        precompute(_job(small_vae, images, tmp_path, split="val", image_size=8))
    for name in ("all", "train[:1]", "a/b", ""):
        with pytest.raises(ValueError, match="a split's name is letters"):
            precompute(_job(small_vae, images, tmp_path, split=name))
