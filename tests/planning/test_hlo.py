# ruff: noqa: E501  (HLO has one instruction a line)
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mpt_jax.errors import InternalError
from mpt_jax.planning import collectives, hlo, work

MESH = {"data": 2, "fsdp": 4}

# Two loops, one in the other, as XLA writes them for a TPU: limits as constants of the
# condition, the inner one unrolled by two; an asynchronous gather in three fusions.
LOOPS = """HloModule m

%gather (p: bf16[1,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %g = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%inner_body (t: (u32[], bf16[1,8])) -> (u32[], bf16[1,8]) {
  %t = (u32[], bf16[1,8]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%t), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %x = bf16[1,8]{1,0} get-tuple-element(%t), index=1
  %go = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%gather
  %s = (bf16[1,8]{1,0}, bf16[1,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=9, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  %d = bf16[1,8]{1,0} collective-permute-done(%s)
  ROOT %r = (u32[], bf16[1,8]{1,0}) tuple(%next, %d)
}

%inner_condition (t: (u32[], bf16[1,8])) -> pred[] {
  %t = (u32[], bf16[1,8]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  %limit = u32[] constant(4)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (t: (s32[], bf16[1,8])) -> (s32[], bf16[1,8]) {
  %t = (s32[], bf16[1,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = bf16[1,8]{1,0} get-tuple-element(%t), index=1
  %async-collective-start = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%gather
  %zero = u32[] constant(0)
  %pair = (u32[], bf16[1,8]{1,0}) tuple(%zero, %x)
  %loop = (u32[], bf16[1,8]{1,0}) while(%pair), condition=%inner_condition, body=%inner_body
  %y = bf16[1,8]{1,0} get-tuple-element(%loop), index=1
  %sum = bf16[1,8]{1,0} all-reduce(%y), channel_id=3, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %r = (s32[], bf16[1,8]{1,0}) tuple(%next, %sum)
}

%condition (t: (s32[], bf16[1,8])) -> pred[] {
  %t = (s32[], bf16[1,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(8)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[1,8]) -> (s32[], bf16[1,8]) {
  %x = bf16[1,8]{1,0} parameter(0)
  %three = s32[] constant(3)
  %c = s32[] copy(%three)
  %t = (s32[], bf16[1,8]{1,0}) tuple(%c, %x)
  ROOT %w = (s32[], bf16[1,8]{1,0}) while(%t), condition=%condition, body=%body
}
"""


def test_loops_multiply_and_one_channel_is_one_collective():
    found = collectives.find(hlo.parse(LOOPS), MESH)
    got = {(c.kind, c.axes): (c.count, c.bytes, c.asynchronous) for c in found}
    outer, inner = 8 - 3, 4 // 2
    row = 16  # bytes of bf16[1,8]
    assert got == {
        ("all-gather", ("fsdp",)): (outer, outer * 3 * row, True),
        ("all-reduce", ("data",)): (outer, outer * row, False),  # 2 * 1/2 of it
        ("collective-permute", ("data",)): (outer * inner, outer * inner * row, True),
    }


@pytest.mark.parametrize(
    ("attributes", "axes"),
    [
        ("replica_groups=[2,4]<=[8]", ("fsdp",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp",)),
        ("replica_groups={}", ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", ("data", "fsdp")),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ("fsdp",)),
    ],
)
def test_groups_in_every_notation(attributes, axes):
    text = (
        "ENTRY %main (x: f32[8]) -> f32[8] {\n"
        "  %x = f32[8]{0} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} all-reduce(%x), {attributes}, to_apply=%add\n}}\n"
    )
    (found,) = collectives.find(hlo.parse(text), MESH)
    assert found.axes == axes


def test_what_is_summed_and_sliced_in_one_is_a_reduce_scatter():
    """As a TPU has it: a fusion around an all-reduce of the whole."""
    text = """
%all-reduce-scatter.1.clone (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %sum = f32[8,4]{1,0} all-reduce(%p), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add
  %part = u32[] constant(2)
  %zero = u32[] constant(0)
  ROOT %d = f32[2,4]{1,0} dynamic-slice(%sum, %part, %zero), dynamic_slice_sizes={2,4}
}

ENTRY %main (x: f32[8,4]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %fusion.3 = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone
}
"""
    (found,) = collectives.find(hlo.parse(text), MESH)
    assert (found.kind, found.axes) == ("reduce-scatter", ("fsdp",))
    assert found.bytes == 8 * 4 * 4 * 3 // 4


def test_text_that_is_not_hlo_is_refused():
    with pytest.raises(InternalError, match="no HLO"):
        hlo.parse("hello")


def test_a_scan_of_a_sharded_product_counts_as_it_runs():
    """Gathers over fsdp and sums over data of a program of our own, on 8 devices."""
    mesh = jax.make_mesh((2, 4), tuple(MESH), axis_types=(AxisType.Auto,) * 2)

    def sharded(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def f(x, w):
        replicated = NamedSharding(mesh, PartitionSpec())

        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, replicated)
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    x, w = sharded((8, 16), "data"), sharded((3, 16, 16), None, "fsdp")
    traced = jax.jit(f).trace(x, w)
    module = hlo.parse(traced.lower().compile().as_text())
    found = {(c.kind, c.axes): c for c in collectives.find(module, MESH)}
    gather = found["all-gather", ("fsdp",)]
    assert (gather.count, gather.bytes) == (3, 3 * 16 * 16 * 4 * 3 // 4)
    assert found["all-reduce", ("data",)].bytes == 4
    assert work.matmul_flops(traced.jaxpr.jaxpr) == 3 * 2 * 8 * 16 * 16


SPARSE_CORE = {
    "libtpu 0.0.42": """
  %g = ((f32[64,256]{1,0}), f32[256,256]{1,0}) call-start(%x), to_apply=%gather
  ROOT %done = f32[256,256]{1,0} call-done(%g)
""",
    "libtpu 0.0.52": """
  %g = ((), (), (s32[8192]{0:S(4)})) custom-call-start(), called_computations={%gather}
  %u = ((f32[64,256]{1,0}), f32[256,256]{1,0}) custom-call-update(%g, %x)
  ROOT %done = f32[256,256]{1,0} custom-call-done(%u)
""",
}


@pytest.mark.parametrize("lines", SPARSE_CORE.values(), ids=SPARSE_CORE)
def test_what_the_sparse_cores_gather_is_seen(lines):
    text = """
%gather (p: f32[64,256]) -> f32[256,256] {
  %p = f32[64,256]{1,0} parameter(0)
  ROOT %a = f32[256,256]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: f32[64,256]) -> f32[256,256] {
  %x = f32[64,256]{1,0} parameter(0)"""
    module = hlo.parse(text + lines + "}\n")
    (found,) = collectives.find(module, {"data": 1, "fsdp": 4})
    part = 64 * 256 * 4
    assert found == collectives.Collective(
        "all-gather", ("fsdp",), True, 1, 1, 3 * part
    )
    assert work.hbm_bytes(module) == (1 + 4) * part


def test_hbm_bytes_count_slices_and_on_chip_memory():
    text = """
%slice (p: f32[10,256], i: s32[]) -> f32[256] {
  %p = f32[10,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %d = f32[1,256]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,256}
  ROOT %b = f32[256]{0} bitcast(%d)
}

ENTRY %main (x: f32[10,256], i: s32[]) -> f32[256] {
  %x = f32[10,256]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %near = f32[256]{0:T(128)S(1)} fusion(%x, %i), kind=kLoop, calls=%slice
  ROOT %far = f32[256]{0} add(%near, %near)
}
"""
    assert work.hbm_bytes(hlo.parse(text)) == 2 * 256 * 4


def test_hbm_bytes_see_slices_within_fusions_of_fusions():
    """The backward of a scanned layer on TPUs: of what all layers keep, a product takes
    its layer's part, cut out in a fusion within; two arrays come out, of which one is
    written into what all layers keep."""
    text = """
%cut (p: f32[10,256], i: s32[]) -> f32[256] {
  %p = f32[10,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %d = f32[1,256]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,256}
  ROOT %b = f32[256]{0} bitcast(%d)
}

%layer (kept: f32[10,256], i: s32[], into: f32[10,256]) -> (f32[10,256], f32[256]) {
  %kept = f32[10,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %into = f32[10,256]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %own = f32[256]{0} fusion(%kept, %i), kind=kLoop, calls=%cut
  %twice = f32[256]{0} add(%own, %own)
  %row = f32[1,256]{1,0} bitcast(%twice)
  %all = f32[10,256]{1,0} dynamic-update-slice(%into, %row, %i, %zero)
  ROOT %both = (f32[10,256]{1,0}, f32[256]{0}) tuple(%all, %twice)
}

ENTRY %main (kept: f32[10,256], i: s32[]) -> (f32[10,256], f32[256]) {
  %kept = f32[10,256]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %into = f32[10,256]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %f = (f32[10,256]{1,0}, f32[256]{0}) fusion(%kept, %i, %into), calls=%layer
}
"""
    assert work.hbm_bytes(hlo.parse(text)) == 3 * 256 * 4


ROWS, TABLE = 4 * 256 * 4, 1000 * 256 * 4
SCATTERS = {
    "into what lies there": ("f32[1000,256]{1,0}", "bitcast(%base)", 2 * ROWS),
    "into what is new": ("f32[]", "broadcast(%base), dimensions={}", 4 + ROWS + TABLE),
}


@pytest.mark.parametrize(("shape", "into", "expected"), SCATTERS.values(), ids=SCATTERS)
def test_hbm_bytes_of_a_scatter_are_its_rows(shape, into, expected):
    text = f"""
%put (base: {shape}, rows: f32[4,256], at: s32[4]) -> f32[1000,256] {{
  %base = {shape} parameter(0)
  %all = f32[1000,256]{{1,0}} {into}
  %rows = f32[4,256]{{1,0}} parameter(1)
  %at = s32[4]{{0}} parameter(2)
  ROOT %s = f32[1000,256]{{1,0}} scatter(%all, %at, %rows), to_apply=%add
}}

ENTRY %main (base: {shape}, rows: f32[4,256], at: s32[4]) -> f32[1000,256] {{
  %base = {shape} parameter(0)
  %rows = f32[4,256]{{1,0}} parameter(1)
  %at = s32[4]{{0:S(1)}} parameter(2)
  ROOT %f = f32[1000,256]{{1,0}} fusion(%base, %rows, %at), kind=kCustom, calls=%put
}}
"""
    assert work.hbm_bytes(hlo.parse(text)) == expected


def test_hbm_bytes_of_a_slice_that_is_fetched_in_advance():
    text = """
ENTRY %main (x: f32[10,256]) -> f32[2,256] {
  %x = f32[10,256]{1,0} parameter(0)
  %begun = ((f32[10,256]{1,0}), f32[2,256]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)
  %near = f32[2,256]{1,0:S(1)} slice-done(%begun)
  ROOT %far = f32[2,256]{1,0} negate(%near)
}
"""
    assert work.hbm_bytes(hlo.parse(text)) == 2 * 2 * 256 * 4


def test_a_loop_whose_length_depends_on_data_runs_as_often_as_told():
    def f(x, n):
        return jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ y), x)

    traced = jax.jit(f).trace(jnp.ones((16, 16)), 3)
    flops = [work.matmul_flops(traced.jaxpr.jaxpr, rounds=n) for n in (1, 5)]
    assert flops == [2 * 16**3, 5 * 2 * 16**3]
    module = hlo.parse(traced.lower().compile().as_text())
    once, twice, thrice = (work.hbm_bytes(module, rounds=n) for n in (1, 2, 3))
    assert thrice - twice == twice - once >= 2 * 16 * 16 * 4


def test_bytes_of_shapes():
    shape = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[4]{0}, u32[])"
    assert hlo.shape_bytes(shape) == 12 + 16 + 4
    assert hlo.shape_bytes(shape, hbm_only=True) == 16 + 4
    assert np.isclose(hlo.shape_bytes("s4[6]{0}"), 3)
