"""The run of a kernel, and its periods: where all state recurs, they are taken in one step.

State recurs where everything is as many ticks away as it was, and of a unit's loop counters none differs, or one. What
follows is then the same, shifted, until that counter reaches its end: a step is the last of a level only there. The
first iteration of a level must lie behind, too. Addresses count by the banks that they lead to, unless some are out of
range; memory channels by the phase of their rate; sequence ids only where addresses are made of them. Nothing recurs
where a channel's banks are timed: rows and refreshes follow addresses and the time since the launch.
"""

from collections.abc import Callable

import numpy as np
from numba import njit

from tilewright.sim.cache import CALLED, INNER
from tilewright.sim.rdu_engine import (
    tick,
)
from tilewright.sim.rdu_state import (
    AGCU,
    AGCU_RING,
    AGCU_SEQUENCE,
    AGCUS,
    ALWAYS,
    ARRAY,
    ARRAY_FROZEN,
    ARRAY_SLIP,
    BASE,
    CAPACITY,
    CAUSE,
    CONFLICTS,
    COUNT,
    COUNTER,
    DEBT,
    DIRTY,
    DROPPED,
    END,
    ENDS,
    FAULT,
    FIRST_AGCU,
    FROZEN,
    GAP,
    GIVEN,
    GROUP_TURN,
    HELD_LINE,
    INSIDE,
    LEFT,
    LEVEL,
    LEVELS,
    LINE_SHIFT,
    LINES,
    MASK,
    MOVED,
    NEVER,
    NOW,
    OCCUPIED,
    ORIGIN,
    OWED,
    PARTS,
    PLANES,
    PMU_FROZEN,
    PMU_RING,
    PMU_SEQUENCE,
    PMU_SLIP,
    PUSHES,
    RATE_P,
    RATE_Q,
    READ,
    RING,
    RUN,
    SENT,
    SEQUENCE,
    SEQUENCE_MASK,
    SIDE,
    SINCE,
    SIZE,
    SKIPPED,
    SLIP,
    SOME,
    STEPS,
    STRIDE,
    TABLE_MASK,
    TAKEN,
    TIER,
    TIMED,
    TURN,
    UNDER_WAY,
    VALID,
    WHEEL,
    WRITE_FIRST,
    ZEROS,
    Machine,
)


def _flush(m: Machine) -> None:
    """Account for all ticks up to now."""
    since = m.clock[NOW] - m.chain[:, SINCE]
    np.add.at(m.activity, (np.arange(len(m.chain)), m.chain[:, CAUSE]), since)
    m.chain[:, SINCE] = m.clock[NOW]


@njit(**INNER)
def _ahead(tick, now):
    """Ticks from now on; what is over is over."""
    return max(tick - now, 0)


@njit(**INNER)
def _periods(m, s, chain):
    """How often the chain can go on as from s to m; NEVER: for ever, -1: it did not come back."""
    a, b = s.chain[chain], m.chain[chain]
    if a[RUN] != b[RUN] or a[ZEROS] != b[ZEROS] or a[ENDS] != b[ENDS]:
        return -1
    if _ahead(a[GAP], s.clock[NOW]) != _ahead(b[GAP], m.clock[NOW]):
        return -1
    out = NEVER
    for n in range(LEVELS):
        if a[COUNTER + n] != b[COUNTER + n]:
            by = b[COUNTER + n] - a[COUNTER + n]
            if out < NEVER or by < 0 or a[COUNTER + n] == 0:
                return -1
            # The step that ends the level is not taken: what depends on it would be new.
            out = (b[COUNT + n] - 1 - b[COUNTER + n]) // by
    return out


@njit(**INNER)
def _same_ring(m, s, a, b, ring, slip, frozen):
    """Whether the same comes out of two pipelines in as many ticks from now; `slip` and `frozen` are columns."""
    count = b[ring + 3] - b[ring + 2]
    if a[ring + 3] - a[ring + 2] != count or (a[frozen] < 0) != (b[frozen] < 0):
        return False
    before = a[slip] - (a[frozen] if a[frozen] >= 0 else s.clock[NOW])
    after = b[slip] - (b[frozen] if b[frozen] >= 0 else m.clock[NOW])
    for k in range(count):
        x = s.ring[a[ring] + (a[ring + 2] + k & a[ring + 1])] + before
        if x != m.ring[b[ring] + (b[ring + 2] + k & b[ring + 1])] + after:
            return False
    return True


@njit(**CALLED)
def _same_pcu(m, s, i):
    a, b = s.pcu[i], m.pcu[i]
    mask = m.clock[SEQUENCE_MASK]
    if a[PARTS] != b[PARTS] or a[LEFT] != b[LEFT] or (a[SEQUENCE] ^ b[SEQUENCE]) & mask:
        return False
    return _same_ring(m, s, a, b, RING, SLIP, FROZEN) and _same_ring(
        m, s, a, b, ARRAY, ARRAY_SLIP, ARRAY_FROZEN
    )


@njit(**CALLED)
def _same_pmu(m, s, i):
    a, b = s.pmu[i], m.pmu[i]
    if a[WRITE_FIRST] != b[WRITE_FIRST] or (a[PMU_SEQUENCE] ^ b[PMU_SEQUENCE]) & m.clock[SEQUENCE_MASK]:
        return False
    for side in range(2):
        for column in (OCCUPIED, OWED, INSIDE):
            if a[column + side] != b[column + side]:
                return False
        for k in range(PLANES):
            if s.planes[i, side, k] != m.planes[i, side, k]:
                return False
        # Addresses must meet the same banks, and the same bounds.
        differs = s.chain[a[SIDE + side], ORIGIN] ^ m.chain[b[SIDE + side], ORIGIN]
        if b[ALWAYS + side]:
            differs = (s.chain[a[SIDE + side], ORIGIN] - m.chain[b[SIDE + side], ORIGIN]) & b[TABLE_MASK]
        if differs:
            return False
    return _same_ring(m, s, a, b, PMU_RING, PMU_SLIP, PMU_FROZEN)


@njit(**CALLED)
def _same_agcu(m, s, i):
    a, b = s.agcu[i], m.agcu[i]
    for column in (UNDER_WAY, VALID, SOME, DIRTY, DEBT):
        if a[column] != b[column]:
            return False
    if (a[AGCU_SEQUENCE] ^ b[AGCU_SEQUENCE]) & m.clock[SEQUENCE_MASK]:
        return False
    before, after = s.chain[a[AGCU], ORIGIN], m.chain[b[AGCU], ORIGIN]
    if (after - before) & ((1 << b[LINE_SHIFT]) - 1):
        return False
    moved = ((after - before) & m.chain[b[AGCU], MASK]) >> b[LINE_SHIFT]
    if b[SOME] and (b[HELD_LINE] - a[HELD_LINE] - moved) & (m.chain[b[AGCU], MASK] >> b[LINE_SHIFT]):
        return False
    count = b[AGCU_RING + 3] - b[AGCU_RING + 2]
    if a[AGCU_RING + 3] - a[AGCU_RING + 2] != count:
        return False
    for k in range(count):
        x = s.ring[a[AGCU_RING] + (a[AGCU_RING + 2] + k & a[AGCU_RING + 1])]
        y = m.ring[b[AGCU_RING] + (b[AGCU_RING + 2] + k & b[AGCU_RING + 1])]
        if _ahead(x, s.clock[NOW]) != _ahead(y, m.clock[NOW]):
            return False
    return True


@njit(**CALLED)
def _same_group(m, s, i):
    a, b = s.group[i], m.group[i]
    if a[GROUP_TURN] != b[GROUP_TURN]:
        return False
    idle = True
    for k in range(b[FIRST_AGCU], b[FIRST_AGCU] + b[AGCUS]):
        idle &= not m.chain[m.agcu[k, AGCU], RUN] and not m.agcu[k, DIRTY]
        idle &= not s.chain[s.agcu[k, AGCU], RUN] and not s.agcu[k, DIRTY]
    ticks = m.clock[NOW] + m.clock[SKIPPED] - s.clock[NOW] - s.clock[SKIPPED]
    return idle or ticks % b[RATE_Q] * b[RATE_P] % b[RATE_Q] == 0


@njit(**CALLED)
def _same_link(m, s, i):
    a, b = s.link[i], m.link[i]
    if a[LEVEL] != b[LEVEL] or a[SENT] != b[SENT] or a[TURN] != b[TURN]:
        return False
    mask = ~np.int64(0xFFFFF) | m.clock[SEQUENCE_MASK]
    x, y = a[READ], b[READ]
    for k in range(b[CAPACITY]):
        at, on = a[BASE] + x, b[BASE] + y
        if _ahead(s.slots[at], s.clock[NOW]) != _ahead(m.slots[on], m.clock[NOW]):
            return False
        if k < b[LEVEL] and (s.items[at] ^ m.items[on]) & mask:
            return False
        x = x + 1 if x + 1 < a[CAPACITY] else 0
        y = y + 1 if y + 1 < b[CAPACITY] else 0
    return True


@njit(**CALLED)
def _same_queue(m, s, i):
    a, b = s.queue[i], m.queue[i]
    if a[GIVEN] - a[TAKEN] != b[GIVEN] - b[TAKEN]:
        return False
    for k in range(b[GIVEN] - b[TAKEN]):
        x = s.tokens[a[BASE] + (a[TAKEN] + k) % a[SIZE]]
        y = m.tokens[b[BASE] + (b[TAKEN] + k) % b[SIZE]]
        if _ahead(x, s.clock[NOW]) != _ahead(y, m.clock[NOW]):
            return False
    return True


@njit(**CALLED)
def _again(m, s, i, least):
    """How many periods part i of the machine allows; -1 where that is below `least`, or it is not as it was."""
    if i < len(m.chain):
        out = _periods(m, s, i)
        return out if out >= least else -1
    i -= len(m.chain)
    if i < len(m.pcu):
        return NEVER if _same_pcu(m, s, i) else -1
    i -= len(m.pcu)
    if i < len(m.pmu):
        return NEVER if _same_pmu(m, s, i) else -1
    i -= len(m.pmu)
    if i < len(m.agcu):
        return NEVER if _same_agcu(m, s, i) else -1
    i -= len(m.agcu)
    if i < len(m.group):
        return NEVER if _same_group(m, s, i) else -1
    i -= len(m.group)
    if i < len(m.link):
        return NEVER if _same_link(m, s, i) else -1
    return NEVER if _same_queue(m, s, i - len(m.link)) else -1


def _leap(m: Machine, s: Machine, times: int) -> None:
    """Take the period from s to m so many times more. Queues stay as they are, and so does NOW."""
    period = m.clock[NOW] + m.clock[SKIPPED] - s.clock[NOW] - s.clock[SKIPPED]

    def more(table: str, columns: list[int] | slice) -> np.ndarray:
        return (getattr(m, table)[:, columns] - getattr(s, table)[:, columns]) * times

    m.activity[:] += more("activity", slice(None))
    c = m.chain
    counters = slice(COUNTER, COUNTER + LEVELS)
    by = more("chain", counters)
    c[:, counters] += by
    c[:, ORIGIN] = c[:, ORIGIN] + (by * c[:, STRIDE : STRIDE + LEVELS]).sum(axis=1) & c[:, MASK]
    at_end = c[:, counters] + 1 >= c[:, COUNT : COUNT + LEVELS]
    c[:, ENDS] = np.where(at_end.all(axis=1), LEVELS + 2, (~at_end).argmax(axis=1))
    steps = more("chain", [STEPS])[:, 0]
    c[:, STEPS] += steps
    c[:, END] += np.where(steps, period * times, 0)
    line = m.agcu[:, HELD_LINE] + more("agcu", [HELD_LINE])[:, 0]
    m.agcu[:, HELD_LINE] = line & c[m.agcu[:, AGCU], MASK] >> m.agcu[:, LINE_SHIFT]
    for table, counted, sequence in (
        ("pcu", [], SEQUENCE),
        ("pmu", [CONFLICTS, MOVED, MOVED + 1, DROPPED], PMU_SEQUENCE),
        ("agcu", [LINES], AGCU_SEQUENCE),
    ):
        rows = getattr(m, table)
        rows[:, [*counted, sequence]] += more(table, [*counted, sequence])
        rows[:, sequence] &= 0xFFFFF
    m.link[:, PUSHES] += more("link", [PUSHES])[:, 0]
    m.clock[SKIPPED] += period * times


# What a run never changes.
_FIXED = (
    "kind",
    "place",
    "wire",
    "wire_queue",
    "wire_ticks",
    "switch",
    "ports",
    "flow_out",
    "flow_next",
    "tables",
    "dram",
)
AT_ONCE = 1 << 15  # ticks between two looks at whether to go on
# What `advance` keeps between calls: ticks without anything scheduled, ticks simulated, the part compared last.
ASLEEP, TICKS, PART, PROGRESS = range(4)


@njit(cache=True, nogil=True)
def advance(m, s, bits, progress, compare, until):
    """Tick by tick, until nothing is scheduled or something is wrong: 0; or until that many ticks were simulated: -1.

    With `compare` also until the state is as in the snapshot s: the number of periods that may follow.
    """
    parts = len(m.chain) + len(m.pcu) + len(m.pmu) + len(m.agcu) + len(m.group) + len(m.link) + len(m.queue)
    while progress[ASLEEP] < WHEEL and not m.clock[FAULT]:
        if progress[TICKS] >= until:
            return -1
        progress[ASLEEP] = 0 if tick(m, bits) else progress[ASLEEP] + 1
        m.clock[NOW] += 1
        progress[TICKS] += 1
        if compare:
            period = m.clock[NOW] + m.clock[SKIPPED] - s.clock[NOW] - s.clock[SKIPPED]
            least = max(64, progress[TICKS] >> 3) // period + 1  # a leap must be worth its copies
            times = NEVER
            for _ in range(parts):
                # What differed last is compared first, so most comparisons end at once.
                times = min(times, _again(m, s, progress[PART], least))
                if times < 0:
                    break
                progress[PART] = progress[PART] + 1 if progress[PART] + 1 < parts else 0
            if 0 < times < NEVER:
                return times
    return 0


def run_kernel(m: Machine, bits: int, fold: bool, stopped: Callable[[], bool] = lambda: False) -> int:
    """Until everything is quiet or something is wrong, or `stopped` says so. Returns the ticks that were simulated.

    With `fold` the state is compared in every tick with a snapshot that is renewed whenever twice as many ticks have
    passed (Brent's cycle detection).
    """
    fold = fold and not m.dram[m.group[:, TIER], TIMED].any()
    progress = np.zeros(PROGRESS, np.int64)
    began, span, kept = 0, 32, m
    while not stopped():
        renewed = began + span if fold else NEVER
        times = advance(m, kept, bits, progress, kept is not m, min(renewed, int(progress[TICKS]) + AT_ONCE))
        _flush(m)
        if times == 0:
            break
        if times > 0:
            _leap(m, kept, times)
            began, span, kept = int(progress[TICKS]), 32, m
        elif progress[TICKS] >= renewed:
            kept = Machine(*(a if n in _FIXED else a.copy() for n, a in zip(Machine._fields, m, strict=True)))
            span *= 2
    return int(progress[TICKS])
