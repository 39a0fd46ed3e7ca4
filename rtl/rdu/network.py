"""A mesh of switches, and the links between them and to the units."""

from amaranth.hdl import Assert, Cat, Const, Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.rdu import FLOW_BITS, INPUTS, MESH, NETWORKS, OPPOSITE, X_BITS, Y_BITS, RduParams, is_pcu
from tilewright.rtl.lib.credit import CreditLink
from tilewright.rtl.rdu.packet import packet_layout
from tilewright.rtl.rdu.shared import SharedModule
from tilewright.rtl.rdu.switch import Switch

__all__ = ["Network", "local_ports", "total"]

_NORTH, _EAST, _SOUTH, _WEST = range(len(MESH))


def total(values):
    """The sum of any number of values, pair by pair: a chain of thousands is too deep for Amaranth."""
    values = list(values) or [Const(0)]
    while len(values) > 1:
        values = [sum(values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]


def local_ports(params: RduParams, network: str, x: int, y: int) -> tuple[int, int]:
    """How many outputs of the unit at (x, y) lead into the network, and how many of its inputs it feeds."""
    if is_pcu(x, y):
        return 1, params.vector_inputs if network == "vector" else params.scalar_inputs
    return (1, 1) if network == "vector" else (0, 0)


class Network(wiring.Component):
    """The vector or the scalar network of a socket: a switch at every position, a credited link along every way.

    A link's queue is the input FIFO of the switch or unit that it leads to, `fifo_depth` packets deep; a packet
    pushed at tick t is visible behind the link at t + hop, across the border of dies at t + die_hop. As switches take
    no time of their own, an unloaded packet is at its unit (H + 2) * hop ticks after it was pushed, H being the
    mesh links on its way: one more link leads in, one out. A link moves min(1, fifo_depth / (hop + credit)) packets a
    tick. AGCUs hang on the west ports of the first column and the east ports of the last one, in the first rows; a
    packet that is routed off the mesh anywhere else fails an assertion.

    Parameters
    ----------
    params : RduParams
    network : str
        One of NETWORKS.

    Members
    -------
    ============== === ================= ==============================================
    in_x_y_i       In  stream of packets from output i of the unit at (x, y)
    out_x_y_i      Out stream of packets to its input i
    west_in_y      In  stream of packets from the AGCU in row y of the west side; likewise east_in_y
    west_out_y     Out stream of packets to it; likewise east_out_y
    start          In  1                 the next tick is tick 0 of a kernel: arbiters begin again
    quiet          Out 1                 no packet is on a link, and every credit is back
    hops           Out                   packets that begin their way over a link in this tick
    table_x        In                    column of the switch to write a table of
    table_y        In                    its row
    table_enable   In  1                 write, likewise table_port, table_flow, table_out, table_next: see `Switch`
    ============== === ================= ==============================================
    """

    def __init__(self, *, params: RduParams, network: str):
        if network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}, not {network!r}")
        p = self._params = params
        self._network = network
        self._lanes = p.lanes if network == "vector" else 1
        packets = stream.Signature(packet_layout(self._lanes))
        members = {}
        for x, y in self._positions():
            ins, outs = local_ports(p, network, x, y)
            members |= {f"in_{x}_{y}_{i}": In(packets) for i in range(ins)}
            members |= {f"out_{x}_{y}_{i}": Out(packets) for i in range(outs)}
        for y in range(p.agcus_per_side):
            for side in ("west", "east"):
                members |= {f"{side}_in_{y}": In(packets), f"{side}_out_{y}": Out(packets)}
        super().__init__(
            {
                **members,
                "start": In(1),
                "quiet": Out(1),
                "hops": Out(range(self._links() + 1)),
                "table_x": In(X_BITS),
                "table_y": In(Y_BITS),
                "table_enable": In(1),
                "table_port": In(4),
                "table_flow": In(bits_for(p.flows - 1)),
                "table_out": In(len(MESH) + INPUTS),
                "table_next": In(FLOW_BITS),
            }
        )

    def _positions(self):
        return [(x, y) for y in range(self._params.rows) for x in range(self._params.columns)]

    def _links(self):
        p = self._params
        units = sum(sum(local_ports(p, self._network, x, y)) for x, y in self._positions())
        mesh = 2 * (p.columns * (p.rows - 1) + p.rows * (p.columns - 1))
        return units + mesh + 4 * p.agcus_per_side

    def elaborate(self, platform):
        m = Module()
        p = self._params
        switches, links = {}, []
        for x, y in self._positions():
            ins, outs = local_ports(p, self._network, x, y)
            m.submodules[f"switch_{x}_{y}"] = switch = SharedModule(
                Switch, lanes=self._lanes, local_in=ins, local_out=outs, flows=p.flows, y_first=p.y_first
            )
            m.d.comb += [
                switch.start.eq(self.start),
                switch.x.eq(x),
                switch.y.eq(y),
                switch.table_enable.eq(self.table_enable & (self.table_x == x) & (self.table_y == y)),
                *(
                    getattr(switch, f"table_{name}").eq(getattr(self, f"table_{name}"))
                    for name in ("port", "flow", "out", "next")
                ),
            ]
            switches[x, y] = switch

        def link(name, source, sink, forward=p.hop):
            """Streams from one to the other; either may be a port of ours."""
            m.submodules[name] = part = SharedModule(
                CreditLink,
                shape=packet_layout(self._lanes),
                credits=p.fifo_depth,
                forward=forward,
                backward=p.credit,
            )
            links.append(part)
            wiring.connect(m, source, part.i)
            wiring.connect(m, part.o, sink)

        steps = {_NORTH: (0, -1), _EAST: (1, 0), _SOUTH: (0, 1), _WEST: (-1, 0)}
        sides = {_WEST: (0, "west"), _EAST: (p.columns - 1, "east")}
        for (x, y), switch in switches.items():
            ins, outs = local_ports(p, self._network, x, y)
            for i in range(ins):
                port = wiring.flipped(getattr(self, f"in_{x}_{y}_{i}"))
                link(f"link_in_{x}_{y}_{i}", port, getattr(switch, f"in_{len(MESH) + i}"))
            for i in range(outs):
                port = wiring.flipped(getattr(self, f"out_{x}_{y}_{i}"))
                link(f"link_out_{x}_{y}_{i}", getattr(switch, f"out_{len(MESH) + i}"), port)
            for direction, (dx, dy) in steps.items():
                out = getattr(switch, f"out_{direction}")
                name = f"{MESH[direction]}_{x}_{y}"
                beyond = switches.get((x + dx, y + dy))
                edge, side = sides.get(direction, (None, None))
                if beyond is not None:
                    border = dx and max(x, x + dx) % p.die_columns == 0
                    into = getattr(beyond, f"in_{OPPOSITE[direction]}")
                    link(f"link_{name}", out, into, p.die_hop if border else p.hop)
                elif x == edge and y < p.agcus_per_side:
                    link(f"link_{name}", out, wiring.flipped(getattr(self, f"{side}_out_{y}")))
                    port = wiring.flipped(getattr(self, f"{side}_in_{y}"))
                    link(f"link_{side}_in_{y}", port, getattr(switch, f"in_{direction}"))
                else:
                    m.d.sync += Assert(~out.valid, f"a packet leaves the mesh: {name}")
        assert len(links) == self._links()
        m.d.comb += [
            self.quiet.eq(Cat(part.credits == p.fifo_depth for part in links).all()),
            self.hops.eq(total(part.i.valid & part.i.ready for part in links)),
        ]
        return m
