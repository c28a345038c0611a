"""Linear layers: the product and its gradients in float64, and gradients summed in float32 even in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.layers import Linear

EQUATIONS = {
    "bjd,de->bje": ((3, 50, 4), (4, 5), (5,)),
    "bjd,mde->mebj": ((3, 50, 4), (2, 4, 5), (2, 5)),
    "mrdbj,mrde->bjme": ((2, 2, 4, 3, 50), (2, 2, 4, 5), (2, 5)),
    "bd,de->be": ((30, 4), (4, 5), (5,)),
}


def run(equation, dtype):
    """The output, and the gradients of x, kernel and bias; with what they were computed from, as float64."""
    x_shape, kernel_shape, bias_shape = EQUATIONS[equation]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=x_shape), dtype)
    params = {"kernel": jnp.float32(rng.normal(size=kernel_shape)), "bias": jnp.float32(rng.normal(size=bias_shape))}
    model = Linear(equation, kernel_shape, dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)

    @jax.jit
    def products(params, x, dy):
        y, vjp = jax.vjp(lambda params, x: model.apply({"params": params}, x), params, x)
        return y, *vjp(dy)

    y_shape = jax.eval_shape(model.apply, {"params": params}, x).shape
    dy = jnp.asarray(rng.normal(size=y_shape), dtype)
    y, gradients, dx = products(params, x, dy)
    operands = [np.float64(a) for a in (x, params["kernel"].astype(dtype), params["bias"], dy)]
    return y, dx, gradients, operands


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_products_and_gradients(equation, dtype, tolerance):
    y, dx, gradients, (x, kernel, bias, dy) = run(equation, dtype)
    of_x, of_kernel, output = equation.replace("->", ",").split(",")
    # The bias has the output's dimensions that the kernel has, in their order; einsum lays it out as the output.
    of_bias = "".join(name for name in output if name in of_kernel)
    ones = "".join(name for name in output if name not in of_kernel)
    biases = np.einsum(f"{of_bias},{ones}->{output}", bias, np.ones([y.shape[output.index(name)] for name in ones]))
    assert y.dtype == dx.dtype == dtype
    for found, wanted in (
        (y, np.einsum(equation, x, kernel) + biases),
        (dx, np.einsum(f"{output},{of_kernel}->{of_x}", dy, kernel)),
    ):
        assert np.linalg.norm(np.float64(found) - wanted) <= tolerance * np.linalg.norm(wanted)
    # Of the operands as they are in bfloat16, so that what is left is how the sum was made: in float32 for both dtypes.
    wanted = {
        "kernel": np.einsum(f"{of_x},{output}->{of_kernel}", x, dy),
        "bias": np.einsum(f"{output}->{of_bias}", dy),
    }
    for name, gradient in gradients.items():
        assert gradient.dtype == jnp.float32
        assert np.linalg.norm(gradient - wanted[name]) <= 2e-6 * np.linalg.norm(wanted[name]), name
