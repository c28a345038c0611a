"""Autoencoders of diffusers with random weights, and what their tensors are here; for the parity tests."""

import numpy as np
import torch


def random_autoencoder(kind: type, seed: int = 0, *, attention_levels=(), **config):
    """A model of diffusers, norms' scales and all biases random too: no two tensors can be swapped unseen."""
    levels = ["Attn" if i in attention_levels else "" for i in range(len(config["block_out_channels"]))]
    model = kind(
        **{"layers_per_block": 2, "scaling_factor": 0.3, **config},
        down_block_types=tuple(f"{level}DownEncoderBlock2D" for level in levels),
        up_block_types=tuple(f"{level}UpDecoderBlock2D" for level in reversed(levels)),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            mean = float("norm" in name and name.endswith("weight"))
            p.copy_(torch.randn(p.shape, generator=generator) * spread + mean)
    return model.eval()


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def to_numpy(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(actual, expected, rtol):
    """To a fraction of the largest value."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def params_of(state_dict):
    """The parameter tree of tensors of diffusers, written here anew."""
    tree = {}
    for name, p in state_dict.items():
        *modules, leaf = name.split(".")
        x = p.detach().numpy()
        if modules == ["quantize", "embedding"]:
            modules, leaf = ["quantize"], "embedding"
        elif leaf == "weight":
            leaf = "scale" if x.ndim == 1 else "kernel"
            x = x.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[x.ndim])
        names = []
        for module in modules:
            names = [*names[:-1], f"{names[-1]}_{module}"] if module.isdigit() else [*names, module]
        node = tree
        for module in names:
            node = node.setdefault(module, {})
        node[leaf] = x
    return tree
