"""The cycle model of target lut alone: hand-derived ticks, laws, and that folding changes nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inner import called
from tilewright.arch import lut as arch
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program, Segment
from tilewright.arch.lut import ISA, LutSpec
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.sim import lut as sim
from tilewright.sim.lut import simulate
from tilewright.verify import engine
from tilewright.verify import lut as plan


def preset(*sets):
    return build(LutSpec, apply_sets(load_tree("lut-a100-4x", ["lut"]), sets), "test")


def core(*sets):
    """A line a tick from L2 after 2 ticks, every third tick from DRAM after 5; a row is 4 lines, a tile 16."""
    return preset(
        "clock_mhz=1000", "sms=1", "cores_per_sm=1", "lut.n=4", "lut.arrays=1", "memory.dram_bytes=1024",
        "buffers.table_rows=16", "buffers.weight_lines=64", "buffers.result_tiles=8", "buffers.queue_depth=4",
        "memory.lines_in_flight=64", "memory.dram_efficiency=1", "memory.dram_gb_per_s=2/3",
        "memory.l2_bytes_per_clock=2", "memory.dram_latency_ns=5", "memory.l2_latency_ns=2",
        "ordinary.efficiency=1", "ordinary.vector_tops=0.004", "ordinary.launch_us=0.01", *sets,
    )  # fmt: skip


CORE = core()


def run(text, spec=CORE, **options):
    return simulate(spec.params(), ISA.assemble(text), **options)


def spans(timeline):
    return [(int(r["first"]), int(r["end"])) for r in timeline.spans]


def nonzero(counts):
    return {name: n for name, n in counts.items() if n}


def integers(timeline) -> dict:
    """Everything a Timeline says, as plain numbers."""
    return {
        "ticks": timeline.ticks,
        "spans": timeline.spans.tolist(),
        "counters": timeline.counters.tolist(),
        "activity": timeline.activity.tolist(),
    }


# ---- by hand ------------------------------------------------------------------------------------------


def test_params_of_the_core():
    p = CORE.params()
    assert (p.rows, p.row_lines, p.tile_lines, p.entries, p.entry_bits) == (2, 4, 16, 8, 11)
    assert (p.load_drain, p.compute_drain) == (3, 6)
    assert (p.rate_p.tolist(), p.rate_q.tolist(), p.latency.tolist()) == ([1, 1], [3, 1], [5, 2])


def test_load_multiply_store_by_hand():
    """Dispatched in ticks 0 to 3. Row from L2: asked for in 1..4, the last arrives at 6, complete 3 later at 9. Weights
    from DRAM, ticks 6 and 9 (5 is no multiple of 3): the last arrives at 14, complete at 17. 2 planes x 1 group:
    17 and 18; complete 6 after 18: 24. Store: fetch at 24, lines at 25..40 to L2, complete 2 + 1 later: 43.
    The sequencer's last tick is 43."""
    t = run("LOAD_A level=l2 tag=a\nLOAD_W count=2 tag=w\nLMMA bits=2 tag=m\nSTORE level=l2 line=100 tag=s")
    assert spans(t) == [(1, 9), (6, 17), (17, 24), (24, 43)]
    assert t.ticks == 44
    assert nonzero(t.unit("sequencer")) == {"busy": 5, "drain": 39}
    # It waits for one after the other: 1 + 5 ticks for a (4 to 8), 1 + 8, 1 + 7, 1 + 19; the last is nobody's.
    assert t.activity[:, 0].sum(axis=1).tolist() == [6, 9, 8, 20, 1]
    # Asked in 1..4, 6 and 9; 5, 7 and 8 are DRAM's pace; then all is under way until 16.
    assert nonzero(t.unit("load")) == {"busy": 6, "rate": 3, "drain": 7, "idle": 1 + 27}
    # Nothing is known of the LMMA before tick 3.
    assert nonzero(t.unit("compute")) == {"operands": 14, "busy": 2, "drain": 5, "idle": 3 + 20}
    assert nonzero(t.unit("store")) == {"operands": 20, "fetch": 1, "busy": 16, "drain": 2, "idle": 4 + 1}
    assert nonzero(t.unit("ordinary")) == {"idle": 44}
    moved = {"dram_lines": 2, "l2_lines": 4, "l2_stores": 16}
    worked = {"table_rows": 1, "table_reads": 1, "planes": 2, "result_tiles": 1}
    assert nonzero(t.totals()) == moved | worked


def test_lines_arrive_in_order():
    """A DRAM line asked for at 3 arrives at 8; L2 lines asked for at 4, 5, 6 follow at 9, 10, 11, not at 6, 7, 8."""
    t = run("LOAD_W tag=d\nLOAD_W half=1 count=3 level=l2 tag=l")
    assert spans(t) == [(3, 8 + 3), (4, 11 + 3)]


def test_two_lmmas_leave_no_gap():
    """1 x 2 x 3 x 2 = 12 planes from 1 to 12; the next, dispatched at 1, from 13 to 16."""
    t = run("LMMA n_tiles=2 groups=3 bits=2 tag=a\nLMMA groups=4 accumulate=1 tag=b")
    assert spans(t) == [(1, 12 + 6), (13, 16 + 6)]


def test_a_half_is_released_when_its_reader_is_complete():
    """LMMA 1..3, complete at 9. Weights to the other half need not wait, those to its own ask from 9 on."""
    t = run("LMMA groups=3 tag=m\nLOAD_W half=1 level=l2 tag=o\nLOAD_W half=0 level=l2 tag=w")
    assert spans(t) == [(1, 9), (2, 7), (9, 14)]
    assert t.unit("load")["release"] == 6  # ticks 3 to 8


def test_a_result_is_not_overwritten_while_it_is_stored():
    """Store: fetch 1, lines 2..17, complete at 20. The LMMA into its half begins then, one into the other at once."""
    t = run("STORE level=l2 tag=s\nLMMA result=1 tag=o\nLMMA result=0 tag=m")
    assert spans(t) == [(1, 20), (2, 8), (20, 26)]
    assert t.unit("compute")["release"] == 17  # ticks 3 to 19


def test_memory_is_read_after_it_is_written_and_written_after_it_is_read():
    """The store of lines 0..15 is complete at 20: line 15 is asked for then, line 16 at 21, after it, in order.
    The second store overlaps that load, complete at 21 + 2 + 3 = 26 as it has two lines: fetch at 26."""
    t = run("STORE level=l2 tag=s\nLOAD_W line=15 count=2 level=l2 tag=l\nSTORE level=l2 line=16 tag=t")
    assert spans(t) == [(1, 20), (20, 26), (26, 26 + 16 + 3)]
    # A store of lines that no load touches begins after the first is through: fetch at 18.
    t = run("STORE level=l2 tag=s\nLOAD_W line=15 count=2 level=l2 tag=l\nSTORE level=l2 line=17 tag=t")
    assert spans(t) == [(1, 20), (20, 26), (18, 18 + 16 + 3)]


def test_a_full_queue_holds_the_sequencer():
    """One instruction a unit: the first LMMA, dispatched at 0, is complete at 7; the second is dispatched then."""
    t = run("LMMA tag=a\nLMMA tag=b", core("buffers.queue_depth=1"))
    assert spans(t) == [(1, 7), (8, 14)]
    assert nonzero(t.unit("sequencer")) == {"busy": 3, "queue": 6, "drain": 6}


def test_arrival():
    t = run("LMMA not_before=10 tag=a")
    assert spans(t) == [(11, 17)]
    assert nonzero(t.unit("sequencer")) == {"arrival": 10, "busy": 2, "drain": 6}


def test_ordinary_work_by_hand():
    """The LMMA is complete at 7: dispatched at 7, it begins at 8. Launch 10 ns; 4 operations a tick: 40 take 10 ticks;
    30 bytes at 2/3 a tick take 45. So it ends at 8 + 10 + 45 = 63, when the next LMMA is dispatched."""
    t = run("LMMA tag=a\nORDINARY operations=40 bytes=30 tag=o\nLMMA tag=b")
    assert spans(t) == [(1, 7), (8, 63), (64, 70)]
    assert nonzero(t.unit("ordinary")) == {"launch": 10, "busy": 10, "rate": 35, "idle": 8 + 8}
    assert nonzero(t.unit("sequencer")) == {"busy": 4, "wait": 6 + 55, "drain": 6}
    assert t.counter("vector_ops") == 40 and t.counter("ordinary_dram_bytes") == 30


def test_ordinary_work_alongside():
    """Dispatched at 1, at work 2..61; the next one follows it, the LMMA between does not wait."""
    text = "LMMA tag=a\nORDINARY operations=40 bytes=30 alongside=1 tag=o\nLMMA tag=b\nORDINARY alongside=1 tag=p"
    assert spans(run(text)) == [(1, 7), (2, 57), (3, 9), (58, 68)]


def test_an_empty_program_takes_one_tick():
    t = run("# nothing\n")
    assert t.ticks == 1 and nonzero(t.unit("sequencer")) == {"busy": 1}


# ---- the presets --------------------------------------------------------------------------------------


def test_the_presets_reach_the_published_peaks():
    """Table 1 prints 1248 and 2496 TOPs for two-bit weights: cores * lanes * 2 / bits * 1.41 GHz."""
    for name, published in (("lut-a100-4x", 1248), ("lut-a100-8x", 2496)):
        spec = build(LutSpec, load_tree(name, ["lut"]), name)
        p = spec.params()
        tops = spec.cores * p.rows * p.n * p.k * 2 / spec.lut.weight_bits * float(spec.clock_mhz) / 1e6
        assert tops == pytest.approx(published, rel=1e-3)


def test_a_half_of_work_is_bound_by_the_arrays_or_by_memory():
    p = preset().params()
    many = "LOAD_W half={0} count=256 level={1}\nLMMA weight={0} m_tiles={2} n_tiles=16 groups=8 bits=2\n"
    text = "".join(many.format(i % 2, "l2", 1) for i in range(20))
    assert simulate(p, ISA.assemble(text)).binding() == ("load", "rate")
    text = "".join(many.format(i % 2, "l2", 1) + "LMMA n_tiles=16 groups=8 bits=2\n" * 6 for i in range(20))
    assert simulate(p, ISA.assemble(text)).binding() == ("compute", "")


def test_energy_is_that_of_the_whole_device():
    """One plane on 432 cores of 4 arrays of 512 lanes: 432 * 4 * 16.22 pJ."""
    spec = preset()
    rows = {r.name: r for r in arch.energy(spec)}
    assert float(rows["lookup arrays"].pj) == pytest.approx(432 * 4 * 16.22)
    # 60 W for 1 / 1.41 GHz.
    assert float(rows["background"].pj) == pytest.approx(60e12 / 1.41e9)
    assert {r.basis for r in rows.values()} <= {"ticks", *arch.COUNTERS, *arch.ORDINARY_COUNTERS}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["lut.accumulator=fp16"],
            "accumulator must be int32 with activation int8 and table exact, not fp16",
        ),
        (["lut.table=int8"], "accumulator must be fp32 with activation int8 and table int8, not int32"),
        (["lut.weight_bits=3", "lut.max_weight_bits=2"], "weight_bits 3 exceeds lut.max_weight_bits 2"),
        (["lut.n=3"], "lut.n 3 . lut.k 4 must be a multiple of 8"),
        (["buffers.table_rows=4096"], "more than memory.shared_bytes_per_sm 167936"),
        (
            ["memory.lines_in_flight=20"],
            "lines_in_flight must be at least 192 for these rates and latencies, not 20",
        ),
        (["clock_mhz=1410.000000001"], "memory.dram_gb_per_s comes to .* choose a rounder one"),
        (["memory.dram_latency_ns=100000"], "memory.dram_latency_ns is 141000 ticks; at most 65535"),
        (["memory.dram_bytes=1"], "memory.dram_bytes 1 must hold"),
    ],
)
def test_mistakes_in_a_spec_are_named(sets, message):
    with pytest.raises(UserError, match=message):
        preset(*sets)


def test_what_reaches_outside_is_refused():
    with pytest.raises(
        ValueError, match=r"segment 0, instruction 1 \(STORE\): base, count reach beyond the 8 tiles"
    ):
        run("LMMA\nSTORE count=9")


# ---- laws ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(t=st.integers(0, 1 << 45), p=st.integers(1, 1 << 30), extra=st.integers(0, 1 << 30))
def test_the_next_working_tick(t, p, extra):
    q = p + extra
    found = int(called(sim.next_working)(t, p, q))
    assert found >= t and found * p % q < p
    # No tick between works: the phase grows by p a tick and has not come around.
    assert found == t or (t * p % q >= p and t * p % q + (found - 1 - t) * p < q)


def random_case(structure, number, seed):
    case = plan.case(plan.structures(plan.STRUCTURES, 0)[structure], number, (seed,))
    return case.spec, ISA.assemble(case.text)


CASES = st.tuples(st.integers(0, plan.STRUCTURES - 1), st.integers(0, 40), st.integers(0, 1 << 20))


@settings(deadline=None, max_examples=60)
@given(chosen=CASES)
def test_folding_changes_nothing(chosen):
    spec, program = random_case(*chosen)
    p = spec.params()
    repeated = Program(ISA, [Segment(s.regions, 9) for s in program.segments], program.tags)
    for work in (program, repeated):
        assert integers(simulate(p, work, fold=False)) == integers(simulate(p, work))


@settings(deadline=None, max_examples=40)
@given(chosen=CASES, trace=st.integers(0, 40))
def test_every_tick_is_accounted_for(chosen, trace):
    """The Timeline itself checks that busy and stalls add up; a trace changes nothing."""
    spec, program = random_case(*chosen)
    timeline = simulate(spec.params(), program)
    assert plan.referee(spec, timeline) is None
    assert (timeline.activity >= 0).all()
    traced = simulate(spec.params(), program, trace=trace)
    assert integers(traced) == integers(timeline)
    assert traced.log is None if trace == 0 else len(traced.log) <= trace


def _halves(f):
    """What an instruction reads, and what it writes: halves of buffers, as (buffer, half)."""
    op = arch.OPS[f["op"]].name
    if op == "LMMA":
        return {("a", f["table"]), ("w", f["weight"])}, {("r", f["result"])}
    if op == "STORE":
        return {("r", f["half"])}, set()
    return set(), {("a" if op == "LOAD_A" else "w", f["half"])}


@settings(deadline=None, max_examples=40)
@given(chosen=CASES)
def test_no_instruction_begins_before_what_it_conflicts_with_is_complete(chosen):
    """For every pair of different units, by its fields alone; within a unit instructions end in order."""
    spec, program = random_case(*chosen)
    p = spec.params()
    steps = engine.one_by_one(program)
    code = steps.segments[0].regions["code"]
    rows = simulate(p, steps, trace=len(code)).log
    lines = {"LOAD_A": p.row_lines, "LOAD_W": 1, "STORE": p.tile_lines}
    for j in range(len(code)):
        b = {name: int(code[name][j]) for name in code.dtype.names}
        assert rows["first"][j] >= b["not_before"] and rows["start"][j] > rows["first"][j]
        for i in range(j):
            a = {name: int(code[name][i]) for name in code.dtype.names}
            if arch.UNIT_OF[a["op"]] == arch.UNIT_OF[b["op"]]:
                assert rows["complete"][i] <= rows["start"][j] and rows["end"][i] < rows["end"][j]
                continue
            (reads, writes), (later_reads, later_writes) = _halves(a), _halves(b)
            conflict = writes & (later_reads | later_writes) or reads & later_writes
            names = {arch.OPS[a["op"]].name, arch.OPS[b["op"]].name}
            if "LMMA" not in names:
                first, end = (
                    [f["line"] + k * f["count"] * lines[arch.OPS[f["op"]].name] for f in (a, b)]
                    for k in (0, 1)
                )
                conflict = conflict or (first[0] < end[1] and first[1] < end[0])
            if conflict:
                assert rows["end"][i] <= rows["start"][j]


def test_a_repeated_segment_is_one_step():
    """A billion repetitions fold; every one of 12 planes goes on where the last left off."""
    t = run(".segment repeat=1000000000\nLMMA n_tiles=2 groups=3 bits=2 accumulate=1 tag=a")
    assert t.ticks == 1 + 12 * 10**9 + 5 + 1
    assert t.counter("planes") == 12 * 10**9
    assert t.spans["count"].tolist() == [10**9]


def test_the_phase_of_the_memory_is_part_of_the_state():
    """3 lines at 3/7 a tick take 7 ticks, 1 line takes 7/3: only every third repetition is alike."""
    spec = core("memory.dram_gb_per_s=6/7", "buffers.queue_depth=1")
    text = ".segment repeat=200\nLOAD_W count={} tag=a\nLMMA bits=1 tag=b\n"
    for count in (1, 2, 3):
        program = ISA.assemble(text.format(count))
        p = spec.params()
        assert integers(simulate(p, program)) == integers(simulate(p, program, fold=False))


def test_tags_of_a_later_segment_are_kept():
    code = ISA.record("code").make("LMMA", tag=3)
    t = simulate(CORE.params(), Program(ISA, [Segment({"code": code}, label="x")], ["only"]))
    assert list(t.tags) == ["only", "tag 1", "tag 2", "tag 3"]
    assert t.labels == ["x"] and np.flatnonzero(t.counters.sum(axis=1)).tolist() == [3]
