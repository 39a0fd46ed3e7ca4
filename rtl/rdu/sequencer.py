"""The sequencer: takes the code's operations one after the other.

The rules of time. Tick 0 is the one after the edge that samples the host's `start`.

Operations are executed strictly in order. An operation *issues* in the first tick s in which the one before has
ended, the tick is not below `not_before`, and, for COPY and WAIT, the DMA is idle. Nothing else happens in the
tick of the issue, but that PROGRAM_LOAD switches every unit off. It then takes, with n records in its section,

    PROGRAM_LOAD     program_load ticks, then n ticks with a record on the configuration bus each
    ARGUMENT_LOAD    argument_load ticks, then n ticks with a record on the argument bus each
    KERNEL_EXECUTE   host_launch (host=1) or hardware_launch ticks, then the kernel
    COPY, WAIT       nothing: the DMA's tick 0 is s + 1

so the next operation may issue in tick s + 1 + latency + n at the earliest, or, with a kernel of K ticks, in tick
s + 1 + latency + K + 1. The records are those of config.pcu, .stage, .pmu, .switch, .token, .agcu, in this order. What
a record says holds from the tick after on. Units get their `start` in tick s + latency: tick 0 of the kernel is the one
behind, and phase 0 of the memory channels' rates. Networks, arbiters and control tokens begin as after a reset.

A kernel ends with the first of its ticks that finds everything quiet: every unit done, no packet on a link and
every credit back (tokens on their way are lost). K counts the ticks before that one: a kernel without a unit has
K = 0.

The DMA asks for a beat of `copy_lines` lines in each of its ticks t with (t * copy_p) mod copy_q < copy_p, while lines
are left (the last beat may be shorter); the lines are written `latency` ticks later, that of the memory they come
from. It is idle again after the first tick that finds all lines written: a COPY of B beats ends
ceil((B - 1) * q / p) + latency + 2 ticks after tick s + 1 began, one without lines after one tick.

The run ends with the first tick in which no operation is left and the DMA is idle; the ticks of a run include it.

The log has for each operation (s, last tick + 1): the last tick is the one before the next operation could issue, for a
COPY the DMA's last.

What a tick counts as. The sequencer is busy when an operation issues, when a record is on a bus and in the last
tick of the run; otherwise "arrival" (`not_before` lies ahead), "memory" (it waits for the DMA), "launch" (a latency
runs), or "pipeline" (a kernel runs). The DMA is busy when it asks for a beat; otherwise "memory" while it has
beats to ask for, "pipeline" until it is idle, else "idle". In the K + 1 ticks of a kernel every other unit says for
itself what it does; outside, ticks are "arrival" while `not_before` lies ahead, "launch" from the issue of a
PROGRAM_LOAD, ARGUMENT_LOAD or KERNEL_EXECUTE to its end or its kernel's tick 0, and "idle" otherwise.
"""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.rdu import CAUSE, CODE, OP
from tilewright.rtl.layouts import layout_of

__all__ = ["TICK_BITS", "Sequencer", "directory_layout"]

TICK_BITS = 32


def directory_layout(depth: int) -> data.StructLayout:
    """Where the records of a section lie in the memories of configuration and arguments, `depth` records each."""
    index = unsigned(bits_for(depth))
    return data.StructLayout({"config": index, "configs": index, "argument": index, "arguments": index})


class Sequencer(wiring.Component):
    """Executes the operations of the code memory by the rules of this module.

    Parameters
    ----------
    depth : int
        Operations that the code memory holds, sections, and records of each of the two other memories.

    Members
    -------
    =============== === ================ ====================================================================
    clear           In  1                a run begins in the next tick
    length          In                   operations of the program
    latency         In  array(32)        of each operation, by its number; and, last, of KERNEL_EXECUTE by the host
    run             Out 1                this tick belongs to the run
    tick            Out 32               its number
    code_addr       Out                  operation to read
    code_data       In  record           what was read one tick ago
    section         Out                  section to look up
    entry           In  directory_layout where its records are, in the same tick
    config_address  Out                  record of the configuration memory that is read, for the tick behind
    config_valid    Out 1                what was read is on the configuration bus in this tick
    args_address    Out                  likewise of the argument memory
    args_valid      Out 1                and on the argument bus
    off             Out 1                all units are switched off
    start           Out 1                the next tick is tick 0 of a kernel
    kernel          Out 1                this tick belongs to a kernel
    quiet           In  1                nothing is left to do in the kernel
    finished        Out 1                last tick of a kernel
    copy            Out 1                the DMA begins in the next tick, with `operation`
    copying         In  1                the DMA is at work
    operation       Out record           the one at hand
    number          Out                  which it is
    first           Out 32               tick of its issue
    retire          Out 1                it ends with this tick; not COPY, which ends with the DMA
    activity        Out 4                0 is busy, n is CAUSES[n - 1]
    outside         Out 4                cause of the other units' ticks outside kernels
    =============== === ================ ====================================================================
    """

    def __init__(self, *, depth: int):
        record = layout_of(CODE)
        index = bits_for(depth)
        super().__init__(
            {
                "clear": In(1),
                "length": In(index),
                "latency": In(32).array(len(OP) + 1),
                "run": Out(1),
                "tick": Out(TICK_BITS),
                "code_addr": Out(index),
                "code_data": In(record),
                "section": Out(16),
                "entry": In(directory_layout(depth)),
                "config_address": Out(index),
                "config_valid": Out(1),
                "args_address": Out(index),
                "args_valid": Out(1),
                "off": Out(1),
                "start": Out(1),
                "kernel": Out(1),
                "quiet": In(1),
                "finished": Out(1),
                "copy": Out(1),
                "copying": In(1),
                "operation": Out(record),
                "number": Out(index),
                "first": Out(TICK_BITS),
                "retire": Out(1),
                "activity": Out(4),
                "outside": Out(4),
            }
        )

    def elaborate(self, platform):
        m = Module()
        o = self.operation
        execute, program, argument = Signal(), Signal(), Signal()
        m.d.comb += [
            o.eq(self.code_data),
            self.section.eq(o.section),
            program.eq(o.op == OP["PROGRAM_LOAD"]),
            argument.eq(o.op == OP["ARGUMENT_LOAD"]),
            execute.eq(o.op == OP["KERNEL_EXECUTE"]),
        ]
        latency = Signal(32)
        with m.Switch(o.op):
            for op in OP.values():
                with m.Case(op):
                    m.d.comb += latency.eq(self.latency[op])
        with m.If(execute & o.host):
            m.d.comb += latency.eq(self.latency[len(OP)])

        # An operation is at its issue, then in its latency, then at its records or its kernel.
        issued = Signal()
        issued_at = Signal(TICK_BITS)
        left = Signal(32)  # ticks of the latency
        index = Signal.like(self.number)  # the next record
        end, issue, loads, last = Signal(), Signal(), Signal(), Signal()
        count = Signal.like(self.number)
        m.d.comb += [
            end.eq(self.number == self.length),
            loads.eq(program | argument),
            count.eq(Mux(program, self.entry.configs, Mux(argument, self.entry.arguments, 0))),
            self.first.eq(Mux(issued, issued_at, self.tick)),
        ]
        waits = Signal()  # for the DMA
        m.d.comb += waits.eq(self.copying & (end | (o.op == OP["COPY"]) | (o.op == OP["WAIT"])))
        pipeline = CAUSE["pipeline"]
        with m.If(self.run & ~issued):
            with m.If(~end & (self.tick < o.not_before)):
                m.d.comb += [self.activity.eq(CAUSE["arrival"]), self.outside.eq(CAUSE["arrival"])]
            with m.Elif(waits):
                m.d.comb += [self.activity.eq(CAUSE["memory"]), self.outside.eq(CAUSE["idle"])]
            with m.Else():
                m.d.comb += [
                    issue.eq(~end),
                    self.outside.eq(Mux(~end & (loads | execute), CAUSE["launch"], CAUSE["idle"])),
                    # A latency of nothing may be over at once; records and kernels begin in the next tick.
                    last.eq(~end & (latency == 0) & ~execute & (count == 0)),
                    self.start.eq(~end & execute & (latency == 0)),
                ]
                with m.If(end):
                    m.d.sync += self.run.eq(0)
        with m.Elif(self.run & (left != 0)):
            m.d.comb += [
                self.activity.eq(CAUSE["launch"]),
                self.outside.eq(CAUSE["launch"]),
                last.eq((left == 1) & ~execute & (count == 0)),
                self.start.eq((left == 1) & execute),
            ]
        with m.Elif(self.run & execute):
            m.d.comb += [
                self.kernel.eq(1),
                self.activity.eq(pipeline),
                self.finished.eq(self.quiet),
                last.eq(self.quiet),
            ]
        with m.Elif(self.run):
            m.d.comb += [
                self.config_valid.eq(program),
                self.args_valid.eq(argument),
                self.outside.eq(CAUSE["launch"]),
                last.eq(index + 1 == count),
            ]
        on_bus = self.config_valid | self.args_valid
        m.d.comb += [
            self.off.eq(issue & program),
            self.copy.eq(issue & (o.op == OP["COPY"])),
            self.retire.eq(last & (o.op != OP["COPY"])),
            self.config_address.eq(self.entry.config + Mux(on_bus, index + 1, 0)),
            self.args_address.eq(self.entry.argument + Mux(on_bus, index + 1, 0)),
        ]
        with m.If(issue):
            m.d.sync += [issued.eq(1), issued_at.eq(self.tick), left.eq(latency), index.eq(0)]
        with m.Elif(left != 0):
            m.d.sync += left.eq(left - 1)
        with m.Elif(on_bus):
            m.d.sync += index.eq(index + 1)
        with m.If(last):
            m.d.sync += issued.eq(0)

        following = Signal.like(self.number)
        m.d.comb += following.eq(self.number + last)
        # The code is read a tick ahead, also in the tick before the first.
        m.d.comb += self.code_addr.eq(Mux(self.clear, 0, following))
        m.d.sync += [self.tick.eq(self.tick + 1), self.number.eq(following)]
        with m.If(self.clear):
            m.d.sync += [self.run.eq(1), self.tick.eq(0), self.number.eq(0), issued.eq(0), left.eq(0)]
        return m
