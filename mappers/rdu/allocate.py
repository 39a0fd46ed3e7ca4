"""Shares of units: the smallest initiation interval, splits of buffers, cuts into sections, and balanced paths.

A section is a pipeline: each of its stages, buffers and memory streams is a `Demand` for units of one kind. What
comes out once an initiation interval (II) is paid for by the slowest of them, so all get just the units that they
need to keep up with it. Buffers along paths that meet again keep the faster path from stalling the slower one
(retiming, as in Zhang et al., "SARA: scaling a reconfigurable dataflow accelerator", ISCA 2021).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import NamedTuple

from tilewright.arch.errors import UserError

__all__ = [
    "Allocation",
    "Demand",
    "Edge",
    "Operator",
    "Part",
    "allocate",
    "cut_sections",
    "retime",
    "section_traffic",
    "split_buffer",
]


@dataclass(frozen=True)
class Demand:
    """Work that units of one kind share: `pieces` of `ticks` each an interval, no piece on two units.

    A stage of W ticks of work that can be cut anywhere has pieces=W, ticks=1: it needs ceil(W / II) units. A buffer
    has the accesses of its busier port as pieces, and in `least` the units that hold it. `most` units find work.
    """

    name: str
    kind: str
    pieces: int
    ticks: int = 1
    least: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        if self.pieces < 1 or self.ticks < 1 or self.least < 1:
            raise UserError(f"demand {self.name}: pieces, ticks and least must be positive")
        if self.most is not None and self.most < self.least:
            raise UserError(f"demand {self.name}: most {self.most} is below least {self.least}")

    def interval(self, units: int) -> int:
        """Ticks that `units` units need for all pieces."""
        if self.most is not None:
            units = min(units, self.most)
        return -(-self.pieces // units) * self.ticks

    def units(self, interval: int) -> int | None:
        """The fewest units that keep up with `interval`, at least `least`; None if no number does."""
        rounds = interval // self.ticks
        if rounds == 0:
            return None
        units = max(self.least, -(-self.pieces // rounds))
        return None if self.most is not None and units > self.most else units


class Allocation(NamedTuple):
    """The units of each demand, by name, for the smallest initiation interval, in ticks."""

    interval: int
    units: dict[str, int]
    binding: tuple[str, ...]
    """Demands whose units are at work throughout the interval: what a shorter one must give more units to."""


def allocate(demands: Sequence[Demand], budget: Mapping[str, int], *, at_least: int = 1) -> Allocation | None:
    """The smallest initiation interval that the units of `budget`, by kind, allow; None if there are too few.

    `at_least`: ticks that something outside needs, such as the off-chip memory. Exact, by bisection: a demand's
    units only fall as the interval grows, so whether an interval fits is monotone.
    """
    if len({d.name for d in demands}) < len(demands):
        raise UserError("a demand is given twice")

    def fits(interval: int) -> bool:
        used = dict.fromkeys(budget, 0)
        for d in demands:
            units = d.units(interval)
            if units is None or used.get(d.kind, 0) + units > budget.get(d.kind, 0):
                return False
            used[d.kind] += units
        return True

    # With its least units everywhere nothing takes longer.
    low, high = at_least, max([at_least, *(d.interval(d.least) for d in demands)])
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    best = high
    units = {d.name: d.units(best) or 0 for d in demands}
    return Allocation(best, units, tuple(d.name for d in demands if d.interval(units[d.name]) == best))


class Part(NamedTuple):
    """A range of a buffer's addresses that one PMU holds."""

    low: int
    words: int


def split_buffer(words: int, capacity: int, *, streams: int = 1, granule: int = 1) -> tuple[Part, ...]:
    """Cut a buffer into ranges for as few PMUs as hold it and serve `streams` accesses at once.

    `capacity`: words of one PMU that the buffer may use, half of them if it is double-buffered. Ranges are whole
    granules (rows, say, that are read together), as even as can be, the longer ones first. For bandwidth each range
    has its own stream, so a buffer is cut along the loop that is unrolled. Raises UserError if a granule doesn't fit.

    >>> split_buffer(10, 4)
    (Part(low=0, words=4), Part(low=4, words=3), Part(low=7, words=3))
    """
    if granule > capacity:
        raise UserError(f"{granule} words that must stay together exceed the {capacity} of a PMU")
    granules, each = -(-words // granule), capacity // granule
    parts = max(-(-granules // each), min(streams, granules))
    shorter, longer = divmod(granules, parts)
    cuts = [i * shorter + min(i, longer) for i in range(parts + 1)]
    return tuple(Part(a * granule, min(b * granule, words) - a * granule) for a, b in pairwise(cuts))


# ---- sections -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """An operator of a graph: what it asks of the units, and the tensors that it reads and writes, by name."""

    name: str
    demands: tuple[Demand, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def section_traffic(
    operators: Sequence[Operator], first: int, stop: int, sizes: Mapping[str, int], keep: Sequence[str] = ()
) -> int:
    """Bytes that section operators[first:stop] moves off chip, each tensor once: what comes from outside, what others
    read, and what nobody reads or `keep` names.

    A tensor between two operators of the section moves nothing. `sizes`: bytes of each tensor.
    """
    inside = operators[first:stop]
    written = {t for op in inside for t in op.writes}
    read = {t for op in inside for t in op.reads}
    later = {t for op in operators[stop:] for t in op.reads}
    leaving = {t for t in written if t in later or t in keep or t not in read}
    return sum(sizes[t] for t in read - written) + sum(sizes[t] for t in leaving)


def cut_sections(
    operators: Sequence[Operator],
    cost: Callable[[int, int], Fraction | int | None],
) -> list[tuple[int, int]]:
    """Cut operators, in topological order, into sections [first, stop) so that the sum of their costs is smallest.

    `cost(first, stop)` is None where a section doesn't fit; what doesn't fit must not fit either with operators
    added. Of cuts of equal cost the one with the fewest sections is taken. Raises UserError if the order is not
    topological, or if an operator fits no section even alone.
    """
    written: set[str] = set()
    made = {t for op in operators for t in op.writes}
    for op in operators:
        for tensor in op.reads:
            if tensor in made and tensor not in written:
                raise UserError(f"operator {op.name} reads {tensor} before it is written")
        written.update(op.writes)

    # best[i]: (cost, sections, end of the first section) of operators[i:].
    best: list[tuple[Fraction | int, int, int]] = [(0, 0, 0)] * (len(operators) + 1)
    for first in reversed(range(len(operators))):
        found: tuple[Fraction | int, int, int] | None = None
        for stop in range(first + 1, len(operators) + 1):
            own = cost(first, stop)
            if own is None:
                break
            whole = (own + best[stop][0], 1 + best[stop][1], stop)
            if found is None or whole < found:
                found = whole
        if found is None:
            raise UserError(f"operator {operators[first].name} doesn't fit the grid, even alone")
        best[first] = found
    sections, first = [], 0
    while first < len(operators):
        sections.append((first, best[first][2]))
        first = best[first][2]
    return sections


# ---- retiming -----------------------------------------------------------------------------------------


class Edge(NamedTuple):
    """A stream between two units: ticks from the source's first input to the sink's, and packets a tick."""

    source: str
    sink: str
    ticks: int
    rate: Fraction = Fraction(1)
    depth: int = 0
    """Packets that the queue at its end holds."""


def retime(edges: Sequence[Edge]) -> list[int]:
    """Packets that must be buffered on each edge, beyond its queue, for no path to stall another.

    The first packet should reach all inputs of a unit in the tick in which the unit starts. An edge by which it
    comes early by g ticks holds 1 + ceil(g * rate) packets at a time, which suffices (the depth that is no bottleneck). A
    unit starts as early as it can, or later where that needs less buffering in all: a source, for one, need not
    start before its packets are wanted. Raises UserError for streams in a circle.
    """
    graph: dict[str, list[str]] = {}
    for e in edges:
        graph.setdefault(e.source, [])
        graph.setdefault(e.sink, []).append(e.source)
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise UserError(f"streams go round in a circle: {' -> '.join(error.args[1])}") from None
    ins: dict[str, list[Edge]] = {name: [] for name in order}
    outs: dict[str, list[Edge]] = {name: [] for name in order}
    for e in edges:
        ins[e.sink].append(e)
        outs[e.source].append(e)
    start: dict[str, int] = {}
    for name in order:
        start[name] = max((start[e.source] + e.ticks for e in ins[name]), default=0)
    moved = True
    while moved:
        moved = False
        for name in reversed(order):
            if outs[name] and sum(e.rate for e in outs[name]) > sum(e.rate for e in ins[name]):
                slack = min(start[e.sink] - start[name] - e.ticks for e in outs[name])
                start[name] += slack
                moved |= slack > 0
    return [max(0, _held(start[e.sink] - start[e.source] - e.ticks, e.rate) - e.depth) for e in edges]


def _held(gap: int, rate: Fraction) -> int:
    """Packets on an edge of which the first comes `gap` ticks early."""
    return 1 + -(-gap * rate.numerator // rate.denominator) if gap else 0
