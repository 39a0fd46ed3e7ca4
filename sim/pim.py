"""PIM-GPT in time: a Program in, a Timeline out; every DRAM command of every channel is an event.

The rules, which the RTL implements anew (`rtl/pim/`):

- The sequencer works in the ASIC's clock domain. For each instruction: one working tick to fetch, one to load,
  one to dispatch (not before `not_before`), then it waits until every unit it dispatched to has completed
  and retires it in one more. Instructions never overlap (published machine). A last fetch finds the
  program's end.
- A channel sees the instruction in the tick after the dispatch. In each tick it issues at most one DRAM
  command: the one that the bank states and the instruction ask for next. The first tick in which no
  constraint forbids it, it issues. After the last one the instruction drains, then it is complete.
- Refresh k is due at tick k * n_refi and goes before everything else: open banks are closed, the refresh issues.
- The ASIC works from the domain's next tick on, for the cycles that the operation's passes take.

Channels whose instruction streams have been equal so far have equal states: they are simulated once.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from tilewright.arch import pim as arch
from tilewright.arch.isa import Program
from tilewright.arch.scenario import Progress
from tilewright.arch.timeline import SPAN, Timeline, fold_spans
from tilewright.sim.cache import CALLED, INNER
from tilewright.sim.dram import DramState, charge, new_state, record

# Literals of this file: a cached kernel would keep the old value of a constant changed elsewhere.
_ACT, _ACTAB, _PRE, _PREAB, _RD, _WR, _MACAB, _WRGB, _RDMAC, _REFAB = range(10)
_OPEN_TICKS, _ASIC_ADDS, _ASIC_MULS, _N_COUNTERS = 10, 11, 12, 13
_REFRESH, _COLUMN, _DRAIN, _ARRIVAL, _WAIT, _CLOCK, _IDLE, _BUSY = 0, 5, 8, 9, 10, 11, 12, 13
_WR_GB, _MAC_AB, _RD_MAC, _GEMV, _RD_BK, _WR_BK, _WR_EL = range(7)
_SEQUENCER, _ASIC, _CHANNEL = 0, 1, 2  # units; the channels follow
assert tuple(range(10)) == arch.CMD
assert (*arch.COUNTERS, *arch.ASIC_COUNTERS)[_OPEN_TICKS:] == ("open_ticks", "asic_adds", "asic_multiplies")
assert [arch.CAUSES.index(c) for c in ("refresh", "column", "drain", "arrival", "wait", "clock", "idle")] == [
    *(_REFRESH, _COLUMN, _DRAIN, _ARRIVAL, _WAIT, _CLOCK, _IDLE)
]
assert [arch.OP[o] for o in ("WR_GB", "MAC_AB", "RD_MAC", "GEMV", "RD_BK", "WR_BK", "WR_EL")] == list(
    range(7)
)

# Fields of a channel's register vector.
_TIME, _DUE, _SINCE, _UNIFORM, _REF_PRE, _REF_AT, _EVENTS, _TRACED = range(8)
_CLOSED, _MIXED = -1, -2  # _UNIFORM, where no single row is open in every bank


class Channel(NamedTuple):
    """State of one channel, or of several that have done the same so far."""

    dram: DramState
    # int64[8]: first tick not yet accounted for; next refresh due; tick of the command that opened the first
    # of the open rows; the row that all banks have open; PREab (-1: none) and REFab tick of the last refresh;
    # commands; traced commands
    v: np.ndarray
    trace: np.ndarray  # int64[capacity, 4]: tick, command, bank (-1: all), row
    scratch: np.ndarray  # int64[causes]: causes that nobody asks for


# ---- clock domain -------------------------------------------------------------------------------------


@njit(**INNER)
def next_working(t, p, q):
    """First tick >= t on which the domain of ratio p/q works: (tick * p) % q < p."""
    k = ((t - 1) * p) // q + 1 if t > 0 else 0
    return (k * q + p - 1) // p


@njit(**INNER)
def _after(t, cycles, p, q):
    """The working tick `cycles` working ticks after the working tick t."""
    k = (t * p) // q
    return ((k + cycles) * q + p - 1) // p


# ---- one channel --------------------------------------------------------------------------------------


@njit(**INNER)
def _issue(p, c, command, bank, row, t, act, counters):
    """Issue `command` at tick t, to which everything is accounted for."""
    v = c.v
    record(p.dram, c.dram, command, bank, row, t)
    if command == _ACTAB or command == _ACT:
        if v[_UNIFORM] == _CLOSED:
            v[_SINCE] = t
        v[_UNIFORM] = row if command == _ACTAB else _MIXED
    elif command == _PREAB or command == _PRE:
        v[_UNIFORM] = _CLOSED
        if command == _PRE:
            for b in range(p.n_banks):
                if c.dram.open_row[b] >= 0:
                    v[_UNIFORM] = _MIXED
        if v[_UNIFORM] == _CLOSED:
            counters[_OPEN_TICKS] += t - v[_SINCE]
    if v[_TRACED] < len(c.trace):
        c.trace[v[_TRACED], 0] = t
        c.trace[v[_TRACED], 1] = command
        c.trace[v[_TRACED], 2] = bank
        c.trace[v[_TRACED], 3] = row
        v[_TRACED] += 1
    act[_BUSY] += 1
    counters[command] += 1
    v[_EVENTS] += 1
    v[_TIME] = t + 1


@njit(**CALLED)
def _refresh(p, c, act, counters):
    """The refresh that is due, from the present tick on: close what is open, then REFab."""
    v = c.v
    v[_REF_PRE] = -1
    refreshed = False
    while not refreshed:
        refreshed = v[_UNIFORM] == _CLOSED
        command = _REFAB if refreshed else _PREAB
        far = v[_TIME] + (1 << 40)
        t = charge(p.dram, c.dram, command, 0, v[_TIME], far, c.scratch)
        act[_REFRESH] += t - v[_TIME]
        _issue(p, c, command, -1, -1, t, act, counters)
        v[_REF_AT if refreshed else _REF_PRE] = t
    v[_DUE] += p.n_refi


@njit(**CALLED)
def _rest(p, c, until, cause, act, counters):
    """No instruction asks for a command before tick `until`: refreshes happen, the rest is `cause`."""
    v = c.v
    while v[_TIME] < until:
        end = min(until, v[_DUE])
        if end > v[_TIME]:
            act[cause] += end - v[_TIME]
            v[_TIME] = end
        if end < until:
            _refresh(p, c, act, counters)


@njit(**INNER)
def _burst(p, c, command, bank, row, n, fold, act, counters):
    """Issue up to n equal commands, each as soon as it may; returns how many did before a refresh fell due.

    After the first, each waits for its predecessor alone: with `fold` they are one step.
    """
    v = c.v
    issued = 0
    while issued < n:
        t = v[_TIME]
        if v[_DUE] > t:
            t = charge(p.dram, c.dram, command, bank, t, v[_DUE], act)
            v[_TIME] = t
        if t >= v[_DUE]:
            _refresh(p, c, act, counters)
            return issued
        more = 0
        if fold:
            cadence = p.cadence[command]
            more = min(n - 1, (v[_DUE] - t - 1) // cadence)
            act[_BUSY] += more
            act[_COLUMN] += more * (cadence - 1)
            counters[command] += more
            v[_EVENTS] += more
            t += more * cadence
            n = min(n, more + 1)  # the rest waits for the refresh: bank states change
        _issue(p, c, command, bank, row, t, act, counters)
        issued += 1 + more
    return issued


@njit(**INNER)
def _all_open(p, c, row):
    """Whether `row` is open in every bank, in some, and whether some other row is open."""
    uniform = c.v[_UNIFORM]
    if uniform != _MIXED:
        return uniform == row, uniform == row, uniform >= 0 and uniform != row
    same, other = 0, 0
    for b in range(p.n_banks):
        if c.dram.open_row[b] == row:
            same += 1
        elif c.dram.open_row[b] >= 0:
            other += 1
    return same == p.n_banks, same > 0, other > 0


@njit(**INNER)
def _next_closed(p, c):
    for i in range(p.n_banks):
        if c.dram.open_row[p.stagger_order[i]] < 0:
            return p.stagger_order[i]
    return 0


@njit(**CALLED)
def _execute(p, c, op, address, own_bank, cols, outs, pitch, start, fold, act, counters):
    """One instruction on one channel, which sees it from tick `start`; returns the tick it is complete.

    Like the controller: look at the banks, issue the command that is needed next, move on.
    """
    v = c.v
    _rest(p, c, start, _IDLE, act, counters)
    macs = op == _MAC_AB or op == _GEMV
    left, reading = cols, op == _RD_MAC
    if reading:
        left = p.bursts
    elif op == _WR_EL:
        left = p.n_banks
    while outs > 0:
        row = address // p.columns
        command, bank, n, own = _WRGB, own_bank, left, True
        if reading:
            command = _RDMAC
        elif macs or op == _WR_EL:
            every, some, other = _all_open(p, c, row)
            if every:
                command = _MACAB if macs else _WR
                if macs:
                    n = min(left, (row + 1) * p.columns - address)
                else:
                    bank, n = p.n_banks - left, 1
            else:
                n, own = 1, False
                if other or (some and p.staggered == 0):
                    command = _PREAB
                elif p.staggered == 0:
                    command = _ACTAB
                else:
                    command, bank = _ACT, _next_closed(p, c)
        elif op != _WR_GB:
            opened = c.dram.open_row[bank]
            if opened == row:
                command = _RD if op == _RD_BK else _WR
                n = min(left, (row + 1) * p.columns - address)
            else:
                n, own = 1, False
                command = _PRE if opened >= 0 else _ACT
        issued = _burst(p, c, command, bank, row, n, fold, act, counters)
        if not own:
            continue
        left -= issued
        if (macs and not reading) or op == _RD_BK or op == _WR_BK:
            address += issued
        if left == 0:
            if op == _GEMV and not reading:
                reading, left = True, p.bursts
            else:
                outs -= 1
                if op == _GEMV:
                    reading, left = False, cols
                elif op == _WR_EL:
                    left = p.n_banks
                    address += pitch
    end = v[_TIME] - 1 + max(p.drain[op], 1)
    _rest(p, c, end, _DRAIN, act, counters)
    return end


@njit(**CALLED)
def _asic_cycles(p, op, elements, outs, counters):
    """Cycles of an ASIC operation, and its additions and multiplications into the counters."""
    cycles = 0
    for k in range(p.pass_start[op], p.pass_start[op + 1]):
        n = 1 if p.pass_scalar[k] else elements
        adds, multiplies = n * p.pass_adds[k], n * p.pass_multiplies[k]
        if p.pass_scalar[k] == 0:
            issue = max((adds + p.adders - 1) // p.adders, (multiplies + p.multipliers - 1) // p.multipliers)
            cycles += max(issue, 1)
        cycles += p.pass_depth[k]
        counters[_ASIC_ADDS] += adds * outs
        counters[_ASIC_MULS] += multiplies * outs
    return max(cycles * outs, 1)


# ---- the machine --------------------------------------------------------------------------------------


@njit(cache=True)
def _run(p, code, members, channels, weights, machine, activity, counters, firsts, ends, fold):
    """Execute a segment's instructions.

    machine int64[1]: the tick at which the next fetch may begin. `members` int64[n]: mask of the classes of
    channels that execute each instruction; class k stands for weights[k] channels. Activity
    [tags + 1, units, causes + busy]; counters [tags + 1, classes + 1, counters], the last for the ASIC.
    """
    now = machine[0]
    P, Q = p.asic_p, p.asic_q
    n_classes = len(weights)
    for n in range(len(code)):
        i = code[n]
        tag, op, outs = i.tag, np.int64(i.op), np.int64(i.outs)
        sequencer = activity[tag, _SEQUENCER]
        asic = activity[tag, _ASIC]
        firsts[n] = now
        fetch = next_working(now, P, Q)
        load = next_working(fetch + 1, P, Q)
        arrived = max(load + 1, i.not_before)
        dispatch = next_working(arrived, P, Q)
        if members[n] != 0:
            complete = dispatch + 1
            address = i.row * p.columns + i.col
            bank, cols, pitch = np.int64(i.bank), np.int64(i.cols), np.int64(i.pitch)
            if op != _GEMV and op != _WR_EL:
                outs = np.int64(1)
            for k in range(n_classes):
                if (members[n] >> k) & 1:
                    c = channels[k]
                    end = _execute(
                        p,
                        c,
                        op,
                        address,
                        bank,
                        cols,
                        outs,
                        pitch,
                        dispatch + 1,
                        fold,
                        activity[tag, _CHANNEL + k],
                        counters[tag, k],
                    )
                    complete = max(complete, end)
        else:
            cycles = _asic_cycles(p, op, np.int64(i.n), outs, counters[tag, n_classes])
            complete = _after(dispatch, cycles, P, Q) + 1
            asic[_BUSY] += cycles
            asic[_CLOCK] += complete - dispatch - 1 - cycles
            asic[_IDLE] -= complete - dispatch - 1
        retire = next_working(complete, P, Q)
        sequencer[_BUSY] += 4
        sequencer[_ARRIVAL] += arrived - load - 1
        sequencer[_WAIT] += complete - dispatch - 1
        sequencer[_CLOCK] += fetch - now + load - fetch - 1 + dispatch - arrived + retire - complete
        asic[_IDLE] += retire + 1 - now
        now = retire + 1
        ends[n] = now
        for k in range(n_classes):
            c = channels[k]
            if c.v[_DUE] >= now and c.v[_TIME] < now:
                activity[tag, _CHANNEL + k, _IDLE] += now - c.v[_TIME]
                c.v[_TIME] = now
    machine[0] = now


@njit(cache=True)
def _finish(p, c, end, act, counters):
    """Account for the channel up to tick `end`, the length of the run; what lies beyond did not happen."""
    v = c.v
    _rest(p, c, end, _IDLE, act, counters)
    if v[_UNIFORM] != _CLOSED:
        counters[_OPEN_TICKS] += max(end - 1 - v[_SINCE], 0)
    for t in range(end, v[_TIME]):  # the tail of the last refresh
        if t == v[_REF_PRE] or t == v[_REF_AT]:
            act[_BUSY] -= 1
            counters[_PREAB if t == v[_REF_PRE] else _REFAB] -= 1
            v[_EVENTS] -= 1
            v[_TRACED] -= 1 if v[_TRACED] > 0 else 0
        else:
            act[_REFRESH] -= 1
    if v[_REF_PRE] >= end:
        counters[_OPEN_TICKS] -= v[_REF_PRE] - (end - 1)


def _new_channel(p: arch.PimParams, trace: int) -> Channel:
    v = np.zeros(8, np.int64)
    v[_DUE] = p.n_refi
    v[[_UNIFORM, _REF_PRE, _REF_AT]] = _CLOSED
    return Channel(new_state(p.dram), v, np.zeros((trace, 4), np.int64), np.zeros(_BUSY, np.int64))


def _copy(c: Channel) -> Channel:
    return Channel(DramState(*(a.copy() for a in c.dram)), c.v.copy(), c.trace.copy(), c.scratch.copy())


class _Machine:
    """The run so far: classes of equal channels, their states and the tables they fill."""

    def __init__(self, p: arch.PimParams, n_tags: int, fold: bool, trace: int) -> None:
        self.p, self.fold = p, fold
        self.n_tags = n_tags
        first = tuple(range(p.channels))
        self.classes: list[tuple[int, ...]] = [first] if fold else [(c,) for c in first]
        self.channels = [_new_channel(p, trace) for _ in self.classes]
        units = _CHANNEL + len(self.classes)
        self.activity = np.zeros((n_tags + 1, units, _BUSY + 1), np.int64)
        self.counters = np.zeros((n_tags + 1, len(self.classes) + 1, _N_COUNTERS), np.int64)
        self.machine = np.zeros(1, np.int64)

    def members(self, code: np.ndarray) -> np.ndarray:
        """Mask of classes for each instruction; classes that the masks tell apart are split first."""
        masks, inverse = np.unique(code["channels"], return_inverse=True)
        for mask in masks:
            for k in range(len(self.classes)):
                inside = tuple(c for c in self.classes[k] if (int(mask) >> c) & 1)
                outside = tuple(c for c in self.classes[k] if not (int(mask) >> c) & 1)
                if inside and outside:
                    self._split(k, inside, outside)
        by_mask = [sum(1 << k for k, c in enumerate(self.classes) if (int(m) >> c[0]) & 1) for m in masks]
        of = np.array(by_mask, np.int64)[inverse]
        return np.where(code["op"] < arch.N_CHANNEL_OPS, of, 0)

    def _split(self, k: int, inside: tuple[int, ...], outside: tuple[int, ...]) -> None:
        self.classes[k] = inside
        self.classes.append(outside)
        self.channels.append(_copy(self.channels[k]))
        self.activity = np.concatenate([self.activity, self.activity[:, _CHANNEL + k, None]], axis=1)
        asic, rest = self.counters[:, -1:], self.counters[:, :-1]
        self.counters = np.concatenate([rest, rest[:, k : k + 1], asic], axis=1)

    def run(self, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        members = self.members(code)
        firsts, ends = np.zeros(len(code), np.int64), np.zeros(len(code), np.int64)
        weights = np.array([len(c) for c in self.classes], np.int64)
        tables = (self.machine, self.activity, self.counters, firsts, ends, self.fold)
        _run(self.p, code, members, tuple(self.channels), weights, *tables)
        return firsts, ends

    def finish(self) -> int:
        """The last fetch, which finds the end; returns the ticks of the run."""
        p, now = self.p, int(self.machine[0])
        fetch = int(next_working(now, p.asic_p, p.asic_q))
        nobody = self.n_tags
        self.activity[nobody, _SEQUENCER, _BUSY] += 1
        self.activity[nobody, _SEQUENCER, _CLOCK] += fetch - now
        self.activity[nobody, _ASIC, _IDLE] += fetch + 1 - now
        for k, c in enumerate(self.channels):
            _finish(p, c, fetch + 1, self.activity[nobody, _CHANNEL + k], self.counters[nobody, k])
        return fetch + 1


def simulate(
    p: arch.PimParams,
    program: Program,
    *,
    decisions: Any = None,
    fold: bool = True,
    progress: Progress | None = None,
    steps: int = 0,
    trace: int = 0,
) -> Timeline:
    """Run a program on the cycle model.

    `fold` takes row bursts and channels that do the same in one step; the integers are the same without.
    `trace` keeps that many DRAM commands of each channel (and folds no bursts). `steps` is what `progress`
    counts up to. No timing of this machine depends on data: `decisions` is ignored.
    Raises ValueError for an instruction outside the machine, naming its index.
    """
    tags = list(program.tags)
    m: _Machine | None = None
    spans: list[np.ndarray] = []
    labels: list[str] = []
    for number, segment in enumerate(program.segments):
        code = segment.regions["code"]
        check(p, code)
        if m is None or int(code["tag"].max(initial=0)) >= m.n_tags:
            n_tags = max(len(tags), int(code["tag"].max(initial=0)) + 1)
            m = _Machine(p, n_tags, fold and trace == 0, trace) if m is None else _grown(m, n_tags)
        total: np.ndarray | None = None
        for _ in range(segment.repeat):
            firsts, ends = m.run(code)
            rows = fold_spans(code["tag"], firsts, ends, number)
            if total is None:
                total = rows
            else:
                total["end"] = rows["end"]
                total["ticks"] += rows["ticks"]
                total["count"] += 1
        spans += [total] if total is not None else []
        labels.append(segment.label)
        if progress:
            progress(number + 1, steps)
    m = m or _Machine(p, len(tags), fold, trace)
    tags += [f"tag {i}" for i in range(len(tags), m.n_tags)]
    ticks = m.finish()
    class_of = {c: k for k, members in enumerate(m.classes) for c in members}
    order = [_CHANNEL + class_of[c] for c in range(p.channels)]
    # Inside, a unit's busy ticks stand behind its stalls.
    activity = np.roll(m.activity[:, [_SEQUENCER, _ASIC, *order]], 1, axis=2)
    weights = np.array([*(len(c) for c in m.classes), 1], np.int64)
    counters = (m.counters * weights[None, :, None]).sum(axis=1)
    events = sum(int(c.v[_EVENTS]) * len(members) for c, members in zip(m.channels, m.classes, strict=True))
    return Timeline(
        ticks=ticks,
        tags=tags,
        spans=np.concatenate(spans) if spans else np.zeros(0, SPAN),
        counter_names=(*arch.COUNTERS, *arch.ASIC_COUNTERS),
        counters=counters,
        units=("sequencer", "asic", *(f"channel {c}" for c in range(p.channels))),
        causes=arch.CAUSES,
        activity=activity,
        labels=labels,
        events=events,
        trace=_traces(m) if trace else None,
    )


def _grown(m: _Machine, n_tags: int) -> _Machine:
    """The machine with room for more tags; the row of no tag stays the last."""
    for name in ("activity", "counters"):
        old = getattr(m, name)
        new = np.zeros((n_tags + 1, *old.shape[1:]), np.int64)
        new[: m.n_tags], new[-1] = old[:-1], old[-1]
        setattr(m, name, new)
    m.n_tags = n_tags
    return m


def _traces(m: _Machine) -> np.ndarray:
    """DRAM commands int64[n, 5]: tick, channel, command, bank, row, by channel and then tick."""
    rows = []
    for c, members in zip(m.channels, m.classes, strict=True):
        kept = c.trace[: c.v[_TRACED]]
        for channel in members:
            rows.append(np.insert(kept, 1, channel, axis=1))
    return np.concatenate(rows)


def check(p: arch.PimParams, code: np.ndarray) -> None:
    """Raise ValueError for the first instruction that reaches outside the machine."""
    op, channel = code["op"], code["op"] < arch.N_CHANNEL_OPS
    columns = p.rows * p.columns
    address = code["row"].astype(np.int64) * p.columns + code["col"]
    names = np.array([o.name for o in arch.OPS])[op] if len(op) else op
    last = np.where(op == _MAC_AB, address + code["cols"], 0)
    last = np.where(op == _GEMV, address + code["cols"] * code["outs"], last)
    last = np.where((op == _RD_BK) | (op == _WR_BK), address + code["cols"], last)
    last = np.where(op == _WR_EL, address + code["pitch"] * (code["outs"] - 1) + 1, last)
    gb = np.where((op == _WR_GB) | (op == _MAC_AB) | (op == _GEMV), code["gb"] + code["cols"], 0)
    one_bank = (op == _RD_BK) | (op == _WR_BK)
    problems: Iterable[tuple[str, np.ndarray]] = (
        (
            f"channels must name some of the {p.channels} channels",
            channel & (code["channels"] >> p.channels != 0),
        ),
        ("channels must not be empty", channel & (code["channels"] == 0)),
        (f"row, col, cols reach beyond the {columns} columns of a bank", last > columns),
        (f"col must be below the {p.columns} columns of a row", channel & (code["col"] >= p.columns)),
        (f"gb, cols reach beyond the {p.gb_columns} columns of the global buffer", gb > p.gb_columns),
        ("cols must be at least 1", (last > 0) & (code["cols"] < 1) | (op == _WR_GB) & (code["cols"] < 1)),
        ("outs must be at least 1", code["outs"] < 1),
        ("n must be at least 1", ~channel & (code["n"] < 1)),
        (f"bank must be below {p.n_banks}", one_bank & (code["bank"] >= p.n_banks)),
        (f"lane must be below {p.lanes}", (op == _WR_EL) & (code["lane"] >= p.lanes)),
    )
    for message, wrong in problems:
        if wrong.any():
            index = int(np.argmax(wrong))
            raise ValueError(f"instruction {index} ({names[index]}): {message}")
