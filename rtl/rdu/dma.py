"""The DMA: lines from one off-chip memory to another, alongside everything else."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.rdu import CAUSE, CODE, LINE_BITS, RATE_BITS, TIERS
from tilewright.rtl.layouts import layout_of

__all__ = ["Dma"]


class _Beats(wiring.Component):
    """Beats at the rate of p in q ticks, until all lines have had one.

    The next tick is tick 0 where `clear`; a beat is on tick t iff (t * p) mod q < p and lines are left.

    Members
    -------
    ===== === ========= ==============================
    clear In  1         begin with `lines`
    lines In  LINE_BITS how many there are
    p, q  In  RATE_BITS 1 <= p <= q
    left  Out LINE_BITS lines that had no beat yet
    beat  Out 1         there is one in this tick
    count Out           lines of it
    ===== === ========= ==============================
    """

    def __init__(self, *, most: int):
        self._most = most
        super().__init__(
            {
                "clear": In(1),
                "lines": In(LINE_BITS),
                "p": In(RATE_BITS),
                "q": In(RATE_BITS),
                "left": Out(LINE_BITS),
                "beat": Out(1),
                "count": Out(range(most + 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        part, after = Signal(RATE_BITS), Signal(RATE_BITS + 1)
        m.d.comb += [
            after.eq(part + self.p),
            self.beat.eq((part < self.p) & (self.left != 0)),
            self.count.eq(Mux(self.left < self._most, self.left, self._most)),
        ]
        with m.If(self.clear):
            m.d.sync += [part.eq(0), self.left.eq(self.lines)]
        with m.Else():
            m.d.sync += part.eq(Mux(after >= self.q, after - self.q, after))
            with m.If(self.beat):
                m.d.sync += self.left.eq(self.left - self.count)
        return m


class Dma(wiring.Component):
    """Copies lines by the rules of `rtl.rdu.sequencer`: asks in beats, and moves each a latency later.

    As the memory's answers are as far apart as the beats, moving follows a second counter of beats that begins a
    latency after the first; no line number is kept in between. A line is read in the tick before it is written.

    Parameters
    ----------
    lines : int
        Of a beat.

    Members
    -------
    ============= === ================ ===========================================================
    start         In  1                the next tick is tick 0; `operation` need not be held
    operation     In  layout_of(CODE)  a COPY
    p, q          In  RATE_BITS        beats a tick
    latency       In  array(32)        of each memory
    active        Out 1                at work
    finished      Out 1                in the last tick of work
    activity      Out 4                0 is busy, n is CAUSES[n - 1]
    source        Out                  memory that is read
    target        Out                  memory that is written
    reads         Out lines            mask of the beat's lines that are read in this tick
    read_line     Out LINE_BITS        the first of them
    writes        Out lines            mask of the lines, read one tick ago, that are written
    write_line    Out LINE_BITS        the first of them
    moved         Out                  how many they are
    ============= === ================ ===========================================================
    """

    def __init__(self, *, lines: int):
        self._lines = lines
        super().__init__(
            {
                "start": In(1),
                "operation": In(layout_of(CODE)),
                "p": In(RATE_BITS),
                "q": In(RATE_BITS),
                "latency": In(32).array(len(TIERS)),
                "active": Out(1),
                "finished": Out(1),
                "activity": Out(4),
                "source": Out(bits_for(len(TIERS) - 1)),
                "target": Out(bits_for(len(TIERS) - 1)),
                "reads": Out(lines),
                "read_line": Out(LINE_BITS),
                "writes": Out(lines),
                "write_line": Out(LINE_BITS),
                "moved": Out(range(lines + 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        o = self.operation
        m.submodules.ask = ask = _Beats(most=self._lines)
        m.submodules.move = move = _Beats(most=self._lines)
        lines, lead = Signal(LINE_BITS), Signal(32)
        wait = Signal(32)
        with m.Switch(o.source):
            for tier in range(len(TIERS)):
                with m.Case(tier):
                    m.d.comb += wait.eq(self.latency[tier])
        for beats in (ask, move):
            m.d.comb += [beats.p.eq(self.p), beats.q.eq(self.q)]
        m.d.comb += [
            ask.clear.eq(self.start),
            ask.lines.eq(o.lines),
            move.clear.eq(self.start | (lead != 0)),
            move.lines.eq(Mux(self.start, o.lines, lines)),
        ]
        writes, moves = Signal(), Signal()
        m.d.comb += [
            moves.eq(move.beat & (lead == 0)),
            self.reads.eq(Mux(moves, self._mask(move.count), 0)),
            self.writes.eq(Mux(writes, self._mask(self.moved), 0)),
            self.finished.eq(self.active & (lead == 0) & (move.left == 0) & ~writes),
        ]
        m.d.sync += [writes.eq(moves), self.moved.eq(Mux(moves, move.count, 0))]
        with m.If(self.start):
            m.d.sync += [
                self.active.eq(1),
                lines.eq(o.lines),
                lead.eq(Mux(o.lines == 0, 0, wait - 1)),
                self.source.eq(o.source),
                self.target.eq(o.target),
                self.read_line.eq(getattr(o, "from")),
                self.write_line.eq(o.to),
            ]
        with m.Else():
            with m.If(lead != 0):
                m.d.sync += lead.eq(lead - 1)
            with m.If(moves):
                m.d.sync += self.read_line.eq(self.read_line + move.count)
            m.d.sync += self.write_line.eq(self.write_line + self.moved)
            with m.If(self.finished):
                m.d.sync += self.active.eq(0)
        with m.If(~self.active):
            m.d.comb += self.activity.eq(CAUSE["idle"])
        with m.Elif(ask.left == 0):
            m.d.comb += self.activity.eq(CAUSE["pipeline"])
        with m.Elif(~ask.beat):
            m.d.comb += self.activity.eq(CAUSE["memory"])
        return m

    def _mask(self, count):
        return ((1 << count) - 1)[: self._lines]
