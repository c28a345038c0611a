"""Measures speed on this machine, or counts work ahead of time for another: `python -m diffussm_jax.bench WHAT`.

    ssm     the methods of the SSM side by side, forward and with all gradients (`bench_ssm`); --aot=v5e compiles
            them for a chip and counts bytes and operations (`bench_aot`)
            --mixers=all: whole sequence mixers side by side (`bench_mixers`)
    errors  errors of the methods against the plain recurrence on this machine (`bench_errors`)
    block   one block of a model, with its SSM and without (`bench_block`); --aot=v5e counts it
    lengths  backbones against the number of positions, and where they cross (`bench_lengths`)
    versus_torch  a training and a sampling step beside the same in PyTorch (`bench_versus_torch`)
    step    a whole training step (`bench_step`)
    sample  sampling (`bench_sample`)
    loader  reading latents (`bench_loader`)
    vae     the autoencoder (`bench_vae`)
    inception  the FID Inception, beside PyTorch (`bench_inception`)
    scores  precision and recall beside NumPy and scikit-learn (`bench_scores`)

docs/bench.md explains each figure.
"""

from diffussm_jax.bench.aot import bench_aot, one_chip
from diffussm_jax.bench.block import bench_block
from diffussm_jax.bench.configs import bench_configs
from diffussm_jax.bench.crossings import Crossing, crossings
from diffussm_jax.bench.errors import bench_errors
from diffussm_jax.bench.inception import bench_inception
from diffussm_jax.bench.lengths import bench_lengths, length_config
from diffussm_jax.bench.loader import bench_loader
from diffussm_jax.bench.mixers import bench_mixers
from diffussm_jax.bench.sample import bench_sample
from diffussm_jax.bench.scores import bench_scores
from diffussm_jax.bench.ssm import bench_ssm, parse_shape, plot
from diffussm_jax.bench.step import bench_step
from diffussm_jax.bench.table import write_table
from diffussm_jax.bench.vae import bench_vae
from diffussm_jax.bench.versus_torch import bench_versus_torch
from diffussm_jax.bench.yardsticks import fft_naive

__all__ = [
    "Crossing",
    "bench_aot",
    "bench_block",
    "bench_configs",
    "bench_errors",
    "bench_inception",
    "bench_lengths",
    "bench_loader",
    "bench_mixers",
    "bench_sample",
    "bench_scores",
    "bench_ssm",
    "bench_step",
    "bench_vae",
    "bench_versus_torch",
    "crossings",
    "fft_naive",
    "length_config",
    "one_chip",
    "parse_shape",
    "plot",
    "write_table",
]
