"""Shares of units, splits, sections, balanced paths: sums by hand, then against brute force."""

from fractions import Fraction
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.errors import UserError
from tilewright.mappers.rdu.allocate import (
    Demand,
    Edge,
    Operator,
    allocate,
    cut_sections,
    retime,
    section_traffic,
    split_buffer,
)


def test_units_go_where_the_work_is():
    # 100 + 50 ticks of work on 6 units: 25 ticks with 100 / 25 = 4 and 50 / 25 = 2. 24 would need 5 + 3.
    found = allocate([Demand("gemm0", "pcu", 100), Demand("gemm1", "pcu", 50)], {"pcu": 6})
    assert found == (25, {"gemm0": 4, "gemm1": 2}, ("gemm0", "gemm1"))


def test_memory_can_bind():
    # The buffer needs two PMUs to hold it and all three for 30 accesses in 10 ticks; compute alone could do 5.
    demands = [Demand("gemm", "pcu", 40), Demand("buffer", "pmu", 30, least=2)]
    assert allocate(demands, {"pcu": 8, "pmu": 3}) == (10, {"gemm": 4, "buffer": 3}, ("gemm", "buffer"))
    assert allocate(demands, {"pcu": 8, "pmu": 1}) is None


def test_whole_tiles():
    # Seven tiles of 10 ticks: four units take two rounds, and so would six.
    assert allocate([Demand("gemm", "pcu", 7, 10)], {"pcu": 6}) == (20, {"gemm": 4}, ("gemm",))


def test_memory_off_chip_sets_the_pace():
    assert allocate([Demand("gemm", "pcu", 100)], {"pcu": 6}, at_least=40) == (40, {"gemm": 3}, ())


def test_a_stage_that_can_not_be_cut_further():
    assert allocate([Demand("softmax", "pcu", 30, most=2)], {"pcu": 6}) == (15, {"softmax": 2}, ("softmax",))


def test_bad_demands():
    with pytest.raises(UserError, match="demand gemm: pieces, ticks and least must be positive"):
        Demand("gemm", "pcu", 0)
    with pytest.raises(UserError, match="demand gemm: most 1 is below least 2"):
        Demand("gemm", "pcu", 5, least=2, most=1)
    with pytest.raises(UserError, match="a demand is given twice"):
        allocate([Demand("a", "pcu", 1), Demand("a", "pcu", 1)], {"pcu": 2})


@st.composite
def demands(draw):
    def one(n):
        least = draw(st.integers(1, 2))
        most = draw(st.none() | st.integers(least, 4))
        kind = draw(st.sampled_from(["pcu", "pmu"]))
        return Demand(f"d{n}", kind, draw(st.integers(1, 20)), draw(st.integers(1, 5)), least, most)

    return [one(n) for n in range(draw(st.integers(1, 4)))]


@settings(max_examples=150)
@given(demands(), st.integers(0, 6), st.integers(0, 6), st.integers(1, 30))
def test_no_share_of_the_units_is_faster(wanted, pcus, pmus, at_least):
    budget = {"pcu": pcus, "pmu": pmus}
    best = None
    for units in product(*(range(d.least, (d.most or 6) + 1) for d in wanted)):
        used = dict.fromkeys(budget, 0)
        for d, n in zip(wanted, units, strict=True):
            used[d.kind] += n
        if all(used[kind] <= budget[kind] for kind in budget):
            # Every unit of a stage works on its pieces one after the other.
            slowest = max(-(-d.pieces // n) * d.ticks for d, n in zip(wanted, units, strict=True))
            best = min(best or slowest, slowest)
    found = allocate(wanted, budget, at_least=at_least)
    if best is None:
        assert found is None
        return
    assert found.interval == max(best, at_least)
    for kind, there in budget.items():
        assert sum(found.units[d.name] for d in wanted if d.kind == kind) <= there
    assert all(-(-d.pieces // found.units[d.name]) * d.ticks <= found.interval for d in wanted)
    # More units elsewhere leave the interval alone (the bottleneck's law).
    idle = {d.kind for d in wanted} - {d.kind for d in wanted if d.name in found.binding}
    if found.interval > at_least and idle and found.binding:
        more = {kind: n + 2 * (kind in idle) for kind, n in budget.items()}
        assert allocate(wanted, more, at_least=at_least).interval == found.interval


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 8), st.integers(1, 10))
def test_parts_cover_the_buffer_once(words, capacity, streams, granule):
    if granule > capacity:
        with pytest.raises(UserError, match="must stay together"):
            split_buffer(words, capacity, streams=streams, granule=granule)
        return
    parts = split_buffer(words, capacity, streams=streams, granule=granule)
    assert [w for p in parts for w in range(p.low, p.low + p.words)] == list(range(words))
    assert all(p.words <= capacity and p.low % granule == 0 for p in parts)
    granules = -(-words // granule)
    assert len(parts) >= min(streams, granules)
    # One part fewer would not hold it, or not serve the streams.
    fewer = len(parts) - 1
    assert fewer * (capacity // granule) < granules or fewer < min(streams, granules)


# ---- sections -----------------------------------------------------------------------------------------

CHAIN = [
    Operator("gemm0", (Demand("gemm0", "pcu", 8),), ("x", "w0"), ("y",)),
    Operator("mul", (Demand("mul", "pcu", 2),), ("y", "f"), ("z",)),
    Operator("gemm1", (Demand("gemm1", "pcu", 8),), ("z", "w1"), ("o",)),
]
SIZES = {"x": 100, "w0": 10, "y": 60, "f": 30, "z": 60, "w1": 10, "o": 100}


def test_fusion_saves_what_lies_between():
    whole = section_traffic(CHAIN, 0, 3, SIZES)
    assert whole == 100 + 10 + 30 + 10 + 100
    alone = [section_traffic(CHAIN, i, i + 1, SIZES) for i in range(3)]
    assert alone == [170, 150, 170]
    assert sum(alone) == whole + 2 * 60 + 2 * 60  # both are written once and read once
    assert section_traffic(CHAIN, 0, 2, SIZES, keep=["y"]) == section_traffic(CHAIN, 0, 2, SIZES) + 60


def test_the_cheapest_cut():
    # Two PCUs at most: gemm0 with mul, or mul with gemm1; as traffic both are equal, so the first cut counts.
    def cost(first, stop):
        return section_traffic(CHAIN, first, stop, SIZES) if stop - first <= 2 else None

    assert cut_sections(CHAIN, cost) == [(0, 1), (1, 3)]
    assert cut_sections(CHAIN, lambda a, b: 1) == [(0, 3)]
    with pytest.raises(UserError, match="operator mul doesn't fit the grid, even alone"):
        cut_sections(CHAIN, lambda a, b: None if a <= 1 < b else 1)
    with pytest.raises(UserError, match="operator mul reads y before it is written"):
        cut_sections([CHAIN[1], CHAIN[0]], cost)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(9, 20), st.integers(0, 12))
def test_no_other_cut_is_cheaper(work, budget, launch):
    operators = [Operator(f"o{i}", (Demand(f"o{i}", "pcu", w),)) for i, w in enumerate(work)]

    def cost(first, stop):
        if sum(work[first:stop]) > budget:
            return None
        return launch + max(work[first:stop]) ** 2

    cheapest = None
    for n in range(len(work)):
        for inner in combinations(range(1, len(work)), n):
            costs = [cost(a, b) for a, b in zip((0, *inner), (*inner, len(work)), strict=True)]
            if None not in costs:
                cheapest = min(cheapest or sum(costs), sum(costs))
    sections = cut_sections(operators, cost)
    assert sum(cost(*s) for s in sections) == cheapest
    assert [i for s in sections for i in range(*s)] == list(range(len(work)))


# ---- retiming -----------------------------------------------------------------------------------------


def test_the_short_way_waits():
    # a -> b -> d takes 15 ticks, a -> d takes 1: half a packet a tick for 14 ticks, and the one that is next.
    edges = [Edge("a", "b", 5), Edge("b", "d", 10), Edge("a", "d", 1, Fraction(1, 2))]
    assert retime(edges) == [0, 0, 8]
    assert retime([*edges[:2], edges[2]._replace(depth=5)]) == [0, 0, 3]
    assert retime([*edges[:2], edges[2]._replace(depth=16)]) == [0, 0, 0]


def test_a_source_need_not_start_early():
    # The weights of the second stage have nothing in common with the long way to it.
    assert retime([Edge("a", "b", 50), Edge("w", "b", 1)]) == [0, 0]


def test_streams_in_a_circle():
    with pytest.raises(UserError, match=r"streams go round in a circle: .* -> "):
        retime([Edge("a", "b", 1), Edge("b", "a", 1)])


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(0, 6), st.sampled_from([1, 2, 4])),
        max_size=8,
    )
)
def test_enough_is_buffered_and_no_more_than_starting_early_needs(shape):
    edges = [Edge(f"u{a}", f"u{a + d}", t, Fraction(1, r)) for a, d, t, r in shape]
    held = retime(edges)
    # Fewest ticks between the starts of two units that the buffers allow and the ways need: a unit can start once
    # every way to it is filled, and a buffer of n packets lets its source run ahead by (n - 1) / rate.
    units = sorted({e.source for e in edges} | {e.sink for e in edges})
    ahead = {u: {v: None for v in units} for u in units}

    def longer(u, v, ticks):
        if ahead[u][v] is None or ticks > ahead[u][v]:
            ahead[u][v] = ticks

    for e, n in zip(edges, held, strict=True):
        longer(e.source, e.sink, Fraction(e.ticks))
        longer(e.sink, e.source, -e.ticks - (Fraction(n - 1) / e.rate if n else 0))
    for k, u, v in product(units, repeat=3):
        if ahead[u][k] is not None and ahead[k][v] is not None:
            longer(u, v, ahead[u][k] + ahead[k][v])
    # Starts that satisfy all exist, so no way stalls another.
    assert all((ahead[u][u] or 0) <= 0 for u in units)
    start: dict[str, int] = {}
    for unit in sorted(units):
        start[unit] = max((start[e.source] + e.ticks for e in edges if e.sink == unit), default=0)
    early = [start[e.sink] - start[e.source] - e.ticks for e in edges]
    weight = sum(e.rate * g for e, g in zip(edges, early, strict=True))
    assert sum(max(0, n - 1) for n in held) <= weight + len(edges)
