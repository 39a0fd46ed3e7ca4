"""The ways of packets: links, the flows on them, and the switches between.

Every way that packets can take is followed from its source. A link is a stretch between two switches, or between a
switch and a unit; with `fold` a stretch without any choice is one link: where all packets of a link go on by one
other, which takes none but these, and where each link by itself moves a packet a tick (its credits cover its
latencies there and back), the two are to their ends as one with the sums of their places and of their latencies.
The switch in between passes packet n on at the latest of its arrival, the tick after packet n - 1, and the return of
packet n - C's credit; of these the first link's credits cover the second, and the sums the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tilewright.arch import rdu as arch
from tilewright.arch.errors import UserError

LOCAL = len(arch.MESH)
NORTH, EAST, SOUTH, WEST = range(LOCAL)
STEP = ((0, -1), (1, 0), (0, 1), (-1, 0))
VECTOR, SCALAR = range(len(arch.NETWORKS))
Tables = Mapping[tuple[int, int, int, int, int], tuple[int, int]]


class Unit(NamedTuple):
    """Where a unit is; an AGCU is where its switch is."""

    kind: str
    x: int
    y: int


class Input(NamedTuple):
    """An input of a switch."""

    network: int
    x: int
    y: int
    port: int


@dataclass
class Link:
    """It ends at a switch's input or at a unit."""

    end: Input | Unit
    capacity: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Route:
    """What a source sends: its first link, and how many there are in the tree."""

    source: str
    link: int
    network: int
    links: int


@dataclass(frozen=True)
class Net:
    """What remains of the links, renumbered, and the switches between them.

    `ports` are for each switch its links in, in the order of its arbiters, and its links out. `link` and `flow`
    give for each traced link and flow the one that stands for it; `outs` are for each flow the outputs of the
    switch behind its link, with the flow that follows.
    """

    links: list[Link]
    ports: list[tuple[list[int], list[int]]]
    link: list[int]
    flow: list[int]
    outs: list[dict[int, int]]


class Ways:
    """Links and flows as they are found, by number.

    `flows` has for each flow the following one by the link that it goes on by, `flow_link` its own link. `own` says
    whether no entry of a switch was looked up but those of `tables`; `older` are what was there before.
    """

    def __init__(self, p: arch.RduParams, tables: Tables, older: Tables):
        self.p, self.tables, self.older = p, tables, older
        self.links: list[Link] = []
        self.link_of: dict[tuple, int] = {}
        self.flows: list[dict[int, int]] = []
        self.flow_link: list[int] = []
        self.known: dict[tuple[int, int], int] = {}
        self.routes: list[Route] = []
        self.own = True

    # ---- tracing ----------------------------------------------------------------------------------------

    def send(self, source: str, at: Input, flow: int) -> tuple[int, int]:
        """Link and flow number of what a unit sends into a switch's input."""
        link = self._link(("in", source, at.network), at, self.p.hop)
        number = self._trace(link, flow)
        left, seen = [number], {number}
        while left:
            for hop in self.flows[left.pop()].items():
                following = self.known[hop]
                if following in seen:
                    raise UserError(f"{source}: flow {flow:#x} comes twice by one link")
                seen.add(following)
                left.append(following)
        self.routes.append(Route(source, link, at.network, len(seen)))
        return link, number

    def into(self, network: int, x: int, y: int, port: int) -> int:
        """The link behind an output of a switch."""
        p = self.p
        key = ("out", network, x, y, port)
        if key in self.link_of:
            return self.link_of[key]
        if port >= LOCAL:
            kind = "pcu" if arch.is_pcu(x, y) else "pmu"
            inputs = (p.vector_inputs, p.scalar_inputs)[network] if kind == "pcu" else int(network == VECTOR)
            if port - LOCAL >= inputs:
                raise UserError(
                    f"a packet is for input {port - LOCAL} of {kind}@{x},{y}, whose {arch.NETWORKS[network]} "
                    f"inputs number {inputs}"
                )
            return self._link(key, Unit(kind, x, y), p.hop)
        dx, dy = STEP[port]
        there = x + dx, y + dy
        if 0 <= there[0] < p.columns and 0 <= there[1] < p.rows:
            border = dx and max(x, there[0]) % p.die_columns == 0
            return self._link(
                key, Input(network, *there, arch.OPPOSITE[port]), p.die_hop if border else p.hop
            )
        if network == VECTOR and dx and y < p.agcus_per_side:
            return self._link(key, Unit("agcu east" if port == EAST else "agcu west", x, y), p.hop)
        raise UserError(f"a packet leaves the mesh at switch {x},{y} by its {arch.MESH[port]} port")

    def _link(self, key: tuple, end: Input | Unit, forward: int) -> int:
        if key not in self.link_of:
            self.link_of[key] = len(self.links)
            self.links.append(Link(end, self.p.fifo_depth, forward, self.p.credit))
        return self.link_of[key]

    def _outputs(self, at: Input, flow: int) -> tuple[int, int]:
        """Outputs of a packet, as a mask, and its flow behind them."""
        p = self.p
        if flow & arch.DYNAMIC:
            x = flow & (1 << arch.X_BITS) - 1
            y = flow >> arch.X_BITS & (1 << arch.Y_BITS) - 1
            local = flow >> arch.X_BITS + arch.Y_BITS & (1 << arch.LOCAL_BITS) - 1
            along_x = 0 if x == at.x else 1 << (EAST if x > at.x else WEST)
            along_y = 0 if y == at.y else 1 << (SOUTH if y > at.y else NORTH)
            first, second = (along_y, along_x) if p.y_first else (along_x, along_y)
            return first or second or 1 << LOCAL + local, flow
        key = (*at, flow)
        if key not in self.tables:
            self.own = False
        out, following = self.tables.get(key) or self.older.get(key, (0, 0))
        if not out:
            raise UserError(
                f"flow {flow:#x} leads nowhere from port {at.port} of the {arch.NETWORKS[at.network]} switch "
                f"{at.x},{at.y}"
            )
        return out, following

    def _trace(self, link: int, flow: int) -> int:
        """The number of a flow on a link; all that follow are found."""
        left = [(link, flow)]
        while left:
            at = left.pop()
            if at in self.known:
                continue
            number = self.known[at] = len(self.flows)
            self.flows.append({})
            self.flow_link.append(at[0])
            end = self.links[at[0]].end
            if isinstance(end, Input):
                out, following = self._outputs(end, at[1])
                for port in range(out.bit_length()):
                    if out >> port & 1:
                        behind = self.into(end.network, end.x, end.y, port)
                        self.flows[number][behind] = following
                        left.append((behind, following))
        return self.known[link, flow]

    # ---- joining ----------------------------------------------------------------------------------------

    def net(self, fold: bool) -> Net:
        """Switches, and links, which `fold` joins where they have no choice."""
        stands, joined = self._joined(fold)
        kept = [k for k, first in enumerate(stands) if k == first]
        number = {k: n for n, k in enumerate(kept)}
        link = [number[k] for k in stands]

        def end(flow: int) -> int:
            """The flow at the end of a joined link."""
            while self.flows[flow]:
                hop = next(iter(self.flows[flow].items()))
                if link[hop[0]] != link[self.flow_link[flow]]:
                    break
                flow = self.known[hop]
            return flow

        flow = [end(f) for f in range(len(self.flows))]
        outs = [
            {link[k]: flow[self.known[k, f]] for k, f in hops.items() if link[k] != link[self.flow_link[n]]}
            for n, hops in enumerate(self.flows)
        ]
        # A switch's links that share inputs or outputs are one node; others never meet.
        leads: dict[int, set[int]] = {}
        for n, hops in enumerate(outs):
            if hops:
                leads.setdefault(link[self.flow_link[n]], set()).update(hops)
        taken: dict[int, int] = {}  # group of each link out
        groups: list[tuple[list[int], list[int]]] = []
        for into, after in sorted(leads.items()):
            met = sorted({taken[k] for k in after if k in taken})
            ins = [into, *(k for g in met for k in groups[g][0])]
            all_outs = sorted(after.union(*(groups[g][1] for g in met)))
            for g in met:
                groups[g] = ([], [])
            taken |= dict.fromkeys(all_outs, len(groups))
            groups.append((ins, all_outs))
        links = [joined[k] for k in kept]

        def port(n: int) -> int:
            into = links[n].end
            assert isinstance(into, Input)
            return into.port

        ports = [(sorted(ins, key=port), after) for ins, after in groups if ins]
        return Net(links, ports, link, flow, outs)

    def _joined(self, fold: bool) -> tuple[list[int], list[Link]]:
        """For each link the first of those that it is joined with, and the joined link."""
        stands = list(range(len(self.links)))
        joined = [Link(**vars(k)) for k in self.links]
        if not fold:
            return stands, joined
        follows: list[set[int]] = [set() for _ in self.links]
        leads: list[set[int]] = [set() for _ in self.links]
        for link, hops in zip(self.flow_link, self.flows, strict=True):
            follows[link] |= hops.keys()
            for out in hops:
                leads[out].add(link)
        covers = [k.capacity >= k.forward + k.backward for k in self.links]
        after = [-1] * len(self.links)
        for link, outs in enumerate(follows):
            if len(outs) == 1 and covers[link]:
                (out,) = outs
                if leads[out] == {link} and covers[out]:
                    after[link] = out
        inner = set(after)
        for first in range(len(self.links)):
            at = after[first] if first not in inner else -1
            while at >= 0:
                stands[at] = first
                joined[first].end = self.links[at].end
                joined[first].capacity += self.links[at].capacity
                joined[first].forward += self.links[at].forward
                joined[first].backward += self.links[at].backward
                at = after[at]
        return stands, joined

    # ---- for errors -------------------------------------------------------------------------------------

    def name(self, unit: Unit) -> str:
        """The unit of the timeline that takes a packet there."""
        if unit.kind.startswith("agcu"):
            return f"agcu@{unit.y + (unit.kind == 'agcu east') * self.p.agcus_per_side}"
        return f"{'pmu.write' if unit.kind == 'pmu' else unit.kind}@{unit.x},{unit.y}"


def switch_tables(records: Mapping[str, np.ndarray]) -> Tables:
    """Entries of switches: (network, x, y, port, flow) -> (outputs, next flow)."""
    rows = records.get("config.switch")
    if rows is None:
        return {}
    columns = [rows[f].tolist() for f in ("network", "x", "y", "port", "flow", "out", "next_flow")]
    return {
        (n, x, y, port, flow): (out, after) for n, x, y, port, flow, out, after in zip(*columns, strict=True)
    }
