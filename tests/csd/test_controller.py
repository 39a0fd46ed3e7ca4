"""The flash controller: rows that are forwarded, their ticks after the channel's, what it holds, who gets a port."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from tests.csd.units import pack, small_spec
from tests.lib.ticks import play
from tilewright.arch.csd import page_types
from tilewright.arch.flash import ERASE, PROGRAM, READ
from tilewright.rtl.csd.controller import FlashController, PortSwitch

SPEC = small_spec()
P = SPEC.params()
NAMES = ("chip", "die", "plane", "block", "page")


def set_times(ctx, unit, spec):
    t = spec.flash_device.timing
    for i, kind in enumerate(("read", "program", "erase")):
        ctx.set(unit.times.command[i], t[f"{kind}_command"])
        ctx.set(unit.times.command_plane[i], t[f"{kind}_command_plane"])
    for kind in ("read", "program"):
        ctx.set(getattr(unit.times, kind)[0], t[f"{kind}_lsb"])
    ctx.set(unit.times.page_transfer, t["page_transfer"])
    ctx.set(unit.times.erase, t["erase"])


def run(script, ticks, grant=None):
    """Plays [(tick, function(ctx, unit))]; returns the lines (tick, port, row, word, data) and outputs by tick.

    `grant(tick, request)`: by default every request is granted.
    """
    unit = FlashController(params=P, types=page_types(SPEC), ports=2, black_box=False)
    lines, seen = [], []

    async def bench(ctx):
        set_times(ctx, unit, SPEC)
        for tick in range(ticks):
            ctx.set(unit.push, 0)
            ctx.set(unit.write, 0)
            for at, action in script:
                if at == tick:
                    action(ctx, unit)
            request = ctx.get(unit.request)
            ctx.set(unit.grant, int(request != 0 and (grant is None or grant(tick, request))))
            seen.append(
                {
                    name: ctx.get(getattr(unit, name))
                    for name in ("ready", "working", "request", "grant", "releases", "bus")
                }
            )
            if ctx.get(unit.valid):
                line = ctx.get(unit.line)
                lines.append((tick, ctx.get(unit.port), line.row, line.word, line.data))
            await ctx.tick()

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return lines, seen


def write(where, word, values):
    def action(ctx, unit):
        ctx.set(unit.write, 1)
        for name in NAMES:
            ctx.set(getattr(unit.write_address, name), where.get(name, 0))
        ctx.set(unit.write_word, word)
        ctx.set(unit.write_data, pack(values))

    return action


def push(kind, where, port=0, mask=0, row_lines=1, rank=0):
    def action(ctx, unit):
        assert ctx.get(unit.ready)
        ctx.set(unit.push, 1)
        ctx.set(unit.kind, kind)
        for name in NAMES:
            ctx.set(getattr(unit.address, name), where.get(name, 0))
        for name, value in (("port", port), ("mask", mask), ("row_lines", row_lines), ("rank", rank)):
            ctx.set(getattr(unit.job, name), value)

    return action


def fill(where, seed, start):
    """Writes of a page, a line a tick from `start` on, and what they write."""
    data = np.random.default_rng(seed).integers(0, 1 << 16, (P.page_lines, P.lanes))
    return [(start + w, write(where, w, line.tolist())) for w, line in enumerate(data)], data


def test_rows_of_a_page_by_hand():
    # Pushed at 16, arrives at 17; command 2, array 30, data-out 10: the page is there at 59. Its port is asked for a
    # tick later, the first line comes two after that. Rows of 4 lines: 1 and 3 are wanted, 5 rows came before.
    where = {"chip": 1, "plane": 1, "block": 2, "page": 3}
    writes, data = fill(where, 1, 0)
    lines, seen = run([*writes, (16, push(READ, where, port=1, mask=0b1010, row_lines=4, rank=5))], 80)
    assert [s["request"] for s in seen].index(2) == 60
    want = [
        (62 + 4 * i + w, 1, 5 + i, w, pack(data[row * 4 + w]))
        for i, row in enumerate((1, 3))
        for w in range(4)
    ]
    assert lines == want
    assert [t for t, s in enumerate(seen) if s["releases"]] == [68]
    assert [t for t, s in enumerate(seen) if s["working"]] == list(range(17, 69))


def test_a_page_of_which_nothing_is_wanted_is_read_and_dropped():
    lines, seen = run([(0, push(READ, {}))], 60)
    assert not lines and not any(s["request"] for s in seen)
    assert [t for t, s in enumerate(seen) if s["working"]] == list(range(1, 45))


def test_a_read_waits_for_the_program_of_its_page():
    where = {"block": 1}
    writes, data = fill(where, 2, 0)
    # Program: arrives at 17, command 2, data-in 10, array 50: done at 79. The read then takes 2 + 30 + 10.
    lines, _ = run([*writes, (16, push(PROGRAM, where)), (17, push(READ, where, mask=0b1))], 140)
    assert lines == [(79 + 42 + 3, 0, 0, 0, pack(data[0]))]


def test_a_queue_is_full_until_something_is_done():
    # Four reads of one die, one after the other; nobody takes their rows before tick 300.
    script = [(i, push(READ, {"block": i}, mask=1, rank=i)) for i in range(4)]
    lines, seen = run(script, 320, grant=lambda tick, _: tick >= 300)
    assert [t for t, s in enumerate(seen) if not s["ready"]] == list(range(4, 302))
    assert [(t, row) for t, _, row, _, _ in lines] == [(302 + i, i) for i in range(4)]


def test_erases_count_as_operations():
    _, seen = run([(0, push(ERASE, {})), (1, push(ERASE, {"chip": 1}))], 110)
    # Arrive at 1 and 2: commands 2 ticks each from 1, arrays 90.
    assert [t for t, s in enumerate(seen) if s["working"]] == list(range(1, 96))
    assert [t for t, s in enumerate(seen) if s["bus"]] == [1, 2, 3, 4]


def test_a_port_goes_round():
    # Three controllers that always ask; each has the port for two ticks.
    unit = PortSwitch(sources=3)

    holder = 0

    def drive(tick, before):
        nonlocal holder
        holder = before.get("grant") or holder
        return {"requests": 0b111, "releases": holder if tick and tick % 2 == 0 else 0, "clear": 0}

    seen = play(unit, 7, drive, ["grant"])
    assert [s["grant"] for s in seen] == [1, 0, 2, 0, 4, 0, 1]


@pytest.mark.parametrize("requests", [0b01, 0b10])
def test_a_free_port_is_granted_at_once(requests):
    unit = PortSwitch(sources=2)
    seen = play(
        unit, 3, lambda t, _: {"requests": requests if t else 0, "releases": 0, "clear": 0}, ["grant"]
    )
    assert [s["grant"] for s in seen] == [0, requests, 0]
