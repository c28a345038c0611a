"""Strict dtype promotion for every test here, and a recorder of what a sampler does."""

import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def record():
    """record(denoise) -> the same callable, and the list to which each evaluation adds its (x_t, t, output)."""

    def wrap(denoise):
        steps = []

        def recorded(x_t, t):
            output = denoise(x_t, t)
            jax.debug.callback(lambda *step: steps.append(tuple(map(np.asarray, step))), x_t, t, output, ordered=True)
            return output

        return recorded, steps

    return wrap
