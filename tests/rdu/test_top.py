"""A whole socket under Verilator: sections written record by record, values and ticks derived by hand."""

import re

import numpy as np
import pytest

from tests.rdu.units import packet, simulate
from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program, Segment
from tilewright.arch.rdu import ISA, dynamic_flow
from tilewright.arch.rdu_host import hostmap
from tilewright.rtl.cosim.verilog import to_verilog
from tilewright.rtl.rdu import top
from tilewright.rtl.rdu.run import Case, build_rtl, run_cases
from tilewright.rtl.rdu.switch import Switch

# A grid of PCU (0, 0), PMU (1, 0), PMU (0, 1) and PCU (1, 1); AGCU 0 is west of (0, 0), AGCU 1 east of (1, 0). A line is
# 16 bytes, a tick is 1 ns. HBM moves a line a tick, its latency is 5 ticks.
SETS = [
    *("grid.columns=2", "grid.rows=2", "agcu.per_side=1", "agcu.in_flight=8"),
    *("pcu.lanes=4", "pcu.stages=2", "pcu.registers=8", "pcu.vector_inputs=2", "pcu.scalar_inputs=1"),
    *("pcu.systolic=true", "pcu.exp_terms=2", "pcu.reciprocal_iterations=1", "pcu.rsqrt_iterations=1"),
    *("pmu.banks=8", "pmu.bytes=2048", "network.flows=8", "network.fifo_depth=4", "network.credit_cycles=3"),
    *("memory.hbm.bytes=2048", "memory.hbm.gb_per_s=16", "memory.hbm.latency_ns=5"),
    *("memory.ddr.bytes=2048", "memory.ddr.channels=4", "memory.ddr.latency_ns=9"),
    # One beat of two lines in three ticks.
    *("node.copy_lines=2", "node.ddr_to_hbm_gb_per_s=32/3"),
    *("launch.program_load_us=0.010", "launch.argument_load_us=0.003"),
    *("launch.host_launch_us=0.007", "launch.hardware_launch_us=0.002"),
]
PROGRAM_LOAD, ARGUMENT_LOAD, HOST_LAUNCH, HARDWARE_LAUNCH = 10, 3, 7, 2
LANES, WEST, EAST, LOCAL = 4, 3, 1, 4  # ports of a switch


def small(*sets):
    tree = specs.apply_sets(specs.load_tree("plasticine", ["rdu"]), [*SETS, *sets])
    return specs.build(rdu.RduSpec, tree, "small")


def records(region, *rows):
    """Records with names in place of numbers where a field has any."""
    record = ISA.record(region)

    def number(name, value):
        return record.by_name[name].names.index(value) if isinstance(value, str) else value

    made = [record.make(**{name: number(name, value) for name, value in row.items()}) for row in rows]
    return np.concatenate(made)


def code(*ops):
    """(operation, fields) each."""
    return np.concatenate([ISA.record("code").make(op, **fields) for op, fields in ops])


def program(*segments, tags=()):
    return Program(ISA, [Segment(regions) for regions in segments], tags)


def blank(p):
    return {
        **{tier: np.zeros(2048, np.uint8) for tier in rdu.TIERS},
        "scratch": np.zeros((p.pmus, p.banks, p.bank_words), np.uint32),
    }


def floats(*values):
    return np.array(values, np.float32)


# ---- what runs ----------------------------------------------------------------------------------------

TAGS = ("run", "load", "buffer", "compute", "store")
LINES = 8
HBM = {"tier": "hbm", "count0": LINES, "stride0": 16, "words": LANES}


def to_east(x, y):
    """Tables that lead static flow 1 of the unit at (x, y) = (0, 0) or (1, 0) to AGCU 1."""
    hops = [{"x": 1, "y": y, "port": WEST if x == 0 else LOCAL, "flow": 1, "out": 1 << EAST, "next_flow": 1}]
    if x == 0:
        hops.append({"x": 0, "y": y, "port": LOCAL, "flow": 1, "out": 1 << EAST, "next_flow": 1})
    return records("config.switch", *hops)


def stream_section():
    """AGCU 0 loads lines into the double buffer of PMU (1, 0), each half in banks of its own; PCU (0, 0) gives 2 x + 1, AGCU 1 stores that."""
    chain = {"count0": 4, "count1": LINES // 4}
    return {
        "config.pcu": records(
            "config.pcu",
            {
                "mode": "simd",
                "count0": LINES,
                "vectors": 1,
                "result": 0,
                "send_vector": 1,
                "flow": 1,
                "tag": 3,
            },
        ),
        "config.stage": records(
            "config.stage",
            {"stage": 0, "operation": "multiply", "b_from": "constant", "constant": 0x40000000},
            {"stage": 1, "operation": "add", "b_from": "constant", "constant": 0x3F800000},
        ),
        "config.pmu": records(
            "config.pmu",
            {
                "x": 1,
                "y": 0,
                "enable": 3,
                "words": 256,
                "bank_bit2": 4,
                "flow": dynamic_flow(0, 0),
                "tag": 2,
                **{f"{side}_{name}": n for side in ("write", "read") for name, n in chain.items()},
                **{f"{side}_stride0": 4 for side in ("write", "read")},
                **{f"{side}_stride1": 16 for side in ("write", "read")},
                **{f"{side}_{what}": 1 for side in ("write", "read") for what in ("wait", "signal")},
                **{f"{side}_{what}_level": 1 for side in ("write", "read") for what in ("wait", "signal")},
                "write_hold0": 2,
            },
        ),
        "config.switch": to_east(0, 0),
        "config.token": records(
            "config.token",
            {"x": 1, "y": 0, "output": 0, "to_x": 1, "to_y": 0, "input": 4},
            {"x": 1, "y": 0, "output": 4, "to_x": 1, "to_y": 0, "input": 0},
        ),
        "config.agcu": records(
            "config.agcu",
            {**HBM, "agcu": 0, "direction": "load", "argument": 3, "flow": dynamic_flow(1, 0), "tag": 1},
            {**HBM, "agcu": 1, "direction": "store", "argument": 200, "tag": 4},
        ),
        "args": records("args", {"index": 3, "value": 64}, {"index": 200, "value": 1024}),
    }


RECORDS = 1 + 2 + 1 + 2 + 2 + 2  # of `stream_section`
LAUNCH = ("PROGRAM_LOAD", {"section": 0}), ("ARGUMENT_LOAD", {"section": 0}), ("KERNEL_EXECUTE", {"host": 1})
# The kernel's ticks: the load is granted at 0 .. 7; packets leave 5 + 2 ticks later and pass 3 links, so that the PMU takes
# them at 10 .. 17. The fourth is in its bank at 14, its token at the read side at 15, and counts from 16. So reading takes
# 16 .. 23; 3 ticks later packets leave, 3 links on the PCU takes them at 22 .. 29, and 1 + 2 + 1 ticks on they leave,
# to be at AGCU 1 from 29 .. 36. The last line is written at 37; the credit of its packet, which was taken at 36, is back at 39, which finds everything quiet.
KERNEL = 39
# Issue, latency, records; the kernel's last tick finds it quiet.
LOADED = 1 + PROGRAM_LOAD + RECORDS
ARGUED = LOADED + 1 + ARGUMENT_LOAD + 2
STARTED = ARGUED + 1 + HOST_LAUNCH
ENDED = STARTED + KERNEL + 1


def stream_image(p):
    image = blank(p)
    image["hbm"][64 : 64 + 16 * LINES] = np.arange(4 * LINES, dtype=np.float32).view(np.uint8)
    return image


def stream_program():
    section = stream_section()
    return program({**section, "code": code(*LAUNCH)}, tags=TAGS)


def twice_program():
    """The kernel, other arguments, and the kernel again, begun by the hardware and not before tick 200."""
    second = {
        "args": records("args", {"index": 200, "value": 1536}),
        "code": code(
            ("ARGUMENT_LOAD", {"section": 1}),
            ("KERNEL_EXECUTE", {"not_before": 200}),
        ),
    }
    return program({**stream_section(), "code": code(*LAUNCH)}, second, tags=TAGS)


def copy_program():
    """Five lines from DDR to HBM while the kernel runs, which stores elsewhere; then one line back."""
    there = {"source": 1, "target": 0, "from": 2, "to": 120, "lines": 5}
    back = {"source": 0, "target": 1, "from": 124, "to": 0, "lines": 1}
    ops = (("COPY", there), *LAUNCH, ("COPY", back), ("WAIT", {}))
    return program({**stream_section(), "code": code(*ops)}, tags=TAGS)


def busy_copy_program():
    """Two copies, one behind the other, one without a line, and nothing else."""
    ops = [("COPY", {"source": 1, "target": 0, "from": 0, "to": 0, "lines": n}) for n in (5, 1, 0)]
    return program({"code": code(*ops)})


K = 6


def gemm_section():
    """C = A B of [4, 6] and [6, 2] on PCU (0, 0): A's columns from PMU (1, 0), B's rows from PMU (0, 1), stored to HBM."""
    reader = {"enable": 2, "words": 256, "read_count0": K, "read_stride0": 4}
    return {
        "config.pcu": records(
            "config.pcu",
            {"mode": "systolic", "count0": K, "vectors": 3, "fold": "add", "fold_level": 1, "last_level": 1}
            | {"send_vector": 1, "flow": 1},
        ),
        "config.pmu": records(
            "config.pmu",
            {**reader, "x": 1, "y": 0, "flow": dynamic_flow(0, 0, 0)},
            {**reader, "x": 0, "y": 1, "flow": dynamic_flow(0, 0, 1)},
        ),
        "config.switch": to_east(0, 0),
        "config.agcu": records("config.agcu", {**HBM, "agcu": 1, "direction": "store", "count0": 2}),
        "args": records("args", {"index": 0, "value": 32}),
    }


def gemm_program():
    return program({**gemm_section(), "code": code(*LAUNCH)}, tags=TAGS)


def operands():
    """Small integers: products and sums are exact."""
    rng = np.random.default_rng(1)
    return rng.integers(-8, 8, (4, K)).astype(np.float32), rng.integers(-8, 8, (K, 2)).astype(np.float32)


def scratchpad(vectors, bank_bit2=2):
    """Words one after the other, as they lie in 8 banks of 64: bits 0, 1 and `bank_bit2` are the bank."""
    out = np.zeros((8, 64), np.uint32)
    for address, word in enumerate(np.asarray(vectors, np.float32).view(np.uint32).reshape(-1)):
        high = address >> bank_bit2 & 1
        rest = address >> bank_bit2 + 1 << bank_bit2 | address & (1 << bank_bit2) - 1
        out[high << 2 | address & 3, rest >> 2] = word
    return out


def gemm_image(p):
    image = blank(p)
    a, b = operands()
    # PMUs by row: (1, 0), then (0, 1).
    image["scratch"][0] = scratchpad(a.T)
    image["scratch"][1] = scratchpad(np.pad(b, ((0, 0), (0, 2))))
    return image


def persistence_program():
    """One section fills PMU (1, 0), the next one, which names nothing of it but its read side, stores what it holds."""
    pmu = {"x": 1, "y": 0, "words": 256}
    fill = {
        "config.pmu": records("config.pmu", {**pmu, "enable": 1, "write_count0": LINES, "write_stride0": 4}),
        "config.agcu": records(
            "config.agcu", {**HBM, "agcu": 0, "direction": "load", "flow": dynamic_flow(1, 0), "tag": 1}
        ),
        "args": records("args", {"index": 0, "value": 64}),
        "code": code(*LAUNCH),
    }
    drain = {
        "config.pmu": records(
            "config.pmu", {**pmu, "enable": 2, "read_count0": LINES, "read_stride0": 4, "flow": 1}
        ),
        "config.switch": to_east(1, 0),
        "config.agcu": records("config.agcu", {**HBM, "agcu": 1, "direction": "store", "tag": 4}),
        "args": records("args", {"index": 0, "value": 1024}),
        "code": code(*((op, {**fields, "section": 1} if fields else {}) for op, fields in LAUNCH)),
    }
    drain["code"]["section"] = 1
    return program(fill, drain, tags=TAGS)


CASES = {
    "stream": (stream_program, stream_image),
    "twice": (twice_program, stream_image),
    "copy": (copy_program, stream_image),
    "busy copy": (busy_copy_program, blank),
    "gemm": (gemm_program, gemm_image),
    "persistence": (persistence_program, stream_image),
    "nothing": (lambda: program({"code": code(("PROGRAM_LOAD", {}), ("KERNEL_EXECUTE", {}))}), blank),
}


@pytest.fixture(scope="module")
def outcomes():
    spec = small()
    p = spec.params()
    cases = []
    for make, image in CASES.values():
        start = image(p)
        start["ddr"][:] = np.arange(2048) % 251
        cases.append(Case(p, make(), start))
    done = run_cases(build_rtl(spec), cases)
    assert [outcome.error for outcome in done] == [None] * len(done)
    return dict(zip(CASES, zip(cases, done, strict=True), strict=True))


def spans(timeline):
    return {timeline.tags[s["tag"]]: (int(s["first"]), int(s["end"])) for s in timeline.spans}


def stored(outcome, first, count):
    return outcome.image["hbm"][first : first + 4 * count].view(np.float32)


# ---- what comes out -----------------------------------------------------------------------------------


@pytest.mark.cosim
def test_a_stream_through_a_double_buffer(outcomes):
    case, done = outcomes["stream"]
    t = done.timeline
    expected = dict(case.image)
    expected["hbm"] = case.image["hbm"].copy()
    expected["hbm"][1024 : 1024 + 16 * LINES] = (2 * np.arange(4 * LINES, dtype=np.float32) + 1).view(
        np.uint8
    )
    for tier in rdu.TIERS:
        np.testing.assert_array_equal(done.image[tier], expected[tier])
    expected = scratchpad(np.arange(4 * LINES, dtype=np.float32), bank_bit2=4)
    np.testing.assert_array_equal(done.image["scratch"][0], expected)
    assert not done.image["scratch"][1].any()
    assert t.ticks == ENDED + 1
    assert spans(t) == {
        "run": (0, ENDED),
        "load": (STARTED, STARTED + 8),
        "buffer": (STARTED + 10, STARTED + 24),
        "compute": (STARTED + 22, STARTED + 30),
        "store": (STARTED + 29, STARTED + 37),
    }
    assert t.units == ("sequencer", "dma", "pcu@0,0", "pmu.write@1,0", "pmu.read@1,0", "agcu@0", "agcu@1")


@pytest.mark.cosim
def test_counters_and_stalls_of_a_stream(outcomes):
    _, done = outcomes["stream"]
    t = done.timeline
    totals = t.totals()
    assert {name: n for name, n in totals.items() if n} == {
        "iterations": LINES,
        "words_read": 4 * LINES,
        "words_written": 4 * LINES,
        "vector_hops": 3 * 3 * LINES,  # three streams, each of three links
        "hbm_lines": 2 * LINES,
        "launches": 1,
    }
    launch = ENDED - KERNEL - 1
    after = 3  # for the last credit, the kernel's last tick, and the run's
    pcu = {name: n for name, n in t.unit("pcu@0,0").items() if n}
    # It waits for operands up to 22, for the last result to leave in 30 .. 33.
    assert pcu == {"busy": 8, "operand": 22, "pipeline": 4, "launch": launch, "idle": 4 + after}
    write = {name: n for name, n in t.unit("pmu.write@1,0").items() if n}
    assert write == {"busy": 8, "operand": 10, "pipeline": 1, "launch": launch, "idle": 19 + after}
    read = {name: n for name, n in t.unit("pmu.read@1,0").items() if n}
    assert read == {"busy": 8, "token": 16, "pipeline": 3, "launch": launch, "idle": 11 + after}
    load = {name: n for name, n in t.unit("agcu@0").items() if n}
    assert load == {"busy": 8, "pipeline": 7, "launch": launch, "idle": 23 + after}
    store = {name: n for name, n in t.unit("agcu@1").items() if n}
    assert store == {"busy": 8, "operand": 29, "pipeline": 1, "launch": launch, "idle": after}
    sequencer = {name: n for name, n in t.unit("sequencer").items() if n}
    latencies = PROGRAM_LOAD + ARGUMENT_LOAD + HOST_LAUNCH
    # Three issues, records, arguments and the last tick.
    assert sequencer == {"busy": 3 + RECORDS + 2 + 1, "launch": latencies, "pipeline": KERNEL + 1}
    assert t.unit("dma")["idle"] == t.ticks


@pytest.mark.cosim
def test_other_arguments_move_the_same_kernel(outcomes):
    _, done = outcomes["twice"]
    t = done.timeline
    for first in (1024, 1536):
        np.testing.assert_array_equal(stored(done, first, 4 * LINES), 2 * np.arange(4.0 * LINES) + 1)
    # The second kernel issues at 200, for which its units wait since the argument was loaded.
    argued = ENDED + 1 + ARGUMENT_LOAD + 1
    assert t.ticks == 200 + 1 + HARDWARE_LAUNCH + KERNEL + 1 + 1
    assert t.unit("pcu@0,0")["arrival"] == t.unit("sequencer")["arrival"] == 200 - argued
    assert t.counter("launches") == 2 and t.counter("iterations") == 2 * LINES
    assert spans(t)["compute"] == (STARTED + 22, 200 + 1 + HARDWARE_LAUNCH + 30)


@pytest.mark.cosim
def test_a_copy_runs_alongside_a_kernel(outcomes):
    case, done = outcomes["copy"]
    t = done.timeline
    np.testing.assert_array_equal(done.image["hbm"][1920:2000], case.image["ddr"][32:112])
    np.testing.assert_array_equal(done.image["ddr"][:16], case.image["ddr"][96:112])
    np.testing.assert_array_equal(done.image["ddr"][16:], case.image["ddr"][16:])
    np.testing.assert_array_equal(stored(done, 1024, 4 * LINES), 2 * np.arange(4.0 * LINES) + 1)
    # The first COPY takes one tick of the sequencer. The second issues when the kernel has ended: its tick 0 asks, the
    # line is written at 5, 6 finds it written; WAIT issues in 7, and the run ends in the tick behind.
    assert t.ticks == 1 + ENDED + 1 + 7 + 1 + 1
    assert t.counter("copied_lines") == 6
    # Beats at its ticks 0, 3 and 6, two lines, two and one; done at 6 + 9 + 1. Then the copy of one line.
    dma = {name: n for name, n in t.unit("dma").items() if n}
    assert dma == {"busy": 4, "memory": 4, "pipeline": 10 + 6, "idle": t.ticks - 17 - 7}
    assert t.unit("sequencer")["memory"] == 7


@pytest.mark.cosim
def test_a_copy_waits_for_the_one_before(outcomes):
    case, done = outcomes["busy copy"]
    t = done.timeline
    np.testing.assert_array_equal(done.image["hbm"][:80], case.image["ddr"][:80])
    # Issue and 6 + 9 + 2 ticks; issue and 0 + 9 + 2; issue and one; and the end.
    assert t.ticks == (1 + 17) + (1 + 11) + (1 + 1) + 1
    assert spans(t) == {"tag 0": (0, 32)}
    assert t.unit("sequencer") | {"busy": 4, "memory": 17 + 11 + 1} == t.unit("sequencer")
    assert t.counter("copied_lines") == 6


@pytest.mark.cosim
def test_a_product_of_matrices(outcomes):
    _, done = outcomes["gemm"]
    a, b = operands()
    # Column by column, each a line.
    np.testing.assert_array_equal(stored(done, 32, 8).reshape(2, 4), (a @ b).T)
    # Operands are read at 0 .. 5, at the PCU 3 + 3 ticks later. Iterations 6 .. 11, the sums 3 ticks behind the last;
    # columns leave at 15 and 16, are at the AGCU at 18 and 19 and written at 19 and 20; the last credit is back at 22.
    records = 1 + 2 + 2 + 1
    loads = 1 + PROGRAM_LOAD + records + 1 + ARGUMENT_LOAD + 1
    assert done.timeline.ticks == loads + 1 + HOST_LAUNCH + 22 + 1 + 1
    assert done.timeline.counter("iterations") == K
    assert done.timeline.counter("hbm_lines") == 2


@pytest.mark.cosim
def test_scratchpads_outlive_sections(outcomes):
    case, done = outcomes["persistence"]
    np.testing.assert_array_equal(done.image["hbm"][1024:1152], case.image["hbm"][64:192])
    assert done.timeline.counter("launches") == 2
    # What the first section configured is off in the second one: AGCU 0 loads its lines once.
    assert done.timeline.unit("agcu@0")["busy"] == LINES
    assert done.timeline.counter("hbm_lines") == 2 * LINES


@pytest.mark.cosim
def test_a_kernel_of_nothing(outcomes):
    _, done = outcomes["nothing"]
    # A tick and the latency for either operation, the kernel's tick 0 that finds it quiet, the end.
    assert done.timeline.ticks == 1 + PROGRAM_LOAD + 1 + HARDWARE_LAUNCH + 1 + 1
    assert done.timeline.units == ("sequencer", "dma")


def test_what_the_machine_can_not_run():
    p = small().params()
    case = Case(p, program({"code": code(("PROGRAM_LOAD", {"section": 1}))}), blank(p))
    with pytest.raises(ValueError, match=r"operation 0 \(PROGRAM_LOAD\): section must be in 0\.\.0"):
        run_cases(None, [case])
    for fields, message in (
        ({"source": 2}, "source must be one of hbm, ddr"),
        ({"source": 1, "from": 128}, "from, lines reach beyond the 128 lines of ddr"),
    ):
        case = Case(p, program({"code": code(("COPY", fields))}), blank(p))
        with pytest.raises(ValueError, match=message):
            run_cases(None, [case])
    long = program({"code": np.tile(code(("WAIT", {})), 65)})
    with pytest.raises(ValueError, match="the RTL holds 64 operations, not 65"):
        run_cases(None, [Case(p, long, blank(p))])
    with pytest.raises(ValueError, match="depth must be a power of two, not 48"):
        hostmap(p, 48)


def test_a_kernel_begins_with_the_first_input_of_every_arbiter():
    """Inputs 0 and 1 of a switch want output 2, before and behind a start: input 1's turn is forgotten."""
    switch = Switch(lanes=1, local_in=1, local_out=1, flows=2)
    taken = []

    async def bench(ctx):
        ctx.set(switch.y, 1)
        ctx.set(switch.out_2.ready, 1)
        for i in range(2):
            port = getattr(switch, f"in_{i}")
            ctx.set(port.payload, packet([i], flow=dynamic_flow(0, 2)))
            ctx.set(port.valid, 1)
        for start in (0, 1, 0, 0):
            ctx.set(switch.start, start)
            taken.append(ctx.get(switch.out_2.payload.data[0]))
            await ctx.tick()

    simulate(switch, bench)
    assert taken == [0, 1, 0, 1]


def test_a_large_grid_is_written_as_a_region():
    spec = small("grid.columns=10", "grid.rows=8", "agcu.per_side=8")
    with pytest.raises(UserError, match="up to 64 positions, not 10 x 8"):
        build_rtl(spec)
    text = to_verilog(top(spec))
    for unit in ("pcu_0_0", "pmu_1_0", "pmu_0_1", "pcu_1_1", "agcu_0", "agcu_1"):
        assert len(re.findall(rf"^  \w+ {unit} \($", text, re.MULTILINE)) == 1
    # Equal units share a module.
    assert len(re.findall(r"^  (PcuTile_\d+) pcu_", text, re.MULTILINE)) == 2
    assert len(set(re.findall(r"^  (PcuTile_\d+) pcu_", text, re.MULTILINE))) == 1
