"""What the tests share: one finished run of a tiny model."""

import os
import tempfile
from importlib import metadata

# Many tests compile the same small programs, in this process and in those that they start: compile each once. Before
# JAX is imported, and for this run of the tests only.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers of pytest-xdist inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="diffussm_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Compile without optimising machine code, and with the older of XLA's two code generators where there are two. That
# takes a third of the time, and programs this small run for less time than they compile. Tests of accuracy compile as
# users do (`ssm_problems.WELL_COMPILED`). JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= compiles everything that way.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA aborts at a flag that it does not know, and jaxlib 0.12 does not know this one.
if metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import pytest
from tiny import tiny_config

from diffussm_jax.autoencoder import AutoencoderKL, init_params, to_diffusers
from diffussm_jax.experiment import build_experiment
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


def pytest_collection_modifyitems(items):
    """Puts the tests of training and docs first. Some take minutes, and else one worker would be left with them."""
    items.sort(key=lambda item: "/training/" not in item.path.as_posix() and item.path.name != "test_docs.py")
