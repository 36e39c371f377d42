"""Reading compiled programs: hand-made ones, whose numbers can be checked by eye, and a stored real one."""

import lzma
import textwrap
from pathlib import Path

import numpy as np
import pytest

from cogvideox_jax.plan import hlo

STORED = Path(__file__).with_name("tiny_v5p-8.txt.xz")


def cycles(count: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


def module(text: str, partitions: int = 8) -> hlo.Module:
    return hlo.parse(f"HloModule jit_f, is_scheduled=true, num_partitions={partitions}\n\n" + textwrap.dedent(text))


LOOP = f"""
    %body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
      %p = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) parameter(0)
      %x = f32[8]{{0:T(256)}} get-tuple-element(%p), index=1
      %work = f32[8]{{0:T(256)}} fusion(%x), kind=kLoop, calls=%inner, {cycles(100)}
      ROOT %out = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) tuple(%x, %work)
    }}

    %inner (a: f32[8]) -> f32[8] {{
      %a = f32[8]{{0}} parameter(0)
      ROOT %c = f32[8]{{0}} convolution(%a, %a), {cycles(7)}
    }}

    %cond (p: (s32[], f32[8])) -> pred[] {{
      %p = (s32[], f32[8]{{0}}) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      %bound = s32[]{{:T(128)}} constant(42)
      ROOT %lt = pred[] compare(%i, %bound), direction=LT
    }}

    ENTRY %main (a: f32[8]) -> f32[8] {{
      %a = f32[8]{{0}} parameter(0)
      %before = f32[8]{{0}} copy(%a), {cycles(5)}
      %loop = (s32[], f32[8]{{0}}) while(%t), condition=%cond, body=%body
      ROOT %r = f32[8]{{0}} get-tuple-element(%loop), index=1
    }}
"""


def test_a_loop_counts_as_often_as_it_runs():
    before, loop = hlo.schedule(module(LOOP))
    assert isinstance(before, hlo.Compute)
    assert (before.cycles, before.category) == (5, "copy")
    assert isinstance(loop, hlo.Loop)
    assert loop.trips == 42
    (work,) = loop.body
    # what is inside of the fusion is part of its estimate
    assert (work.cycles, work.category) == (100, "matmul")


def test_a_known_trip_count_goes_before_the_condition():
    text = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.schedule(module(text))[1].trips == 3


def test_a_loop_without_a_bound_is_an_error():
    with pytest.raises(ValueError, match="no trip count of loop"):
        hlo.schedule(module(LOOP.replace("constant(42)", "parameter(1)")))


def test_what_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


def test_a_pallas_call_may_go_over_several_lines():
    text = f"""
        ENTRY %main (q: bf16[4,128,64]) -> bf16[4,128,64] {{
          %q = bf16[4,128,64]{{2,1,0}} parameter(0)
          %splash_mha_fwd.1 = (bf16[4,128,64]{{2,1,0}}, f32[4,128]{{1,0}}) custom-call(%q, %q), custom_call_target="tpu_custom_call", kernel_metadata={{
        {{"xprof_metadata": "{{}}"}}
        }}, metadata={{op_name="jit(f)/splash_mha_fwd"}}
          ROOT %after = bf16[4,128,64]{{2,1,0}} copy(%q), {cycles(9)}
        }}
    """  # noqa: E501
    kernel, after = hlo.schedule(module(text))
    assert isinstance(kernel, hlo.Kernel)
    assert kernel.name == "splash_mha_fwd"
    assert kernel.instruction.op_name == "jit(f)/splash_mha_fwd"
    assert kernel.operand_shapes == ("bf16[4,128,64]{2,1,0}",) * 2
    assert after.cycles == 9


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0:T(8,128)}", 24),
        ("(bf16[4]{0}, /*index=1*/token[], pred[], s4[6])", 8 + 1 + 3),
        ("f8e4m3fn[10]", 10),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.shape_bytes(shape) == size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, use", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_replica_groups(text, expected):
    found = hlo.groups(f"channel_id=1, {text}, more", 8)
    assert sorted(map(tuple, found)) == sorted(map(tuple, np.array(expected)))


def instruction(line: str) -> hlo.Instruction:
    return module(f"ENTRY %main () -> f32[] {{\n  {line}\n}}").computations["main"][0]


GROUPS = "channel_id=1, replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("line", "kind", "wire", "mode"),
    [
        # 800 bytes in groups of four
        (f"%g = f32[200] all-gather(%x), {GROUPS}", "all-gather", 600, "sync"),
        (f"%g = (f32[50], f32[200]) all-gather-start(%x), {GROUPS}", "all-gather", 600, "async"),
        (f"%g = f32[200] all-reduce(%x), {GROUPS}", "all-reduce", 1200, "sync"),
        (f"%g = (f32[100], f32[100]) all-reduce(%x, %y), {GROUPS}", "all-reduce", 1200, "sync"),
        (f"%g = f32[50] reduce-scatter(%x), {GROUPS}", "reduce-scatter", 600, "sync"),
        (f"%g = (f32[200], f32[50]) reduce-scatter-start(%x), {GROUPS}", "reduce-scatter", 600, "async"),
        (f"%g = f32[200] all-to-all(%x), {GROUPS}", "all-to-all", 600, "sync"),
        ("%g = f32[200] collective-permute(%x), source_target_pairs={{0,1},{1,2}}", "collective-permute", 800, "sync"),
        (
            "%g = (f32[200], f32[200], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,2}}",
            "collective-permute",
            804,
            "async",
        ),
    ],
)
def test_bytes_on_the_wire(line, kind, wire, mode):
    found = hlo.collective(instruction(line), 8, 1, "sync")
    assert found is not None
    assert (found.kind, found.wire_bytes, found.mode, found.slices) == (kind, wire, mode, 1)


def test_groups_that_span_slices():
    line = "%g = f32[200] all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0)"
    assert hlo.collective(instruction(line), 8, 2, "sync").slices == 2
    assert hlo.collective(instruction(line.replace("<=[2,4]T(1,0)", "<=[8]")), 8, 2, "sync").slices == 1


def test_an_exchange_on_the_sparsecore_lasts_from_its_start_to_its_done():
    text = f"""
        %sc (a: f32[200]) -> f32[200] {{
          %a = f32[200]{{0}} parameter(0)
          ROOT %all-reduce.1 = f32[200]{{0}} all-reduce(%a), {GROUPS}
        }}, execution_thread="sparsecore"

        ENTRY %main (a: f32[200]) -> f32[200] {{
          %a = f32[200]{{0}} parameter(0)
          %begin = ((f32[200]{{0}}, token[]), f32[200]{{0}}) call-start(%a), async_execution_thread="sparsecore", to_apply=%sc
          %work = f32[200]{{0}} negate(%a), {cycles(11)}
          ROOT %end = f32[200]{{0}} call-done(%begin)
        }}
    """
    start, work, done = hlo.schedule(module(text))
    assert (start.collective.mode, start.collective.wire_bytes, start.key) == ("sparsecore", 1200, "begin")
    assert work.cycles == 11
    assert done == hlo.Done("begin")


def test_fusions_that_repeat_an_exchange_are_one():
    fused = "\n".join(
        f"""
        %part{i} (a: f32[50]) -> f32[200] {{
          %a = f32[50]{{0}} parameter(0)
          ROOT %gather{i} = f32[200]{{0}} all-gather(%a), {GROUPS}
        }}
        """
        for i in range(3)
    )
    calls = "\n".join(f"          %f{i} = f32[200]{{0}} fusion(%a), calls=%part{i}, {cycles(10)}" for i in range(3))
    text = textwrap.dedent(fused) + f"\nENTRY %main (a: f32[50]) -> f32[200] {{\n{calls}\n}}\n"
    events = hlo.schedule(module(text))
    assert [type(event).__name__ for event in events] == ["Exchange", "Compute", "Compute", "Compute", "Done"]
    assert (events[0].collective.mode, events[0].collective.wire_bytes) == ("fused", 600)
    # another channel is another exchange
    other = text.replace("channel_id=1", "channel_id=2", 1)
    assert sum(isinstance(event, hlo.Exchange) for event in hlo.schedule(module(other))) == 2


def test_bytes_in_hbm_are_those_outside_of_vmem():
    text = f"""
        ENTRY %main (a: f32[200], b: bf16[100]) -> f32[200] {{
          %a = f32[200]{{0:T(256)}} parameter(0)
          %b = bf16[100]{{0:T(256)(2,1)S(1)}} parameter(1)
          %c = (f32[200]{{0:T(256)S(1)}}, bf16[10]{{0}}) fusion(%a, %b), kind=kLoop, calls=%none, {cycles(3)}
        }}
    """
    (work,) = hlo.schedule(module(text))
    assert work.hbm_bytes == 800 + 20


def test_copies_to_the_host():
    text = """
        ENTRY %main (a: f32[200]) -> f32[200] {
          %a = f32[200]{0} parameter(0)
          %start = (f32[200]{0:S(5)}, f32[200]{0}, u32[]) copy-start(%a)
          %done = f32[200]{0:S(5)} copy-done(%start)
          %back = f32[200]{0} copy(%done)
        }
    """
    events = [event for event in hlo.schedule(module(text)) if not isinstance(event, hlo.Done)]
    assert events == [hlo.HostCopy(802), hlo.HostCopy(800)]


def test_a_real_program():
    """The tiny transformer's training step on v5p-8: four layers in two scans, with kernels and offloaded exchanges."""
    events = hlo.schedule(hlo.parse(lzma.decompress(STORED.read_bytes()).decode()))
    flat = list(_flat(events))
    assert [event.trips for event, _ in flat if isinstance(event, hlo.Loop)] == [4, 4]
    kernels = {event.name: trips for event, trips in flat if isinstance(event, hlo.Kernel)}
    assert kernels == {"splash_mha_fwd_segmented_residuals": 4, "splash_mha_dkv_segmented_no_residuals": 4}
    exchanges = [event for event, _ in flat if isinstance(event, hlo.Exchange)]
    assert {event.collective.mode for event in exchanges} == {"sync", "async", "sparsecore"}
    # whatever starts ends
    assert {event.key for event in exchanges if event.key} <= {
        event.key for event, _ in flat if isinstance(event, hlo.Done)
    }
    # counted with grep: the entry's cycles and four times each body's
    total = sum(event.cycles * trips for event, trips in flat if isinstance(event, hlo.Compute))
    assert total == 655317 + 4 * (283048 + 300947)


def _flat(events, trips=1):
    for event in events:
        if isinstance(event, hlo.Loop):
            yield event, event.trips
            yield from _flat(event.body, trips * event.trips)
        else:
            yield event, trips
