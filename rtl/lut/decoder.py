"""The sequencer: takes instructions from the code memory and hands them to the units."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.lut import CAUSES, ISA, OP
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lut.window import TICK_BITS


class Sequencer(wiring.Component):
    """Dispatches one instruction a tick, in order: not before its tick, and not while its unit is full.

    The run ends with a tick that finds the end of the program and no unit at work.

    Parameters
    ----------
    depth : int
        Instructions that the code memory holds.

    Members
    -------
    =========== === ============= =================================================================
    clear       In  1             a run begins in the next tick
    run         Out 1             this tick belongs to the run
    tick        Out 32            its number
    length      In                instructions of the program
    code_addr   Out               instruction to read
    code_data   In  record        what was read one tick ago
    instruction Out record        the next one
    number      Out               which it is
    full        In  3             units (load, compute, store) that take no more
    busy        In  3             units with instructions that are not complete
    dispatch    Out 3             the unit that takes `instruction` in this tick
    working     Out 1             this tick is busy
    stall       Out range(causes) cause of this tick, where it is not
    =========== === ============= =================================================================
    """

    def __init__(self, *, depth: int):
        record = layout_of(ISA.record("code"))
        index = bits_for(depth + 1)
        super().__init__(
            {
                "clear": In(1),
                "run": Out(1),
                "tick": Out(TICK_BITS),
                "length": In(index),
                "code_addr": Out(index),
                "code_data": In(record),
                "instruction": Out(record),
                "number": Out(index),
                "full": In(3),
                "busy": In(3),
                "dispatch": Out(3),
                "working": Out(1),
                "stall": Out(range(len(CAUSES))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        op = self.instruction.op
        unit = Signal(3)
        end = Signal()
        m.d.comb += [
            self.instruction.eq(self.code_data),
            unit[0].eq((op == OP["LOAD_A"]) | (op == OP["LOAD_W"])),
            unit[1].eq(op == OP["LMMA"]),
            unit[2].eq(op == OP["STORE"]),
            end.eq(self.number == self.length),
        ]
        with m.If(self.run):
            with m.If(end):
                m.d.comb += [self.stall.eq(CAUSES.index("drain")), self.working.eq(~self.busy.any())]
            with m.Elif(self.tick < self.instruction.not_before):
                m.d.comb += self.stall.eq(CAUSES.index("arrival"))
            with m.Elif((self.full & unit).any()):
                m.d.comb += self.stall.eq(CAUSES.index("queue"))
            with m.Else():
                m.d.comb += [self.working.eq(1), self.dispatch.eq(unit)]
        following = Signal.like(self.number)
        m.d.comb += following.eq(self.number + self.dispatch.any())
        # Memory is read a tick ahead, also in the tick before the first.
        m.d.comb += self.code_addr.eq(Mux(self.clear, 0, following))
        m.d.sync += [self.tick.eq(self.tick + 1), self.number.eq(following)]
        with m.If(self.working & end):
            m.d.sync += self.run.eq(0)
        with m.If(self.clear):
            m.d.sync += [self.run.eq(1), self.tick.eq(0), self.number.eq(0)]
        return m


class Rate(wiring.Component):
    """A core's share of a memory: a line on tick t iff (t * p) mod q < p.

    Members
    -------
    ===== === == ==============================
    clear In  1  the next tick is tick 0
    p, q  In  32 1 <= p <= q
    works Out 1  a line may move in this tick
    ===== === == ==============================
    """

    clear: In(1)
    p: In(32)
    q: In(32)
    works: Out(1)

    def elaborate(self, platform):
        m = Module()
        part = Signal(32)  # (t * p) mod q
        after = Signal(33)
        m.d.comb += [after.eq(part + self.p), self.works.eq(part < self.p)]
        m.d.sync += part.eq(Mux(self.clear, 0, Mux(after >= self.q, after - self.q, after)))
        return m
