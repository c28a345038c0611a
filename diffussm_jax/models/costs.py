"""What a model costs, counted by module from its jaxpr: multiply-adds, and activations saved for the backward pass.

JAX notes with each operation the Flax modules that it is in (`source_info.name_stack`), and so nothing has to be said
of a model beside its code. Matrix products and convolutions are counted as the papers count them: a multiplication and
an addition are one multiply-add, elementwise work and norms are free, and what a `lax.scan` repeats counts as often.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from diffussm_jax.io import path_of


class Costs(NamedTuple):
    """What a forward pass of one image costs.

    Attributes:
      parameters: number of parameters by part.
      multiply_adds: of matrix products and convolutions by part, as the papers count them; elementwise work and
        sequence mixers excluded.
      recomputed: those of `multiply_adds` that the backward pass computes again.
      mixer: multiply-adds of all sequence mixers; None where the method is not counted.
      mixer_method: how the sequence mixers are computed, such as what "auto" stands for; "" if there is one way only.
    """

    parameters: dict[str, int]
    multiply_adds: dict[str, int]
    recomputed: int = 0
    mixer: int | None = 0
    mixer_method: str = ""

    @property
    def total(self) -> int:
        return sum(self.multiply_adds.values())


def module_of(path: str, params: Mapping[str, Any]) -> str:
    """The module of a parameter tree that a name stack leads to.

    "jvp(Net)/blocks/ssm.phases/ij,jk->ik" leads to "blocks/ssm".
    """
    found, node = [], params
    for part in re.sub(r"\w+\(|\)", "", path).split("/"):
        name = part.partition(".")[0]
        if isinstance(node, Mapping) and isinstance(node.get(name), Mapping):
            found.append(name)
            node = node[name]
    return "/".join(found)


def _inner(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr


def _multiply_adds(eqn: JaxprEqn) -> int:
    """Of one operation; 0 unless it is a matrix product or a convolution."""
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel, outputs = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
        return eqn.outvars[0].aval.size * math.prod(kernel) // kernel[outputs]
    return 0


MIXER = "ssm"  # the name of a sequence mixer inside a block
_MAX_ROWS = 40


class Products(NamedTuple):
    """Multiply-adds by module, and those inside of `nn.remat`, which a backward pass computes again (at most)."""

    by_module: Counter
    recomputed: int


def count_products(jaxpr: Jaxpr, params: Mapping[str, Any], path: str = "") -> Products:
    """Multiply-adds of a jaxpr's matrix products and convolutions.

    Args:
      jaxpr: of a program that applies a model.
      params: tree of the model's parameters, whose keys are the names of modules.
      path: name stack of the operation that the jaxpr is part of.
    """
    found, recomputed = Counter(), 0
    for eqn in jaxpr.eqns:
        here = f"{path}/{eqn.source_info.name_stack}"
        if own := _multiply_adds(eqn):
            found[module_of(here, params)] += own
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in _inner(eqn):
            of_inner = count_products(inner, params, here)
            found.update({module: turns * count for module, count in of_inner.by_module.items()})
            is_remat = eqn.primitive.name in ("checkpoint", "remat2")
            recomputed += turns * (of_inner.by_module.total() if is_remat else of_inner.recomputed)
    return Products(found, recomputed)


def saved_bytes(apply: Callable, params: Mapping[str, Any], *batch: Any) -> Counter:
    """Bytes of the activations that a program saves for its backward pass, by module.

    These are the residuals of `jax.vjp` without the parameters. XLA may save less: it computes cheap ones again.

    Args:
      apply: apply(params, *batch) -> output.
      params: shapes and dtypes of the parameters.
      batch: shapes and dtypes of the other arguments.
    """
    jaxpr = jax.make_jaxpr(lambda params, *batch: jax.vjp(lambda p: apply(p, *batch), params)[1])(params, *batch).jaxpr
    saved = {var for var in jaxpr.outvars if not isinstance(var, Literal)} - {*jaxpr.invars, *jaxpr.constvars}
    found = Counter()
    for var in saved:
        found[module_of(_made_in(jaxpr, var), params)] += var.aval.size * var.aval.dtype.itemsize
    return found


def _made_in(jaxpr: Jaxpr, var) -> str:
    """The name stack of the operation that makes a variable of a jaxpr, in a scan that of the operation inside."""
    for eqn in jaxpr.eqns:
        if var not in eqn.outvars:
            continue
        path = str(eqn.source_info.name_stack)
        for inner in _inner(eqn):
            if len(inner.outvars) == len(eqn.outvars):
                path += "/" + _made_in(inner, inner.outvars[eqn.outvars.index(var)])
        return path
    # An input, such as the carry of a scan, which is saved once for each iteration: of the module that is repeated.
    return next((stack.split("/")[0] for eqn in jaxpr.eqns if (stack := str(eqn.source_info.name_stack))), "")


def per_image(count: Callable[[int], Counter]) -> Counter:
    """What one more image of a batch adds to count(batch_size)."""
    one, two = (count(batch_size) for batch_size in (1, 2))
    return Counter({module: two[module] - one[module] for module in two if two[module] != one[module]})


class Module(NamedTuple):
    """A row of the table of a model's modules.

    Attributes:
      name: path of the module, "blocks/W0"; "" for what no module does.
      parameters: number of parameters.
      multiply_adds: forward, of an image.
      saved_bytes: of activations for the backward pass, of an image.
    """

    name: str
    parameters: int
    multiply_adds: int
    saved_bytes: int


def modules(model, input_shape: tuple[int, int, int], num_images: int = 1) -> list[Module]:
    """A model's modules in the order of their calls, each with what it does itself, two levels deep or one if many.

    Args:
      model: a `Backbone`.
      input_shape: (H, W, C).
      num_images: computed together on a device, which decides on how sequence mixers are computed.
    """
    params, costs = model.abstract_params(input_shape), model.costs(input_shape, num_images)
    parameters: Counter = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parameters[module_of(path_of(path), params)] += leaf.size
    arguments = functools.partial(model.abstract_arguments, input_shape)
    products = count_products(jax.make_jaxpr(model.apply_params)(params, *arguments(1)).jaxpr, params).by_module
    if costs.mixer_method:  # such as FFTs, which are no matrix products
        products = Counter({name: count for name, count in products.items() if MIXER not in name.split("/")})
        products[f"blocks/{MIXER}"] = costs.mixer or 0
    saved = per_image(lambda batch_size: saved_bytes(model.apply_params, params, *arguments(batch_size)))
    for depth in (2, 1):
        counts = [_to_depth(counter, depth) for counter in (parameters, products, saved)]
        names = list(dict.fromkeys([*counts[1], *counts[2], *counts[0]]))
        if len(names) <= _MAX_ROWS:
            break
    parts = list(dict.fromkeys(name.split("/")[0] for name in names))
    names.sort(key=lambda name: parts.index(name.split("/")[0]))
    return [Module(name, *(counter[name] for counter in counts)) for name in names]


def _to_depth(counter: Counter, depth: int) -> Counter:
    found: Counter = Counter()
    for name, count in counter.items():
        found["/".join(name.split("/")[:depth])] += count
    return found


def table(rows: list[Module]) -> str:
    """Modules as text, with totals, and the share of the sequence mixers."""
    lines = [f"{'module':<32}{'parameters':>16}{'multiply-adds, M':>20}{'saved for backward, MB':>26}"]

    def add(name, parameters, multiply_adds, num_bytes):
        lines.append(f"{name:<32}{parameters:>16,}{multiply_adds / 1e6:>20,.3f}{num_bytes / 1e6:>26,.3f}")

    for row in rows:
        add(row.name or "(outside of modules)", *row[1:])
    totals = [sum(column) for column in zip(*(row[1:] for row in rows), strict=True)]
    add("total", *totals)
    of_mixers = [row[1:] for row in rows if MIXER in row.name.split("/")]
    if of_mixers:
        shares = [
            sum(column) / max(total, 1) for column, total in zip(zip(*of_mixers, strict=True), totals, strict=True)
        ]
        lines.append(f"{'share of the sequence mixers':<32}{shares[0]:>16.1%}{shares[1]:>20.1%}{shares[2]:>26.1%}")
    return "\n".join(lines)
