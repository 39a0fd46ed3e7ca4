"""Timed banks of a channel: when a request is taken, and when its column command issues."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.rdu import DRAM_TIMINGS, LINE_BITS

__all__ = ["Banks"]

AHEAD_BITS = 24  # of a number of ticks from now
COUNT_BITS = 16


class Banks(wiring.Component):
    """A controller that gives every request it takes the ticks of all its commands at once, in order.

    A line's number is, from its lowest bit: bank group, column, bank of the group, row. Rows stay open. The request
    taken in tick t (t = 0 is the one behind `start`) gets, each as early as all commands so far allow (`DRAM_TIMINGS`):

    * its row open: a column command from t on;
    * its bank closed: an activate from t on, `rrd` behind the last one, and the column command `rcd` behind that;
    * another row open: a precharge from t on, `ras` behind the bank's activate, `rtp` or `wtp` behind its column
      commands; then the activate, `rp` behind it.

    Column commands issue in the order of the requests, so an activate may pass those of earlier requests, but they
    are not reordered: `ccd_s` apart, `ccd_l` behind one of the same bank group, and `rtw` or `wtr` where the direction
    changes. Rows and columns have command buses of their own, and a precharge finds its bus free. A request is taken
    only while the column command of the one before is less than `ahead` away.

    In each tick that is a multiple of `refi`, but 0, a refresh of all banks falls due and no request is taken: it begins
    `rp` behind the last of the precharges that close all banks as soon as they may, and no activate issues for `rfc`
    from there. At `start` all banks are closed and nothing has gone before.

    Parameters
    ----------
    group_bits, column_bits, bank_bits : int
        Of a line's number.

    Members
    -------
    ============ === ============================ ===================================================================
    start        In  1                            a run begins
    timing       In  array(AHEAD_BITS), timings   by DRAM_TIMINGS, constant from `start` on
    ready        Out 1                            a request may be taken in this tick
    take         In  1                            and is
    line, write  In  LINE_BITS, 1                 which, and whether it is written
    later        Out 32                           ticks to its column command less `rcd`, modulo 2**32
    activate     Out 1                            with `take`: a row is opened
    conflict     Out 1                            and another one closed for it
    refreshes    Out COUNT_BITS                   refreshes since the request before
    ============ === ============================ ===================================================================
    """

    def __init__(self, *, group_bits: int, column_bits: int, bank_bits: int):
        self._bits = group_bits, column_bits, bank_bits
        super().__init__(
            {
                "start": In(1),
                "timing": In(AHEAD_BITS).array(len(DRAM_TIMINGS)),
                "ready": Out(1),
                "take": In(1),
                "line": In(LINE_BITS),
                "write": In(1),
                "later": Out(32),
                "activate": Out(1),
                "conflict": Out(1),
                "refreshes": Out(COUNT_BITS),
            }
        )

    def elaborate(self, platform):
        m = Module()
        d = dict(zip(DRAM_TIMINGS, self.timing, strict=True))
        group_bits, column_bits, bank_bits = self._bits
        group = self.line[:group_bits]
        above = self.line[group_bits + column_bits :]
        row = above[bank_bits:]
        index = Cat(group, above[:bank_bits], Const(0, 1))
        banks = range(1 << group_bits + bank_bits)

        def ticks(name):
            return Signal(AHEAD_BITS, name=name)

        def passed(value):
            """The same tick, seen from the next one."""
            return Mux(value == 0, 0, value - 1)

        def latest(*values):
            out = values[0]
            for value in values[1:]:
                out = Mux(out > value, out, value)
            return out

        def named(value, name):
            signal = ticks(name)
            m.d.comb += signal.eq(value)
            return signal

        # What is from now on in so many ticks, 0 where it may be now.
        columns = [ticks(f"column_{b}") for b in banks]
        precharges = [ticks(f"precharge_{b}") for b in banks]
        activate, closed, backlog = ticks("activate"), ticks("closed"), ticks("backlog")
        same, other, turn = ticks("same"), ticks("other"), ticks("turn")
        opened = Array(Signal(name=f"open_{b}") for b in banks)
        rows = Array(Signal(len(row), name=f"row_{b}") for b in banks)
        last_group, last_write = Signal(max(group_bits, 1)), Signal()
        for value in (*columns, *precharges, activate, closed, backlog, same, other, turn):
            m.d.sync += value.eq(Mux(self.start, 0, passed(value)))

        # The refresh.
        left, due = ticks("left"), Signal()
        m.d.comb += due.eq((left == 0) & ~self.start)
        m.d.sync += left.eq(Mux(self.start, d["refi"], Mux(due, d["refi"], left) - 1))
        with m.If(self.start):
            m.d.sync += left.eq(d["refi"])
        refreshed = named(latest(activate, closed + d["rp"] + d["rfc"]), "refreshed")
        since = Signal(COUNT_BITS)
        with m.If(self.start | self.take):
            m.d.sync += since.eq(0)
        with m.Elif(due):
            m.d.sync += since.eq(since + 1)

        # The request at hand.
        hit = Signal()
        column_of, precharge_of = Array(columns)[index], Array(precharges)[index]
        m.d.comb += hit.eq(opened[index] & (rows[index] == row))
        before = named(Mux(opened[index], precharge_of + d["rp"], 0), "before")
        activates = named(latest(before, activate), "activates")
        allowed = named(Mux(hit, column_of, activates + d["rcd"]), "allowed")
        bus = named(Mux(group == last_group, same, other), "bus")
        turns = named(Mux(self.write == last_write, 0, turn), "turns")
        column = named(latest(allowed, bus, turns), "column")
        recovery = Mux(self.write, d["wtp"], d["rtp"])
        precharge = named(
            latest(Mux(hit, precharge_of, activates + d["ras"]), column + recovery), "precharge"
        )
        m.d.comb += [
            self.ready.eq(~due & (backlog < d["ahead"])),
            self.later.eq(column - d["rcd"]),
            self.activate.eq(self.take & ~hit),
            self.conflict.eq(self.take & ~hit & opened[index]),
            self.refreshes.eq(Mux(self.take, since, 0)),
        ]
        with m.If(self.take):
            m.d.sync += [
                opened[index].eq(1),
                rows[index].eq(row),
                Array(columns)[index].eq(passed(allowed)),
                Array(precharges)[index].eq(passed(precharge)),
                closed.eq(passed(latest(closed, precharge))),
                backlog.eq(passed(column)),
                same.eq(passed(named(column + d["ccd_l"], "next_same"))),
                other.eq(passed(named(column + d["ccd_s"], "next_other"))),
                turn.eq(passed(named(column + Mux(self.write, d["wtr"], d["rtw"]), "next_turn"))),
                last_group.eq(group),
                last_write.eq(self.write),
            ]
            with m.If(~hit):
                m.d.sync += activate.eq(passed(named(activates + d["rrd"], "next_activate")))
        with m.If(due):
            m.d.sync += [activate.eq(passed(refreshed)), closed.eq(passed(refreshed))]
        for b in banks:
            with m.If(self.start | due):
                m.d.sync += opened[b].eq(0)
        return m
