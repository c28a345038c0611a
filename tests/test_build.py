"""Configs that run on images and on latents: what must fit does, and any number of processes reads the same."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from tiny import tiny_config

from diffussm_jax import load_run
from diffussm_jax.autoencoder import VQModel, to_diffusers
from diffussm_jax.build import Parts
from diffussm_jax.config import load_config
from diffussm_jax.data.sources import ImageFolder
from diffussm_jax.data.transforms import to_uint8
from diffussm_jax.data_config import complete_from_data
from diffussm_jax.experiment import build_experiment
from diffussm_jax.precompute import Job, precompute
from diffussm_jax.training.loop import train

CONFIGS = Path(__file__).parent.parent / "configs"
SIZE = 16


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of train/ and test/, each with 12 pieces of each of two photographs, 16 x 16 pixels."""
    root = tmp_path_factory.mktemp("photographs")
    for label, photograph in enumerate(load_sample_images().images):
        for i in range(24):
            folder = root / ("train" if i < 12 else "test") / f"photograph_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph[:, 20 * i : 20 * i + 100]).resize((SIZE, SIZE)).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def latents(images, small_vae, tmp_path_factory):
    """The same as latents."""
    out = tmp_path_factory.mktemp("latents")
    for split in ("train", "test"):
        precompute(
            Job(
                source=ImageFolder(images, split),
                out=out,
                split=split,
                image_size=SIZE,
                vae_name="small",
                vae=small_vae[0],
                params=small_vae[1],
                batch_size=8,
            )
        )
    return out


def _shorten(config):
    tiny = tiny_config()
    for key in ("batch_size", "num_steps", "log_every", "eval_every", "sample_every", "checkpoint_every"):
        config[key] = tiny[key]
    for key in ("width", "depth"):
        config.model[key] = tiny.model[key]
    config.model.mixer.state_size = tiny.model.mixer.state_size
    config.sampling.num_steps = 3
    config.data.image_size = SIZE
    return config


def _pixel_config(images):
    config = _shorten(load_config(f"{CONFIGS}/cifar10.py"))
    config.data.path, config.data.num_classes = str(images), 2
    return config


def _latent_config(latents, vae):
    config = _shorten(load_config(f"{CONFIGS}/cifar10_latent.py"))
    config.data.path, config.data.vae = str(latents), str(vae)
    config.data.num_classes, config.data.downsampling = 2, 2
    config.data.eval_split, config.data.holdout = "test", 0.0
    return config


@pytest.mark.slow
def test_pixels_train_and_sample(images, tmp_path):
    assert train(build_experiment(_pixel_config(images)), tmp_path) is None
    assert load_run(tmp_path).sample(3)[0].shape == (3, SIZE, SIZE, 3)


@pytest.mark.parametrize("num_classes", [2, pytest.param(0, marks=pytest.mark.slow)], ids=["classes", "unconditional"])
def test_latents_train_and_are_decoded(latents, small_vae, small_vae_folder, num_classes, tmp_path):
    config = _latent_config(latents, small_vae_folder)
    config.data.num_classes = num_classes
    experiment = build_experiment(config)
    assert train(experiment, tmp_path) is None
    (picture,) = (tmp_path / "samples").glob("step_00000012_*_seed0.png")
    assert Image.open(picture).mode == "RGB"
    generated, labels = load_run(tmp_path).sample(3)
    assert generated.shape == (3, SIZE, SIZE, 3)
    assert labels.tolist() == ([0, 1, 0] if num_classes else [0, 0, 0])
    if num_classes:
        check_another_decoder(tmp_path, small_vae, generated)


def check_another_decoder(workdir, small_vae, generated):
    """Sampling takes another decoder for the same encoder, and needs one if the config names none."""
    model, params = small_vae
    other = params | {"decoder": jax.tree.map(lambda x: x + 0.1, params["decoder"])}
    to_diffusers(model, other, workdir / "vae")
    others, _ = load_run(workdir, vae=str(workdir / "vae")).sample(3)
    assert others.shape == generated.shape and (others != generated).any()
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["vae"] = ""
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"or --vae=\.\.\. to diffussm_jax.sample"):
        load_run(workdir)
    assert set(load_run(workdir, has_decoder=False).params) >= {"blocks", "final"}


def test_the_codec_of_latents_scales_and_decodes(latents, small_vae, small_vae_folder):
    vae, params = small_vae
    config = _latent_config(latents, small_vae_folder)
    codec = Parts(complete_from_data(config)[0]).codec
    mean = np.random.default_rng(0).normal(size=(3, 2, 8, 8, 4)).astype(np.float16)
    log_std = np.full_like(mean, -12)
    x_0 = codec.encode({"mean": mean, "log_std": log_std}, jax.random.key(0))
    mirrors = np.stack([mean[:, 0], mean[:, 1]]).astype(np.float32) * vae.scaling_factor
    assert np.abs(mirrors - x_0).max((2, 3, 4)).min(0).max() < 1e-4  # each row is one of the two
    decoded = vae.apply({"params": params}, x_0 / vae.scaling_factor, method="decode")
    np.testing.assert_array_equal(codec.decode(x_0), to_uint8(decoded))


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("image_size", 32, "config.data.image_size = 32, the card has 16"),
        ("scaling_factor", 0.13025, "config.data.scaling_factor = 0.13025, the card has 0.18215"),
        ("num_channels", 8, "config.data.num_channels = 8, the card has 4"),
        ("downsampling", 4, "config.data.downsampling = 4, the card has 2"),
        ("num_classes", 10, "config.data.num_classes = 10, the card has 2"),
        ("split", "val", "no finished latents of split 'val'.*it holds the splits test, train"),
        ("path", "", "needs a path: give --config.data.path"),
        ("path", "nowhere", "nowhere holds no finished latents"),
        ("vae", "", "needs the autoencoder that made the latents: give --config.data.vae"),
        ("vae", "nowhere", "nowhere"),
    ],
)
def test_latents_that_do_not_fit_are_refused(latents, small_vae_folder, key, value, message):
    config = _latent_config(latents, small_vae_folder)
    config.data[key] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_experiment(config)


def test_numbers_are_found_in_the_card(latents, small_vae_folder):
    config = _latent_config(latents, small_vae_folder)
    config.data.update(image_size=-1, num_classes=-1, downsampling=-1)
    data, lines = complete_from_data(config)
    found = {key: data.data[key] for key in ("image_size", "num_classes", "downsampling", "num_channels")}
    assert found == {"image_size": SIZE, "num_classes": 2, "downsampling": 2, "num_channels": 4}
    assert data.data.scaling_factor == 0.18215 and "config.data.scaling_factor = 0.18215" in lines
    config.data.eval_split = "auto"
    with pytest.raises(ValueError, match="config.data.eval_split = 'auto' is for images; name a split of "):
        complete_from_data(config)


@pytest.fixture(scope="module")
def latents_of_codes(latents, tmp_path_factory):
    """`latents` with a card that names a quantizer of 16 codes."""
    folder = tmp_path_factory.mktemp("latents_of_codes") / "latents"
    shutil.copytree(latents, folder)
    for path in folder.glob("card-*.json"):
        card = json.loads(path.read_text())
        card["vae"]["quantizer"] = {"num_codes": 16}
        path.write_text(json.dumps(card))
    return folder


def _vq_folder(folder, num_codes, channels=(8, 8)):
    sizes = {"layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.18215}
    model = VQModel(block_out_channels=channels, num_vq_embeddings=num_codes, **sizes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))["params"]
    to_diffusers(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), folder)
    return folder


def test_an_autoencoder_of_another_kind_is_refused(latents, latents_of_codes, small_vae_folder, tmp_path):
    vq = {num_codes: _vq_folder(tmp_path / str(num_codes), num_codes) for num_codes in (16, 24)}
    for path, vae, message in (
        (latents_of_codes, small_vae_folder, "is an AutoencoderKL, but the latents were made by a VQModel of 16 codes"),
        (latents_of_codes, vq[24], "is a VQModel of 24 codes, but the latents were made by a VQModel of 16 codes"),
        (latents, vq[16], "is a VQModel of 16 codes, but the latents were made by an AutoencoderKL"),
        (latents_of_codes, vq[16], "does not have the encoder that made the latents"),
        (latents_of_codes, _vq_folder(tmp_path / "f4", 16, (8, 8, 8)), "config.data.downsampling = 2, it has 4"),
    ):
        config, _ = complete_from_data(_latent_config(path, vae))
        with pytest.raises(ValueError, match=message):
            Parts(config).codec  # noqa: B018 - it is made when it is asked for


def test_latents_are_compared_with_their_checksums_at_the_start(latents, small_vae_folder, tmp_path):
    folder = shutil.copytree(latents, tmp_path / "latents")
    shard = next(folder.glob("latents-train*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    config = _latent_config(folder, small_vae_folder)
    config.data.verify = True
    with pytest.raises(ValueError, match="1 of 1 shards are damaged:(.|\n)*SHA-256 is"):
        build_experiment(config)


def test_the_encoder_must_be_the_one_that_made_the_latents(latents, small_vae, tmp_path):
    model, params = small_vae
    for part in ("encoder", "decoder"):
        to_diffusers(model, params | {part: jax.tree.map(lambda x: x + 0.01, params[part])}, tmp_path / part)
    build_experiment(_latent_config(latents, tmp_path / "decoder"))  # trained further: welcome
    with pytest.raises(ValueError, match="does not have the encoder that made the latents"):
        build_experiment(_latent_config(latents, tmp_path / "encoder"))


PROCESS = """
import json, sys
import jax
address, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, index)
from test_build import RESUMED_AT, read_batches
from tiny import tiny_config
from diffussm_jax.build import Parts
from diffussm_jax.parallel.mesh import batch_to_devices, local_rows, make_mesh
mesh = make_mesh()
loader = Parts(tiny_config(), mesh).train_loader
assert batch_to_devices(mesh, loader.batch(0))["image"].shape == (8, 8, 8, 1)
print(json.dumps([local_rows(mesh, 8).tolist(), *(read_batches(loader, first) for first in (0, RESUMED_AT))]))
"""
RESUMED_AT = 37


def read_batches(loader, first_step):
    """[100 - first_step, 2, rows]: a sum of each image, and each label."""
    batches = itertools.islice(loader.iterate(first_step), 100 - first_step)
    return [[b["image"].astype(int).sum((1, 2, 3)).tolist(), b["label"].tolist()] for b in batches]


def read_in_two_processes():
    """What two processes, two devices each, read of each row: from the start, and from `RESUMED_AT` on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-c", PROCESS, address]
    processes = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=environment) for i in range(2)
    ]
    read = np.full((100, 2, 8), -1), np.full((100 - RESUMED_AT, 2, 8), -1)
    for process in processes:
        out, _ = process.communicate(timeout=120)
        rows, *values = json.loads(out)
        for whole, part in zip(read, values, strict=True):
            assert (whole[..., rows] == -1).all()
            whole[..., rows] = part
    return read


def test_the_first_100_batches_are_the_same_in_two_processes_and_after_a_resume():
    alone = np.array(read_batches(Parts(tiny_config()).train_loader, 0))
    assert alone.shape == (100, 2, 8) and len(np.unique(alone.reshape(100, -1), axis=0)) == 100
    in_two, resumed = read_in_two_processes()
    np.testing.assert_array_equal(in_two, alone)
    np.testing.assert_array_equal(resumed, alone[RESUMED_AT:])


def test_labels_of_two_splits_must_agree(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "test" / "photograph_1").rename(tmp_path / "images" / "test" / "photograph_2")
    with pytest.raises(ValueError, match="photograph_2.*: their labels do not agree"):
        build_experiment(_pixel_config(tmp_path / "images"))


def test_a_broken_image_of_a_pixel_run_is_named(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "train" / "photograph_0" / "07.png").write_bytes(b"")
    with pytest.raises(ValueError, match="photograph_0/07.png: the file is empty; remove it to train"):
        train(build_experiment(_pixel_config(tmp_path / "images")), tmp_path / "run")


def test_random_crops_follow_from_the_step(images):
    config = _pixel_config(images)
    config.data.image_size, config.data.random_crop = 8, True
    a, b = (Parts(config).train_loader for _ in range(2))
    for step in (0, 5):
        np.testing.assert_array_equal(a.batch(step)["image"], b.batch(step)["image"])
    assert a.batch(0)["image"].shape == (8, 8, 8, 3)
    centered = _pixel_config(images)
    centered.data.image_size = 8
    assert (Parts(centered).train_loader.batch(0)["image"] != a.batch(0)["image"]).any()
    epochs = [np.concatenate([a.batch(3 * epoch + i)["image"] for i in range(3)]).sum() for epoch in range(4)]
    assert len(set(epochs)) == 4  # the same images, other crops
