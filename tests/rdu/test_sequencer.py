"""When operations issue and end, and the DMA's beats, by themselves."""

from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rdu.units import simulate
from tilewright.arch.rdu import CAUSE, ISA, OP
from tilewright.rtl.rdu.dma import Dma
from tilewright.rtl.rdu.sequencer import Sequencer

DEPTH = 8


@cache
def part(kind, **parameters):
    """The same one each time: to build its simulator takes a second."""
    return kind(**parameters)


def encoded(op, **fields):
    record = ISA.record("code").make(op, **fields)
    return int.from_bytes(ISA.record("code").encode(record)[0].astype("<u4").tobytes(), "little")


class Run:
    """What a program did: (first, end) of each operation that retired, ticks of events, activity."""

    def __init__(self):
        self.spans, self.copies, self.starts, self.off = [], [], [], []
        self.configs, self.args = [], []
        self.activity, self.outside = [], []


def sequence(ops, latencies, entry=(0, 0, 0, 0), kernel=0, dma=0):
    """Run (op, fields); a kernel lasts `kernel` ticks, the DMA `dma`; every section has the same `entry`."""
    out = Run()

    s = part(Sequencer, depth=DEPTH)

    async def bench(ctx):
        words = [encoded(op, **fields) for op, fields in ops] + [0]
        for k, n in enumerate(latencies):
            ctx.set(s.latency[k], n)
        ctx.set(s.length, len(ops))
        for name, n in zip(("config", "configs", "argument", "arguments"), entry, strict=True):
            ctx.set(getattr(s.entry, name), n)
        ctx.set(s.clear, 1)
        address, config, argument = ctx.get(s.code_addr), 0, 0
        await ctx.tick()
        ctx.set(s.clear, 0)
        copying, run = 0, 0
        for tick in range(500):
            ctx.set(s.code_data.as_value(), words[address])
            ctx.set(s.copying, int(copying > 0))
            ctx.set(s.quiet, int(run >= kernel))
            if not ctx.get(s.run):
                return
            assert ctx.get(s.tick) == tick
            out.activity.append(ctx.get(s.activity))
            if ctx.get(s.kernel):
                run += 1
            else:
                out.outside.append(ctx.get(s.outside))
            if ctx.get(s.start):
                out.starts.append(tick)
                run = 0
            if ctx.get(s.off):
                out.off.append(tick)
            if ctx.get(s.config_valid):
                out.configs.append((tick, config))
            if ctx.get(s.args_valid):
                out.args.append((tick, argument))
            copying = max(0, copying - 1)
            if ctx.get(s.copy):
                out.copies.append(tick)
                copying = dma
            if ctx.get(s.retire):
                out.spans.append((ctx.get(s.first), tick + 1))
            address, config = ctx.get(s.code_addr), ctx.get(s.config_address)
            argument = ctx.get(s.args_address)
            await ctx.tick()
        raise AssertionError("not done")

    simulate(s, bench)
    return out


NONE = [0] * (len(OP) + 1)


def latencies(program=0, argument=0, hardware=0, host=0):
    return [program, argument, hardware, 0, 0, host]


def test_no_operation_takes_the_last_tick_alone():
    run = sequence([], NONE)
    assert run.activity == [0]


def test_records_follow_the_latency():
    run = sequence([("PROGRAM_LOAD", {}), ("ARGUMENT_LOAD", {})], latencies(3, 1), entry=(2, 3, 5, 2))
    # Issue at 0, latency 1 .. 3, records 4 .. 6; issue at 7, latency 8, records 9 and 10; the last tick is 11.
    assert run.spans == [(0, 7), (7, 11)]
    assert run.configs == [(4, 2), (5, 3), (6, 4)]
    assert run.args == [(9, 5), (10, 6)]
    assert run.off == [0]
    launch = CAUSE["launch"]
    assert run.activity == [0, launch, launch, launch, 0, 0, 0, 0, launch, 0, 0, 0]
    assert run.outside == [launch] * 11 + [CAUSE["idle"]]


def test_without_latency_and_records_an_operation_takes_a_tick():
    run = sequence([("PROGRAM_LOAD", {}), ("ARGUMENT_LOAD", {})], NONE)
    assert run.spans == [(0, 1), (1, 2)]
    assert len(run.activity) == 3


def test_kernels_by_hardware_and_by_the_host():
    ops = [("KERNEL_EXECUTE", {}), ("KERNEL_EXECUTE", {"host": 1})]
    run = sequence(ops, latencies(hardware=0, host=4), kernel=3)
    # Start at 0, kernel 1 .. 4 (quiet in the fourth); issue at 5, latency 6 .. 9, kernel 10 .. 13.
    assert run.starts == [0, 9]
    assert run.spans == [(0, 5), (5, 14)]
    pipeline, launch = [CAUSE["pipeline"]] * 4, [CAUSE["launch"]] * 4
    assert run.activity == [0, *pipeline, 0, *launch, *pipeline, 0]


def test_not_before_holds_the_issue():
    run = sequence([("KERNEL_EXECUTE", {"not_before": 5})], latencies(hardware=1))
    assert run.spans == [(5, 8)]
    assert run.activity[:7] == [CAUSE["arrival"]] * 5 + [0, CAUSE["launch"]]
    assert run.outside[:7] == [CAUSE["arrival"]] * 5 + [CAUSE["launch"]] * 2


def test_copies_and_waits_wait_for_the_dma():
    run = sequence([("COPY", {}), ("ARGUMENT_LOAD", {}), ("COPY", {}), ("WAIT", {})], NONE, dma=6)
    # The DMA works in 1 .. 6 and 8 .. 13.
    assert run.copies == [0, 7]
    assert run.spans == [(1, 2), (14, 15)]
    assert run.activity == [0, 0] + [CAUSE["memory"]] * 5 + [0] + [CAUSE["memory"]] * 6 + [0, 0]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(OP)), st.integers(0, 1), st.integers(0, 40)), max_size=DEPTH),
    st.tuples(*[st.integers(0, 5)] * 4),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 5),
    st.integers(1, 20),
)
def test_the_ticks_of_any_program(ops, given_latencies, configs, arguments, kernel, dma):
    run = sequence(
        [(op, {"host": host, "not_before": tick}) for op, host, tick in ops],
        latencies(*given_latencies),
        entry=(0, configs, 0, arguments),
        kernel=kernel,
        dma=dma,
    )
    program, argument, hardware, by_host = given_latencies
    free, idle, spans = 0, 0, []
    for op, host, not_before in ops:
        first = max(free, not_before, idle if op in ("COPY", "WAIT") else 0)
        free = first + 1
        free += {
            "PROGRAM_LOAD": program + configs,
            "ARGUMENT_LOAD": argument + arguments,
            "KERNEL_EXECUTE": (by_host if host else hardware) + kernel + 1,
        }.get(op, 0)
        if op == "COPY":
            idle = first + 1 + dma
        else:
            spans.append((first, free))
    assert run.spans == spans
    assert len(run.activity) == max(free, idle) + 1


# ---- DMA ----------------------------------------------------------------------------------------------


def copy(lines, p, q, latency, most=3, first=5, to=9):
    """Ticks and lines of what is read and written, activity by tick, and the tick in which it is finished."""
    reads, writes, activity = [], [], []

    dma = part(Dma, lines=most)

    async def bench(ctx):
        ctx.set(
            dma.operation.as_value(),
            encoded("COPY", **{"from": first, "to": to, "lines": lines, "source": 1}),
        )
        ctx.set(dma.p, p)
        ctx.set(dma.q, q)
        ctx.set(dma.latency[1], latency)
        ctx.set(dma.start, 1)
        await ctx.tick()
        ctx.set(dma.start, 0)
        ctx.set(dma.operation.as_value(), 0)
        while True:
            assert ctx.get(dma.active)
            activity.append(ctx.get(dma.activity))
            for port, line, out in ((dma.reads, dma.read_line, reads), (dma.writes, dma.write_line, writes)):
                if mask := ctx.get(port):
                    assert mask & (mask + 1) == 0
                    out += [(len(activity) - 1, ctx.get(line) + k) for k in range(mask.bit_length())]
            if ctx.get(dma.finished):
                break
            await ctx.tick()
        await ctx.tick()
        assert not ctx.get(dma.active)
        assert ctx.get(dma.activity) == CAUSE["idle"]

    simulate(dma, bench)
    return reads, writes, activity


def test_beats_and_their_latency():
    reads, writes, activity = copy(7, 1, 2, 4)
    # Beats of three lines at 0, 2 and 4; written four ticks on.
    assert writes == [(4 + 2 * (i // 3), 9 + i) for i in range(7)]
    assert reads == [(3 + 2 * (i // 3), 5 + i) for i in range(7)]
    memory, pipeline = CAUSE["memory"], CAUSE["pipeline"]
    assert activity == [0, memory, 0, memory, 0, pipeline, pipeline, pipeline, pipeline, pipeline]


def test_a_copy_of_nothing_takes_a_tick():
    assert copy(0, 1, 1, 9) == ([], [], [CAUSE["pipeline"]])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_the_ticks_of_any_copy(lines, p, q, latency):
    p, q = sorted((p, q))
    reads, writes, activity = copy(lines, p, q, latency)
    beats = -(-lines // 3)
    asked = [tick for tick in range(q * beats) if (tick * p) % q < p][:beats]
    assert asked == [-(-k * q // p) for k in range(beats)]
    assert writes == [(asked[i // 3] + latency, 9 + i) for i in range(lines)]
    assert reads == [(tick - 1, line - 4) for tick, line in writes]
    assert len(activity) == asked[-1] + latency + 2
    assert [t for t, a in enumerate(activity) if a == 0] == asked
    assert np.count_nonzero(np.array(activity) == CAUSE["pipeline"]) == latency + 1
