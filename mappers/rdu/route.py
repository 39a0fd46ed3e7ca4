"""Routing by negotiated congestion.

After McMurchie, Ebeling, "PathFinder: a negotiation-based performance-driven router for FPGAs", FPGA 1995: streams
may share links beyond their capacity at first; overused links grow more expensive, at once and for good, and streams
through them are routed anew, until none is overused. A search for a path is A* over input ports of switches, a
multicast grows from the nearest point of its tree.

Which turns are allowed decides whether packets can wait for one another in a circle (Glass, Ni, "The turn model for
adaptive routing", ISCA 1992; Chiu, "The odd-even turn model", IEEE TPDS 11, 2000). Of the TURNS below `any` lets them.
`acyclic` begins with all turns too; where streams then form a circle, one of its turns that the odd-even model
forbids (each circle has some) is taken away and its streams are routed anew, until there is none. It is the
default: the odd-even model as a whole leads a stream from an odd column to its eastern neighbour by one link only. `xy`
and `yx` leave one path each, which is dimension-order routing.
"""

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from math import lcm
from typing import Literal, NamedTuple

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import MESH, NETWORKS, OPPOSITE
from tilewright.mappers.rdu.fabric import LOCAL, NORTH, SOUTH, STEP, WEST, Fabric
from tilewright.mappers.rdu.kernels import ONE, between_circles, grow_tree
from tilewright.mappers.rdu.netlist import Netlist, Stream
from tilewright.mappers.rdu.place import Placement

__all__ = [
    "TURNS",
    "Hop",
    "Link",
    "Route",
    "Routing",
    "Turns",
    "rerouted",
    "route",
    "turn_allowed",
    "waiting_circle",
]

Turns = Literal["acyclic", "any", "odd-even", "west-first", "xy", "yx"]
TURNS: tuple[Turns, ...] = ("acyclic", "any", "odd-even", "west-first", "xy", "yx")

_PORTS = LOCAL + 1  # of a switch, as states: the mesh ports, and one for injection
_FINEST = 1 << 20  # the unit of rates is at least 1 / _FINEST packets a tick
_AT_LEAST = (
    ONE // 2
)  # overuse that counts even where a link is overused by little: one stream may stop another there
_PATIENCE = 15  # iterations without a better result
_AGAIN = 1  # iterations for what is routed anew, so that it finds its way among the others, too


class Link(NamedTuple):
    """A link that leaves a switch by one of its ports, or (`into`) leads from a unit to its switch's port."""

    x: int
    y: int
    port: int
    into: bool = False


class Hop(NamedTuple):
    """A stream at a switch: the input port and flow by which it comes, output ports and flow by which it goes."""

    x: int
    y: int
    port: int
    flow: int
    outs: tuple[int, ...]
    next_flow: int


@dataclass(frozen=True)
class Route:
    """The tree of a stream through the switches."""

    stream: Stream
    hops: tuple[Hop, ...]
    """From the source outwards."""
    latencies: tuple[int, ...]
    """Ticks from the source's output to the input of each sink in a free network, one for each link on the way."""

    @property
    def flow(self) -> int:
        """The flow with which packets leave the source."""
        return self.hops[0].flow


@dataclass(frozen=True)
class Routing:
    """The routes of a section, and what they load."""

    routes: Mapping[str, Route]
    """By name of the stream."""
    loads: Mapping[str, Mapping[Link, Fraction]]
    """Packets a tick on each link in use, by network: between switches, and to and from units."""
    overused: Mapping[str, tuple[Link, ...]]
    """Links between switches that carry more than their capacity."""
    slow_down: Fraction
    """The largest load over capacity, at least 1: by this factor all streams must slow down."""
    iterations: int
    """Iterations of the network that took most."""

    @property
    def hops(self) -> int:
        """Links between switches in use, counted once for each stream."""
        return sum(len(r.hops) - 1 for r in self.routes.values())


def route(
    netlist: Netlist,
    fabric: Fabric,
    placement: Placement,
    *,
    turns: Turns = "acyclic",
    iterations: int = 60,
    seconds: float | None = None,
) -> Routing:
    """Route all vector and scalar streams.

    Stops when no link carries more than its capacity, after `iterations`, after `seconds`, or when the result no
    longer gets better; the best one is returned, and tells which links are overused. Deterministic, unless
    `seconds` end it. Raises UserError if the streams on a link need more flow ids than a switch has.
    """
    if turns not in TURNS:
        raise UserError(f"turns must be one of {', '.join(TURNS)}, not {turns!r}")
    end = None if seconds is None else time.monotonic() + seconds
    routes: dict[str, Route] = {}
    used = 0
    for network in NETWORKS:
        streams = [s for s in netlist.streams if s.network == network]
        router = _Router(fabric, turns, streams, placement)
        used = max(used, router.negotiate(1 if turns in ("xy", "yx") else iterations, end))
        routes |= {r.stream.name: r for r in router.routes()}
    return _routing(netlist, fabric, routes, used)


def rerouted(
    netlist: Netlist,
    fabric: Fabric,
    placement: Placement,
    routing: Routing,
    avoid: Mapping[str, Collection[tuple[str, int, int, int]]],
) -> Routing:
    """The same routes but for some streams, which avoid input ports, (network, x, y, port), and what they displace.

    No links wait for one another in a circle. Raises UserError where a stream can't avoid its ports, or there are too many
    flows.
    """
    routes = dict(routing.routes)
    for network in NETWORKS:
        streams = [s for s in netlist.streams if s.network == network]
        if any(s.source in avoid for s in streams):
            router = _Router(fabric, "acyclic", streams, placement)
            router.resume(routing, avoid)
            routes |= {r.stream.name: r for r in router.routes()}
    return _routing(netlist, fabric, routes, routing.iterations)


def _routing(netlist: Netlist, fabric: Fabric, routes: Mapping[str, Route], iterations: int) -> Routing:
    loads, overused = {}, {}
    slow_down = Fraction(1)
    for network in NETWORKS:
        loads[network] = _loads(r for r in routes.values() if r.stream.network == network)
        overused[network] = tuple(
            link for link, load in loads[network].items() if load > fabric.capacity and _in_mesh(fabric, link)
        )
        for link, load in loads[network].items():
            slow_down = max(slow_down, load / (fabric.capacity if _in_mesh(fabric, link) else 1))
    order = {s.name: routes[s.name] for s in netlist.streams if s.name in routes}
    return Routing(order, loads, overused, slow_down, iterations)


def _in_mesh(fabric: Fabric, link: Link) -> bool:
    return not link.into and link.port < LOCAL and fabric.neighbour(*link[:3]) is not None


def waiting_circle(routing: Routing) -> list[Link] | None:
    """Links whose queues could fill up in a circle, each waiting for room in the next, or None if there are none.

    A packet in the queue behind a link waits for room in those behind all links by which its stream goes on.
    """
    circle: list[Link] | None = None
    for network in NETWORKS:
        graph: dict[Link, set[Link]] = {}
        for r in routing.routes.values():
            if r.stream.network == network:
                for hop in r.hops:
                    here = graph.setdefault(Link(hop.x, hop.y, hop.port, into=True), set())
                    here.update(
                        Link(hop.x + STEP[p][0], hop.y + STEP[p][1], OPPOSITE[p], into=True)
                        for p in hop.outs
                        if p < LOCAL
                    )
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as e:
            circle = e.args[1]
    return circle


def turn_allowed(turns: Turns, x: int, port: int, out: int) -> bool:
    """Whether a packet that came by mesh port `port` of a switch in column x may leave by mesh port `out`."""
    if out == port:
        return False
    straight = out == OPPOSITE[port]
    if straight or turns in ("any", "acyclic"):
        return True
    along_y, to_y = port in (NORTH, SOUTH), out in (NORTH, SOUTH)
    if turns == "xy":
        return not along_y
    if turns == "yx":
        return along_y
    if turns == "west-first":
        return out != WEST
    # No turn from east to north or south in an even column, none from north or south to west in an odd one.
    if to_y and port == WEST:
        return x % 2 == 1
    if along_y and out == WEST:
        return x % 2 == 0
    return True


class _Tree(NamedTuple):
    """States from the source outwards, the parent's index of each, and the index at which each sink leaves."""

    states: np.ndarray
    parents: np.ndarray
    ends: np.ndarray


class _Router:
    """The streams of one network. States are numbered switch * 5 + input port; see `kernels.grow_tree`."""

    def __init__(self, fabric: Fabric, turns: Turns, streams: list[Stream], placement: Placement) -> None:
        self.fabric, self.streams, self.turns = fabric, streams, turns
        self.sites = [
            [fabric.sites[placement.sites[name]] for name in (s.source, *(k.unit for k in s.sinks))]
            for s in streams
        ]
        columns, switches = fabric.columns, fabric.columns * fabric.rows
        self.follow = np.full((switches * _PORTS, len(MESH)), -1, np.int64)
        self.base = np.full(switches * _PORTS, fabric.hop, np.int64)
        for switch in range(switches):
            x, y = switch % columns, switch // columns
            for out in range(len(MESH)):
                there = fabric.neighbour(x, y, out)
                if there is None:
                    continue
                after = (there[1] * columns + there[0]) * _PORTS + OPPOSITE[out]
                self.base[after] = fabric.link_ticks(x, out)
                for port in range(_PORTS):
                    # A port without a neighbour is one of injection too.
                    inner = port < LOCAL and fabric.neighbour(x, y, port) is not None
                    if not inner or turn_allowed(turns, x, port, out):
                        self.follow[switch * _PORTS + port, out] = after

        unit = lcm(fabric.capacity.denominator, *(s.rate.denominator for s in streams))
        unit = min(unit, _FINEST)
        self.rates = [-(-s.rate.numerator * unit // s.rate.denominator) for s in streams]
        # Nothing is gained by avoiding a load that the fastest stream alone makes.
        self.capacity = max([int(fabric.capacity * unit), *self.rates])
        self.load = np.zeros(switches * _PORTS, np.int64)
        self.count = np.zeros_like(self.load)
        self.history = np.zeros_like(self.load)
        self.trees: dict[int, _Tree] = {}
        self.banned: dict[int, list[int]] = {}

        states = switches * _PORTS
        self._cost, self._stamp, self._parent = (np.zeros(states, np.int64) for _ in range(3))
        self._clock = np.zeros(1, np.int64)
        self._heap = np.zeros(6 * states, np.int64)
        self._tree, self._tree_parent = (np.zeros(states, np.int64) for _ in range(2))
        self.sources: list[int] = []
        self.targets: list[np.ndarray] = []
        self.order_of_sinks: list[list[int]] = []
        for ends in self.sites:
            at = [e.y * columns + e.x for e in ends]
            distance = [abs(e.x - ends[0].x) + abs(e.y - ends[0].y) for e in ends]
            nearest_first = sorted(range(1, len(ends)), key=lambda i: (distance[i], i))
            self.sources.append(at[0] * _PORTS + ends[0].port)
            self.targets.append(np.array([at[i] for i in nearest_first], np.int64))
            self.order_of_sinks.append(nearest_first)

    def negotiate(self, iterations: int, end: float | None) -> int:
        """Route all, then those through overused links again and again; returns the number of iterations."""
        # The heaviest and longest first: they have the least choice.
        weight = [rate * self._extent(i) for i, rate in enumerate(self.rates)]
        order = sorted(range(len(self.streams)), key=lambda i: -weight[i])
        again = order
        best: tuple[tuple[int, int, int], dict[int, _Tree]] | None = None
        present, stale, iteration, last = ONE // 2, 0, 0, iterations
        while again:
            iteration += 1
            for i in again:
                self._put(i, None)
                self._put(i, self._grow(i, present))
            # Rounded up: the least overuse counts.
            excess = np.maximum(self.load - self.capacity, 0)
            over = np.where(excess, _AT_LEAST, 0) + -(-excess * ONE // self.capacity)
            many = np.maximum(self.count - self.fabric.flows, 0)
            over += np.where(many, ONE, 0) + -(-many * ONE // self.fabric.flows)
            length = sum(len(tree.states) for tree in self.trees.values())
            score = (int(over.max()), int(over.sum()), length)
            if best is None or score < best[0]:
                best, stale = (score, dict(self.trees)), 0
            else:
                stale += 1
            late = iteration >= last or (end is not None and time.monotonic() > end)
            if score[0] and stale < _PATIENCE and not late:
                self.history += over
                present = min(present * 3 // 2, ONE * ONE)
                again = [i for i in order if over[self.trees[i].states[1:]].any()]
                continue
            for i in order:
                self._put(i, best[1][i])
            again, best = [], None
            if self.turns == "acyclic":
                broken = self._break_circles()
                again = [i for i in order if i in broken]
                stale, last = 0, max(last, iteration + _AGAIN)
        return iteration

    def resume(self, routing: Routing, avoid: Mapping[str, Collection[tuple[str, int, int, int]]]) -> None:
        """Go on from routes that were found; streams that `avoid` ports are routed anew, and those in circles with them."""
        columns = self.fabric.columns
        again = set()
        for i, s in enumerate(self.streams):
            hops = routing.routes[s.name].hops
            index = {(h.x, h.y, h.port): k for k, h in enumerate(hops)}
            states = np.array([(h.y * columns + h.x) * _PORTS + h.port for h in hops], np.int64)
            parents = np.full(len(hops), -1, np.int64)
            at: dict[tuple[int, int, int], int] = {}
            for k, h in enumerate(hops):
                for out in h.outs:
                    at[h.x, h.y, out] = k
                    if out < LOCAL:
                        there = index.get((h.x + STEP[out][0], h.y + STEP[out][1], OPPOSITE[out]))
                        if there is not None:
                            parents[there] = k
            ends = []
            for n in self.order_of_sinks[i]:
                site = self.sites[i][n]
                ends.append(
                    at[site.x, site.y, site.port + (s.sinks[n - 1].input if site.port == LOCAL else 0)]
                )
            self._put(i, _Tree(states, parents, np.array(ends, np.int64)))
            ports = [port for network, *port in avoid.get(s.source, ()) if network == s.network]
            if ports:
                again.add(i)
                self.banned[i] = [(y * columns + x) * _PORTS + port for x, y, port in ports]
        while again:
            for i in sorted(again):
                self._put(i, None)
                self._put(i, self._grow(i, ONE * ONE))
            again = self._break_circles()

    def _break_circles(self) -> set[int]:
        """Take away turns until no links wait for one another in a circle; returns the streams that used them."""
        trees = sorted(self.trees.items())
        if not trees:
            return set()
        stream = np.repeat([i for i, _ in trees], [len(tree.states) - 1 for _, tree in trees])
        heads = np.concatenate([tree.states[tree.parents[1:]] for _, tree in trees])
        tails = np.concatenate([tree.states[1:] for _, tree in trees])
        users: dict[int, dict[int, set[int]]] = {}
        some = between_circles(heads, tails, len(self.load))
        for i, a, b in zip(stream[some].tolist(), heads[some].tolist(), tails[some].tolist(), strict=True):
            users.setdefault(a, {}).setdefault(b, set()).add(i)
        broken: set[int] = set()
        while circles := _circles(users):
            for circle in circles:
                turns = []
                for before, after in pairwise([circle[-1], *circle]):
                    if after not in users[before]:
                        break  # broken with another circle
                    switch, port = divmod(before, _PORTS)
                    if not turn_allowed(
                        "odd-even", switch % self.fabric.columns, port, OPPOSITE[after % _PORTS]
                    ):
                        lost = sum(self.rates[i] for i in users[before][after])
                        turns.append((lost, before, after))
                else:
                    _, before, after = min(turns)
                    self.follow[before, OPPOSITE[after % _PORTS]] = -1
                    broken |= users[before].pop(after)
        return broken

    def _extent(self, i: int) -> int:
        xs, ys = [e.x for e in self.sites[i]], [e.y for e in self.sites[i]]
        return max(xs) - min(xs) + max(ys) - min(ys)

    def _put(self, i: int, tree: _Tree | None) -> None:
        """Replace the tree of a stream."""
        for sign, t in ((-1, self.trees.pop(i, None)), (1, tree)):
            if t is not None:
                self.load[t.states[1:]] += sign * self.rates[i]
                self.count[t.states[1:]] += sign
        if tree is not None:
            self.trees[i] = tree

    def _grow(self, i: int, present: int) -> _Tree:
        fabric, targets = self.fabric, self.targets[i]
        ends = np.zeros(len(targets), np.int64)
        banned = self.banned.get(i)
        follow = np.where(np.isin(self.follow, banned), -1, self.follow) if banned else self.follow
        states = grow_tree(
            self.sources[i], targets, self.rates[i], ONE, _AT_LEAST, min(fabric.hop, fabric.die_hop), fabric.columns,
            follow, self.base, self.load, self.count, self.history, self.capacity, fabric.flows, present,
            self._cost, self._stamp, self._clock, self._parent, self._heap, self._tree, self._tree_parent, ends,
        )  # fmt: skip
        if states < 0 and banned:
            raise UserError(f"stream {self.streams[i].name} can't avoid the links it is to")
        if states < 0:
            raise RuntimeError(f"stream {self.streams[i].name} can't reach a sink")
        return _Tree(self._tree[:states].copy(), self._tree_parent[:states].copy(), ends)

    def routes(self) -> list[Route]:
        """The trees as hops, with flow ids: on each link every stream has its own, the lowest that is free.

        All copies that leave a switch carry the same id, so those of many copies choose first. A unit's output has
        one stream, hence id 0.
        """
        columns, flows = self.fabric.columns, self.fabric.flows
        children: list[list[list[int]]] = []
        for i in range(len(self.streams)):
            below: list[list[int]] = [[] for _ in self.trees[i].states]
            for k, parent in enumerate(self.trees[i].parents[1:].tolist(), 1):
                below[parent].append(k)
            children.append(below)
        forks = [(i, k) for i, below in enumerate(children) for k, after in enumerate(below) if after]
        forks.sort(key=lambda fork: -len(children[fork[0]][fork[1]]))
        taken: dict[int, set[int]] = {}
        ids = [[0] * len(below) for below in children]
        for i, k in forks:
            links = [taken.setdefault(int(self.trees[i].states[c]), set()) for c in children[i][k]]
            ids[i][k] = free = next(
                n for n in range(len(self.streams)) if all(n not in used for used in links)
            )
            for used in links:
                used.add(free)
            if free >= flows:
                switch = int(self.trees[i].states[k]) // _PORTS
                raise UserError(
                    f"stream {self.streams[i].name} needs flow id {free} at switch {switch % columns},"
                    f"{switch // columns}; network.flows is {flows}"
                )
        return [self._route(i, children[i], ids[i]) for i in range(len(self.streams))]

    def _route(self, i: int, children: list[list[int]], ids: list[int]) -> Route:
        columns, stream, tree = self.fabric.columns, self.streams[i], self.trees[i]
        outs: list[set[int]] = [set() for _ in children]
        at = [divmod(int(state), _PORTS) for state in tree.states]
        ticks = [self.fabric.hop]
        for k, parent in enumerate(tree.parents[1:].tolist(), 1):
            outs[parent].add(OPPOSITE[at[k][1]])
            ticks.append(ticks[parent] + int(self.base[tree.states[k]]))
        latencies = [0] * len(stream.sinks)
        for end, n in zip(tree.ends.tolist(), self.order_of_sinks[i], strict=True):
            site = self.sites[i][n]
            outs[end].add(site.port + (stream.sinks[n - 1].input if site.port == LOCAL else 0))
            latencies[n - 1] = ticks[end] + self.fabric.hop
        hops = tuple(
            Hop(
                at[k][0] % columns,
                at[k][0] // columns,
                at[k][1],
                ids[int(tree.parents[k])] if k else 0,
                tuple(sorted(outs[k])),
                ids[k],
            )
            for k in range(len(children))
        )
        return Route(stream, hops, tuple(latencies))


def _circles(graph: Mapping[int, Iterable[int]]) -> list[list[int]]:
    """Some circles of a graph, at least one if it has any: those that a search in depth closes."""
    circles: list[list[int]] = []
    done: set[int] = set()
    for start in graph:
        path, ahead = [start], [iter(graph[start])]
        where = {start: 0}
        if start in done:
            continue
        while path:
            for node in ahead[-1]:
                if node in where:
                    circles.append(path[where[node] :])
                elif node not in done:
                    where[node] = len(path)
                    path.append(node)
                    ahead.append(iter(graph.get(node, ())))
                    break
            else:
                done.add(path[-1])
                del where[path.pop()]
                ahead.pop()
    return circles


def _loads(routes: Iterable[Route]) -> dict[Link, Fraction]:
    """Packets a tick on each link: from the source, out of each switch."""
    loads: dict[Link, Fraction] = {}
    for r in routes:
        source = r.hops[0]
        links = [Link(source.x, source.y, source.port, into=True)]
        links += [Link(h.x, h.y, out) for h in r.hops for out in h.outs]
        for link in links:
            loads[link] = loads.get(link, Fraction(0)) + r.stream.rate
    return loads
