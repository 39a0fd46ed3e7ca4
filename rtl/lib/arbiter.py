"""Who goes first."""

from amaranth.hdl import Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

__all__ = ["RoundRobin"]


class RoundRobin(wiring.Component):
    """A round-robin arbiter.

    Latency 0. Requester 0 comes first after reset, and after a grant to k that is taken k + 1 does: without
    ``ready``, or without requests, nothing moves.

    Parameters
    ----------
    count : int
        Requesters, at least 1.

    Members
    -------
    ======== === ===== ===============================================================
    requests In  count who wants
    ready    In  1     the grant of this tick is taken
    valid    Out 1     somebody is granted
    grant    Out count who, one-hot; 0 without requests
    index    Out       who, as a number in ``range(count)``; 0 without requests
    ======== === ===== ===============================================================
    """

    def __init__(self, *, count: int):
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count!r}")
        self._count = count
        super().__init__(
            {
                "requests": In(count),
                "ready": In(1),
                "valid": Out(1),
                "grant": Out(count),
                "index": Out(bits_for(count - 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        count = self._count
        # The requesters from the one whose turn it is upwards; none of them stands for all.
        turn = Signal(count, init=(1 << count) - 1)
        ahead = Signal(count)
        choice = Signal(count)
        m.d.comb += [
            ahead.eq(self.requests & turn),
            choice.eq(Mux(ahead.any(), ahead, self.requests)),
            self.grant.eq(choice & -choice),  # the lowest set bit
            self.valid.eq(self.requests.any()),
        ]
        for bit in range(len(self.index)):
            holders = sum(1 << k for k in range(count) if k >> bit & 1)
            m.d.comb += self.index[bit].eq((self.grant & Const(holders, count)).any())
        with m.If(self.valid & self.ready):
            m.d.sync += turn.eq(~(self.grant | (self.grant - 1)))
        return m
