"""A dataflow socket in time: a Program in, a Timeline out.

The rules are those of `rtl.rdu`, which implements them anew: of operations those of its sequencer, of a kernel those
of its units, switches, links and channels, tick for tick. `sim.rdu_build` lays out what a kernel runs on and
`sim.rdu_engine` steps it, `sim.rdu_periods` leaps over what recurs.

No timing depends on data, nor on addresses but for their place within a line, unless a memory's banks are timed: a kernel
is a pure function of its configuration, then also of its arguments. With `fold` equal kernels are run once, different ones
on as many cores as there are, links without a choice are joined, and where all state of a kernel recurs, its periods are
taken in one step, as many as no counter ends in. The integers are the same without.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Event
from typing import Any, Self

import numpy as np

from tilewright.arch import rdu as arch
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program, Segment
from tilewright.arch.scenario import Progress
from tilewright.arch.timeline import SPAN, Timeline, fold_spans
from tilewright.arch.trace import LOG
from tilewright.sim import rdu_state as state
from tilewright.sim.rdu_build import Kernel, build
from tilewright.sim.rdu_engine import close
from tilewright.sim.rdu_periods import run_kernel
from tilewright.sim.rdu_waits import standstill
from tilewright.sim.rdu_ways import Tables, switch_tables

_OPS = tuple(op.name for op in arch.OPS)
_BUSY = 0
_ARRIVAL, _LAUNCH, _MEMORY, _PIPELINE, _IDLE = (
    arch.CAUSE[name] for name in ("arrival", "launch", "memory", "pipeline", "idle")
)
_COUNTER = {name: i for i, name in enumerate(arch.COUNTERS)}
_ROWS = (
    ("activates", state.ACTIVATES),
    ("row_conflicts", state.ROW_CONFLICTS),
    ("refreshes", state.REFRESHES),
)
HOPS = ("vector_hops", "scalar_hops")


@dataclass(frozen=True)
class Execution:
    """What a kernel does once: K + 1 ticks of it are the units'."""

    ticks: int  # K
    units: tuple[str, ...]
    tags: tuple[int, ...]
    activity: np.ndarray  # int64[units, busy + causes]
    busy: np.ndarray  # int64[units, 2]: first tick in which it is, -1 without any, and the last plus 1
    counters: np.ndarray  # int64[units, COUNTERS]


# ---- one kernel ---------------------------------------------------------------------------------------


def execute(
    p: arch.RduParams,
    records: Mapping[str, np.ndarray],
    args: Mapping[int, int] | None = None,
    *,
    older: Tables | None = None,
    fold: bool = True,
) -> Execution:
    """Run what the records configure, from `start` until everything is quiet. See `build` for the arguments.

    Raises UserError for a deadlock, for too many control tokens at an input, and for an access of an AGCU across
    lines.
    """
    return _run(build(p, records, args or {}, older=older, fold=fold), p, fold)


def _run(
    kernel: Kernel,
    p: arch.RduParams,
    fold: bool,
    names: Mapping[str, str] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Execution:
    m = kernel.machine
    run_kernel(m, kernel.bits, fold, stopped)
    if stopped():
        raise CancelledError
    _check(kernel, p, names)
    close(m)
    counters = np.zeros((len(kernel.units), len(arch.COUNTERS)), np.int64)
    for chain, link, network, hops in kernel.routes:
        counters[chain, _COUNTER[f"{arch.NETWORKS[network]}_hops"]] += m.link[link, state.PUSHES] * hops
    for row, (operations, macs) in zip(m.pcu, kernel.work, strict=True):
        steps = m.chain[row[state.UNIT], state.STEPS]
        counters[row[state.UNIT], _COUNTER["iterations"]] = steps
        counters[row[state.UNIT], _COUNTER["lane_ops"]] = steps * operations
        counters[row[state.UNIT], _COUNTER["macs"]] = steps * macs
    for row in m.pmu:
        write, read = row[state.SIDE], row[state.SIDE + 1]
        counters[write, _COUNTER["words_written"]] = row[state.MOVED]
        counters[read, _COUNTER["words_read"]] = row[state.MOVED + 1]
        counters[write, _COUNTER["bank_conflicts"]] = row[state.CONFLICTS]
        counters[write, _COUNTER["dropped"]] = row[state.DROPPED]
    for row, tier in zip(m.agcu, kernel.tiers, strict=True):
        counters[row[state.AGCU], _COUNTER[f"{arch.TIERS[tier]}_lines"]] = row[state.LINES]
        if p.dram[tier, state.TIMED]:
            for name, column in _ROWS:
                counters[row[state.AGCU], _COUNTER[f"{arch.TIERS[tier]}_{name}"]] = row[column]
    return Execution(
        ticks=int(m.clock[state.QUIET] + m.clock[state.SKIPPED]),
        units=kernel.units,
        tags=kernel.tags,
        activity=m.activity,
        busy=m.chain[:, [state.FIRST, state.END]],
        counters=counters,
    )


def _check(kernel: Kernel, p: arch.RduParams, names: Mapping[str, str] | None) -> None:
    """Raise UserError where the kernel went wrong, or has not come to an end; `names` are a mapper's for units."""
    m = kernel.machine
    at = int(m.clock[state.FAULTY])
    if m.clock[state.FAULT] == state.LINE_FAULT:
        raise UserError(
            f"{kernel.units[at]}: an iteration's elements must lie in one line of {p.lanes * arch.WORD_BITS // 8} "
            f"bytes, on multiples of their size"
        )
    many = [i for i, row in enumerate(m.queue) if row[state.GIVEN] - row[state.TAKEN] > arch.TOKENS_HELD]
    if m.clock[state.FAULT] == state.TOKENS_FAULT or many:
        unit, source = kernel.waits[many[0] if many else at]
        raise UserError(
            f"{unit}: more than {arch.TOKENS_HELD} control tokens from {source} are held at one input"
        )
    why = standstill(kernel, names)
    if why:
        last = int(m.clock[state.ACTED] + m.clock[state.SKIPPED])
        raise UserError(f"deadlock after tick {last}: {why}")


# ---- kernels of a program -----------------------------------------------------------------------------


class _Loaded:
    """What the units, switches and argument registers hold."""

    def __init__(self) -> None:
        self.section = -1
        self.records: Mapping[str, np.ndarray] = {}
        self.tables: dict[tuple[int, int, int, int, int], tuple[int, int]] = {}
        self.args: dict[int, int] = {}
        self.digests: dict[int, bytes] = {}
        self.open: set[bytes] = set()  # sections that look up what others left in the tables

    def load(self, section: int, regions: Mapping[str, np.ndarray]) -> int:
        """A segment's configuration takes the place of the last one's. Returns its records."""
        self.tables.update(switch_tables(self.records))
        self.section = section
        self.records = {r.region: regions[r.region] for r in arch.CONFIGS if r.region in regions}
        if section not in self.digests:
            h = hashlib.sha256()
            for name, rows in self.records.items():
                h.update(f"{name} {len(rows)} ".encode())
                h.update(np.ascontiguousarray(rows).tobytes())
            self.digests[section] = h.digest()
        return sum(len(rows) for rows in self.records.values())

    def argue(self, regions: Mapping[str, np.ndarray]) -> int:
        """Argument registers are written. Returns how many."""
        rows = regions.get("args", np.zeros(0, arch.ARGS.dtype))
        self.args.update(zip(rows["index"].tolist(), rows["value"].tolist(), strict=True))
        return len(rows)

    def key(self, p: arch.RduParams) -> tuple:
        """What a kernel of the present configuration depends on, but for tables that others left."""
        digest = self.digests.get(self.section, b"")
        line = p.lanes * arch.WORD_BITS // 8
        gates = self.records.get("config.agcu", np.zeros(0, arch.CONFIG_AGCU.dtype))
        places = tuple(
            self.args.get(int(index), 0) % (1 << 60 if p.dram[int(tier), state.TIMED] else line)
            for index, tier in zip(gates["argument"], gates["tier"], strict=True)
        )
        return digest, places

    def execute(
        self, p: arch.RduParams, ahead: "_Ahead | None", names: Mapping[str, str] | None
    ) -> Execution:
        """What a kernel of the present configuration does; with `ahead` equal ones are run once, and folded."""
        key = self.key(p)
        if ahead is None or key not in ahead.found:
            fold = ahead is not None
            kernel = build(p, self.records, self.args, older=self.tables, fold=fold)
            return _run(kernel, p, fold, names)
        out, own = ahead.found[key].result()
        if not own:  # the next one may find other tables
            del ahead.found[key]
        return out


class _Ahead:
    """The kernels of a program, each run once, several at a time: none depends on when it is launched.

    As a context manager, which stops those that still run.
    """

    def __init__(self, p: arch.RduParams, segments: Sequence[Segment]):
        self.over = Event()
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self.found: dict[tuple, Future[tuple[Execution, bool]]] = {}
        loaded = _Loaded()
        for segment in segments:
            for row in segment.regions.get("code", ()):
                op, section = _OPS[int(row["op"])], int(row["section"])
                if op == "KERNEL_EXECUTE":
                    key = loaded.key(p)
                    if key not in self.found:
                        state = loaded.records, dict(loaded.args), dict(loaded.tables)
                        names = segments[loaded.section].names
                        self.found[key] = self.pool.submit(self._run, p, *state, names)
                elif op == "PROGRAM_LOAD" and section < len(segments):
                    loaded.load(section, segments[section].regions)
                elif op == "ARGUMENT_LOAD" and section < len(segments):
                    loaded.argue(segments[section].regions)

    def _run(self, p: arch.RduParams, *state: Any) -> tuple[Execution, bool]:
        records, args, older, names = state
        kernel = build(p, records, args, older=older)
        return _run(kernel, p, True, names, self.over.is_set), kernel.own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.pool.shutdown(cancel_futures=True)


# ---- the sequencer ------------------------------------------------------------------------------------


class _Run:
    """A run so far: the sequencer's and the DMA's ticks, and what the units did."""

    def __init__(self, p: arch.RduParams, tags: int):
        self.p = p
        self.now = 0
        self.dma_idle = 0  # first tick in which the DMA is idle again
        self.activity: dict[str, np.ndarray] = {}
        self.outside = np.zeros((tags + 1, 1 + len(arch.CAUSES)), np.int64)
        self.counters = np.zeros((tags + 1, len(arch.COUNTERS)), np.int64)
        self.tags = tags

    def unit(self, name: str) -> np.ndarray:
        """The unit's ticks, int64[tags + 1, busy + causes]."""
        if name not in self.activity:
            self.activity[name] = np.zeros((self.tags + 1, 1 + len(arch.CAUSES)), np.int64)
        return self.activity[name]

    def charge(self, tag: int, sequencer: int, outside: int, ticks: int) -> None:
        """So many ticks of the sequencer, and of all units outside kernels."""
        self.unit("sequencer")[tag, sequencer] += ticks
        self.outside[tag, outside] += ticks
        self.now += ticks

    def wait(self, tag: int, not_before: int, dma: bool) -> None:
        """Up to the tick of an operation's issue."""
        self.charge(-1, _ARRIVAL, _ARRIVAL, max(not_before - self.now, 0))
        if dma:
            self.charge(tag, _MEMORY, _IDLE, max(self.dma_idle - self.now, 0))

    def copy(self, row: np.void) -> int:
        """The DMA moves lines from the next tick on. Returns the tick in which it is idle again."""
        p, tag = self.p, int(row["tag"])
        lines, start = int(row["lines"]), self.now
        beats = -(-lines // p.copy_lines)
        last = -(-(beats - 1) * p.copy_q // p.copy_p)  # of the beats that it asks for
        latency = int(p.latency[int(row["source"])])
        dma = self.unit("dma")
        dma[-1, _IDLE] += start - self.dma_idle
        ticks = last + latency + 2 if lines else 1
        dma[tag, _BUSY] += beats
        dma[tag, _MEMORY] += last + 1 - beats if lines else 0
        dma[tag, _PIPELINE] += ticks - (last + 1 if lines else 0)
        self.counters[tag, _COUNTER["copied_lines"]] += lines
        self.dma_idle = start + ticks
        return self.dma_idle


def simulate(
    p: arch.RduParams,
    program: Program,
    *,
    fold: bool = True,
    progress: Progress | None = None,
    steps: int = 0,
    trace: int = 0,
    decisions: Any = None,
) -> Timeline:
    """Run a program on the cycle model.

    `fold` takes equal kernels, links without a choice, and a kernel's periods in one step; the integers are the same
    without. `trace` keeps that many operations. `steps` is what `progress` counts up to. No timing of this machine
    depends on data: `decisions` is ignored. Raises UserError for a program that the machine can't run, naming segment
    and operation, and for a deadlock, naming a circle of units and streams that wait for one another, by the segments' names.
    """
    segments = list(program.segments)
    with _Ahead(p, segments) if fold else nullcontext() as ahead:
        return _simulate(p, program, segments, ahead, progress, steps, trace)


def _simulate(
    p: arch.RduParams,
    program: Program,
    segments: Sequence[Segment],
    ahead: _Ahead | None,
    progress: Progress | None,
    steps: int,
    trace: int,
) -> Timeline:
    regions = [segment.regions for segment in segments]
    highest = max(
        (int(r[f]["tag"].max(initial=-1)) for r in regions for f in r if "tag" in (r[f].dtype.names or ())),
        default=-1,
    )
    n_tags = max(len(program.tags), highest + 1)
    run = _Run(p, n_tags)
    run.unit("sequencer")
    run.unit("dma")
    machine = _Loaded()
    spans: list[np.ndarray] = []
    logs: list[tuple[int, int, int, int, int, int]] = []
    inside = 0  # ticks of kernels so far
    ran: dict[str, int] = {}  # of each unit, ticks of kernels for which it spoke for itself
    for number, segment in enumerate(segments):
        code = segment.regions.get("code", np.zeros(0, arch.CODE.dtype))
        rows: list[tuple[int, int, int]] = []
        for _ in range(segment.repeat):
            for index, row in enumerate(code):
                op, tag = _OPS[int(row["op"])], int(row["tag"])
                where = f"segment {number}, operation {index} ({op})"
                run.wait(tag, int(row["not_before"]), op in ("COPY", "WAIT"))
                issued = run.now
                loads = op in ("PROGRAM_LOAD", "ARGUMENT_LOAD")
                kernel = op == "KERNEL_EXECUTE"
                run.charge(tag, _BUSY, _LAUNCH if loads or kernel else _IDLE, 1)
                end = run.now
                if loads:
                    section = int(row["section"])
                    if section >= len(segments):
                        raise UserError(f"{where}: section must be in 0..{len(segments) - 1}, not {section}")
                    if op == "PROGRAM_LOAD":
                        count = machine.load(section, regions[section])
                        latency = p.program_load
                    else:
                        count = machine.argue(regions[section])
                        latency = p.argument_load
                    run.charge(tag, _LAUNCH, _LAUNCH, latency)
                    run.charge(tag, _BUSY, _LAUNCH, count)
                    end = run.now
                elif kernel:
                    run.charge(tag, _LAUNCH, _LAUNCH, p.host_launch if row["host"] else p.hardware_launch)
                    try:
                        did = machine.execute(p, ahead, segments[machine.section].names)
                    except UserError as error:
                        raise UserError(f"{where}: {error}") from None
                    for unit, own, activity, busy, counts in zip(
                        did.units, did.tags, did.activity, did.busy, did.counters, strict=True
                    ):
                        run.unit(unit)[own] += activity
                        ran[unit] = ran.get(unit, 0) + did.ticks + 1
                        run.counters[own] += counts
                        if busy[0] >= 0:
                            rows.append((own, run.now + int(busy[0]), run.now + int(busy[1])))
                    run.counters[tag, _COUNTER["launches"]] += 1
                    run.unit("sequencer")[tag, _PIPELINE] += did.ticks + 1
                    inside += did.ticks + 1
                    run.now += did.ticks + 1
                    end = run.now
                elif op == "COPY":
                    _check_copy(p, row, where)
                    end = run.copy(row)
                rows.append((tag, issued, end))
                if len(logs) < trace:
                    logs.append((number, index, tag, int(row["op"]), issued, end))
        if rows:
            tag_log, firsts, ends = np.array(rows, np.int64).T
            spans.append(fold_spans(tag_log, firsts, ends, number))
        if progress:
            progress(number + 1, steps)
    run.charge(-1, _MEMORY, _IDLE, max(run.dma_idle - run.now, 0))
    run.charge(-1, _BUSY, _IDLE, 1)
    run.unit("dma")[-1, _IDLE] += run.now - run.dma_idle
    # Outside its kernels a unit has nothing to do; in those of sections that it is not part of, neither.
    units = tuple(sorted((u for r in regions for u in _configured(r)), key=_order(p)))
    units = ("sequencer", "dma", *dict.fromkeys(units))
    for unit in units[2:]:
        run.unit(unit)[:] += run.outside
        run.unit(unit)[-1, _IDLE] += inside - ran.get(unit, 0)
    activity = np.stack([run.unit(unit) for unit in units], axis=1)
    return Timeline(
        ticks=run.now,
        tags=[*program.tags, *(f"tag {i}" for i in range(len(program.tags), n_tags))],
        spans=np.concatenate(spans) if spans else np.zeros(0, SPAN),
        counter_names=arch.COUNTERS,
        counters=run.counters,
        units=units,
        causes=arch.CAUSES,
        activity=activity,
        labels=[segment.label for segment in segments],
        # Iterations of units, and packets by link.
        events=int(activity[:, :, _BUSY].sum() + run.counters[:, [_COUNTER[name] for name in HOPS]].sum()),
        log=_log(logs) if trace else None,
        waiting=("operand", "token", "launch", "arrival", "pipeline", "idle"),
    )


def _configured(regions: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the units with a configuration record."""

    def places(region: str) -> list[str]:
        rows = regions.get(region)
        return [] if rows is None else [f"{x},{y}" for x, y in zip(rows["x"], rows["y"], strict=True)]

    gates = regions.get("config.agcu")
    return [
        *(f"pcu@{place}" for place in places("config.pcu")),
        *(f"pmu.{side}@{place}" for place in places("config.pmu") for side in ("write", "read")),
        *([] if gates is None else [f"agcu@{i}" for i in gates["agcu"]]),
    ]


def _order(p: arch.RduParams) -> Any:
    """Units row by row, then AGCUs."""

    def key(name: str) -> tuple[int, int, int]:
        kind, _, place = name.partition("@")
        if kind == "agcu":
            return 1, int(place), 0
        x, y = map(int, place.split(","))
        return 0, y * p.columns + x, int(kind == "pmu.read")

    return key


def _check_copy(p: arch.RduParams, row: np.void, where: str) -> None:
    for tier, first in (("source", "from"), ("target", "to")):
        k = int(row[tier])
        if k >= 2:
            raise UserError(f"{where}: {tier} must be hbm or ddr, not {arch.TIERS[k]}")
        if int(row[first]) + int(row["lines"]) > p.tier_lines[k]:
            raise UserError(
                f"{where}: {first} {int(row[first])} and lines {int(row['lines'])} reach beyond the "
                f"{int(p.tier_lines[k])} lines of {arch.TIERS[k]}"
            )


def _log(rows: list[tuple[int, int, int, int, int, int]]) -> np.ndarray:
    """Rows of LOG."""
    out = np.zeros(len(rows), LOG)
    for k, (segment, index, tag, op, first, end) in enumerate(rows):
        out[k] = (segment, index, tag, op, first, first, end, end)
    return out
