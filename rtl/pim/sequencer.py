"""The sequencer: takes instructions from the code memory, one after the other."""

from amaranth.hdl import Assert, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.pim import CAUSES, ISA, N_CHANNEL_OPS, PimParams
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.pim.bus import bits_for_count

TICK_BITS = 32


class Sequencer(wiring.Component):
    """Fetches, loads and dispatches an instruction, waits until its channels have completed it, retires it.

    Each step takes a tick on which the ASIC's domain works: (t * p) mod q < p. The dispatch waits for the
    instruction's `not_before`. The fetch that finds the end of the program ends the run.

    Parameters
    ----------
    params : PimParams
    depth : int
        Instructions that the code memory holds.

    Members
    -------
    =========== === ============== =====================================================================
    clear       In  1              a run begins in the next tick
    run         Out 1              this tick belongs to the run
    tick        Out 32             its number
    length      In                 instructions of the program
    p, q        In  16             the domain's ratio to the tick
    code_addr   Out                instruction to read
    code_data   In  record         what was read one tick ago
    start       Out channels       the channels that begin `instruction` in the next tick
    instruction Out record
    busy        In  channels       channels that have not completed theirs
    retire      Out 1              instruction number `index` completes; `first` is its first tick
    index       Out
    first       Out 32
    working     Out 1              this tick is busy
    stall       Out range(causes)  cause of this tick, where it is not
    =========== === ============== =====================================================================
    """

    def __init__(self, *, params: PimParams, depth: int):
        self._params, self._depth = params, depth
        record = layout_of(ISA.record("code"))
        index = bits_for_count(depth + 1)
        super().__init__(
            {
                "clear": In(1),
                "run": Out(1),
                "tick": Out(TICK_BITS),
                "length": In(index),
                "p": In(16),
                "q": In(16),
                "code_addr": Out(index),
                "code_data": In(record),
                "start": Out(params.channels),
                "instruction": Out(record),
                "busy": In(params.channels),
                "retire": Out(1),
                "index": Out(index),
                "first": Out(TICK_BITS),
                "working": Out(1),
                "stall": Out(range(len(CAUSES))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        # The domain's enable: an accumulator holds (tick * p) mod q.
        part = Signal(17)
        enable = part < self.p
        with m.If(self.clear):
            m.d.sync += [self.run.eq(1), self.tick.eq(0), self.index.eq(0), part.eq(0)]
        with m.Elif(self.run):
            m.d.sync += self.tick.eq(self.tick + 1)
            m.d.sync += part.eq(Mux(part + self.p >= self.q, part + self.p - self.q, part + self.p))

        m.d.comb += [self.code_addr.eq(self.index), self.stall.eq(CAUSES.index("clock"))]
        fetched = Signal()  # this instruction's first tick is known
        with m.FSM():
            with m.State("FETCH"):
                with m.If(self.run & ~fetched):
                    m.d.sync += [self.first.eq(self.tick), fetched.eq(1)]
                with m.If(self.run & enable):
                    m.d.comb += self.working.eq(1)
                    m.d.sync += fetched.eq(0)
                    with m.If(self.index == self.length):
                        m.d.sync += self.run.eq(0)
                    with m.Else():
                        m.next = "LOAD"
            with m.State("LOAD"):
                with m.If(enable):
                    m.d.comb += self.working.eq(1)
                    m.d.sync += self.instruction.eq(self.code_data)
                    m.next = "DISPATCH"
            with m.State("DISPATCH"):
                with m.If(self.tick < self.instruction.not_before):
                    m.d.comb += self.stall.eq(CAUSES.index("arrival"))
                with m.Elif(enable):
                    m.d.comb += [self.working.eq(1), self.start.eq(self.instruction.channels)]
                    m.d.sync += Assert(self.instruction.op < N_CHANNEL_OPS, "no unit for this instruction")
                    m.next = "WAIT"
            with m.State("WAIT"):
                with m.If(self.busy.any()):
                    m.d.comb += self.stall.eq(CAUSES.index("wait"))
                with m.Elif(enable):
                    m.d.comb += [self.working.eq(1), self.retire.eq(1)]
                    m.d.sync += self.index.eq(self.index + 1)
                    m.next = "FETCH"
        return m
