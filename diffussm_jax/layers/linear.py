"""A linear layer with gradients summed in float32, and the activation of the hourglass."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffussm_jax.parallel.sharding import replicate_kernel

gelu = nn.gelu  # the tanh form, Flax's default


def _product(equation: str, is_gathered: bool, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    y = jnp.einsum(equation, x, _cast(kernel, x.dtype, is_gathered))
    return y + jnp.expand_dims(bias.astype(x.dtype), _axes_of_x(equation))


def _axes_of_x(equation: str) -> tuple[int, ...]:
    """The output dimensions that the kernel and the bias do not have."""
    operands, output = equation.split("->")
    return tuple(i for i, name in enumerate(output) if name not in operands.split(",")[1])


def _cast(kernel: jax.Array, dtype: jnp.dtype, is_gathered: bool) -> jax.Array:
    """Casts before gathering, so that devices send the smaller dtype."""
    return replicate_kernel(kernel.astype(dtype)) if is_gathered else kernel.astype(dtype)


_linear = jax.custom_vjp(_product, nondiff_argnums=(0, 1))


def _linear_forward(equation, is_gathered, x, kernel, bias):
    return _product(equation, is_gathered, x, kernel, bias), (x, kernel)


def _linear_backward(equation, is_gathered, residuals, dy):
    x, kernel = residuals
    operands, output = equation.split("->")
    of_x, of_kernel = operands.split(",")
    dx = jnp.einsum(f"{output},{of_kernel}->{of_x}", dy, _cast(kernel, x.dtype, is_gathered))
    dkernel = jnp.einsum(f"{of_x},{output}->{of_kernel}", x, dy, preferred_element_type=jnp.float32)
    dbias = jnp.sum(dy, _axes_of_x(equation), dtype=jnp.float32)
    return dx, dkernel, dbias


_linear.defvjp(_linear_forward, _linear_backward)


class Linear(nn.Module):
    """einsum(equation, x, kernel) + bias in `dtype`, with float32 parameters and gradients summed in float32.

    By default JAX rounds gradients of a bfloat16 product to bfloat16 before the sum over devices.

    Attributes:
      equation: of x and kernel; the bias has the output dimensions that the kernel has.
      dtype: of the product.
      is_gathered: replicate the kernel on every device first. Otherwise XLA may split a product with few rows along
        idle mesh axes and communicate activations.
    """

    equation: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    is_gathered: bool = False
    has_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        operands, output = self.equation.split("->")
        sizes = dict(zip(operands.split(",")[1], self.shape, strict=True))
        kernel = self.param("kernel", self.kernel_init, self.shape)
        bias_shape = tuple(sizes[k] for k in output if k in sizes)
        bias = self.param("bias", nn.initializers.zeros, bias_shape) if self.has_bias else jnp.zeros(bias_shape)
        return _linear(self.equation, self.is_gathered, x.astype(self.dtype), kernel, bias)
