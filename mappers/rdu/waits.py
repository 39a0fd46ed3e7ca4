"""What may wait for what in a section, and why no circle can close.

A *side* is a unit, or one side of a memory unit. By its configuration a side waits for tokens of others, for packets of
each of its streams, and, where it gives more of them than its own link to the switch holds, for room; a packet waits for
what its stream waits for at the links ahead, until its side takes it. A memory unit takes what comes unless a token holds
it, and so does a gate; a compute unit takes a packet when the others of the iteration are there, too. Of as many packets
as a side's own link holds none waits on a link that others share but for those before it.

All that is a graph, drawn here once for all times: if A ever waits for B, there is a way from A to B. Links that streams
share add edges to it: a packet waits for what those before it wait for. None is added between streams of which one is
through before the other begins, as tokens or the data itself have it.

The argument. If no edge that sharing adds lies on a circle of the graph, a section on these routes comes to an end if it
does so with links of its own for every stream, and but two of them: a circle of sides that wait for one another at a
standstill is one of the graph, so it holds no edge of sharing; but what each side then has got, and has room for, is no
less than on links of its own, where it would stand still as well (of processes that communicate by queues alone, none is
stopped by more room or by another order of steps; Kahn, "The semantics of a simple language for parallel programming",
IFIP 1974; Parks, "Bounded scheduling of process networks", Berkeley 1995). Links by themselves close no circle: `route`.

Where such an edge does lie on one, tokens can keep the streams apart: one of them begins when the other is through. Each side
has a height, the steps on the longest way that leads to it; what it waits for is no lower. Tokens from the lower of two sides
to the higher, or along a line where no way leads back, close no circle, together with all the others.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import NamedTuple

from tilewright.arch.rdu import OPPOSITE
from tilewright.mappers.rdu.fabric import LOCAL, STEP
from tilewright.mappers.rdu.route import Route
from tilewright.mappers.rdu.section import Built
from tilewright.mappers.rdu.stages import Pipeline

__all__ = ["Clash", "Queue", "Waits"]

Queue = tuple[str, int, int, int]
"""Network, switch and its port: what has come by it waits there."""


class Clash(NamedTuple):
    """Packets of `stream` may stand behind those of `before` on a link of a network, and the latter for what the former give."""

    stream: str
    before: str
    queue: Queue


class Waits:
    """The graph of a section: what `line` says, on the routes of `built`.

    Streams are named by the units that they come from, sides as in the tokens of `line`.
    """

    def __init__(self, line: Pipeline, built: Built) -> None:
        self.line = line
        self.inputs: dict[str, list[str]] = {}  # streams of each side
        for source, sinks in line.sinks.items():
            sides = [line.side(unit, "write") for unit, _ in sinks]
            for side in dict.fromkeys(sides):
                self.inputs.setdefault(side, []).append(source)
        self.givers: dict[
            str, list[tuple[str, int]]
        ] = {}  # (side, held at first) of tokens that each side waits for
        for source, sink, index in line.tokens:
            self.givers.setdefault(sink, []).append((source, line.held(sink, index)))
        self.sides = [s for unit in line.units for s in line.sides(unit)]
        self._order()
        self._number: dict[tuple[str | int, ...], int] = {}
        self._edges: list[list[int]] = []
        self._shared: list[tuple[int, int, Clash]] = []
        self.beyond: dict[tuple[str, Queue], list[str]] = {}
        self._draw(built)

    # ---- what is through before a side begins -----------------------------------------------------------

    def _order(self) -> None:
        """For each side what is through when it begins, and when it is through itself; sides as bits."""
        line, bit = self.line, {side: 1 << i for i, side in enumerate(self.sides)}
        needs: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for side in self.sides:
            unit = line.unit_of(side)
            begin: list[tuple[str, str]] = []
            end: list[tuple[str, str]] = [("begin", side)]
            for giver, held in self.givers.get(side, ()):
                if not held:
                    given = line.events(giver, "signal")
                    begin.append(("end" if given == 1 else "begin", giver))
                    if given == line.events(side, "wait"):
                        end.append(("end", giver))
            sources = [line.side(s, "read") for s in self.inputs.get(side, ())]
            # A memory unit that is filled with others goes on when it has given all of its own.
            whole = [s for s in sources if line.gives_to_its_end(line.unit_of(s))]
            end += [("end" if s in whole else "begin", s) for s in sources]
            if side == unit:  # what a compute unit or gate gives needs some of all that it takes
                once = line.units[unit].kind == "pcu" and line.packets(unit) == 1
                begin += [("end" if once and s in whole else "begin", s) for s in sources]
            needs["begin", side], needs["end", side] = begin, end
        found: dict[tuple[str, str], int] = {}
        for node in TopologicalSorter(needs).static_order():
            what = 0
            for need in needs.get(node, ()):
                what |= found[need]
            found[node] = what | (bit[node[1]] if node[0] == "end" else 0)
        self.bit = bit
        self.begun = {side: found["begin", side] for side in self.sides}
        self.done = {side: found["end", side] for side in self.sides}

    def apart(self, a: str, b: str, queue: Queue) -> bool:
        """Whether of two streams on a queue one is through there before the other begins: all sides ahead have taken it."""
        return not (
            self._mask[a, queue] & ~self.begun[self.line.side(b, "read")]
            and self._mask[b, queue] & ~self.begun[self.line.side(a, "read")]
        )

    # ---- the graph ----------------------------------------------------------------------------------------

    def _node(self, *what: str | int) -> int:
        if what not in self._number:
            self._number[what] = len(self._edges)
            self._edges.append([])
        return self._number[what]

    def _draw(self, built: Built) -> None:
        line = self.line
        trees = {r.stream.source: _Tree(r) for r in built.routing.routes.values()}
        on: dict[Queue, list[tuple[str, int]]] = {}  # streams on each queue, and which of their hops it is
        queues: dict[int, Queue] = {}  # of nodes
        ahead: dict[tuple[str, int], list[int]] = {}  # nodes for what a stream's packet waits for at a hop
        for s, tree in trees.items():
            for hop, queue in enumerate(tree.queues):
                on.setdefault(queue, []).append((s, hop))
                ahead[s, hop] = [self._node("at", s, after) for after in tree.after[hop]]
                queues |= {self._node("at", s, after): tree.queues[after] for after in tree.after[hop]}
        last: dict[tuple[str, str], set[int]] = {}  # hops before each side
        beyond: dict[tuple[str, int], set[str]] = {key: set() for key in ahead}  # sides beyond each hop
        for s, tree in trees.items():
            for sink in tree.route.stream.sinks:
                site = built.fabric.sites[built.placement.sites[sink.unit]]
                out = site.port + (sink.input if site.port == LOCAL else 0)
                hop = tree.outs[site.x, site.y, out]
                side = line.side(sink.unit, "write")
                last.setdefault((side, s), set()).add(hop)
                beyond[s, hop].add(side)
                if line.packets(s) > line.p.fifo_depth:
                    ahead[s, hop].append(self._node("take", side, s))

            for hop in range(len(tree.queues) - 1, 0, -1):  # from the ends to the source
                beyond[s, tree.before[hop]] |= beyond[s, hop]
            self.beyond |= {(s, queue): sorted(beyond[s, hop]) for hop, queue in enumerate(tree.queues)}
        self._mask = {key: sum(self.bit[side] for side in sides) for key, sides in self.beyond.items()}
        rests = line.rests()
        free: dict[Queue, int] = {}  # a node for all on a queue that never rest
        for queue, streams in on.items():
            if any(s not in rests for s, _ in streams):
                free[queue] = self._node("free", *queue)
                self._edges[free[queue]] += [
                    to for s, hop in streams if s not in rests for to in ahead[s, hop]
                ]

        def behind(node: int, s: str, hop: int, way: Container[Queue] | None = None) -> None:
            """A node waits for what others on a queue wait for, but on a `way` that it knows."""
            queue = trees[s].queues[hop]
            if way is None and queue in free and len(on[queue]) > 1:
                self._edges[node].append(free[queue])
            for other, its in on[queue]:
                if other == s or (way is None and other not in rests) or self.apart(s, other, queue):
                    continue
                for to in ahead[other, its]:
                    if way is None or queues.get(to) not in way:
                        if other in rests:
                            self._shared.append((node, to, Clash(s, other, queue)))
                        else:
                            self._edges[node].append(to)

        for s, tree in trees.items():
            for hop in range(len(tree.queues)):
                node = self._node("at", s, hop)
                self._edges[node] += ahead[s, hop]
                behind(node, s, hop)
        for side in self.sides:
            self._side(side, trees)
        for (side, s), hops in last.items():
            node = self._node("lack", side, s)
            self._edges[node].append(self._node("begin", line.side(s, "read")))
            for hop in hops:
                way = {hop}
                while hop:
                    hop = trees[s].before[hop]
                    way.add(hop)
                for own in way:  # what stands before it, and other copies of its own stream
                    forks = {self._node("at", s, after) for after in way}
                    forks |= {self._node("take", side, s)}
                    self._edges[node] += [to for to in ahead[s, own] if to not in forks]
                    # What a unit lacks, while others there wait, moves on where nothing else is before it.
                    joins = line.units[line.unit_of(side)].kind == "pcu" and len(self.inputs[side]) > 1
                    behind(node, s, own, {trees[s].queues[k] for k in way} if joins else None)

    def _side(self, side: str, trees: Mapping[str, "_Tree"]) -> None:
        """What a side waits for: to begin its next iteration, to take a packet of a stream, and to be through."""
        line, unit = self.line, self.line.unit_of(side)
        tokens = [self._node("side", giver) for giver, _ in self.givers.get(side, ())]
        inputs = self.inputs.get(side, [])
        gives = unit in trees and side == line.side(unit, "read")
        room = [self._node("at", unit, 0)] if gives and line.packets(unit) > line.p.fifo_depth else []
        begin, whole = self._node("begin", side), self._node("side", side)
        lacks = {s: self._node("lack", side, s) for s in inputs}
        self._edges[begin] += [*tokens, *lacks.values()]
        self._edges[whole] += [begin, *room]
        for s in inputs:
            others = [lacks[o] for o in inputs if o != s] if line.units[unit].kind == "pcu" else []
            self._edges[self._node("take", side, s)] += [*tokens, *others, *room]

    # ---- circles ------------------------------------------------------------------------------------------

    def clashes(self) -> list[Clash]:
        """The edges of sharing that lie on circles."""
        edges = [list(after) for after in self._edges]
        for node, to, _ in self._shared:
            edges[node].append(to)
        part = components(edges)
        return list(dict.fromkeys(clash for node, to, clash in self._shared if part[node] == part[to]))

    def holds(self, clashes: Sequence[Clash]) -> tuple[dict[str, list[str]], list[Clash]]:
        """Sides by those that must be through before they begin, so that no two streams that clash meet; and clashes
        for which there are none."""
        bad = set(clashes)
        edges = [list(after) for after in self._edges]
        for node, to, clash in self._shared:
            if clash not in bad:
                edges[node].append(to)
        sides = {n for what, n in self._number.items() if what[0] in ("begin", "side")}
        height = heights(edges, sides)
        found: dict[str, set[str]] = {}

        def hold(first: str, second: str, queue: Queue, above: bool) -> bool:
            """Let a stream begin when another one is through, where that closes no circle: `above` tells by heights."""
            ends = self.beyond[first, queue]
            if not all(self.line.can_tell(side) for side in ends):
                return False
            nodes = [self._number["side", side] for side in ends]
            begins = {self._number["begin", side]: side for side in self._origins(second)}
            lowest = min(height[n] for n in nodes)
            known = set() if above else reached(edges, nodes)
            free = [
                (height[n], side)
                for n, side in begins.items()
                if self.line.can_wait(side) and (height[n] < lowest if above else n not in known)
            ]
            if not free:
                return False
            side = min(free)[1]
            found.setdefault(side, set()).update(ends)
            edges[self._number["begin", side]] += nodes
            return True

        left = list(clashes)
        for above in (True, False):  # in one order first, since that leaves room for all others in it
            left = [Clash(a, b, q) for a, b, q in left if not (hold(a, b, q, above) or hold(b, a, q, above))]
        out = {}
        for side, ends in found.items():
            needed = [e for e in sorted(ends) if not self.bit[e] & self.begun[side]]
            out[side] = [
                e for e in needed if not any(o != e and self.done[o] & self.bit[e] for o in needed)
            ]  # fmt: skip
        return {side: ends for side, ends in out.items() if ends}, left

    def _origins(self, stream: str) -> list[str]:
        """Sides that begin before a stream does: those of memory units and gates that its packets come from."""
        found, left, seen = [], [stream], {stream}
        while left:
            unit = left.pop()
            if self.line.units[unit].kind != "pcu":
                found.append(self.line.side(unit, "read"))
                continue
            left += [s for s in self.inputs.get(unit, ()) if s not in seen]
            seen.update(left)
        return found


class _Tree:
    """The hops of a route: the queue that each comes from, the one before and those behind, and hops by output."""

    def __init__(self, route: Route) -> None:
        self.route = route
        places = {(h.x, h.y, h.port): k for k, h in enumerate(route.hops)}
        self.queues: list[Queue] = [(route.stream.network, *place) for place in places]
        self.before = [0] * len(places)
        self.after: list[list[int]] = [[] for _ in places]
        self.outs: dict[tuple[int, int, int], int] = {}
        for k, h in enumerate(route.hops):
            for out in h.outs:
                self.outs[h.x, h.y, out] = k
                if out < LOCAL:
                    to = places.get((h.x + STEP[out][0], h.y + STEP[out][1], OPPOSITE[out]))
                    if to is not None:
                        self.before[to] = k
                        self.after[k].append(to)


def reached(edges: Sequence[Sequence[int]], starts: Iterable[int]) -> set[int]:
    """All nodes that a way leads to, with those where it starts."""
    found = set(starts)
    left = list(found)
    while left:
        for to in edges[left.pop()]:
            if to not in found:
                found.add(to)
                left.append(to)
    return found


def components(edges: Sequence[Sequence[int]]) -> list[int]:
    """The number of each node's strongly connected component: what a node leads to has no higher one (Tarjan, 1972).

    >>> components([[1], [2], [1], [0]])
    [1, 0, 0, 2]
    """
    index, low, part = ([-1] * len(edges) for _ in range(3))
    stack: list[int] = []
    count = parts = 0
    for start in range(len(edges)):
        if index[start] >= 0:
            continue
        path = [(start, iter(edges[start]))]
        index[start] = low[start] = count
        count += 1
        stack.append(start)
        while path:
            node, ahead = path[-1]
            for to in ahead:
                if index[to] < 0:
                    index[to] = low[to] = count
                    count += 1
                    stack.append(to)
                    path.append((to, iter(edges[to])))
                    break
                if part[to] < 0:
                    low[node] = min(low[node], index[to])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == index[node]:
                    while part[node] < 0:
                        part[stack.pop()] = parts
                    parts += 1
    return part


def heights(edges: Sequence[Sequence[int]], steps: Container[int]) -> list[int]:
    """The most `steps` on a way that leads to each node, itself among them; through components as if they were nodes.

    >>> heights([[1, 2], [2], [3], [2]], {1, 3})
    [0, 1, 2, 2]
    """
    part = components(edges)
    step = [0] * len(edges)  # of components
    for node, p in enumerate(part):
        step[p] |= node in steps
    height = list(step)
    for node in sorted(range(len(edges)), key=lambda n: -part[n]):
        for to in edges[node]:
            if part[to] != part[node]:
                height[part[to]] = max(height[part[to]], height[part[node]] + step[part[to]])
    return [height[p] for p in part]
