"""The GeMV unit against `dot`: orders, running totals, its latency, one group a tick."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csd.units import half, halves, pack, single
from tests.lib.ticks import play
from tilewright.arch.csd import gemv_latency
from tilewright.rtl.csd.gemv import GemvUnit
from tilewright.workloads import csd_kernels as csd

NONE = 0xFFFF  # what lanes hold that are not active: a NaN


def run(lanes, totals, groups):
    """(index, result, last) of every group (gap, index, first, last, a, b); asserts when they come."""
    schedule, due, at = {}, [], 0
    for gap, index, first, last, a, b in groups:
        at += gap
        fill = [NONE] * (lanes - len(a))
        schedule[at] = {
            "valid": 1, "index": index, "first": first, "last": last, "active": (1 << len(a)) - 1,
            "a": pack([*a, *fill]), "b": pack([*b, *fill]),
        }  # fmt: skip
        due.append(at + gemv_latency(lanes))
        at += 1
    outputs = ["done", "result", "result_index", "result_last"]
    unit = GemvUnit(lanes=lanes, totals=totals)
    seen = play(unit, at + gemv_latency(lanes) + 1, lambda t, _: {"valid": 0} | schedule.get(t, {}), outputs)
    assert [t for t, s in enumerate(seen) if s["done"]] == due
    return [(seen[t]["result_index"], seen[t]["result"], seen[t]["result_last"]) for t in due]


def rows(vectors, lanes, gaps=None):
    """Groups that multiply vectors (a, b) one after the other, each into the total of its number."""
    groups, gaps = [], iter(gaps or [])
    for index, (a, b) in enumerate(vectors):
        starts = range(0, len(a), lanes)
        groups += [
            (next(gaps, 0), index, i == 0, i == starts[-1], a[i : i + lanes], b[i : i + lanes])
            for i in starts
        ]
    return groups


def columns(vectors, lanes):
    """The same, but group after group of all vectors."""
    groups = []
    for i in range(0, len(vectors[0][0]), lanes):
        last = i + lanes >= len(vectors[0][0])
        groups += [
            (0, index, i == 0, last, a[i : i + lanes], b[i : i + lanes])
            for index, (a, b) in enumerate(vectors)
        ]
    return groups


def finals(results):
    return {index: value for index, value, last in results if last}


def reference(a, b, lanes):
    return single(csd.dot(np.asarray(a, np.uint16), np.asarray(b, np.uint16), lanes))


def test_latency_by_hand():
    # One tick for the products, four for the tree of 16, one for the total.
    assert gemv_latency(16) == 6


def test_a_tree_of_neighbours_then_the_total():
    # (2^24 - 2^24) + (1 + 1) = 2, then + 0.5 + 0.25.
    a = half([4096, -4096, 1, 1, 0.5, 0.25]).tolist()
    b = half([4096, 4096, 1, 1, 1, 1]).tolist()
    results = run(4, 2, rows([(a, b)], 4))
    assert results == [(0, single(2.0), 0), (0, single(2.75), 1)]


@pytest.mark.parametrize("order", [rows, columns])
@pytest.mark.parametrize("lanes, vectors, n", [(2, 1, 7), (4, 2, 9), (8, 3, 8), (4, 5, 13)])
def test_totals_are_dot(order, lanes, vectors, n):
    rng = np.random.default_rng(n)
    pairs = [tuple(half(rng.normal(size=(2, n)) * 3).tolist()) for _ in range(vectors)]
    got = finals(run(lanes, vectors, order(pairs, lanes)))
    assert got == {i: reference(a, b, lanes) for i, (a, b) in enumerate(pairs)}


@given(
    st.lists(
        st.integers(1, 9).flatmap(
            lambda n: st.tuples(
                st.lists(halves, min_size=n, max_size=n), st.lists(halves, min_size=n, max_size=n)
            )
        ),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.integers(0, 3), max_size=12),
)
@settings(deadline=None, max_examples=6)
def test_any_operands_and_gaps(vectors, gaps):
    got = finals(run(4, 6, rows(vectors, 4, gaps)))
    assert got == {i: reference(a, b, 4) for i, (a, b) in enumerate(vectors)}


def test_a_total_is_kept_while_others_are_added_to():
    # Totals 0, 1, 0, 2, 0: each visit adds one product to what the memory, or the tick before, holds.
    one, two = half([1.0]).tolist(), half([2.0]).tolist()
    groups = [
        (0, i, first, 0, one, two) for i, first in ((0, 1), (1, 1), (0, 0), (0, 0), (2, 1), (0, 0), (1, 0))
    ]
    results = run(2, 3, groups)
    assert [(i, v) for i, v, _ in results] == [
        (i, single(v)) for i, v in ((0, 2.0), (1, 2.0), (0, 4.0), (0, 6.0), (2, 2.0), (0, 8.0), (1, 4.0))
    ]
