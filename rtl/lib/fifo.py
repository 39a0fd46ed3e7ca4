"""A registered queue between two streams."""

from amaranth.hdl import Assert, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

__all__ = ["StreamFifo"]


class StreamFifo(wiring.Component):
    """A first-in, first-out queue.

    Latency 1: what is pushed at tick t is visible at t + 1. Both ``valid`` and ``ready`` follow from registers
    only: a full queue does not accept at the tick of a pop, so one item a tick takes a depth of at least 2.

    With ``always_ready`` it is the producer that must know of free space (it holds credits, say), and a push
    into the full queue fails an assertion.

    Parameters
    ----------
    shape : ShapeLike
        Shape of an item.
    depth : int
        Items that the queue holds, at least 1.
    always_ready : bool
        Accept every push.

    Members
    -------
    ===== === ======================= ==========================================
    i     In  stream.Signature(shape) pushed where ``valid & ready``
    o     Out stream.Signature(shape) the oldest item, popped on ``valid & ready``
    level Out range(depth + 1)        items held: 0 is empty, ``depth`` is full
    ===== === ======================= ==========================================
    """

    def __init__(self, *, shape, depth: int, always_ready: bool = False):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth!r}")
        self._shape = shape
        self._depth = depth
        super().__init__(
            {
                "i": In(stream.Signature(shape, always_ready=always_ready)),
                "o": Out(stream.Signature(shape)),
                "level": Out(range(depth + 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.items = items = Memory(shape=self._shape, depth=self._depth, init=[])
        write = items.write_port()
        read = items.read_port(domain="comb")
        full, push, pop = Signal(), Signal(), Signal()

        m.d.comb += [
            full.eq(self.level == self._depth),
            self.o.valid.eq(self.level != 0),
            self.o.payload.eq(read.data),
            write.data.eq(self.i.payload),
            write.en.eq(push),
            pop.eq(self.o.valid & self.o.ready),
        ]
        if isinstance(self.i.ready, Const):
            m.d.comb += push.eq(self.i.valid)
            m.d.sync += Assert(~(push & full), "push into a full queue")
        else:
            m.d.comb += [self.i.ready.eq(~full), push.eq(self.i.valid & ~full)]

        for moved, address in ((push, write.addr), (pop, read.addr)):
            position = Signal.like(address)
            m.d.comb += address.eq(position)
            with m.If(moved):
                m.d.sync += position.eq(Mux(position == self._depth - 1, 0, position + 1))
        m.d.sync += self.level.eq(self.level + push - pop)
        return m
