"""What a drive at rest has done before takes as long again: stretches of commands that are alike are simulated once.

A stretch goes from one command that finds drive and link at rest to the next one that may: `mark` says which. A round
goes from one that waits for the drive on the link's or the GPU's behalf to the next one, as decode steps do from layer
to layer: many stretches in one. Two are alike if their digests are, which `sim/csd_tables.py` makes of commands, of what
they select and of the pages that they find and give; if what follows waits for the same; and if turns are as they were,
unless the first command gives them anew: those of arbiters, ports and dies are all that a drive at rest remembers. The
GPU may be at work; what is left of that counts if a stretch has work for it, or waits for it. If the command that a
stretch would end with does not find all at rest, as dies still program, it is longer, which is known from then on.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numba import njit

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
    GPU_END,
    GPU_ROW,
    HAND_TURN,
    INDEX,
    LOG_END,
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
_NOTHING = np.zeros(0, np.int64)
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


class Done(NamedTuple):
    """What a stretch did: differences, ticks since its beginning, and the turns that it leaves."""

    ticks: int
    gpu_end: int | None  # None: it has nothing to do with the GPU
    log: Array
    activity: Array  # of its tags, then of none
    counters: Array
    totals: Array
    turns: Array


class _Open(NamedTuple):
    """A stretch that is being simulated, and what there was before."""

    key: tuple[int, int]
    short: tuple[int, int]  # up to the next command that may find everything at rest
    first: int
    end: int
    now: int
    gpu: bool
    tags: Array
    activity: Array  # of its tags, then of none
    counters: Array
    totals: Array


class Memory:
    """What was done so far, by what it was."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, int], Done] = {}  # by number of commands and digest
        self._promised: dict[tuple[int, int], Callable[[], Done | None]] = {}
        self._longer: dict[
            tuple[int, int], int
        ] = {}  # commands of stretches that are not over where they might be
        self._tags: dict[bytes, _Tags] = {}
        self._open: list[_Open | None] = [None, None]  # a round, a stretch
        self._ends: list[list[int]] = []
        self._anew: list[bool] = []
        self._arrivals = False
        self._gpu: list[int] = []
        self._ops_and_tags = np.zeros((0, 2), np.int64)

    def lacks(self, key: tuple[int, int]) -> bool:
        """Whether nothing is known of such stretches."""
        return not (key in self._done or key in self._promised or key in self._longer)

    def promise(self, key: tuple[int, int], result: Callable[[], Done | None]) -> None:
        """What such a stretch does, from elsewhere; None if it does not end where it might."""
        self._promised[key] = result

    def begin(self, code: Array) -> None:
        """Other commands; a stretch that has not come to its end by now does not count."""
        self._open = [None, None]
        marked = np.flatnonzero(code[:, REST])
        self._ends = [marked[code[marked, OP] >= GPU].tolist(), marked.tolist()]
        self._anew = ((code[:, OP] == CONFIG) | (code[:, AFTER] & arch.AFTER_DRIVE != 0)).tolist()
        of_gpu = (code[:, OP] == GPU) | (code[:, AFTER] & arch.AFTER_GPU != 0)
        self._gpu = [0, *np.cumsum(of_gpu).tolist()]
        self._arrivals = bool(code[:, NOT_BEFORE].any())
        self._ops_and_tags = np.ascontiguousarray(code[:, [OP, TAG]])

    def advance(self, d: Drive, ahead: Ahead) -> None:
        """The drive is at rest before the command INDEX: keep what it did, and repeat what it did before, up to a command
        from which it must be simulated."""
        first, now, turns_now = int(d.one[INDEX]), int(d.one[NOW]), turns_of(d)
        finish(d, now)
        while True:
            ahead.leave_out(first)
            self._keep(d, first, now, turns_now)
            found = self._find(d, ahead, first, now, turns_now)
            if found is None:
                break
            end, done, tags = found
            self._repeat(d, first, end, now, done, tags)
            first, now, turns_now = end, now + done.ticks, done.turns
        # Nobody's ticks before `now` are to be accounted for.
        d.charge[:, 2] = now
        account_from(d.flash, now)
        d.one[INDEX], d.one[NOW], d.one[RESUMED] = first, now, first
        _set_turns(d, turns_now)

    def _find(
        self, d: Drive, ahead: Ahead, first: int, now: int, turns_now: Array
    ) -> tuple[int, Done, _Tags] | None:
        """A round or a stretch from `first` on that was done before: its end, what it does and its tags; those that were
        not are opened."""
        for level, ends in enumerate(self._ends):
            if self._open[level] is not None or (level == 0 and d.code[first, OP] < GPU):
                continue
            at = bisect_right(ends, first)
            if at == len(ends) or ends[at] > ahead.known:
                continue
            end = ends[at]
            key, gpu, tags = short, _, _ = self._key(d, ahead, first, end, now, turns_now)
            if short in self._longer:
                end = first + self._longer[short]
                if end > min(ahead.known, ends[-1]):
                    continue
                key, gpu, tags = self._key(d, ahead, first, end, now, turns_now)
            if self._arrivals and d.code[first : end + 1, NOT_BEFORE].max() > now:
                continue
            own = self._tags_of(first, end, tags)
            if key in self._promised:
                done = self._promised.pop(key)()
                if done is not None:
                    self._done[key] = done
            if key in self._done:
                return end, self._done[key], own
            rows = own.rows
            before = d.activity[rows], d.counters[rows], d.flash.totals.copy()
            self._open[level] = _Open(key, short, first, end, now, gpu, rows, *before)
        return None

    def _key(
        self, d: Drive, ahead: Ahead, first: int, end: int, now: int, turns_now: Array
    ) -> tuple[tuple[int, int], bool, Array]:
        """Of a stretch: what it is known by, whether it has to do with the GPU, and tags of what that works on."""
        remembered = turns_now[:0] if self._anew[first] else turns_now
        gpu = self._gpu[end + 1] > self._gpu[first]
        left, tags = _at_work(d, first, now) if gpu and d.one[GPU_END] > now else (_NOTHING, _NOTHING)
        size = d.queue.shape[1]
        key = key_of(d.code, ahead.digests, first, end, remembered, left, tags, size)
        return (end - first, int(key)), gpu, tags

    def _keep(self, d: Drive, index: int, now: int, now_turns: Array) -> None:
        """What is open ends here, or has gone on beyond its end, and does not count."""
        for level, o in enumerate(self._open):
            if o is None or index < o.end:
                continue
            self._open[level] = None
            if index > o.end and level == 1:
                self._longer[o.short] = index - o.first
            if o.end == index:
                log = d.log[o.first : o.end].copy()
                log[:, :2] -= o.now
                self._done[o.key] = Done(
                    now - o.now,
                    int(d.one[GPU_END]) - now if o.gpu else None,
                    log,
                    d.activity[o.tags] - o.activity,
                    d.counters[o.tags] - o.counters,
                    d.flash.totals - o.totals,
                    now_turns,
                )

    def _tags_of(self, first: int, end: int, before: Array) -> _Tags:
        """Of a stretch, and of what the GPU works on `before`."""
        columns = self._ops_and_tags[first:end]
        key = before.tobytes() + columns.tobytes()
        if key not in self._tags:
            ops, tags = columns.T
            last = [int(tags[mask][-1]) if mask.any() else -1 for mask in (ops < GPU, ops == ATTEND)]
            self._tags[key] = _Tags(np.array([*dict.fromkeys([*before.tolist(), *tags.tolist()]), -1]), *last)
        return self._tags[key]

    def _repeat(self, d: Drive, first: int, end: int, now: int, done: Done, tags: _Tags) -> None:
        """What was done from tick `now` on, but for turns and time."""
        _add(d.log[first:end], done.log, now, tags.rows, d.activity, done.activity, d.counters, done.counters)
        _sum(d.flash.totals, done.totals)
        if tags.drive >= 0:
            d.one[DRIVE_TAG] = tags.drive
        if tags.attend >= 0:
            d.one[ATTEND_TAG] = tags.attend
        if done.gpu_end is not None:
            d.one[GPU_END] = now + done.ticks + done.gpu_end


@njit(cache=True)
def _add(log, own_log, now, tags, activity, own_activity, counters, own_counters):
    """The log of what was done, from tick `now` on; activity and counters of its tags."""
    for i in range(len(log)):
        for column in range(log.shape[1]):
            log[i, column] = own_log[i, column]
        log[i, 0] += now
        log[i, 1] += now
    for i in range(len(tags)):
        activity[tags[i]] += own_activity[i]
        counters[tags[i]] += own_counters[i]


@njit(cache=True)
def _sum(totals, own_totals):
    for i in range(len(totals)):
        totals[i] += own_totals[i]


def _at_work(d: Drive, first: int, now: int) -> tuple[Array, Array]:
    """Of what the GPU was given before command `first` and has not done: ticks that are left, and tags."""
    begin = int(d.one[GPU_ROW])
    of_gpu = (d.code[begin:first, OP] == GPU) & (d.log[begin:first, LOG_END] > now)
    rows = begin + np.flatnonzero(of_gpu)
    return d.log[rows, LOG_END] - now, d.code[rows, TAG]


def turns_of(d: Drive) -> Array:
    """All that a drive at rest remembers."""
    return np.concatenate([d.one[_TURNS], d.shares[:, S_TURN], turns(d.flash)])


def _set_turns(d: Drive, values: Array) -> None:
    own, ports = len(_TURNS), len(d.shares)
    d.one[_TURNS] = values[:own]
    d.shares[:, S_TURN] = values[own : own + ports]
    set_turns(d.flash, values[own + ports :])
