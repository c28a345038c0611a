"""Collectives read from a program that XLA compiled for 8 devices, against counts and bytes worked out by hand."""

import os
import subprocess
import sys

import pytest

from diffussm_jax.parallel.hlo import collectives

# On a mesh of 2 x 4, each device has x [4, 8] float32, 128 bytes.
PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

def local(x, n):
    def outer(x, _):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, "b")), None  # 4 devices, 5 x 3 times
        x, _ = jax.lax.scan(inner, x, None, length=3)
        return jnp.cos(jax.lax.psum(x.astype(jnp.bfloat16), ("a", "b")).astype(jnp.float32)), None  # 8 devices, 5 times
    x, _ = jax.lax.scan(outer, x, None, length=5)
    x = x + jax.lax.all_gather(x, "b", axis=0, tiled=True)[:4]  # result [16, 8]
    x = x + jnp.tile(jax.lax.psum_scatter(x, "a", scatter_dimension=0, tiled=True), (2, 1))  # result [2, 8]
    x = x + jax.lax.all_to_all(x, "b", 0, 1, tiled=True).reshape(4, 8)
    x = x + jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])
    return jax.lax.fori_loop(0, n[0], lambda i, x: jnp.tan(jax.lax.pmax(x, "a")), x)  # as often as n says

f = jax.shard_map(local, mesh=mesh, in_specs=(P(("a", "b")), P()), out_specs=P(("a", "b")), check_vma=False)
shapes = jax.ShapeDtypeStruct((32, 8), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
print(jax.jit(f).lower(*shapes).compile().as_text())
"""


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return collectives(done.stdout, 8)


def one(found, kind, group_size):
    matching = [c for c in found if (c.kind, c.group_size) == (kind, group_size)]
    assert len(matching) == 1, matching
    return matching[0]


def test_a_collective_in_loops_counts_once_a_turn(found):
    inner, outer = one(found, "all-reduce", 4), one(found, "all-reduce", 8)
    assert (inner.count, outer.count) == (15, 5)
    assert inner.is_count_known and outer.is_count_known
    assert inner.result_bytes == 4 * 8 * 4
    assert outer.result_bytes in (4 * 8 * 2, 4 * 8 * 4)  # XLA may sum bfloat16 in float32 on a CPU
    assert inner.sent_bytes == 15 * 2 * 3 / 4 * 128


def test_the_kinds_and_what_a_ring_sends(found):
    gather, scatter = one(found, "all-gather", 4), one(found, "reduce-scatter", 2)
    exchange, permute = one(found, "all-to-all", 4), one(found, "collective-permute", 8)
    assert [c.count for c in (gather, scatter, exchange, permute)] == [1] * 4
    assert [c.result_bytes for c in (gather, scatter, exchange, permute)] == [512, 64, 128, 128]
    assert gather.sent_bytes == 3 * 128  # three times its own part
    assert scatter.sent_bytes == 64  # the half that the other keeps
    assert exchange.sent_bytes == 96
    assert permute.sent_bytes == 128


def test_a_loop_that_does_not_tell_its_turns_counts_as_one(found):
    maximum = one(found, "all-reduce", 2)
    assert maximum.count == 1 and not maximum.is_count_known


# What compilers for TPUs and GPUs write and the one for CPUs does not.
LOOP = """HloModule m

%body (p: (u32[], f32[2,8])) -> (u32[], f32[2,8]) {{
  %p = (u32[]{{:T(128)}}, f32[2,8]{{1,0:T(8,128)S(1)}}) parameter(0)
  %i = u32[]{{:T(128)}} get-tuple-element(%p), index=0
  %two = u32[]{{:T(128)}} constant(2)
  %next = u32[]{{:T(128)}} add(%i, %two)
  %x = f32[2,8]{{1,0:T(8,128)S(1)}} get-tuple-element(%p), index=1
  {collective}
  ROOT %t = (u32[]{{:T(128)}}, f32[2,8]{{1,0}}) tuple(%next, %x)
}}

%condition (q: (u32[], f32[2,8])) -> pred[] {{
  %bound = u32[]{{:T(128)}} constant(8)
  %q = (u32[]{{:T(128)}}, f32[2,8]{{1,0}}) parameter(0)
  %j = u32[]{{:T(128)}} get-tuple-element(%q), index=0
  ROOT %less = pred[]{{:T(512)}} compare(%j, %bound), direction=LT, metadata={{op_name="while/cond/lt"}}
}}

ENTRY %main (x: f32[2,8]) -> f32[2,8] {{
  %x.1 = f32[2,8]{{1,0}} parameter(0)
  %start = u32[]{{:T(128)}} constant(1)
  %copy = u32[]{{:T(128)}} copy(%start)
  %state = (u32[]{{:T(128)}}, f32[2,8]{{1,0}}) tuple(%copy, %x.1)
  %loop = (u32[]{{:T(128)}}, /*index=1*/f32[2,8]{{1,0}}) while(%state), condition=%condition, body=%body
  ROOT %out = f32[2,8]{{1,0}} get-tuple-element(%loop), index=1
}}
"""


def in_loop(collective):
    return collectives(LOOP.format(collective=collective), 16)[0]


def test_turns_follow_from_start_step_and_bound():
    assert in_loop("%r = f32[2,8] all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add").count == 4  # 1, 3, 5, 7


@pytest.mark.parametrize(
    "groups,size",
    [
        ("{}", 16),
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,8]<=[16]", 8),
        ("[4,4]<=[2,2,4]T(0,2,1)", 4),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", 8),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}", 16),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0':(2)4}", 4),
    ],
)
def test_groups(groups, size):
    attributes = f'channel_id=1, replica_groups={groups}, to_apply=%add, metadata={{op_name="a/b"}}'
    found = in_loop(f"%r = f32[2,8] all-reduce(%x), {attributes}")
    assert (found.group_size, found.op_name) == (size, "a/b")


@pytest.mark.parametrize(
    "line,kind,result_bytes",
    [
        ("(f32[2,8]{1,0:T(8,128)}, f32[8,8]{1,0}) all-gather-start(%x), replica_groups=[4,4]<=[16]", "all-gather", 256),
        (
            "((f32[2,8], bf16[3]), (f32[8,8], bf16[12])) all-gather-start(%x, %y), replica_groups=[4,4]<=[16]",
            "all-gather",
            256 + 24,
        ),
        (
            "((f32[8,8]{1,0}), f32[2,8]{1,0}) reduce-scatter-start(%x), replica_groups=[4,4]<=[16]",
            "reduce-scatter",
            64,
        ),
        ("(f32[2,8], bf16[4]{0}) all-reduce-start(%x, %y), replica_groups=[4,4]<=[16]", "all-reduce", 64 + 8),
        (
            "(f32[2,8], f32[2,8], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), "
            "source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            64,
        ),
    ],
)
def test_asynchronous_ones_count_their_results_alone(line, kind, result_bytes):
    found = in_loop(f"%s = {line}")
    assert (found.kind, found.result_bytes) == (kind, result_bytes)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("something else", 8)
    with pytest.raises(ValueError, match="groups"):
        in_loop("%r = f32[2,8] all-reduce(%x), replica_groups=new_form, to_apply=%add")
