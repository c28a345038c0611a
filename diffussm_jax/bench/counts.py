"""Bytes and operations of Pallas calls, counted from a program's jaxpr; XLA's own count leaves them out.

Bytes: each block of each operand and result crosses the memory bus when its index changes from one grid step to the
next,

    bytes = sum over blocks of block bytes * (1 + number of grid steps at which its index changes).

An operand without blocks counts once. Matrix operations: 2 m n k for each product of the kernel, times the iterations
of the loops around it, times grid steps, times the passes that a bfloat16 matrix unit needs for float32 operands (1 by
default, 3 at Precision.HIGH, 6 at HIGHEST). Vector operations: elements, in whole registers, of the result of each
elementwise operation, comparison, conversion, selection and roll, and of the operand of each reduction. Broadcasts,
reshapes, concatenations, loads and stores are free. Of the branches of a condition the most expensive one is counted.

These are counts, not times: a compiled kernel may do more or less.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

TPU_REGISTER = (8, 128)
_FREE = frozenset(
    "broadcast_in_dim reshape squeeze expand_dims slice dynamic_slice dynamic_update_slice concatenate pad copy "
    "get swap masked_load masked_swap bitcast multiple_of max_contiguous stop_gradient optimization_barrier".split()
)
_BY_OPERAND = ("reduce_", "cum", "arg")
_PASSES = {"HIGH": 3, "HIGHEST": 6}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Bytes and operations of the Pallas calls of a program.

    Attributes:
      calls: number of calls; a call in a loop counts at each iteration.
      bytes: that cross the memory bus.
      flops: of matrix products, 2 m n k.
      matrix_ops: flops times the passes of the matrix unit.
      vector_ops: elements of whole registers.
      stated_bytes: of the calls' own cost estimates, which XLA's count includes.
      stated_flops: likewise.
      unknown_loops: loops with an unknown number of iterations, counted once.
    """

    calls: int = 0
    bytes: int = 0
    flops: int = 0
    matrix_ops: int = 0
    vector_ops: int = 0
    stated_bytes: int = 0
    stated_flops: int = 0
    unknown_loops: int = 0

    def _each(self, function: Callable, *others: "Counts") -> "Counts":
        columns = zip(*(dataclasses.astuple(c) for c in (self, *others)), strict=True)
        return Counts(**dict(zip(dataclasses.asdict(self), (function(column) for column in columns), strict=True)))

    def __add__(self, other: "Counts") -> "Counts":
        return self._each(sum, other)

    def times(self, n: int) -> "Counts":
        return self._each(lambda column: n * column[0])

    def at_least(self, other: "Counts") -> "Counts":
        return self._each(max, other)


def pallas_counts(jaxpr: Jaxpr | ClosedJaxpr, register: tuple[int, int] = TPU_REGISTER) -> Counts:
    """Counts of all Pallas calls in a program, those in loops and inner functions included.

    Args:
      jaxpr: of the program, `jax.jit(f).trace(...).jaxpr`.
      register: the last two dimensions of arrays are rounded up to multiples of it; (1, 1) counts elements.

    Raises:
      ValueError: a call's grid or blocks depend on values at run time.
    """

    def count(eqn):
        return _call_counts(eqn, register) if eqn.primitive.name == "pallas_call" else None

    return _walk(_open(jaxpr), count)


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _inner(eqn) -> Iterator[Jaxpr]:
    """The jaxprs in the parameters of an equation."""
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, Jaxpr | ClosedJaxpr):
                yield _open(x)


def _walk(jaxpr: Jaxpr, count: Callable[[object], Counts | None]) -> Counts:
    """The sum of `count` over all equations, loops unrolled; where it returns None, over the equations inside."""
    total = Counts()
    for eqn in jaxpr.eqns:
        own = count(eqn)
        if own is not None:
            total += own
            continue
        inner = [_walk(jaxpr, count) for jaxpr in _inner(eqn)]
        if eqn.primitive.name == "cond":
            own = Counts()
            for branch in inner:
                own = own.at_least(branch)
        else:
            own = sum(inner, Counts())
        if eqn.primitive.name == "scan":
            own = own.times(eqn.params["length"])
        if eqn.primitive.name == "while" and own != Counts():
            own += Counts(unknown_loops=1)
        total += own
    return total


def _call_counts(eqn, register) -> Counts:
    grid = eqn.params["grid_mapping"].grid
    if not all(isinstance(size, int) for size in grid):
        raise ValueError(f"the grid of a Pallas call must be known to count it, got {grid}")
    in_kernel = _walk(_open(eqn.params["jaxpr"]), lambda eqn: _operation_counts(eqn, register))
    stated = eqn.params["cost_estimate"]
    return in_kernel.times(math.prod(grid)) + Counts(
        calls=1,
        bytes=transferred_bytes(eqn),
        stated_bytes=stated.bytes_accessed if stated else 0,
        stated_flops=stated.flops if stated else 0,
    )


def transferred_bytes(eqn) -> int:
    """Bytes of all blocks of a pallas_call's operands and results, each counted whenever its index changes."""
    mapping = eqn.params["grid_mapping"]
    if mapping.num_index_operands:
        raise ValueError("blocks that are chosen by operands (scalar prefetch) cannot be counted without their values")
    num_axes, num_steps = len(mapping.grid), math.prod(mapping.grid)
    steps = np.indices(mapping.grid, np.int32).reshape(num_axes, num_steps)  # the last axis is the fastest
    total = 0
    for block in mapping.block_mappings:
        size = math.prod(getattr(dim, "block_size", 1) for dim in block.block_shape) * block.array_aval.dtype.itemsize
        if mapping.grid:
            index = jax.vmap(jaxpr_as_fun(block.index_map_jaxpr))(*steps)
            index = np.stack([np.broadcast_to(i, num_steps) for i in index])
            size *= 1 + int(np.any(np.diff(index, axis=1), axis=0).sum())
        total += size
    return total


def _operation_counts(eqn, register) -> Counts | None:
    """Counts of one equation of a kernel; None if it contains other equations."""
    name = eqn.primitive.name
    if name == "dot_general":
        return _product_counts(eqn)
    if any(True for _ in _inner(eqn)):
        return None
    if name == "addupdate":
        counted = eqn.invars[1:2]
    elif name in _FREE:
        return Counts()
    else:
        counted = eqn.invars[:1] if name.startswith(_BY_OPERAND) else eqn.outvars
    return Counts(vector_ops=sum(_elements(x.aval, register) for x in counted))


def _elements(aval, register: tuple[int, int]) -> int:
    """Elements of an array in whole registers; 0 for a scalar, which another unit computes."""
    shape = getattr(aval, "shape", ())
    if math.prod(shape) <= 1:
        return 0
    *outer, rows, lanes = (1, *shape)
    return math.prod(outer) * math.prod(-(-n // r) * r for n, r in zip((rows, lanes), register, strict=True))


def _product_counts(eqn) -> Counts:
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    left, right = (x.aval for x in eqn.invars[:2])
    k = math.prod(left.shape[i] for i in contracted)
    b = math.prod(left.shape[i] for i in batch)
    flops = 2 * left.size * right.size // (k * b)
    precision = eqn.params["precision"]
    names = {getattr(p, "name", "DEFAULT") for p in (precision if isinstance(precision, tuple) else (precision,))}
    is_float32 = "float32" in (left.dtype.name, right.dtype.name)
    passes = max(_PASSES.get(name, 1) for name in names) if is_float32 else 1
    return Counts(flops=flops, matrix_ops=flops * passes)
