"""The filters of the flash controller: pages of which nothing is wanted are not read, and of those that are read
only what is wanted is forwarded."""

from amaranth.hdl import Assert, Cat, Const, Module, Mux, Signal
from amaranth.lib import data as layouts
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.rtl.csd.argtopk import tree_sum

__all__ = ["EntryFilter", "PageFilter", "page_layout"]


def page_layout(*, pages: int, rows: int, entries: int):
    """A page that is to be read: its number, which of its rows, how many these are, and how many came before."""
    return layouts.StructLayout(
        {
            "page": bits_for(pages - 1),
            "mask": rows,
            "count": bits_for(rows),
            "rank": bits_for(entries),
        }
    )


class PageFilter(wiring.Component):
    """Cuts a selection into pages, and passes on those of which something is selected.

    The mask of n entries comes in words of `lanes`, entry 0 first. A page has `rows` entries, the last one those that
    are left. In a tick the filter looks at a page if it has its entries, else it takes a word: without waiting for
    its neighbours n entries take as many ticks as they have pages and words. Without `skip` every page is passed on,
    without `pick` with all the entries that it has.

    Parameters
    ----------
    lanes : int
        Bits of a word, a power of two.
    rows : int
        Entries of a page at most.
    entries : int
        Entries of a selection at most.

    Members
    -------
    ========== === ============== ============================================================
    start      In  1              begin a selection, not while `busy`; with what follows
    n          In  range(entries + 1) at least 1
    rows       In  range(rows + 1) at least 1
    skip, pick In  1              page-level and entry-level filter
    busy       Out 1              a selection is under way
    i          In  stream(lanes)  words of the mask
    o          Out stream(page)   pages to be read
    looked     Out 1              a page is looked at in this tick
    skipped    Out 1              and left out
    ========== === ============== ============================================================
    """

    def __init__(self, *, lanes: int, rows: int, entries: int):
        self._lanes, self._rows, self._entries = lanes, rows, entries
        self._page = page_layout(pages=entries, rows=rows, entries=entries)
        count = bits_for(entries)
        super().__init__(
            {
                "start": In(1),
                "n": In(count),
                "rows": In(bits_for(rows)),
                "skip": In(1),
                "pick": In(1),
                "busy": Out(1),
                "i": In(stream.Signature(lanes)),
                "o": Out(stream.Signature(self._page)),
                "looked": Out(1),
                "skipped": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        room = self._rows + self._lanes
        held, level = Signal(room), Signal(bits_for(room))  # bits that are not in a page yet, and how many
        left, rows = Signal.like(self.n), Signal.like(self.rows)  # entries that are not in a page yet
        skip, pick = Signal(), Signal()
        page, rank = Signal.like(self.o.payload.page), Signal.like(self.o.payload.rank)
        here, inside, chosen = Signal(bits_for(self._rows)), Signal(self._rows), Signal(self._rows)
        has, passes = Signal(), Signal()
        out = self.o.payload
        m.d.comb += [
            here.eq(Mux(left < rows, left, rows)),
            has.eq(self.busy & (level >= here)),
            inside.eq(Cat(i < here for i in range(self._rows))),
            chosen.eq(held & inside),
            passes.eq(chosen.any() | ~skip),
            out.page.eq(page),
            out.mask.eq(Mux(pick, chosen, inside)),
            out.count.eq(tree_sum([out.mask[i] for i in range(self._rows)])),
            out.rank.eq(rank),
            self.o.valid.eq(has & passes),
            self.looked.eq(has & (~passes | self.o.ready)),
            self.skipped.eq(has & ~passes),
            self.i.ready.eq(self.busy & ~has),
        ]
        with m.If(self.looked):
            m.d.sync += [
                held.eq(held >> here),
                level.eq(Mux(left == here, 0, level - here)),
                left.eq(left - here),
                page.eq(page + 1),
                rank.eq(rank + Mux(passes, out.count, 0)),
                self.busy.eq(left != here),
            ]
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [held.eq(held | (self.i.payload << level)), level.eq(level + self._lanes)]
        with m.If(self.start):
            m.d.sync += [
                self.busy.eq(1),
                left.eq(self.n),
                rows.eq(self.rows),
                skip.eq(self.skip),
                pick.eq(self.pick),
                *(s.eq(0) for s in (held, level, page, rank)),
            ]
        m.d.sync += Assert(~(self.start & self.busy), "the page filter is busy")
        return m


class EntryFilter(wiring.Component):
    """Walks through the selected rows of a page, a line a tick without gaps.

    Parameters
    ----------
    lines : int
        Of a page.
    rows : int
        Of a page, at most.

    Members
    -------
    ========= === ============ ===============================================================
    start     In  1            begin a page, while `ready`; with what follows
    mask      In  rows         its selected rows
    row_lines In  range(lines + 1) lines of a row, at least 1
    ready     Out 1            nothing is under way, or its last line is forwarded in this tick
    go        In  1            the line is taken
    valid     Out 1            there is a line to be forwarded
    line      Out range(lines) where it is in the page
    row       Out range(rows)  of how many selected rows there are before
    word      Out range(lines) which line of the row
    last      Out 1            it is the last one
    ========= === ============ ===============================================================
    """

    def __init__(self, *, lines: int, rows: int):
        self._lines, self._rows = lines, rows
        line = bits_for(lines - 1)
        super().__init__(
            {
                "start": In(1),
                "mask": In(rows),
                "row_lines": In(bits_for(lines)),
                "ready": Out(1),
                "go": In(1),
                "valid": Out(1),
                "line": Out(line),
                "row": Out(bits_for(rows - 1)),
                "word": Out(line),
                "last": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        left, row_lines = Signal(self._rows), Signal.like(self.row_lines)
        lowest, place = Signal(self._rows), Signal(range(max(self._rows, 2)))
        ends = Signal()
        taken = self.valid & self.go
        m.d.comb += [
            self.valid.eq(left.any()),
            lowest.eq(left & -left),
            ends.eq(self.word == row_lines - 1),
            self.line.eq(place * row_lines + self.word),
            self.last.eq(self.valid & ends & (left == lowest)),
            self.ready.eq(~self.valid | (self.last & self.go)),
        ]
        for bit in range(len(place)):
            holders = Const(sum(1 << i for i in range(self._rows) if i >> bit & 1), self._rows)
            m.d.comb += place[bit].eq((lowest & holders).any())
        with m.If(taken):
            m.d.sync += self.word.eq(Mux(ends, 0, self.word + 1))
            with m.If(ends):
                m.d.sync += [left.eq(left & ~lowest), self.row.eq(self.row + 1)]
        with m.If(self.start):
            m.d.sync += [left.eq(self.mask), row_lines.eq(self.row_lines), self.row.eq(0), self.word.eq(0)]
        m.d.sync += Assert(~(self.start & ~self.ready), "the entry filter is busy")
        return m
