"""DiffuSSM in JAX: attention-free latent diffusion with bidirectional S4D state-space blocks.

    from diffussm_jax import load_run

    images, labels = load_run("runs/digits").sample(100)

The parts can be used by themselves: `diffussm_jax.ssm`, `.models`, `.diffusion`, `.autoencoder`, `.data`.
"""

import importlib

__all__ = ["Run", "load_run"]


def __getattr__(name: str):
    """Imports what `run` exports when it is first used, so that the parts of the package load alone."""
    if name in __all__:
        return getattr(importlib.import_module("diffussm_jax.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
