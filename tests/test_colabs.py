"""The notebooks run from top to bottom, with a short setting, and show what they promise."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image
from sklearn.datasets import load_sample_images

COLABS = Path(__file__).parent.parent / "colabs"


def tags(cell):
    return cell.metadata.get("tags", [])


def test_notebooks_are_committed_without_output():
    for path in COLABS.glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None), path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quickstart_trains_and_samples(tmp_path):
    notebook = nbformat.read(COLABS / "quickstart.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in tags(cell)]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in tags(cell)]
    short = {
        "num_steps": 8,
        "batch_size": 8,
        "log_every": 2,
        "eval_every": 4,
        "sample_every": 4,
        "checkpoint_every": 4,
        "optimizer.warmup_steps": 2,
        "model.width": 16,
        "model.depth": 2,
        "model.mixer.state_size": 4,
        "model.scan_unroll": 1,
        "sampling.num_steps": 3,
    }
    parameters.source += f"\nworkdir = {str(tmp_path)!r}\noverrides = {short!r}\n"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(COLABS)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2  # the loss and the grid
    assert (tmp_path / "samples" / "quickstart.npz").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_precompute_and_sample_goes_from_photographs_to_a_decoded_grid(tmp_path, small_vae_folder):
    for i, photograph in enumerate(load_sample_images().images):  # two, cut into pieces
        folder = tmp_path / "images" / "train" / f"photograph_{i}"
        folder.mkdir(parents=True)
        for j in range(10):
            Image.fromarray(photograph[:, 40 * j : 40 * j + 100]).save(folder / f"{j}.jpg")
    notebook = nbformat.read(COLABS / "precompute_and_sample.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in tags(cell)]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in tags(cell)]
    short = {
        "num_steps": 6,
        "batch_size": 8,
        "log_every": 2,
        "sample_every": 3,
        "checkpoint_every": 3,
        "model.width": 16,
        "model.depth": 2,
        "model.mixer.state_size": 4,
        "sampling.num_steps": 3,
    }
    values = {
        "source": str(tmp_path / "images"),
        "image_size": 16,
        "vae_name": str(small_vae_folder),
        "latents": str(tmp_path / "latents"),
        "workdir": str(tmp_path / "run"),
        "overrides": short,
    }
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(COLABS)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2  # the reconstructions and the samples
    with np.load(tmp_path / "run" / "samples" / "notebook.npz") as samples:
        assert samples["arr_0"].shape == (40, 16, 16, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_autoencoder_goes_from_digits_to_samples_of_latents(tmp_path):
    notebook = nbformat.read(COLABS / "autoencoder.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in tags(cell)]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in tags(cell)]
    every = {"log_every": 1, "eval_every": 2, "sample_every": 2, "checkpoint_every": 2, "num_steps": 4}
    values = {
        "autoencoder_dir": str(tmp_path / "autoencoder"),
        "latents": str(tmp_path / "latents"),
        "workdir": str(tmp_path / "run"),
        "autoencoder_overrides": every
        | {"task.autoencoder.block_out_channels": (8, 8, 8), "task.disc_start": 2, "task.disc_warmup": 1}
        | {"task.perceptual": "none", "task.report_features": "none"},
        "overrides": every | {"eval_every": 0, "data.eval_split": "", "model.width": 16, "model.depth": 1},
    }
    parameters.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(COLABS)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3  # the curves, reconstructions, samples
    assert any("PSNR" in output.get("data", {}).get("text/markdown", "") for output in shown)
    with np.load(tmp_path / "run" / "samples" / "notebook.npz") as samples:
        assert samples["arr_0"].shape == (60, 32, 32, 1)
