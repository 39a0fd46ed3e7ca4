"""The page tables as the model keeps them: which pages commands find and give, and a digest of what time depends on.

A drive finds some 10^10 pages in a thousand decode steps, most of them for commands that are not simulated. So commands
are first *followed*, in the order of the program: those that give pages change the tables, and each command gets a digest,
for which a number for every slot, kept as pages are given, stands for all pages of that slot. Only what is then
simulated is *placed*: the numbers of its pages are looked up.

What time depends on of a page that is read is its die, plane and, where pages differ in type or planes work on equal pages
only, its place in a block: its number modulo `unit`. Of pages that are programmed it is also where a block ends, unless dies
have one plane: programs of a block wait for each other, but then those of a die do, too.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from tilewright.arch.csd import CsdParams
from tilewright.arch.csd_pages import PageTables
from tilewright.sim import csd_state
from tilewright.sim.cache import CALLED, INNER
from tilewright.sim.csd_state import channel_of

Array = np.ndarray

# Literals of this file: a cached kernel would keep the old value of a constant changed elsewhere.
_ATTEND, _WRITE, _TRANSPOSE, _READ, _RECLAIM, _GPU = 1, 2, 3, 4, 5, 6
assert [
    *(csd_state.ATTEND, csd_state.WRITE, csd_state.TRANSPOSE, csd_state.READ),
    *(csd_state.RECLAIM, csd_state.GPU),
] == [_ATTEND, _WRITE, _TRANSPOSE, _READ, _RECLAIM, _GPU]
_BY_TOKENS, _BY_CHANNELS = range(2)
assert (csd_state.TOKENS_FORM, csd_state.CHANNELS_FORM) == (_BY_TOKENS, _BY_CHANNELS)
_SLOT, _HEADS, _TOKENS, _SPANS, _FORM, _FIRST, _COUNT, _AFTER, _TAG = 1, 2, 3, 4, 5, 6, 7, 8, 13
_ATTENTION, _D, _K, _PAGE_TOKENS, _PAGE_CHANNELS, _SPAN, _PAGES, _PAGES2 = 14, 15, 18, 21, 22, 23, 24, 25
assert [
    *(csd_state.SLOT, csd_state.HEADS, csd_state.TOKENS, csd_state.SPANS, csd_state.FORM, csd_state.FIRST),
    *(csd_state.COUNT, csd_state.AFTER, csd_state.TAG, csd_state.ATTENTION, csd_state.D, csd_state.K),
    *(csd_state.PAGE_TOKENS, csd_state.PAGE_CHANNELS, csd_state.SPAN, csd_state.PAGES, csd_state.PAGES2),
] == [
    *(_SLOT, _HEADS, _TOKENS, _SPANS, _FORM, _FIRST, _COUNT, _AFTER, _TAG, _ATTENTION, _D, _K),
    *(_PAGE_TOKENS, _PAGE_CHANNELS, _SPAN, _PAGES, _PAGES2),
]

DONE, REFUSED, OVERWRITES, RECLAIMS = range(4)
"""How far commands were followed: to the end, or to one that can't be done, writes over pages that are still to be
looked up, or gives blocks back."""


class State(NamedTuple):
    """What commands change."""

    table: Array  # uint32[forms, slots << table_bits], as `PageTables` has it
    taken: Array  # int64[channels]
    places: Array  # int64[channels]: `taken` modulo `unit`
    erased: Array  # int64[channels]
    filled: Array  # int64[forms, slots]: entries from the first on, without a gap
    digests: Array  # uint64[forms, slots]: of a slot's pages


class Rules(NamedTuple):
    """What `follow` and `place` need of CsdParams."""

    channels: int
    table_bits: int
    blocks: int  # of a log
    block_pages: int  # of a block of a log, over all of its planes
    planes: int  # of a channel
    unit: int  # what a page's number is modulo
    typed: bool  # whether programs of a block differ
    ends: bool  # whether it matters where a block ends


# ---- digests ------------------------------------------------------------------------------------------


@njit(**INNER)
def _mix(h, value):
    """A digest with one more integer."""
    x = (h ^ np.uint64(value)) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xD6E8FEB86659FD93)
    return x ^ (x >> np.uint64(32))


@njit(**INNER)
def _page(position, place):
    """A page's part in the digest of its slot: its entry, and its number modulo `unit`."""
    return _mix(_mix(np.uint64(0x2545F4914F6CDD1D), position), place)


@njit(**INNER)
def _place_of(tags, tag):
    """Where a tag is first; their number, if it is none of them."""
    place = 0
    while place < len(tags) and tags[place] != tag:
        place += 1
    return place


@njit(cache=True)
def key_of(rows, digests, first, end, turns, left, tags, queue):
    """A digest of commands `first` up to `end`: what they are, how far apart their slots and which tags are equal,
    what the one behind waits for, whose turn it is; and ticks left and `tags` of what the GPU has not done yet.
    `queue` is the size of queues: one that waits for the drive waits for no queue, if there are fewer commands."""
    h = _mix(np.uint64(0x5851F42D4C957F2D), rows[end, _AFTER])
    if rows[end, _AFTER] & 4 == 0 or end - first >= queue:
        h = _mix(h, rows[end, 0])
    for value in turns:
        h = _mix(h, value)
    for value in left:
        h = _mix(h, value)
    for i in range(len(tags)):
        h = _mix(h, _place_of(tags, tags[i]))
    base = -1
    for i in range(first, end):
        h = _mix(h, digests[i])
        if rows[i, 0] < _GPU:
            if base < 0:
                base = rows[i, _SLOT]
            h = _mix(h, rows[i, _SLOT] - base)
        j = first
        while rows[j, _TAG] != rows[i, _TAG]:
            j += 1
        h = _mix(_mix(h, j - first), _place_of(tags, rows[i, _TAG]))
    return h


@njit(cache=True)
def keys_of(rows, digests, first, end, queue, out):
    """Those of stretches that give turns anew and have nothing to do with the GPU."""
    nothing = np.zeros(0, np.int64)
    for i in range(len(first)):
        out[i] = key_of(rows, digests, first[i], end[i], nothing, nothing, nothing, queue)


# ---- what commands find and give ----------------------------------------------------------------------


@njit(**INNER)
def _estimates(row):
    return row[_ATTENTION] == 1 and row[_K] < row[_TOKENS]


@njit(**INNER)
def _finds(row, second):
    """(form, first entry, step, entries of a head) that a command looks up: of an ATTEND those of tokens, and `second`
    those of channels."""
    op = row[0]
    groups = row[_D] // max(row[_PAGE_CHANNELS], 1)
    if op == _ATTEND and second:
        return _BY_CHANNELS, 0, 1, row[_SPANS] * groups if _estimates(row) else 0
    if op == _ATTEND:
        size = row[_PAGE_TOKENS]
        return _BY_TOKENS, 0, 1, 2 * max((row[_TOKENS] + size - 1) // size - 2, 0)
    if op == _TRANSPOSE and not second:
        count = row[_SPAN] // row[_PAGE_TOKENS]
        return _BY_TOKENS, 2 * row[_FIRST] * count, 2, count
    if op == _READ and not second:
        first = row[_FIRST] * (groups if row[_FORM] == _BY_CHANNELS else 1)
        return row[_FORM], first, 1, row[_COUNT]
    return _BY_TOKENS, 0, 1, 0


@njit(**INNER)
def _gives(row):
    """(form, first entry, entries of a head) that a command gives pages to."""
    op = row[0]
    if op == _WRITE and row[_FORM] == _BY_TOKENS:
        size = row[_PAGE_TOKENS]
        first = row[_FIRST] // size
        return _BY_TOKENS, 2 * first, 2 * ((row[_FIRST] + row[_TOKENS]) // size - first)
    if op == _WRITE or op == _TRANSPOSE:
        groups = row[_D] // row[_PAGE_CHANNELS]
        return _BY_CHANNELS, row[_FIRST] * groups, groups
    return _BY_TOKENS, 0, 0


@njit(**CALLED)
def _all_there(r, s, row, second):
    """Whether all pages that a command looks up are written and not erased."""
    form, begin, step, n = _finds(row, second)
    if n == 0:
        return True
    erased = False
    for c in range(r.channels):
        erased |= s.erased[c] > 0
    for slot in range(row[_SLOT], row[_SLOT] + row[_HEADS]):
        if erased or s.filled[form, slot] < begin + step * (n - 1) + 1:
            for i in range(n):
                position = begin + step * i
                number = np.int64(s.table[form, (slot << r.table_bits) + position]) - 1
                if number < s.erased[channel_of(slot, position, r.channels)] * r.block_pages:
                    return False
    return True


@njit(**CALLED)
def _has_room(r, s, row):
    """Whether the logs have pages for all that a command gives."""
    _, begin, n = _gives(row)
    least = 1 << 62
    for c in range(r.channels):
        room = min((s.erased[c] + r.blocks) * r.block_pages, (1 << 32) - 1) - s.taken[c]
        least = min(least, room)
    if row[_HEADS] * n <= least:
        return True
    for c in range(r.channels):
        wanted = 0
        for slot in range(row[_SLOT], row[_SLOT] + row[_HEADS]):
            for position in range(begin, begin + n):
                wanted += channel_of(slot, position, r.channels) == c
        if s.taken[c] + wanted > min((s.erased[c] + r.blocks) * r.block_pages, (1 << 32) - 1):
            return False
    return True


@njit(**CALLED)
def _overwrites(r, s, row):
    """Whether a command gives pages to an entry that has one."""
    form, begin, n = _gives(row)
    for slot in range(row[_SLOT], row[_SLOT] + row[_HEADS]):
        for position in range(begin, begin + n):
            if s.table[form, (slot << r.table_bits) + position] > 0:
                return True
    return False


@njit(**CALLED)
def _give(r, s, row):
    """Head by head and entry by entry the next page of the entry's log."""
    form, begin, n = _gives(row)
    if n == 0:  # a token that fills no page, as most
        return
    for slot in range(row[_SLOT], row[_SLOT] + row[_HEADS]):
        digest = s.digests[form, slot]
        for position in range(begin, begin + n):
            c = channel_of(slot, position, r.channels)
            entry = (slot << r.table_bits) + position
            before = np.int64(s.table[form, entry])
            if before > 0:
                digest -= _page(position, (before - 1) % r.unit)
            place = s.places[c]
            digest += _page(position, place)
            s.places[c] = place + 1 if place + 1 < r.unit else 0
            s.taken[c] += 1
            s.table[form, entry] = s.taken[c]
        s.digests[form, slot] = digest
        filled = s.filled[form, slot]
        while filled < 1 << r.table_bits and s.table[form, (slot << r.table_bits) + filled] > 0:
            filled += 1
        s.filled[form, slot] = filled


@njit(**CALLED)
def _logs(r, s, row, before, h):
    """A digest with what programs depend on: dies and types of the pages that a command was given, of each log those
    from `before` on, and where blocks end among them."""
    if _gives(row)[2] == 0:
        return h
    for c in range(r.channels):
        place = before[c] % r.block_pages
        h = _mix(h, place if r.typed else place % r.planes)
        if r.ends:
            # Pages of one block may also be given by two commands that follow each other.
            left = r.block_pages - place
            h = _mix(h, left if place == 0 or left < s.taken[c] - before[c] else 0)
    return h


@njit(**CALLED)
def _slots(s, form, row, h):
    """A digest with those of the command's slots, which are mixed well."""
    total = np.uint64(0)
    for slot in range(row[_SLOT], row[_SLOT] + row[_HEADS]):
        total = total * np.uint64(0x9E3779B97F4A7C15) + s.digests[form, slot]
    return _mix(h, total)


@njit(cache=True)
def follow(r, s, rows, masks, placed, first, end, before, out):
    """Do to tables and logs what commands `first` up to `end` do; `out` gets their digests.

    `placed` are the columns that say where and when a command is, and nothing of what it does; `masks` a digest of what
    each command selects, `before` int64[channels] of no matter what. Returns the command it comes to, and why it goes no further.
    """
    for i in range(first, end):
        row = rows[i]
        op = row[0]
        if op == _RECLAIM:
            return i, RECLAIMS
        if op == _WRITE or op == _TRANSPOSE:
            if i > first and _overwrites(r, s, row):
                return i, OVERWRITES
            if not _has_room(r, s, row):
                return i, REFUSED
        if op < _GPU and not (_all_there(r, s, row, False) and _all_there(r, s, row, True)):
            return i, REFUSED
        h = _mix(np.uint64(0x9E6C63D0876A9A47), masks[i])
        for column in range(rows.shape[1]):
            if not placed[column]:
                h = _mix(h, row[column])
        if op < _GPU:
            h = _mix(h, row[_SLOT] % r.channels)
            for second in range(2):
                form, _, _, n = _finds(row, second == 1)
                if n > 0:
                    h = _slots(s, form, row, h)
            for c in range(r.channels):
                before[c] = s.taken[c]
            _give(r, s, row)
            h = _logs(r, s, row, before, h)
        out[i] = h
    return end, DONE


# ---- pages of commands that are simulated -------------------------------------------------------------


@njit(cache=True)
def count_pages(r, rows, first, end):
    """Pages that commands `first` up to `end` look up, program or erase."""
    total = 0
    for i in range(first, end):
        row = rows[i]
        if row[0] == _RECLAIM:
            total += row[_COUNT] * r.channels * r.planes
        elif row[0] < _GPU:
            total += row[_HEADS] * (_finds(row, False)[3] + _finds(row, True)[3] + _gives(row)[2])
    return total


@njit(**CALLED)
def _put(r, s, row, form, begin, step, n, pages, at):
    """The numbers of pages of a command's heads, from `at` on; returns where they end."""
    for slot in range(row[_SLOT], row[_SLOT] + row[_HEADS]):
        entry = (slot << r.table_bits) + begin
        for i in range(n):
            pages[at + i] = s.table[form, entry + step * i] - 1
        at += n
    return at


@njit(cache=True)
def place(r, s, rows, first, end, pages, at):
    """Put the numbers of the pages of commands `first` up to `end` into `pages` from `at` on, and where they begin into the
    rows; returns where they end. The tables are as these commands leave them."""
    for i in range(first, end):
        row = rows[i]
        row[_PAGES] = row[_PAGES2] = at
        if row[0] == _RECLAIM:
            for block in range(row[_COUNT]):
                for c in range(r.channels):
                    number = (s.erased[c] - row[_COUNT] + block) * r.block_pages
                    for plane in range(r.planes):
                        pages[at + plane] = number + plane
                    at += r.planes
        elif row[0] < _GPU:
            form, begin, step, n = _finds(row, False)
            at = _put(r, s, row, form, begin, step, n, pages, at)
            row[_PAGES2] = at
            form, begin, step, n = _finds(row, True)
            at = _put(r, s, row, form, begin, step, n, pages, at)
            form, begin, n = _gives(row)
            at = _put(r, s, row, form, begin, 1, n, pages, at)
    return at


# ---- from Python --------------------------------------------------------------------------------------


class Tables:
    """The tables of a drive, and what became of the commands given to it."""

    def __init__(self, p: CsdParams) -> None:
        f = p.flash
        self.tables = PageTables(p)
        t, planes = self.tables, f.chips * f.dies * f.planes
        typed = len({*f.read.tolist()}) > 1 or len({*f.program.tolist()}) > 1
        together = f.planes > 1 and f.multi_plane and f.same_page
        self._rules = Rules(
            f.channels, p.table_bits, f.blocks, t.block_pages, planes,
            t.block_pages if typed or together else planes, typed or together, typed or f.planes > 1,
        )  # fmt: skip
        shape = t.table.shape[0], p.slots
        self._state = State(
            t.table,
            t.taken,
            np.zeros_like(t.taken),
            t.erased,
            np.zeros(shape, np.int64),
            np.zeros(shape, np.uint64),
        )
        self._unlike = 0
        self._before = np.zeros_like(t.taken)
        self._placed = np.zeros(csd_state.CODE_COLUMNS, np.bool_)
        self._placed[[csd_state.SLOT, *csd_state.PLACED]] = True

    def follow(self, rows: Array, masks: Array, first: int, end: int, digests: Array) -> tuple[int, int]:
        """Commands `first` up to `end` of the drive's code. Returns the command it comes to, and why."""
        i, why = follow(
            self._rules, self._state, rows, masks, self._placed, first, end, self._before, digests
        )
        return int(i), int(why)

    def unlike(self) -> int:
        """A digest of a command that is like no other one."""
        self._unlike += 1
        return self._unlike

    def command(self, config: Any, record: Any) -> None:
        """A single command. Raises ValueError where it can't be done."""
        self.tables.command(config, record)

    def count(self, rows: Array, first: int, end: int) -> int:
        return int(count_pages(self._rules, rows, first, end))

    def place(self, rows: Array, first: int, end: int, pages: Array, at: int) -> int:
        """Numbers of the pages of commands that were followed, into `pages`; returns where they end."""
        return int(place(self._rules, self._state, rows, first, end, pages, at))
