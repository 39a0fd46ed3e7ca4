"""Timelines: what is folded, what must add up, and what binds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.arch.timeline import SPAN, Timeline, fold_spans

logs = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 1000), st.integers(1, 300)), min_size=1, max_size=30
)


def line(activity, **more):
    """A Timeline of two tags over units `a`, `b` with causes `full`, `empty`."""
    activity = np.array(activity, np.int64)
    ticks = int(activity.sum(axis=(0, 2))[0])
    fields = {
        "ticks": ticks, "tags": ("x", "y"), "spans": np.zeros(0, SPAN), "counter_names": ("n", "m"),
        "counters": np.arange(6).reshape(3, 2), "units": ("a", "b"), "causes": ("full", "empty"), "activity": activity,
    }  # fmt: skip
    return Timeline(**{**fields, **more})


# unit a: 3 + 2 busy, 1 full, 4 empty; unit b: 1 + 1 busy, 6 + 1 full, 1 empty
ACTIVITY = [[[3, 1, 0], [1, 6, 0]], [[2, 0, 0], [1, 1, 0]], [[0, 0, 4], [0, 0, 1]]]


def test_sums_over_tags():
    t = line(ACTIVITY)
    assert t.ticks == 10
    assert t.unit("a") == {"busy": 5, "full": 1, "empty": 4}
    assert t.unit("b") == {"busy": 2, "full": 7, "empty": 1}
    # counters are 0..5 in rows of two: n = 0 + 2 + 4, m = 1 + 3 + 5.
    assert t.counter("n") == 6 and t.totals() == {"n": 6, "m": 9}


def test_what_binds_is_the_unit_engaged_longest_or_its_largest_stall():
    # Over the run both are engaged in all 10 ticks, and a works more of them; for tag 0, a in 4 and b in 7.
    assert line(ACTIVITY).bound_by() == "a"
    assert line(ACTIVITY).bound_by(0) == "b: full"
    assert line(ACTIVITY).binding([0, 1]) == ("b", "full")  # 6 against 9
    swapped = [[[1, 1, 7]] * 2] + [[[0, 0, 0]] * 2] * 2
    assert line(swapped).bound_by() == "a: empty"
    assert line(swapped).bound_by(1) == ""  # nothing worked for it


@given(st.integers(-5, 5).filter(bool), st.integers(0, 1), st.integers(0, 2))
def test_a_unit_that_loses_a_tick_is_refused(change, unit, state):
    activity = np.array(ACTIVITY)
    activity[2, unit, state] += change
    with pytest.raises(AssertionError, match="busy plus stalls"):
        line(activity, ticks=10)


def test_folding_by_hand():
    # tag 7: 5-9 and 3-4 -> 3-9; tag 2: 8-20.
    rows = fold_spans(np.array([7, 2, 7]), np.array([5, 8, 3]), np.array([9, 20, 4]), segment=6)
    assert rows.tolist() == [(6, 2, 8, 20, 12, 1), (6, 7, 3, 9, 6, 1)]


@given(logs)
def test_folding_brackets_every_entry_and_nothing_more(log):
    tags, firsts = np.array([r[0] for r in log]), np.array([r[1] for r in log])
    ends = firsts + [r[2] for r in log]
    rows = fold_spans(tags, firsts, ends, 0)
    assert rows["tag"].tolist() == sorted(set(tags.tolist()))
    for row in rows:
        mine = tags == row["tag"]
        assert row["first"] == firsts[mine].min() and row["end"] == ends[mine].max()
        assert row["ticks"] == row["end"] - row["first"] and row["count"] == 1


def test_ticks_of_a_tag_add_over_segments():
    spans = np.array([(0, 1, 0, 9, 9, 1), (1, 1, 9, 30, 20, 2), (1, 0, 9, 12, 3, 1)], SPAN)
    assert line(ACTIVITY, spans=spans).tag_ticks().tolist() == [3, 29]
