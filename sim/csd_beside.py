"""Stretches that are known ahead are simulated beside the run, as many at a time as there are processors.

What a stretch does that begins at rest and gives turns anew follows from its commands and pages alone: simulated from
tick 0 on, on a drive of its own, it is what it would be where it stands.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tilewright.arch import csd as arch
from tilewright.arch.csd import CsdParams
from tilewright.sim import csd_drive
from tilewright.sim.csd_fold import Done, Memory, turns_of
from tilewright.sim.csd_state import (
    AFTER,
    ATTEND,
    CONFIG,
    GPU,
    INDEX,
    LIMIT,
    NOT_BEFORE,
    NOW,
    OP,
    REST,
    RESUMED,
    STOPPED,
    TAG,
    Drive,
)
from tilewright.sim.csd_tables import Tables, keys_of

Array = np.ndarray
_AT_REST = 1  # STOPPED
PROCESSORS = os.cpu_count() or 1
WORTH = 4096
"""Pages of a stretch from which on it is worth a drive of its own."""


class Beside:
    """Stretches that are simulated for a Memory."""

    def __init__(
        self, p: CsdParams, tables: Tables, memory: Memory, new_drive: Callable[[CsdParams, int], Drive]
    ) -> None:
        self._p, self._tables, self._memory, self._new_drive = p, tables, memory, new_drive
        self._threads = ThreadPoolExecutor(PROCESSORS)

    def begin(self, code: Array, digests: Array, selects: Array, known: int) -> None:
        """Stretches of a block that are like none before, of commands before `known`; not those with ATTENDs that
        select (bool, of each command)."""
        marked = np.flatnonzero(code[: known + 1, REST])
        first, end = marked[:-1], marked[1:]
        anew = (code[first, OP] == CONFIG) | (code[first, AFTER] & arch.AFTER_DRIVE != 0)
        gpu = (code[:, OP] == GPU) | (code[:, AFTER] & arch.AFTER_GPU != 0)
        late = code[:, NOT_BEFORE] > 0
        good = anew & (_within(code[:, OP] == ATTEND, first, end) > 0)
        good &= _within(gpu | late, first, end + 1) + _within(selects, first, end) == 0
        first, end = first[good], end[good]
        keys = np.zeros(len(first), np.uint64)
        keys_of(code, digests, first, end, self._p.command_queue, keys)
        _, places = np.unique(keys, return_index=True)
        for i in np.sort(places).tolist():
            key = int(end[i] - first[i]), int(keys[i])
            if self._memory.lacks(key):
                rows = code[first[i] : end[i] + 1].copy()
                need = self._tables.count(rows, 0, len(rows) - 1)
                if need >= WORTH:
                    pages = np.zeros(need, np.uint32)
                    self._tables.place(rows, 0, len(rows) - 1, pages, 0)
                    self._memory.promise(key, self._threads.submit(self._simulate, rows, pages).result)

    def end(self) -> None:
        """Nothing more is asked for."""
        self._threads.shutdown(cancel_futures=True)

    def _simulate(self, rows: Array, pages: Array) -> Done | None:
        """A stretch, and the command behind it; None if that does not find all at rest."""
        n = len(rows) - 1
        tags = [*dict.fromkeys(rows[:n, TAG].tolist())]
        # The tag of the command behind counts for nothing before it is dispatched.
        rows[:, TAG] = [tags.index(tag) if tag in tags else 0 for tag in rows[:, TAG].tolist()]
        rows[0, REST] = 0
        d = self._new_drive(self._p, len(tags))
        d = d._replace(code=rows, pages=pages, log=np.zeros((n + 1, d.log.shape[1]), np.int64))
        d.one[INDEX], d.one[LIMIT], d.one[RESUMED] = 0, n, -1
        csd_drive.run(self._p, d)
        if d.one[STOPPED] != _AT_REST:
            return None
        csd_drive.finish(d, int(d.one[NOW]))
        return Done(int(d.one[NOW]), None, d.log[:n], d.activity, d.counters, d.flash.totals, turns_of(d))


def _within(marks: Array, first: Array, end: Array) -> Array:
    """How many marks there are of each stretch."""
    total = np.concatenate([[0], np.cumsum(marks)])
    return total[end] - total[first]
