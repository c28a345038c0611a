"""Everything under tests/ssm runs with strict dtype promotion: a silent float32 to float64 or complex64 is an error."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield
