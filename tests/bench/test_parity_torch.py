"""PyTorch's S4D computes the numbers and the gradients of `recurrent` (extra parity)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

from diffussm_jax.bench import bench_ssm
from diffussm_jax.bench.ssm import ssm_arguments, ssm_functions
from diffussm_jax.bench.yardsticks import TORCH_METHODS, torch_programs

pytest.importorskip("torch", reason="PyTorch is not installed (extra parity)")


def numbers(tensors):
    return [x.float().numpy() for x in tensors]


@pytest.mark.parametrize("method", TORCH_METHODS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 50, 3, 8), "float32"), ((1, 81, 5, 16), "float32"), ((1, 64, 3, 8), "bfloat16")]
)
def test_parity_of_values_and_gradients(method, shape, dtype):
    arguments = ssm_arguments(shape, dtype)
    _, expected_pass = ssm_functions("recurrent")
    y, (d_forward, d_backward, du) = jax.jit(expected_pass)(*arguments)
    forward_pass, with_gradients = torch_programs(method, *arguments)
    actual = numbers(with_gradients())
    expected = [
        y,
        *(d[name] for d, real in zip((d_forward, d_backward), arguments[:2], strict=True) for name in real),
        du,
    ]
    errors = [relative_error(a, np.asarray(e.astype(jnp.float32))) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) < (1e-5 if dtype == "float32" else 1e-2), errors
    np.testing.assert_array_equal(numbers([forward_pass()])[0], actual[0])


def test_parity_methods_are_timed_beside_others():
    rows = bench_ssm((1, 16, 2, 4), ["fft", *TORCH_METHODS], repeats=1)
    assert all(row["gradient_ms"] > 0 for row in rows)
    assert rows[1]["gradient_mb"] is None
