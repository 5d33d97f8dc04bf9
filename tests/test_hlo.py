"""Reading compiled programs: collectives, how often loops run, and what must not be there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sss_jax.hlo import Program
from sss_jax.hlo_text import Instruction, main_memory, nbytes

MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
SPLIT = NamedSharding(MESH, P("data"))

ASYNCHRONOUS = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body.1 (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %v = f32[8]{0} get-tuple-element(%arg), index=1
  %ar = f32[8]{0:T(128)} all-reduce(%v), to_apply=%add, metadata={op_name="jit(step)/psum"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%v, %ar)
}

%cond.1 (arg2: (s32[], f32[8])) -> pred[] {
  %arg2 = (s32[], f32[8]{0}) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (p0: f32[8]) -> f32[64] {
  %p0 = f32[8]{0} parameter(0)
  %ags = (f32[8]{0}, f32[64]{0}) all-gather-start(%p0), dimensions={0}
  %agd = f32[64]{0} all-gather-done(%ags)
  %init = (s32[], f32[8]{0}) tuple(%p0, %p0)
  %loop = (s32[], f32[8]{0}) while(%init), body=%body.1, config={"known_trip_count":{"n":"7"}}
  %free = (s32[], f32[8]{0}) while(%loop), condition=%cond.1, body=%body.1
  ROOT %out = f32[64]{0} copy(%agd)
}
"""


def test_sizes_of_types():
    assert nbytes("f32[4,8]{1,0:T(8,128)}") == 128
    assert nbytes("(bf16[3]{0}, pred[], (s8[2,2]{1,0}, f64[1]))") == 6 + 1 + 4 + 8
    assert nbytes("token[]") == 0


def test_what_arrays_in_tiles_take_of_main_memory():
    assert main_memory("bf16[8,96]{1,0:T(8,128)(2,1)}") == 8 * 128 * 2
    assert main_memory("bf16[9,512,512,4]{0,3,2,1:T(4,128)(2,1)}") == 128 * 512 * 512 * 4 * 2
    assert main_memory("f32[5,3]{0,1:T(8,128)}") == 128 * 8 * 4
    assert main_memory("f32[100]{0:T(128)}") == 128 * 4
    in_the_core = "f32[8,128]{1,0:T(8,128)S(1)}"
    assert main_memory(f"({in_the_core}, s8[3]{{0}}, pred[])") == 3 + 1


def test_loops_and_asynchronous_exchanges():
    found = Program(ASYNCHRONOUS).collectives()
    facts = {(c.kind, c.nbytes, c.times, c.exact) for c in found}
    assert facts == {
        ("all-gather", 256, 1, True),
        ("all-reduce", 32, 7, True),
        ("all-reduce", 32, 1, False),
    }
    assert {c.source for c in found if c.kind == "all-reduce"} == {"jit(step)/psum"}


def test_loops_run_kernels_and_what_a_kernel_applies_is_none():
    costs = Program(ASYNCHRONOUS).costs()
    exchange = [(c.nbytes, c.times, c.exact) for c in costs if c.source == "jit(step)/psum"]
    given, made_in_tiles = 8 * 4, 128 * 4
    assert exchange == [(given + made_in_tiles, 7, True), (given + made_in_tiles, 1, False)]
    addition = 3 * 4
    assert addition not in {c.nbytes for c in costs}


COUNTED = """HloModule jit_step

%turn (a: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %a = (s32[], f32[8,8]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%a), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%x, %y)
}

%counts (b: (s32[], f32[8,8])) -> pred[] {
  %end = s32[]{:T(128)} constant(5), metadata={op_name="jit(step)"}
  %b = (s32[], f32[8,8]{1,0}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%b), index=0
  ROOT %lt = pred[] compare(%at, %end), direction=LT
}

%waits (c: (s32[], f32[8,8])) -> pred[] {
  %c = (s32[], f32[8,8]{1,0}) parameter(0)
  %one = s32[] get-tuple-element(%c), index=0
  %other = s32[] get-tuple-element(%c), index=0
  ROOT %lt2 = pred[] compare(%one, %other), direction=LT
}

ENTRY %main (p0: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p0 = (s32[], f32[8,8]{1,0}) parameter(0)
  %known = (s32[], f32[8,8]{1,0}) while(%p0), condition=%counts, body=%turn
  ROOT %open = (s32[], f32[8,8]{1,0}) while(%known), condition=%waits, body=%turn
}
"""


SET_ASIDE = """HloModule jit_step

ENTRY %main (p0: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  %room = f32[1024]{0} custom-call(), custom_call_target="AllocateBuffer"
  %filled = f32[8]{0} custom-call(%p0), custom_call_target="Fill"
  %start = ((f32[8]{0}), f32[8]{0}, s32[]) copy-start(%filled)
  ROOT %done = f32[8]{0} copy-done(%start)
}
"""


def test_memory_that_is_set_aside_is_no_traffic():
    costs = {c.nbytes for c in Program(SET_ASIDE).costs()}
    assert costs == {32 + 32, 32 + 32 + 32 + 4}  # what fills it, and the start of the transfer


def test_a_loop_that_counts_says_how_often_it_runs():
    products = [(c.flops, c.times, c.exact) for c in Program(COUNTED).costs() if c.flops]
    assert products == [(2 * 8**3, 5, True), (2 * 8**3, 1, False)]


@pytest.mark.parametrize(
    ("window", "given", "made"),
    [
        ("size=3 pad=1_1", 8, 8),
        ("size=3 stride=2 pad=1_1", 8, 4),
        ("size=8 pad=7_7 rhs_reversal=1", 1, 8),
        ("size=3 pad=2_2 rhs_dilate=2", 8, 8),
        ("size=6 stride=5 lhs_dilate=6", 6, 6),
        ("size=4 pad=3_0", 5, 5),
    ],
)
def test_a_convolution_counts_what_meets_the_input(window, given, made):
    kernel = int(window.split()[0].removeprefix("size="))
    text = f"""HloModule conv

ENTRY %main (x: f32[2,{given},3], k: f32[{kernel},3,5]) -> f32[2,{made},5] {{
  %x = f32[2,{given},3]{{2,1,0}} parameter(0)
  %k = f32[{kernel},3,5]{{2,1,0}} parameter(1)
  ROOT %y = f32[2,{made},5] convolution(%x, %k), window={{{window}}}, dim_labels=b0f_0io->b0f
}}
"""
    facts = dict(pair.split("=") for pair in window.split())
    stride, hole, step = (int(facts.get(n, 1)) for n in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(facts.get("pad", "0_0").split("_")[0])
    places = {i * hole for i in range(given)}
    meets = sum(
        o * stride + tap * step - before in places for o in range(made) for tap in range(kernel)
    )
    (cost,) = (c for c in Program(text).costs() if c.flops)
    assert cost.flops == 2 * 2 * 3 * 5 * meets


@pytest.mark.parametrize(
    ("call", "first", "second", "result"),
    [
        ("Forward", "image", "kernel", "map"),
        ("BiasActivationForward", "image", "kernel", "map"),
        ("BackwardInput", "map", "kernel", "image"),
        ("BackwardFilter", "image", "map", "kernel"),
    ],
)
def test_convolutions_of_cudnn_count_like_what_they_belong_to(call, first, second, result):
    arrays = {"image": "bf16[2,9,9,3]", "kernel": "bf16[5,3,3,3]", "map": "bf16[2,4,4,5]"}
    text = f"""HloModule conv

ENTRY %main (x: {arrays[first]}, k: {arrays[second]}) -> {arrays[result]} {{
  %x = {arrays[first]}{{3,2,1,0}} parameter(0)
  %k = {arrays[second]}{{3,2,1,0}} parameter(1)
  %y = ({arrays[result]}{{3,2,1,0}}, u8[64]{{0}}) custom-call(%x, %k), \
 window={{size=3x3 stride=2x2}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{call}"
  ROOT %out = {arrays[result]}{{3,2,1,0}} get-tuple-element(%y), index=0
}}
"""
    (cost,) = Program(text).costs()
    assert cost.flops == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)


CALLS = """HloModule m

ENTRY %main (p0: f32[9,8,32], p1: f32[9,32,64]) -> f32[9,8,64] {
  %p0 = f32[9,8,32]{2,1,0} parameter(0)
  %p1 = f32[9,32,64]{2,1,0} parameter(1)
  %y = (f32[9,8,64]{2,1,0}, s8[33554432]{0}) custom-call(%p0, %p1), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]},"precision_config":{"operand_precision":["DEFAULT","HIGHEST"]}}}
  ROOT %out = f32[9,8,64]{2,1,0} get-tuple-element(%y), index=0
}
"""  # noqa: E501


def test_products_of_cublas_count_like_products_and_not_what_it_works_in():
    (cost,) = Program(CALLS).costs()
    assert cost.flops == 2 * 9 * 8 * 64 * 32
    assert cost.nbytes == 4 * 9 * (8 * 32 + 32 * 64 + 8 * 64)
    assert Program(CALLS).products() == {("f32 x f32", "highest"): cost.flops}


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("attention_forward", 16 + 32),
        ("attention_backward_queries", 2 * 16 + 32),
        ("attention_backward_keys", 2 * 16 + 2 * 32),
    ],
)
def test_our_attention_on_gpus_counts_by_its_name(name, channels):
    text = f"""HloModule m

ENTRY %main (q: bf16[3,8,16], k: bf16[3,24,16], v: bf16[3,24,32]) -> bf16[3,8,32] {{
  %q = bf16[3,8,16]{{2,1,0}} parameter(0)
  %k = bf16[3,24,16]{{2,1,0}} parameter(1)
  %v = bf16[3,24,32]{{2,1,0}} parameter(2)
  ROOT %y = bf16[3,8,32]{{2,1,0}} custom-call(%q, %k, %v), \
custom_call_target="__gpu$xla.gpu.triton", \
backend_config={{grid_x = 64 : i32, ir = "ML", name = "{name}", num_stages = 2 : i32}}
}}
"""
    (cost,) = Program(text).costs()
    assert cost.flops == 2 * 3 * 8 * 24 * channels


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("module @jit_step {}")


def compiled(function, *args, shardings):
    return Program(jax.jit(function, in_shardings=shardings).lower(*args).compile().as_text())


def test_a_compiled_program_with_a_loop():
    def local(x):
        def turn(carry, _):
            return jax.lax.psum(carry, "data") / 8, None

        return jax.lax.scan(turn, x, None, length=6)[0]

    over = jax.shard_map(local, mesh=MESH, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    program = compiled(over, jnp.ones((16, 4)), shardings=SPLIT)
    (found,) = program.collectives()
    assert found.kind == "all-reduce"
    assert found.nbytes == 2 * 4 * 4
    assert found.times in (1, 6), "once in the text, or as often as the loop runs"
    assert found.exact == (found.times == 6)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0},{1},{2}}, to_apply=%add", 1),
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", 2),
        ("replica_groups={{0,1,2,3}}", 4),
        ("replica_groups=[8,1]<=[8], use_global_device_ids=true", 1),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", 4),
        ("replica_groups={}, to_apply=%add", None),
        ("source_target_pairs={{0,1},{1,0}}", None),
    ],
)
def test_how_many_exchange_with_each_other(groups, size):
    line = Instruction("x", "f32[4]", "all-reduce", f"%y), channel_id=1, {groups}")
    assert line.group == size


@pytest.mark.parametrize("devices", [1, 2])
def test_a_sum_over_one_device_is_no_exchange(devices):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((8 // devices, devices), ("others", "mine"), axis_types=auto)
    sum_up = jax.shard_map(
        lambda x: jax.lax.psum(x, "mine"), mesh=mesh, in_specs=P("others"), out_specs=P("others")
    )
    program = compiled(sum_up, jnp.ones((8, 4)), shardings=NamedSharding(mesh, P("others")))
    assert len(program.collectives()) == (devices > 1)


def test_callbacks_and_types_are_seen():
    def shouts(x):
        jax.debug.callback(lambda v: None, x)
        return x * 2

    quiet = Program(jax.jit(lambda x: x * 2).lower(np.ones(3, np.float32)).compile().as_text())
    loud = Program(jax.jit(shouts).lower(np.ones(3, np.float32)).compile().as_text())
    assert quiet.host_calls() == []
    assert loud.host_calls()
    assert "f32" in quiet.types()
    assert "f64" not in quiet.types()


def test_a_kernel_of_our_own_says_what_it_takes_but_no_less_than_its_arrays():
    call = """HloModule m

ENTRY %main (p0: bf16[8,128]) -> bf16[8,128] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  ROOT %k = bf16[8,128]{1,0} custom-call(%p0), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUz","cost_estimate":{"flops":"235","transcendentals":"13","bytes_accessed":"BYTES","remote_bytes_transferred":"0"}}}
}
"""  # noqa: E501
    arrays = 2 * 8 * 128 * 2
    for said, counted in ((9999, 9999), (617, arrays)):
        (cost,) = Program(call.replace("BYTES", str(said))).costs()
        assert (cost.flops, cost.nbytes) == (235, counted)


def test_a_kernel_of_our_own_multiplies_its_matrices():
    call = """HloModule m

ENTRY %main (p0: bf16[4,8,128], p1: f32[1,128], p2: bf16[128,64], p3: f32[64]) -> bf16[4,8,64] {
  %p0 = bf16[4,8,128]{2,1,0} parameter(0)
  %p1 = f32[1,128]{1,0} parameter(1)
  %p2 = bf16[128,64]{1,0} parameter(2)
  %p3 = f32[64]{0} parameter(3)
  ROOT %k = bf16[4,8,64]{2,1,0} custom-call(%p0, %p3, %p1, %p2), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUz","cost_estimate":{"flops":"235","transcendentals":"13","bytes_accessed":"617","remote_bytes_transferred":"0"}}}
}
"""  # noqa: E501
    assert Program(call).products() == {("bf16 x bf16", "default"): 235}


SLICES = """HloModule m

%fused (p: f32[7,64], q: f32[64], r: f32[7,64], i: s32[]) -> (f32[7,64], f32[64]) {
  %p = f32[7,64]{1,0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %r = f32[7,64]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %zero = s32[] constant(0)
  %seen = f32[7,64]{1,0} bitcast(%r)
  %slice = f32[1,64]{1,0} dynamic-slice(%seen, %i, %zero), dynamic_slice_sizes={1,64}
  %row = f32[1,64]{1,0} bitcast(%q)
  %updated = f32[7,64]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
  %sum = f32[64]{0} bitcast(%slice)
  ROOT %both = (f32[7,64]{1,0}, f32[64]{0}) tuple(%updated, %sum)
}

ENTRY %main (p0: f32[7,64], p1: f32[64], p2: f32[7,64], p3: s32[]) -> (f32[7,64], f32[64]) {
  %p0 = f32[7,64]{1,0} parameter(0)
  %p1 = f32[64]{0} parameter(1)
  %p2 = f32[7,64]{1,0} parameter(2)
  %p3 = s32[] parameter(3)
  ROOT %f = (f32[7,64]{1,0}, f32[64]{0}) fusion(%p0, %p1, %p2, %p3), kind=kLoop, calls=%fused
}
"""


def test_of_what_is_sliced_or_updated_in_place_only_the_slice_moves():
    row, index = 4 * 64, 4
    (cost,) = Program(SLICES).costs()
    # Read: the new row, the slice, the index. Written: the updated row, the copied slice.
    assert cost.nbytes == 2 * row + index + 2 * row


IN_TILES = """HloModule m

%fused (p: bf16[32,96], q: bf16[8,96], i: s32[]) -> bf16[32,96] {
  %p = bf16[32,96]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[8,96]{1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %was = bf16[8,96]{1,0:T(8,128)(2,1)} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={8,96}
  %sum = bf16[8,96]{1,0:T(8,128)(2,1)} add(%was, %q)
  ROOT %new = bf16[32,96]{1,0:T(8,128)(2,1)} dynamic-update-slice(%p, %sum, %i, %zero)
}

ENTRY %main (p0: bf16[32,96], p1: bf16[8,96], p2: s32[]) -> bf16[32,96] {
  %p0 = bf16[32,96]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[8,96]{1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %f = bf16[32,96]{1,0:T(8,128)(2,1)} fusion(%p0, %p1, %p2), kind=kLoop, calls=%fused
}
"""


def test_slices_of_what_lies_in_tiles_are_tiles():
    (cost,) = Program(IN_TILES).costs()
    was = given = written = 8 * 128 * 2
    assert cost.nbytes == was + given + written + 4


def test_a_parameter_that_is_also_read_whole_counts_whole():
    text = SLICES.replace(
        "%sum = f32[64]{0} bitcast(%slice)", "%sum = f32[64]{0} reduce(%r, %zero)"
    )
    (cost,) = Program(text).costs()
    assert cost.nbytes == 4 * (64 + 7 * 64 + 1) + 2 * 4 * 64


def test_products_by_what_they_multiply():
    def step(x, y, z):
        def turn(carry, _):
            return jnp.matmul(carry, y, precision="default").astype(jnp.bfloat16), None

        low, _ = jax.lax.scan(turn, x, None, length=5)
        return low, jnp.matmul(z, z, precision="highest")

    low, high = jnp.ones((8, 8), jnp.bfloat16), jnp.ones((4, 4))
    text = jax.jit(step).lower(low, low, high).compile().as_text()
    found = Program(text).products()
    assert found[("f32 x f32", "highest")] == 2 * 4**3
    # CPUs widen bfloat16 before they multiply; TPUs do not.
    assert sum(found.values()) == 2 * 4**3 + 5 * 2 * 8**3


def test_one_precise_operand_makes_a_product_precise():
    text = """HloModule m

ENTRY %main (p0: bf16[8,4], p1: f32[4,2]) -> f32[8,2] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = f32[4,2]{1,0} parameter(1)
  ROOT %d = f32[8,2]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={default,highest}
}
"""  # noqa: E501
    assert Program(text).products() == {("bf16 x f32", "highest"): 2 * 8 * 4 * 2}
