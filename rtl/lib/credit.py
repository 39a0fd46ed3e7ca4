"""A link with flow control by credits: the sender knows how much room is left, without a wire that says so.

In flight counts what was sent and not yet popped; it never exceeds the credits. With C credits, a forward
latency F and a backward latency B, a busy sender and a willing receiver move min(1, C / (F + B)) items a tick:
a slot is taken at t, its item popped at t + F, and the slot taken again at t + F + B at the earliest.
"""

from amaranth.hdl import Assert, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from tilewright.rtl.lib.fifo import StreamFifo

__all__ = ["CreditLink", "CreditReceiver", "CreditSender", "CreditSignature"]


def _check_positive(**values: int):
    for what, value in values.items():
        if value < 1:
            raise ValueError(f"{what} must be at least 1, not {value!r}")


class CreditSignature(wiring.Signature):
    """The wires of a credited link, from the sender's side.

    Parameters
    ----------
    shape : ShapeLike
        Shape of an item.

    Members
    -------
    ======= === ===== ==================================================
    valid   Out 1     an item is sent; the receiver has room by agreement
    payload Out shape the item
    credit  In  1     an item was popped at the other end
    ======= === ===== ==================================================
    """

    def __init__(self, shape):
        super().__init__({"valid": Out(1), "payload": Out(shape), "credit": In(1)})


class CreditSender(wiring.Component):
    """The sending end: passes items on while it has credits.

    Latency 0 from ``i`` to ``link``. A credit that arrives at tick t can be spent at t + 1. A credit that was
    not spent before fails an assertion.

    Parameters
    ----------
    shape : ShapeLike
        Shape of an item.
    credits : int
        Items that may be in flight, at least 1.

    Members
    -------
    ======= === ======================= ==============================
    i       In  stream.Signature(shape) ready while there are credits
    link    Out CreditSignature(shape)  to the receiver
    credits Out range(credits + 1)      credits left
    ======= === ======================= ==============================
    """

    def __init__(self, *, shape, credits: int):
        _check_positive(credits=credits)
        self._credits = credits
        super().__init__(
            {
                "i": In(stream.Signature(shape)),
                "link": Out(CreditSignature(shape)),
                "credits": Out(range(credits + 1), init=credits),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.d.comb += [
            self.i.ready.eq(self.credits != 0),
            self.link.valid.eq(self.i.valid & self.i.ready),
            self.link.payload.eq(self.i.payload),
        ]
        m.d.sync += [
            self.credits.eq(self.credits + self.link.credit - self.link.valid),
            Assert(
                ~(self.link.credit & (self.credits == self._credits)), "credit returned, but none was spent"
            ),
        ]
        return m


class CreditReceiver(wiring.Component):
    """The receiving end: a queue with a place for every credit.

    Latency 1: an item on ``link`` at tick t is visible at t + 1. The credit goes out in the tick of the pop. An
    item that finds the queue full fails an assertion.

    Parameters
    ----------
    shape : ShapeLike
        Shape of an item.
    credits : int
        The sender's credits.

    Members
    -------
    ===== === ======================= =================
    link  In  CreditSignature(shape)  from the sender
    o     Out stream.Signature(shape) the oldest item
    level Out range(credits + 1)      items in the queue
    ===== === ======================= =================
    """

    def __init__(self, *, shape, credits: int):
        _check_positive(credits=credits)
        self._shape = shape
        self._credits = credits
        super().__init__(
            {
                "link": In(CreditSignature(shape)),
                "o": Out(stream.Signature(shape)),
                "level": Out(range(credits + 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.queue = queue = StreamFifo(shape=self._shape, depth=self._credits, always_ready=True)
        wiring.connect(m, queue.o, wiring.flipped(self.o))
        m.d.comb += [
            queue.i.valid.eq(self.link.valid),
            queue.i.payload.eq(self.link.payload),
            self.link.credit.eq(self.o.valid & self.o.ready),
            self.level.eq(queue.level),
        ]
        return m


class CreditLink(wiring.Component):
    """Both ends, and the wire between them.

    Latency ``forward`` from ``i`` to ``o``; a credit of a pop at tick t can be spent at t + ``backward``.

    Parameters
    ----------
    shape : ShapeLike
        Shape of an item.
    credits : int
        Items that may be in flight, at least 1.
    forward, backward : int
        Latencies in ticks, at least 1 each.

    Members
    -------
    ======= === ======================= ==============================
    i       In  stream.Signature(shape) ready while there are credits
    o       Out stream.Signature(shape) the oldest item that arrived
    credits Out range(credits + 1)      credits left at the sender
    ======= === ======================= ==============================
    """

    def __init__(self, *, shape, credits: int, forward: int = 1, backward: int = 1):
        _check_positive(credits=credits, forward=forward, backward=backward)
        self._shape = shape
        self._credits = credits
        self._forward = forward
        self._backward = backward
        super().__init__(
            {
                "i": In(stream.Signature(shape)),
                "o": Out(stream.Signature(shape)),
                "credits": Out(range(credits + 1), init=credits),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.sender = sender = CreditSender(shape=self._shape, credits=self._credits)
        m.submodules.receiver = receiver = CreditReceiver(shape=self._shape, credits=self._credits)
        wiring.connect(m, wiring.flipped(self.i), sender.i)
        wiring.connect(m, receiver.o, wiring.flipped(self.o))

        def delayed(value, ticks, name):
            for k in range(ticks):
                later = Signal.like(value, name=f"{name}_{k + 1}")
                m.d.sync += later.eq(value)
                value = later
            return value

        # The queue and the sender's counter are the last register of their direction.
        for name in ("valid", "payload"):
            sent = getattr(sender.link, name)
            m.d.comb += getattr(receiver.link, name).eq(delayed(sent, self._forward - 1, name))
        m.d.comb += [
            sender.link.credit.eq(delayed(receiver.link.credit, self._backward - 1, "credit")),
            self.credits.eq(sender.credits),
        ]
        return m
