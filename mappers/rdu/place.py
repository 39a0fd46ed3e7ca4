"""Placement by simulated annealing.

The cost of a placement is the sum over streams of rate times half perimeter of the box around their switches, which
is the traffic of the mesh; the router then shares that out. (Demand spread over the boxes, with a price on what
exceeds the links, took ten times as long and gave no less congestion than more moves.) Temperatures fall
geometrically, after Kirkpatrick, Gelatt, Vecchi, "Optimization by simulated annealing", Science 220, 1983; the window
from which sites are drawn narrows with them, as in Betz, Rose, "VPR", FPL 1997.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

from tilewright.arch.errors import UserError, nearest
from tilewright.mappers.rdu.fabric import LOCAL, Fabric
from tilewright.mappers.rdu.kernels import LOGARITHMS, anneal, measure_all
from tilewright.mappers.rdu.netlist import Netlist

__all__ = ["Placement", "place", "wire"]

SCALE = 1 << 16  # weight of the stream of the highest rate
STEPS = 120  # temperatures
MOVES_PER_UNIT = 20_000
HOTTEST, COLDEST = 8.0, 0.1  # temperatures, in hops of a stream of mean rate


@dataclass(frozen=True)
class Placement:
    """The site of every unit of a netlist, by unit and by index of `Fabric.sites`."""

    sites: Mapping[str, int]
    initial_cost: Fraction
    """Sum of rate times half perimeter before annealing, in packets times hops a tick."""
    cost: Fraction
    """The same of this placement."""
    moves: int
    """Moves tried."""


def wire(netlist: Netlist, fabric: Fabric, sites: Mapping[str, int]) -> Fraction:
    """Sum over streams of rate times half perimeter of the box around their switches."""
    total = Fraction(0)
    for s in netlist.streams:
        ends = [fabric.sites[sites[name]] for name in (s.source, *(k.unit for k in s.sinks))]
        xs, ys = [e.x for e in ends], [e.y for e in ends]
        total += s.rate * (max(xs) - min(xs) + max(ys) - min(ys))
    return total


def place(
    netlist: Netlist,
    fabric: Fabric,
    *,
    seed: int = 0,
    moves: int | None = None,
    seconds: float | None = None,
    pinned: Mapping[str, int] | None = None,
) -> Placement:
    """Find a site for every unit.

    `moves` are tried, as many as suit the size if not given; 0 leaves the first placement, which follows the
    streams along a serpentine. The result depends on `seed` alone, unless `seconds` cut the schedule short.
    `pinned` units stay at the sites given. Raises UserError for what doesn't fit.
    """
    netlist.check(fabric)
    pinned = dict(pinned or {})
    at = _first(netlist, fabric, pinned)
    names = [u.name for u in netlist.units]
    first_cost = wire(netlist, fabric, dict(zip(names, at.tolist(), strict=True)))

    kinds = sorted({s.kind for s in fabric.sites})
    kind_of = np.array([kinds.index(s.kind) for s in fabric.sites], np.int64)
    xs = np.array([s.x for s in fabric.sites], np.int64)
    ys = np.array([s.y for s in fabric.sites], np.int64)
    by_kind = [fabric.sites_of(kind) for kind in kinds]
    first_site, sites = _ragged(by_kind)
    rank = np.zeros(len(fabric.sites), np.int64)
    for indices in by_kind:
        rank[indices] = range(len(indices))
    grid = np.full((fabric.rows, fabric.columns), -1, np.int64)
    for i, s in enumerate(fabric.sites):
        if s.port == LOCAL:
            grid[s.y, s.x] = i
    holds = np.full(len(fabric.sites), -1, np.int64)
    holds[at] = range(len(at))
    for site in pinned.values():
        holds[site] = -2
    movable = np.array([i for i, name in enumerate(names) if name not in pinned], np.int64)

    ends = [
        sorted({netlist.index[name] for name in (s.source, *(k.unit for k in s.sinks))})
        for s in netlist.streams
    ]
    first_pin, pins = _ragged(ends)
    streams_of: list[list[int]] = [[] for _ in names]
    for i, units in enumerate(ends):
        for unit in units:
            streams_of[unit].append(i)
    first_net, nets = _ragged(streams_of)
    highest = max((s.rate for s in netlist.streams), default=Fraction(1))
    weights = np.array([max(1, round(s.rate * SCALE / highest)) for s in netlist.streams], np.int64)
    boxes = np.zeros((len(weights), 4), np.int64)
    cost = measure_all(at, xs, ys, first_pin, pins, weights, boxes)

    best, best_at, tried = cost, at.copy(), 0
    if moves is None:
        moves = MOVES_PER_UNIT * len(movable)
    if len(movable) and len(weights):
        mean, size = float(weights.mean()), max(fabric.columns, fabric.rows)
        state = np.array([seed & 0xFFFFFFFFFFFF], np.int64)
        end = None if seconds is None else time.monotonic() + seconds
        for step in range(STEPS):
            if end is not None and time.monotonic() > end:
                break
            fraction = step / (STEPS - 1)
            temperature = max(1, round(mean * HOTTEST * (COLDEST / HOTTEST) ** fraction))
            reach = max(1, round(size * (2 / size) ** min(1.0, 1.5 * fraction)))
            now = moves * (step + 1) // STEPS - tried
            cost += anneal(
                now, temperature, reach, state, LOGARITHMS,
                at, holds, movable, kind_of, xs, ys, first_site, sites, rank, grid,
                first_pin, pins, weights, first_net, nets, boxes,
            )  # fmt: skip
            tried += now
            if cost < best:
                best, best_at = cost, at.copy()
        # The changes added up are the cost counted anew.
        assert cost == measure_all(at, xs, ys, first_pin, pins, weights, boxes)
    placed = dict(zip(names, best_at.tolist(), strict=True))
    return Placement(placed, first_cost, wire(netlist, fabric, placed), tried)


def _ragged(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as (first index of each, and the end; all values)."""
    first = np.array([0, *accumulate(len(r) for r in rows)], np.int64)
    return first, np.array([v for r in rows for v in r], np.int64)


def _serpentine(fabric: Fabric) -> list[int]:
    """All sites in the order of a serpentine through bands of two rows."""

    def position(i: int) -> tuple[int, int, int]:
        site = fabric.sites[i]
        band = site.y // 2
        return band, -site.x if band % 2 else site.x, site.y

    return sorted(range(len(fabric.sites)), key=position)


def _follow(netlist: Netlist) -> list[int]:
    """All units, each behind a neighbour by a stream where it has one: depth first, as they are given."""
    beside: list[list[int]] = [[] for _ in netlist.units]
    for s in netlist.streams:
        source = netlist.index[s.source]
        for sink in s.sinks:
            beside[source].append(netlist.index[sink.unit])
            beside[netlist.index[sink.unit]].append(source)
    order, seen = [], [False] * len(beside)
    for start in range(len(beside)):
        stack = [start]
        while stack:
            unit = stack.pop()
            if not seen[unit]:
                seen[unit] = True
                order.append(unit)
                stack.extend(reversed(beside[unit]))
    return order


def _first(netlist: Netlist, fabric: Fabric, pinned: Mapping[str, int]) -> np.ndarray:
    """Units along a serpentine, in the shortest part of it that holds them all."""
    taken: dict[int, str] = {}
    for name, site in pinned.items():
        if name not in netlist.index:
            raise UserError(f"pinned unit {name!r} is not in the section; {nearest(name, netlist.index)}")
        if not 0 <= site < len(fabric.sites) or fabric.sites[site].kind != netlist.kind(name):
            raise UserError(f"unit {name} can't be pinned to site {site}: no {netlist.kind(name)} is there")
        if site in taken:
            raise UserError(f"site {site} is given to {taken[site]} and to {name}")
        taken[site] = name
    waiting: dict[str, list[int]] = {}
    for unit in _follow(netlist):
        if netlist.units[unit].name not in pinned:
            waiting.setdefault(netlist.units[unit].kind, []).append(unit)
    free: dict[str, list[int]] = {kind: [] for kind in waiting}
    for i in _serpentine(fabric):
        kind = fabric.sites[i].kind
        if kind in free and i not in taken:
            free[kind].append(i)
        if all(len(free[kind]) >= len(units) for kind, units in waiting.items()):
            break
    at = np.full(len(netlist.units), -1, np.int64)
    for name, site in pinned.items():
        at[netlist.index[name]] = site
    for kind, units in waiting.items():
        for i, unit in enumerate(units):
            at[unit] = free[kind][i * len(free[kind]) // len(units)]
    return at
