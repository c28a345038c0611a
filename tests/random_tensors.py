"""Random tensors by the names and shapes of PyTorch's state dicts, with which activations stay of the order of 1."""

import numpy as np


def random_tensors(shapes, seed=0):
    """float32 tensors. No two are alike, and BatchNorm, LayerNorm, biases and gains differ from what they start as."""
    rng = np.random.default_rng(seed)
    return {name: random_tensor(name, shape, rng).astype(np.float32) for name, shape in shapes.items()}


def random_tensor(name, shape, rng):
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape)
    normal = rng.standard_normal(shape, np.float32)
    if name.endswith("weight") and len(shape) > 1:
        gain = 2 if len(shape) == 4 else 1  # ReLU follows convolutions
        return normal * np.sqrt(gain / np.prod(shape[1:]))
    is_gain = name.endswith(("weight", "gamma", "lambda1"))
    return 0.3 * normal + is_gain


def assert_close(actual, expected, tolerance):
    """Asserts that arrays differ by at most this fraction of the largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())
