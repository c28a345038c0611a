"""The networks of the autoencoder's losses in NumPy float64, written from the papers and not from the package.

Images are [B, H, W, C], kernels [height, width, in, out].
"""

import numpy as np


def convolve(x, kernel, bias=0.0, stride=1, padding=1):
    """Cross-correlation with zeros around the image."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    size = np.shape(kernel)[0]
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
    return np.tensordot(windows, np.asarray(kernel, np.float64), ((3, 4, 5), (2, 0, 1))) + bias


def normalize(x, params, axes, epsilon=1e-5):
    """(x - mean) / sqrt(variance + epsilon) scale + bias; the variance is biased."""
    x = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)
    return x.reshape(*x.shape[:3], -1) * params["scale"] + params["bias"]


def patch_discriminator(params, x, num_layers, num_groups=None):
    """Logits of PatchGAN, with BatchNorm by the batch, or GroupNorm with num_groups(channels)."""
    for n in range(num_layers + 1):
        conv = params[f"conv_{n}"]
        x = convolve(x, conv["kernel"], conv.get("bias", 0), 2 if n < num_layers else 1)
        if n and num_groups is None:
            x = normalize(x, params[f"norm_{n}"], (0, 1, 2))
        elif n:
            B, H, W, C = x.shape
            x = normalize(x.reshape(B, H, W, num_groups(C), -1), params[f"norm_{n}"], (1, 2, 4))
        x = np.maximum(x, 0.2 * x)
    return convolve(x, **params[f"conv_{num_layers + 1}"])


def vgg16_maps(tensors, x):
    """relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of images in [-1, 1], by torchvision's `features`."""
    x = (np.float64(x) - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
    maps, pools, last = [], (4, 9, 16, 23), (2, 7, 14, 21, 28)
    for index in range(31):
        if index in pools:
            B, H, W, C = x.shape
            x = x.reshape(B, H // 2, 2, W // 2, 2, C).max((2, 4))
        elif f"features.{index}.weight" in tensors:
            kernel, bias = (np.float64(tensors[f"features.{index}.{kind}"]) for kind in ("weight", "bias"))
            x = np.maximum(convolve(x, kernel.transpose(2, 3, 1, 0), bias), 0)
            if index in last:
                maps.append(x)
    return maps


def lpips(tensors, maps_x, maps_y, unit):
    """LPIPS [B] of the maps of two batches; unit(f, norm) scales features [..., C] of norm [..., 1]."""
    total = 0
    for i, pair in enumerate(zip(maps_x, maps_y, strict=True)):
        u, v = (unit(f, np.sqrt((f**2).sum(-1, keepdims=True))) for f in pair)
        total = total + ((u - v) ** 2 @ np.float64(tensors[f"lin{i}.model.1.weight"][0, :, 0, 0])).mean((1, 2))
    return total
