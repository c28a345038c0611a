"""Counts of Pallas calls against small kernels whose bytes and operations are known in closed form."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diffussm_jax.bench.counts import Counts, pallas_counts

F32, BF16 = jnp.float32, jnp.bfloat16


def counts(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return pallas_counts(jax.jit(function).trace(*arguments).jaxpr, **options)


def in_one_block(kernel, *shapes, **options):
    """Counts of a kernel of float32 arrays without a grid; the last shape is the result's."""
    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(shapes[-1], F32))
    return counts(call, *((shape, F32) for shape in shapes[:-1]), **options)


def test_bytes_of_blocks_whose_index_changes():
    """Rows i, columns j, j the fastest: x [8, 128] changes with i, w [128, 128] at every step, y [8, 128] too."""

    def call(x, w):
        return pl.pallas_call(
            lambda x, w, y: None,
            grid=(4, 2),
            in_specs=[pl.BlockSpec((8, 128), lambda i, j: (i, 0)), pl.BlockSpec((128, 128), lambda i, j: (0, j))],
            out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((32, 256), F32),
        )(x, w)

    found = counts(call, ((32, 128), F32), ((128, 256), BF16))
    assert found == Counts(calls=1, bytes=4 * 8 * 128 * 4 + 8 * 128 * 128 * 2 + 8 * 8 * 128 * 4)


def test_blocks_that_come_back_and_squeezed_ones():
    """The index of x goes 0 1 2 3 3 2 1 0: seven changes in eight steps. w never changes; y is squeezed to a row."""
    call = pl.pallas_call(
        lambda x, w, y: None,
        grid=(2, 4),
        in_specs=[
            pl.BlockSpec((8, 128), lambda i, j: (jnp.where(i == 0, j, 3 - j), 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((None, 128), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((2, 128), F32),
    )
    assert counts(call, ((32, 128), F32), ((5, 7), F32)).bytes == 7 * 8 * 128 * 4 + 5 * 7 * 4 + 2 * 128 * 4


@pytest.mark.parametrize(("dtype", "precision", "passes"), [(BF16, None, 1), (F32, None, 1), (F32, "highest", 6)])
def test_products_in_a_loop(dtype, precision, passes):
    """[16, 128] by [128, 256], 3 times at each of 5 grid steps; the sum is one vector operation each."""

    def kernel(a, b, y):
        def turn(_, total):
            return total + jax.lax.dot_general(
                a[...], b[...], (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=F32
            )

        y[...] = jax.lax.fori_loop(0, 3, turn, jnp.zeros((16, 256), F32))

    call = pl.pallas_call(kernel, grid=(5,), out_shape=jax.ShapeDtypeStruct((16, 256), F32))
    found = counts(call, ((16, 128), dtype), ((128, 256), dtype))
    assert found.flops == 2 * 16 * 128 * 256 * 3 * 5
    assert found.matrix_ops == passes * found.flops
    assert found.vector_ops == 16 * 256 * 3 * 5


def test_batched_products():
    def kernel(a, b, y):
        y[...] = jnp.einsum("gik,gkj->gij", a[...], b[...])

    assert in_one_block(kernel, (3, 8, 16), (3, 16, 32), (3, 8, 32)).flops == 2 * 3 * 8 * 16 * 32


def test_vector_operations_are_of_whole_registers():
    """A product, a roll and a selection with its comparison: 4 of [16, 128]; the broadcast is free."""

    def kernel(x, y):
        x = pltpu.roll(2 * x[...], 1, 1)
        y[...] = jnp.where(x > 0, x, jnp.zeros((16, 128)))

    assert in_one_block(kernel, (16, 128), (16, 128)).vector_ops == 4 * 16 * 128


def test_small_arrays_fill_registers_and_reductions_count_what_they_read():
    def kernel(x, y):
        y[...] = jnp.exp(jnp.sum(x[...], 0, keepdims=True))

    assert in_one_block(kernel, (24, 100), (1, 100)).vector_ops == 24 * 128 + 8 * 128
    assert in_one_block(kernel, (24, 100), (1, 100), register=(1, 1)).vector_ops == 24 * 100 + 100


def test_of_branches_the_most_expensive_counts_and_scalars_do_not():
    def kernel(x, y):
        @pl.when(pl.program_id(0) + 1 == 1)
        def _():
            y[...] = x[...] * x[...] + x[...]

    call = pl.pallas_call(kernel, grid=(3,), out_shape=jax.ShapeDtypeStruct((8, 128), F32))
    assert counts(call, ((8, 128), F32)).vector_ops == 3 * 2 * 8 * 128


def test_calls_in_loops_gradients_and_inner_functions():
    call = pl.pallas_call(lambda x, y: None, out_shape=jax.ShapeDtypeStruct((8, 128), F32))

    @jax.custom_vjp
    def apply(x):
        return call(x)

    apply.defvjp(lambda x: (call(x), None), lambda _, dy: (call(call(dy)),))

    def program(x):
        return jax.lax.scan(lambda x, _: (jax.jit(apply)(x), None), x, length=7)[0]

    x = ((8, 128), F32)
    assert counts(program, x) == Counts(calls=7, bytes=7 * 2 * 8 * 128 * 4)
    assert counts(jax.grad(lambda x: apply(x).sum()), x).calls == 3


def test_unknown_turns_are_told():
    call = pl.pallas_call(lambda x, y: None, out_shape=jax.ShapeDtypeStruct((8, 128), F32))
    found = counts(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, call, x), ((8, 128), F32))
    assert (found.calls, found.unknown_loops) == (1, 1)
    assert counts(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, jnp.sin, x), ((8, 128), F32)) == Counts()


def test_stated_costs_are_told_apart():
    cost = pl.CostEstimate(flops=3, bytes_accessed=5, transcendentals=0)
    call = pl.pallas_call(lambda x, y: None, out_shape=jax.ShapeDtypeStruct((8, 128), F32), cost_estimate=cost)
    found = counts(lambda x: call(call(x)), ((8, 128), F32))
    assert (found.stated_flops, found.stated_bytes) == (6, 10)


def test_blocks_chosen_by_values_are_refused():
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i, of: (of[i], 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, of: (i, 0)),
    )
    call = pl.pallas_call(lambda of, x, y: None, grid_spec=spec, out_shape=jax.ShapeDtypeStruct((16, 128), F32))
    with pytest.raises(ValueError, match="scalar prefetch"):
        counts(call, ((2,), jnp.int32), ((16, 128), F32))
