"""The cycle model of target pim alone: hand-derived ticks, laws, and that folding changes nothing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch import pim as arch
from tilewright.arch import registry
from tilewright.arch.dram import Issued, Organisation
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program, Segment
from tilewright.arch.pim import GDDR6_PIM, ISA
from tilewright.sim.dram_check import check_trace
from tilewright.sim.pim import simulate
from tilewright.verify import engine
from tilewright.verify import pim as plan
from tilewright.workloads.pim import Machine, blank_image

WIDE = (
    ("channels=8", "dram.bankgroups=2", "dram.banks_per_group=2", "dram.rows=16", "dram.row_bytes=32")
    + ("dram.column_bytes=4", "dram.pins=2", "pim.lanes=2", "pim.global_buffer_bytes=32")
    + ("asic.sram_bytes=1024",)
)


@pytest.fixture(scope="module")
def gpt() -> arch.PimSpec:
    return registry.load_spec("pim-gpt")


def run(spec, text, **options):
    return simulate(spec.params(), ISA.assemble(text), **options)


def integers(timeline) -> dict:
    """Everything a Timeline says, as plain numbers."""
    return {
        "ticks": timeline.ticks,
        "spans": timeline.spans.tolist(),
        "counters": timeline.counters.tolist(),
        "activity": timeline.activity.tolist(),
    }


# ---- by hand ------------------------------------------------------------------------------------------


def test_write_buffer_and_multiply_by_hand(gpt):
    """A tick is 0.5 ns; the ASIC's 1 GHz domain works on even ticks. 16 lanes * 2 B / (16 pins * 16 Gb/s) = 1 ns.

    WR_GB: fetch 0, load 2, dispatch 4. WRGB is 2 ticks (burst 2, tCCD 2) from the next: 5, 7, 9, 11. It drains
    tCWL_gb 1 + burst 2 from 11: complete, and retired, at 14. MAC_AB: fetch 16, load 18, dispatch 20; all banks
    are closed: ACTab at 21, MACab tRCD 24 later and 2 apart: 45, 47, 49, 51. The MAC pipeline is
    3 + log2(16) = 7 deep: retired at 58. The last fetch is at 60.
    """
    t = run(gpt, "WR_GB channels=1 cols=4 tag=w\nMAC_AB channels=1 cols=4 tag=m")
    assert t.ticks == 61
    assert [(r["first"], r["end"]) for r in t.spans] == [(0, 15), (15, 59)]
    channel = {k: v for k, v in t.unit("channel 0").items() if v}
    # column: 3 + 3; activate: 22..44; drain: 12, 13 and 52..57; idle: 0..4, 14..20 and 58..60.
    assert channel == {"busy": 9, "column": 6, "activate": 23, "drain": 8, "idle": 15}
    # 4 working ticks for each instruction and the last fetch; waits 5..13 and 21..57; the rest is the clock's.
    assert {k: v for k, v in t.unit("sequencer").items() if v} == {"busy": 9, "wait": 46, "clock": 6}
    assert t.unit("channel 1") == {**dict.fromkeys(t.unit("channel 1"), 0), "idle": 61}
    expected = {"wr_gb": 4, "act_all": 1, "mac_all": 4, "open_ticks": 61 - 22}
    assert {k: v for k, v in t.totals().items() if v} == expected


def test_read_accumulators_by_hand(gpt):
    """MAC_AB of one column: ACTab 5, MACab 29, drained and retired at 36. RD_MAC: fetch 38, load 40, dispatch 42,
    the only burst (16 banks, 16 lanes) at 43; tCL_reg 0 + burst 2: complete at 45, retired at 46; fetch 48."""
    t = run(gpt, "MAC_AB channels=1 tag=a\nRD_MAC channels=1 tag=b", trace=10)
    assert [(r[0], r[2]) for r in t.trace.tolist() if r[1] == 0] == [(5, 1), (29, 6), (43, 8)]
    assert t.ticks == 49 and [r["end"] for r in t.spans] == [37, 47]


def test_another_row_by_hand(gpt):
    """Row 0 opens at 5, its one column is at 29. Row 1: PREab waits for tRAS 54 from 5 (tRTP 12 from 29 is
    sooner): 59; ACTab for tRC 78 from 5 and tRP 24 from 59: both 83; MACab at 107, retired at 114."""
    t = run(gpt, "MAC_AB channels=1 col=63 cols=2 tag=a", trace=10)
    ticks = [(r[0], r[2]) for r in t.trace.tolist()]
    assert ticks == [(5, 1), (29, 6), (59, 3), (83, 1), (107, 6)]
    assert [r[4] for r in t.trace.tolist() if r[2] in (1, 6)] == [0, 0, 1, 1]
    assert [r["end"] for r in t.spans] == [115]


def test_staggered_activation_by_hand():
    """One bank at a time, across bank groups: tRRD_S 5 ticks, and five within tFAW 32: 5, 10, 15, 20, 37, 42, ..."""
    spec = registry.load_spec("pim-gpt", ["pim.all_bank_activate=staggered"])
    t = run(spec, "MAC_AB channels=1", trace=20)
    acts = [r[0] for r in t.trace.tolist() if r[2] == 0 and r[1] == 0]
    assert acts == [5 + 32 * (i // 4) + 5 * (i % 4) for i in range(16)]
    banks = [r[3] for r in t.trace.tolist() if r[2] == 0 and r[1] == 0]
    assert banks == [4 * g + b for b in range(4) for g in range(4)]
    # The last at 5 + 96 + 15 = 116; its row takes MACs tRCD 24 later.
    assert next(r[0] for r in t.trace.tolist() if r[2] == 6) == 140


def test_a_refresh_by_hand(gpt):
    """Refresh falls due at 13650. A MAC_AB dispatched at 13620 opens at 13621 and multiplies from 13645 on: 13645,
    13647, 13649. Then PREab: tRAS 54 from 13621 is 13675; REFab tRP 24 later: 13699; ACTab tRFC 910 later: 14609."""
    t = run(gpt, "MAC_AB channels=1 cols=4 not_before=13620", trace=10)
    rows = [(r[0], r[2]) for r in t.trace.tolist() if r[1] == 0]
    expected = [
        (13621, 1),
        (13645, 6),
        (13647, 6),
        (13649, 6),
        (13675, 3),
        (13699, 9),
        (14609, 1),
        (14633, 6),
    ]
    assert rows == expected


# ---- the ASIC by hand ---------------------------------------------------------------------------------


def asic_cycles(text, *sets):
    return run(registry.load_spec("pim-gpt", sets), text).unit("asic")["busy"]


def test_strips_of_a_vector_by_hand():
    """The picture in `arch/pim_asic.py`: 3 steps on 6 groups of 128 elements, strips of 4, latency 2 + 1 + 2 = 5.

    A strip of 4: 5 cycles for each of two steps, 4 for the third; the strip of 2: 5, 5 and 2; 26. The last group
    was issued in cycle 25, its result is there in 25 + 5 = 30.
    """
    sets = ["asic.register_rows=4", "asic.adder_latency_cycles=2"]
    t = run(registry.load_spec("pim-gpt", sets), "ROPE n=768 outs=1")
    # Dispatched at 4; the 30 cycles are ticks 6, 8, ..., 64. Retired at 66, the last fetch is at 68.
    assert t.ticks == 69
    assert {k: v for k, v in t.unit("asic").items() if v} == {"busy": 30, "clock": 30, "idle": 9}
    # A sum and two products for each element.
    assert {k: v for k, v in t.totals().items() if v} == {"asic_adds": 768, "asic_multiplies": 1536}
    # Of two vectors the second begins when the first has ended. 641 elements are 6 groups as well.
    assert asic_cycles("ROPE n=768 outs=2", *sets) == 60
    assert asic_cycles("ROPE n=642 outs=1", *sets) == 30
    # In strips of 8 the step waits for no latency: 6 + 6 + 6 + 4.
    assert asic_cycles("ROPE n=768 outs=1", "asic.adder_latency_cycles=2") == 22


def test_sums_and_scalars_by_hand():
    """1000 elements are 8 groups of 128, one strip; latency 4; 7 levels of the tree and the total: 8.

    Maximum: 8 groups, then 4 - 1 + 8: 19. Exponential: 1 step, 3 to reduce the argument, 6 terms, 1 to scale
    and sum are 11: 10 * 8 + 8 + 11 = 99. Reciprocal, one lane: the seed and 3 * 2 steps, 6 * 4 + 1 + 3 = 28.
    Normalise: 8 + 3 = 11.
    """
    assert asic_cycles("SOFTMAX n=1000 outs=1 pitch=63") == 19 + 99 + 28 + 11
    assert asic_cycles("SOFTMAX n=1000 outs=3 pitch=63") == 3 * 157
    # The total's adder takes a group every 2 cycles: 8 * 2, then 5 - 2 + 2 * 8.
    assert asic_cycles("ARGMAX n=1000 clear=1", "asic.adder_latency_cycles=2") == 16 + 19
    # Two steps on one group.
    assert asic_cycles("ADD n=16") == 4 + 1 + 3


def test_overlap_by_hand():
    """WR_GB: dispatched at 4, complete at 14. ADD takes 8 cycles."""
    text = "WR_GB channels=1 cols=4\nADD n=16 alongside=1"
    # Fetched at 6, loaded at 8, dispatched at 10: ticks 12 .. 26, complete at 27, last fetch at 28.
    overlap = registry.load_spec("pim-gpt", ["asic.overlap=true"])
    assert run(overlap, text).ticks == 29
    # It waits for WR_GB: dispatched at 14, complete at 31.
    assert run(overlap, text.replace(" alongside=1", "")).ticks == 33
    # The published machine retires at 14, fetches at 16, dispatches at 20, completes at 37, retires at 38.
    published = registry.load_spec("pim-gpt")
    assert run(published, text).ticks == 41


# ---- laws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intervals", [0, 1, 7])
def test_an_idle_machine_refreshes_once_an_interval(gpt, intervals):
    at = intervals * 13650 + 5000
    t = run(gpt, f"WR_GB channels=0xff not_before={at}")
    # Each of 8 channels, due at every multiple of 13650 below the end.
    assert t.counter("ref") == 8 * (t.ticks // 13650) == 8 * intervals
    assert t.unit("sequencer")["arrival"] == at - 3  # fetched at 0, loaded at 2


def test_row_hits_of_full_rows(gpt):
    """A row of 64 columns is opened once: 63 of 64 column accesses find it open."""
    t = run(gpt, "GEMV channels=0xff cols=64 outs=20 pitch=1 stride=40")
    macs, opens = t.counter("mac_all"), t.counter("act_all")
    assert (macs, opens) == (8 * 20 * 64, 8 * 20)
    assert (macs - opens) * 64 == macs * 63


def test_the_floor_of_a_long_burst(gpt):
    """Macs can't come faster than tCCD_L, 2 ticks, nor rows than tRC, 78 ticks."""
    t = run(gpt, "GEMV channels=1 cols=64 outs=16")
    assert t.ticks >= 16 * 64 * 2
    assert t.ticks >= 15 * 78


def test_a_mac_with_a_closed_bank_is_illegal():
    timing = dict.fromkeys(GDDR6_PIM.parameters, 1)
    organisation = Organisation(
        bankgroups=1, banks_per_group=2, rows=4, columns=4, column_bits=32, access_bytes=4
    )
    half = [Issued(0, "ACT", 0, 1), Issued(10, "MACab", 0, 1)]
    assert check_trace(GDDR6_PIM, timing, organisation, half).title == "state: bank 1 needs an open row"
    both = [Issued(0, "ACT", 0, 1), Issued(5, "ACT", 1, 1), Issued(10, "MACab", 0, 1)]
    assert check_trace(GDDR6_PIM, timing, organisation, both) is None


PROGRAM = """
WR_GB channels=3 cols=8
GEMV channels=1 cols=4 outs=5 dst=8 pitch=1
WR_BK channels=3 row=3 col=2 bank=2 cols=5 src=3
RD_BK channels=2 row=3 col=2 bank=1 cols=5 dst=20
WR_EL channels=1 row=5 col=1 outs=3 pitch=3 lane=1 src=8
MAC_AB channels=3 row=5 col=0 gb=1 cols=7
RD_MAC channels=1 dst=25
"""
LATENCIES = (
    "t_rcd_rd",
    "t_rcd_wr",
    "t_rcd_mac",
    "t_rp",
    "t_rc",
    "t_cl",
    "t_cwl",
    "t_ccd_l",
    "t_rrd_l",
    "t_faw",
)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from((*LATENCIES, "t_wr", "t_rtp", "t_wtr_l", "t_cwl_gb", "t_cl_reg")),
    st.integers(1, 40),
    st.sampled_from(("simultaneous", "staggered")),
)
def test_without_refresh_a_longer_latency_never_ends_sooner(key, more, activate):
    sets = [*WIDE, f"pim.all_bank_activate={activate}", "dram.timing.t_refi_ns=30000"]
    base = registry.load_spec("pim-gpt", sets)
    longer = getattr(base.dram.timing, f"{key}_ns") + more
    slower = registry.load_spec("pim-gpt", [*sets, f"dram.timing.{key}_ns={longer}"])
    a, b = run(base, PROGRAM), run(slower, PROGRAM)
    assert a.counter("ref") == 0
    assert b.ticks >= a.ticks
    assert (b.spans["end"] >= a.spans["end"]).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 30), st.integers(0, 24))
def test_folding_changes_no_integer(seed, number):
    """8 channels with masks of their own, random timings, both ways to activate; every class of equal channels."""
    s = engine.Structure("wide", registry.load_spec("pim-gpt", WIDE))
    case = plan.case(s, number, (seed,))
    p, program = case.spec.params(), ISA.assemble(case.text)
    assert integers(simulate(p, program)) == integers(simulate(p, program, fold=False))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1 << 30), st.integers(0, 24))
def test_full_size_traces_are_legal(seed, number):
    """16 banks, 16 lanes and published timings: the independent referee reads the model's trace."""
    s = engine.Structure("pim-gpt", registry.load_spec("pim-gpt", ["channels=2"]), keep_timing=True)
    case = plan.case(s, number, (seed,))
    steps = engine.one_by_one(ISA.assemble(case.text))
    timeline = plan.simulate(case.spec, steps, fold=False, trace=True)
    assert plan.referee(case.spec, timeline, most=150) is None


def test_a_repeated_segment_is_its_instructions_written_out(gpt):
    body = "MAC_AB channels=3 row=1 col=20 cols=60 tag=a\nRD_MAC channels=1 tag=b\n"
    folded, written = run(gpt, ".segment repeat=9\n" + body), run(gpt, 9 * body)
    assert folded.ticks == written.ticks
    assert (folded.counters == written.counters).all()
    assert (folded.activity == written.activity).all()
    assert folded.spans["count"].tolist() == [9, 9]


# ---- the compiler -------------------------------------------------------------------------------------

_SCRIPT = """
import json
from tests.pim.test_model import compiler_case, integers
print(json.dumps([integers(t) for t in compiler_case()]))
"""


def compiler_case() -> list:
    """One small case with refreshes, folded and not."""
    s = engine.Structure("wide", registry.load_spec("pim-gpt", WIDE))
    case = plan.case(s, 2, (5,))
    p, program = case.spec.params(), ISA.assemble(case.text)
    return [simulate(p, program), simulate(p, program, fold=False)]


@pytest.mark.parametrize("variable", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_integers_do_not_depend_on_the_compiler(variable):
    """Uncompiled, and compiled with bounds checks (which have a cache of their own), the integers are the same."""
    environment = {**os.environ, variable: "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    here = [integers(t) for t in compiler_case()]
    assert json.loads(done.stdout) == json.loads(json.dumps(here, default=np.ndarray.tolist))
    assert here[0]["counters"][0] and any(c[9] for c in here[0]["counters"])  # some refreshes


def test_numbers_that_would_overflow_are_refused():
    # 123.456789012345 MHz is 24691357802469/400000000000000 of 2 GHz: tick * p leaves 64 bits within a run.
    with pytest.raises(UserError, match=r"asic\.clock_mhz .* is 24691357802469/400000000000000"):
        registry.load_spec("pim-gpt", ["asic.clock_mhz=123.456789012345"])
    # Each timing fits 16 bits, n_cl + n_bl + 3 - n_cwl_gb + n_wpre does not: 65534 + 2 + 3 - 1 + 20 = 65558.
    long = ["dram.timing.t_cl_ns=32767", "dram.timing.t_wpre_ns=10"]
    with pytest.raises(UserError, match=r"dram\.timing adds up to a constraint of 65558 ticks"):
        registry.load_spec("pim-gpt", long)


def refused(p, columns, program):
    try:
        simulate(p._replace(sram_columns=columns), program)
    except ValueError as error:
        assert "SRAM" in str(error)
        return True
    return False


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1 << 30), st.integers(0, 5))
def test_the_sram_must_hold_exactly_what_an_instruction_touches(seed, number):
    case = plan.case(plan.structures(6, 0)[number], 7 * number, (seed,))
    p = case.spec.params()
    machine = Machine(case.spec, blank_image(p))
    for segment in ISA.assemble(case.text).segments:
        for record in np.split(segment.regions["code"], len(segment.regions["code"])):
            program = Program(ISA, [Segment({"code": record})])
            machine.run(program)
            columns = max((int(c.max()) + 1 for c in (*machine.reads, *machine.writes)), default=0)
            assert not refused(p, columns, program)
            assert columns == 0 or refused(p, columns - 1, program)
