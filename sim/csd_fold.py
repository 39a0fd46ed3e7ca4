"""What a drive at rest has done before takes as long again: stretches of commands that are alike are simulated once.

A stretch goes from one command that finds everything at rest to the next one that may: `mark` says which. A round goes
from one that waits for the drive on the link's or the GPU's behalf to the next one, as decode steps do from layer to
layer: many stretches in one. Two are alike if their digests are, which `sim/csd_tables.py` makes of commands, of what
they select and of the pages that they find and give; and if turns are as they were, unless the first command gives
them anew: those of arbiters, ports and dies are all that a drive at rest remembers.
"""

from bisect import bisect_right
from typing import NamedTuple, Protocol

import numpy as np

from tilewright.arch import csd as arch
from tilewright.sim.csd_drive import finish
from tilewright.sim.csd_flash import account_from, set_turns, turns
from tilewright.sim.csd_state import (
    AFTER,
    ATTEND,
    ATTEND_TAG,
    CONFIG,
    DRIVE_TAG,
    GPU,
    HAND_TURN,
    INDEX,
    LOOKUP_TURN,
    NOT_BEFORE,
    NOW,
    OP,
    REST,
    RESUMED,
    S_TURN,
    STAGING_TURN,
    TAG,
    TOPK_TURN,
    Drive,
)
from tilewright.sim.csd_tables import key_of

Array = np.ndarray
_TURNS = [HAND_TURN, LOOKUP_TURN, STAGING_TURN, TOPK_TURN]


def mark(rows: Array) -> None:
    """Set REST of commands that come after others, and are for the drive or wait for it."""
    waits = (rows[:, AFTER] != 0) & ((rows[:, OP] < GPU) | (rows[:, AFTER] & arch.AFTER_DRIVE != 0))
    rows[:, REST] = waits


class Ahead(Protocol):
    """What is known of the commands ahead."""

    known: int
    """Commands before it have `digests`."""
    digests: Array

    def leave_out(self, end: int) -> None:
        """Commands before `end` are not simulated any more."""


class _Tags(NamedTuple):
    """Of a stretch: its tags, and that of none; tags of its last command for the drive, and of its last ATTEND, or -1."""

    rows: Array
    drive: int
    attend: int


class _Done(NamedTuple):
    """What a stretch did: differences, ticks since its beginning, and the turns that it leaves."""

    ticks: int
    log: Array
    activity: Array  # of its tags, then of none
    counters: Array
    totals: Array
    turns: Array


class _Open(NamedTuple):
    """A stretch that is being simulated, and what there was before."""

    key: tuple[int, int]
    first: int
    end: int
    now: int
    tags: Array
    activity: Array  # of its tags, then of none
    counters: Array
    totals: Array


class Memory:
    """What was done so far, by what it was."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, int], _Done] = {}
        self._tags: dict[bytes, _Tags] = {}
        self._open: list[_Open | None] = [None, None]  # a round, a stretch
        self._ends: list[list[int]] = []
        self._anew: list[bool] = []
        self._arrivals = False

    def begin(self, code: Array) -> None:
        """Other commands; a stretch that has not come to its end by now does not count."""
        self._open = [None, None]
        marked = np.flatnonzero(code[:, REST])
        self._ends = [marked[code[marked, OP] >= GPU].tolist(), marked.tolist()]
        self._anew = ((code[:, OP] == CONFIG) | (code[:, AFTER] & arch.AFTER_DRIVE != 0)).tolist()
        self._arrivals = bool(code[:, NOT_BEFORE].any())

    def advance(self, d: Drive, ahead: Ahead) -> None:
        """The drive is at rest before the command INDEX: keep what it did, and repeat what it did before, up to a command
        from which it must be simulated."""
        first, now, turns_now = int(d.one[INDEX]), int(d.one[NOW]), _turns(d)
        finish(d, now)
        while True:
            ahead.leave_out(first)
            self._keep(d, first, now, turns_now)
            found = self._find(d, ahead, first, now, turns_now)
            if found is None:
                break
            end, done = found
            self._repeat(d, first, end, now, done)
            first, now, turns_now = end, now + done.ticks, done.turns
        # Nobody's ticks before `now` are to be accounted for.
        d.charge[:, 2] = now
        account_from(d.flash, now)
        d.one[INDEX], d.one[NOW], d.one[RESUMED] = first, now, first
        _set_turns(d, turns_now)

    def _find(
        self, d: Drive, ahead: Ahead, first: int, now: int, turns_now: Array
    ) -> tuple[int, _Done] | None:
        """A round or a stretch from `first` on that was done before, and its end; those that were not are opened."""
        for level, ends in enumerate(self._ends):
            if self._open[level] is not None or (level == 0 and d.code[first, OP] < GPU):
                continue
            at = bisect_right(ends, first)
            if at == len(ends) or ends[at] > ahead.known:
                continue
            end = ends[at]
            if self._arrivals and d.code[first:end, NOT_BEFORE].max() > now:
                continue
            remembered = turns_now[:0] if self._anew[first] else turns_now
            key = end - first, int(key_of(d.code, ahead.digests, first, end, remembered))
            if key in self._done:
                return end, self._done[key]
            tags = self._tags_of(d, first, end).rows
            self._open[level] = _Open(
                key, first, end, now, tags, d.activity[tags], d.counters[tags], d.flash.totals.copy()
            )
        return None

    def _keep(self, d: Drive, index: int, now: int, now_turns: Array) -> None:
        """What is open ends here, or has gone on beyond its end, and does not count."""
        for level, o in enumerate(self._open):
            if o is None or index < o.end:
                continue
            self._open[level] = None
            if o.end == index:
                log = d.log[o.first : o.end].copy()
                log[:, :2] -= o.now
                self._done[o.key] = _Done(
                    now - o.now,
                    log,
                    d.activity[o.tags] - o.activity,
                    d.counters[o.tags] - o.counters,
                    d.flash.totals - o.totals,
                    now_turns,
                )

    def _tags_of(self, d: Drive, first: int, end: int) -> _Tags:
        columns = d.code[first:end, [OP, TAG]]
        key = columns.tobytes()
        if key not in self._tags:
            ops, tags = columns.T
            last = [int(tags[mask][-1]) if mask.any() else -1 for mask in (ops < GPU, ops == ATTEND)]
            self._tags[key] = _Tags(np.array([*dict.fromkeys(tags.tolist()), -1]), *last)
        return self._tags[key]

    def _repeat(self, d: Drive, first: int, end: int, now: int, done: _Done) -> None:
        """What was done from tick `now` on, but for turns and time."""
        d.log[first:end] = done.log
        d.log[first:end, :2] += now
        tags, drive, attend = self._tags_of(d, first, end)
        d.activity[tags] += done.activity
        d.counters[tags] += done.counters
        d.flash.totals[:] += done.totals
        if drive >= 0:
            d.one[DRIVE_TAG] = drive
        if attend >= 0:
            d.one[ATTEND_TAG] = attend


def _turns(d: Drive) -> Array:
    return np.concatenate([d.one[_TURNS], d.shares[:, S_TURN], turns(d.flash)])


def _set_turns(d: Drive, values: Array) -> None:
    own, ports = len(_TURNS), len(d.shares)
    d.one[_TURNS] = values[:own]
    d.shares[:, S_TURN] = values[own : own + ports]
    set_turns(d.flash, values[own + ports :])
