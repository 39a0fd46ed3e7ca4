"""A LUT core in time: a Program in, a Timeline out.

The rules, which the RTL implements anew (`rtl/lut/`). A tick in which something happens is the one whose edge
ends it; "complete at C" means that others find it so from tick C on.

- The sequencer dispatches at most one instruction a tick, in order: not before `not_before`, and not while its
  unit holds `queue_depth` instructions that are not complete. The unit can act on it from the next tick on.
- Load, compute and store each take their instructions in order. One begins when none of another unit's earlier
  ones that it conflicts with is incomplete: those that use the same half of a buffer, and loads and stores whose
  lines overlap.
- Memory gives a core its share: level l works on tick t iff (t * p) mod q < p.
- A load asks for one line in each tick on which its level works. A line arrives `latency` ticks later, lines
  in order and at most one a tick. Complete `load_drain` ticks after its last line arrived.
- An LMMA issues one plane a tick: for every m-tile, n-tile, group and plane. Complete `compute_drain` ticks
  after the last.
- A store reads its first result tile in one tick, then sends one line in each tick on which its level works.
  Complete `latency` + 1 ticks after the last, and after the store before it.
- Ordinary units work for max(operations / rate, bytes / bandwidth) ticks, each rounded up, after `launch` ticks.
  They begin when everything before is complete, and nothing is dispatched meanwhile; an instruction with
  `alongside` only follows the ordinary one before it.
- The run ends with one tick of the sequencer when everything is complete.

A tick in which the sequencer waits belongs to the tag of the instruction that it waits for, any other tick of a
unit to the one that it works for or will work for next.

No timing depends on data. With `fold` an instruction is a closed form, and repetitions of a segment that find
all state as the one before did are one step; without, every line and every tile is an event.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from tilewright.arch import lut as arch
from tilewright.arch.isa import Program
from tilewright.arch.scenario import Progress
from tilewright.arch.timeline import SPAN, Timeline, fold_spans
from tilewright.arch.trace import LOG
from tilewright.sim.cache import INNER

# Literals of this file: a cached kernel would keep the old value of a constant changed elsewhere.
_SEQUENCER, _LOAD, _COMPUTE, _STORE, _ORDINARY = range(5)
_BUSY, _OPERANDS, _RELEASE, _FETCH, _RATE, _LAUNCH, _ARRIVAL, _QUEUE, _WAIT, _DRAIN, _IDLE = range(11)
_LOAD_A, _LOAD_W, _LMMA, _STORE_OP, _ORDINARY_OP = range(5)
_LINES, _STORES, _TABLE_ROWS, _TABLE_READS, _PLANES, _TILES, _OPS, _BYTES = 0, 2, 4, 5, 6, 7, 8, 11
assert arch.UNITS == ("sequencer", "load", "compute", "store", "ordinary")
assert ("busy", *arch.CAUSES) == (
    *("busy", "operands", "release", "fetch", "rate", "launch", "arrival", "queue", "wait", "drain", "idle"),
)
assert [arch.OP[o] for o in ("LOAD_A", "LOAD_W", "LMMA", "STORE", "ORDINARY")] == list(range(5))
_COUNTERS = (*arch.COUNTERS, *arch.ORDINARY_COUNTERS)
assert [_COUNTERS.index(c) for c in ("dram_lines", "dram_stores", "table_rows", "table_reads", "planes")] == [
    *(_LINES, _STORES, _TABLE_ROWS, _TABLE_READS, _PLANES)
]
assert [_COUNTERS.index(c) for c in ("result_tiles", "vector_ops", "ordinary_dram_bytes")] == [
    *(_TILES, _OPS, _BYTES)
]

# Rows of Machine.halves: the tick at which the last ... of each half is complete.
_LOADED_A, _LOADED_W, _USED_A, _USED_W, _COMPUTED, _STORED = range(6)


class Machine(NamedTuple):
    """State of a run. Ticks of things that have not happened yet are 0, which delays nothing."""

    now: np.ndarray  # int64[1]: the first tick in which the sequencer holds the next instruction
    free: np.ndarray  # int64[units]: the tick after the unit's last issue, up to which it is accounted for
    complete: np.ndarray  # int64[units]: when its last instruction is complete
    arrival: np.ndarray  # int64[1]: the tick in which the last line asked for arrives
    halves: np.ndarray  # int64[6, 2]
    entered: np.ndarray  # int64[units]: instructions so far
    window: (
        np.ndarray
    )  # int64[units, queue_depth]: when the last ones are complete; instruction i at i mod depth
    tag: np.ndarray  # int64[units, queue_depth]: the tag of each of them
    lines: np.ndarray  # int64[units, queue_depth, 2]: the memory lines that each of them uses, first and end
    activity: np.ndarray  # int64[tags + 1, units, busy + causes]; the last row belongs to no tag
    counters: np.ndarray  # int64[tags + 1, counters]


# ---- rates --------------------------------------------------------------------------------------------


@njit(**INNER)
def _times(k, a, b):
    """ceil(k * a / b) without leaving int64, for a, b below 2**31."""
    return k // b * a + (k % b * a + b - 1) // b


@njit(**INNER)
def _worked(t, p, q):
    """Ticks before t on which a domain of ratio p/q works: number k of them, from 0, is tick ceil(k * q / p)."""
    if t == 0:
        return 0
    return (t - 1) // q * p + (t - 1) % q * p // q + 1


@njit(**INNER)
def next_working(t, p, q):
    """First tick >= t on which the domain of ratio p/q works: (t * p) mod q < p."""
    return _times(_worked(t, p, q), q, p)


# ---- units --------------------------------------------------------------------------------------------


@njit(**INNER)
def _dispatch(m, unit, arrived, depth):
    """The tick of dispatch of an instruction that the sequencer may dispatch from `arrived` on.

    Until then it waits for an older one, which is charged.
    """
    slot = m.entered[unit] % depth
    tick = max(arrived, m.window[unit, slot])
    m.activity[m.tag[unit, slot], _SEQUENCER, _QUEUE] += tick - arrived
    return tick


@njit(cache=True)
def _await(m, tick, end, cause):
    """The sequencer waits from `tick` to `end` until all is complete; always for the next one to complete."""
    while tick < end:
        following, tag = end, 0
        for unit in range(_LOAD, _ORDINARY + 1):
            for slot in range(m.window.shape[1]):
                if tick < m.window[unit, slot] <= following:
                    following, tag = m.window[unit, slot], m.tag[unit, slot]
        m.activity[tag, _SEQUENCER, cause] += following - tick
        tick = following


@njit(**INNER)
def _take(m, unit, visible, operands, release, row):
    """The tick in which a unit may begin its next instruction: up to it, all is accounted for."""
    if visible > m.free[unit]:
        drained = min(max(m.complete[unit], m.free[unit]), visible)
        row[_DRAIN] += drained - m.free[unit]
        row[_IDLE] += visible - drained
    tick = max(visible, m.free[unit])
    if operands > tick:
        row[_OPERANDS] += operands - tick
        tick = operands
    if release > tick:
        row[_RELEASE] += release - tick
        tick = release
    return tick


@njit(**INNER)
def _overlap(m, unit, first, end):
    """When every instruction of `unit` that may be incomplete and uses lines first..end is complete."""
    out = 0
    for slot in range(m.lines.shape[1]):
        if m.lines[unit, slot, 0] < end and first < m.lines[unit, slot, 1]:
            out = max(out, m.window[unit, slot])
    return out


@njit(**INNER)
def _enter(m, unit, tag, complete, first, end):
    slot = m.entered[unit] % m.window.shape[1]
    m.window[unit, slot], m.tag[unit, slot] = complete, tag
    m.lines[unit, slot, 0], m.lines[unit, slot, 1] = first, end
    m.entered[unit] += 1
    m.complete[unit] = complete


@njit(**INNER)
def _move(tick, lines, p, q, latency, arrival, fold, row):
    """So many lines from `tick` on, one in each tick on which the level works.

    Returns the first and the last of these ticks, and when the last line arrives, the line before the first
    having arrived at `arrival`.
    """
    first = next_working(tick, p, q)
    last = first
    if fold:
        last = _times(_worked(first, p, q) + lines - 1, q, p)
        # Lines that follow a late one arrive tick by tick, until they are late themselves.
        arrival = max(last + latency, arrival + lines)
    else:
        arrival = max(first + latency, arrival + 1)
        steps = q // p
        phase = first % q * p % q
        for _ in range(lines - 1):
            last += steps
            phase += steps * p - q
            if phase < 0:
                last += 1
                phase += p
            arrival = max(last + latency, arrival + 1)
    row[_BUSY] += lines
    row[_RATE] += last + 1 - tick - lines
    return first, last, arrival


@njit(**INNER)
def _planes(m_tiles, n_tiles, groups, bits, fold, counters):
    """Ticks of an LMMA's loop."""
    if fold:
        tiles = m_tiles * n_tiles * groups
        counters[_TABLE_READS] += tiles
        counters[_PLANES] += tiles * bits
        counters[_TILES] += m_tiles * n_tiles
        return tiles * bits
    ticks = 0
    for _i in range(m_tiles):
        for _j in range(n_tiles):
            for _g in range(groups):
                counters[_TABLE_READS] += 1
                counters[_PLANES] += bits
                ticks += bits
            counters[_TILES] += 1
    return ticks


@njit(cache=True)
def _run(p, code, m, log, fold):
    """Execute a segment's instructions; `log` int64[n, 4] takes each one's first, start, complete, end.

    The ticks are those of `arch.trace.LOG`; complete is the tick in which the unit can begin the next.
    """
    depth = p.queue_depth
    for n in range(len(code)):
        i = code[n]
        tag, op, half = i["tag"], np.int64(i["op"]), np.int64(i["half"])
        level, count, line = np.int64(i["level"]), np.int64(i["count"]), np.int64(i["line"])
        P, Q, latency = p.rate_p[level], p.rate_q[level], p.latency[level]
        sequencer, counters = m.activity[tag, _SEQUENCER], m.counters[tag]
        now = m.now[0]
        arrived = max(now, np.int64(i["not_before"]))
        sequencer[_ARRIVAL] += arrived - now
        sequencer[_BUSY] += 1
        if op == _ORDINARY_OP:
            _ordinary(p, i, m, arrived, log, n)
            continue
        unit = _LOAD if op <= _LOAD_W else (_COMPUTE if op == _LMMA else _STORE)
        row = m.activity[tag, unit]
        tick = _dispatch(m, unit, arrived, depth)
        dispatch = tick
        m.now[0] = tick + 1
        first = end = np.int64(0)
        if unit == _LOAD:
            lines = count * p.row_lines if op == _LOAD_A else count
            first, end = line, line + lines
            used = m.halves[_USED_A if op == _LOAD_A else _USED_W, half]
            tick = _take(m, unit, tick + 1, _overlap(m, _STORE, first, end), used, row)
            start, last, arrival = _move(tick, lines, P, Q, latency, m.arrival[0], fold, row)
            m.arrival[0] = arrival
            complete = arrival + p.load_drain
            m.halves[_LOADED_A if op == _LOAD_A else _LOADED_W, half] = complete
            counters[_LINES + level] += lines
            counters[_TABLE_ROWS] += count if op == _LOAD_A else 0
        elif unit == _COMPUTE:
            table, weight, result = np.int64(i["table"]), np.int64(i["weight"]), np.int64(i["result"])
            operands = max(m.halves[_LOADED_A, table], m.halves[_LOADED_W, weight])
            start = _take(m, unit, tick + 1, operands, m.halves[_STORED, result], row)
            ticks = _planes(
                np.int64(i["m_tiles"]),
                np.int64(i["n_tiles"]),
                np.int64(i["groups"]),
                np.int64(i["bits"]),
                fold,
                counters,
            )
            row[_BUSY] += ticks
            last = start + ticks - 1
            complete = last + p.compute_drain
            m.halves[_USED_A, table] = m.halves[_USED_W, weight] = complete
            m.halves[_COMPUTED, result] = complete
        else:
            lines = count * p.tile_lines
            first, end = line, line + lines
            start = _take(m, unit, tick + 1, m.halves[_COMPUTED, half], _overlap(m, _LOAD, first, end), row)
            row[_FETCH] += 1
            _, last, _ = _move(start + 1, lines, P, Q, latency, 0, fold, row)
            complete = max(last + latency, m.complete[unit]) + 1
            m.halves[_STORED, half] = complete
            counters[_STORES + level] += lines
        m.free[unit] = last + 1
        _enter(m, unit, tag, complete, first, end)
        log[n, 0], log[n, 1], log[n, 2], log[n, 3] = dispatch, start, last + 1, complete


@njit(cache=True)
def _ordinary(p, i, m, arrived, log, n):
    """Work of the ordinary units, which the sequencer may dispatch from tick `arrived` on."""
    tag, kind, level = i["tag"], np.int64(i["kind"]), np.int64(i["level"])
    alongside = np.int64(i["alongside"])
    sequencer, row, counters = m.activity[tag, _SEQUENCER], m.activity[tag, _ORDINARY], m.counters[tag]
    ready = m.complete[_ORDINARY] if alongside else m.complete.max()
    dispatch = max(arrived, ready)
    _await(m, arrived, dispatch, _WAIT)
    start = dispatch + 1
    ops, moved = np.int64(i["operations"]), np.int64(i["bytes"])
    compute = _times(ops, p.ops_q[kind], p.ops_p[kind])
    memory = _times(moved, p.bytes_q[level], p.bytes_p[level])
    row[_IDLE] += start - m.free[_ORDINARY]
    row[_LAUNCH] += p.launch
    row[_BUSY] += compute
    row[_RATE] += max(memory - compute, 0)
    counters[_OPS + kind] += ops
    counters[_BYTES + level] += moved
    complete = start + p.launch + max(compute, memory)
    m.free[_ORDINARY] = complete
    _enter(m, _ORDINARY, tag, complete, 0, 0)
    m.now[0] = start
    if not alongside:
        sequencer[_WAIT] += complete - start
        m.now[0] = complete
    log[n, 0], log[n, 1], log[n, 2], log[n, 3] = dispatch, start, complete, complete


@njit(cache=True)
def _finish(m):
    """The last tick of the sequencer, which finds everything complete; returns the ticks of the run."""
    nobody = len(m.activity) - 1
    last = max(m.now[0], m.complete.max())
    _await(m, m.now[0], last, _DRAIN)
    m.activity[nobody, _SEQUENCER, _BUSY] += 1
    for unit in range(_LOAD, _ORDINARY + 1):
        drained = max(m.complete[unit], m.free[unit])
        m.activity[nobody, unit, _DRAIN] += drained - m.free[unit]
        m.activity[nobody, unit, _IDLE] += last + 1 - drained
    return last + 1


# ---- folding of segments ------------------------------------------------------------------------------


def _signature(p: arch.LutParams, m: Machine, units: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """All state that matters to a segment which uses these units and memory levels, relative to the present tick."""
    now = m.now[0]
    order = (m.entered[:, None] + np.arange(p.queue_depth)) % p.queue_depth  # the oldest first
    window = np.maximum(np.take_along_axis(m.window, order, axis=1) - now, 0)
    lines = np.take_along_axis(m.lines, order[:, :, None], axis=1) * (window > 0)[:, :, None]
    return np.concatenate(
        [
            m.free[units] - now,
            m.complete[units] - now,
            np.maximum(m.complete - now, 0),
            np.maximum(m.arrival - now, 0),
            np.maximum(m.halves - now, 0).ravel(),
            window.ravel(),
            (np.take_along_axis(m.tag, order, axis=1) * (window > 0)).ravel(),
            lines.ravel(),
            now % p.rate_q[levels],
        ]
    )


def _segment(
    p: arch.LutParams, code: np.ndarray, repeat: int, m: Machine, ticks: np.ndarray, fold: bool, number: int
) -> np.ndarray:
    """A segment with its repetitions: rows of SPAN."""
    units = np.unique(np.array(arch.UNIT_OF)[code["op"]])
    moving = (code["op"] != arch.OP["LMMA"]) & (code["op"] != arch.OP["ORDINARY"])
    levels = np.unique(code["level"][moving])
    arrives = int(code["not_before"].max(initial=0))
    parts: list[np.ndarray] = []
    # State can only be as it was a repetition ago if that took whole periods of the levels: as the last one did.
    in_phase = len(levels) == 0
    while repeat:
        watched = fold and in_phase and repeat > 1
        began = int(m.now[0])
        if watched:
            before, activity, counters = _signature(p, m, units, levels), m.activity.copy(), m.counters.copy()
        _run(p, code, m, ticks, fold)
        parts.append(fold_spans(code["tag"], ticks[:, 1], ticks[:, 3], number))
        repeat -= 1
        in_phase = not ((m.now[0] - began) % p.rate_q[levels]).any()
        if watched and began >= arrives and np.array_equal(before, _signature(p, m, units, levels)):
            shift = (int(m.now[0]) - began) * repeat
            for table in (m.now, m.arrival, m.halves, m.window):
                table += shift
            # The others are where they are, and accounted for up to there.
            m.free[units] += shift
            m.complete[units] += shift
            m.activity[:] += (m.activity - activity) * repeat
            m.counters[:] += (m.counters - counters) * repeat
            last = parts[-1].copy()
            last["end"] += shift
            last["ticks"] *= repeat
            last["count"] *= repeat
            parts.append(last)
            repeat = 0
    return _joined(parts)


# ---- the machine --------------------------------------------------------------------------------------


def _new_machine(p: arch.LutParams, n_tags: int) -> Machine:
    units = len(arch.UNITS)
    return Machine(
        now=np.zeros(1, np.int64),
        free=np.zeros(units, np.int64),
        complete=np.zeros(units, np.int64),
        arrival=np.zeros(1, np.int64),
        halves=np.zeros((6, 2), np.int64),
        entered=np.zeros(units, np.int64),
        window=np.zeros((units, p.queue_depth), np.int64),
        tag=np.zeros((units, p.queue_depth), np.int64),
        lines=np.zeros((units, p.queue_depth, 2), np.int64),
        activity=np.zeros((n_tags + 1, units, 1 + len(arch.CAUSES)), np.int64),
        counters=np.zeros((n_tags + 1, len(_COUNTERS)), np.int64),
    )


def _grown(m: Machine, n_tags: int) -> Machine:
    """The machine with room for more tags; the row of no tag stays the last."""
    more = {}
    for name in ("activity", "counters"):
        old = getattr(m, name)
        more[name] = np.zeros((n_tags + 1, *old.shape[1:]), np.int64)
        more[name][: len(old) - 1], more[name][-1] = old[:-1], old[-1]
    return m._replace(**more)


def simulate(
    p: arch.LutParams,
    program: Program,
    *,
    decisions: Any = None,
    fold: bool = True,
    progress: Progress | None = None,
    steps: int = 0,
    trace: int = 0,
) -> Timeline:
    """Run a program on the cycle model.

    `fold` takes instructions, and repetitions of a segment that are alike, in one step; the integers are the
    same without. `trace` keeps that many instructions; no repetition is folded before they are complete.
    `steps` is what `progress` counts up to. No timing of this machine depends on data: `decisions` is ignored.
    Raises ValueError for an instruction outside the machine, naming segment and index.
    """
    tags = list(program.tags)
    m = _new_machine(p, len(tags))
    logs: list[np.ndarray] = []
    logged = 0
    spans: list[np.ndarray] = []
    labels: list[str] = []
    for number, segment in enumerate(program.segments):
        code = segment.regions["code"]
        arch.check(p, code, f"segment {number}, ")
        highest = int(code["tag"].max(initial=-1)) + 1
        if highest > len(m.counters) - 1:
            m = _grown(m, highest)
            tags += [f"tag {i}" for i in range(len(tags), highest)]
        ticks = np.zeros((len(code), 4), np.int64)
        left = segment.repeat
        parts = []
        while left and logged < trace:
            parts.append(_segment(p, code, 1, m, ticks, fold, number))
            logs.append(_log(code, ticks, number)[: trace - logged])
            logged += len(logs[-1])
            left -= 1
        if left:
            parts.append(_segment(p, code, left, m, ticks, fold, number))
        spans.append(_joined(parts))
        labels.append(segment.label)
        if progress:
            progress(number + 1, steps)
    end = int(_finish(m))
    return Timeline(
        ticks=end,
        tags=tags,
        spans=np.concatenate(spans) if spans else np.zeros(0, SPAN),
        counter_names=_COUNTERS,
        counters=m.counters,
        units=arch.UNITS,
        causes=arch.CAUSES,
        activity=m.activity,
        labels=labels,
        events=int(m.counters[:, [*range(_TABLE_ROWS), _TABLE_READS]].sum()),
        log=np.concatenate([np.zeros(0, LOG), *logs]) if trace else None,
        waiting=arch.WAITING,
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Rows of SPAN of a segment from those of its repetitions in order."""
    out = parts[0].copy()
    for rows in parts[1:]:
        out["end"] = rows["end"]
        out["ticks"] += rows["ticks"]
        out["count"] += rows["count"]
    return out


def _log(code: np.ndarray, ticks: np.ndarray, segment: int) -> np.ndarray:
    """Rows of LOG from a segment's instructions and their ticks."""
    out = np.zeros(len(code), LOG)
    out["segment"], out["index"] = segment, np.arange(len(code))
    out["tag"], out["op"] = code["tag"], code["op"]
    for k, name in enumerate(("first", "start", "complete", "end")):
        out[name] = ticks[:, k]
    return out
