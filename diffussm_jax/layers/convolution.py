"""Convolutions and group norms of convolutional networks: the autoencoder and the U-Net."""

import flax.linen as nn
import jax.numpy as jnp

PYTORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # of convolutions and linear layers


def conv(features: int, size: int, dtype: jnp.dtype, name: str | None = None, **kwargs) -> nn.Conv:
    """A convolution of size x size that keeps the resolution, with PyTorch's initial values; `kwargs` of `nn.Conv`."""
    kwargs = {"padding": size // 2, "kernel_init": PYTORCH_INIT, **kwargs}
    return nn.Conv(features, (size, size), dtype=dtype, name=name, **kwargs)


def group_norm(num_groups: int, name: str | None = None, *, epsilon: float = 1e-6) -> nn.GroupNorm:
    """GroupNorm in float32 for any input dtype, by default with the epsilon of diffusers' autoencoders."""
    # Flax's fast variance, E[x^2] - E[x]^2, loses digits for large means.
    return nn.GroupNorm(num_groups, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)
