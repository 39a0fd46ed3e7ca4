"""The sequencer: takes instructions from the code memory, one after the other."""

from amaranth.hdl import Array, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.pim import CAUSES, ISA, N_CHANNEL_OPS, PimParams
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.pim.bus import bits_for_count

TICK_BITS = 32
UNITS = ("channels", "asic")


class Sequencer(wiring.Component):
    """Fetches, loads and dispatches an instruction, waits until its unit has completed it, retires it.

    Each step takes a tick on which the ASIC's domain works: (t * p) mod q < p. The dispatch waits for the
    instruction's `not_before`. The fetch that finds the end of the program ends the run.

    With `overlap` the next fetch follows the dispatch, and an instruction is retired by the tick in which
    its unit is idle again. A dispatch then waits until both units are idle, or, for an instruction that may
    execute alongside others, until its own is; the last fetch until both are.

    Parameters
    ----------
    params : PimParams
    depth : int
        Instructions that the code memory holds.

    Members
    -------
    ============= === ============== ===================================================================
    clear         In  1              a run begins in the next tick
    run           Out 1              this tick belongs to the run
    tick          Out 32             its number
    length        In                 instructions of the program
    p, q          In  16             the domain's ratio to the tick
    overlap       In  1              instructions of different units may overlap
    enable        Out 1              the domain works in this tick
    code_addr     Out                instruction to read
    code_data     In  record         what was read one tick ago
    start         Out channels       the channels that begin `instruction` in the next tick
    start_asic    Out 1              the ASIC begins it
    instruction   Out record
    busy          In  channels       channels that have not completed theirs
    busy_asic     In  1
    retire        Out 2              (of channels, ASIC) instruction number `index` completes; `first` is its
                                     first tick, `end` the last plus one
    index, first  Out arrays of 2
    end           Out 32
    working       Out 1              this tick is busy
    stall         Out range(causes)  cause of this tick, where it is not
    ============= === ============== ===================================================================
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
                "overlap": In(1),
                "enable": Out(1),
                "code_addr": Out(index),
                "code_data": In(record),
                "start": Out(params.channels),
                "start_asic": Out(1),
                "instruction": Out(record),
                "busy": In(params.channels),
                "busy_asic": In(1),
                "retire": Out(len(UNITS)),
                "index": Out(index).array(len(UNITS)),
                "first": Out(TICK_BITS).array(len(UNITS)),
                "end": Out(TICK_BITS),
                "working": Out(1),
                "stall": Out(range(len(CAUSES))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        # The domain's enable: an accumulator holds (tick * p) mod q.
        part = Signal(17)
        number = Signal.like(self.length)  # of the instruction to come
        under_way = Signal(len(UNITS))  # units whose instruction is not retired
        m.d.comb += self.enable.eq(part < self.p)
        with m.If(self.clear):
            m.d.sync += [self.run.eq(1), self.tick.eq(0), number.eq(0), part.eq(0), under_way.eq(0)]
        with m.Elif(self.run):
            m.d.sync += self.tick.eq(self.tick + 1)
            m.d.sync += part.eq(Mux(part + self.p >= self.q, part + self.p - self.q, part + self.p))

        busy = Signal(len(UNITS))
        m.d.comb += [busy.eq(Mux(self.busy_asic, 2, 0) | self.busy.any())]
        unit = Signal(range(len(UNITS)))
        m.d.comb += unit.eq(self.instruction.op >= N_CHANNEL_OPS)
        held = Signal()  # the instruction has to wait for a unit
        with m.If(self.overlap & self.instruction.alongside):
            m.d.comb += held.eq(busy.bit_select(unit, 1))
        with m.Else():
            m.d.comb += held.eq(busy.any())

        first = Signal(TICK_BITS)
        m.d.comb += [self.code_addr.eq(number), self.stall.eq(CAUSES.index("clock"))]
        m.d.comb += self.end.eq(Mux(self.overlap, self.tick, self.tick + 1))
        with m.If(self.overlap):
            m.d.comb += self.retire.eq(under_way & ~busy)
        m.d.sync += under_way.eq(under_way & ~self.retire)

        fetched = Signal()  # this instruction's first tick is known
        with m.FSM():
            with m.State("FETCH"):
                with m.If(self.run & ~fetched):
                    m.d.sync += [first.eq(self.tick), fetched.eq(1)]
                with m.If((number == self.length) & busy.any()):
                    m.d.comb += self.stall.eq(CAUSES.index("wait"))
                with m.Elif(self.run & self.enable):
                    m.d.comb += self.working.eq(1)
                    m.d.sync += fetched.eq(0)
                    with m.If(number == self.length):
                        m.d.sync += self.run.eq(0)
                    with m.Else():
                        m.next = "LOAD"
            with m.State("LOAD"):
                with m.If(self.enable):
                    m.d.comb += self.working.eq(1)
                    m.d.sync += self.instruction.eq(self.code_data)
                    m.next = "DISPATCH"
            with m.State("DISPATCH"):
                with m.If(self.tick < self.instruction.not_before):
                    m.d.comb += self.stall.eq(CAUSES.index("arrival"))
                with m.Elif(held):
                    m.d.comb += self.stall.eq(CAUSES.index("wait"))
                with m.Elif(self.enable):
                    m.d.comb += [
                        self.working.eq(1),
                        self.start.eq(Mux(unit, 0, self.instruction.channels)),
                        self.start_asic.eq(unit),
                    ]
                    m.d.sync += [
                        under_way.bit_select(unit, 1).eq(1),
                        Array(self.index)[unit].eq(number),
                        Array(self.first)[unit].eq(first),
                        number.eq(number + 1),
                    ]
                    with m.If(self.overlap):
                        m.next = "FETCH"
                    with m.Else():
                        m.next = "WAIT"
            with m.State("WAIT"):
                with m.If(busy.any()):
                    m.d.comb += self.stall.eq(CAUSES.index("wait"))
                with m.Elif(self.enable):
                    m.d.comb += [self.working.eq(1), self.retire.eq(under_way)]
                    m.next = "FETCH"
        return m
