"""The command decoder: arrivals, order of reads and writes, what a tick is charged to, and the run's end."""

import pytest
from amaranth.sim import Simulator

from tilewright.arch.csd import CAUSES, ISA, OP
from tilewright.rtl.csd.decoder import CommandDecoder

READ, WRITE = 0b01, 0b10


def run(text, ticks, inputs=None):
    """(dispatch, state) of each tick of a run of the program; `inputs` by tick and name, which last."""
    (segment,) = ISA.assemble(text).segments
    code = segment.regions["code"]
    record = ISA.record("code")
    words = [sum(int(w) << 32 * i for i, w in enumerate(row)) for row in record.encode(code)]
    unit = CommandDecoder(depth=8)
    seen = []

    async def bench(ctx):
        ctx.set(unit.length, len(code))
        ctx.set(unit.clear, 1)
        address = ctx.get(unit.code_addr)
        await ctx.tick()
        ctx.set(unit.clear, 0)
        for tick in range(ticks):
            for name, value in (inputs or {}).get(tick, {}).items():
                ctx.set(getattr(unit, name), value)
            ctx.set(
                unit.code_data,
                unit.code_data.shape().from_bits(words[address] if address < len(words) else 0),
            )
            if not ctx.get(unit.run):
                assert tick == len(seen)
                return
            assert ctx.get(unit.tick) == tick
            state = "busy" if ctx.get(unit.working) else CAUSES[ctx.get(unit.stall)]
            seen.append((ctx.get(unit.dispatch), state, ctx.get(unit.configuration.r)))
            address = ctx.get(unit.code_addr)
            await ctx.tick()

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return seen


def test_a_command_waits_for_its_tick():
    seen = run("CONFIG d=4 r=3\nATTEND not_before=4\nATTEND", 20)
    assert seen == [
        (0, "busy", 0),
        *[(0, "arrival", 3)] * 3,
        (READ, "busy", 3),
        (READ, "busy", 3),
        (0, "busy", 3),  # the end is found, nothing works
    ]


def test_writes_wait_for_reads_and_reads_for_writes():
    # A read from tick 1 to 4; a write from 6 to 7.
    inputs = {1: {"busy": READ}, 5: {"busy": 0}, 6: {"busy": WRITE}, 8: {"busy": 0}}
    seen = run("ATTEND\nWRITE\nREAD", 20, inputs)
    assert [s[:2] for s in seen] == [
        (READ, "busy"),
        *[(0, "order")] * 4,
        (WRITE, "busy"),
        *[(0, "order")] * 2,
        (READ, "busy"),
        (0, "busy"),
    ]


@pytest.mark.parametrize("first", ["ATTEND", "WRITE", "RECLAIM", "TRANSPOSE"])
def test_a_configuration_waits_for_both(first):
    mine = READ if first in ("ATTEND", "TRANSPOSE") else WRITE
    seen = run(f"{first}\nCONFIG r=9\n{first}", 20, {1: {"busy": mine}, 3: {"busy": 0}})
    assert seen == [
        (mine, "busy", 0),
        *[(0, "order", 0)] * 2,
        (0, "busy", 0),
        (mine, "busy", 9),
        (0, "busy", 9),
    ]


def test_a_command_comes_after_those_of_its_own_kind_if_it_says_so():
    # A read is at work from tick 1 to 3: another one does not mind, unless it comes after the drive; GPU and link are
    # not the decoder's.
    inputs = {1: {"busy": READ}, 4: {"busy": 0}}
    assert [s[1] for s in run("ATTEND\nATTEND after=3", 4, inputs)] == ["busy", "busy", "drain", "drain"]
    assert [s[1] for s in run("ATTEND\nATTEND after=4", 9, inputs)] == [
        "busy",
        *["order"] * 3,
        "busy",
        "busy",
    ]


def test_causes_are_charged_in_their_order():
    # Full, then out of order, then too early: each hides what comes after it in CAUSES.
    assert CAUSES.index("queue") < CAUSES.index("order") < CAUSES.index("arrival")
    inputs = {0: {"full": READ, "busy": WRITE}, 2: {"full": 0}, 4: {"busy": 0}}
    seen = run("ATTEND not_before=6", 20, inputs)
    assert [s[1] for s in seen] == ["queue", "queue", "order", "order", "arrival", "arrival", "busy", "busy"]


def test_the_run_ends_when_all_is_done():
    inputs = {1: {"busy": READ}, 3: {"busy": 0, "draining": 1}, 5: {"draining": 0}}
    seen = run("ATTEND", 20, inputs)
    assert [s[1] for s in seen] == ["busy", "drain", "drain", "drain", "drain", "busy"]
    assert run("RECLAIM", 3) == [(WRITE, "busy", 0), (0, "busy", 0)]
    assert OP["RECLAIM"] == 5
