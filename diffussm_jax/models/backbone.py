"""What every backbone shares: its conditioners, and the way in which a condition reaches them.

A condition is a dict of arrays from the batch, {"label": [B]}; an array alone means {"label": array}, and None or {} is
the condition of an unconditional model. Each key has a conditioner, given as a factory and made inside the model as the
submodule f"{key}_embed".
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.models.conditioners import Conditioner, LabelEmbed
from diffussm_jax.models.costs import Costs, count_products
from diffussm_jax.options import NOT_AN_OPTION
from diffussm_jax.parallel.sharding import Rules

Condition = Mapping[str, Any]
ConditionerFactory = Callable[..., Conditioner]

# Activations of a block that are saved for the backward pass, beside its input; the others are computed again. Each
# policy saves less than the one before it.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("dense"),
    "block": jax.checkpoint_policies.nothing_saveable,
}


def scan_blocks(
    block: type[nn.Module], depth: int, *, remat: str = "none", unroll: int = 1
) -> Callable[..., nn.Module]:
    """A scan over `depth` blocks (x, c) -> (x, None), called with a block's fields; c is the same for all of them.

    The parameters of the blocks are stacked along the first dimension: one tree, and one block to compile.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
        unroll=unroll,
    )


def class_labels(num_classes: int, **options) -> dict[str, ConditionerFactory]:
    """The conditioners of a class-conditional model, with the options of `LabelEmbed`; none for 0 classes."""
    if num_classes == 0:
        return {}
    return {"label": functools.partial(LabelEmbed, num_classes=num_classes, **options)}


class Backbone(nn.Module, kw_only=True):
    """Base of backbones.

    Attributes:
      conditioners: a factory for each key of the condition, called with width, dtype and name; {} if unconditional.
      num_outputs: output channels for each input channel: 2 with a learned variance, else 1.
    """

    conditioners: Mapping[str, ConditionerFactory] = dataclasses.field(default_factory=lambda: class_labels(1000))
    num_outputs: Annotated[int, NOT_AN_OPTION] = 2
    sharding_rules: ClassVar[Rules] = ()
    sizes: ClassVar[Mapping[str, Mapping[str, int]]] = {}  # named sizes: values of options, as "XL": {"width": ...}

    def check(self, input_shape: tuple[int, int, int]) -> None:
        """Raises ValueError, naming values and what is allowed, if the model cannot take inputs (H, W, C)."""

    def costs(self, input_shape: tuple[int, int, int], num_images: int = 1) -> Costs:
        """Costs for inputs (H, W, C), `num_images` of them computed together on a device.

        Here multiply-adds are counted from the jaxpr, and those of a sequence mixer are not told from others.
        """
        params, arguments = self.abstract_params(input_shape), self.abstract_arguments(input_shape, 1)
        products = count_products(jax.make_jaxpr(self.apply_params)(params, *arguments).jaxpr, params)
        return Costs(self.count_parameters(input_shape), dict(products.by_module), products.recomputed)

    def block(self, input_shape: tuple[int, int, int]) -> tuple[nn.Module, tuple[int, int]]:
        """One of the blocks that the model repeats, for measuring it alone.

        Returns:
          The module, block(x [B, J, D], c [B, D]) -> (x, None), and (J, D).

        Raises:
          ValueError: the model does not repeat one kind of block.
        """
        raise ValueError(f"{type(self).__name__} does not repeat one kind of block")

    def from_pytorch(self, state_dict: Mapping[str, np.ndarray]) -> dict:
        """Parameters from a published state dict of PyTorch.

        Raises:
          ValueError: the model has no published layout, or the tensors are not those of the layout.
        """
        raise ValueError(f"{type(self).__name__} has no published layout of PyTorch")

    def to_pytorch(self, params: dict, input_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """The published state dict of parameters for inputs (H, W, C), float32.

        Raises:
          ValueError: the model has no published layout, or the layout has no place for the parameters.
        """
        raise ValueError(f"{type(self).__name__} has no published layout of PyTorch")

    def apply_params(self, params: dict, x_t: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
        """The model's output with these parameters."""
        return self.apply({"params": params}, x_t, t, condition)

    def abstract_arguments(self, input_shape: tuple[int, int, int], batch_size: int) -> tuple:
        """Shapes and dtypes of x_t, t and the condition."""

        def arguments():
            x_t, t = jnp.zeros((batch_size, *input_shape)), jnp.zeros(batch_size, jnp.int32)
            return x_t, t, self.example_condition(batch_size)

        return jax.eval_shape(arguments)

    def count_parameters(self, input_shape: tuple[int, int, int]) -> dict[str, int]:
        """Number of parameters by top-level part, without building any array."""
        shapes = self.abstract_params(input_shape)
        return {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}

    def abstract_params(self, input_shape: tuple[int, int, int]) -> dict:
        """Shapes and dtypes of the parameters for inputs (H, W, C)."""
        return jax.eval_shape(lambda: self.init_params(input_shape, 0))

    def init_params(self, input_shape: tuple[int, int, int], seed: int) -> dict:
        """Fresh float32 parameters for inputs (H, W, C)."""

        def init():
            x_t, t = jnp.zeros((1, *input_shape)), jnp.zeros(1, jnp.int32)
            return self.init(jax.random.key(seed), x_t, t, self.example_condition(1))["params"]

        return jax.jit(init)()

    def _unbound(self, key: str) -> Conditioner:
        return self.conditioners[key](width=1, parent=None)

    def as_condition(self, condition: Condition | jax.Array | None) -> Condition:
        """The condition as a dict with exactly the model's keys.

        Raises:
          ValueError: a key is missing or unknown.
        """
        if condition is None:
            condition = {}
        elif not isinstance(condition, Mapping):
            condition = {"label": condition}
        if condition.keys() != self.conditioners.keys():
            raise ValueError(
                f"the model takes the conditions {sorted(self.conditioners)}, it was called with {sorted(condition)}"
            )
        return condition

    def example_condition(self, batch_size: int) -> Condition:
        """A condition of the right shapes and dtypes."""
        return {key: self._unbound(key).example(batch_size) for key in self.conditioners}

    def null(self, condition: Condition | jax.Array | None) -> Condition:
        """The condition that stands for none, in the shape of `condition`."""
        return {key: self._unbound(key).null(value) for key, value in self.as_condition(condition).items()}

    def drop(self, condition: Condition | jax.Array | None, key: jax.Array) -> Condition:
        """The condition with rows replaced by the null one at random, for classifier-free guidance."""
        condition = self.as_condition(condition)
        rngs = {f"{name}_dropout": key for name in condition}
        return _Drop(self.conditioners, parent=None).apply({}, condition, rngs=rngs)

    def embed(self, condition: Condition | jax.Array | None, width: int, dtype) -> dict[str, Any]:
        """Each conditioner's `Conditioning`, by key; to be called inside a compact method."""
        return {
            key: self.conditioners[key](width=width, dtype=dtype, name=f"{key}_embed")(value)
            for key, value in self.as_condition(condition).items()
        }


class _Drop(nn.Module):
    """Drops conditions outside the model, for a whole batch, with the keys that a submodule of the model would draw."""

    conditioners: Mapping[str, ConditionerFactory]

    @nn.compact
    def __call__(self, condition: Condition) -> Condition:
        return {
            key: self.conditioners[key](width=1, name=f"{key}_embed").drop(value, f"{key}_dropout")
            for key, value in condition.items()
        }
