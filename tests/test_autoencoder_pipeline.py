"""Images, an autoencoder of one's own, latents, a DiffuSSM on them, decoded samples: the programs in turn, in small."""

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import run_program

from diffussm_jax import main, precompute, sample
from diffussm_jax.data.card import read_card
from diffussm_jax.io import read_json

CONFIGS = Path(__file__).parent.parent / "configs"
SIZE, F, NUM_CODES, NUM_IMAGES = 32, 2, 16, 32
SHORT = {"num_steps": 2, "batch_size": 16, "optimizer.warmup_steps": 0}
AUTOENCODER = {
    "task.perceptual": "none",
    "task.report_features": "none",
    "task.autoencoder.block_out_channels": "(4, 8)",
    "task.autoencoder.norm_num_groups": 4,
    "task.disc_width": 4,
    "task.disc_start": 1,
    "task.disc_warmup": 1,
    "task.disc_ramp": 0,
}
DIFFUSION = {
    "data.holdout": 0.2,
    "model.width": 16,
    "model.depth": 1,
    "model.mixer.state_size": 4,
    "sampling.num_steps": 2,
    "sampling.num_grid_rows": 1,
}


def run(program, overrides=None, **flags):
    """Runs a program with its flags and with other values of its config, and returns what it prints."""
    overrides = {f"config.{key}": value for key, value in (overrides or {}).items()}
    arguments = [f"--{name}={value}" for name, value in (flags | overrides).items()]
    code, printed = run_program(program.main, *arguments, flag_values=program._FLAGS)
    assert code == 0, printed
    return printed


@pytest.fixture
def photographs(tmp_path):
    """A zip of coloured images of two classes, half of them held out."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i in range(NUM_IMAGES):
            file = BytesIO()
            coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(coarse).resize((SIZE, SIZE)).save(file, format="PNG")
            archive.writestr(f"{('train', 'test')[i % 2]}/{'ab'[i // 2 % 2]}/{i:02d}.png", file.getvalue())
    return tmp_path / "images.zip"


def run_the_sequence(kind, data, source, split, num_classes, folder, every):
    """Runs the four programs, with grids and held-out losses `every` so many steps.

    Returns:
      the config of the autoencoder, the card, `config.data` of the last run, and the samples.
    """
    first, latents, second = folder / "autoencoder", folder / "latents", folder / "diffussm"
    often = {"sample_every": every, "eval_every": every}
    run(main, SHORT | AUTOENCODER | often | data, config=f"{CONFIGS}/cifar10_autoencoder_{kind}.py", workdir=first)
    run(precompute, source=source, source_split=split, image_size=SIZE, vae=first, out=latents)
    data = {"data.path": latents, "data.vae": first, "data.num_classes": num_classes}
    run(main, SHORT | DIFFUSION | often | data, config=f"{CONFIGS}/cifar10_latent.py", workdir=second)
    run(sample, workdir=second, num_samples=3, out=folder / "samples")
    return (
        read_json(first / "vae" / "config.json"),
        read_card(latents, "train"),
        read_json(second / "config.json")["data"],
        np.load(folder / "samples.npz")["arr_0"],
    )


def check(autoencoder, card, data, images, num_channels):
    """The scale of the latents follows them; the second config has it from their card."""
    assert images.shape == (3, SIZE, SIZE, num_channels) and images.dtype == np.uint8
    assert card["latent_shape"] == [SIZE // F, SIZE // F, 4]
    scale = autoencoder["scaling_factor"]
    mean, std = (np.array(card["statistics"][key]) for key in ("mean", "std"))
    overall = np.sqrt((mean**2 + std**2).mean() - mean.mean() ** 2)
    np.testing.assert_allclose(scale * overall, 1, rtol=0.05)
    found = {key: data[key] for key in ("scaling_factor", "downsampling", "num_channels")}
    assert found == {"scaling_factor": scale, "downsampling": F, "num_channels": 4}
    assert card["vae"]["scaling_factor"] == scale


@pytest.mark.slow
def test_digits_by_a_vector_quantized_autoencoder(tmp_path):
    data = {
        "data.source": "digits",
        "data.eval_split": "eval",
        "data.num_channels": 1,
        "task.autoencoder.num_vq_embeddings": NUM_CODES,
    }
    autoencoder, card, *found = run_the_sequence("vq", data, "digits", "eval", 10, tmp_path, every=0)
    check(autoencoder, card, *found, num_channels=1)
    assert autoencoder["_class_name"] == "VQModel" and card["vae"]["quantizer"] == {"num_codes": NUM_CODES}


@pytest.mark.slow
def test_photographs_by_a_kl_autoencoder(photographs, tmp_path):
    data = {"data.path": photographs, "data.num_classes": 2}
    autoencoder, card, *found = run_the_sequence("kl", data, photographs, "train", 2, tmp_path, every=2)
    check(autoencoder, card, *found, num_channels=3)
    for run_folder in ("autoencoder", "diffussm"):
        assert list((tmp_path / run_folder / "samples").glob("step_00000002_*.png"))
    assert autoencoder["_class_name"] == "AutoencoderKL" and "quantizer" not in card["vae"]
