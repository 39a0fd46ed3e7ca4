"""Where a kernel stands still: which unit, and which packet at the head of a link, waits for which.

At a standstill a unit that is not done waits for tokens, for packets, or for room behind its output. A packet that it
lacks is on its way, on a link where it stands behind others, or its source has not sent it. The packet at the head of a
link waits for room in the links that it goes on by, or for the unit at the end to take it. So units and links are a
graph, whose nodes need all that they point to (of several sources at one input, some), and a circle in it is a deadlock.
Where there is none, something is missing that nobody gives.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import numpy as np

from tilewright.arch import rdu as arch
from tilewright.sim import rdu_state as state
from tilewright.sim.rdu_build import Kernel
from tilewright.sim.rdu_ways import Input, Unit

__all__ = ["circle", "standstill"]

MOST = 8  # units that a report lists
DONE = ("idle", "busy")
Node = tuple[str, int]  # "unit" and its chain, or "link"


def standstill(kernel: Kernel, names: Mapping[str, str] | None = None) -> str:
    """Why a kernel that is quiet has not come to an end, in a line; empty where it has.

    That is the shortest circle that is found of units and streams that wait for one another, with the links where they do,
    or what each unit lacks. `names` are a mapper's names of units, by place ("pcu@3,4").
    """
    waits = _Waits(kernel, names or {})
    found = circle(waits.graph)
    if found:
        others = len(waits.lacks) - sum(kind == "unit" for kind, _ in found)
        more = "unit waits" if others == 1 else "units wait"
        return waits.told(found) + (f"; {others} more {more}" if others else "")
    lacks = list(waits.lacks.values()) or waits.left()
    return "; ".join(lacks[:MOST]) + (f", and {len(lacks) - MOST} more" if len(lacks) > MOST else "")


def circle(graph: Mapping[Node, Iterable[Node]]) -> list[Node]:
    """A circle of a graph: the shortest one through a node of the first that is found. Empty if there is none.

    >>> a, b, c = ("unit", 0), ("unit", 1), ("link", 0)
    >>> circle({a: [b], b: [c], c: [b, a]})
    [('link', 0), ('unit', 1)]
    >>> circle({a: [b, c], b: [c]})
    []
    """
    try:
        TopologicalSorter(graph).prepare()
        return []
    except CycleError as error:
        return min((_around(graph, node) for node in sorted(set(error.args[1]))), key=len)


def _around(graph: Mapping[Node, Iterable[Node]], start: Node) -> list[Node]:
    """The shortest way from a node on a circle back to it."""
    came: dict[Node, Node] = {}
    left = deque([start])
    while start not in came:
        node = left.popleft()
        for after in graph.get(node, ()):
            if after not in came:
                came[after] = node
                left.append(after)
    way = [start]
    while came[way[-1]] != start:
        way.append(came[way[-1]])
    return [start, *reversed(way[1:])]


class _Waits:
    """The graph of a kernel that stands still, and the words for it. Flows and links are those of its net."""

    def __init__(self, kernel: Kernel, names: Mapping[str, str]):
        self.kernel, self.names = kernel, names
        net, ways = kernel.net, kernel.ways
        self.link = [net.link[link] for link in ways.flow_link]  # of each flow
        self.bit = {out: 1 << n for _, outs in net.ports for n, out in enumerate(outs)}
        self.leads: dict[int, set[int]] = {}  # flows by those that follow them
        for flow, hops in enumerate(net.outs):
            for after in hops.values():
                self.leads.setdefault(after, set()).add(flow)
        self.flows: dict[int, set[int]] = {}  # of each link
        for flow in set(net.flow):
            self.flows.setdefault(self.link[flow], set()).add(flow)
        self.sources: dict[int, set[int]] = {}  # chains by first link
        for chain, link, _, _ in kernel.routes:
            self.sources.setdefault(link, set()).add(chain)
        self.chains = {name: n for n, name in enumerate(kernel.units)}
        self.packets = [self._packets(k) for k in range(len(kernel.machine.link))]
        self.lacks: dict[int, str] = {}  # what each unit waits for, by chain
        self.graph: dict[Node, list[Node]] = {}
        self.lacked: dict[tuple[int, int], int] = {}  # flow of the packets that a unit lacks, on a link
        for chain, inputs, outputs in self._ends():
            self._unit(chain, inputs, outputs)
        for link, flows in enumerate(self.packets):
            if flows:
                self.graph["link", link] = self._link(link, flows[0])

    # ---- the graph --------------------------------------------------------------------------------------

    def _packets(self, link: int) -> list[int]:
        """Flows of the packets on a link, the head's first."""
        m = self.kernel.machine
        base, capacity, at, level = m.link[
            link, [state.BASE, state.CAPACITY, state.READ, state.LEVEL]
        ].tolist()
        return (m.items[base + (at + np.arange(level)) % capacity] >> arch.SEQUENCE_BITS).tolist()

    def _ends(self) -> list[tuple[int, list[int], list[int]]]:
        """For each chain its links in and its links out."""
        m = self.kernel.machine
        ends = []
        for row in m.pcu.tolist():
            inputs = row[state.INPUT : state.INPUT + row[state.INPUTS_USED]]
            ends.append((row[state.UNIT], inputs, [row[state.VECTOR], row[state.SCALAR]]))
        for row in m.pmu.tolist():
            ends.append((row[state.SIDE], [row[state.FED]], []))
            ends.append((row[state.SIDE + 1], [], [row[state.GIVES]]))
        for row in m.agcu.tolist():
            port, store = [row[state.PORT]], row[state.STORE]
            ends.append((row[state.AGCU], port if store else [], [] if store else port))
        return [(chain, ins, [k for k in outs if k >= 0]) for chain, ins, outs in ends]

    def _cause(self, chain: int) -> str:
        return ("busy", *arch.CAUSES)[self.kernel.machine.chain[chain, state.CAUSE]]

    def _unit(self, chain: int, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """What a unit waits for."""
        m, cause = self.kernel.machine, self._cause(chain)
        row = m.chain[chain]
        nodes: list[Node] = []
        if cause == "token":
            queues = [int(row[state.QUEUE + n]) for n in range(arch.TOKENS) if row[state.WAIT] >> n & 1]
            empty = [k for k in queues if m.queue[k, state.GIVEN] == m.queue[k, state.TAKEN]]
            givers = sorted({self.kernel.waits[k][1] for k in empty})
            what = f"a token of {', '.join(self.name(n) if n else 'nobody' for n in givers)}"
            nodes = [("unit", self.chains[n]) for n in givers if n]
        elif cause == "operand":
            empty = [k for k in inputs if not self.packets[k]]
            chains = {c for k in empty for c in self._givers(self.flows.get(k, ()))}
            what = f"packets of {self._units(chains)}"
            nodes = [node for k in empty for node in self._missing(chain, k)]
        elif cause in ("output", "drain"):
            full = [k for k in outputs if self._full(k)]
            what = f"room on the way to {self._takers(full)}"
            nodes = [("link", k) for k in full]
        else:
            return
        self.lacks[chain] = f"{self.name(self.kernel.units[chain])} waits for {what}"
        self.graph["unit", chain] = [n for n in nodes if n[0] == "link" or self._cause(n[1]) not in DONE]

    def _full(self, link: int) -> bool:
        row = self.kernel.machine.link[link]
        return bool(row[state.LEVEL] == row[state.CAPACITY])

    def _missing(self, chain: int, link: int) -> list[Node]:
        """Where the packets are that a unit at the end of an empty link lacks: links nearest to it, or their sources."""
        found: list[Node] = []
        left, seen = deque(self.flows.get(link, ())), set(self.flows.get(link, ()))
        while left:
            flow = left.popleft()
            before = self.leads.get(flow, set())
            if not before:
                found += [("unit", source) for source in self.sources.get(self.link[flow], ())]
            for at in before - seen:
                seen.add(at)
                on = self.packets[self.link[at]]
                sent = self.kernel.machine.link[self.link[at], state.SENT] & self.bit[self.link[flow]]
                if at in (on[1:] if sent else on):
                    found.append(("link", self.link[at]))
                    self.lacked[chain, self.link[at]] = at
                else:
                    left.append(at)
        return found

    def _link(self, link: int, flow: int) -> list[Node]:
        """What the packet at the head of a link waits for."""
        sent = self.kernel.machine.link[link, state.SENT]
        outs = [out for out in self.kernel.net.outs[flow] if not sent & self.bit[out]]
        if outs:
            return [("link", out) for out in outs if self._full(out)]
        end = self.kernel.net.links[link].end
        chain = self.chains.get(self.kernel.ways.name(end), -1) if isinstance(end, Unit) else -1
        return [("unit", chain)] if ("unit", chain) in self.graph else []

    # ---- the words --------------------------------------------------------------------------------------

    def name(self, unit: str) -> str:
        """A unit's place, with its name where there is one."""
        place = unit.replace("pmu.write@", "pmu@").replace("pmu.read@", "pmu@")
        return f"{self.names[place]} ({unit})" if place in self.names else unit

    def _list(self, units: Iterable[str]) -> str:
        names = sorted(self.name(unit) for unit in units)
        more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
        return ", ".join(names[:MOST]) + more or "nobody"

    def _units(self, chains: Iterable[int]) -> str:
        return self._list({self.kernel.units[chain] for chain in chains})

    def _givers(self, flows: Iterable[int]) -> set[int]:
        """The chains whose packets have one of these flows."""
        left, seen, out = list(flows), set(flows), set()
        while left:
            flow = left.pop()
            before = self.leads.get(flow, set())
            out |= self.sources.get(self.link[flow], set()) if not before else set()
            left += before - seen
            seen |= before
        return out

    def _takers(self, links: Iterable[int]) -> str:
        """The units at the ends of all ways from these links."""
        left = [flow for link in links for flow in self.flows.get(link, ())]
        known, out = set(left), set()
        while left:
            flow = left.pop()
            end = self.kernel.net.links[self.link[flow]].end
            out |= {self.kernel.ways.name(end)} if isinstance(end, Unit) else set()
            after = set(self.kernel.net.outs[flow].values()) - known
            known |= after
            left += after
        return self._list(out)

    def left(self) -> list[str]:
        """Packets that nobody takes, where all units are done."""
        return list(
            dict.fromkeys(
                f"packets of {self._units(self._givers(flows))} are left for {self._takers([link])}"
                for link, flows in enumerate(self.packets)
                if flows
            )
        )

    def told(self, nodes: Sequence[Node]) -> str:
        """A circle in words, from its first unit on where one is part of it."""
        at = nodes.index(min(nodes, key=lambda node: (node[0] != "unit", node[1])))
        nodes = [*nodes[at:], *nodes[:at]]
        parts: list[str] = []
        for (kind, n), (following, k) in pairwise([*nodes, nodes[0]]):
            first = f"those of {self._first(k)}" if following == "link" else ""
            if kind == "unit":
                unit, cause = self.name(self.kernel.units[n]), self._cause(n)
                if following == "unit":
                    what = "a token" if cause == "token" else "packets"
                    parts.append(f"{unit} waits for {what} of {self.name(self.kernel.units[k])}")
                elif cause == "operand":
                    lacked = self._units(self._givers([self.lacked[n, k]]))
                    behind = f" behind {first}" if self.packets[k][0] != self.lacked[n, k] else ""
                    parts.append(
                        f"{unit} waits for packets of {lacked}, which stand on {self._way(k)}{behind}"
                    )
                else:
                    parts.append(f"{unit} waits for room on {self._way(k)} behind {first}")
            elif following == "unit":
                parts.append(f"these wait for {self.name(self.kernel.units[k])}")
            elif not parts or self._first(n) != self._first(k):
                parts.append(f"those of {self._first(n)} wait for room on {self._way(k)} behind {first}")
        return "; ".join(parts) + ": a circle"

    def _first(self, link: int) -> str:
        """Whose packet is at the head of a link."""
        return self._units(self._givers(self.packets[link][:1]))

    def _way(self, link: int) -> str:
        """From where to where a link leads, which may be several in a row."""
        ways, net = self.kernel.ways, self.kernel.net

        def place(at: Input | Unit) -> str:
            return f"{at.x},{at.y}" if isinstance(at, Input) else ways.name(at)

        spans = {}  # by where they begin
        for key, n in ways.link_of.items():
            if net.link[n] == link:
                begin = key[1] if key[0] == "in" else f"{key[2]},{key[3]}"
                spans[begin] = place(ways.links[n].end)
        (begin,) = set(spans) - set(spans.values()) or {min(spans)}
        return f"link {begin} -> {place(net.links[link].end)}"
