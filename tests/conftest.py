"""What the tests share: one finished run of a tiny model."""

import os
import tempfile
from importlib import metadata

# Many tests compile the same small programs, in this process and in those that they start: compile each once. Before
# JAX is imported, and for this run of the tests only.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers of pytest-xdist inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="diffussm_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# And compile fast, by leaving machine code as it comes, and by the older of XLA's ways to write it, where there are
# two: together a third of the time, and programs so small run for less long than they compile. As for users is compiled
# where digits are counted (`ssm_problems.WELL_COMPILED`), and all with JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS=.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA ends a process for a flag that it does not know, as jaxlib 0.12 does not know this one.
if metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import pytest
from tiny import tiny_config

from diffussm_jax.autoencoder import AutoencoderKL, init_params, to_diffusers
from diffussm_jax.build import build_experiment
from diffussm_jax.training.loop import train


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The work directory of a finished run of `tiny_config()`; read it only."""
    workdir = tmp_path_factory.mktemp("tiny_run")
    assert train(build_experiment(tiny_config()), workdir) is None
    return workdir


@pytest.fixture(scope="session")
def small_vae():
    """An autoencoder of random weights that halves an image once, and its parameters."""
    model = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    return model, init_params(model, seed=0)


@pytest.fixture(scope="session")
def small_vae_folder(small_vae, tmp_path_factory):
    """The same as a folder in diffusers' format."""
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    to_diffusers(*small_vae, folder)
    return folder
