"""A switch of the network, and how it finds the way."""

from amaranth.hdl import Assert, Cat, Const, Module, Mux, ResetInserter, Signal, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.rdu import FLOW_BITS, INPUTS, LOCAL_BITS, MESH, X_BITS, Y_BITS
from tilewright.rtl.lib.arbiter import RoundRobin
from tilewright.rtl.rdu.packet import packet_layout

__all__ = ["Switch"]

_MASK = len(MESH) + INPUTS  # bits of a table's port mask


class Switch(wiring.Component):
    """A crossbar between the mesh ports (north, east, south, west: 0..3) and the local ports behind them.

    Latency 0, without a register: in and out are the two ends of credited links, whose queues are the registers. An
    output takes one packet a tick, from the inputs that want it in turn; inputs that want different outputs do not
    meet.

    A static flow is looked up in the table of its input port, which gives the outputs, several for a multicast, and
    the flow by which the packet travels on. The copies of a multicast leave as their outputs are free, and the
    packet is popped with the last of them. A dynamic flow names a position and a local port there, and takes first
    one dimension, then the other. A packet whose flow leads nowhere, or to a port that isn't there, fails an
    assertion.

    Parameters
    ----------
    lanes : int
        Words of a packet.
    local_in, local_out : int
        Local ports by which packets come in and go out.
    flows : int
        Static flows of a port.
    y_first : int
        Dimension order is first y, then x.

    Members
    -------
    ============= === ================= ===========================================================
    in_i          In  stream of packets input i: mesh ports 0..3, then local ones
    out_i         Out stream of packets output i: mesh ports 0..3, then local ones
    x, y          In  6                 position of this switch
    start         In  1                 arbiters begin again with input 0, in the next tick
    table_enable  In  1                 write an entry of a table
    table_port    In                    of which input
    table_flow    In                    at which flow
    table_out     In  8                 outputs, as a mask, mesh ports lowest
    table_next    In  16                the flow after this hop
    moved         Out outputs           a packet leaves by that output
    blocked       Out inputs            a packet waits at that input, and can't be popped
    ============= === ================= ===========================================================
    """

    def __init__(self, *, lanes: int, local_in: int, local_out: int, flows: int, y_first: int = 0):
        if not 0 <= local_out <= INPUTS:
            raise ValueError(f"local_out must be in 0..{INPUTS}, not {local_out!r}")
        self._layout = packet_layout(lanes)
        self._ins, self._outs = len(MESH) + local_in, len(MESH) + local_out
        self._flows, self._y_first = flows, y_first
        packets = stream.Signature(self._layout)
        super().__init__(
            {
                **{f"in_{i}": In(packets) for i in range(self._ins)},
                **{f"out_{i}": Out(packets) for i in range(self._outs)},
                "x": In(X_BITS),
                "y": In(Y_BITS),
                "start": In(1),
                "table_enable": In(1),
                "table_port": In(bits_for(self._ins - 1)),
                "table_flow": In(bits_for(flows - 1)),
                "table_out": In(_MASK),
                "table_next": In(FLOW_BITS),
                "moved": Out(self._outs),
                "blocked": Out(self._ins),
            }
        )

    def elaborate(self, platform):
        m = Module()
        ins = [getattr(self, f"in_{i}") for i in range(self._ins)]
        outs = [getattr(self, f"out_{i}") for i in range(self._outs)]
        wants, takes, packets = [], [], []
        for i, port in enumerate(ins):
            m.submodules[f"table_{i}"] = table = Memory(
                shape=unsigned(_MASK + FLOW_BITS), depth=self._flows, init=[]
            )
            write, read = table.write_port(), table.read_port(domain="comb")
            flow = port.payload.flow
            dynamic = flow[-1]
            goal, next_flow = Signal(_MASK, name=f"goal_{i}"), Signal(FLOW_BITS, name=f"next_{i}")
            m.d.comb += [
                write.en.eq(self.table_enable & (self.table_port == i)),
                write.addr.eq(self.table_flow),
                write.data.eq(Cat(self.table_out, self.table_next)),
                read.addr.eq(flow),
                goal.eq(Mux(dynamic, self._dimension_order(flow), read.data[:_MASK])),
                next_flow.eq(Mux(dynamic, flow, read.data[_MASK:])),
            ]
            sent = Signal(self._outs, name=f"sent_{i}")  # copies that have left
            want = Signal(self._outs, name=f"want_{i}")
            take = Signal(self._outs, name=f"take_{i}")
            missing = Signal(self._outs, name=f"missing_{i}")
            m.d.comb += [
                want.eq(Mux(port.valid, goal[: self._outs] & ~sent, 0)),
                missing.eq(want & ~take),
                port.ready.eq(~missing.any()),
                self.blocked[i].eq(port.valid & missing.any()),
            ]
            with m.If(port.valid):
                m.d.sync += sent.eq(Mux(missing.any(), sent | take, 0))
            m.d.sync += Assert(
                ~port.valid | (goal.any() & ~goal[self._outs :].any() & (dynamic | (flow < self._flows))),
                "a packet's flow leads nowhere",
            )
            packet = Signal(self._layout, name=f"packet_{i}")
            m.d.comb += [packet.eq(port.payload), packet.flow.eq(next_flow)]
            wants.append(want)
            takes.append(take)
            packets.append(packet)
        for o, port in enumerate(outs):
            arbiter = RoundRobin(count=self._ins)
            m.submodules[f"arbiter_{o}"] = ResetInserter(self.start)(arbiter)
            m.d.comb += [
                arbiter.requests.eq(Cat(want[o] for want in wants)),
                arbiter.ready.eq(port.ready),
                port.valid.eq(arbiter.valid),
                self.moved[o].eq(port.valid & port.ready),
            ]
            for i, packet in enumerate(packets):
                with m.If(arbiter.grant[i]):
                    m.d.comb += port.payload.eq(packet)
                m.d.comb += takes[i][o].eq(arbiter.grant[i] & port.ready)
        return m

    def _dimension_order(self, flow):
        """The outputs, as a mask, of a packet that finds its own way."""
        x, y, local = flow[:X_BITS], flow[X_BITS:][:Y_BITS], flow[X_BITS + Y_BITS :][:LOCAL_BITS]
        north, east, south, west = (Const(1 << k, _MASK) for k in range(len(MESH)))
        along_x = Mux(x > self.x, east, west)
        along_y = Mux(y > self.y, south, north)
        here = (Const(1 << len(MESH), 1 + len(MESH)) << local)[:_MASK]
        if self._y_first:
            return Mux(y != self.y, along_y, Mux(x != self.x, along_x, here))
        return Mux(x != self.x, along_x, Mux(y != self.y, along_y, here))
