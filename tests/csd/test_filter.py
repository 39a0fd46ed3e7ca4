"""The filters against `pages_read`: which pages, which rows of them, and when."""

import numpy as np
import pytest
from amaranth.sim import Simulator
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csd.units import pack
from tests.lib.ticks import play
from tilewright.rtl.csd.filter import EntryFilter, PageFilter
from tilewright.workloads import csd_kernels as csd

LANES, ROWS, ENTRIES = 4, 6, 40
OUT = ["o.valid", "o.payload", "busy", "looked", "skipped"]


def cut(mask, rows, skip=True, pick=True, stalls=0, hungry=0):
    """Pages (number, rows, rank) that the filter passes on, its ticks, and how many it left out.

    `stalls` and `hungry` are bits of the ticks in which nobody takes a page, or gives a word.
    """
    unit = PageFilter(lanes=LANES, rows=ROWS, entries=ENTRIES)
    padded = [*mask, *[True] * (-len(mask) % LANES)]  # what stands behind the last entry must not count
    words = [pack(padded[i : i + LANES], 1) for i in range(0, len(padded), LANES)]
    state = {"word": 0}
    limit = 40 + 4 * len(mask)
    pages, skipped, end = [], 0, None

    async def bench(ctx):
        nonlocal skipped, end
        for tick in range(limit):
            ctx.set(unit.start, tick == 0)
            for name, value in (("n", len(mask)), ("rows", rows), ("skip", skip), ("pick", pick)):
                ctx.set(getattr(unit, name), int(value))
            gives = state["word"] < len(words) and not hungry >> tick & 1
            ctx.set(unit.i.valid, int(gives))
            ctx.set(unit.i.payload, words[state["word"]] if gives else (1 << LANES) - 1)
            ctx.set(unit.o.ready, int(not stalls >> tick & 1))
            if gives and ctx.get(unit.i.ready):
                state["word"] += 1
            if ctx.get(unit.o.valid) and ctx.get(unit.o.ready):
                p = ctx.get(unit.o.payload)
                assert p.count == p.mask.bit_count()
                pages.append((p.page, p.mask, p.rank))
            skipped += ctx.get(unit.skipped)
            if tick and not ctx.get(unit.busy):
                end = tick
                return
            await ctx.tick()

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return pages, end - 1, skipped


def reference(mask, rows, skip=True, pick=True):
    mask = np.asarray(mask, bool)
    read, forwarded = csd.pages_read(mask, rows, skip=skip, pick=pick)
    out, rank = [], 0
    for page in np.flatnonzero(read):
        here = mask[page * rows : (page + 1) * rows]
        bits = here if pick else np.ones(len(here), bool)
        out.append((int(page), pack(bits.astype(int), 1), rank))
        rank += int(forwarded[page])
    return out, len(read), int(len(read) - read.sum())


def test_pages_by_hand():
    # Entries 1, 2 and 9 of 10 in pages of 3: pages 0 (rows 1, 2) and 3 (its only row). 3 words, 4 pages: 7 ticks.
    mask = [i in (1, 2, 9) for i in range(10)]
    assert cut(mask, 3) == ([(0, 0b110, 0), (3, 0b001, 2)], 7, 2)
    # Without filters all rows of all pages.
    assert cut(mask, 3, skip=False, pick=False)[0] == [(0, 7, 0), (1, 7, 3), (2, 7, 6), (3, 1, 9)]


@given(
    st.lists(st.booleans(), min_size=1, max_size=ENTRIES),
    st.integers(1, ROWS),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
)
@settings(deadline=None, max_examples=40)
def test_pages_are_those_of_the_reference(mask, rows, skip, pick, stalls, hungry):
    pages, ticks, skipped = cut(mask, rows, skip, pick)
    want, n, out = reference(mask, rows, skip, pick)
    assert pages == want and skipped == out
    assert ticks == n + -(-len(mask) // LANES)
    assert cut(mask, rows, skip, pick, stalls, hungry)[::2] == (pages, skipped)


@pytest.mark.parametrize("row_lines", [1, 3])
def test_selected_rows_follow_without_gaps(row_lines):
    masks = [0b101101, 0b000001, 0b110000]
    unit = EntryFilter(lines=24, rows=6)
    starts = {0: masks[0]}
    sizes = [mask.bit_count() * row_lines for mask in masks]
    starts[sizes[0]] = masks[1]  # the tick of the last line
    starts[sizes[0] + sizes[1]] = masks[2]
    total = sum(sizes)

    def drive(tick, _):
        return {"start": tick in starts, "mask": starts.get(tick, 0), "row_lines": row_lines, "go": 1}

    seen = play(unit, total + 2, drive, ["valid", "line", "row", "word", "last", "ready"])
    assert [s["valid"] for s in seen] == [0] + [1] * total + [0]
    want = [
        (i * row_lines + w, rank, w)
        for mask in masks
        for rank, i in enumerate(i for i in range(6) if mask >> i & 1)
        for w in range(row_lines)
    ]
    assert [(s["line"], s["row"], s["word"]) for s in seen[1:-1]] == want
    ends = np.cumsum(sizes).tolist()
    assert [t for t, s in enumerate(seen) if s["last"]] == ends
    assert [t for t, s in enumerate(seen) if s["ready"]] == [0, *ends, total + 1]


def test_a_line_that_is_not_taken_stays():
    unit = EntryFilter(lines=8, rows=4)

    def drive(tick, _):
        return {"start": tick == 0, "mask": 0b1001, "row_lines": 1, "go": tick in (3, 5)}

    seen = play(unit, 7, drive, ["valid", "line", "last"])
    assert [s["line"] for s in seen[1:6] if s["valid"]] == [0, 0, 0, 3, 3]
    assert not seen[6]["valid"]
