"""The instructions that a unit holds, from their dispatch until they are complete."""

from amaranth.hdl import Array, Assert, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

TICK_BITS = 32


class Window(wiring.Component):
    """A queue in which instructions stay until they are complete, in order; and what each of them waits for.

    An instruction waits for slots of two other units' windows: for operands that are still being written, and for
    the release of what is still being read. It is the head once all before it have been issued, and leaves
    when it is the oldest and completes.

    Parameters
    ----------
    depth : int
        Instructions it holds, at least 1. The other units' windows have as many slots.
    layout : StructLayout
        An instruction.
    index : int
        Bits of an instruction's number.

    Members
    -------
    ============== === ================ ==================================================================
    clear          In  1                forget everything
    tick           In  32               the present tick
    push           In  1                `payload`, instruction number `index`, enters; not if full
    waits_operands In  depth            the slots of the one unit that it waits for
    waits_release  In  depth            those of the other
    done_operands  In  depth            the slot of the one unit that completes in this tick
    done_release   In  depth            that of the other
    full, empty    Out 1
    valid          Out 1                there is a head
    head           Out layout
    operands       Out 1                it waits for operands
    release        Out 1                it waits for a release
    start          In  1                its first tick of work
    pop            In  1                its last one: the next instruction is the head
    complete       In  1                the oldest, which has been popped, completes in this tick
    completing     Out depth            its slot, one-hot, in that case
    live           Out depth            slots in use
    slots          Out depth x layout   what they hold
    index_out      Out index            number of the oldest
    first          Out 32               its first tick of work
    ============== === ================ ==================================================================
    """

    def __init__(self, *, depth: int, layout: data.StructLayout, index: int):
        assert depth >= 1, depth
        self._depth, self._layout = depth, layout
        super().__init__(
            {
                "clear": In(1),
                "tick": In(TICK_BITS),
                "push": In(1),
                "payload": In(layout),
                "index": In(index),
                "waits_operands": In(depth),
                "waits_release": In(depth),
                "done_operands": In(depth),
                "done_release": In(depth),
                "full": Out(1),
                "empty": Out(1),
                "valid": Out(1),
                "head": Out(layout),
                "operands": Out(1),
                "release": Out(1),
                "start": In(1),
                "pop": In(1),
                "complete": In(1),
                "completing": Out(depth),
                "live": Out(depth),
                "slots": Out(layout).array(depth),
                "index_out": Out(index),
                "first": Out(TICK_BITS),
            }
        )

    def elaborate(self, platform):
        m = Module()
        depth = self._depth
        write, issue, oldest = (Signal(range(depth), name=name) for name in ("write", "issue", "oldest"))
        held, waiting = (Signal(bits_for(depth), name=name) for name in ("held", "waiting"))
        operands = [Signal(depth, name=f"operands_{i}") for i in range(depth)]
        release = [Signal(depth, name=f"release_{i}") for i in range(depth)]
        indexes = [Signal.like(self.index, name=f"index_{i}") for i in range(depth)]
        firsts = [Signal(TICK_BITS, name=f"first_{i}") for i in range(depth)]

        m.d.comb += [
            self.full.eq(held == depth),
            self.empty.eq(held == 0),
            self.valid.eq(waiting != 0),
            self.operands.eq(Array(operands)[issue].any()),
            self.release.eq(Array(release)[issue].any()),
            self.index_out.eq(Array(indexes)[oldest]),
            self.first.eq(Array(firsts)[oldest]),
            self.completing.eq(Mux(self.complete, 1 << oldest, 0)),
        ]
        for i, slot in enumerate(self.slots):
            with m.If(issue == i):
                m.d.comb += self.head.eq(slot)
            m.d.sync += [
                operands[i].eq(operands[i] & ~self.done_operands),
                release[i].eq(release[i] & ~self.done_release),
            ]
            with m.If(self.push & (write == i)):
                m.d.sync += [
                    slot.eq(self.payload),
                    indexes[i].eq(self.index),
                    # What completes in this very tick is not waited for: its slot may be taken anew.
                    operands[i].eq(self.waits_operands & ~self.done_operands),
                    release[i].eq(self.waits_release & ~self.done_release),
                    self.live[i].eq(1),
                ]
            with m.If(self.start & (issue == i)):
                m.d.sync += firsts[i].eq(self.tick)
            with m.If(self.completing[i]):
                m.d.sync += self.live[i].eq(0)
        for moved, pointer in ((self.push, write), (self.pop, issue), (self.complete, oldest)):
            with m.If(moved):
                m.d.sync += pointer.eq(Mux(pointer == depth - 1, 0, pointer + 1))
        m.d.sync += Assert(
            ~self.complete | (held != waiting), "an instruction completes before its last tick"
        )
        m.d.sync += [
            held.eq(held + self.push - self.complete),
            waiting.eq(waiting + self.push - self.pop),
        ]
        with m.If(self.clear):
            m.d.sync += [p.eq(0) for p in (write, issue, oldest, held, waiting, self.live)]
        return m
