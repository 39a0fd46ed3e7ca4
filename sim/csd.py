"""A GPU with a drive in time: a Program in, a Timeline out.

`sim/csd_drive.py` says what happens on which tick. Here commands are given the numbers of their pages, which follow
from the order of the program alone (`sim/csd_tables.py`), and the masks of what heads select, if they are not folded
(`sim/csd_fold.py`). That is done block by block: a CONFIG waits until the drive is at rest, so that nothing but GPU and
link reaches from one block into the next.
"""

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from tilewright.arch import csd as arch
from tilewright.arch.csd import CsdParams
from tilewright.arch.csd_pages import Decisions, Selection
from tilewright.arch.isa import Program
from tilewright.arch.scenario import Progress
from tilewright.arch.timeline import SPAN, Timeline, fold_spans
from tilewright.arch.trace import LOG
from tilewright.sim import csd_drive
from tilewright.sim.csd_beside import PROCESSORS, Beside
from tilewright.sim.csd_flash import grown_channels, new_channels
from tilewright.sim.csd_fold import Memory, mark
from tilewright.sim.csd_state import (
    ARRAY,
    ATTEND,
    ATTENTION,
    CODE_COLUMNS,
    COUNTERS,
    FETCH_TAG,
    FIELDS,
    FILTER_COLUMNS,
    FINISH,
    GPU,
    GPU_ROW,
    HEADS,
    IDLE,
    INDEX,
    K_NEXT,
    KERNEL,
    KERNEL_COLUMNS,
    LIMIT,
    LINK,
    LINK_ROW,
    LOCAL,
    LOG_END,
    LOG_FIRST,
    MASKS,
    MOVER_BLOCKED,
    MOVER_LOOKS,
    NEVER,
    NOW,
    OP,
    PAUSE,
    PUSHED_AT,
    REST,
    RESUMED,
    S_NEXT,
    SCALARS,
    SETTINGS,
    SLOT,
    STOPPED,
    STUCK,
    TAG,
    TOKENS,
    TOPK_RELEASE,
    WAKES,
    D,
    Drive,
    K,
    R,
)
from tilewright.sim.csd_tables import RECLAIMS, REFUSED, Tables

Array = np.ndarray
_SPARF = arch.ATTENTIONS.index("sparf")
_AT_REST = 1  # STOPPED
# Blocks that are known before they are executed, so that processors have enough to do.
_WAITING = 2 * PROCESSORS


# ---- commands -----------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """One repetition of a segment."""

    segment: int
    code: Array  # records of the program
    rows: Array  # of Drive.code


class _Block:
    """Pieces that are executed without a pause."""

    def __init__(self, p: CsdParams, decisions: Decisions, fold: bool) -> None:
        self._p, self._decisions, self._fold = p, decisions, fold
        self.pieces: list[_Piece] = []
        self.masks: list[Array] = []  # digests of what commands select, uint64
        self.recorded: dict[int, Selection] = {}  # of all commands before
        self._size = 0

    def add(self, segment: int, code: Array) -> None:
        """Raises ValueError for missing decisions."""
        rows = _rows(code)
        if self._fold:
            mark(rows)
        attends = (rows[:, OP] == ATTEND) & (rows[:, ATTENTION] == _SPARF) & (rows[:, K] < rows[:, TOKENS])
        masks = np.where(attends, 1 + rows[:, SLOT] % self._p.patterns, 0).astype(np.uint64)
        if not self._decisions.by_pattern:
            of = arch.configurations(code)
            for i in np.flatnonzero(code["op"] == arch.OP["ATTEND"]).tolist():
                with _named(segment, i, code[i]):
                    selection = self._decisions.of(code[of[i]], code[i])
                if attends[i]:
                    self.recorded[self._size + i] = selection
                    masks[i] = int.from_bytes(hashlib.blake2b(_bits(selection), digest_size=8).digest())
        self.pieces.append(_Piece(segment, code, rows))
        self.masks.append(masks)
        self._size += len(code)

    def command(self, tables: Tables, index: int) -> None:
        """Do a single command. Raises ValueError for one that reads, writes or erases what it may not."""
        for piece in self.pieces:
            if index < len(piece.code):
                record = piece.code[index]
                with _named(piece.segment, index, record):
                    tables.command(piece.code[arch.configurations(piece.code)[index]], record)
                return
            index -= len(piece.code)


def _bits(selection: Selection) -> bytes:
    """The masks of an ATTEND's heads, channels and then tokens, a byte each."""
    return np.concatenate([selection.channels, selection.tokens], axis=1).astype(np.uint8).tobytes()


@contextmanager
def _named(segment: int, index: int, record: Any) -> Iterator[None]:
    """Says which command a ValueError is about."""
    try:
        yield
    except ValueError as error:
        name = arch.OPS[int(record["op"])].name
        raise ValueError(f"segment {segment}, command {index} ({name}): {error}") from None


def _rows(code: Array) -> Array:
    """Rows of Drive.code, without pages and masks."""
    rows = np.zeros((len(code), CODE_COLUMNS), np.int64)
    of = arch.configurations(code)
    for column, name in enumerate(FIELDS):
        rows[:, column] = code[name]
    for column, name in enumerate(SETTINGS, len(FIELDS)):
        rows[:, column] = np.where(of >= 0, code[name][np.maximum(of, 0)], 0)
    return rows


def _fill(p: CsdParams, tables: Tables, segment: int, code: Array) -> None:
    """What the drive holds when the run begins."""
    block = _Block(p, Decisions.drawn(p), False)
    block.add(segment, code)
    for i in np.flatnonzero(~np.isin(code["op"], (arch.OP["CONFIG"], arch.OP["WRITE"])))[:1].tolist():
        with _named(segment, i, code[i]):
            raise ValueError(f"a segment labelled {arch.CACHED} must hold CONFIG and WRITE only")
    rows, at = block.pieces[0].rows, 0
    while at < len(rows):
        at, why = tables.follow(rows, block.masks[0], at, len(rows), np.zeros(len(rows), np.uint64))
        if why == REFUSED:
            block.command(tables, at)


class _Ahead:
    """The commands of a block: what is known of them before they are executed, and pages and masks of those that are."""

    def __init__(self, p: CsdParams, tables: Tables, decisions: Decisions, block: _Block) -> None:
        self._p, self._tables, self._decisions, self.block = p, tables, decisions, block
        end = np.zeros((1, CODE_COLUMNS), np.int64)
        self.code = np.concatenate([*(piece.rows for piece in block.pieces), end])
        self._before, self._end = 0, len(self.code) - 1
        self._masks = np.concatenate([*block.masks, np.zeros(1, np.uint64)])
        self.digests = np.zeros(len(self.code), np.uint64)
        self.known = self.placed = 0
        self._looked = False
        self._chosen: dict[tuple[int, ...], int] = {}  # where masks begin
        self._chosen_size = self._page_count = 0

    def look(self, beside: Beside | None) -> bool:
        """Follow commands while others before them are not executed; those are all known. Returns whether these are."""
        if not self._looked:
            self._looked = True
            self._follow()
            if beside is not None:
                beside.begin(self.code, self.digests, self._masks > 0, self.known)
        return self.known == self._end

    def begin(self, pending: Array, last: int) -> None:
        """They are executed, behind commands that have not ended; `last` stands behind them all."""
        before = len(pending)
        self.code[-1, OP] = last
        self.code = np.concatenate([pending, self.code])
        self.code[:before, REST] = 0
        none = np.zeros(before, np.uint64)
        self._masks, self.digests = np.concatenate([none, self._masks]), np.concatenate([none, self.digests])
        self._before, self._end = before, self._end + before
        self.known, self.placed = self.known + before, before
        self._estimates = self._masks > 0
        self._marked = [*np.flatnonzero(self.code[:, REST]).tolist(), self._end]
        self._follow()

    def _follow(self) -> None:
        """Go on, where all commands that are known are placed or left out: later ones may write over their pages."""
        while self.known == self.placed < self._end:
            self.known, why = self._tables.follow(self.code, self._masks, self.known, self._end, self.digests)
            if why == REFUSED:
                self.block.command(self._tables, self.known - self._before)
                raise AssertionError(f"command {self.known - self._before} was refused for no reason")
            if why == RECLAIMS and self.known == self.placed:
                self.block.command(self._tables, self.known - self._before)
                self.digests[self.known] = self._tables.unlike()
                self.known += 1

    def leave_out(self, end: int) -> None:
        """Commands before `end` are done, and no pages are in use."""
        self.placed = max(self.placed, end)
        self._page_count = 0
        self._follow()

    def place(self, d: Drive) -> Drive:
        """Pages and masks of commands up to the next one that may find the drive at rest."""
        self._follow()
        first = self.placed
        end = min(self._marked[bisect_right(self._marked, first)] if first < self._end else first, self.known)
        need = self._page_count + self._tables.count(self.code, first, end)
        if need > len(d.pages):
            more = np.zeros(2 * need, np.uint32)
            more[: self._page_count] = d.pages[: self._page_count]
            d = d._replace(pages=more)
        self._page_count = self._tables.place(self.code, first, end, d.pages, self._page_count)
        for i in np.flatnonzero(self._estimates[first:end]).tolist():
            d = self._choose(d, first + i)
        self.placed = d.one[LIMIT] = end
        return d

    def _choose(self, d: Drive, i: int) -> Drive:
        """Masks of an ATTEND that estimates: those that are alike are there once."""
        row = self.code[i]
        selection = self.block.recorded.get(i - self._before)
        key: tuple[int, ...] = (i,)
        if selection is None:
            key = (-1 - row[SLOT] % self._p.patterns, *row[[HEADS, TOKENS, D, R, K, LOCAL]].tolist())
        if key not in self._chosen:
            if selection is None:
                command = dict(zip((*FIELDS, *SETTINGS), row.tolist(), strict=False))
                selection = self._decisions.of(command, command)
            masks = np.frombuffer(_bits(selection), np.uint8)
            end = self._chosen_size + len(masks)
            if end > len(d.masks):
                more = np.zeros(2 * end, np.uint8)
                more[: self._chosen_size] = d.masks[: self._chosen_size]
                d = d._replace(masks=more)
            d.masks[self._chosen_size : end] = masks
            self._chosen[key], self._chosen_size = self._chosen_size, end
        row[MASKS] = self._chosen[key]
        return d


# ---- the machine --------------------------------------------------------------------------------------


def _new_drive(p: CsdParams, n_tags: int) -> Drive:
    def zeros(*shape: int) -> Array:
        return np.zeros(shape, np.int64)

    k, units = p.kernels, len(arch.unit_names(p)) + len(arch.SYSTEM_UNITS)
    activity = zeros(n_tags + 1, units, 1 + len(arch.CAUSES))
    d = Drive(
        code=zeros(1, CODE_COLUMNS), pages=np.zeros(0, np.uint32), masks=np.zeros(0, np.uint8), log=zeros(1, 3),
        flash=new_channels(p, k + 1, activity, KERNEL + k, (ARRAY, IDLE, IDLE)), kernels=zeros(k, KERNEL_COLUMNS),
        filters=zeros(k, FILTER_COLUMNS), shares=zeros(3, 5), wants=zeros(3, k), one=zeros(SCALARS),
        queue=zeros(2, p.command_queue), level=zeros(2), head=zeros(2), charge=zeros(units, 3), activity=activity,
        counters=zeros(n_tags + 1, len(COUNTERS)),
    )  # fmt: skip
    d.one[list(WAKES)] = d.kernels[:, K_NEXT] = d.shares[:, S_NEXT] = NEVER
    d.one[MOVER_LOOKS] = NEVER
    d.one[[FETCH_TAG, PUSHED_AT, TOPK_RELEASE, MOVER_BLOCKED]] = -1
    d.charge[:] = (IDLE, n_tags, 0)
    return d


def _grown(d: Drive, n_tags: int) -> Drive:
    """The drive with room for more tags; the row of no tag stays the last."""
    more = {}
    old = len(d.counters) - 1
    for name in ("activity", "counters"):
        table = getattr(d, name)
        more[name] = np.zeros((n_tags + 1, *table.shape[1:]), np.int64)
        more[name][:old], more[name][-1] = table[:old], table[old]
    d.charge[d.charge[:, 1] == old, 1] = n_tags
    return d._replace(flash=grown_channels(d.flash, more["activity"]), **more)


class _Machine:
    """The drive between two blocks."""

    def __init__(self, p: CsdParams, n_tags: int) -> None:
        self._p = p
        self.memory = Memory()
        self.drive = _new_drive(p, n_tags)

    def execute(self, ahead: _Ahead, last: bool) -> Array:
        """Execute a block; returns first tick and end of each of its commands, [n, 2]."""
        d = self.drive
        highest = int(ahead.code[:-1, TAG].max(initial=-1)) + 1
        if highest > len(d.counters) - 1:
            d = _grown(d, highest)
        # What GPU and link have not done yet stands in front, as the decoder may wait for it.
        pending = np.isin(d.code[:, OP], (GPU, LINK)) & (d.log[:, LOG_END] > d.one[NOW])
        before = int(pending.sum())
        ahead.begin(d.code[pending], FINISH if last else PAUSE)
        log = np.zeros((len(ahead.code), d.log.shape[1]), np.int64)
        log[:before] = d.log[pending]
        d = d._replace(code=ahead.code, log=log)
        d.one[INDEX] = before
        d.one[[GPU_ROW, LINK_ROW]] = 0
        d.one[RESUMED] = -1
        self.memory.begin(d.code)
        while True:
            d = ahead.place(d)
            csd_drive.run(self._p, d)
            if d.one[STUCK]:
                raise AssertionError(f"the drive waits for ever from tick {int(d.one[NOW])} on")
            if d.one[INDEX] == len(d.code) - 1:
                break
            if d.one[STOPPED] == _AT_REST:
                self.memory.advance(d, ahead)
        self.drive = d
        return log[before:-1, [LOG_FIRST, LOG_END]]

    def finish(self) -> int:
        """Account for all ticks; returns how many there are."""
        end = int(self.drive.one[NOW]) + 1
        csd_drive.finish(self.drive, end)
        return end


def _pieces(p: CsdParams, program: Program, tables: Tables, labels: list[str]) -> Iterator[tuple[int, Array]]:
    """Segments with their repetitions, checked; those of what is cached are done here. `labels` gets theirs."""
    begun = False
    for number, segment in enumerate(program.segments):
        code = segment.regions["code"]
        labels.append(segment.label)
        arch.check(p, code, f"segment {number}, ")
        if segment.label != arch.CACHED:
            begun = True
        elif begun:
            raise ValueError(f"segment {number}: what is {arch.CACHED} must come before everything else")
        for _ in range(segment.repeat):
            if begun:
                yield number, code
            else:
                _fill(p, tables, number, code)


def simulate(
    p: CsdParams,
    program: Program,
    *,
    decisions: Decisions | Mapping[str, Any] | None = None,
    fold: bool = True,
    progress: Progress | None = None,
    steps: int = 0,
    trace: int = 0,
) -> Timeline:
    """Run a program on the cycle model.

    `decisions` are what heads select: those of an interpreter, {"selections": [Selection, ...]}, or else drawn. With
    `fold` what a drive at rest has done before is not simulated again; the integers are the same. `trace` keeps that many commands. `steps` is what `progress` counts up to.
    Raises ValueError for a command outside the machine, or one whose pages are not there, naming segment and index.
    """
    if not isinstance(decisions, Decisions):
        recorded = None if decisions is None else decisions.get("selections")
        decisions = Decisions.drawn(p) if recorded is None else Decisions.recorded(p, recorded)
    tags = list(program.tags)
    tables = Tables(p)
    machine = _Machine(p, len(tags))
    beside = Beside(p, tables, machine.memory, _new_drive) if fold else None
    waiting: deque[_Ahead] = deque()
    spans: dict[int, Array] = {}
    logs: list[Array] = []
    labels: list[str] = []
    kept = 0

    def look() -> None:
        """What waits is known up to what must wait for others."""
        for ahead in waiting:
            if not ahead.look(beside):
                return

    def execute(last: bool) -> None:
        nonlocal kept
        look()
        ahead = waiting.popleft()
        ticks, block = machine.execute(ahead, last), ahead.block
        for piece in block.pieces:
            own, ticks = ticks[: len(piece.code)], ticks[len(piece.code) :]
            if len(own):
                rows = fold_spans(piece.code["tag"].astype(np.int64), own[:, 0], own[:, 1], piece.segment)
                spans[piece.segment] = _joined(spans.get(piece.segment), rows)
            if kept < trace:
                logs.append(_log(piece, own)[: trace - kept])
                kept += len(logs[-1])
        if progress and block.pieces:
            progress(block.pieces[-1].segment + 1, steps)

    try:
        block = _Block(p, decisions, fold)
        for number, code in _pieces(p, program, tables, labels):
            if block.pieces and len(code) and code["op"][0] == arch.OP["CONFIG"]:
                waiting.append(_Ahead(p, tables, decisions, block))
                if len(waiting) > _WAITING:
                    execute(False)
                block = _Block(p, decisions, fold)
            block.add(number, code)
        waiting.append(_Ahead(p, tables, decisions, block))
        while waiting:
            execute(len(waiting) == 1)
    finally:
        if beside is not None:
            beside.end()
    end = machine.finish()
    d = machine.drive
    tags += [f"tag {i}" for i in range(len(tags), len(d.counters) - 1)]
    return Timeline(
        ticks=end,
        tags=tags,
        spans=np.concatenate([np.zeros(0, SPAN), *spans.values()]),
        counter_names=COUNTERS,
        counters=d.counters,
        units=(*arch.unit_names(p), *arch.SYSTEM_UNITS),
        causes=arch.CAUSES,
        activity=d.activity,
        labels=labels,
        events=int(d.flash.totals.sum()),
        log=np.concatenate([np.zeros(0, LOG), *logs]) if trace else None,
        waiting=arch.WAITING,
    )


def _joined(before: Array | None, rows: Array) -> Array:
    """Rows of SPAN of a segment with one more repetition."""
    if before is None:
        return rows
    before["end"] = rows["end"]
    before["ticks"] += rows["ticks"]
    before["count"] += rows["count"]
    return before


def _log(piece: _Piece, ticks: Array) -> Array:
    """Rows of LOG."""
    out = np.zeros(len(piece.code), LOG)
    out["segment"], out["index"] = piece.segment, np.arange(len(out))
    out["tag"], out["op"] = piece.code["tag"], piece.code["op"]
    out["first"] = out["start"] = ticks[:, 0]
    out["complete"] = out["end"] = ticks[:, 1]
    return out
