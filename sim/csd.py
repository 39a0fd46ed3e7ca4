"""A GPU with a drive in time: a Program in, a Timeline out.

`sim/csd_drive.py` says what happens on which tick. Here commands are given the numbers of their pages, which follow
from the order of the program alone (`arch.csd_pages.PageTables`), and the masks of what heads select. That is done block
by block: a CONFIG waits until the drive is at rest, so that nothing but GPU and link reaches from one block into the next.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from tilewright.arch import csd as arch
from tilewright.arch.csd import CsdParams
from tilewright.arch.csd_pages import Decisions, PageTables, Places
from tilewright.arch.isa import Program
from tilewright.arch.scenario import Progress
from tilewright.arch.timeline import SPAN, Timeline, fold_spans
from tilewright.arch.trace import LOG
from tilewright.sim import csd_drive
from tilewright.sim.csd_flash import grown_channels, new_channels
from tilewright.sim.csd_fold import Content, Memory, content_of, mark
from tilewright.sim.csd_state import (
    ARRAY,
    CODE_COLUMNS,
    COUNTERS,
    FETCH_TAG,
    FIELDS,
    FILTER_COLUMNS,
    FINISH,
    GPU,
    GPU_ROW,
    IDLE,
    INDEX,
    K_NEXT,
    KERNEL,
    KERNEL_COLUMNS,
    LINK,
    LINK_ROW,
    LOG_END,
    LOG_FIRST,
    MASKS,
    MOVER_BLOCKED,
    MOVER_LOOKS,
    NEVER,
    NOW,
    OP,
    PAGES,
    PAGES2,
    PAUSE,
    PUSHED_AT,
    RESUMED,
    S_NEXT,
    SCALARS,
    SETTINGS,
    STUCK,
    TAG,
    TOPK_RELEASE,
    WAKES,
    Drive,
)

Array = np.ndarray
_SPARF = arch.ATTENTIONS.index("sparf")


# ---- commands -----------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """One repetition of a segment."""

    segment: int
    code: Array  # records of the program
    rows: Array  # of Drive.code


class _Block:
    """Pieces that are executed without a pause, with the pages and masks of their commands."""

    def __init__(self, p: CsdParams, tables: PageTables, decisions: Decisions, fold: bool) -> None:
        self._p, self._tables, self._decisions, self._fold = p, tables, decisions, fold
        self.pieces: list[_Piece] = []
        self.contents: list[Content] = []  # of all commands, for folding
        self._places: list[Places] = []  # of the present one
        self._digests: dict[int, bytes] = {}  # of masks by where they begin
        self._pages: list[Array] = []
        self._masks: list[Array] = []
        self._page_count = self._mask_count = 0
        self._drawn: dict[tuple[int, ...], int] = {}

    def add(self, segment: int, code: Array) -> None:
        """Raises ValueError for a command that reads or writes pages that it may not, and for missing decisions."""
        rows = np.zeros((len(code), CODE_COLUMNS), np.int64)
        of = arch.configurations(code)
        for column, name in enumerate(FIELDS):
            rows[:, column] = code[name]
        for column, name in enumerate(SETTINGS, len(FIELDS)):
            rows[:, column] = np.where(of >= 0, code[name][np.maximum(of, 0)], 0)
        if self._fold:
            mark(rows)
        for i, record in enumerate(code):
            self._places = []
            with _named(segment, i, record):
                selects = self._place(rows[i], code[of[i]], record)
            if self._fold:
                mask = self._digests[int(rows[i, MASKS])] if selects else b""
                self.contents.append(content_of(self._p, rows[i], self._places, mask))
        self.pieces.append(_Piece(segment, code, rows))

    def _place(self, row: Array, config: Any, record: Any) -> bool:
        """Where the command's pages and masks are; returns whether it has masks."""
        op, slot, heads = int(record["op"]), int(record["slot"]), int(record["heads"])
        first, tokens, form = int(record["first"]), int(record["tokens"]), int(record["form"])
        tables, selects = self._tables, False
        row[PAGES], row[PAGES2] = self._page_count, self._page_count
        if op == arch.OP["ATTEND"]:
            row[PAGES] = self._keep(tables.token_pages(config, slot, heads, tokens))
            selects = int(config["attention"]) == _SPARF and int(config["k"]) < tokens
            if selects:
                row[PAGES2] = self._keep(tables.channel_pages(config, slot, heads, int(record["spans"])))
            row[MASKS] = self._select(config, record, selects)
        elif op == arch.OP["WRITE"] and form == arch.FORMS.index("tokens"):
            row[PAGES2] = self._keep(tables.write_tokens(config, slot, heads, first, tokens))
        elif op == arch.OP["WRITE"]:
            row[PAGES2] = self._keep(tables.write_channels(config, slot, heads, first))
        elif op == arch.OP["TRANSPOSE"]:
            read, given = tables.transpose(config, slot, heads, first)
            row[PAGES], row[PAGES2] = self._keep(read), self._keep(given)
        elif op == arch.OP["READ"]:
            row[PAGES] = self._keep(tables.read(config, form, slot, heads, first, int(record["count"])))
        elif op == arch.OP["RECLAIM"]:
            row[PAGES2] = self._keep(tables.reclaim(int(record["count"])))
        return selects

    def _keep(self, places: Places) -> int:
        """Keep the pages' numbers; returns where they begin."""
        begin = self._page_count
        self._places.append(places)
        self._pages.append(places.number.ravel().astype(np.uint32))
        self._page_count += places.number.size
        return begin

    def _select(self, config: Any, record: Any, selects: bool) -> int:
        """Keep the masks of an ATTEND, or find those that are alike; returns where they begin."""
        key: tuple[int, ...] | None = None
        if self._decisions.by_pattern:
            if not selects:
                return 0
            turn = int(record["slot"]) % self._p.patterns
            fields = ("d", "r", "k", "local")
            key = (turn, int(record["heads"]), int(record["tokens"]), *(int(config[f]) for f in fields))
            if key in self._drawn:
                return self._drawn[key]
        selection = self._decisions.of(config, record)
        if not selects:
            return 0
        begin = self._mask_count
        masks = np.concatenate([selection.channels, selection.tokens], axis=1).astype(np.uint8)
        self._masks.append(masks.ravel())
        self._digests[begin] = hashlib.blake2b(masks.tobytes(), digest_size=16).digest()
        self._mask_count += masks.size
        if key is not None:
            self._drawn[key] = begin
        return begin

    def arrays(self) -> tuple[Array, Array]:
        """`Drive.pages` and `Drive.masks`."""
        return (
            np.concatenate([np.zeros(0, np.uint32), *self._pages]),
            np.concatenate([np.zeros(0, np.uint8), *self._masks]),
        )


@contextmanager
def _named(segment: int, index: int, record: Any) -> Iterator[None]:
    """Says which command a ValueError is about."""
    try:
        yield
    except ValueError as error:
        name = arch.OPS[int(record["op"])].name
        raise ValueError(f"segment {segment}, command {index} ({name}): {error}") from None


def _fill(p: CsdParams, tables: PageTables, segment: int, code: Array) -> None:
    """What the drive holds when the run begins."""
    of = arch.configurations(code)
    for i, record in enumerate(code):
        with _named(segment, i, record):
            if arch.OPS[int(record["op"])].name not in ("CONFIG", "WRITE"):
                raise ValueError(f"a segment labelled {arch.CACHED} must hold CONFIG and WRITE only")
            tables.command(code[of[i]], record)


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
        self._memory = Memory(p)
        self.drive = _new_drive(p, n_tags)

    def execute(self, block: _Block, last: bool) -> Array:
        """Execute a block; returns first tick and end of each of its commands, [n, 2]."""
        d = self.drive
        rows = np.concatenate([piece.rows for piece in block.pieces]) if block.pieces else d.code[:0]
        highest = int(rows[:, TAG].max(initial=-1)) + 1
        if highest > len(d.counters) - 1:
            d = _grown(d, highest)
        # What GPU and link have not done yet stands in front, as the decoder may wait for it.
        pending = np.isin(d.code[:, OP], (GPU, LINK)) & (d.log[:, LOG_END] > d.one[NOW])
        before = int(pending.sum())
        end = np.zeros((1, CODE_COLUMNS), np.int64)
        end[0, OP] = FINISH if last else PAUSE
        log = np.zeros((before + len(rows) + 1, d.log.shape[1]), np.int64)
        log[:before] = d.log[pending]
        pages, masks = block.arrays()
        d = d._replace(code=np.concatenate([d.code[pending], rows, end]), log=log, pages=pages, masks=masks)
        d.one[INDEX] = before
        d.one[[GPU_ROW, LINK_ROW]] = 0
        d.one[RESUMED] = -1
        self._memory.forget_open()
        while True:
            csd_drive.run(self._p, d)
            if d.one[STUCK]:
                raise AssertionError(f"the drive waits for ever from tick {int(d.one[NOW])} on")
            if d.one[INDEX] == len(d.code) - 1:
                break
            self._memory.advance(d, before, block.contents)
        self.drive = d
        return log[before:-1, [LOG_FIRST, LOG_END]]

    def finish(self) -> int:
        """Account for all ticks; returns how many there are."""
        end = int(self.drive.one[NOW]) + 1
        csd_drive.finish(self.drive, end)
        return end


def _pieces(p: CsdParams, program: Program, tables: PageTables) -> Iterator[tuple[int, Array]]:
    """Segments with their repetitions, checked; those of what is cached are done here."""
    begun = False
    for number, segment in enumerate(program.segments):
        code = segment.regions["code"]
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
    tables = PageTables(p)
    machine = _Machine(p, len(tags))
    spans: dict[int, Array] = {}
    logs: list[Array] = []
    kept = 0

    def execute(block: _Block, last: bool) -> None:
        nonlocal kept
        ticks = machine.execute(block, last)
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

    block = _Block(p, tables, decisions, fold)
    for number, code in _pieces(p, program, tables):
        if block.pieces and len(code) and code["op"][0] == arch.OP["CONFIG"]:
            execute(block, False)
            block = _Block(p, tables, decisions, fold)
        block.add(number, code)
    execute(block, True)
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
        labels=[segment.label for segment in program.segments],
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
