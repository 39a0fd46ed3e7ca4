"""PIM-GPT in time: a Program in, a Timeline out; every DRAM command of every channel is an event.

The rules, which the RTL implements anew (`rtl/pim/`):

- The sequencer works in the ASIC's clock domain. For each instruction: one working tick to fetch, one to load,
  one to dispatch (not before `not_before`), then it waits until the unit it dispatched to, the channels or
  the ASIC, has completed and retires it in one more. Instructions never overlap (published machine). A last
  fetch finds the program's end.
- With overlap the next fetch follows the dispatch at once. A dispatch waits until both units are idle, or, for
  an instruction that may execute alongside others, until its own is; the last fetch until both are.
- A channel sees the instruction in the tick after the dispatch. In each tick it issues at most one DRAM
  command: the one that the bank states and the instruction ask for next. The first tick in which no
  constraint forbids it, it issues. After the last one the instruction drains, then it is complete.
- Refresh k is due at tick k * n_refi and goes before everything else: open banks are closed, the refresh issues.
- The ASIC works from the domain's next tick on, for the cycles that the operation's microprogram takes.

Channels in equal states are simulated once: they begin so, part where an instruction leaves some out, and join
again when nothing that can still happen tells them apart.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from tilewright.arch import pim as arch
from tilewright.arch.isa import Program
from tilewright.arch.scenario import Progress
from tilewright.arch.timeline import SPAN, Timeline, fold_spans
from tilewright.arch.trace import LOG
from tilewright.sim.cache import CALLED, INNER
from tilewright.sim.dram import DramState, charge, new_state, record

# Literals of this file: a cached kernel would keep the old value of a constant changed elsewhere.
_ACT, _ACTAB, _PRE, _PREAB, _RD, _WR, _MACAB, _WRGB, _RDMAC, _REFAB = range(10)
_OPEN_TICKS, _ASIC_ADDS, _ASIC_MULS, _N_COUNTERS = 10, 11, 12, 13
_REFRESH, _COLUMN, _DRAIN, _ARRIVAL, _WAIT, _CLOCK, _IDLE, _BUSY = 0, 5, 8, 9, 10, 11, 12, 13
_WR_GB, _MAC_AB, _RD_MAC, _GEMV, _RD_BK, _WR_BK, _WR_EL = range(7)
_ADD, _MUL, _SOFTMAX, _LAYERNORM, _RMSNORM, _ROPE, _ARGMAX = 7, 8, 9, 10, 11, 15, 16
_COMMAND = (7, 6, 8, 6, 4, 5, 5)  # of each operation, once its rows are open
assert _COMMAND == (_WRGB, _MACAB, _RDMAC, _MACAB, _RD, _WR, _WR)
_SEQUENCER, _ASIC, _CHANNEL = 0, 1, 2  # units; the channels follow
assert tuple(range(10)) == arch.CMD
assert (*arch.COUNTERS, *arch.ASIC_COUNTERS)[_OPEN_TICKS:] == ("open_ticks", "asic_adds", "asic_multiplies")
assert [arch.CAUSES.index(c) for c in ("refresh", "column", "drain", "arrival", "wait", "clock", "idle")] == [
    *(_REFRESH, _COLUMN, _DRAIN, _ARRIVAL, _WAIT, _CLOCK, _IDLE)
]
assert [arch.OP[o] for o in ("WR_GB", "MAC_AB", "RD_MAC", "GEMV", "RD_BK", "WR_BK", "WR_EL")] == list(
    range(7)
)
assert [arch.OP[o] for o in ("ADD", "MUL", "SOFTMAX", "LAYERNORM", "RMSNORM", "ROPE", "ARGMAX")] == [
    *(_ADD, _MUL, _SOFTMAX, _LAYERNORM, _RMSNORM, _ROPE, _ARGMAX)
]

# Fields of a channel's register vector.
_TIME, _DUE, _SINCE, _UNIFORM, _REF_PRE, _REF_AT, _TRACED = range(7)
_CLOSED, _MIXED = -1, -2  # _UNIFORM, where no single row is open in every bank


Integer = int | np.integer[Any]


class Channel(NamedTuple):
    """State of one channel, or of several that have done the same so far."""

    dram: DramState
    history: np.ndarray  # dram.last as one row
    live: np.ndarray  # int64: the places of `history` that some constraint reads
    # int64[7]: first tick not yet accounted for; next refresh due; tick of the command that opened the first
    # of the open rows; the row that all banks have open; PREab (-1: none) and REFab tick of the last refresh;
    # traced commands
    v: np.ndarray
    trace: np.ndarray  # int64[capacity, 4]: tick, command, bank (-1: all), row
    scratch: np.ndarray  # int64[causes]: causes that nobody asks for
    snap: np.ndarray  # int64: the state one period ago, see `_steady`


class Work(NamedTuple):
    """What an instruction asks of a channel; `address` is the linear column."""

    op: Integer
    address: Integer
    bank: Integer
    cols: Integer
    outs: Integer
    pitch: Integer
    longest: Integer  # the largest latency of any constraint: older commands bind no more


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


@njit(**INNER)
def _gcd(a, b):
    while b:
        a, b = b, a % b
    return a


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
def _burst(p, c, command, bank, step, row, n, fold, act, counters):
    """Issue up to n equal commands, each as soon as it may; returns how many did before a refresh fell due.

    The bank advances by `step`. Where it is 0, each after the first waits for its predecessor alone: with
    `fold` they are one step.
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
        if fold and step == 0:
            cadence = p.cadence[command]
            more = n - 1
            if t + more * cadence >= v[_DUE]:
                more = (v[_DUE] - t - 1) // cadence
            act[_BUSY] += more
            act[_COLUMN] += more * (cadence - 1)
            counters[command] += more
            t += more * cadence
            n = min(n, more + 1)  # the rest waits for the refresh: bank states change
        _issue(p, c, command, bank, row, t, act, counters)
        issued += 1 + more
        bank += step
    return issued


@njit(**INNER)
def _open_all(p, c, row):
    """The command that brings `row` towards being open in every bank, and its bank; -1 if it is."""
    uniform, rows = c.v[_UNIFORM], c.dram.open_row
    if uniform == row:
        return -1, -1
    same, other = 0, 0
    if uniform == _MIXED:
        for b in range(p.n_banks):
            same += rows[b] == row
            other += rows[b] >= 0 and rows[b] != row
        if same == p.n_banks:
            return -1, -1
    elif uniform != _CLOSED:
        other = p.n_banks
    if other or (same and p.staggered == 0):
        return _PREAB, -1
    if p.staggered == 0:
        return _ACTAB, -1
    i = 0
    while rows[p.stagger_order[i]] == row:
        i += 1
    return _ACT, p.stagger_order[i]


@njit(**INNER)
def _open_one(c, bank, row):
    """The command that brings `row` towards being open in one bank; -1 if it is."""
    opened = c.dram.open_row[bank]
    if opened == row:
        return -1
    return _PRE if opened >= 0 else _ACT


@njit(**CALLED)
def _steady(p, c, address, periods, columns, longest, act, counters):
    """How many of the next `periods` periods of a hardware loop repeat the last one exactly; they are done.

    A period advances by `columns` columns, whole rows. It repeats if everything that can still bind (ages of
    commands within the longest latency, open rows relative to the address) is as it was one period ago, no
    refresh fell in between, and none falls due before the repetitions end.
    """
    v, snap, last = c.v, c.snap, c.history
    row = address >> p.column_bits
    rows = 4
    tables = rows + p.n_banks
    history = tables + len(act) + len(counters)
    shift = v[_TIME] - snap[1]
    repeat = 0
    if snap[0] == address - columns and snap[2] == v[_DUE] and v[_SINCE] - snap[3] == shift:
        repeat = min(periods, (v[_DUE] - v[_TIME]) // shift)
        for b in range(p.n_banks):
            if c.dram.open_row[b] - row != snap[rows + b]:
                repeat = 0
        horizon = v[_TIME] - longest
        for k in range(len(c.live)):
            then, now = snap[history + k], last[c.live[k]]
            if now - then != shift and (now > horizon or then > horizon - shift):
                repeat = 0
                break
        if repeat > 0:
            for j in range(len(act)):
                act[j] += repeat * (act[j] - snap[tables + j])
            for j in range(len(counters)):
                counters[j] += repeat * (counters[j] - snap[tables + len(act) + j])
            for j in c.live:
                if last[j] > horizon:
                    last[j] += repeat * shift
            advance = repeat * columns // p.columns
            for b in range(p.n_banks):
                c.dram.open_row[b] += advance
            if v[_UNIFORM] >= 0:
                v[_UNIFORM] += advance
            v[_TIME] += repeat * shift
            v[_SINCE] += repeat * shift
            snap[0] = -1
            return repeat
    snap[0], snap[1], snap[2], snap[3] = address, v[_TIME], v[_DUE], v[_SINCE]
    for b in range(p.n_banks):
        snap[rows + b] = c.dram.open_row[b] - row
    for j in range(len(act)):
        snap[tables + j] = act[j]
    for j in range(len(counters)):
        snap[tables + len(act) + j] = counters[j]
    for k in range(len(c.live)):
        snap[history + k] = last[c.live[k]]
    return 0


@njit(**CALLED)
def _execute(p, c, work, start, fold, act, counters):
    """One instruction on one channel, which sees it from tick `start`; returns the tick it is complete.

    Like the controller: look at the banks, issue the command that is needed next, move on.
    """
    op, address, outs = work.op, work.address, work.outs
    _rest(p, c, start, _IDLE, act, counters)
    own = _COMMAND[op]
    every_bank = op == _MAC_AB or op == _GEMV or op == _WR_EL
    one_bank = op == _RD_BK or op == _WR_BK
    length = p.bursts if op == _RD_MAC else (p.n_banks if op == _WR_EL else work.cols)
    left = length  # of this repetition: columns, or banks, or groups of accumulators
    reading = False  # GEMV: the columns are done, the accumulators are read
    # A loop may repeat itself after as many outputs as fill whole rows.
    period = p.columns // _gcd(work.cols, p.columns)
    phase = 0
    c.snap[0] = -1
    while outs > 0:
        row = address >> p.column_bits
        command, bank = -1, work.bank
        if every_bank and not reading:
            command, bank = _open_all(p, c, row)
        elif one_bank:
            command = _open_one(c, bank, row)
        ready = command < 0
        n, step = 1, 0
        if ready:
            command, n = _RDMAC if reading else own, left
            if op == _WR_EL:
                bank, step = p.n_banks - left, 1
            elif (every_bank or one_bank) and not reading:
                n = min(left, ((row + 1) << p.column_bits) - address)
        issued = _burst(p, c, command, bank, step, row, n, fold, act, counters)
        if not ready:
            continue
        left -= issued
        if command == _MACAB or one_bank:
            address += issued
        if left > 0:
            continue
        if op == _GEMV and not reading:
            reading, left = True, p.bursts
            continue
        outs -= 1
        reading, left = False, length
        if op == _WR_EL:
            address += work.pitch
        phase += 1
        if phase == period:
            phase = 0
            if fold and op == _GEMV and outs > period:
                columns = period * work.cols
                done = _steady(p, c, address, outs // period, columns, work.longest, act, counters)
                outs -= done * period
                address += done * columns
    end = c.v[_TIME] - 1 + max(p.drain[op], 1)
    _rest(p, c, end, _DRAIN, act, counters)
    return end


@njit(**CALLED)
def _asic_cycles(p, op, elements, outs, counters):
    """Cycles of an ASIC operation, and its additions and multiplications into the counters.

    Block after block, each strip after strip: see `arch.pim_asic`.
    """
    cycles = 0
    for k in range(p.block_start[op], p.block_start[op + 1]):
        n = 1 if p.block_scalar[k] else elements
        groups = (n + p.vector_lanes - 1) // p.vector_lanes
        strips, rest = groups // p.register_rows, groups % p.register_rows
        waits = p.block_steps[k] - 1
        cycles += strips * waits * max(p.register_rows, p.step_latency)
        if rest:
            cycles += waits * max(rest, p.step_latency)
        cycles += groups * p.block_interval[k] + p.block_tail[k]
        counters[_ASIC_ADDS] += n * p.block_adds[k] * outs
        counters[_ASIC_MULS] += n * p.block_multiplies[k] * outs
    return cycles * outs


# ---- the machine --------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """State and tables of a run. A class is a set of channels whose states are equal; it is simulated once."""

    now: np.ndarray  # int64[1]: the tick at which the next fetch may begin
    idle: np.ndarray  # int64[2]: the first tick in which the channels, and the ASIC, are idle again
    asic: np.ndarray  # int64[1]: the first tick of the ASIC that is not yet accounted for
    members: np.ndarray  # int64[classes]: mask of the channels in each class; 0 where the slot is free
    last: np.ndarray  # DramState.last of each class
    history: np.ndarray  # Channel.history of each class: the same memory
    live: np.ndarray  # Channel.live
    open_row: np.ndarray  # DramState.open_row of each class
    v: np.ndarray  # Channel.v of each class
    trace: np.ndarray  # Channel.trace of each class
    activity: np.ndarray  # int64[tags + 1, units, causes + busy]; the last row belongs to no tag
    counters: np.ndarray  # int64[tags + 1, counters]
    act: np.ndarray  # int64[classes, causes + busy]: during one instruction
    tally: np.ndarray  # int64[classes, counters]: during one instruction
    scratch: np.ndarray  # Channel.scratch
    snap: np.ndarray  # Channel.snap


@njit(cache=True)
def _channel(m, k):
    """The state of class k, as views."""
    return Channel(
        DramState(m.last[k], m.open_row[k]), m.history[k], m.live, m.v[k], m.trace[k], m.scratch, m.snap
    )


@njit(cache=True)
def _credit(m, tag, k):
    """Add what a class did to each of its channels, and clear it."""
    channels = 0
    for c in range(m.activity.shape[1] - _CHANNEL):
        if (m.members[k] >> c) & 1:
            channels += 1
            for j in range(m.act.shape[1]):
                m.activity[tag, _CHANNEL + c, j] += m.act[k, j]
    for j in range(m.tally.shape[1]):
        m.counters[tag, j] += m.tally[k, j] * channels
    for table in (m.act, m.tally):
        for j in range(table.shape[1]):
            table[k, j] = 0


@njit(cache=True)
def _split(m, mask):
    """Separate the channels that execute from those of their class that do not."""
    for k in range(len(m.members)):
        inside = m.members[k] & mask
        outside = m.members[k] & ~mask
        if inside and outside:
            free = 0
            while m.members[free]:
                free += 1
            m.members[k], m.members[free] = inside, outside
            for state in (m.history, m.open_row, m.v):
                for j in range(state.shape[1]):
                    state[free, j] = state[k, j]


@njit(cache=True)
def _equal(m, a, b, longest):
    """Whether nothing that can still happen tells class a from class b.

    `longest` is the largest latency of any constraint: what lies further back is over. Ticks of the last
    refresh matter only while they lie ahead.
    """
    x, y = m.v[a], m.v[b]
    if x[_TIME] != y[_TIME] or x[_DUE] != y[_DUE] or x[_UNIFORM] != y[_UNIFORM]:
        return False
    if x[_UNIFORM] != _CLOSED and x[_SINCE] != y[_SINCE]:
        return False
    for j in (_REF_PRE, _REF_AT):
        if max(x[j], m.now[0]) != max(y[j], m.now[0]):
            return False
    for bank in range(m.open_row.shape[1]):
        if m.open_row[a, bank] != m.open_row[b, bank]:
            return False
    horizon = x[_TIME] - longest
    p, q = m.history[a], m.history[b]
    for j in m.live:
        if p[j] != q[j] and (p[j] > horizon or q[j] > horizon):
            return False
    return True


@njit(cache=True)
def _merge(m, longest):
    """Join classes whose states have become equal again."""
    for a in range(len(m.members)):
        for b in range(a + 1, len(m.members)):
            if m.members[a] and m.members[b] and _equal(m, a, b, longest):
                m.members[a] |= m.members[b]
                m.members[b] = 0


@njit(cache=True)
def _run(p, code, m, log, fold):
    """Execute a segment's instructions; `log` int64[n, 4] takes each one's first, start, complete, end.

    The ticks are those of `arch.trace.LOG`.
    """
    P, Q = p.asic_p, p.asic_q
    longest = p.dram.row_latency.max()
    for n in range(len(code)):
        i = code[n]
        now = m.now[0]
        tag, op, outs = i["tag"], np.int64(i["op"]), np.int64(i["outs"])
        fetch = next_working(now, P, Q)
        load = next_working(fetch + 1, P, Q)
        mask = np.int64(i["channels"]) if op <= _WR_EL else 0
        unit = 0 if mask else 1
        arrived = max(load + 1, i["not_before"])
        free = m.idle[unit] if p.overlap and i["alongside"] else m.idle.max()
        dispatch = next_working(max(arrived, free), P, Q)
        complete = dispatch + 1
        asic = m.activity[tag, _ASIC]
        if mask:
            _split(m, mask)
            repeats = outs if op == _GEMV or op == _WR_EL else 1
            work = Work(
                op,
                i["row"] * p.columns + i["col"],
                np.int64(i["bank"]),
                np.int64(i["cols"]),
                repeats,
                np.int64(i["pitch"]),
                longest,
            )
            for k in range(len(m.members)):
                if m.members[k] & mask:
                    end = _execute(p, _channel(m, k), work, dispatch + 1, fold, m.act[k], m.tally[k])
                    complete = max(complete, end)
        else:
            vectors = outs if op == _SOFTMAX or op == _ROPE else 1
            cycles = _asic_cycles(p, op, np.int64(i["n"]), vectors, m.counters[tag])
            complete = _after(dispatch, cycles, P, Q) + 1
            asic[_IDLE] += dispatch + 1 - m.asic[0]
            asic[_BUSY] += cycles
            asic[_CLOCK] += complete - dispatch - 1 - cycles
            m.asic[0] = complete
        m.idle[unit] = complete
        sequencer = m.activity[tag, _SEQUENCER]
        sequencer[_BUSY] += 3
        sequencer[_ARRIVAL] += arrived - load - 1
        waited = max(free - arrived, 0)
        sequencer[_WAIT] += waited
        sequencer[_CLOCK] += fetch - now + load - fetch - 1 + dispatch - arrived - waited
        after, last = dispatch + 1, complete
        if not p.overlap:
            retire = next_working(complete, P, Q)
            after = last = retire + 1
            sequencer[_BUSY] += 1
            sequencer[_WAIT] += complete - dispatch - 1
            sequencer[_CLOCK] += retire - complete
        if m.asic[0] < after:
            asic[_IDLE] += after - m.asic[0]
            m.asic[0] = after
        log[n, 0], log[n, 1], log[n, 2], log[n, 3] = now, dispatch + 1, complete, last
        m.now[0] = after
        classes = 0
        for k in range(len(m.members)):
            # Up to here nothing is asked of the channel; a refresh in between is left to what follows.
            if m.members[k]:
                v = m.v[k]
                if v[_DUE] >= after and v[_TIME] < after:
                    m.act[k, _IDLE] += after - v[_TIME]
                    v[_TIME] = after
                _credit(m, tag, k)
                classes += 1
        if fold and classes > 1:
            _merge(m, longest)


@njit(cache=True)
def _finish(p, m):
    """The last fetch, which finds the end of the program; returns the ticks of the run.

    Channels are accounted for up to there; what of a refresh lies beyond did not happen.
    """
    nobody = len(m.activity) - 1
    free = max(m.now[0], m.idle.max())
    fetch = next_working(free, p.asic_p, p.asic_q)
    end = fetch + 1
    m.activity[nobody, _SEQUENCER, _BUSY] += 1
    m.activity[nobody, _SEQUENCER, _WAIT] += free - m.now[0]
    m.activity[nobody, _SEQUENCER, _CLOCK] += fetch - free
    m.activity[nobody, _ASIC, _IDLE] += end - m.asic[0]
    for k in range(len(m.members)):
        if m.members[k] == 0:
            continue
        c, v = _channel(m, k), m.v[k]
        _rest(p, c, end, _IDLE, m.act[k], m.tally[k])
        if v[_UNIFORM] != _CLOSED:
            m.tally[k, _OPEN_TICKS] += max(end - 1 - v[_SINCE], 0)
        for t in range(end, v[_TIME]):  # the tail of the last refresh
            if t == v[_REF_PRE] or t == v[_REF_AT]:
                m.act[k, _BUSY] -= 1
                m.tally[k, _PREAB if t == v[_REF_PRE] else _REFAB] -= 1
            else:
                m.act[k, _REFRESH] -= 1
        if v[_REF_PRE] >= end:
            m.tally[k, _OPEN_TICKS] -= v[_REF_PRE] - (end - 1)
        _credit(m, nobody, k)
    return end


def _new_machine(p: arch.PimParams, n_tags: int, fold: bool, trace: int) -> Machine:
    k, dram = p.channels, new_state(p.dram)
    last = np.repeat(dram.last[None], k, axis=0)
    live = np.zeros(dram.last.shape, bool)
    nodes = (slice(0, 1), slice(1, 1 + p.n_bankgroups), slice(1 + p.n_bankgroups, None))
    for scope, prev, window in zip(p.dram.row_scope, p.dram.row_prev, p.dram.row_window, strict=True):
        live[nodes[scope], prev, :window] = True
    v = np.zeros((k, 7), np.int64)
    v[:, _DUE] = p.n_refi
    v[:, [_UNIFORM, _REF_PRE, _REF_AT]] = _CLOSED
    members = np.array([1 << c for c in range(k)], np.int64)
    if fold:
        members[0], members[1:] = members.sum(), 0
    return Machine(
        now=np.zeros(1, np.int64),
        idle=np.zeros(2, np.int64),
        asic=np.zeros(1, np.int64),
        members=members,
        last=last,
        history=last.reshape(k, -1),
        live=np.flatnonzero(live),
        open_row=np.repeat(dram.open_row[None], k, axis=0),
        v=v,
        trace=np.zeros((k, trace, 4), np.int64),
        activity=np.zeros((n_tags + 1, _CHANNEL + k, _BUSY + 1), np.int64),
        counters=np.zeros((n_tags + 1, _N_COUNTERS), np.int64),
        act=np.zeros((k, _BUSY + 1), np.int64),
        tally=np.zeros((k, _N_COUNTERS), np.int64),
        scratch=np.zeros(_BUSY, np.int64),
        snap=np.zeros(4 + p.n_banks + _BUSY + 1 + _N_COUNTERS + live.sum(), np.int64),
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
    `trace` keeps that many DRAM commands of each channel, and as many instructions; nothing is folded before
    they are complete. `steps` is what `progress` counts up to. No timing of this machine depends on data: `decisions` is ignored.
    Raises ValueError for an instruction outside the machine, naming segment and index.
    """
    tags = list(program.tags)
    m = _new_machine(p, len(tags), fold and trace == 0, trace)
    logs: list[np.ndarray] = []
    logged = 0
    spans: list[np.ndarray] = []
    labels: list[str] = []
    for number, segment in enumerate(program.segments):
        code = segment.regions["code"]
        check(p, code, f"segment {number}, ")
        highest = int(code["tag"].max(initial=-1)) + 1
        if highest > len(m.counters) - 1:
            m = _grown(m, highest)
            tags += [f"tag {i}" for i in range(len(tags), highest)]
        ticks = np.zeros((len(code), 4), np.int64)
        total: np.ndarray | None = None
        for _ in range(segment.repeat):
            _run(p, code, m, ticks, fold and bool((m.v[:, _TRACED] == trace).all()))
            rows = fold_spans(code["tag"], ticks[:, 0], ticks[:, 3], number)
            if logged < trace:
                logs.append(_log(code, ticks, number)[: trace - logged])
                logged += len(logs[-1])
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
    end = int(_finish(p, m))
    return Timeline(
        ticks=end,
        tags=tags,
        spans=np.concatenate(spans) if spans else np.zeros(0, SPAN),
        counter_names=(*arch.COUNTERS, *arch.ASIC_COUNTERS),
        counters=m.counters,
        units=("sequencer", "asic", *(f"channel {c}" for c in range(p.channels))),
        causes=arch.CAUSES,
        activity=np.roll(m.activity, 1, axis=2),  # inside, a unit's busy ticks stand behind its stalls
        labels=labels,
        events=int(m.counters[:, :_OPEN_TICKS].sum()),
        trace=_traces(m, end) if trace else None,
        log=np.concatenate([np.zeros(0, LOG), *logs]) if trace else None,
    )


def _log(code: np.ndarray, ticks: np.ndarray, segment: int) -> np.ndarray:
    """Rows of LOG from a segment's instructions and their ticks."""
    out = np.zeros(len(code), LOG)
    out["segment"], out["index"] = segment, np.arange(len(code))
    out["tag"], out["op"] = code["tag"], code["op"]
    for k, name in enumerate(("first", "start", "complete", "end")):
        out[name] = ticks[:, k]
    return out


def _traces(m: Machine, end: int) -> np.ndarray:
    """DRAM commands of all channels before tick `end`, as Timeline.trace has them."""
    kept = [np.insert(m.trace[c, : m.v[c, _TRACED]], 1, c, axis=1) for c in range(len(m.members))]
    rows = np.concatenate(kept)
    return arch.addressed(rows[rows[:, 0] < end])


_PROBLEMS = (
    "",
    "channels must name some of the {channels} channels, and no others",
    "row, col, cols, outs, pitch reach beyond the {columns} columns of a bank",
    "col must be below the {row_columns} columns of a row",
    "gb, cols reach beyond the {gb_columns} columns of the global buffer",
    "bank must be below {n_banks}",
    "lane must be below {lanes}",
    "cols, outs and n must be at least 1",
    "dst, src, src2, src3 reach beyond the {sram_columns} columns of the SRAM",
)


@njit(cache=True)
def _columns_end(p, op, i):
    """The SRAM column behind the last that a channel's operation reaches; 0 where it reaches none."""
    top = np.int64(0)
    while (i["channels"] >> (top + 1)) and top < 31:
        top += 1
    shift, cols, outs = top * i["stride"], np.int64(i["cols"]), np.int64(i["outs"])
    if op == _WR_GB or op == _WR_BK:
        return i["src"] + shift + cols
    if op == _RD_BK:
        return i["dst"] + shift + cols
    if op == _RD_MAC:
        return i["dst"] + shift + p.bursts
    if op == _GEMV:
        return i["dst"] + shift + (outs - 1) * i["pitch"] + p.bursts
    if op == _WR_EL:
        return i["src"] + shift + outs * p.bursts
    return np.int64(0)


@njit(cache=True)
def _vectors_end(p, op, i):
    """The SRAM column behind the last that an ASIC operation reaches."""
    columns = (i["n"] + p.lanes - 1) // p.lanes
    further = (np.int64(i["outs"]) - 1) * i["pitch"] if op == _SOFTMAX or op == _ROPE else 0
    end = i["src"] + columns + further
    if op != _ARGMAX:
        end = max(end, i["dst"] + columns + further)
    if op == _ADD or op == _MUL or op == _LAYERNORM or op == _RMSNORM or op == _ROPE:
        end = max(end, i["src2"] + columns)
    if op == _LAYERNORM or op == _ROPE:
        end = max(end, i["src3"] + columns)
    return end


@njit(cache=True)
def _problem(p, code):
    """The first instruction that reaches outside the machine and what is wrong (see `_PROBLEMS`), or -1, 0."""
    columns = p.rows * p.columns
    for n in range(len(code)):
        i = code[n]
        op, cols, outs = i["op"], np.int64(i["cols"]), np.int64(i["outs"])
        if cols < 1 or outs < 1:
            return n, 7
        if op > _WR_EL:
            if i["n"] < 1:
                return n, 7
            if _vectors_end(p, op, i) > p.sram_columns:
                return n, 8
            continue
        if i["channels"] == 0 or i["channels"] >> p.channels:
            return n, 1
        if _columns_end(p, op, i) > p.sram_columns:
            return n, 8
        buffered = op == _WR_GB or op == _MAC_AB or op == _GEMV
        if buffered and i["gb"] + cols > p.gb_columns:
            return n, 4
        if op == _WR_GB or op == _RD_MAC:
            continue
        if i["col"] >= p.columns:
            return n, 3
        length = cols
        if op == _GEMV:
            length = cols * outs
        elif op == _WR_EL:
            length = i["pitch"] * (outs - 1) + 1
        if i["row"] * p.columns + i["col"] + length > columns:
            return n, 2
        if (op == _RD_BK or op == _WR_BK) and i["bank"] >= p.n_banks:
            return n, 5
        if op == _WR_EL and i["lane"] >= p.lanes:
            return n, 6
    return -1, 0


def check(p: arch.PimParams, code: np.ndarray, where: str = "") -> None:
    """Raise ValueError for the first instruction that reaches outside the machine."""
    index, problem = _problem(p, code)
    if problem:
        limits = p._asdict() | {"columns": p.rows * p.columns, "row_columns": p.columns}
        name = arch.OPS[int(code["op"][index])].name
        raise ValueError(f"{where}instruction {index} ({name}): {_PROBLEMS[problem].format_map(limits)}")
