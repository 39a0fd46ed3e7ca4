"""Timed banks of a memory channel: hand sums, laws, and the controller of the RTL against that of the model."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.inner import called
from tests.rdu.test_model import SETS, Sketch, spec_of
from tests.rdu.units import simulate
from tilewright.arch import rdu
from tilewright.arch.errors import UserError
from tilewright.arch.rdu import dynamic_flow
from tilewright.arch.registry import load_spec
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.rtl.rdu.banks import Banks
from tilewright.sim import rdu_dram
from tilewright.sim import rdu_state as state
from tilewright.sim.rdu import execute

LINKS = 3  # from an AGCU to its neighbour
TICKS = {
    "ahead": 40,
    "rcd": 7,
    "rp": 5,
    "ras": 17,
    "rtp": 3,
    "wtp": 11,
    "ccd_s": 2,
    "ccd_l": 4,
    "rrd": 6,
    "rtw": 8,
    "wtr": 9,
    "refi": 1000,
    "rfc": 50,
}
BITS = {"group_bits": 1, "column_bits": 2, "bank_bits": 1}  # a line is row : bank : column, 2 bits : group


class Memory(NamedTuple):
    bank: np.ndarray
    dram: np.ndarray


class Controller:
    """The channel of the model by itself: requests in, column commands out."""

    def __init__(self, ticks=TICKS, bits=BITS):
        row = [1, *bits.values(), *(ticks[name] for name in rdu.DRAM_TIMINGS)]
        banks = 1 << bits["group_bits"] + bits["bank_bits"]
        self.m = Memory(
            np.array([[-1, 0, 0]] * banks, np.int64).reshape(-1, state.BANK_ROW), np.array([row], np.int64)
        )
        self.group = np.zeros(state.GROUP_ROW, np.int64)
        self.group[state.LAST_GROUP], self.group[state.NEXT_REFRESH] = -1, ticks["refi"]
        self.agcu = np.zeros(state.AGCU_ROW, np.int64)

    def column(self, line, t, write=0):
        """The tick of the column command of a request that comes in tick t."""
        t = called(rdu_dram.first_taken)(self.m.dram[0], self.group, t)
        self.agcu[state.STORE] = write
        called(rdu_dram.take)(self.m, self.group, self.agcu, line, t)
        return int(t + self.agcu[state.LATER] + self.m.dram[0, state.RCD])

    def events(self):
        return [int(self.agcu[k]) for k in (state.ACTIVATES, state.ROW_CONFLICTS, state.REFRESHES)]


def columns(*requests, ticks=TICKS):
    """Of requests that come in tick 0, in this order: lines, or (line, whether it is written)."""
    c = Controller({**TICKS, **ticks})
    return [c.column(*((r, 0, 0) if isinstance(r, int) else (r[0], 0, r[1]))) for r in requests]


# ---- by hand ------------------------------------------------------------------------------------------


def test_a_closed_bank_takes_an_activate():
    assert columns(0) == [7]  # activate 0, column rcd = 7


def test_a_row_that_is_open_takes_columns_alone():
    # Lines 0, 2, 4, 6 are columns 0..3 of a row in group 0: ccd_l = 4 apart. Lines 0 and 1 are in two groups: the
    # activate of the second is rrd = 6 behind, so its column is at 6 + 7; from then on they are ccd_s = 2 apart.
    assert columns(0, 2, 4, 6) == [7, 11, 15, 19]
    assert columns(0, 1, 2, 3, 4) == [7, 13, 15, 17, 19]


def test_another_row_takes_precharge_and_activate():
    # Line 16 is row 1 of bank 0. Its precharge: ras = 17 behind the activate at 0, and rtp = 3 behind the column at 7;
    # activate at 17 + 5, column at 22 + 7. After more reads of row 0, the last at 19, it is at 19 + 3 + 5 + 7.
    assert columns(0, 16) == [7, 29]
    assert columns(0, 2, 4, 6, 16)[-1] == 34
    # After a write the precharge is wtp = 11 behind the column at 7: 18 + 5 + 7.
    assert columns((0, 1), 16) == [7, 30]


def test_a_change_of_direction_takes_its_turn():
    # Read, write, read of one row: rtw = 8 and wtr = 9; ccd_l = 4 between the writes.
    assert columns(0, (2, 1), (4, 1), 6) == [7, 15, 19, 28]


def test_an_activate_passes_columns_of_requests_before():
    # Columns of row 0 are at 7, 11, 15, 19. Line 8 is the other bank of group 0: its activate is at 6, though the fifth
    # request's column may only follow at 19 + 4.
    c = Controller()
    assert [c.column(line, 0) for line in (0, 2, 4, 6, 8)] == [7, 11, 15, 19, 23]
    assert c.group[state.NEXT_ACTIVATE] == 12


def test_a_request_waits_for_the_one_before():
    # ahead = 3: the second one is taken when the first's column, at 7, is 2 ticks away, in tick 5; the row is open.
    # The third, of another group, is taken 2 ticks before 11: activate 9, column 16.
    assert columns(0, 2, 1, ticks={"ahead": 3}) == [7, 11, 16]


def test_a_refresh_closes_all_banks():
    c = Controller({**TICKS, "refi": 100})
    assert c.column(0, 0) == 7
    # Due at 100; precharge allowed, rp = 5, rfc = 50: activate 155, column 162.
    assert c.column(2, 100) == 162
    # The next one is due at 200: the precharge waits for ras, 155 + 17 = 172, which is over. 200 + 55 + 7.
    assert c.column(4, 250) == 262
    assert c.events() == [3, 0, 2]


def test_no_request_is_taken_as_a_refresh_falls_due():
    d = Controller({**TICKS, "refi": 100}).m.dram[0]
    group = Controller().group
    assert [called(rdu_dram.first_taken)(d, group, t) for t in (0, 99, 100, 101, 200)] == [
        0,
        99,
        101,
        101,
        201,
    ]


# ---- a kernel -----------------------------------------------------------------------------------------


def machine(*more, channel="dram", **ticks):
    sets = [f"memory.hbm.dram.{name}_ns={value}" for name, value in {**TICKS, **ticks}.items()]
    sizes = ("bank_groups=2", "banks_per_group=2", "row_bytes=64")  # lines of 16 bytes
    sets += [f"memory.hbm.dram.{text}" for text in sizes]
    return spec_of(*SETS, *sets, f"memory.hbm.channel={channel}", "memory.hbm.latency_ns=30", *more).params()


def load(p, lines, stride=16, base=0):
    """First and last tick in which a scratchpad takes what a load of so many lines brings; and what it did."""
    s = Sketch(p)
    s.agcu(0, direction="load", words=4, count0=lines, stride0=stride, flow=dynamic_flow(1, 0))
    s.pmu(1, 0, enable=1, write_count0=lines)
    did = execute(p, s.records(), {0: base})
    first, end = did.busy[did.units.index("pmu.write@1,0")]
    return int(first), int(end) - 1, did


def test_answers_come_with_their_columns():
    # As a port of the same latency would the first one; the others as far behind as their columns are by hand above.
    p = machine()
    begin = 30 + rdu.LOAD_LATENCY + LINKS
    assert load(p, 1)[:2] == (begin, begin)
    assert load(machine(channel="port"), 1)[:2] == (begin, begin)
    assert load(p, 4, stride=32)[:2] == (begin, begin + 19 - 7)
    assert load(p, 2, stride=256)[:2] == (begin, begin + 29 - 7)


def test_a_kernel_depends_on_its_addresses():
    # Two lines from line 6 on: column 3 of groups 0 and 1; from line 7 on: then bank 1 of group 0. Either way the second
    # activate is rrd = 6 behind. Lines 6 and 8 are two banks of one group, 6 and 4 two columns of a row.
    p = machine()
    assert load(p, 2, stride=32, base=6 * 16)[1] - load(p, 2, stride=32, base=4 * 16)[1] == 6 - 4


def test_what_a_kernel_counts():
    _, _, did = load(machine(), 64)
    counted = dict(zip(rdu.COUNTERS, did.counters.sum(axis=0).tolist(), strict=True))
    # 64 lines are 16 a row of all four banks: 4 rows of each; all but the first of each bank close another one.
    assert counted["hbm_lines"] == 64 and counted["hbm_activates"] == 16
    assert counted["hbm_row_conflicts"] == 12 and counted["hbm_refreshes"] == 0


@settings(deadline=None, max_examples=10)
@given(lines=st.integers(2000, 6000), base=st.integers(0, 1000))
def test_a_stream_runs_at_the_peak_less_refreshes(lines, base):
    # The numbers of SN40L's HBM. A stream of lines opens rows ahead, so all it loses is around refreshes: what these
    # take, and the rows of all four groups that are opened again, rrd apart.
    spec = load_spec("sn40l")
    ticks = dict(zip(rdu.DRAM, spec.params().dram[0].tolist(), strict=True))
    c = Controller(ticks, {name: ticks[name] for name in BITS})
    t = 0
    for n in range(lines):
        last = c.column(base + n, t)
        t = int(called(rdu_dram.first_taken)(c.m.dram[0], c.group, t)) + 1
    lost = last - (ticks["rcd"] + lines - 1)
    refreshes = c.events()[2]
    start = 4 * ticks["rrd"] + ticks["ccd_l"]
    around = ticks["rfc"] + ticks["rp"] + ticks["rcd"] + ticks["rtp"] + 4 * ticks["rrd"]
    assert refreshes * ticks["rfc"] <= lost <= start + refreshes * around + ticks["ras"]


# ---- RTL against model --------------------------------------------------------------------------------

COMPONENT = Banks(**BITS)


def rtl(ticks, requests):
    """Of (tick from which on, line, write): when each is taken, its column command; and the events in all."""
    out, events = [], [0, 0, 0]

    async def bench(ctx):
        for k, name in enumerate(rdu.DRAM_TIMINGS):
            ctx.set(COMPONENT.timing[k], ticks[name])
        ctx.set(COMPONENT.start, 1)
        await ctx.tick()
        ctx.set(COMPONENT.start, 0)
        queue = list(requests)
        for t in range(4000):
            if not queue:
                break
            at, line, write = queue[0]
            ctx.set(COMPONENT.line, line)
            ctx.set(COMPONENT.write, write)
            takes = t >= at and ctx.get(COMPONENT.ready)
            ctx.set(COMPONENT.take, takes)
            if takes:
                later = (ctx.get(COMPONENT.later) + (1 << 31)) % (1 << 32) - (1 << 31)
                out.append((t, t + later + ticks["rcd"]))
                for k, name in enumerate(("activate", "conflict", "refreshes")):
                    events[k] += ctx.get(getattr(COMPONENT, name))
                queue.pop(0)
            await ctx.tick()
        assert not queue

    simulate(COMPONENT, bench)
    return out, events


TIMES = st.fixed_dictionaries({name: st.integers(1, 20) for name in rdu.DRAM_TIMINGS if name != "refi"})
REQUESTS = st.lists(
    st.tuples(st.integers(0, 40) | st.just(0), st.integers(0, 63), st.integers(0, 1)), min_size=1, max_size=20
)


@settings(deadline=None, max_examples=40)
@given(ticks=TIMES, more=st.integers(1, 80), requests=REQUESTS)
def test_rtl_and_model_agree(ticks, more, requests):
    ticks = {**ticks, "refi": ticks["rp"] + ticks["rfc"] + more}
    c, t, expected, asked = Controller(ticks), 0, [], []
    for wait, line, write in requests:
        asked.append((t + wait, line, write))
        t = int(called(rdu_dram.first_taken)(c.m.dram[0], c.group, t + wait))
        expected.append((t, c.column(line, t, write)))
        t += 1
    assume(t < 4000)
    assert rtl(ticks, asked) == (expected, c.events())


# ---- refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory.hbm.channel=bank", "port"),
        ("memory.hbm.dram.bank_groups=3", "memory.hbm.dram.bank_groups must be a power of two, not 3"),
        ("memory.hbm.dram.row_bytes=96", "in lines of 64 bytes, must be a power of two, not 3/2"),
        ("memory.hbm.dram.refi_ns=274", "memory.hbm.dram.refi_ns must exceed rp_ns \\+ rfc_ns"),
        ("memory.hbm.dram.rfc_ns=1e6", "memory.hbm.dram.rfc_ns is 1600000 ticks"),
    ],
)
def test_specs_that_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        build(rdu.RduSpec, apply_sets(load_tree("sn40l", ["rdu"]), [text]), "sn40l")


def test_banks_take_a_latency_beyond_their_activate():
    sets = ["memory.hbm.channel=dram", "memory.hbm.latency_ns=14"]
    with pytest.raises(UserError, match=r"must exceed memory\.hbm\.dram\.rcd_ns: 23 ticks for 23"):
        build(rdu.RduSpec, apply_sets(load_tree("sn40l", ["rdu"]), sets), "sn40l")
    with pytest.raises(UserError, match=r"memory\.ddr\.dram is missing"):
        build(rdu.RduSpec, apply_sets(load_tree("plasticine", ["rdu"]), ["memory.ddr.channel=dram"]), "p")
