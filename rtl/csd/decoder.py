"""The command decoder: takes commands from the code memory when they have arrived, and hands them to the units."""

from amaranth.hdl import Const, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import AFTER_DRIVE, CAUSES, CONFIGURATION, ISA, OP, READERS
from tilewright.rtl.layouts import layout_of

__all__ = ["TICK_BITS", "CommandDecoder", "configuration_layout"]

TICK_BITS = 32


def configuration_layout() -> data.StructLayout:
    """What a CONFIG sets."""
    fields = ISA.record("code").by_name
    return data.StructLayout({name: fields[name].bits for name in CONFIGURATION})


class CommandDecoder(wiring.Component):
    """Dispatches at most one command a tick, in order, each not before its tick.

    A CONFIG takes effect with the next tick, when no unit works for a command before it. Commands that read the cache
    (ATTEND, TRANSPOSE, READ) wait for writes before them (WRITE, RECLAIM), and these for reads; with `AFTER_DRIVE` in
    `after` a command waits for both. That, and a CONFIG, gives turns anew: from the next tick on every arbiter begins with
    the first one, so that what follows depends on nothing before it. Stalls are charged in the order of
    `arch.csd.CAUSES`. The run ends with a tick that finds the end of the program and no unit at work.

    Parameters
    ----------
    depth : int
        Commands that the code memory holds.

    Members
    -------
    ============= === ============== ================================================================
    clear         In  1              a run begins in the next tick
    run           Out 1              this tick belongs to the run
    tick          Out 32             its number
    length        In                 commands of the program
    code_addr     Out                command to read
    code_data     In  record         what was read one tick ago
    command       Out record         the next one
    number        Out                which it is
    configuration Out layout         what the last CONFIG set
    full          In  2              neither reads nor writes are taken
    busy          In  2              reads, writes under way
    draining      In  1              pages are still being programmed, or blocks erased
    dispatch      Out 2              `command` is handed to what reads, or to what writes
    anew          Out 1              turns are given anew
    working       Out 1              this tick is busy
    stall         Out range(causes)  cause of this tick, where it is not
    ============= === ============== ================================================================
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
                "command": Out(record),
                "number": Out(index),
                "configuration": Out(configuration_layout()),
                "full": In(2),
                "busy": In(2),
                "draining": In(1),
                "dispatch": Out(2),
                "anew": Out(1),
                "working": Out(1),
                "stall": Out(range(len(CAUSES))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        op = self.command.op
        reads, configures, waits, end = Signal(), Signal(), Signal(), Signal()
        kind, others = Signal(2), Signal(2)  # where it goes; what must not be at work
        m.d.comb += [
            self.command.eq(self.code_data),
            reads.eq(sum((op == code for code in READERS), Const(0))),
            configures.eq(op == OP["CONFIG"]),
            kind.eq(Mux(configures, 0, Mux(reads, 0b01, 0b10))),
            waits.eq(self.command.after & AFTER_DRIVE != 0),
            others.eq(~kind | waits.replicate(2)),
            end.eq(self.number == self.length),
        ]
        taken = Signal()
        with m.If(self.run):
            with m.If(end):
                m.d.comb += [
                    self.working.eq(~self.busy.any() & ~self.draining),
                    self.stall.eq(CAUSES.index("drain")),
                ]
            with m.Elif((self.full & kind).any()):
                m.d.comb += self.stall.eq(CAUSES.index("queue"))
            with m.Elif((self.busy & others).any()):
                m.d.comb += self.stall.eq(CAUSES.index("order"))
            with m.Elif(self.tick < self.command.not_before):
                m.d.comb += self.stall.eq(CAUSES.index("arrival"))
            with m.Else():
                m.d.comb += [self.working.eq(1), taken.eq(1), self.dispatch.eq(kind)]
        m.d.comb += self.anew.eq(taken & (configures | waits))
        with m.If(taken & configures):
            m.d.sync += [self.configuration[name].eq(self.command[name]) for name in CONFIGURATION]
        following = Signal.like(self.number)
        m.d.comb += following.eq(self.number + taken)
        # Memory is read a tick ahead, also in the tick before the first.
        m.d.comb += self.code_addr.eq(Mux(self.clear, 0, following))
        m.d.sync += [self.tick.eq(self.tick + 1), self.number.eq(following)]
        with m.If(self.working & end):
            m.d.sync += self.run.eq(0)
        with m.If(self.clear):
            m.d.sync += [self.run.eq(1), self.tick.eq(0), self.number.eq(0)]
        return m
