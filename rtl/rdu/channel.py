"""One channel of an off-chip memory."""

from amaranth.hdl import Module, Mux, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.rdu import DRAM, DRAM_TIMINGS, LINE_BITS, RATE_BITS, WORD_BITS, RduParams
from tilewright.rtl.lib.arbiter import RoundRobin
from tilewright.rtl.rdu.banks import AHEAD_BITS, COUNT_BITS, Banks

__all__ = ["Channel"]


class Channel(wiring.Component):
    """A channel: it grants one of its AGCUs a line in some ticks, round robin.

    Tick t after ``start`` (t = 0 is the one behind it) works where (t * p) mod q < p, p / q being the tier's lines a
    tick of one channel. In a tick that works one request is granted, if there is any: after ``start`` requester 0
    comes first, and after a grant to k requester k + 1 does. A granted line is read or written in the tick of the
    grant; ``answer`` has what was read in the next one. The tier's latency is kept by whoever asks.

    A tier whose params have banks has `Banks`, which say, where `timed`, in place of the rate whether a tick works; a line
    is read or written when its request is taken, before its column command: the order is the same.

    The memory has a port for each channel, see `LineMemory`: what one channel writes in a tick is read from the next
    one on.

    Parameters
    ----------
    params : RduParams
    count : int
        AGCUs on this channel, at least 1.
    tier : int
        Its memory, an index of TIERS.

    Members
    -------
    ============== === ========================= ===============================================================
    start          In  1                         a run begins
    p, q           In  RATE_BITS                 lines a tick, constant from `start` on
    timed          In  1                         `banks` say when it works
    timing         In  array, timings            as `Banks` has it; likewise later, activate, conflict, refreshes (Out)
    requests       In  count                     who asks for a line
    lines          In  array(LINE_BITS), count   which
    writes         In  array, count              bytes of it to be written; none to read it
    data           In  array, count              what is written
    grants         Out count                     who is granted, one-hot
    answer         Out bits of a line            the line read by the grant of the tick before
    read_enable    Out 1                         port of the memory, as `LineMemory` has it; likewise read_line,
                                                 read_data (In), write_enable, write_line, write_data
    ============== === ========================= ===============================================================
    """

    def __init__(self, *, params: RduParams, count: int, tier: int = 0):
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count!r}")
        self._count = count
        self._dram = dict(zip(DRAM, params.dram[tier].tolist(), strict=True))
        bits = params.lanes * WORD_BITS
        super().__init__(
            {
                "start": In(1),
                "p": In(RATE_BITS),
                "q": In(RATE_BITS),
                "timed": In(1),
                "timing": In(AHEAD_BITS).array(len(DRAM_TIMINGS)),
                "later": Out(32),
                "activate": Out(1),
                "conflict": Out(1),
                "refreshes": Out(COUNT_BITS),
                "requests": In(count),
                "lines": In(LINE_BITS).array(count),
                "writes": In(bits // 8).array(count),
                "data": In(bits).array(count),
                "grants": Out(count),
                "answer": Out(bits),
                "read_enable": Out(1),
                "read_line": Out(LINE_BITS),
                "read_data": In(bits),
                "write_enable": Out(bits // 8),
                "write_line": Out(LINE_BITS),
                "write_data": Out(bits),
            }
        )

    def elaborate(self, platform):
        m = Module()
        phase = Signal(RATE_BITS)
        following = Signal(RATE_BITS + 1)
        works = Signal()
        m.d.comb += [works.eq(phase < self.p), following.eq(phase + self.p)]
        banks = None
        if self._dram["refi"]:
            sizes = {name: self._dram[name] for name in ("group_bits", "column_bits", "bank_bits")}
            m.submodules.banks = banks = Banks(**sizes)
            with m.If(self.timed):
                m.d.comb += works.eq(banks.ready)
        with m.If(self.start):
            m.d.sync += phase.eq(0)
        with m.Else():
            m.d.sync += phase.eq(Mux(following < self.q, following, following - self.q))

        m.submodules.turn = turn = ResetInserter(self.start)(RoundRobin(count=self._count))
        line = Signal(LINE_BITS)
        mask = Signal.like(self.write_enable)
        m.d.comb += [
            turn.requests.eq(self.requests),
            turn.ready.eq(works),
            self.grants.eq(Mux(works, turn.grant, 0)),
            self.answer.eq(self.read_data),
            self.read_line.eq(line),
            self.write_line.eq(line),
            self.write_enable.eq(mask),
            self.read_enable.eq(self.grants.any() & ~mask.any()),
        ]
        if banks is not None:
            m.d.comb += [
                banks.start.eq(self.start),
                *(a.eq(b) for a, b in zip(banks.timing, self.timing, strict=True)),
                banks.take.eq(self.timed & self.grants.any()),
                banks.line.eq(line),
                banks.write.eq(mask.any()),
                self.later.eq(Mux(self.timed, banks.later, 0)),
                self.activate.eq(banks.activate),
                self.conflict.eq(banks.conflict),
                self.refreshes.eq(banks.refreshes),
            ]
        for k in range(self._count):
            with m.If(self.grants[k]):
                m.d.comb += [
                    line.eq(self.lines[k]),
                    mask.eq(self.writes[k]),
                    self.write_data.eq(self.data[k]),
                ]
        return m
