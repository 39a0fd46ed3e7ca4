"""What a drive at rest has done before takes as long again: stretches of commands that are alike are simulated once.

A stretch goes from one command that finds everything at rest to the next one that may: `mark` says which. Two are alike
if their commands are, but for slots that begin on the same channel; if they select alike; and if their pages are as
far apart in the log of each channel, and begin in the same of its planes. Where pages are programmed or erased, or where
their times differ by type, they must also begin in the same place of a block. And turns must be as they were: those of
arbiters, ports and dies are all that a drive at rest remembers.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tilewright.arch import csd as arch
from tilewright.arch.csd import CsdParams
from tilewright.arch.csd_pages import Places
from tilewright.sim.csd_drive import finish
from tilewright.sim.csd_flash import account_from, set_turns, turns
from tilewright.sim.csd_state import (
    AFTER,
    ATTEND,
    ATTEND_TAG,
    DRIVE_TAG,
    GPU,
    HAND_TURN,
    INDEX,
    LOOKUP_TURN,
    MASKS,
    NEVER,
    NOT_BEFORE,
    NOW,
    OP,
    PAGES,
    PAGES2,
    RECLAIM,
    REST,
    RESUMED,
    S_TURN,
    SLOT,
    STAGING_TURN,
    TAG,
    TOPK_TURN,
    TRANSPOSE,
    WRITE,
    Drive,
)

Array = np.ndarray
_TURNS = [HAND_TURN, LOOKUP_TURN, STAGING_TURN, TOPK_TURN]
_PLACED = [PAGES, PAGES2, MASKS, TAG, NOT_BEFORE, REST]


def mark(rows: Array) -> None:
    """Set REST of commands that come after others, and are for the drive or wait for it."""
    waits = (rows[:, AFTER] != 0) & ((rows[:, OP] < GPU) | (rows[:, AFTER] & arch.AFTER_DRIVE != 0))
    rows[:, REST] = waits


class Content(NamedTuple):
    """A command without its place in time, memory and flash, and the least number of its pages in each channel's log."""

    digest: bytes
    least: Array  # [channels], NEVER where it has none


def content_of(p: CsdParams, row: Array, pages: Sequence[Places], mask: bytes) -> Content:
    """`row` of `Drive.code`, with its pages and a digest of its masks."""
    channels = p.flash.channels
    least = np.full(channels, NEVER)
    for places in pages:
        np.minimum.at(least, places.channel.ravel(), places.number.ravel())
    row = row.copy()
    row[_PLACED] = 0
    row[SLOT] %= channels
    h = hashlib.blake2b(row.tobytes() + mask, digest_size=16)
    for places in pages:
        h.update((places.number - least[places.channel]).astype(np.uint32).tobytes())
    return Content(h.digest(), least)


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

    key: bytes
    first: int
    end: int
    now: int
    activity: Array
    counters: Array
    totals: Array


class Memory:
    """What was done so far, by what it was."""

    def __init__(self, p: CsdParams) -> None:
        f = p.flash
        self._p = p
        self._plane_pages = f.chips * f.dies * f.planes
        self._uniform = len(set(f.read.tolist())) == 1
        self._done: dict[bytes, _Done] = {}
        self._open: _Open | None = None

    def forget_open(self) -> None:
        """A stretch that has not come to its end by now does not count."""
        self._open = None

    def advance(self, d: Drive, before: int, contents: Sequence[Content]) -> None:
        """The drive is at rest before the command INDEX: keep what it did, and repeat what it did before, up to a command
        from which it must be simulated. `contents` are those of the rows of its code from `before` on."""
        finish(d, d.one[NOW])
        marked = np.flatnonzero(d.code[:, REST])
        while True:
            first, now = int(d.one[INDEX]), int(d.one[NOW])
            self._keep(d, first, now)
            d.one[RESUMED] = first
            later = marked[np.searchsorted(marked, first, side="right") :]
            if not len(later) or d.code[first : later[0], NOT_BEFORE].max() > now:
                return
            end = int(later[0])
            tags = list(dict.fromkeys(d.code[first:end, TAG].tolist()))
            key = self._key(d, first, end, contents[first - before : end - before], tags)
            done = self._done.get(key)
            if done is None:
                self._open = _Open(
                    key, first, end, now, d.activity.copy(), d.counters.copy(), d.flash.totals.copy()
                )
                return
            self._repeat(d, first, end, [*tags, -1], done)

    def _key(self, d: Drive, first: int, end: int, contents: Sequence[Content], tags: list[int]) -> bytes:
        rows = d.code[first:end]
        least = np.stack([content.least for content in contents])
        writes = np.isin(rows[:, OP], (WRITE, TRANSPOSE, RECLAIM)).any()
        unit = self._plane_pages * (1 if self._uniform and not writes else self._p.flash.pages)
        apart = np.where(least < NEVER, least - least.min(axis=0) // unit * unit, -1)
        h = hashlib.blake2b(b"".join(content.digest for content in contents), digest_size=16)
        h.update(apart.tobytes())
        h.update(np.array([tags.index(tag) for tag in rows[:, TAG].tolist()]).tobytes())
        h.update(_turns(d).tobytes())
        return h.digest()

    def _keep(self, d: Drive, index: int, now: int) -> None:
        """The stretch that is open has ended, if it ends here."""
        o, self._open = self._open, None
        if o is None or o.end != index:
            return
        tags = [*dict.fromkeys(d.code[o.first : o.end, TAG].tolist()), -1]
        log = d.log[o.first : o.end].copy()
        log[:, :2] -= o.now
        self._done[o.key] = _Done(
            now - o.now,
            log,
            d.activity[tags] - o.activity[tags],
            d.counters[tags] - o.counters[tags],
            d.flash.totals - o.totals,
            _turns(d),
        )

    def _repeat(self, d: Drive, first: int, end: int, tags: list[int], done: _Done) -> None:
        now = d.one[NOW]
        d.log[first:end] = done.log
        d.log[first:end, :2] += now
        # Nobody's ticks are accounted for up to now, and will be from the end on.
        d.activity[tags] += done.activity
        d.counters[tags] += done.counters
        d.flash.totals[:] += done.totals
        _account_from(d, now + done.ticks)
        d.one[INDEX], d.one[NOW] = end, now + done.ticks
        for op, column in (
            (d.code[first:end, OP] < GPU, DRIVE_TAG),
            (d.code[first:end, OP] == ATTEND, ATTEND_TAG),
        ):
            if op.any():
                d.one[column] = d.code[first:end, TAG][op][-1]
        _set_turns(d, done.turns)


def _account_from(d: Drive, now: int) -> None:
    """All ticks before `now` are accounted for."""
    d.charge[:, 2] = now
    account_from(d.flash, now)


def _turns(d: Drive) -> Array:
    return np.concatenate([d.one[_TURNS], d.shares[:, S_TURN], turns(d.flash)])


def _set_turns(d: Drive, values: Array) -> None:
    own, ports = len(_TURNS), len(d.shares)
    d.one[_TURNS] = values[:own]
    d.shares[:, S_TURN] = values[own : own + ports]
    set_turns(d.flash, values[own + ports :])
